"""The documentation is true: what it shows is run, what it names exists, and what exists is named.

Each page is read from its top to its end in a folder of its own:

- ``console`` blocks: lines that begin with ``$ `` are run by bash; what is shown below a command must be in what it
  says, line by line and in that order, though a page may leave lines out. ``...`` in a line stands for anything.
  Digests, times and fractions are compared as kinds, since they differ from machine to machine.
- ``yaml`` blocks are validated as a world, a pipeline, or as a part of one. Python and YAML blocks that begin with a
  comment that is a file's name are written to that file; other Python blocks are run.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from typer.main import get_command

import millrace
import millrace.cli.adopt
import millrace.cli.catalog
import millrace.cli.checkpoints
import millrace.cli.demo
import millrace.cli.feed
import millrace.cli.init
import millrace.cli.runs
from millrace.cli.app import app
from millrace.core import errors, spec
from millrace.core.spec import Pipeline, World
from millrace.core.specfile import parse_spec
from millrace.pipeline.formats.registry import FORMATS

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES: Final = {"console", "yaml", "python", "json", "text"}

# Run by people on a fresh clone. Of these, every make target is checked to be one.
NOT_RUN: Final = frozenset(
    {
        "make demo",
        "make test",
        "make test-peers",
        "make lint",
        "make bench",
        "make install",
        "make schema",
        "make venv",
        ". .venv/bin/activate",
        "pip install .",
        "pip install '.[cloud]'",
        "pip install '.[cloud,tokenizers]'",
    }
)

COMMANDS: Final[Mapping[str, Any]] = get_command(app).commands  # type: ignore[attr-defined]


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page it begins at."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that its first line names, if it does."""
        match = re.match(r"#\s*([\w./-]+\.(?:py|ya?ml))\b", self.text)
        return match[1] if match else None


def blocks(page: Path) -> Iterator[Block]:
    language, start = "", 0
    lines: list[str] = []
    for i, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if start:
                yield Block(language, "\n".join(lines) + "\n", start)
                start = 0
            else:
                language, start, lines = line[3:].strip(), i, []
        elif start:
            lines.append(line)
    assert not start, f"{_name(page)}:{start}: the block has no end"


# --- what is shown is run -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", [p for p in PAGES if any(blocks(p))], ids=_name)
def test_a_page_does_what_it_shows(page: Path, tmp_path: Path) -> None:
    folder = tmp_path
    for block in blocks(page):
        where = f"{_name(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: say what it is: {', '.join(sorted(LANGUAGES))}"
        if block.language == "yaml":
            _validate(block, where)
        if block.language in {"yaml", "python"} and block.file is not None:
            assert (folder / block.file).resolve().is_relative_to(tmp_path.resolve())
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            done = subprocess.run([sys.executable, "-c", block.text], cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, f"{where}:\n{done.stderr}"
        elif block.language == "console":
            folder = _run(block, where, folder)


def _run(block: Block, where: str, folder: Path) -> Path:
    """Run a block's commands; gives the folder they end in."""
    commands: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append((line[2:], []))
        else:
            assert commands, f"{where}: a console block begins with a command: $ ..."
            commands[-1][1].append(line)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MILLRACE", "PYTEST"))}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "120",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for command, shown in commands:
        if command in NOT_RUN:
            continue
        script = f"{command}\nstatus=$?\npwd >&3\nexit $status"
        read, write = os.pipe()
        done = subprocess.run(
            ["bash", "-c", f"exec 3>&{write}; {script}"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            pass_fds=(write,),
        )
        os.close(write)
        with os.fdopen(read) as pwd:
            folder = Path(pwd.read().strip())
        assert done.returncode == 0, f"{where}: {command}: exit code {done.returncode}\n{done.stdout}"
        _compare(shown, done.stdout, f"{where}: {command}")
    return folder


_KINDS: Final = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "<when>"),
    (re.compile(r"\b[0-9a-f]{12,64}\b"), "<digest>"),
    (re.compile(r"\b(\d+h \d\dm|\d+m \d\ds|\d+(\.\d+)?s)\b"), "<time>"),
    (re.compile(r"\b\d+\.\d+(\.\d+)*\b"), "<number>"),
    (re.compile(r"\s+"), " "),
)


