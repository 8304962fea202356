from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.errors import MillraceError, Nondeterministic, SpecError, TransformError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import PythonTransform, SqlTransform, Transform
from millrace.pipeline.process import Chain, ProcessContext
from millrace.pipeline.records import Records

CHUNK = Chunk(0, 0, (SourceObject("a.txt", 10, "v"), SourceObject("b.txt", 10, "v")), 0, 20)
SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string())])
FRESH = count()

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module that nobody has imported yet; gives its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(source: str) -> str:
        name = f"transforms_{next(FRESH)}"
        (tmp_path / f"{name}.py").write_text(f"import pyarrow as pa\nimport pyarrow.compute as pc\n{source}\n")
        return name

    return module


def build(name: str, function: str = "f") -> Chain:
    return Chain.build([PythonTransform(python=f"{name}:{function}")], base=Path("/where/it/lies"), schema=SCHEMA)


def records(*batches: list[str]) -> Iterator[Records]:
    at = 0
    for texts in batches:
        positions = np.arange(at, at + len(texts), dtype=np.int64)
        at += len(texts)
        paths = [CHUNK.objects[p % 2].path for p in positions]
        batch = pa.RecordBatch.from_arrays([pa.array(paths), pa.array(texts)], schema=SCHEMA)
        yield Records(batch, (positions % 2).astype(np.int32), positions)


def context(rejected: list[Quarantined] | None = None, sample_every: int = 64) -> ProcessContext:
    bad: list[Quarantined] = [] if rejected is None else rejected
    return ProcessContext(CHUNK, "row", bad.append, lambda name, s: nullcontext(), sample_every=sample_every)


def texts(chain: Chain, *batches: list[str], rejected: list[Quarantined] | None = None) -> list[str]:
    return [t for b in chain.run(records(*batches), context(rejected)) for t in b.column("text").to_pylist()]


UPPER = "def f(batch):\n    return batch.set_column(1, 'text', pc.utf8_upper(batch.column('text')))"


def test_a_function_from_batch_to_batch(write: Write) -> None:
    assert texts(build(write(UPPER)), ["a", "b"], ["c"]) == ["A", "B", "C"]


def test_dropping_every_row_leaves_no_batch(write: Write) -> None:
    chain = build(write("def f(batch):\n    return batch.slice(0, 0)"))
    assert list(chain.run(records(["a"]), context())) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def f(b): return {'a': [1]}", "returned dict, not a pyarrow.RecordBatch"),
        ("def f(b): return None", "returned NoneType, not a pyarrow.RecordBatch"),
        ("def f(b): return pa.table(b)", "returned pyarrow.Table, not a pyarrow.RecordBatch; use table.combine"),
        ("def f(b): return [b]", "returned list, not a pyarrow.RecordBatch"),
        ("def f(b): return pa.RecordBatch.from_arrays([b.column(0)] * 2, names=['x', 'x'])", "two columns called 'x'"),
        ("def f(b): return b.select([])", "a batch without columns"),
        (
            "def f(b):\n"
            "    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(bytes([0,0,0,0,1,0,0,0])), "
            "pa.py_buffer(b'\\xff')])\n"
            "    return pa.RecordBatch.from_arrays([bad], names=['text'])",
            "returned a malformed batch",
        ),
    ],
)
def test_what_it_must_not_return(write: Write, source: str, words: str) -> None:
    name = write(source)
    with pytest.raises(TransformError) as caught:
        texts(build(name), ["a", "b"])
    assert str(caught.value).startswith(f"python {name}:f")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("later", "words"),
    [
        ("{'text': pa.array(['x'], pa.binary())}", "column 'text' is string in the chunk's first batch and binary in"),
        ("{'text': pa.array([None])}", "column 'text' is string in the chunk's first batch and null in a later one"),
        ("{'words': ['x']}", "left out column 'text' in a later batch"),
        ("{'text': ['x'], 'more': [1]}", "added column 'more' in a later batch"),
    ],
)
def test_the_schema_stays_the_same_within_a_chunk(write: Write, later: str, words: str) -> None:
    name = write(
        "def f(b):\n"
        f"    columns = {{'text': ['x']}} if b.column('text')[0].as_py() == 'a' else {later}\n"
        "    return pa.RecordBatch.from_pydict(columns)"
    )
    with pytest.raises(TransformError, match=words):
        texts(build(name), ["a"], ["b"])


