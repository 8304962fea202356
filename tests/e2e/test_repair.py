"""Rot, loss and lost clouds: verify names each thing, repair mends what policy and what is left allow."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]
Launch = Callable[..., Any]

FILES = 12


@pytest.fixture
def dataset(cli: Cli, folder: Path, pipeline: Write) -> str:
    """12 shards with 3 replicas in at least 2 of 4 clouds; gives the digest."""
    fill(folder, range(FILES))
    return made(cli, pipeline)


def fill(folder: Path, numbers: range) -> None:
    for i in numbers:
        (folder / "data" / f"{i:02}.bin").write_bytes(random.Random(i).randbytes(5000))


def made(cli: Cli, pipeline: Write, **fields: Any) -> str:
    spec: dict[str, Any] = {
        "sources": [{"url": "file://./data", "format": "files"}],
        "chunk": 5000,
        "shards": {"size": 1024, "block_rows": 1},
        "placement": {"replicas": 3, "min_clouds": 2},
        **fields,
    }
    said = cli("run", pipeline(**spec), "--json")
    assert said.code == 0, said.err
    digest: str = said.json["digest"]
    return digest


def replicas(folder: Path, key: str) -> list[Path]:
    return sorted((folder / "world").glob(f"*/{key}"))


def objects(folder: Path, pattern: str) -> list[str]:
    """The keys of the objects like this, each once, wherever they lie."""
    return sorted({p.as_posix().partition("/world/")[2].partition("/")[2] for p in folder.glob(f"world/*/{pattern}")})


def shards(folder: Path) -> list[str]:
    return objects(folder, "shards/*/*")


def without(folder: Path, *clouds: str) -> None:
    """Take clouds out of the world file; each is a line of it."""
    lines = (folder / "world.yaml").read_text().splitlines(keepends=True)
    (folder / "world.yaml").write_text("".join(x for x in lines if x.split(":")[0].strip() not in clouds))


def store_of(path: Path) -> str:
    """The name of the store that a replica lies in."""
    names = {"aws": "aws-main", "gcp": "gcp-main", "azure": "az-main", "ibm": "ibm-main"}
    return next(names[part] for part in path.parts if part in names)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def verdicts(report: Any) -> set[tuple[str, str, str]]:
    return {(f["object"], f["store"], f["verdict"]) for f in report["findings"]}


def test_each_damage_is_named_and_each_is_mended(cli: Cli, folder: Path, dataset: str) -> None:
    keys = shards(folder)
    flipped, deleted, cut = (replicas(folder, key)[i] for i, key in enumerate(keys[:3]))
    root = replicas(folder, f"manifests/{dataset}.json")[1]
    segment = sorted((folder / "world").glob("*/manifests/segments/*.arrow"))[0]
    grown, emptied = replicas(folder, keys[3])[0], replicas(folder, keys[4])[2]
    flip(flipped, 4000)
    deleted.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    root.unlink()
    flip(segment, -3)
    grown.write_bytes(grown.read_bytes() + b"x")
    emptied.write_bytes(b"")
    wanted = {
        (path.as_posix().partition("/world/")[2].partition("/")[2], store_of(path), verdict)
        for path, verdict in (
            (flipped, "rotten"),
            (deleted, "missing"),
            (cut, "rotten"),
            (root, "missing"),
            (segment, "rotten"),
            (grown, "rotten"),
            (emptied, "rotten"),
        )
    }
    report = cli("verify", "d", "--json")
    assert report.code == 1
    assert verdicts(report.json) == wanted, report.out
    assert (report.json["missing"], report.json["rotten"], report.json["lost"]) == (2, 5, 0)
    assert report.json["whole"] == report.json["replicas"] - 7
    assert report.json["verdict"] == "damaged"
    in_words = cli("verify", "d")
    assert in_words.code == 1
    assert all(object in in_words.out and store in in_words.out for object, store, _ in wanted)
    assert "--repair" in in_words.err

    repaired = cli("verify", "d", "--repair", "--json")
    assert repaired.code == 0, repaired.out
    assert repaired.json["restored"] == 7
    assert verdicts(repaired.json) == wanted
    assert all(f["repaired"] for f in repaired.json["findings"])
    after = cli("verify", "d", "--json")
    assert after.code == 0
    assert (after.json["findings"], after.json["digest"]) == ([], dataset)


def test_a_whole_cloud_is_lost(cli: Cli, folder: Path, dataset: str) -> None:
    before = cli("show", "d", "--json").json
    held = {s["name"]: s["shards"] for s in before["stores"]}
    shutil.rmtree(folder / "world" / "aws")
    report = cli("verify", "d", "--json")
    assert report.code == 1
    assert Counter(f["verdict"] for f in report.json["findings"]) == {"missing": report.json["missing"]}
    assert {f["store"] for f in report.json["findings"]} == {"aws-main"}
    assert sum(f["object"].startswith("shards/") for f in report.json["findings"]) == held["aws-main"]
    repaired = cli("verify", "d", "--repair", "--json")
    assert repaired.code == 0, repaired.out
    assert repaired.json["restored"] == report.json["missing"]
    after = cli("verify", "d", "--json").json
    assert (after["verdict"], after["digest"]) == ("whole", dataset)
    assert after["whole"] == after["replicas"] == report.json["replicas"]


def test_two_clouds_are_lost(cli: Cli, folder: Path, dataset: str) -> None:
    """With three replicas of everything, one is always left."""
    shutil.rmtree(folder / "world" / "gcp")
    shutil.rmtree(folder / "world" / "ibm")
    assert cli("export", "d", "out", "--format", "files").code == 0, "one copy is enough to read"
    assert cli("verify", "d", "--repair").code == 0
    assert cli("verify", "d").code == 0
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (folder / "data").iterdir()
    }


def test_every_copy_of_one_shard_is_gone(cli: Cli, folder: Path, dataset: str) -> None:
    lost, damaged, _ = shards(folder)[:3]
    stores = {store_of(path) for path in replicas(folder, lost)}
    one, two, three = replicas(folder, lost)
    one.unlink()
    flip(two, 300)
    three.write_bytes(b"")
    flip(replicas(folder, damaged)[0], 300)
    report = cli("verify", "d", "--repair", "--json")
    assert report.code == 1
    found = report.json
    assert (found["lost"], found["restored"]) == (1, 1)
    of_lost = [f for f in found["findings"] if f["object"] == lost]
    assert {f["store"] for f in of_lost if f["store"]} == stores
    assert not any(f["repaired"] for f in of_lost)
    assert [f["repaired"] for f in found["findings"] if f["object"] == damaged] == [True]
    in_words = cli("verify", "d")
    assert in_words.code == 1
    assert lost in in_words.out
    assert "--fresh" in in_words.out
    assert all(store in in_words.out for store in stores)
    said = cli("export", "d", "out", "--format", "files")
    assert said.code == 1
    assert lost in said.err
    assert not (folder / "out").exists(), "an export is whole or not there"

    again = cli("run", "pipeline.yaml", "--fresh", "--json")
    assert again.code == 0, again.err
    assert again.json["digest"] == dataset, "the way out that was named leads out"
    assert cli("verify", "d", "--repair").code == 0
    assert cli("verify", "d").code == 0


def test_a_store_that_left_the_world(cli: Cli, folder: Path, dataset: str) -> None:
    """Its replicas count as missing, and repair places them within the policy on the stores that are left."""
    without(folder, "aws")
    report = cli("verify", "d", "--json")
    assert report.code == 1
    assert {f["store"] for f in report.json["findings"]} == {"aws-main"}
    repaired = cli("verify", "d", "--repair", "--json")
    assert repaired.code == 0, repaired.out
    after = cli("verify", "d", "--json").json
    assert after["verdict"] == "whole"
    assert after["replicas"] == report.json["replicas"]
    assert len(list((folder / "world").glob("gcp/shards/*/*"))) == FILES
    assert cli("export", "d", "out", "--format", "files").code == 0
    assert cli("show", "d").code == 0


def test_repair_keeps_within_the_jurisdictions(cli: Cli, folder: Path, pipeline: Write) -> None:
    """Three stores are in the us, and the policy of the version allows only those, whatever is lost."""
    fill(folder, range(FILES))
    made(cli, pipeline, placement={"replicas": 2, "min_clouds": 2, "allow": ["us"]})
    assert not list((folder / "world").glob("azure/**/*.arrow"))
    shutil.rmtree(folder / "world" / "aws")
    whole = (folder / "world.yaml").read_text()
    without(folder, "aws")
    assert cli("verify", "d", "--repair").code == 0
    assert not list((folder / "world").glob("azure/**/*.arrow"))

    # Only one legal store is left: better too few copies, said aloud, than one in the wrong place.
    without(folder, "ibm")
    report = cli("verify", "d", "--repair", "--json")
    assert report.code == 1
    assert any("1 of 2 replicas" in f["repair"] for f in report.json["findings"]), report.out
    assert not list((folder / "world").glob("azure/**/*.arrow"))
    (folder / "world.yaml").write_text(whole)
    assert cli("verify", "d", "--repair").code == 0
    assert not list((folder / "world").glob("azure/**/*.arrow"))
    assert cli("verify", "d").code == 0


def test_export_falls_over_to_good_copies(cli: Cli, folder: Path, dataset: str) -> None:
    """Two of three copies of everything are damaged, each object's in other stores."""
    dice = random.Random(3)
    keys = shards(folder) + objects(folder, "manifests/**/*.*")
    for key in keys:
        for path in dice.sample(replicas(folder, key), 2):
            flip(path, dice.randrange(path.stat().st_size))
    said = cli("export", "d", "out", "--format", "files")
    assert said.code == 0, said.err
    assert {p.name: p.read_bytes() for p in (folder / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (folder / "data").iterdir()
    }
    assert cli("show", "d").code == 0
    report = cli("verify", "d", "--repair", "--json")
    assert report.code == 0, report.out
    assert report.json["restored"] == 2 * len(keys)
    assert cli("verify", "d").code == 0


def test_what_other_datasets_share_stays(cli: Cli, folder: Path, pipeline: Write) -> None:
    """Two datasets and two versions share shards; what is removed takes only what was its own."""
    fill(folder, range(6))
    made(cli, pipeline)
    made(cli, pipeline, dataset="twin")
    fill(folder, range(FILES))
    made(cli, pipeline)
    only_in_second = 3 * (FILES - 6)
    everything = len(list((folder / "world").glob("*/shards/*/*")))
    assert everything == 3 * FILES

    assert cli("rm", "d@1", "--yes").code == 0
    assert cli("gc", "--grace", "0s").code == 0
    assert len(list((folder / "world").glob("*/shards/*/*"))) == everything, "the second version has them all"
    said = cli("rm", "d", "--yes", "--json")
    assert said.code == 0, said.err
    assert [r["version"] for r in said.json["removed"]] == [2]
    assert cli("show", "d").code == 2
    kept = cli("gc", "--json").json
    assert sum(s["deleted_objects"] for s in kept["stores"]) == 0, "the grace of an hour has not passed"
    assert len(list((folder / "world").glob("*/shards/*/*"))) == everything
    deleted = cli("gc", "--grace", "0s", "--json")
    assert deleted.code == 0, deleted.err
    assert len(list((folder / "world").glob("*/shards/*/*"))) == everything - only_in_second
    report = cli("verify", "twin", "--json")
    assert report.code == 0, report.out
    assert report.json["whole"] == report.json["replicas"]
    assert cli("export", "twin", "out", "--format", "files").code == 0
    assert len(list((folder / "out").iterdir())) == 6


def test_nothing_is_collected_under_a_living_run(cli: Cli, folder: Path, pipeline: Write, launch: Launch) -> None:
    fill(folder, range(FILES))
    made(cli, pipeline)
    (folder / "waits.py").write_text(
        "import pathlib, time\n"
        f"gate = pathlib.Path({str(folder / 'gate')!r})\n"
        "def f(batch):\n"
        "    while not gate.exists():\n"
        "        time.sleep(0.02)\n"
        "    return batch\n"
    )
    (folder / "data" / "text.txt").write_text("hello")
    sources = [{"url": "file://./data/text.txt", "format": "text"}]
    run = launch("run", pipeline("other.yaml", dataset="other", sources=sources, transforms=[{"python": "waits:f"}]))
    assert "run 2" in run.begun()
    assert cli("rm", "d", "--yes").code == 0, "marking deletes nothing"
    said = cli("gc", "--grace", "0s")
    assert said.code == 1
    assert "run 2" in said.err
    assert "millrace stop 2" in said.err
    assert len(list((folder / "world").glob("*/shards/*/*"))) == 3 * FILES
    (folder / "gate").touch()
    assert run.end().code == 0
    said = cli("gc", "--grace", "0s")
    assert said.code == 0, said.err
    assert cli("verify", "other").code == 0
    assert len(list((folder / "world").glob("*/shards/*/*"))) == 2


def test_what_an_unfinished_run_made_is_kept(cli: Cli, folder: Path, pipeline: Write, launch: Launch) -> None:
    """It may be taken up again: its shards are named by its ledger."""
    (folder / "slow.py").write_text("import time\ndef f(batch):\n    time.sleep(0.2)\n    return batch\n")
    for i in range(FILES):
        (folder / "data" / f"{i}.txt").write_text(str(i) * 4096)
    sources = [{"url": "file://./data", "include": ["*.txt"], "format": "text"}]
    name = pipeline(sources=sources, chunk=4096, transforms=[{"python": "slow:f"}])
    run = launch("run", name, "--workers", "1")
    run.until_tasks(4)
    run.kill(signal.SIGINT)
    assert run.end().code == 130
    for _ in range(2):
        said = cli("gc", "--grace", "0s")
        assert said.code == 0, said.err
    assert len(shards(folder)) >= 4
    said = cli("run", name, "--json")
    assert said.code == 0, said.err
    assert said.json["run"] == 1
    assert cli("verify", "d").code == 0
    before = {str(p) for p in (folder / "world").rglob("*") if p.is_file()}
    for _ in range(2):
        assert cli("gc", "--grace", "0s").code == 0
    gone = before - {str(p) for p in (folder / "world").rglob("*") if p.is_file()}
    assert len(gone) <= 4, "at most what was in flight when it was stopped"
    assert cli("verify", "d").code == 0