def _plain(line: str) -> str:
    for pattern, kind in _KINDS:
        line = pattern.sub(kind, line)
    return line.strip()


def _compare(shown: list[str], said: str, where: str) -> None:
    lines = [_plain(line) for line in said.splitlines()]
    at = 0
    for line in shown:
        wanted = re.compile(".*".join(re.escape(part) for part in _plain(line).split("...")))
        while at < len(lines) and not wanted.fullmatch(lines[at]):
            at += 1
        assert at < len(lines), f"{where}: it does not say, or not there: {line}\nit says:\n{said}"
        at += 1


_WORLD: Final = {"clouds": {"a": {"regions": {"r": {"jurisdiction": "us", "stores": {"s": {"url": "memory://s"}}}}}}}
_PIPELINE: Final = {"dataset": "d", "sources": [{"url": "file://./data", "format": "text"}]}


def _validate(block: Block, where: str) -> None:
    found = yaml.safe_load(block.text)
    if isinstance(found, list):
        found = {"transforms" if "url" not in found[0] else "sources": found}
    model: type[BaseModel]
    if set(found) & set(World.model_fields):
        model, whole = World, _WORLD | found
    else:
        model, whole = Pipeline, _PIPELINE | found
        if any(s.get("format") == "files" for s in whole["sources"]):
            whole.setdefault("transforms", [])
    # What is whole is checked as it is written, so that duplicate keys and lines count too.
    text = block.text if set(whole) == set(found) else yaml.safe_dump(whole)
    parse_spec(model, text, file=where)


# --- what is named exists -----------------------------------------------------------------------------------------


def _invocations(page: Path) -> Iterator[tuple[str, str]]:
    """(command, rest) of every ``millrace ...`` that a page writes as code."""
    text = page.read_text(encoding="utf-8")
    code = [m[1] for m in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", text)]
    code += [
        line[2:] for b in blocks(page) if b.language == "console" for line in b.text.splitlines() if line[:2] == "$ "
    ]
    for span in code:
        for match in re.finditer(r"(?:^|[;&|(]\s*)millrace ([a-z][\w|-]*)([^;&|]*)", span):
            yield match[1], match[2]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_and_option_exists(page: Path) -> None:
    for command, rest in _invocations(page):
        for name in command.split("|"):
            assert name in COMMANDS, f"{_name(page)}: there is no command millrace {name}"
            known = {o for p in COMMANDS[name].params for o in p.opts} | {"--help", "-h"}
            for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", rest):
                assert option in known, f"{_name(page)}: millrace {name} has no option {option}"


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{_name(page)}: {target} leads nowhere"
        if anchor:
            assert anchor in _anchors(there), f"{_name(page)}: {target}: that page has no such heading"


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_named_in_code_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:tests|src|docs|bench|examples)/[\w./-]*)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{_name(page)}: {name} is not there"


def test_every_exempt_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    wanted = {c.split()[1] for c in NOT_RUN if c.startswith("make ")}
    wanted |= {m for p in PAGES for m in re.findall(r"`make ([a-z-]+)", p.read_text(encoding="utf-8"))}
    assert sorted(wanted - targets) == []


def test_every_exempt_command_is_used() -> None:
    used = {line[2:] for p in PAGES for b in blocks(p) for line in b.text.splitlines() if line[:2] == "$ "}
    assert sorted(c for c in NOT_RUN - used if not c.startswith("make ")) == []


# --- what exists is named -----------------------------------------------------------------------------------------


def test_every_command_and_option_is_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## millrace ([\w-]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(COMMANDS)
    for name, command in COMMANDS.items():
        wanted = {o for p in command.params for o in p.opts if o.startswith("--")} - {"--help"}
        rows = set(re.findall(r"^\| `(?:-\w`, `)?(--[\w-]+)", sections[name], re.MULTILINE))
        common = {"--world", "--json"} & wanted
        assert rows == wanted - common, f"millrace {name}"


