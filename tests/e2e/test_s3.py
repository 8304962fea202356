"""A source and a store on S3 (moto's server): the same dataset as on disk, and credentials that stay where they are."""

from __future__ import annotations

import io
import json
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

Cli = Callable[..., Any]
Write = Callable[..., str]
Launch = Callable[..., Any]

KEY_ID = "AKIDMILLRACETEST0001"
SECRET = "wJalrSecretThatMustNotLeak/bPxRfiCYEXAMPLEKEY"
TOKEN = "FwoGSessionTokenThatMustNotLeakEither"

S3_WORLD = """\
clouds:
  aws:
    regions:
      us-east-1:
        jurisdiction: us
        stores:
          aws-main:
            url: s3://{bucket}/stores/main
            options: {{endpoint: "{endpoint}", region: us-east-1, path_style: true}}
  gcp: {{regions: {{us-central1: {{jurisdiction: us, stores: {{gcp-main: {{url: "file://./world/gcp"}}}}}}}}}}
  ibm: {{regions: {{us-south: {{jurisdiction: us, stores: {{ibm-main: {{url: "file://./world/ibm"}}}}}}}}}}
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


class Bucket:
    """One bucket, spoken to without Millrace."""

    def __init__(self, endpoint: str) -> None:
        self.name = f"test-{uuid4().hex}"
        self.endpoint = endpoint
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{self.name}", method="PUT"), timeout=30).close()
        self.store = S3Store(
            self.name,
            endpoint=endpoint,
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def put(self, key: str, data: bytes) -> None:
        self.store.put(key, data)

    def get(self, key: str) -> bytes:
        return bytes(self.store.get(key).bytes())

    def listed(self, prefix: str = "") -> list[str]:
        return sorted(info["path"] for page in self.store.list(prefix) for info in page)


@pytest.fixture
def bucket(endpoint: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket with a corpus, the same corpus on disk, a world on S3 and one on disk, and credentials in the way
    that cloud tools find them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    made = Bucket(endpoint)
    for name, data in corpus().items():
        made.put(f"corpus/{name}", data)
        path = folder / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    disk = (folder / "world.yaml").read_text()
    (folder / "disk.yaml").write_text(disk.replace("./world/", "./disk/") + "state: ./.disk\n")
    (folder / "world.yaml").write_text(S3_WORLD.format(bucket=made.name, endpoint=endpoint))
    (folder / "clean.py").write_text("def same(batch):\n    return batch\n")
    return made


def corpus() -> dict[str, bytes]:
    found = {}
    for i in range(4):
        rows: list[dict[str, Any]] = [
            {"id": 100 * i + j, "text": f"line {j} of {i} " + "z" * (j % 50)} for j in range(100)
        ]
        found[f"json lines/{i}.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{**row, "id": row["id"] + 1000} for row in rows]), out, row_group_size=40)
        found[f"tables/{i}.parquet"] = out.getvalue()
    return found


def spec(url: str, options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "sources": [
            {"url": f"{url}", "include": ["**/*.jsonl"], "format": "jsonl", "options": options},
            {"url": f"{url}/tables", "format": "parquet", "options": options},
        ],
        "chunk": 4096,
        "shards": {"size": 4096, "block_rows": 16},
        "placement": {"replicas": 2, "min_clouds": 2},
        **more,
    }


def on_s3(bucket: Bucket, **more: Any) -> dict[str, Any]:
    options = {"endpoint": bucket.endpoint, "region": "us-east-1", "path_style": True}
    return spec(f"s3://{bucket.name}/corpus", options, **more)


def test_from_s3_to_s3_and_disk(cli: Cli, folder: Path, pipeline: Write, bucket: Bucket) -> None:
    local = cli("run", pipeline("disk-pipeline.yaml", **spec("file://./data", {})), "--world", "disk.yaml", "--json")
    assert local.code == 0, local.err
    said = cli("run", pipeline(**on_s3(bucket)), "--workers", "4", "--json")
    assert said.code == 0, said.err
    assert (said.json["rows"], said.json["digest"]) == (800, local.json["digest"])
    assert bucket.listed("stores/main/shards")

    report = cli("verify", "d", "--json")
    assert report.code == 0, report.out
    assert report.json["whole"] == report.json["replicas"]
    stores = {s["name"]: s["shards"] for s in cli("show", "d", "--json").json["stores"]}
    assert stores["aws-main"] > 0
    said = cli("export", "d", "out", "--format", "jsonl")
    assert said.code == 0, said.err
    lines = [json.loads(x) for p in sorted((folder / "out").glob("*.jsonl")) for x in p.read_text().splitlines()]
    assert sorted(row["id"] for row in lines) == [*range(400), *range(1000, 1400)]

    # Rot and loss in the bucket are found and mended like those on a disk.
    one, two = bucket.listed("stores/main/shards")[:2]
    data = bytearray(bucket.get(one))
    data[300] ^= 1
    bucket.put(one, bytes(data))
    bucket.store.delete(two)
    broken = cli("verify", "d", "--json")
    assert broken.code == 1
    assert {(f["object"], f["store"], f["verdict"]) for f in broken.json["findings"]} == {
        (one.removeprefix("stores/main/"), "aws-main", "rotten"),
        (two.removeprefix("stores/main/"), "aws-main", "missing"),
    }
    assert cli("verify", "d", "--repair").code == 0
    assert cli("verify", "d").code == 0

    assert cli("rm", "d", "--yes").code == 0
    assert cli("gc", "--grace", "0s").code == 0
    deadline = 3  # S3 tells times in whole seconds: an object may look newer than its mark for a moment
    while bucket.listed("stores/main/shards") and deadline:
        deadline -= 1
        assert cli("gc", "--grace", "0s").code == 0
    assert len(bucket.listed("corpus")) == 8, "the source is not ours to delete"


def test_an_object_that_changes_is_named(cli: Cli, folder: Path, pipeline: Write, bucket: Bucket) -> None:
    meddling = (
        "from obstore.store import S3Store\n"
        "def same(batch):\n"
        f"    store = S3Store({bucket.name!r}, endpoint={bucket.endpoint!r}, region='us-east-1',\n"
        "        virtual_hosted_style_request=False, client_options={'allow_http': True})\n"
        "    store.put('corpus/tables/3.parquet', b'other')\n"
        "    return batch\n"
    )
    (folder / "clean.py").write_text(meddling)
    said = cli("run", pipeline(**on_s3(bucket, transforms=[{"python": "clean:same"}])), "--workers", "1")
    assert said.code == 1
    assert "3.parquet changed since the run was planned" in said.err


def test_a_bucket_that_is_not_there(cli: Cli, pipeline: Write, bucket: Bucket) -> None:
    name = pipeline(**on_s3(bucket))
    bucket.name = "no-such-bucket"
    said = cli("run", pipeline("other.yaml", **on_s3(bucket)))
    assert said.code in {1, 2}
    assert "no-such-bucket" in said.err
    assert cli("plan", name).code == 0


def test_credentials_stay_in_the_environment(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, bucket: Bucket
) -> None:
    (folder / "clean.py").write_text(
        "import pathlib, time\n"
        f"gate = pathlib.Path({str(folder / 'gate')!r})\n"
        "def same(batch):\n"
        "    while not gate.exists():\n"
        "        time.sleep(0.02)\n"
        "    return batch\n"
    )
    run = launch("run", pipeline(**on_s3(bucket, transforms=[{"python": "clean:same"}])), "--workers", "2", "--json")
    run.begun()
    run.until_workers(2)
    for _, title in run.processes():
        assert not leaked(title.encode()), "anybody on the machine may read a process's title"
    status = cli("status", "1", "--json")
    (folder / "gate").touch()
    said = run.end()
    assert said.code == 0, said.err
    others = [cli(*args) for args in (("show", "d", "--json"), ("verify", "d", "--json"), ("runs", "--json"))]
    for words in (status, said, *others):
        assert not leaked(words.out.encode())
        assert not leaked(words.err.encode())
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 20
    assert not [p for p in files if leaked(p.read_bytes())]
    assert not [key for key in bucket.listed() if leaked(bucket.get(key))]


def leaked(data: bytes) -> bool:
    return any(secret.encode() in data for secret in (KEY_ID, SECRET, TOKEN))


def test_wrong_credentials_are_not_repeated(
    cli: Cli, pipeline: Write, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret in a spec is refused where it stands, without saying it again."""
    for options in ({"secret_access_key": SECRET}, {"access_key_id": KEY_ID}):
        said = cli("run", pipeline(sources=[{"url": "s3://b/p", "format": "text", "options": options}]))
        assert said.code == 2
        assert not leaked(said.err.encode())
    said = cli("run", pipeline(sources=[{"url": f"s3://{KEY_ID}:{SECRET.replace('/', '')}@b/p", "format": "text"}]))
    assert said.code == 2
    assert "credentials" in said.err
    assert KEY_ID not in said.err
