"""Same data, same digest: whatever the workers, their order, the world and the place of the corpus."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]

WORLDS = {
    "other-names": {
        "z": {"r": {"jurisdiction": "jp", "stores": {"one": {"url": "file://./w1/1"}, "two": {"url": "file://./w1/2"}}}}
    },
    "other-order": {
        "ibm": {"us-south": {"jurisdiction": "us", "stores": {"ibm-main": {"url": "file://./w2/ibm"}}}},
        "aws": {"us-east-1": {"jurisdiction": "us", "stores": {"aws-main": {"url": "file://./w2/aws", "weight": 5.0}}}},
    },
    "one-store": {"only": {"r": {"jurisdiction": "eu", "stores": {"s": {"url": "file://./w3/s"}}}}},
}
PLACEMENTS = {
    "other-names": {"replicas": 2, "min_clouds": 1},
    "other-order": {"replicas": 2, "min_clouds": 2},
    "one-store": {"replicas": 1, "min_clouds": 1},
}
TRANSFORMS: list[dict[str, Any]] = [
    {"python": "clean:upper"},
    {"sql": "SELECT path, text, length(text) % 37 AS n FROM records WHERE length(text) > 30"},
    {"dedup": ["text"]},
    {"validate": {"required": ["text"], "unique": ["n"], "rules": ["n < 36"]}},
    {"tokenize": {"column": "text", "tokenizer": "bytes", "pack": 64}},
]


@pytest.fixture
def corpus(folder: Path) -> Path:
    """60 small files in three folders: 44 texts, and 16 that equal one of them but for the case."""
    for i in range(60):
        what = i if i < 44 else (i * 7) % 44
        words = f"file {what} of this corpus " + "lorem ipsum dolor " * (what % 11 * 8) + "x" * what
        place = folder / "data" / f"part {i % 3}"
        place.mkdir(exist_ok=True)
        (place / f"{i:02}.txt").write_text(words.upper() if i % 2 else words)
    (folder / "clean.py").write_text(
        "import pyarrow as pa, pyarrow.compute as pc\n"
        "def upper(batch):\n"
        "    at = batch.schema.get_field_index('text')\n"
        "    return batch.set_column(at, 'text', pc.utf8_upper(batch.column(at)))\n"
    )
    return folder / "data"


def world(folder: Path, name: str) -> str:
    clouds = {cloud: {"regions": regions} for cloud, regions in WORLDS[name].items()}
    (folder / f"{name}.yaml").write_text(json.dumps({"clouds": clouds, "state": f"./.state-{name}"}))
    return f"{name}.yaml"


def moved(corpus: Path, folder: Path) -> Path:
    """The same files elsewhere, written in another order, with other times and modes."""
    there = folder / "else where" / "corpus"
    for file in sorted(corpus.rglob("*.txt"), reverse=True):
        copy = there / file.relative_to(corpus)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        os.utime(copy, (1_000_000_000, 1_000_000_000 + len(file.name)))
        copy.chmod(0o600)
    return there


def outcome(said: Any) -> tuple[str, int, int, int, int]:
    assert said.code == 0, said.err
    report = said.json
    assert not report["unchanged"]
    return report["digest"], report["rows"], report["shards"], report["duplicates"], report["quarantined"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_digest_with_transforms(cli: Cli, folder: Path, pipeline: Write, corpus: Path) -> None:
    """Every run makes a dataset of its own, so that none only finds what another left."""
    common: dict[str, Any] = {
        "transforms": TRANSFORMS,
        "chunk": 4096,
        "shards": {"size": 2048, "block_rows": 4},
        "quarantine": {"limit": "90%"},
    }
    here = cli("run", pipeline(dataset="a", **common), "--workers", "1", "--json")
    first = outcome(here)
    digest, rows, shards, duplicates, quarantined = first
    assert here.json["chunks"] > 3
    assert rows > 50
    assert shards > 3
    assert duplicates == 15, "16 of them, one too short"
    assert 0 < quarantined < 44

    assert outcome(cli("run", pipeline(dataset="b", **common), "--workers", "2", "--json")) == first
    assert outcome(cli("run", pipeline(dataset="c", **common), "--workers", "4", "--chunk-order", "3", "--json")) == (
        first
    )
    assert outcome(cli("run", pipeline(dataset="d", **common), "--workers", "2", "--chunk-order", "4", "--json")) == (
        first
    )
    for name in WORLDS:
        there = pipeline(**common, placement=PLACEMENTS[name])
        args = ("--world", world(folder, name), "--workers", "2", "--chunk-order", "5", "--json")
        assert outcome(cli("run", there, *args)) == first

    new = moved(corpus, folder).relative_to(folder)
    elsewhere = pipeline(dataset="e", **common, sources=[{"url": f"file://./{new}", "format": "text"}])
    assert outcome(cli("run", elsewhere, "--workers", "2", "--json")) == first

    changed = [*TRANSFORMS[:-1], {"tokenize": {"column": "text", "tokenizer": "bytes", "pack": 65}}]
    said = cli("run", pipeline(dataset="f", **{**common, "transforms": changed}), "--workers", "2", "--json")
    assert outcome(said)[0] != digest


@pytest.mark.parametrize("format", ["text", "lines", "files"])
def test_one_digest_without_transforms(cli: Cli, folder: Path, pipeline: Write, corpus: Path, format: str) -> None:
    """Without transforms tasks are threads of one process."""
    common: dict[str, Any] = {"chunk": 4096, "shards": {"size": 2048, "block_rows": 4}}
    sources = [{"url": "file://./data", "format": format}]
    first = outcome(cli("run", pipeline(dataset="a", sources=sources, **common), "--workers", "1", "--json"))
    for workers, seed in ((1, 1), (2, 2), (4, 3), (16, 4)):
        name = pipeline(dataset=f"d{seed}", sources=sources, **common)
        args = ("--workers", str(workers), "--chunk-order", str(seed), "--json")
        assert outcome(cli("run", name, *args)) == first
    for name in WORLDS:
        there = pipeline(**common, sources=sources, placement=PLACEMENTS[name])
        assert outcome(cli("run", there, "--world", world(folder, name), "--chunk-order", "5", "--json")) == first
    new = moved(corpus, folder).relative_to(folder)
    elsewhere = pipeline(dataset="e", **common, sources=[{"url": f"file://./{new}", "format": format}])
    assert outcome(cli("run", elsewhere, "--json")) == first
    for change in ({"chunk": 8192}, {"shards": {"size": 2048, "block_rows": 5}}):
        name = pipeline(dataset="f", sources=sources, **{**common, **change})
        assert outcome(cli("run", name, "--fresh", "--json"))[0] != first[0]


def test_a_changed_corpus_is_another_version(cli: Cli, pipeline: Write, corpus: Path) -> None:
    name = pipeline()
    before = outcome(cli("run", name, "--json"))
    assert cli("run", name, "--json").json["unchanged"], "the same bytes are the same version"
    (corpus / "part 1" / "01.txt").write_text("other words")
    after = cli("run", name, "--json").json
    assert (after["version"], after["unchanged"]) == (2, False)
    assert after["digest"] != before[0]
