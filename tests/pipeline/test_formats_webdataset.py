from __future__ import annotations

import gzip
import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.tarheader import file_header, ordinary_file
from millrace.pipeline.formats.webdataset import WEBDATASET, split_name
from millrace.pipeline.records import ReadContext, Records

SOURCE = Source(url="file://./data", format="webdataset")


class Objects:
    """Blocking reads over a dictionary; counts them, and checks versions."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self.data = data
        self.longest = 0
        self.count = 0

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(path, len(data), str(hash(data))) for path, data in self.data.items())

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = self.data.get(obj.path)
        if data is None or str(hash(data)) != obj.version:
            raise SourceChanged(f"{obj.path} changed since the plan was made")
        end = len(data) if length is None else start + length
        self.longest, self.count = max(self.longest, min(end, len(data)) - start), self.count + 1
        return memoryview(data)[start:end]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def tar_bytes(members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def special(name: str, kind: bytes, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info.tobuf()


def read(
    objects: Objects, chunks: Sequence[Chunk] | None = None, rejects: list[Quarantined] | None = None, **limits: int
) -> list[Records]:
    schema = WEBDATASET.schema(objects, SOURCE, objects.all())
    assert schema.metadata is None
    if chunks is None:
        chunks = [Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))]
    quarantine = [] if rejects is None else rejects
    context = ReadContext(SOURCE, schema, objects, quarantine.append, **{"max_record_bytes": 1_000_000, **limits})
    out = [r for chunk in chunks for r in WEBDATASET.read(chunk, context)]
    for r in out:
        assert r.batch.schema.equals(schema, check_metadata=True)
        assert r.batch.num_rows == len(r.objects) == len(r.positions) > 0
    assert rejects is not None or quarantine == []
    return out


def rows(records: list[Records]) -> list[dict[str, Any]]:
    return [row for r in records for row in r.batch.to_pylist()]


def cut(objects: Objects, chunk_bytes: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    for obj in objects.all():
        cuts = (
            WEBDATASET.cut(objects, SOURCE, obj, chunk_bytes) if obj.size_bytes > chunk_bytes else (0, obj.size_bytes)
        )
        assert cuts[0] == 0
        assert cuts[-1] == obj.size_bytes
        assert list(cuts) == sorted(set(cuts))
        chunks += [Chunk(len(chunks), 0, (obj,), a, b) for a, b in itertools.pairwise(cuts)]
    return chunks


def samples(n: int, size: int = 700) -> list[tuple[str, bytes]]:
    return [
        (f"part/{i:04}.{ext}", bytes([i % 251]) * (i * 37 % size + (ext == "jpg")))
        for i in range(n)
        for ext in (("jpg", "seg.png", "cls") if i % 3 else ("jpg", "cls"))
    ]


def expected(path: str, members: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, data in members:
        key, ext = split_name(name) or ("", "")
        row = out.setdefault(key, {"path": path, "__key__": key, "cls": None, "jpg": None, "seg.png": None})
        row[ext] = data
    return list(out.values())


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_become_rows(form: int) -> None:
    members = samples(40)
    data = tar_bytes(members, form)
    records = read(Objects({"x.tar": data, "folder/y.tar": data}))
    assert rows(records) == expected("x.tar", members) + expected("folder/y.tar", members)
    starts = [int(p) for r in records for p in r.positions][:40]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert starts == [m.offset for m in tar.getmembers() if m.name.endswith(".jpg")]
    assert records[0].batch.schema.names == ["path", "__key__", "cls", "jpg", "seg.png"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(form: int) -> None:
    deep = "/".join(["a rather long folder name"] * 12)
    members = [(f"{deep}/\u00e9\u4e2d {i}\n.cls", b"%d" % i) for i in range(30)]
    objects = Objects({"x.tar": tar_bytes(members, form)})
    found = rows(read(objects, cut(objects, 6000)))
    assert [(row["__key__"] + ".cls", row["cls"]) for row in found] == members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(chunk_bytes=st.integers(600, 60_000), n=st.integers(1, 25))
@settings(max_examples=25, deadline=None)
def test_any_chunk_size_gives_the_same_records(form: int, chunk_bytes: int, n: int) -> None:
    members = samples(n)
    objects = Objects({"a.tar": tar_bytes(members, form), "b.tar": tar_bytes(members[:5], form)})
    whole, cut_up = read(objects), read(objects, cut(objects, chunk_bytes))
    assert rows(whole) == rows(cut_up)
    assert [p for r in whole for p in r.positions] == [p for r in cut_up for p in r.positions]


def test_cuts_are_about_as_large_as_asked_and_found_by_hops() -> None:
    members = [(f"{i}.bin", bytes(200_000)) for i in range(50)]
    objects = Objects({"a.tar": tar_bytes(members)})
    sizes = [c.size_bytes for c in cut(objects, 1_000_000)]
    assert max(sizes) <= 1_000_000
    assert len(sizes) <= 13
    assert objects.longest <= 65_536
    huge = Objects(
        {"a.tar": tar_bytes([("a.bin", bytes(3_000_000)), ("b.bin", bytes(10)), ("c.bin", bytes(3_000_000))])}
    )
    assert len(cut(huge, 1_000_000)) == 3


@pytest.mark.parametrize("ending", ["tar.gz", "tgz", "tar.zst"])
def test_compressed_tars_are_read_whole(ending: str) -> None:
    members = samples(30)
    plain = tar_bytes(members)
    packed = pa.compress(plain, codec="zstd", asbytes=True) if ending.endswith("zst") else gzip.compress(plain)
    objects = Objects({f"x.{ending}": packed})
    assert WEBDATASET.cut(objects, SOURCE, objects.all()[0], 100) == (0, len(packed))
    assert rows(read(objects)) == expected(f"x.{ending}", members)
    with pytest.raises(SourceError, match=rf"^bad\.{ending}.*decompressed"):
        read(Objects({"good.tar": plain, f"bad.{ending}": packed[: len(packed) // 2]}))


def test_batches_keep_the_bounds() -> None:
    objects = Objects({"x.tar": tar_bytes(samples(200))})
    records = read(objects, batch_bytes=5_000, batch_rows=20)
    assert max(r.batch.num_rows for r in records) <= 20
    assert max(r.batch.nbytes for r in records) <= 6_000
    assert len(rows(records)) == 200


def test_bad_samples_are_rejected_and_the_rest_is_read() -> None:
    good = [("a.jpg", b"1"), ("a.cls", b"2")]
    bad = [
        ("/etc/b.jpg", b"x"),
        ("/etc/b.cls", b"x"),
        ("../c.jpg", b"x"),
        ("d/../../d.jpg", b"x"),
        ("e.new", b"x"),
        ("f.jpg", b"x"),
        ("f.jpg", b"x"),
        ("g.jpg", b"x" * 3000),
        ("g.cls", b"x" * 3000),
        ("README", b"x"),
    ]
    after = [("z.cls", b"3")]
    filler = [(f"fill{i:03}.jpg", b"") for i in range(100)]
    data = tar_bytes(good + filler + bad + after)
    rejects: list[Quarantined] = []
    found = rows(read(Objects({"x.tar": data}), rejects=rejects, max_record_bytes=5000))
    kept = [row for row in found if not row["__key__"].startswith("fill")]
    assert [(row["__key__"], row["jpg"], row["cls"]) for row in kept] == [("a", b"1", b"2"), ("z", None, b"3")]
    rules = ["unsafe name", "unsafe name", "unsafe name", "schema", "duplicate member", "max_record", "member"]
    assert sorted(q.rule for q in rejects) == sorted(rules)
    assert all(q.position.startswith("byte ") and q.path == "x.tar" for q in rejects)
    assert any("'/etc/b.jpg' is an absolute path" in q.reason for q in rejects)


def test_a_member_over_max_record_is_not_held() -> None:
    objects = Objects({"x.tar": tar_bytes([("a.bin", b"1"), ("b.bin", bytes(30_000_000)), ("c.bin", b"2")])})
    rejects: list[Quarantined] = []
    found = rows(read(objects, rejects=rejects, max_record_bytes=2000))
    assert [row["__key__"] for row in found] == ["a", "c"]
    assert [q.rule for q in rejects] == ["max_record"]
    assert objects.longest <= 8_000_000


def test_links_and_devices_are_rejected_and_folders_are_silent() -> None:
    member = tar_bytes([("a.jpg", b"1")])[:1024]
    rest = tar_bytes([("a.cls", b"2"), ("b.jpg", b"3")])
    data = (
        special("folder", tarfile.DIRTYPE)
        + member
        + special("evil", tarfile.SYMTYPE, "/etc/passwd")
        + special("hard.jpg", tarfile.LNKTYPE, "a.jpg")
        + special("dev", tarfile.CHRTYPE)
        + rest
    )
    rejects: list[Quarantined] = []
    found = rows(read(Objects({"x.tar": data}), rejects=rejects))
    assert [(row["__key__"], row["jpg"], row["cls"]) for row in found] == [("a", b"1", b"2"), ("b", b"3", None)]
    assert ["symbolic link" in rejects[0].reason, "hard link" in rejects[1].reason] == [True, True]
    assert [q.rule for q in rejects] == ["member"] * 3


def test_undecodable_names_are_rejected() -> None:
    data = bytearray(tar_bytes([("a.jpg", b"1"), ("bXX.jpg", b"2")]))
    raw = bytes(data[1024:1536]).replace(b"bXX", b"b\xff\xfe")
    checksum = sum(raw[:148]) + 8 * 32 + sum(raw[156:])
    data[1024:1536] = raw[:148] + b"%06o\0 " % checksum + raw[156:]
    rejects: list[Quarantined] = []
    assert [r["__key__"] for r in rows(read(Objects({"x.tar": bytes(data)}), rejects=rejects))] == ["a"]
    assert [q.rule for q in rejects] == ["utf-8"]
    rejects[0].reason.encode()


@given(keep=st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_truncated_anywhere_is_an_error_that_names_the_tar_and_the_byte(keep: float) -> None:
    members = samples(12)
    whole = tar_bytes(members)
    end = max(i for i, b in enumerate(whole) if b) + 1
    cut_off = whole[: int(end * keep)]
    with pytest.raises(SourceError, match=r"^bad\.tar (ends at byte \d+|is empty)"):
        read(Objects({"good.tar": whole, "bad.tar": cut_off}))


def test_an_empty_archive_and_no_archive() -> None:
    assert rows(read(Objects({"x.tar": tar_bytes([("a.jpg", b"1")]), "empty.tar": bytes(10240)}))) == [
        {"path": "x.tar", "__key__": "a", "jpg": b"1"}
    ]
    with pytest.raises(SourceError, match="has no sample"):
        read(Objects({"empty.tar": bytes(10240)}))
    with pytest.raises(SourceError, match=r"^x\.tar has no valid tar header at byte 0"):
        read(Objects({"x.tar": b"once upon a time" * 100}))
    with pytest.raises(SourceError, match=r"^x\.tar"):
        read(Objects({"x.tar": b""}))


def test_joined_tars_are_not_cut_short_in_silence() -> None:
    one = tar_bytes([("a.jpg", b"1")])
    with pytest.raises(SourceError, match="goes on after the mark"):
        read(Objects({"x.tar": one + one}))


def test_a_path_extension_is_the_data_s_own() -> None:
    objects = Objects({"x.tar": tar_bytes([("a.path", b"1"), ("a.jpg", b"2")])})
    assert rows(read(objects)) == [{"__key__": "a", "jpg": b"2", "path": b"1"}]


def test_broken_headers_never_raise_anything_else() -> None:
    whole = tar_bytes(samples(10), tarfile.PAX_FORMAT)
    for at in range(0, len(whole) - 1024, 97):
        broken = whole[:at] + b"\xff9\0" + whole[at + 3 :]
        try:
            read(Objects({"good.tar": whole, "broken.tar": broken}), rejects=[])
        except SourceError as err:
            if "broken.tar" not in str(err):
                raise AssertionError(str(err)) from err


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=120), st.integers(0, 8**12))
@settings(max_examples=100, deadline=None)
def test_the_short_way_writes_and_reads_the_headers_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    expected = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    assert file_header(name, size) == expected
    parsed = ordinary_file(expected[-512:])
    if len(name.encode()) <= 100 and size < 8**11 and not name.endswith("/"):
        assert parsed == (name, size)
    elif len(name.encode()) <= 100:
        assert parsed is None
    broken = bytearray(expected)
    broken[-1] ^= 1
    assert ordinary_file(bytes(broken[-512:])) is None
