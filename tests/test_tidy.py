"""The habits of this code, as tests: lengths, names, exports, layers, and what must not be in a repository."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FILE_LINES = 600
FUNCTION_LINES = 70
LINE_LETTERS = 120

# Spelled so that this file does not match itself.
MACHINE = re.compile(r"(?<![\w.})])/(?:root|work|home|Users)/(?!\W)")
HOSTS = re.compile(r"artifact(?:ory)|\bj(?:frog)\b|pypi-(?:more)|\.(?:internal|corp|lan)\b(?=[/:])", re.IGNORECASE)
SECRETS = re.compile(
    r"AKIA(?!IOSFODNN7EXAMPLE)[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\bgh[pousr]_\w{36}|AIza[\w-]{35}"
)
OTHERS = re.compile(r"\b(?:clau" r"de|chat" r"gpt|anth" r"ropic|co" r"pilot)\b", re.IGNORECASE)
LATER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _repository() -> list[Path]:
    """Every text file that is or would be committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode == 0:
        names = [name for name in listed.stdout.decode().split("\0") if name]
        files = [ROOT / name for name in names]
    else:  # an unpacked archive
        skip = {"__pycache__", "build", "dist"}
        files = [
            f
            for f in ROOT.rglob("*")
            if not any(p in skip or p.endswith(".egg-info") or (p.startswith(".") and p != ".ci") for p in f.parts)
        ]
    return [f for f in sorted(files) if f.is_file() and b"\0" not in f.read_bytes()[:4096]]


# --- the sources --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=_name)
def test_a_module_keeps_the_habits(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    tree = ast.parse(text)
    problems: list[str] = []

    if len(lines) > FILE_LINES:
        problems.append(f"has {len(lines)} lines; over {FILE_LINES} is two files")
    problems += [f"line {i} has {len(line)} letters" for i, line in enumerate(lines, 1) if len(line) > LINE_LETTERS]
    if not ast.get_docstring(tree):
        problems.append("has no docstring")
    if file.stem in {"utils", "util", "common", "misc", "helpers"}:
        problems.append("is named for nothing in particular")
    for function in _functions(tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > FUNCTION_LINES:
            problems.append(f"line {function.lineno}: {function.name} has {length} lines, more than {FUNCTION_LINES}")
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Handler", "Helper", "Utils")):
            problems.append(f"line {node.lineno}: {node.name} says nothing of what it is")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            problems.append(f"line {node.lineno}: print is for scripts; the CLI has Output")
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"} and "wiring" not in file.parts:
            problems.append(f"line {node.lineno}: only wiring reads the environment")
        if isinstance(node, ast.ExceptHandler) and _swallows_all(node):
            problems.append(f"line {node.lineno}: an error of any kind is swallowed")
    assert not problems, f"{_name(file)}: " + "; ".join(problems)


def _swallows_all(node: ast.ExceptHandler) -> bool:
    everything = node.type is None or (
        isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}
    )
    return everything and all(isinstance(statement, ast.Pass) for statement in node.body)


@pytest.mark.parametrize("file", [f for f in SOURCES if f.name != "__main__.py"], ids=_name)
def test_a_module_says_what_it_exports(file: Path) -> None:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if all(isinstance(statement, ast.Expr) for statement in body):
        return  # a package with a docstring and nothing else
    if file.name == "jax.py":
        pytest.importorskip("jax")  # a library of its users, not of ours
    module = importlib.import_module(_module(file))
    names = getattr(module, "__all__", None)
    assert names is not None, f"{_name(file)} has no __all__"
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{_name(file)} exports what it has not: {missing}"
    twice = [name for name, count in Counter(names).items() if count > 1]
    assert not twice, f"{_name(file)} exports twice: {twice}"


@pytest.mark.parametrize(("library", "adapter"), [("torch", "feed/torch"), ("jax", "feed/jax.py")])
def test_a_library_of_users_is_imported_by_its_adapter_alone(library: str, adapter: str) -> None:
    for file in SOURCES:
        if file.relative_to(ROOT / "src" / "millrace").as_posix().startswith(adapter):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.partition(".")[0] == library for name in names), f"{_name(file)} imports {library}"


