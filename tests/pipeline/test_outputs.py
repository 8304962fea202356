"""What a chunk came to, kept as an object: it comes back as it was, or is called damaged by name."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import Corrupt, NotFound
from millrace.core.keys import task_output
from millrace.core.model import Block, ChunkOutput, Digest, Quarantined, Receipt, Shard, digest_of
from millrace.pipeline.outputs import decode_chunk_output, encode_chunk_output, load_output, save_output
from millrace.stores.memory import MemoryStore

text = st.text(st.characters(codec="utf-8"), max_size=10)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex()))
counts = st.integers(0, 2**62)
outputs = st.builds(
    ChunkOutput,
    chunk=counts,
    schema=st.binary(max_size=20),
    shards=st.lists(
        st.builds(
            Shard,
            digests,
            counts,
            counts,
            st.lists(st.builds(Block, counts, counts, counts, digests), max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    receipts=st.lists(st.builds(Receipt, digests, text, counts), max_size=2).map(tuple),
    rows_in=counts,
    bytes_in=counts,
    duplicates=counts,
    quarantined=counts,
    quarantine=st.lists(st.builds(Quarantined, text, text, text, text, text), max_size=2).map(tuple),
)


@given(outputs)
def test_an_output_comes_back_as_it_was(output: ChunkOutput) -> None:
    data = encode_chunk_output(output)
    assert decode_chunk_output(memoryview(data)) == output
    assert encode_chunk_output(decode_chunk_output(data)) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 50_000,
        encode_chunk_output(ChunkOutput(0, b"", (), (), 0, 0, 0, 0)).replace(b'"shards":[]', b'"shards":[5]'),
        encode_chunk_output(ChunkOutput(0, b"", (), (), 0, 0, 0, 0)).replace(b'"schema":""', b'"schema":"!"'),
        encode_chunk_output(ChunkOutput(0, b"", (), (), 0, 0, 0, 0)).replace(b'"quarantine":[]', b'"quarantine":[{}]'),
    ],
)
def test_what_is_no_output_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt, match="this is not a chunk's output"):
        decode_chunk_output(data)


def test_an_output_lies_under_its_digest_and_is_verified_when_it_is_read() -> None:
    async def main() -> None:
        work = MemoryStore("work")
        digest = await save_output(work, 7, "main", b"facts")
        assert digest == digest_of(b"facts")
        assert bytes(await load_output(work, 7, "main", digest)) == b"facts"
        assert await save_output(work, 7, "main", b"facts") == digest
        await work.put(task_output(7, "main", digest), [b"fakes"])
        with pytest.raises(Corrupt) as caught:
            await load_output(work, 7, "main", digest)
        assert str(caught.value) == (
            f"runs/00000007/main/{digest} in memory://work is damaged; start a new run with --fresh, "
            "shards already made are used again"
        )
        with pytest.raises(NotFound):
            await load_output(work, 8, "main", digest)

    asyncio.run(main())