def _rows(page: str, heading: str) -> dict[str, tuple[str, str]]:
    """Field name to (default, meaning), of the table under a heading."""
    match = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
    assert match, f"there is no heading {heading!r}"
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| (.*) \|$", match[1], re.MULTILINE)
    return {name: (default.strip(), meaning) for name, default, meaning in rows}


@pytest.mark.parametrize(
    ("file", "heading", "model"),
    [
        ("world.md", "The file", spec.World),
        ("world.md", "A cloud", spec.Cloud),
        ("world.md", "A region", spec.Region),
        ("world.md", "A store", spec.StoreSpec),
        ("pipeline.md", "The file", spec.Pipeline),
        ("pipeline.md", "sources", spec.Source),
        ("pipeline.md", "sql", spec.SqlTransform),
        ("pipeline.md", "python", spec.PythonTransform),
        ("pipeline.md", "validate", spec.ValidateRules),
        ("pipeline.md", "dedup", spec.Dedup),
        ("pipeline.md", "tokenize", spec.TokenizeRules),
        ("pipeline.md", "shards", spec.Shards),
        ("pipeline.md", "placement", spec.Placement),
        ("pipeline.md", "quarantine", spec.Quarantine),
    ],
)
def test_every_field_is_documented_with_its_default(file: str, heading: str, model: type[BaseModel]) -> None:
    rows = _rows((ROOT / "docs" / file).read_text(encoding="utf-8"), heading)
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    assert set(fields) - set(rows) == set(), f"docs/{file}: {heading}"
    assert set(rows) - set(fields) <= {"timeout"}, f"docs/{file}: {heading}"
    for name, field in fields.items():
        _check_default(field, rows[name][0], f"docs/{file}: {heading}: {name}")


def _check_default(field: FieldInfo, cell: str, where: str) -> None:
    if field.is_required():
        assert cell == "required", where
        return
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        assert cell == "below", where
        return
    if default in (None, (), {}):
        assert cell.startswith("none"), where
        return
    kind: Any = Annotated[field.annotation, None, *field.metadata]
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    assert adapter.validate_python(yaml.safe_load(cell.strip("`"))) == default, where


def test_every_format_has_its_section() -> None:
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) >= set(FORMATS)


def test_every_error_has_its_line() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert rows == set(errors.__all__) - {"MillraceError"}


def _sentences() -> list[str]:
    """Every text that the code can say; what is put into it is a NUL."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_what_a_feed_is_said_to_say_is_said_by_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    section = re.search(r"^## Feeding\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section
    sentences = _sentences()
    quoted: list[str] = []
    for table in re.findall(r"(?:^\|.*\n)+", section[1], re.MULTILINE):
        heading, _, *rows = table.splitlines()
        says = heading.split("|").index(" it says ")
        quoted += [span for row in rows for span in re.findall(r"`([^`]+)`", row.split("|")[says])]
    assert len(quoted) > 50
    patterns = {span: re.compile(".*".join(map(re.escape, span.split("..."))), re.DOTALL) for span in quoted}
    unsaid = [span for span, wanted in patterns.items() if not any(map(wanted.search, sentences))]
    assert not unsaid, f"docs/troubleshooting.md: nothing in the code says {unsaid}"


def test_everything_a_user_imports_is_documented() -> None:
    """``millrace.NAME`` stands in the page on feeding, or in one that it links to."""
    first = ROOT / "docs" / "feeding.md"
    text = first.read_text(encoding="utf-8")
    linked = [first.parent / target for target in re.findall(r"\]\(([\w/.-]+\.md)", text)]
    pages = text + "".join(page.read_text(encoding="utf-8") for page in linked if page.exists())
    missing = [name for name in millrace.__all__ if not re.search(rf"\b{name}\b", pages)]
    assert not missing, f"docs/feeding.md and the pages it links to don't name {missing}"
    assert all(getattr(millrace, name) is not None for name in millrace.__all__)


def test_the_commands_were_loaded() -> None:
    modules = (millrace.cli.catalog, millrace.cli.demo, millrace.cli.init, millrace.cli.runs)
    assert all(m.__name__.rpartition(".")[2] for m in modules)
    assert {"run", "verify", "init", "demo"} <= set(COMMANDS)