def test_types_come_out_plain(write: Write) -> None:
    name = write(
        "def f(b):\n"
        "    t = b.column('text')\n"
        "    return pa.RecordBatch.from_arrays([t.dictionary_encode(), t.cast(pa.string_view()), "
        "t.cast(pa.large_string()), pa.array([[x] for x in t.to_pylist()], pa.large_list(pa.large_string()))], "
        "schema=pa.schema([('d', pa.dictionary(pa.int32(), pa.string())), ('v', pa.string_view()), "
        "('l', pa.large_string()), ('n', pa.large_list(pa.large_string()))], metadata={'made': 'by me'}))"
    )
    [batch] = build(name).run(records(["a", "b"]), context())
    assert [str(t) for t in batch.schema.types] == ["string", "string", "string", "list<item: string>"]
    assert batch.schema.metadata is None
    assert batch.to_pylist()[1] == {"d": "b", "v": "b", "l": "b", "n": ["b"]}


RAISES = (
    "def f(batch):\n"
    "    for t in batch.column('text').to_pylist():\n"
    "        if t.startswith('bad'):\n"
    "            raise ValueError('no luck\\nwith ' + t)\n"
    "    return batch"
)


def test_records_it_raises_on_are_set_aside_alone(write: Write) -> None:
    rejected: list[Quarantined] = []
    name = write(RAISES)
    found = texts(build(name), ["a", "bad1", "b", "c", "bad2", "d"], ["e", "bad3"], rejected=rejected)
    assert found == ["a", "b", "c", "d", "e"]
    assert rejected == [
        Quarantined("b.txt", "row 1", "process", f"python: {name}:f", "ValueError: no luck with bad1"),
        Quarantined("a.txt", "row 4", "process", f"python: {name}:f", "ValueError: no luck with bad2"),
        Quarantined("b.txt", "row 7", "process", f"python: {name}:f", "ValueError: no luck with bad3"),
    ]


def test_leaving_the_interpreter_is_the_transforms_error(write: Write) -> None:
    rejected: list[Quarantined] = []
    name = write("import sys\ndef f(b):\n    sys.exit(3)")
    assert texts(build(name), ["a"], rejected=rejected) == []
    assert rejected[0].reason == "SystemExit: 3"


def test_an_interrupt_is_not_swallowed(write: Write) -> None:
    chain = build(write("def f(b):\n    raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        texts(chain, ["a"])


def test_a_failure_of_many_that_no_one_has_alone_is_the_transforms(write: Write) -> None:
    name = write("def f(b):\n    if b.num_rows > 1: raise RuntimeError('too many')\n    return b")
    with pytest.raises(TransformError, match=r"failed on 2 records together \(RuntimeError: too many\) and on none"):
        texts(build(name), ["a", "b", "c", "d"])


def test_printing_is_harmless(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    assert texts(build(write("def f(b):\n    print('hello')\n    return b")), ["a"]) == ["a"]
    assert "hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "n = 0\ndef f(b):\n    global n\n    n += 1\n"
            "    return pa.RecordBatch.from_pydict({'path': ['p'] * 5, 'text': ['x', 'x', 'x', str(n), 'x']})",
            "column 'text', row 3 of the batch that starts at row 0 of a.txt",
        ),
        (
            "n = 0\ndef f(b):\n    global n\n    n += 1\n    return b.slice(n)",
            "there are 4 rows once and 3 the next time of the batch",
        ),
        (
            "n = 0\ndef f(b):\n    global n\n    n += 1\n    if n > 1: raise OSError('gone')\n    return b",
            "it went well once and failed the next time with OSError: gone",
        ),
    ],
)
def test_a_second_run_that_differs_is_named(write: Write, source: str, words: str) -> None:
    name = write(source)
    with pytest.raises(Nondeterministic) as caught:
        texts(build(name), ["a", "b", "c", "d", "e"])
    assert str(caught.value).startswith(f"python {name}:f gives different output for the same input: ")
    assert words in str(caught.value)


