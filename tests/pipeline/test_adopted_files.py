"""Which files are adopted, what they must have in common, and the manifest they get."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.core.errors import SourceChanged, SourceError, UsageError
from millrace.core.manifest import Encoding, decode_block_table, decode_root, decode_segment
from millrace.core.model import Digest, SourceObject
from millrace.pipeline.adopted.files import index_files
from millrace.pipeline.adopted.manifest import SEGMENT_FILES, Draft
from millrace.pipeline.adopted.naming import choose
from millrace.pipeline.adopted.schemas import CommonSchema
from millrace.pipeline.distribute import Distributor
from millrace.stores.memory import MemoryStore


def objects(*paths: str) -> list[SourceObject]:
    return [SourceObject(path, 1, "1") for path in paths]


def chosen(*paths: str, encoding: Encoding | None = None, included: bool = False) -> tuple[str, str, str]:
    found = choose(objects(*paths), url="file:///x", encoding=encoding, included=included)
    return found.encoding, " ".join(obj.path for obj in found.files), " ".join(found.left_out)


def test_files_are_known_by_how_they_end() -> None:
    assert chosen("a.PARQUET", "b/c.pq", "b/notes.txt") == ("parquet", "a.PARQUET b/c.pq", "b/notes.txt")
    assert chosen("a.arrow", "b.feather", "state.json") == ("arrow", "a.arrow b.feather", "state.json")
    assert chosen("a.tar", "b.tar") == ("webdataset", "a.tar b.tar", "")
    assert chosen("index.json", "shard.00000.mds") == ("mds", "shard.00000.mds", "index.json")
    assert chosen("_old/a.mds", ".b.parquet", "c.parquet") == ("parquet", "c.parquet", "_old/a.mds .b.parquet")
    assert chosen("a.tar", "b.parquet", encoding="webdataset") == ("webdataset", "a.tar", "b.parquet")


def test_globs_choose_more_than_names_do() -> None:
    assert chosen("_a.parquet", "b", included=True) == ("parquet", "_a.parquet", "b")
    assert chosen("_a", "b", encoding="parquet", included=True) == ("parquet", "_a b", "")
    assert chosen("index.json", "b", encoding="mds", included=True) == ("mds", "b", "index.json")


@pytest.mark.parametrize(
    ("paths", "encoding", "words"),
    [
        (["a.tar", "b.parquet", "c.parquet"], None, r"several formats \(2 parquet, 1 webdataset\); name one"),
        (["a.csv"], None, "no file that is named like Parquet, Arrow, a tar or MDS .1 others, such as a.csv."),
        (["a.csv"], "arrow", "has no arrow files: of 1 seen"),
        (["_a.arrow"], None, "no file that is named like"),
    ],
)
def test_what_leaves_nothing_or_too_much(paths: list[str], encoding: Encoding | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen(*paths, encoding=encoding)


@pytest.mark.parametrize("path", ["a.tar.gz", "a.tgz", "a.mds.zstd", "b/shard.00001.mds.br", "x.parquet.gz"])
def test_what_is_compressed_as_a_whole_is_named(path: str) -> None:
    with pytest.raises(SourceError, match=f"^{path} is compressed as a whole"):
        chosen(path, "notes.txt")


def common(encoding: Encoding, *schemas: dict[str, Any]) -> pa.Schema:
    found = CommonSchema(encoding)
    for i, schema in enumerate(schemas):
        found.add(f"{i}.x", pa.schema(list(schema.items())))
    return found.schema


def test_tars_have_all_extensions_together() -> None:
    key, data = {"__key__": pa.string()}, pa.binary()
    assert common("webdataset", {**key, "txt": data}, {**key, "cls": data, "jpg": data}).names == [
        "__key__",
        "cls",
        "jpg",
        "txt",
    ]


def test_a_shard_of_no_samples_says_nothing_of_arrays() -> None:
    known = {"a": pa.list_(pa.int64())}
    for schemas in ([{"a": pa.null()}, known], [known, {"a": pa.null()}]):
        assert common("mds", *schemas) == pa.schema(list(known.items()))
    with pytest.raises(SourceError, match=r"1\.x: column 'a' is null, but list"):
        common("parquet", known, {"a": pa.null()})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"a": pa.int64()}, r"^1\.x: column 'b' is missing, but it is string in 0\.x; make the files agree"),
        ({"a": pa.int32(), "b": pa.string()}, r"^1\.x: column 'a' is int32, but int64 in 0\.x;"),
        ({"a": pa.int64(), "b": pa.string(), "c": pa.int8()}, r"column 'c' \(int8\) is there, but not in 0\.x;"),
        ({"b": pa.string(), "a": pa.int64()}, r"column 1 is 'b', but 'a' in 0\.x;"),
    ],
)
def test_files_that_differ_are_named(other: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        common("parquet", {"a": pa.int64(), "b": pa.string()}, other)


# --- indexing and the manifest ------------------------------------------------------------------------------------


def parquet(i: int) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"a": [i, i + 1, i + 2]}), out, row_group_size=2)
    return out.getvalue()


async def filled(count: int) -> tuple[MemoryStore, list[SourceObject]]:
    store = MemoryStore("files")
    infos = [await store.put(f"{i:05}.parquet", [parquet(i)]) for i in range(count)]
    return store, [SourceObject(info.key, info.size_bytes, info.version) for info in infos]


class FixedClock:
    def now_ms(self) -> int:
        return 1_700_000_000_000

    def monotonic_s(self) -> float:
        return 0.0


async def drafted(store: MemoryStore, files: Sequence[SourceObject], slots: int, told: list[int]) -> Draft:
    draft = Draft("parquet", "adopted-1")
    async with aclosing(index_files(store, files, "parquet", check=True, slots=slots, told=told.append)) as indexed:
        async for obj, shard, schema in indexed:
            draft.add(obj.path, shard, schema, at_ms=7)
    return draft


def test_the_manifest_names_files_in_order() -> None:
    async def work() -> None:
        count = SEGMENT_FILES + 3
        store, files = await filled(count)
        digests = []
        for slots in (1, 3):
            told: list[int] = []
            draft = await drafted(store, files, slots, told)
            assert told == sorted(told)
            assert told[-1] == sum(obj.size_bytes for obj in files) == draft.bytes
            own = MemoryStore("own")
            made = await draft.persist(Distributor({"own": own}, lambda *_: ["own"], FixedClock()))
            digests.append(made.manifest)
            root = decode_root(await own.get(f"manifests/{made.manifest}.json"))
            assert (root.encoding, root.block_rows, root.shards, root.rows) == ("parquet", 2, count, 3 * count)
            assert [ref.shards for ref in root.segments] == [SEGMENT_FILES, 3]
            assert [entry.key for page in made.pages for entry in page.entries] == [obj.path for obj in files]
            assert all(entry.stores == {"adopted-1": 7} for page in made.pages for entry in page.entries)
            segment = decode_segment(await own.get(f"manifests/segments/{root.segments[1].digest}.arrow"))
            assert segment.digest(0) == Digest((await store.content(files[SEGMENT_FILES].path)).digest)
            table = decode_block_table(await own.get(f"manifests/segments/{root.segments[1].blocks}.arrow"), 3)
            assert table.rows.tolist() == [0, 2, 1] * 3
        assert digests[0] == digests[1]

    asyncio.run(work())


def test_a_file_written_after_it_was_listed_is_named() -> None:
    async def work() -> None:
        store, files = await filled(5)
        await store.put("00003.parquet", [parquet(9)])
        with pytest.raises(SourceChanged, match=r"^00003\.parquet changed or disappeared while it was being adopted"):
            await drafted(store, files, 2, [])
        await store.delete("00001.parquet")
        with pytest.raises(SourceChanged, match=r"^00001\.parquet changed or disappeared while it was being adopted"):
            await drafted(store, files, 2, [])

    asyncio.run(work())
