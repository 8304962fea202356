"""Every bad spec is answered with ``file:line: field: what is wrong``, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from millrace.core.errors import SpecError
from millrace.core.spec import Pipeline, PythonTransform, SqlTransform, Tokenize, Validate, World
from millrace.core.specfile import parse_spec

WORLD = """\
clouds:
  aws:
    regions:
      us-east-1:
        jurisdiction: us
        stores:
          aws-main: {url: "file://./world/aws"}
          aws-cold: {url: "s3://bucket/prefix", weight: 0.5, options: {endpoint: "http://localhost:9000"}}
  gcp:
    regions:
      europe-west4:
        jurisdiction: eu
        stores:
          gcp-main:
            url: file://./world/gcp
here: aws/us-east-1
"""
PIPELINE = """\
dataset: stdlib
sources:
  - url: file:///usr/lib/python3
    include: ["**/*.py"]
    format: text
transforms:
  - sql: "SELECT path, text FROM records"
    timeout: 90s
  - python: "mypackage.clean:normalise"
  - validate:
      required: [text]
      unique: [path]
  - dedup: [text]
  - tokenize:
      column: text
      tokenizer: bytes
      pack: 2048
shards: {size: 64MB, block_rows: 1024, compression: none}
placement:
  replicas: 3
  min_clouds: 2
  allow: [us, eu]
quarantine: {limit: 0.1%}
"""


@dataclass(frozen=True)
class Bad:
    """A change to a good file, and the message it must lead to."""

    name: str
    old: str
    new: str
    message: str


def refusal(model: type[BaseModel], text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(model, text, file="f.yaml")
    return str(caught.value)


def changed(text: str, bad: Bad) -> str:
    assert text.count(bad.old) == 1, bad.old
    return text.replace(bad.old, bad.new)


def cases(name: str) -> list[Bad]:
    """The table of changes and answers in the text file ``name``: ``=== name``, ``-old``, ``+new``, ``? message``."""
    found = []
    for block in (Path(__file__).parent / name).read_text().split("\n=== ")[1:]:
        title, *lines = block.splitlines()
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line.startswith(sign)) for sign in "-+")
        found.append(Bad(title, old, new, next(line[2:] for line in lines if line.startswith("? "))))
    return found


def test_good_files_are_read_as_they_say() -> None:
    world = parse_spec(World, WORLD, file="world.yaml")
    assert [(s.name, s.cloud, s.region, s.jurisdiction, s.weight) for s in world.sites()] == [
        ("aws-main", "aws", "us-east-1", "us", 1.0),
        ("aws-cold", "aws", "us-east-1", "us", 0.5),
        ("gcp-main", "gcp", "europe-west4", "eu", 1.0),
    ]
    assert list(world.stores()) == ["aws-main", "aws-cold", "gcp-main"]
    pipeline = parse_spec(Pipeline, PIPELINE, file="pipeline.yaml")
    kinds = [type(t) for t in pipeline.transforms]
    assert kinds[:3] == [SqlTransform, PythonTransform, Validate]
    assert kinds[4] is Tokenize
    assert pipeline.transforms[0].model_dump() == {"sql": "SELECT path, text FROM records", "timeout": 90.0}
    assert (pipeline.shards.size, pipeline.quarantine.limit, pipeline.chunk) == (64_000_000, 0.001, 100_000_000)
    assert parse_spec(Pipeline, "{dataset: a, sources: [{url: 's3://b', format: files}]}", file="p").attempts == 3


@pytest.mark.parametrize("bad", cases("bad_pipelines.txt"), ids=lambda bad: bad.name)
def test_a_bad_pipeline_is_answered_with_file_line_and_field(bad: Bad) -> None:
    assert refusal(Pipeline, changed(PIPELINE, bad)) == bad.message


@pytest.mark.parametrize("bad", cases("bad_worlds.txt"), ids=lambda bad: bad.name)
def test_a_bad_world_is_answered_with_file_line_and_field(bad: Bad) -> None:
    message = refusal(World, changed(WORLD, bad))
    assert message == bad.message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1: expected keys such as dataset, sources, transforms, found nothing"),
        ("# nothing but a comment\n", "f.yaml:1: expected keys such as dataset, sources, transforms, found nothing"),
        ("- a\n- b\n", "f.yaml:1: expected keys such as dataset, sources, transforms, found a list"),
        ("just words", "f.yaml:1: expected keys such as dataset, sources, transforms, found 'just words'"),
        ("42", "f.yaml:1: expected keys such as dataset, sources, transforms, found 42"),
        ("a: b: c", "f.yaml:1: this is not YAML: mapping values are not allowed here"),
    ],
)
def test_a_file_that_holds_no_spec(text: str, message: str) -> None:
    assert refusal(Pipeline, text) == message


def test_control_characters_are_refused() -> None:
    assert refusal(Pipeline, "dataset: a\x00b").startswith("f.yaml: this is not YAML: ")


def test_no_store_in_the_world() -> None:
    text = "state: x\nclouds: {aws: {regions: {a: {jurisdiction: us}}}}"
    assert refusal(World, text) == (
        "f.yaml:2: clouds: there is no store in this world; add one under a region's 'stores'"
    )
    assert refusal(World, "clouds: {}") == ("f.yaml:1: clouds: give at least 1")


def test_every_problem_is_told_at_once_each_on_its_own_line() -> None:
    text = PIPELINE.replace("replicas: 3", "replicas: x").replace("64MB", "64").replace("format: text", "fromat: text")
    lines = refusal(Pipeline, text).splitlines()
    assert [re.split(r": ", line)[:2] for line in lines] == [
        ["f.yaml:3", "sources.0.format"],
        ["f.yaml:5", "sources.0.fromat"],
        ["f.yaml:18", "shards.size"],
        ["f.yaml:20", "placement.replicas"],
    ]


# --- anchors, aliases, and what can be made of them -----------------------------------------------------


def test_anchors_and_aliases_may_save_typing() -> None:
    text = """\
