from __future__ import annotations

import gzip
import random
from collections.abc import Iterator

import pyarrow as pa
import pytest

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.model import SourceObject
from millrace.core.spec import Source
from millrace.pipeline.decompress import Compression, ObjectStream, blocks, compression_of, decompressed

TEXT = b"".join(b"line %d of some text\n" % i for i in range(20_000))


class OneObject:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        if start >= 5_000_000:
            raise SourceChanged("it changed")
        self.asked.append((start, length or 0))
        return memoryview(self.data)[start : None if length is None else start + length]

    def read_whole(self, objects: object) -> Iterator[tuple[int, memoryview]]:
        raise NotImplementedError


def packed(kind: Compression, data: bytes = TEXT) -> bytes:
    return gzip.compress(data, mtime=0) if kind == "gzip" else bytes(pa.compress(data, codec="zstd", asbytes=True))


def unpacked(data: bytes, kind: Compression, name: str = "a.jsonl.gz") -> bytes:
    obj = SourceObject(name, len(data), "1")
    stored = blocks(OneObject(data), obj, block_bytes=1000)
    return b"".join(decompressed(stored, obj, kind, block_bytes=4096))


def test_blocks_cover_a_range_and_no_more() -> None:
    reads = OneObject(TEXT)
    obj = SourceObject("a", len(TEXT), "1")
    assert b"".join(blocks(reads, obj, 10, 2510, block_bytes=1000)) == TEXT[10:2510]
    assert reads.asked == [(10, 1000), (1010, 1000), (2010, 500)]
    assert list(blocks(reads, obj, 7, 7)) == []
    assert [bytes(b) for b in blocks(reads, obj, 0, 5)] == [TEXT[:5]]


def test_an_error_ahead_comes_when_its_block_does() -> None:
    obj = SourceObject("a", 9_000_000, "1")
    found = blocks(OneObject(bytes(9_000_000)), obj, block_bytes=5_000_000)
    assert len(next(found)) == 5_000_000
    with pytest.raises(SourceChanged):
        next(found)


def test_an_object_shorter_than_listed_does_not_loop() -> None:
    obj = SourceObject("a", 9000, "1")
    with pytest.raises(SourceError, match="a ends at byte 1500"):
        list(blocks(OneObject(bytes(1500)), obj, block_bytes=1000))


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_streams_one_after_another_are_one(kind: Compression) -> None:
    assert unpacked(packed(kind), kind) == TEXT
    assert unpacked(packed(kind) + packed(kind, b"") + packed(kind, b"more"), kind) == TEXT + b"more"
    assert unpacked(packed(kind, b""), kind) == b""
    assert unpacked(TEXT, "none") == TEXT


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_stream_that_is_cut_short_says_where(kind: Compression) -> None:
    whole = packed(kind)
    for length in [1, 5, 17, *random.Random(1).sample(range(20, len(whole)), 30), len(whole) - 1]:
        expected = rf"^a\.jsonl\.gz ends in the middle of its {kind} stream, at byte {length}; .*upload it again"
        with pytest.raises(SourceError, match=expected):
            unpacked(whole[:length], kind)
        with pytest.raises(SourceError, match="in the middle"):
            unpacked(whole + whole[:length], kind)


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_what_is_no_such_stream_is_named(kind: Compression) -> None:
    for data in (b"plain text, not packed", packed(kind) + b"garbage at the end"):
        with pytest.raises(
            SourceError, match=rf"a\.jsonl\.gz is not a whole {kind} stream: it breaks at or before byte"
        ):
            unpacked(data, kind)
    with pytest.raises(SourceError, match="is empty, which is not a"):
        unpacked(b"", kind)


def test_flipped_bits_in_gzip_never_pass() -> None:
    whole = packed("gzip", TEXT[:2000])
    for i in range(10, len(whole)):
        with pytest.raises(SourceError):
            unpacked(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :], "gzip")


def test_a_bomb_is_never_held() -> None:
    bomb = packed("gzip", bytes(50_000_000))
    obj = SourceObject("bomb.gz", len(bomb), "1")
    before = pa.total_allocated_bytes()
    sizes = []
    for block in decompressed(iter([bomb]), obj, "gzip", block_bytes=100_000):
        sizes.append(len(block))
        assert pa.total_allocated_bytes() - before < 5_000_000
    assert sum(sizes) == 50_000_000
    assert max(sizes) <= 100_000


def test_errors_of_reading_pass_through_the_decompressor() -> None:
    def failing() -> Iterator[bytes]:
        yield packed("gzip")[:100]
        raise SourceChanged("a changed")

    with pytest.raises(SourceChanged, match="a changed"):
        list(decompressed(failing(), SourceObject("a", 1, ""), "gzip"))


def test_compression_goes_by_the_name_unless_said() -> None:
    auto = Source(url="file://./x", format="text")
    assert [compression_of(auto, p) for p in ("a.gz", "a.zst", "a.txt", "gz")] == ["gzip", "zstd", "none", "none"]
    assert compression_of(auto.model_copy(update={"compression": "zstd"}), "a.gz") == "zstd"


def test_an_object_stream_reads_and_tells() -> None:
    stream = ObjectStream(iter([b"abc", b"", b"defg"]))
    assert (stream.read(2), stream.tell(), stream.read(2), stream.read(10), stream.read(1)) == (
        b"ab",
        2,
        b"c",
        b"defg",
        b"",
    )
