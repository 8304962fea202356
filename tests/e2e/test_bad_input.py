"""Bad input through the front door: no traceback, the thing named in the sentence, the right exit code, no loss."""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]


def source(format: str, **more: Any) -> dict[str, Any]:
    return {"sources": [{"url": "file://./data", "format": format, **more}]}


def good(folder: Path, name: str = "good.jsonl") -> None:
    (folder / "data" / name).write_text('{"text": "one"}\n{"text": "two"}\n')


def test_a_truncated_gzip_is_named_and_the_run_fails(cli: Cli, folder: Path, pipeline: Write) -> None:
    whole = gzip.compress(b'{"text": "hello"}\n' * 10_000)
    (folder / "data" / "a.jsonl").write_text('{"text": "fine"}\n')
    (folder / "data" / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    said = cli("run", pipeline(**source("jsonl"), chunk=4096))
    assert said.code == 1
    assert "b.jsonl.gz" in said.err
    assert "gzip" in said.err
    assert "chunk" in said.err


def test_a_truncated_gzip_may_be_set_aside(cli: Cli, folder: Path, pipeline: Write) -> None:
    big = "".join(json.dumps({"text": os.urandom(500).hex()}) + "\n" for _ in range(20))
    whole = gzip.compress(big.encode())
    (folder / "data" / "a.jsonl").write_text(big)
    (folder / "data" / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    said = cli("run", pipeline(**source("jsonl"), chunk=4096, quarantine={"chunks": 1}), "--json")
    assert said.code == 0, said.err
    assert said.json["quarantined_chunks"] == 1
    assert said.json["rows"] == 20
    assert any("b.jsonl.gz" in q["reason"] for q in said.json["quarantine"])


def test_a_parquet_file_with_another_schema_is_named(cli: Cli, folder: Path, pipeline: Write) -> None:
    pq.write_table(pa.table({"x": pa.array([1, 2], pa.int64())}), folder / "data" / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([1, 2], pa.int32())}), folder / "data" / "b.parquet")
    said = cli("run", pipeline(**source("parquet")))
    assert said.code == 1
    assert "b.parquet" in said.err
    assert "'x'" in said.err
    assert "int32" in said.err


