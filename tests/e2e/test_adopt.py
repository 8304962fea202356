"""Files adopted where they lie: indexed, listed, verified, exported and forgotten, and never written to."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import tarfile
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

from millrace.core.errors import ReadOnly, SourceChanged
from millrace.pipeline.export import open_exporter
from millrace.wiring.adopting import AdoptRequest, adopt
from millrace.wiring.world import open_world

Cli = Callable[..., Any]
Write = Callable[..., str]

FILES = 3
ROWS = 120


def rows(i: int) -> list[dict[str, Any]]:
    return [{"id": f"{i}-{j}", "body": f"row {j} of {i} ".encode() * (j % 20)} for j in range(ROWS)]


def make(folder: Path, format: str, files: int = FILES) -> list[dict[str, Any]]:
    """Files of a format, and the rows they hold as JSON says them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        table = pa.Table.from_pylist(rows(i))
        if format == "parquet":
            pq.write_table(table, folder / f"{i}.parquet", row_group_size=50)
        elif format == "arrow":
            with pa.ipc.new_file(folder / f"{i}.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=50)
        else:
            named = table.rename_columns(["__key__", "body"]) if format == "webdataset" else table
            export(format, folder / f"{i}", named)
    return [row for i in range(files) for row in rows(i)]


def export(format: str, folder: Path, table: pa.Table) -> None:
    exporter = open_exporter(format, folder, table.schema)
    for batch in table.to_batches():
        exporter.write(batch)
    exporter.close()


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Each file with its digest and when it was last written."""
    return {
        p.relative_to(folder).as_posix(): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for p in sorted(folder.glob("*.jsonl")) for x in p.read_text().splitlines()]


def adopted(cli: Cli, *args: str) -> Any:
    said = cli("adopt", *args, "--json")
    assert said.code == 0, said.err
    return said.json


@pytest.mark.parametrize("format", ["parquet", "arrow", "webdataset", "mds"])
def test_every_format_lives_where_it_lies(cli: Cli, folder: Path, format: str) -> None:
    wanted = make(folder / "data", format)
    before = contents(folder / "data")
    made = adopted(cli, "data", "--name", "d")
    assert (made["format"], made["files"], made["rows"], made["unchanged"]) == (format, FILES, FILES * ROWS, False)
    assert made["url"] == f"file://{folder / 'data'}"
    again = adopted(cli, f"file://{folder}/data", "--name", "d")
    assert (again["digest"], again["version"], again["unchanged"]) == (made["digest"], 1, True)

    shown = cli("show", "d", "--json").json
    assert (shown["rows"], shown["shards"]) == (FILES * ROWS, FILES)
    assert [(s["name"], s["shards"]) for s in shown["stores"]] == [(made["store"], FILES)]
    assert shown["lineage"]["sources"][0]["url"] == made["url"]
    assert [line["newest"]["bytes"] for line in cli("datasets", "--json").json] == [made["bytes"]]
    report = cli("verify", "d", "--json")
    assert (report.code, report.json["whole"]) == (0, report.json["replicas"])
    said = cli("export", "d", "out", "--format", "jsonl")
    assert said.code == 0, said.err
    key = "__key__" if format == "webdataset" else "id"
    assert [row[key] for row in lines(folder / "out")] == [row["id"] for row in wanted]

    # Elsewhere, under other names, in another world, as another dataset: the same data is the same digest.
    shutil.copytree(folder / "data", folder / "moved" / "further")
    (folder / "other.yaml").write_text((folder / "world.yaml").read_text() + "state: ./.other\n")
    other = adopted(cli, "moved", "--name", "e", "--world", "other.yaml", "--site", "ibm/us-south", "--replicas", "1")
    assert (other["digest"], other["replicas"]) == (made["digest"], 3)

    assert cli("rm", "d", "--yes").code == 0
    for _ in range(2):
        assert cli("gc", "--grace", "0s").code == 0
    assert not list((folder / "world").glob("*/manifests/*.json")), "the manifest is forgotten"
    assert contents(folder / "data") == before


def test_what_changes_is_named(cli: Cli, folder: Path) -> None:
    make(folder / "data", "parquet")
    first = adopted(cli, "data", "--name", "d")
    whole = {p.name: p.read_bytes() for p in (folder / "data").iterdir()}
    flipped = bytearray(whole["0.parquet"])
    flipped[300] ^= 1
    (folder / "data" / "0.parquet").write_bytes(flipped)
    (folder / "data" / "1.parquet").unlink()
    (folder / "data" / "2.parquet").write_bytes(whole["2.parquet"][:-1])
    for options in ([], ["--repair"]):
        report = cli("verify", "d", *options, "--json")
        assert report.code == 1
        found = {(f["object"], f["verdict"]) for f in report.json["findings"] if f["store"]}
        assert found == {("0.parquet", "rotten"), ("1.parquet", "missing"), ("2.parquet", "rotten")}
        assert report.json["lost"] == FILES
        assert not any(f["repaired"] for f in report.json["findings"])
        words = [f["repair"] for f in report.json["findings"]]
        assert all(("not Millrace's to write" in w and "millrace adopt file://" in w) == bool(options) for w in words)
    in_words = cli("verify", "d")
    assert "put the file back as it was" in in_words.out
    assert not list((folder / "world").glob("**/*.parquet"))
    said = cli("export", "d", "out", "--format", "jsonl")
    assert said.code == 1
    assert "0.parquet" in said.err
    assert not (folder / "out").exists()

    for name, data in whole.items():
        (folder / "data" / name).write_bytes(data)
    assert cli("verify", "d").code == 0, "what was put back is whole again"
    (folder / "data" / "3.parquet").write_bytes(whole["2.parquet"])
    second = adopted(cli, "data", "--name", "d")
    assert (second["version"], second["files"]) == (2, FILES + 1)
    compared = cli("diff", "d@1", "d@2", "--json").json
    assert [compared[word]["shards"] for word in ("kept", "added", "removed")] == [FILES, 1, 0]
    assert cli("verify", f"d@{first['digest'][:12]}").code == 0
    assert cli("verify", "d").code == 0, "two files of the same bytes are two shards"


def test_files_that_are_renamed_or_copied(cli: Cli, folder: Path) -> None:
    make(folder / "data", "arrow")
    made = adopted(cli, "data", "--name", "d")
    (folder / "data").rename(folder / "elsewhere")
    assert cli("verify", "d").code == 1
    moved = adopted(cli, "elsewhere", "--name", "d")
    assert (moved["digest"], moved["unchanged"]) == (made["digest"], True)
    assert cli("verify", "d").code == 1, "where they were is not forgotten by itself"
    assert cli("verify", "d", "--repair").code == 0
    assert cli("verify", "d").code == 0
    for file in (folder / "elsewhere").iterdir():
        file.rename(file.with_name(f"renamed-{file.name}"))
    assert adopted(cli, "elsewhere", "--name", "d")["unchanged"]
    assert cli("verify", "d").code == 0, "where they are now is what counts"

    # A second copy, under the same names: either will do.
    shutil.copytree(folder / "elsewhere", folder / "mirror")
    assert adopted(cli, "mirror", "--name", "d", "--site", "gcp/us-central1")["unchanged"]
    stores = cli("show", "d", "--json").json["stores"]
    assert sorted((s["cloud"], s["shards"]) for s in stores) == [("aws", FILES), ("gcp", FILES)]
    (folder / "elsewhere" / "renamed-1.arrow").unlink()
    assert cli("verify", "d").code == 1
    assert cli("export", "d", "out", "--format", "jsonl").code == 0
    assert len(lines(folder / "out")) == FILES * ROWS
    repaired = cli("verify", "d", "--repair", "--json")
    assert (repaired.code, repaired.json["restored"]) == (0, 0)
    assert "lies whole in adopted-" in repaired.json["findings"][0]["repair"]
    assert cli("verify", "d").code == 0


def test_shards_of_a_pipeline_can_be_adopted(cli: Cli, folder: Path, pipeline: Write) -> None:
    """Even where both manifests are one and the same, the copies that Millrace made stay known."""
    (folder / "data" / "a.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    sources = [{"url": "file://./data", "format": "lines"}]
    ran = cli("run", pipeline(sources=sources, placement={"replicas": 4, "min_clouds": 4}), "--json")
    assert ran.code == 0, ran.err
    made = adopted(cli, "world/aws/shards", "--name", "a")
    assert made["digest"] == ran.json["digest"], "the same shards in the same order are the same data"
    assert adopted(cli, "world/gcp", "--include", "shards/**", "--name", "d")["unchanged"]
    for name in ("a", "d"):
        report = cli("verify", name, "--json")
        assert (report.code, report.json["under_replicated"]) == (0, 0), report.out
    shutil.rmtree(folder / "world" / "gcp")
    report = cli("verify", "d", "--json")
    assert (report.code, report.json["under_replicated"]) == (1, 4), "what was adopted doesn't count as a copy"
    assert cli("verify", "d", "--repair").code == 0
    assert cli("verify", "d").code == 0


def test_what_cannot_be_adopted_is_named(cli: Cli, folder: Path) -> None:
    data = folder / "data"

    def refused(words: str, *args: str, code: int = 1) -> None:
        said = cli("adopt", "data", "--name", "d", *args)
        assert (said.code, words in said.err) == (code, True), said.err
        assert said.err.count("\n") == said.err.count("error: ")
        assert cli("datasets", "--json").json == []
        assert cli("runs", "--json").json == [], "nothing is begun before every file was hashed"

    refused("has no objects", code=2)
    (data / "README.md").write_text("hello")
    (data / "_temporary").mkdir()
    (data / "_temporary" / "half.parquet").write_bytes(b"PAR1")
    refused("no file that is named like Parquet", code=2)
    refused("has no mds files", "--format", "mds", code=2)
    refused("match no include ('*.x')", "--include", "*.x", code=2)
    refused("README.md is not a Parquet file", "--format", "parquet", "--include", "*.md")
    make(data, "parquet")
    make(data, "arrow", 1)
    refused("several formats (1 arrow, 3 parquet); name one with --format", code=2)
    (data / "0.arrow").unlink()
    pq.write_table(pa.table({"id": ["x"], "body": [1]}), data / "3.parquet")
    refused("3.parquet: column 'body' is int64, but binary in 0.parquet")
    pq.write_table(pa.table({"id": ["x"]}), data / "3.parquet")
    refused("3.parquet: column 'body' is missing")
    (data / "3.parquet").write_bytes((data / "0.parquet").read_bytes()[:-100])
    refused("3.parquet is not a Parquet file, or is truncated")
    (data / "3.parquet").write_bytes(b"")
    refused("3.parquet is empty")
    (data / "3.parquet").write_bytes((data / "0.parquet").read_bytes())
    damaged = bytearray((data / "0.parquet").read_bytes())
    damaged[40:60] = bytes(20)
    (data / "3.parquet").write_bytes(damaged)
    refused("3.parquet can't be read as a Parquet file")
    shutil.rmtree(data)
    refused("there is no directory", code=2)
    data.mkdir()
    with tarfile.open(data / "a.tar.gz", "w:gz"):
        pass
    refused("a.tar.gz is compressed as a whole")
    (data / "a.tar.gz").rename(data / "shard.00000.mds.zstd")
    refused("shard.00000.mds.zstd is compressed as a whole")
    (data / "shard.00000.mds.zstd").unlink()
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), data / "a.parquet")
    refused("holds no rows", code=2)


def test_a_wrong_command_is_named(cli: Cli, folder: Path) -> None:
    make(folder / "data", "parquet")
    for words, code, args in (
        ("'D d' is not a name", 2, ["data", "--name", "D d"]),
        ("'x/y' is not a site of this world; there are aws/us-east-1", 2, ["data", "--name", "d", "--site", "x/y"]),
        ("looks like a secret", 2, ["data", "--name", "d", "--option", "secret_access_key=abc"]),
        ("the URL carries credentials", 2, ["s3://me:secret@bucket/x", "--name", "d"]),
        ("file:// takes no options", 2, ["data", "--name", "d", "--option", "region=x"]),
        ("--option region has no value", 2, ["data", "--name", "d", "--option", "region"]),
        ("memory:// is gone", 2, ["memory://x", "--name", "d"]),
        ("placement.replicas is 9", 3, ["data", "--name", "d", "--replicas", "9"]),
    ):
        said = cli("adopt", *args)
        assert (said.code, words in said.err) == (code, True), said.err
        assert "me:secret" not in said.err


def test_one_file_with_an_odd_name(cli: Cli, folder: Path) -> None:
    make(folder / "my data%", "parquet", 1)
    made = adopted(cli, "my data%/0.parquet", "--name", "d")
    assert made["url"].endswith("/my%20data%25/0.parquet")
    assert cli("verify", "d").code == 0
    assert cli("export", "d", "out", "--format", "jsonl").code == 0
    assert len(lines(folder / "out")) == ROWS


def test_a_file_that_changes_after_it_was_hashed(folder: Path) -> None:
    make(folder / "data", "mds")

    async def work() -> None:
        async with open_world(None) as world:

            def meddle(done: int, total: int) -> None:
                if done == total:
                    file = folder / "data" / "0" / "shard.00000.mds"
                    file.write_bytes(file.read_bytes())

            with pytest.raises(SourceChanged, match=r"^0/shard\.00000\.mds changed or disappeared"):
                await adopt(world, AdoptRequest("data", "d"), progress=meddle)
            assert await world.coord.list("") == []

    asyncio.run(work())


def test_an_adoption_that_is_interrupted_leaves_nothing(folder: Path) -> None:
    make(folder / "data", "parquet", 20)

    async def work() -> None:
        async with open_world(None) as world:
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()
            running: list[asyncio.Task[Any]] = []

            def told(done: int, total: int) -> None:
                if done < total:
                    loop.call_soon_threadsafe(begun.set)

            running.append(asyncio.create_task(adopt(world, AdoptRequest("data", "d", slots=4), progress=told)))
            await begun.wait()
            running[0].cancel()
            with pytest.raises(asyncio.CancelledError):
                await running[0]
            assert await world.coord.list("") == []
            assert not (folder / "world").exists()
            done = await adopt(world, AdoptRequest("data", "d", slots=4))
            assert (done.version.version, done.version.rows) == (1, 20 * ROWS)

    asyncio.run(work())
    assert not [t.name for t in threading.enumerate() if t.name.startswith("store-the files")]


def test_killed_before_its_version_was_added(folder: Path) -> None:
    """What had been begun is taken up by the same command, and makes one version."""
    make(folder / "data", "parquet")

    async def work() -> None:
        async with open_world(None) as world:
            real = world.coord.commit
            calls = 0

            async def commit(writes: Any, **more: Any) -> int:
                nonlocal calls
                is_head = any(write.key.endswith("/head") for write in writes)
                calls += is_head
                if is_head and calls == 1:
                    raise asyncio.CancelledError
                return await real(writes, **more)

            world.coord.commit = commit  # type: ignore[method-assign]
            with pytest.raises(asyncio.CancelledError):
                await adopt(world, AdoptRequest("data", "d"))
            done = await adopt(world, AdoptRequest("data", "d"))
            assert (done.version.version, done.version.run, done.unchanged) == (1, 1, False)
            assert (await adopt(world, AdoptRequest("data", "d"))).unchanged

    asyncio.run(work())


def test_an_adopted_place_takes_no_writes(cli: Cli, folder: Path) -> None:
    make(folder / "data", "parquet")
    name = adopted(cli, "data", "--name", "d")["store"]

    async def work() -> None:
        async with open_world(None) as world:
            readable = await world.readable()
            assert readable.adopted == {name}
            assert name not in world.stores
            assert name not in {site.name for site in world.sites}
            store = readable.stores[name]
            assert (await store.head("0.parquet")).size_bytes > 0
            for writing in (store.put("x", [b"x"]), store.delete("0.parquet")):
                with pytest.raises(ReadOnly, match="not Millrace's to change"):
                    await writing
            assert not (await store.capabilities()).create_only
            assert (await world.readable()).stores[name] is store, "opened once"

    asyncio.run(work())
    assert sorted(p.name for p in (folder / "data").iterdir()) == ["0.parquet", "1.parquet", "2.parquet"]


# --- S3 -----------------------------------------------------------------------------------------------------------

KEY_ID = "AKIDMILLRACETEST0002"
SECRET = "wJalrSecretThatMustNotLeak/adoptiEXAMPLEKEY"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str, S3Store]]:
    """An endpoint, a bucket's name, and the bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint, name = f"http://{host}:{port}", f"test-{uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT"), timeout=30).close()
    yield (
        endpoint,
        name,
        S3Store(
            name,
            endpoint=endpoint,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        ),
    )
    server.stop()


def test_a_prefix_of_a_bucket(cli: Cli, folder: Path, bucket: tuple[str, str, S3Store]) -> None:
    endpoint, name, store = bucket
    make(folder / "data", "webdataset")
    for file in (folder / "data").rglob("*.tar"):
        store.put(f"corpus/set/{file.relative_to(folder / 'data').as_posix()}", file.read_bytes())
    store.put("corpus/other/x.tar", b"not of it")
    local = adopted(cli, "data", "--name", "local")
    options = [f"--option={pair}" for pair in (f"endpoint={endpoint}", "region=us-east-1", "path_style=true")]
    said = cli("adopt", f"s3://{name}/corpus/set", "--name", "d", *options, "--json")
    assert said.code == 0, said.err
    assert (said.json["digest"], said.json["rows"]) == (local["digest"], FILES * ROWS)
    assert cli("rm", "local", "--yes").code == 0
    shutil.rmtree(folder / "data")
    assert cli("verify", "d", "--json").json["missing"] == FILES, "the local copy is gone, and said to be"
    repaired = cli("verify", "d", "--repair", "--json")
    assert repaired.code == 0, repaired.out
    assert cli("export", "d", "out", "--format", "jsonl").code == 0
    assert len(lines(folder / "out")) == FILES * ROWS

    first = "corpus/set/0/part-00000.tar"
    data = bytearray(bytes(store.get(first).bytes()))
    data[600] ^= 1
    store.put(first, bytes(data))
    report = cli("verify", "d", "--json")
    assert [(f["object"], f["verdict"]) for f in report.json["findings"] if f["store"]] == [
        ("0/part-00000.tar", "rotten")
    ]
    before = sorted(info["path"] for page in store.list() for info in page)
    assert cli("rm", "d", "--yes").code == 0
    for _ in range(2):
        assert cli("gc", "--grace", "0s").code == 0
    assert sorted(info["path"] for page in store.list() for info in page) == before
    kept = b"".join(p.read_bytes() for p in (folder / ".millrace").rglob("*") if p.is_file())
    assert SECRET.encode() not in kept
    assert KEY_ID.encode() not in kept