def test_every_so_manieth_batch_runs_twice(write: Write) -> None:
    entered: list[tuple[str, float]] = []

    @contextmanager
    def deadline(name: str, seconds: float) -> Iterator[None]:
        entered.append((name, seconds))
        yield

    name = write("def f(b):\n    return b")
    chain = Chain.build([PythonTransform(python=f"{name}:f", timeout=5)], base=Path(), schema=SCHEMA)
    list(chain.run(records(*[["a"]] * 7), ProcessContext(CHUNK, "row", lambda q: None, deadline, sample_every=3)))
    assert entered == [(f"python {name}:f", 5.0)] * (7 + 3)
    entered.clear()
    list(chain.run(records(*[["a"]] * 7), ProcessContext(CHUNK, "row", lambda q: None, deadline, sample_every=0)))
    assert len(entered) == 7


def test_after_it_a_row_is_found_by_its_path(write: Write) -> None:
    rejected: list[Quarantined] = []
    name = write("def f(b):\n    return b.take(pa.array(range(b.num_rows - 1, -1, -1)))")
    steps: list[Transform] = [
        PythonTransform(python=f"{name}:f"),
        SqlTransform(sql="SELECT path, text::INTEGER AS i FROM records"),
    ]
    chain = Chain.build(steps, base=Path(), schema=SCHEMA)
    assert chain.schema is None
    batches = list(chain.run(records(["x", "1", "2", "y"]), context(rejected)))
    assert [i for b in batches for i in b.column("i").to_pylist()] == [2, 1]
    assert [(q.path, q.position) for q in rejected] == [("b.txt", ""), ("a.txt", "")]


def test_without_a_path_the_objects_of_the_batch_are_named(write: Write) -> None:
    rejected: list[Quarantined] = []
    name = write("def f(b):\n    return b.select(['text'])")
    steps: list[Transform] = [
        PythonTransform(python=f"{name}:f"),
        SqlTransform(sql="SELECT text::INTEGER AS i FROM records"),
    ]
    chain = Chain.build(steps, base=Path(), schema=SCHEMA)
    list(chain.run(records(["1", "x"], ["y"]), context(rejected)))
    assert [(q.path, q.position) for q in rejected] == [("a.txt or 1 more", ""), ("a.txt", "")]


# --- at build ---------------------------------------------------------------------------------------


def refusal(name: str, function: str = "f") -> MillraceError:
    with pytest.raises(MillraceError) as caught:
        build(name, function)
    assert str(caught.value).startswith("transforms.0.python: ")
    return caught.value


def test_a_module_that_is_not_there() -> None:
    error = refusal("no_such_package.clean")
    assert isinstance(error, SpecError)
    assert "there is no module 'no_such_package' in /where/it/lies or among the installed packages" in str(error)


def test_a_module_that_needs_what_is_not_installed(write: Write) -> None:
    name = write("import no_such_library")
    error = refusal(name)
    assert isinstance(error, SpecError)
    assert f"{name} needs the module 'no_such_library', which is not installed" in str(error)


def test_a_module_that_raises(write: Write) -> None:
    name = write("1 / 0")
    error = refusal(name)
    assert isinstance(error, TransformError)
    assert f"importing {name} failed with ZeroDivisionError: division by zero" in str(error)


def test_a_function_that_is_not_there(write: Write) -> None:
    name = write("def normalise(b): return b")
    error = refusal(name, "normalize")
    assert "there is no function 'normalize' in " in str(error)
    assert f"{name}.py; did you mean 'normalise'?" in str(error)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("f = 3", "is of type int, not a function"),
        ("class f: pass", "is a class, not a function"),
        ("async def f(b): return b", "must be a plain function"),
        ("def f(b): yield b", "must be a plain function"),
    ],
)
def test_what_is_no_plain_function(write: Write, source: str, words: str) -> None:
    assert words in str(refusal(write(source)))
