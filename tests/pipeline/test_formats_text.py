from __future__ import annotations

import gzip
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.core.errors import SourceError, UsageError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import FORMATS, Source
from millrace.pipeline.formats.files import FILES, PIECE_BYTES
from millrace.pipeline.formats.lines import LINES
from millrace.pipeline.formats.registry import format_named
from millrace.pipeline.formats.text import TEXT
from millrace.pipeline.records import Format, ReadContext, Records


class Objects:
    """Blocking reads over a dictionary, which count bytes."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self.data = data
        self.asked = 0

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(path, len(data), "1") for path, data in self.data.items())

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        view = memoryview(self.data[obj.path])[start : None if length is None else start + length]
        self.asked += len(view)
        return view

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def read(
    form: Format, objects: Objects, rejects: list[Quarantined], chunks: Sequence[Chunk] = (), **limits: int
) -> list[Records]:
    src = Source.model_validate({"url": "file://./x", "format": form.name})
    schema = form.schema(objects, src, objects.all())
    context = ReadContext(src, schema, objects, rejects.append, **{"max_record_bytes": 10**6, **limits})
    whole = Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))
    out = [records for chunk in chunks or (whole,) for records in form.read(chunk, context)]
    for records in out:
        assert records.batch.schema.equals(schema, check_metadata=True)
        assert len(records.objects) == len(records.positions) == records.batch.num_rows > 0
        assert (str(records.objects.dtype), str(records.positions.dtype)) == ("int32", "int64")
        records.batch.validate(full=True)
    return out


def rows(found: Sequence[Records]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for records in found for row in records.batch.to_pylist()]


def good(form: Format, objects: Objects, **limits: int) -> list[tuple[Any, ...]]:
    rejects: list[Quarantined] = []
    found = rows(read(form, objects, rejects, (), **limits))
    assert rejects == []
    return found


def ranges(form: Format, objects: Objects, chunk_bytes: int) -> list[Chunk]:
    src = Source.model_validate({"url": "file://./x", "format": form.name})
    found = []
    for obj in objects.all():
        cuts = form.cut(objects, src, obj, chunk_bytes) if obj.size_bytes > chunk_bytes else (0, obj.size_bytes)
        found += [Chunk(0, 0, (obj,), a, b) for a, b in itertools.pairwise(cuts)]
    return found


def test_every_format_of_the_spec_is_there() -> None:
    assert [format_named(name).name for name in FORMATS] == list(FORMATS)
    with pytest.raises(UsageError, match="no format 'xml'"):
        format_named("xml")


# --- text -------------------------------------------------------------------------------------------


def test_text_is_a_record_a_file_with_any_name() -> None:
    files = {"a b": b"x y", "n\nl": "ü\0\r\n".encode(), "é/ﬀ": b"", "z.gz": gzip.compress(b"packed"), ".x": b"."}
    expected = [(p, "packed" if p == "z.gz" else d.decode()) for p, d in files.items()]
    assert good(TEXT, Objects(files)) == expected
    for limit in range(1, 7):
        assert good(TEXT, Objects(files), batch_rows=limit) == expected
        assert good(TEXT, Objects(files), batch_bytes=limit) == expected


def test_text_batches_close_when_they_reach_their_limit() -> None:
    objects = Objects({str(i): b"x" * 10 for i in range(10)})
    assert [r.batch.num_rows for r in read(TEXT, objects, [], batch_bytes=25)] == [3, 3, 3, 1]
    assert [r.batch.num_rows for r in read(TEXT, objects, [], batch_rows=4)] == [4, 4, 2]
    assert [r.objects.tolist() for r in read(TEXT, objects, [], batch_rows=4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]


def test_text_that_is_not_utf8_is_rejected_by_itself() -> None:
    objects = Objects({"a": b"ok", "b": b"ab\xff", "c": b"fine", "d.gz": gzip.compress(b"\xc3")})
    rejects: list[Quarantined] = []
    found = read(TEXT, objects, rejects)
    assert rows(found) == [("a", "ok"), ("c", "fine")]
    assert found[0].objects.tolist() == [0, 2]
    assert [(q.path, q.position, q.stage, q.rule) for q in rejects] == [
        ("b", "byte 2", "ingest", "utf-8"),
        ("d.gz", "byte 0", "ingest", "utf-8"),
    ]
    assert "invalid start byte at byte 2" in rejects[0].reason


def test_a_batch_of_nothing_but_bad_text_is_no_batch() -> None:
    rejects: list[Quarantined] = []
    assert read(TEXT, Objects({"a": b"\xff"}), rejects) == []
    assert len(rejects) == 1


def test_text_that_is_too_long_is_not_read() -> None:
    objects = Objects({"a": b"x" * 5000, "b": b"y", "bomb.gz": gzip.compress(bytes(20_000_000)), "c": b"z" * 1000})
    rejects: list[Quarantined] = []
    found = read(TEXT, objects, rejects, max_record_bytes=1000)
    assert [path for path, _ in rows(found)] == ["b", "c"]
    assert found[0].objects.tolist() == [1, 3]
    assert [(q.path, q.rule) for q in rejects] == [("a", "max_record"), ("bomb.gz", "max_record")]
    assert "5000 bytes, more than max_record (1000)" in rejects[0].reason
    assert objects.asked < 30_000


@pytest.mark.parametrize("form", [TEXT, LINES])
def test_a_truncated_gzip_names_the_file(form: Format) -> None:
    objects = Objects({"ok": b"x", "b.gz": gzip.compress(b"x" * 100)[:-9]})
    with pytest.raises(SourceError, match=r"^b\.gz ends in the middle of its gzip stream"):
        read(form, objects, [])


# --- lines ------------------------------------------------------------------------------------------


def lines_of(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    if not parts[-1]:
        parts.pop()
    return [part.removesuffix(b"\r") for part in parts]


_line_bytes = st.lists(
    st.sampled_from([b"\n", b"\r\n", b"a", "é".encode(), b"\r", b"long line ", b""]), max_size=40
).map(b"".join)


@given(_line_bytes, st.integers(1, 50))
@example(b"a\n\n\nb", 1)
@example(b"\n", 1)
def test_lines_are_the_same_however_they_are_cut(data: bytes, chunk_bytes: int) -> None:
    objects = Objects({"f": data})
    expected = [("f", line.decode()) for line in lines_of(data)]
    assert good(LINES, objects) == expected
    rejects: list[Quarantined] = []
    found = read(LINES, objects, rejects, ranges(LINES, objects, chunk_bytes))
    assert rows(found) == expected
    assert rejects == []
    positions = [int(p) for r in found for p in r.positions]
    assert all(data[p - 1 : p] == b"\n" for p in positions if p)
    assert positions == sorted(set(positions))


@given(st.lists(_line_bytes, max_size=4), st.integers(1, 30), st.integers(1, 5))
def test_lines_of_many_files_in_small_batches(files: list[bytes], batch_bytes: int, batch_rows: int) -> None:
    objects = Objects({str(i): data for i, data in enumerate(files)})
    expected = [(str(i), line.decode()) for i, data in enumerate(files) for line in lines_of(data)]
    found = read(LINES, objects, [], batch_bytes=batch_bytes, batch_rows=batch_rows)
    assert rows(found) == expected
    assert all(r.batch.num_rows <= batch_rows for r in found)
    assert [int(i) for r in found for i in r.objects] == [int(path) for path, _ in expected]


_odd_bytes = st.lists(st.sampled_from([b"\n", b"\xff", b"ab", b"x" * 30, b"\r", b"ok"]), max_size=30).map(b"".join)


@given(_odd_bytes, st.integers(1, 60))
def test_bad_lines_are_rejected_once_however_they_are_cut(data: bytes, chunk_bytes: int) -> None:
    objects = Objects({"f": data})
    whole: list[Quarantined] = []
    cut: list[Quarantined] = []
    expected = rows(read(LINES, objects, whole, max_record_bytes=25))
    assert rows(read(LINES, objects, cut, ranges(LINES, objects, chunk_bytes), max_record_bytes=25)) == expected
    assert sorted(whole, key=str) == sorted(cut, key=str)
    assert len(expected) + len(whole) == len(lines_of(data))
    at = 0
    known: dict[str, str] = {}
    for line in data.split(b"\n"):
        if len(line) > 25:
            known[f"line at byte {at}"] = "max_record"
        elif b"\xff" in line:
            known[f"line at byte {at}"] = "utf-8"
        at += len(line) + 1
    assert {q.position: q.rule for q in whole} == known


def test_lines_longer_than_a_block_and_over_the_end_of_a_chunk() -> None:
    long = b"x" * 9_000_000
    data = b"first\n" + long + b"\nlast"
    objects = Objects({"f": data})
    for chunk_bytes in (100_000_000, 6_000_000, 4_000_000, 2_999_999):
        found = read(LINES, objects, [], ranges(LINES, objects, chunk_bytes), max_record_bytes=9_000_000)
        assert [len(text) for _, text in rows(found)] == [5, 9_000_000, 4]
        rejects: list[Quarantined] = []
        found = read(LINES, objects, rejects, ranges(LINES, objects, chunk_bytes), max_record_bytes=1_000_000)
        assert [text for _, text in rows(found)] == ["first", "last"]
        assert [(q.position, q.rule) for q in rejects] == [("line at byte 6", "max_record")]


class EndlessLine(Objects):
    """300 MB of one line that exists nowhere."""

    size = 300_000_000

    def all(self) -> tuple[SourceObject, ...]:
        return (SourceObject("big", self.size, "1"),)

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        end = self.size if length is None else min(self.size, start + length)
        block = memoryview(b"x" * (end - start))
        if end == self.size:
            block = memoryview(bytes(block[:-5]) + b"\nlast")
        return block


def test_a_line_of_300_mb_is_passed_over_in_bounded_memory() -> None:
    import tracemalloc

    rejects: list[Quarantined] = []
    tracemalloc.start()
    found = rows(read(LINES, EndlessLine({}), rejects, max_record_bytes=2_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [("big", "last")]
    assert [(q.position, q.rule) for q in rejects] == [("line at byte 0", "max_record")]
    assert peak < 40_000_000


def test_compressed_lines_have_positions_in_what_they_hold() -> None:
    objects = Objects({"a.zst": bytes(pa.compress(b"one\ntwo\n", codec="zstd", asbytes=True)), "b": b"three"})
    found = read(LINES, objects, [])
    assert rows(found) == [("a.zst", "one"), ("a.zst", "two"), ("b", "three")]
    assert [int(p) for r in found for p in r.positions] == [0, 4, 0]
    assert LINES.cut(objects, Source(url="file://./x", format="lines"), objects.all()[0], 1) == (
        0,
        len(objects.data["a.zst"]),
    )


# --- files ------------------------------------------------------------------------------------------


def content(found: Sequence[Records]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for path, offset, size, data in rows(found):
        assert offset == len(files.setdefault(path, b""))
        files[path] += data
        assert len(files[path]) <= size
    return files


def test_files_are_pieces_that_make_them_again() -> None:
    big = bytes(range(256)) * 78_125  # 20,000,000
    files = {"a": b"x", "big": big, "empty": b"", "exact": big[: 2 * PIECE_BYTES], "z.gz": b"\x1f\x8bnot gzip"}
    objects = Objects(files)
    whole = read(FILES, objects, [])
    assert content(whole) == files
    sizes = [len(row[3]) for row in rows(whole)]
    assert sizes == [1, PIECE_BYTES, PIECE_BYTES, 4_000_000, 0, PIECE_BYTES, PIECE_BYTES, 10]
    assert all(r.batch.num_rows <= 8 for r in whole)
    assert {row[0]: row[2] for row in rows(whole)} == {path: len(data) for path, data in files.items()}
    for chunk_bytes in (4096, 8_000_000, 8_000_001, 17_000_000):
        cut = read(FILES, objects, [], ranges(FILES, objects, chunk_bytes))
        assert content(cut) == files
        assert rows(cut) == rows(whole)


def test_pieces_of_one_read_share_its_buffer() -> None:
    data = bytes(3 * PIECE_BYTES)
    (records,) = read(FILES, Objects({"a": data}), [])
    column = records.batch["data"]
    assert column.buffers()[2].address == pa.py_buffer(data).address
    assert records.positions.tolist() == [0, PIECE_BYTES, 2 * PIECE_BYTES]


def test_a_hundred_megabytes_are_cut_at_pieces() -> None:
    obj = SourceObject("a", 100_000_001, "1")
    cuts = FILES.cut(Objects({}), Source(url="file://./x", format="files"), obj, 100_000_000)
    assert cuts[:3] == [0, PIECE_BYTES, 2 * PIECE_BYTES]
    assert cuts[-2:] == [96_000_000, 100_000_001]


def test_many_small_files_share_batches_of_eight() -> None:
    files = {f"{i:02}": b"x" * i for i in range(20)}
    found = read(FILES, Objects(files), [])
    assert content(found) == files
    assert [r.batch.num_rows for r in found] == [8, 8, 4]