def test_a_huge_json_line_is_quarantined_without_being_held(spawn: Any, folder: Path, pipeline: Write) -> None:
    with (folder / "data" / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(300):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    name = pipeline(**source("jsonl"), quarantine={"limit": "50%"}, max_record="10MB")
    process = spawn("run", name, "--json", "--workers", "1")
    out, err = process.communicate(timeout=100)
    report = json.loads(out)
    assert process.returncode == 0, err
    assert (report["rows"], report["quarantined"]) == (2, 1)
    line = report["quarantine"][0]
    assert line["path"] == "a.jsonl"
    assert "19" in line["position"]
    assert line["rule"] == "max_record"


@pytest.mark.parametrize("format", ["text", "lines", "jsonl", "csv"])
def test_invalid_utf8_is_quarantined_by_name(cli: Cli, folder: Path, pipeline: Write, format: str) -> None:
    bodies = {
        "text": b"caf\xe9",
        "lines": b"fine\ncaf\xe9\n",
        "jsonl": b'{"text": "fine"}\n{"text": "caf\xe9"}\n',
        "csv": b"text\nfine\ncaf\xe9\n",
    }
    (folder / "data" / "bad.txt").write_bytes(bodies[format])
    (folder / "data" / "good.txt").write_bytes(bodies[format].replace(b"\xe9", b"e"))
    said = cli("run", pipeline(**source(format), quarantine={"limit": "60%"}), "--json")
    assert said.code == 0, said.err
    assert said.json["quarantined"] == 1
    assert said.json["quarantine"][0]["path"] == "bad.txt"
    assert said.json["quarantine"][0]["rule"] == "utf-8"
    refused = cli("run", pipeline(**source(format)))
    assert refused.code == 1
    assert "bad.txt" in refused.err
    assert "quarantine.limit" in refused.err


def test_empty_files_and_an_empty_source(cli: Cli, folder: Path, pipeline: Write) -> None:
    said = cli("run", pipeline())
    assert said.code == 2
    assert "no objects" in said.err
    (folder / "data" / "empty.txt").touch()
    said = cli("run", pipeline(), "--json")
    assert said.code == 0, said.err
    assert said.json["rows"] == 1
    (folder / "data" / "empty.txt").rename(folder / "data" / "empty.parquet")
    said = cli("run", pipeline(**source("parquet")))
    assert said.code in {1, 2}
    assert "empty.parquet" in said.err


def test_an_empty_dataset_is_a_dataset(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.jsonl").touch()
    (folder / "data" / "b.jsonl").write_text('{"text": "x"}\n')
    name = pipeline(**source("jsonl"), transforms=[{"sql": "SELECT * FROM records WHERE text = 'no such'"}])
    said = cli("run", name, "--json")
    assert said.code == 0, said.err
    assert (said.json["rows"], said.json["shards"], said.json["version"]) == (0, 0, 1)
    assert cli("verify", "d").code == 0
    assert cli("show", "d").code == 0
    said = cli("export", "d", "out")
    assert said.code == 2
    assert "no rows" in said.err


def test_a_glob_that_matches_nothing(cli: Cli, folder: Path, pipeline: Write) -> None:
    good(folder)
    said = cli("run", pipeline(**source("text", include=["**/*.pyy"])))
    assert said.code == 2
    assert "**/*.pyy" in said.err
    assert "1" in said.err


def test_a_source_that_is_not_there(cli: Cli, pipeline: Write) -> None:
    said = cli("run", pipeline(sources=[{"url": "file://./nowhere", "format": "text"}]))
    assert said.code in {1, 2}
    assert "nowhere" in said.err


def test_a_file_that_changes_between_plan_and_read(cli: Cli, folder: Path, pipeline: Write) -> None:
    """The transform itself changes a file of a later chunk: that is as well timed as it gets."""
    for i in range(4):
        (folder / "data" / f"{i}.txt").write_text("x" * 5000)
    (folder / "meddler.py").write_text(
        "import pathlib\n"
        f"target = pathlib.Path({str(folder)!r}) / 'data' / '3.txt'\n"
        "def change(batch):\n"
        "    target.write_text('changed')\n"
        "    return batch\n"
    )
    name = pipeline(transforms=[{"python": "meddler:change"}], chunk=5000)
    said = cli("run", name, "--workers", "1")
    assert said.code == 1
    assert "3.txt changed since the run was planned" in said.err
    (folder / "meddler.py").write_text("def change(batch):\n    return batch\n")
    said = cli("run", name, "--json")
    assert said.code == 0, said.err
    assert said.json["run"] == 2, "other sources are another run"


def test_a_file_that_disappears(cli: Cli, folder: Path, pipeline: Write) -> None:
    for i in range(3):
        (folder / "data" / f"{i}.txt").write_text("x" * 5000)
    (folder / "remover.py").write_text(
        "import pathlib\n"
        f"target = pathlib.Path({str(folder)!r}) / 'data' / '2.txt'\n"
        "def change(batch):\n"
        "    target.unlink(missing_ok=True)\n"
        "    return batch\n"
    )
    said = cli("run", pipeline(transforms=[{"python": "remover:change"}], chunk=5000), "--workers", "1")
    assert said.code == 1
    assert "2.txt disappeared" in said.err


def test_a_symlink_loop_is_named_and_can_be_excluded(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    (folder / "data" / "sub").mkdir()
    (folder / "data" / "sub" / "loop").symlink_to(folder / "data")
    said = cli("run", pipeline())
    assert said.code in {1, 2}
    assert "sub/loop" in said.err
    assert "exclude" in said.err
    said = cli("run", pipeline(**source("text", exclude=["sub/loop/**"])), "--json")
    assert said.code == 0, said.err
    assert said.json["rows"] == 1


def test_a_dangling_link_is_named_unless_it_is_not_wanted(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    (folder / "data" / "gone.log").symlink_to(folder / "nowhere")
    said = cli("run", pipeline())
    assert said.code in {1, 2}
    assert "gone.log" in said.err
    said = cli("run", pipeline(**source("text", include=["*.txt"])), "--json")
    assert said.code == 0, said.err
    assert said.json["rows"] == 1
    assert cli("run", pipeline(**source("text", exclude=["*.log"]))).code == 0


def test_odd_names(cli: Cli, folder: Path, pipeline: Write) -> None:
    names = ["with space.txt", "new\nline.txt", "ünï-日本.txt", "'quote\".txt", "-dash.txt", "per%20cent.txt", "#?.txt"]
    for name in names:
        (folder / "data" / name).write_text(name)
    said = cli("run", pipeline(**source("files")), "--json")
    assert said.code == 0, said.err
    assert said.json["rows"] == len(names)
    said = cli("export", "d", "out", "--format", "files")
    assert said.code == 0, said.err
    assert {p.name: p.read_text() for p in (folder / "out").iterdir()} == {name: name for name in names}


def test_a_name_that_is_not_utf8(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    Path(os.fsdecode(os.fsencode(folder / "data") + b"/caf\xe9.txt")).write_text("x")
    said = cli("run", pipeline())
    assert said.code in {1, 2}
    assert "caf" in said.err
    assert cli("run", pipeline(**source("text", include=["a*"]))).code == 0


def bound_by_permissions() -> None:
    """Before exec: root without the two capabilities that pass over permissions."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def test_a_directory_without_permission(spawn: Any, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    (folder / "data" / "secret").mkdir(mode=0o000)
    process = spawn("run", pipeline(), preexec_fn=bound_by_permissions)
    _, err = process.communicate(timeout=60)
    (folder / "data" / "secret").chmod(0o700)
    assert process.returncode in {1, 2}, err
    assert "'secret'" in err
    assert "ermission" in err
    assert "Traceback" not in err


def mounted(folder: Path, where: Path, options: str) -> bool:
    where.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small file system")
def test_a_full_store_is_left_out_while_policy_can_be_kept(cli: Cli, folder: Path, pipeline: Write) -> None:
    small = folder / "world" / "aws"
    if not mounted(folder, small, "size=64k"):
        pytest.skip("mounting isn't allowed here")
    try:
        for i in range(4):
            (folder / "data" / f"{i}.bin").write_bytes(os.urandom(100_000))
        said = cli(
            "run", pipeline(**source("files"), chunk=100_000, placement={"replicas": 3, "min_clouds": 3}), "--json"
        )
        assert said.code == 0, said.err
        assert said.json["replicas"] == 12
        assert any("aws-main" in n and "space" in n for n in said.json["notes"])
        assert cli("verify", "d").code == 0
        said = cli(
            "run",
            pipeline(**source("files"), dataset="all", placement={"replicas": 4, "min_clouds": 4}),
            "--workers",
            "1",
        )
        assert said.code == 1
        assert "aws-main" in said.err
        assert "space" in said.err
        subprocess.run(["mount", "-o", "remount,size=10m", str(small)], check=True)
        said = cli("run", "pipeline.yaml", "--json")
        assert said.code == 0, said.err
        assert said.json["run"] == 2, "the same run goes on once there is room"
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a read-only file system")
def test_a_read_only_store_is_named(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    frozen = folder / "world" / "gcp"
    if not mounted(folder, frozen, "ro,size=1m"):
        pytest.skip("mounting isn't allowed here")
    try:
        said = cli("run", pipeline(placement={"replicas": 4, "min_clouds": 4}))
        assert said.code == 1
        assert "gcp-main" in said.err
        assert "read-only" in said.err.lower()
        assert cli("run", pipeline(placement={"replicas": 3, "min_clouds": 3})).code == 0
        assert cli("verify", "d").code == 0
    finally:
        subprocess.run(["umount", str(frozen)], check=True)


TRANSFORMS = {
    "raises": ("def f(batch):\n    raise ValueError('no good')\n", ["m:f", "ValueError", "no good"]),
    "exits": ("import os\ndef f(batch):\n    os._exit(3)\n", ["m:f", "exit code 3"]),
    "is_killed": ("import os\ndef f(batch):\n    os.kill(os.getpid(), 9)\n", ["m:f", "signal 9"]),
    "hangs": ("import time\ndef f(batch):\n    time.sleep(600)\n", ["m:f", "timeout", "1 s"]),
    "hangs_in_c": ("import re\ndef f(batch):\n    re.match('(a+)+$', 'a' * 60 + 'b')\n", ["m:f", "timeout"]),
    "returns_a_dict": ("def f(batch):\n    return {'x': 1}\n", ["m:f", "dict", "RecordBatch"]),
    "returns_none": ("def f(batch):\n    pass\n", ["m:f", "NoneType"]),
    "is_random": (
        "import pyarrow as pa, random\n"
        "def f(batch):\n"
        "    return pa.record_batch([pa.array([random.random() for _ in range(batch.num_rows)])], ['r'])\n",
        ["m:f", "different output", "'r'"],
    ),
    "is_not_there": ("x = 1\n", ["m", "f"]),
    "is_broken": ("def f(batch:\n", ["m", "SyntaxError"]),
    "needs_what_is_not_installed": ("import no_such_library\ndef f(batch):\n    return batch\n", ["no_such_library"]),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_a_transform_that(cli: Cli, folder: Path, pipeline: Write, case: str) -> None:
    code, words = TRANSFORMS[case]
    module = f"m_{case}"
    (folder / f"{module}.py").write_text(code)
    (folder / "data" / "a.txt").write_text("hello")
    name = pipeline(transforms=[{"python": f"{module}:f", "timeout": "1s"}], attempts=2)
    said = cli("run", name, "--workers", "1")
    assert said.code in {1, 2}, said.err
    for word in words:
        assert word.replace("m:f", f"{module}:f") in said.err, said.err
    (folder / f"{module}.py").write_text("def f(batch):\n    return batch\n")
    assert cli("run", name, "--workers", "1").code == 0, "nothing was lost, and the mended transform goes through"


SPECS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "unknown key": ({"placment": {}}, ["placment", "did you mean 'placement'"], 2),
    "wrong unit": ({"shards": {"size": "64 parsecs"}}, ["shards.size", "parsecs"], 2),
    "replicas in too few stores": ({"placement": {"replicas": 9}}, ["placement.replicas", "aws-main"], 3),
    "no legal store": ({"placement": {"allow": ["jp"]}}, ["placement.allow", "aws-main"], 3),
    "too few clouds": ({"placement": {"replicas": 3, "min_clouds": 2, "allow": ["eu"]}}, ["az-main"], 3),
    "aggregate": ({"transforms": [{"sql": "SELECT count(*) FROM records"}]}, ["transforms.0", "count"], 2),
    "not sql": ({"transforms": [{"sql": "SELEKT"}]}, ["transforms.0"], 2),
    "no such column": ({"transforms": [{"validate": {"required": ["nope"]}}]}, ["nope", "text"], 2),
    "no tokenizer": (
        {"transforms": [{"tokenize": {"column": "text", "tokenizer": "no.json", "pack": 8}}]},
        ["no.json"],
        2,
    ),
    "no scheme": ({"sources": [{"url": "ftp://x", "format": "text"}]}, ["ftp"], 2),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_spec_with(cli: Cli, folder: Path, pipeline: Write, case: str) -> None:
    fields, words, code = SPECS[case]
    (folder / "data" / "a.txt").write_text("hello")
    for command in ("plan", "run"):
        said = cli(command, pipeline(**fields))
        assert said.code == code, said.err
        for word in words:
            assert word in said.err
    assert not (folder / "world").exists(), "nothing was written"


def test_two_runs_writing_one_dataset(spawn: Any, cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "slow.py").write_text("import time\ndef f(batch):\n    time.sleep(20)\n    return batch\n")
    (folder / "data" / "a.txt").write_text("hello")
    first = spawn("run", pipeline(transforms=[{"python": "slow:f"}]))
    try:
        line = first.stderr.readline()
        assert "run 1 of dataset d begins" in line
        said = cli("run", "pipeline.yaml")
        assert said.code == 1
        assert "run 1" in said.err
        assert "millrace stop 1" in said.err
        assert cli("run", pipeline("other.yaml", dataset="other")).code == 0
    finally:
        first.kill()
        first.communicate()


def test_a_tar_with_absolute_and_dotted_paths(cli: Cli, folder: Path, pipeline: Write) -> None:
    with tarfile.open(folder / "data" / "a.tar", "w") as tar:
        for name in ("good.txt", "/etc/passwd.txt", "../../up.txt", "also.txt"):
            info = tarfile.TarInfo(name)
            info.size = 2
            tar.addfile(info, BytesIO(b"hi"))
    said = cli("run", pipeline(**source("webdataset"), quarantine={"limit": "50%"}), "--json")
    assert said.code == 0, said.err
    assert (said.json["rows"], said.json["quarantined"]) == (2, 2)
    assert {q["rule"] for q in said.json["quarantine"]} == {"unsafe name"}


@pytest.mark.parametrize("args", [("run", "nope.yaml"), ("plan", "nope.yaml"), ("show", "nope"), ("verify", "no@3")])
def test_things_that_are_not_there(cli: Cli, args: tuple[str, ...]) -> None:
    said = cli(*args)
    assert said.code == 2
    assert args[1].partition("@")[0] in said.err


def test_no_world(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "world.yaml").unlink()
    said = cli("run", pipeline())
    assert said.code == 2
    assert "millrace init" in said.err


def test_a_wrong_option_is_a_usage_error(cli: Cli) -> None:
    assert cli("run", "--wrokers", "2").code == 2
    assert cli("rnu").code == 2
    assert cli("status", "seven").code == 2
    assert cli("status", "7").code == 2