dataset: a
sources:
  - {url: "s3://one", format: csv, columns: &types {id: int64, text: string}}
  - {url: "s3://two", format: csv, columns: *types}
"""
    pipeline = parse_spec(Pipeline, text, file="f.yaml")
    assert pipeline.sources[0].columns == pipeline.sources[1].columns == {"id": "int64", "text": "string"}


def test_an_error_behind_an_alias_points_at_what_was_written() -> None:
    text = """\
dataset: a
sources:
  - {url: "s3://one", format: csv, columns: &t {id: int65}}
  - {url: "s3://two", format: csv, columns: *t}
"""
    fields = [line.split(": ")[:2] for line in refusal(Pipeline, text).splitlines()]
    assert fields == [["f.yaml:3", "sources.0.columns.id"], ["f.yaml:3", "sources.1.columns.id"]]


def test_a_billion_laughs_are_refused() -> None:
    bomb = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    message = refusal(Pipeline, "\n".join(bomb))
    assert re.fullmatch(r"f\.yaml:\d+: a\d\S*: there are too many values; an alias \(\*name\) may repeat them", message)


def test_an_alias_inside_of_itself_is_refused() -> None:
    message = refusal(Pipeline, "dataset: a\nsources: &s\n  - *s\n")
    assert message == ("f.yaml:2: sources.0.0: values are nested more than 50 deep; an alias (*name) may repeat them")


def test_endless_nesting_is_refused() -> None:
    assert "nested" in refusal(Pipeline, "sources: " + "[" * 100_000)
    assert "nested" in refusal(Pipeline, "a: " + "[" * 60 + "]" * 60)


def test_a_file_too_large_to_be_a_spec_is_refused() -> None:
    assert refusal(Pipeline, "#" * 5_000_000) == (
        "f.yaml: 5000000 characters are more than a spec can need; is it the right file?"
    )


# --- laws ---------------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_any_text_is_a_spec_or_a_spec_error_that_names_the_file(text: str) -> None:
    try:
        parse_spec(Pipeline, text, file="f.yaml")
        message = "f.yaml"
    except SpecError as error:
        message = str(error)
    assert message.startswith("f.yaml")


@given(st.integers(0, len(PIPELINE) - 1), st.sampled_from(list("\n\t :-[]{}&*!|>'\"%@`#,?x0")))
def test_any_slip_of_the_keyboard_is_taken_or_answered_with_a_line(at: int, key: str) -> None:
    try:
        parse_spec(Pipeline, PIPELINE[:at] + key + PIPELINE[at + 1 :], file="f.yaml")
        message = "f.yaml:1: "
    except SpecError as error:
        message = str(error)
    assert re.match(r"f\.yaml:\d+: ", message)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(list(Pipeline.model_fields)),
)
def test_any_value_in_any_field_is_taken_or_answered(value: object, field: str) -> None:
    document = {"dataset": "a", "sources": [{"url": "s3://b", "format": "text"}], field: value}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    try:
        parse_spec(Pipeline, text, file="f.yaml")
        message = "f.yaml"
    except SpecError as error:
        message = str(error)
    assert message.startswith("f.yaml")