_LOADED = """
import sys
import {module}
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & set({heavy!r})))
"""


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("millrace", set()), ("millrace.client.dataset", {"numpy", "pyarrow", "pydantic", "asyncio"})],
)
def test_a_training_loop_loads_what_it_needs_and_no_more(module: str, allowed: set[str]) -> None:
    heavy = {"asyncio", "numpy", "pyarrow", "pydantic", "duckdb", "obstore", "tokenizers", "torch", "jax", "fsspec"}
    heavy |= {"typer", "rich"}
    code = _LOADED.format(module=module, heavy=sorted(heavy))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= allowed, f"import {module} loads more than {sorted(allowed)}"


def test_test_files_have_names_of_their_own() -> None:
    names = Counter(f.name for f in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


# --- layers -------------------------------------------------------------------------------------------------------


def test_who_may_import_whom() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contracts_say_what_the_design_says() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    # What stands in parentheses may be missing: rooms that come later.
    order = [{part.strip(" ()").removeprefix("millrace.") for part in layer.split("|")} for layer in layers]
    built = [sorted(name for name in layer if (ROOT / "src" / "millrace" / name).exists()) for layer in order]
    assert [layer for layer in built if layer] == [
        ["cli"],
        ["client"],
        ["wiring"],
        ["agent", "catalog", "control"],
        ["coord", "decide", "feed", "pipeline", "stores"],
        ["telemetry"],
        ["core"],
    ]
    forbidden: dict[str, set[str]] = {}
    for contract in contracts:
        if contract["type"] == "forbidden":
            for source in contract["source_modules"]:
                forbidden.setdefault(source, set()).update(contract["forbidden_modules"])
    pure = {"time", "random", "asyncio", "os", "socket", "threading", "grpc"}
    assert pure <= forbidden["millrace.core"]
    assert pure <= forbidden["millrace.decide"]
    for part in ("cipher", "order", "mixing", "share", "tally", "sources_choice", "eviction"):
        assert pure <= forbidden[f"millrace.feed.{part}"]
    assert {"obstore", "sqlite3"} <= forbidden["millrace.core"] & forbidden["millrace.decide"]
    assert {"millrace.stores", "millrace.pipeline"} <= forbidden["millrace.control"]
    for injected in ("millrace.control", "millrace.agent", "millrace.catalog"):
        assert {"millrace.stores", "millrace.coord"} <= forbidden[injected]


def test_every_package_has_its_layer() -> None:
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = " | ".join(next(c["layers"] for c in contracts if c["type"] == "layers"))
    named = {part.strip(" ()").removeprefix("millrace.") for part in layers.split("|")}
    there = {f.parent.name for f in (ROOT / "src" / "millrace").glob("*/__init__.py")}
    assert there <= named, f"no layer is named for {sorted(there - named)}"


# --- the repository -----------------------------------------------------------------------------------------------


def test_nothing_of_a_machine_or_a_secret_is_in_the_repository() -> None:
    problems = []
    for file in _repository():
        if file.name == "LICENSE":
            continue
        for i, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            for what, pattern in (
                ("a path of some machine", MACHINE),
                ("a host of some network", HOSTS),
                ("a secret", SECRETS),
                ("a name that has nothing to do here", OTHERS),
                ("work left for later", LATER),
            ):
                if pattern.search(line):
                    problems.append(f"{_name(file)}:{i}: {what}: {line.strip()[:100]}")
    assert not problems, "\n".join(problems)


def test_every_dependency_has_its_line() -> None:
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    wanted += PYPROJECT["build-system"]["requires"]
    names = {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in wanted} - {"millrace"}
    page = (ROOT / "docs" / "design" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert sorted(names - set(rows)) == [], "these have no line in docs/design/dependencies.md"
    assert sorted(set(rows) - names) == [], "these have a line there and are no dependency"


def test_the_version_is_in_the_changelog() -> None:
    version = PYPROJECT["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(version)}\b", text, re.MULTILINE), f"CHANGELOG.md has no entry for {version}"


def test_what_a_release_needs_is_there() -> None:
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", ".ci/run", "src/millrace/py.typed"):
        assert (ROOT / name).is_file(), f"{name} is missing"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run can't be run"
