"""Manifests: the same data gives the same bytes, what is damaged is called corrupt, what is newer says so."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import Corrupt
from millrace.core.manifest import (
    FORMAT,
    SEGMENT_SHARDS,
    SegmentRef,
    decode_blocks,
    decode_root,
    decode_segment,
    encode_root,
    encode_segment,
)
from millrace.core.model import Block, Digest, Shard, digest_of

SCHEMA = pa.schema([("path", pa.string()), ("tokens", pa.list_(pa.uint16(), 8))])

digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex()))
counts = st.integers(0, 2**62)
blocks = st.builds(Block, counts, counts, counts, digests)
shards = st.builds(Shard, digests, counts, counts, st.lists(blocks, max_size=4).map(tuple))
refs = st.builds(SegmentRef, digests, counts, digests, counts, counts, counts, counts)


def a_shard(i: int) -> Shard:
    offset = 8
    made = []
    for j in range(i % 3 + 1):
        made.append(Block(offset, 100 + j, 10, digest_of(b"%d/%d" % (i, j))))
        offset += 100 + j
    return Shard(digest_of(b"%d" % i), offset + 50, 10 * len(made), tuple(made))


@given(st.lists(shards, max_size=12))
def test_a_segment_comes_back_as_it_was(made: list[Shard]) -> None:
    data, index = encode_segment(made)
    segment = decode_segment(data)
    found = decode_blocks(index, len(made))
    assert len(segment) == len(made)
    assert [
        Shard(segment.digest(i), int(segment.sizes[i]), int(segment.rows[i]), found[i]) for i in range(len(made))
    ] == made


def test_a_full_segment_comes_back_as_it_was() -> None:
    made = [a_shard(i) for i in range(SEGMENT_SHARDS)]
    data, index = encode_segment(made)
    segment = decode_segment(memoryview(data))
    assert [segment.digest(i) for i in range(len(segment))] == [s.digest for s in made]
    assert decode_blocks(memoryview(index), SEGMENT_SHARDS) == [s.blocks for s in made]


def test_one_shard_too_many_is_corrupt() -> None:
    data, _ = encode_segment([a_shard(0)] * (SEGMENT_SHARDS + 1))
    with pytest.raises(Corrupt, match="2049 shards, more than 2048"):
        decode_segment(data)


@given(st.lists(shards, max_size=6))
def test_the_same_shards_give_the_same_bytes(made: list[Shard]) -> None:
    again = [Shard(s.digest, s.size_bytes, s.rows, tuple(s.blocks)) for s in made]
    assert encode_segment(made) == encode_segment(again)


def test_the_bytes_of_a_manifest_are_these_for_ever() -> None:
    """A new Arrow, numpy or Python must not rename every dataset: this digest changes only with the format."""
    data, index = encode_segment([a_shard(i) for i in range(5)])
    ref = SegmentRef(digest_of(data), len(data), digest_of(index), len(index), 5, 90, 12345)
    root = encode_root(pa.schema([("path", pa.string())]), 1024, [ref])
    assert digest_of(data)[:16] == "e5138584e3e36571"
    assert digest_of(index)[:16] == "013e8bdd3b50c5d2"
    assert digest_of(root)[:16] == "78798c060ab39e48"


@given(st.lists(refs, max_size=5), st.integers(1, 2**20))
def test_a_root_comes_back_as_it_was(segments: list[SegmentRef], block_rows: int) -> None:
    for schema in (SCHEMA, None):
        data = encode_root(schema, block_rows, segments)
        manifest = decode_root(memoryview(data))
        assert (manifest.schema, manifest.block_rows, manifest.segments) == (schema, block_rows, tuple(segments))
        assert manifest.rows == sum(s.rows for s in segments)
        assert manifest.bytes == sum(s.bytes for s in segments)
        assert manifest.shards == sum(s.shards for s in segments)
        assert encode_root(manifest.schema, manifest.block_rows, manifest.segments) == data


def test_a_root_is_canonical_json() -> None:
    data = encode_root(SCHEMA, 1024, [])
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()
    assert not {"store", "cloud", "url", "run", "time"} & set(json.loads(data))


def test_a_newer_format_says_so() -> None:
    data = encode_root(None, 1024, []).replace(FORMAT.encode(), b"millrace-manifest/2")
    with pytest.raises(Corrupt, match=r"format 'millrace-manifest/2'; this Millrace reads 'millrace-man.*/1': upgrade"):
        decode_root(data)


def test_a_segment_of_another_layout_says_so() -> None:
    data, index = encode_segment([a_shard(1)])
    with pytest.raises(Corrupt, match="another layout"):
        decode_segment(index)
    with pytest.raises(Corrupt, match="another layout"):
        decode_blocks(data, 1)


def test_blocks_of_other_shards_are_corrupt() -> None:
    _, index = encode_segment([a_shard(0), a_shard(1), a_shard(2)])
    with pytest.raises(Corrupt, match="names shard 1 of a segment of 1"):
        decode_blocks(index, 1)


@pytest.mark.parametrize(
    "root",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"format": "millrace-manifest/1"}',
        b'{"format":"millrace-manifest/1","schema":"!","block_rows":1,"rows":0,"bytes":0,"shards":0,"segments":[]}',
        b'{"format":"millrace-manifest/1","schema":"AAAA","block_rows":1,"rows":0,"bytes":0,"shards":0,"segments":[]}',
        b'{"format":"millrace-manifest/1","schema":null,"block_rows":1e999,"rows":0,"bytes":0,"shards":0,"segments":[]}',
        b'{"format":"millrace-manifest/1","schema":null,"block_rows":1,"rows":0,"bytes":0,"shards":0,"segments":[[1]]}',
        b'{"format":"millrace-manifest/1","schema":null,"block_rows":1,"rows":0,"bytes":0,"shards":0,"segments":5}',
    ],
)
def test_what_is_no_root_is_corrupt(root: bytes) -> None:
    with pytest.raises(Corrupt, match="this is not a manifest"):
        decode_root(root)


SEGMENT, BLOCKS = encode_segment([a_shard(i) for i in range(4)])
ROOT = encode_root(SCHEMA, 1024, [SegmentRef(digest_of(SEGMENT), 1, digest_of(BLOCKS), 1, 4, 70, 5)])


def damaged(data: bytes, at: int, value: int, cut: int) -> bytes:
    at %= len(data)
    return (data[:at] + bytes([data[at] ^ value]) + data[at + 1 :])[: cut % (2 * len(data))]


@given(st.integers(0), st.integers(0, 255), st.integers(0))
def test_whatever_is_damaged_is_corrupt_or_still_a_manifest(at: int, value: int, cut: int) -> None:
    """Never another error, never a crash: the digest was checked before, this is the second wall."""
    for data, decode in ((SEGMENT, decode_segment), (ROOT, decode_root), (BLOCKS, lambda d: decode_blocks(d, 4))):
        try:
            decode(damaged(data, at, value, cut))
        except Corrupt as error:
            problem = str(error)
        else:
            problem = "manifest"
        assert "manifest" in problem
