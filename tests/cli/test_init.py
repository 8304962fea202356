"""init and schema: what they write works as it stands, and editors can check it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml

from millrace.cli.init import PIPELINE_YAML, WORLD_YAML, write_example
from millrace.cli.schema import SpecKind, field_texts, json_schema, schema_text
from millrace.core.errors import SpecError, UsageError
from millrace.core.spec import Pipeline, Placement, World
from millrace.core.specfile import parse_spec

ROOT = Path(__file__).resolve().parents[2]
MILLRACE = (sys.executable, "-m", "millrace")


def _run(args: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MILLRACE, *args], cwd=cwd, capture_output=True, text=True)


def _check(kind: SpecKind, text: str) -> None:
    jsonschema.Draft202012Validator(json_schema(kind)).validate(yaml.safe_load(text))


def test_what_init_writes_runs_as_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "a new folder"
    made = _run(["init", str(folder)], tmp_path)
    assert made.returncode == 0, made.stderr
    assert f"cd '{folder}'" in made.stdout
    planned = _run(["plan", "pipeline.yaml", "--json"], folder)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["objects"] == 5
    ran = _run(["run", "pipeline.yaml", "--json", "--workers", "1"], folder)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["dataset"], report["version"], report["rows"]) == ("example", 1, 3)
    assert (report["duplicates"], report["quarantined"]) == (1, 0)
    assert sum(1 for _ in (folder / "world").rglob("shards/*/*.arrow")) == 3


def test_init_does_not_write_over(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("mine")
    refused = _run(["init"], tmp_path)
    assert refused.returncode == 2
    assert "pipeline.yaml is there already" in refused.stderr
    assert "--force" in refused.stderr
    assert (tmp_path / "pipeline.yaml").read_text() == "mine"
    assert not (tmp_path / "world.yaml").exists()
    forced = _run(["init", "--force", "--json"], tmp_path)
    assert forced.returncode == 0, forced.stderr
    assert "pipeline.yaml" in json.loads(forced.stdout)["written"]
    assert (tmp_path / "pipeline.yaml").read_text() == PIPELINE_YAML


def test_both_files_are_named_when_both_are_there(tmp_path: Path) -> None:
    write_example(tmp_path)
    with pytest.raises(UsageError, match=r"world\.yaml and .*pipeline\.yaml are there already"):
        write_example(tmp_path)


def test_data_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    written = write_example(tmp_path, force=True)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["mine.txt"]
    assert not any(name.startswith("data/") for name in written)


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="can't be written to"):
        write_example(tmp_path / "file")


def test_the_first_line_names_a_schema_that_is_there(tmp_path: Path) -> None:
    write_example(tmp_path)
    for kind in SpecKind:
        first = (tmp_path / f"{kind.value}.yaml").read_text().splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        named = tmp_path / first.partition("$schema=")[2]
        assert named.read_text() == schema_text(kind)


def test_the_templates_are_valid() -> None:
    assert len(parse_spec(World, WORLD_YAML, file="world.yaml").stores()) == 4
    assert parse_spec(Pipeline, PIPELINE_YAML, file="pipeline.yaml").dataset == "example"
    _check(SpecKind.WORLD, WORLD_YAML)
    _check(SpecKind.PIPELINE, PIPELINE_YAML)


@pytest.mark.parametrize("kind", list(SpecKind))
def test_the_published_schema_is_what_the_code_makes(kind: SpecKind) -> None:
    published = ROOT / "docs" / "schema" / f"{kind.value}.json"
    assert published.read_text(encoding="utf-8") == schema_text(kind), "publish it with: make schema"
    jsonschema.Draft202012Validator.check_schema(json_schema(kind))


@pytest.mark.parametrize("kind", list(SpecKind))
def test_schema_prints_it(kind: SpecKind, tmp_path: Path) -> None:
    printed = _run(["schema", kind.value], tmp_path)
    assert (printed.returncode, printed.stdout) == (0, schema_text(kind))


def test_schema_of_something_else_is_refused(tmp_path: Path) -> None:
    assert _run(["schema", "moon"], tmp_path).returncode == 2


@pytest.mark.parametrize(
    "change",
    [
        {"replica": 3},
        {"shards": {"block_rows": "many"}},
        {"sources": []},
        {"sources": [{"url": "file://./x", "format": "word"}]},
        {"transforms": [{"squeal": "SELECT 1"}]},
        {"placement": {"replicas": 0}},
    ],
)
def test_the_schema_refuses_what_the_spec_refuses(change: dict[str, Any]) -> None:
    spec = yaml.safe_load(PIPELINE_YAML) | change
    with pytest.raises(SpecError):
        parse_spec(Pipeline, yaml.safe_dump(spec), file="pipeline.yaml")
    with pytest.raises(jsonschema.ValidationError):
        _check(SpecKind.PIPELINE, yaml.safe_dump(spec))


def test_every_field_of_a_schema_says_what_it_is() -> None:
    silent = []
    for kind in SpecKind:
        schema = json_schema(kind)
        for part in (schema, *schema["$defs"].values()):
            if len(part["properties"]) < 2:
                continue  # a transform's own word: its model says it
            silent += [
                f"{part['title']}.{name}"
                for name, field in part["properties"].items()
                if "description" not in field and "$ref" not in str(field)
            ]
    assert [s for s in silent if not s.endswith((".timeout", "Transform.sql", "Transform.python"))] == []


def test_field_texts_join_continued_lines() -> None:
    texts = field_texts(Placement)
    assert texts["replicas"] == "How many copies of each shard, each in another store."
    assert set(texts) == set(Placement.model_fields)
