"""Every bad spec is answered with ``file:line: field: what is wrong``, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
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


PIPELINE_ERRORS = [
    Bad("unknown key", "dataset: stdlib", "dataset: stdlib\nshard: {size: 1MB}", "f.yaml:2: shard: unknown key; did you mean 'shards'?"),
    Bad("unknown key, nothing like it", "dataset: stdlib", "dataset: stdlib\nxyzzy: 1", "f.yaml:2: xyzzy: unknown key"),
    Bad("unknown nested key", "  replicas: 3", "  replica: 3", "f.yaml:20: placement.replica: unknown key; did you mean 'replicas'?"),
    Bad("a key of another place", "    format: text", "    format: text\n    timeout: 5s", "f.yaml:6: sources.0.timeout: this key does not belong here"),
    Bad("two transforms in one", "    timeout: 90s", "    dedup: [path]", "f.yaml:8: transforms.0.dedup: this key does not belong here"),
    Bad("unknown key of a transform", "    timeout: 90s", "    timout: 90s", "f.yaml:8: transforms.0.timout: unknown key; did you mean 'timeout'?"),
    Bad("unknown key in validate", "      required: [text]", "      require: [text]", "f.yaml:11: transforms.2.validate.require: unknown key; did you mean 'required'?"),
    Bad("wrong unit", "64MB", "64Mbit", "f.yaml:18: shards.size: '64Mbit' has an unknown unit 'mbit'; sizes are in B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"),
    Bad("no unit of time", "90s", "90 sec", "f.yaml:8: transforms.0.timeout: '90 sec' has an unknown unit 'sec'; durations are in ms, s, m, h or d"),
    Bad("no time at all", "90s", "0s", "f.yaml:8: transforms.0.timeout: input should be greater than 0, found '0s'"),
    Bad("share over all", "0.1%", "110%", "f.yaml:23: quarantine.limit: '110%' is more than everything; a share lies between 0% and 100%"),
    Bad("duplicate key", "dataset: stdlib", "dataset: stdlib\ndataset: other", "f.yaml:2: dataset: the key is given twice"),
    Bad("duplicate key deep down", "      unique: [path]", "      unique: [path]\n      required: [path]", "f.yaml:13: transforms.2.validate.required: the key is given twice"),
    Bad("missing", "    format: text\n", "", "f.yaml:3: sources.0.format: is required"),
    Bad("missing in a transform", "      tokenizer: bytes\n", "", "f.yaml:14: transforms.4.tokenize.tokenizer: is required"),
    Bad("missing at the top", "dataset: stdlib\n", "", "f.yaml:1: dataset: is required"),
    Bad("a word for a number", "replicas: 3", "replicas: three", "f.yaml:20: placement.replicas: input should be a valid integer, found 'three'"),
    Bad("yes is not 1", "replicas: 3", "replicas: yes", "f.yaml:20: placement.replicas: input should be a valid integer, found True"),
    Bad("too many", "replicas: 3", "replicas: 17", "f.yaml:20: placement.replicas: input should be less than or equal to 16, found 17"),
    Bad("a word for a list", 'include: ["**/*.py"]', 'include: "**/*.py"', "f.yaml:4: sources.0.include: input should be a list, found '**/*.py'"),
    Bad("a mapping for a list", "allow: [us, eu]", "allow: {us: eu}", "f.yaml:22: placement.allow: input should be a list, found a mapping"),
    Bad("a list for a mapping", "shards: {size: 64MB, block_rows: 1024, compression: none}", "shards: [64MB]", "f.yaml:18: shards: input should be a mapping or instance of Shards, found a list"),
    Bad("nothing for a mapping", "quarantine: {limit: 0.1%}", "quarantine:", "f.yaml:23: quarantine: input should be a mapping or instance of Quarantine, found nothing"),
    Bad("unknown format", "format: text", "format: txt", "f.yaml:5: sources.0.format: input should be 'text', 'lines', 'jsonl', 'csv', 'parquet', 'arrow', 'webdataset', 'mds' or 'files', found 'txt'"),
    Bad("unknown transform", '  - python: "mypackage.clean:normalise"', "  - pyton: x", "f.yaml:9: transforms.1: a transform is one of sql, python, validate, tokenize or dedup"),
    Bad("a transform that is a word", '  - python: "mypackage.clean:normalise"', "  - dedup", "f.yaml:9: transforms.1: a transform is one of sql, python, validate, tokenize or dedup"),
    Bad("no module", "mypackage.clean:normalise", "mypackage.clean", "f.yaml:9: transforms.1.python: string should match pattern '^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$', found 'mypackage.clean'"),
    Bad("nothing to validate", "      required: [text]\n      unique: [path]\n", "      required: []\n", "f.yaml:10: transforms.2.validate: nothing to validate; give 'required', 'unique' or 'rules'"),
    Bad("dedup by nothing", "dedup: [text]", "dedup: []", "f.yaml:13: transforms.3.dedup: tuple should have at least 1 item after validation, not 0, found a list"),
    Bad("tokenize not last", "  - dedup: [text]\n", "  - tokenize: {column: text, tokenizer: bytes, pack: 8}\n", "f.yaml:13: transforms.3.tokenize: tokenize must be the last transform"),
    Bad("placement against itself", "min_clouds: 2", "min_clouds: 4", "f.yaml:21: placement.min_clouds: 4 clouds can't be reached with 3 replicas; set replicas to at least min_clouds, or min_clouds lower"),
    Bad("placement against a default", "  replicas: 3\n  min_clouds: 2\n", "  replicas: 1\n", "f.yaml:20: placement.replicas: 2 clouds can't be reached with 1 replica; set replicas to at least min_clouds, or min_clouds lower"),
    Bad("files mixed with records", "transforms:\n", "  - {url: s3://b, format: files}\ntransforms:\n", "f.yaml:6: sources.1.format: 'files' sources are opaque bytes and can't be mixed with sources of records in one dataset"),
    Bad("files with transforms", "format: text", "format: files", "f.yaml:6: transforms: 'files' sources are opaque bytes; transforms need records"),
    Bad("columns of parquet", "format: text", "format: parquet\n    columns: {a: string}", "f.yaml:6: sources.0.columns: 'columns' is for csv and jsonl; parquet carries its own types"),
    Bad("unknown column type", "format: text", "format: csv\n    columns: {a: float}", "f.yaml:6: sources.0.columns.a: input should be 'string', 'int64', 'double', 'bool', 'json', 'timestamp' or 'binary', found 'float'"),
    Bad("not a URL", "url: file:///usr/lib/python3", "url: /usr/lib/python3", "f.yaml:3: sources.0.url: '/usr/lib/python3' is not a URL; write file://./folder, s3://bucket/prefix and the like"),
    Bad("secret in a URL", "url: file:///usr/lib/python3", "url: s3://me:hunter2@bucket", "f.yaml:3: sources.0.url: the URL carries credentials; keep secrets in the environment or the cloud's credential chain"),
    Bad("number as a name", "dataset: stdlib", "dataset: 123", "f.yaml:1: dataset: 123 is not text and so not a name; put it in quotes if it is meant to be one"),
    Bad("Norway", "dataset: stdlib", "dataset: no", "f.yaml:1: dataset: False is not text and so not a name; put it in quotes if it is meant to be one"),
    Bad("Norway in a list", "allow: [us, eu]", "allow: [us, no]", "f.yaml:22: placement.allow.1: False is not text and so not a name; put it in quotes if it is meant to be one"),
    Bad("null as a name", "dataset: stdlib", "dataset: null", "f.yaml:1: dataset: None is not text and so not a name; put it in quotes if it is meant to be one"),
    Bad("name with a slash", "dataset: stdlib", "dataset: a/b", "f.yaml:1: dataset: 'a/b' is not a name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"),
    Bad("name too long", "dataset: stdlib", f"dataset: {'a' * 64}", f"f.yaml:1: dataset: '{'a' * 64}' is not a name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"),
    Bad("a column that is a number", "column: text", "column: 5", "f.yaml:15: transforms.4.tokenize.column: input should be a valid string, found 5"),
    Bad("no sources", '  - url: file:///usr/lib/python3\n    include: ["**/*.py"]\n    format: text\n', "  []\n", "f.yaml:2: sources: tuple should have at least 1 item after validation, not 0, found a list"),
    Bad("a date that is none", "column: text", "column: 2020-99-99", "f.yaml:15: transforms.4.tokenize.column: '2020-99-99' can't be read (month must be in 1..12); put text in quotes"),
    Bad("a tag", "column: text", "column: !!python/object:os.system x", "f.yaml:15: this is not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'"),
    Bad("a tab", "  replicas: 3", "\treplicas: 3", "f.yaml:20: this is not YAML: found character '\\t' that cannot start any token"),
    Bad("an open bracket", "allow: [us, eu]", "allow: [us, eu", "f.yaml:23: this is not YAML: expected ',' or ']', but got ':'"),
    Bad("an unknown alias", "column: text", "column: *text", "f.yaml:15: this is not YAML: found undefined alias 'text'"),
    Bad("a key that is a list", "dataset: stdlib", "? [a, b]\n: c\ndataset: stdlib", "f.yaml:1: file: a key is a word, not a list or a mapping"),
    Bad("a merge key", "dataset: stdlib", "dataset: stdlib\n<<: {attempts: 2}", "f.yaml:2: <<: unknown key"),
    Bad("two documents", "dataset: stdlib", "dataset: stdlib\n---\na: b", "f.yaml:2: this is not YAML: but found another document"),
]  # fmt: skip

WORLD_ERRORS = [
    Bad("store twice", "          gcp-main:", "          aws-main:", "f.yaml:14: clouds.gcp.regions.europe-west4.stores.aws-main: store 'aws-main' is in aws/us-east-1 and in gcp/europe-west4; store names are unique"),
    Bad("same url twice", "url: file://./world/gcp", "url: file://./world/aws", "f.yaml:15: clouds.gcp.regions.europe-west4.stores.gcp-main.url: stores 'aws-main' and 'gcp-main' have the same url; that would be one copy, not two"),
    Bad("same url, spelled otherwise", "url: file://./world/gcp", "url: file://world//aws/", "f.yaml:15: clouds.gcp.regions.europe-west4.stores.gcp-main.url: stores 'aws-main' and 'gcp-main' have the same url; that would be one copy, not two"),
    Bad("secret option", 'endpoint: "http://localhost:9000"', "aws_secret_access_key: hunter2", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.options: 'aws_secret_access_key' looks like a secret; keep secrets in the environment or the cloud's credential chain"),
    Bad("secret in a query", "s3://bucket/prefix", "https://x.blob.core.windows.net/c?sv=2020&sas=hunter2", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.url: the URL carries credentials; keep secrets in the environment or the cloud's credential chain"),
    Bad("secret as a user", "s3://bucket/prefix", "s3://hunter2@bucket/prefix", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.url: the URL carries credentials; keep secrets in the environment or the cloud's credential chain"),
    Bad("Norway's law", "jurisdiction: eu", "jurisdiction: no", "f.yaml:12: clouds.gcp.regions.europe-west4.jurisdiction: False is not text and so not a name; put it in quotes if it is meant to be one"),
    Bad("weight of nothing", "weight: 0.5", "weight: 0", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.weight: input should be greater than 0, found 0"),
    Bad("weight without bound", "weight: 0.5", "weight: .inf", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.weight: input should be less than or equal to 1000, found inf"),
    Bad("weight that is no number", "weight: 0.5", "weight: .nan", "f.yaml:8: clouds.aws.regions.us-east-1.stores.aws-cold.weight: input should be greater than 0, found nan"),
    Bad("here is nowhere", "here: aws/us-east-1", "here: aws/us-west-2", "f.yaml:16: here: 'aws/us-west-2' is not a site of this world; there are aws/us-east-1, gcp/europe-west4"),
    Bad("a name in capitals", "          gcp-main:", "          GCP-main:", "f.yaml:14: clouds.gcp.regions.europe-west4.stores.GCP-main: 'GCP-main' is not a name; use 1 to 63 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"),
    Bad("a store that is a URL", "            url: file://./world/gcp", "            file://./world/gcp", "f.yaml:14: clouds.gcp.regions.europe-west4.stores.gcp-main: input should be a mapping or instance of StoreSpec, found 'file://./world/gcp'"),
]  # fmt: skip


@pytest.mark.parametrize("bad", PIPELINE_ERRORS, ids=lambda bad: bad.name)
def test_a_bad_pipeline_is_answered_with_file_line_and_field(bad: Bad) -> None:
    assert refusal(Pipeline, changed(PIPELINE, bad)) == bad.message


@pytest.mark.parametrize("bad", WORLD_ERRORS, ids=lambda bad: bad.name)
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
    assert refusal(World, "clouds: {}") == (
        "f.yaml:1: clouds: mapping should have at least 1 item after validation, not 0, found a mapping"
    )


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
    text = 'dataset: a\nsources:\n  - {url: "s3://one", format: csv, columns: &t {id: int65}}\n  - {url: "s3://two", format: csv, columns: *t}\n'
    fields = [line.split(": ")[:2] for line in refusal(Pipeline, text).splitlines()]
    assert fields == [["f.yaml:3", "sources.0.columns.id"], ["f.yaml:3", "sources.1.columns.id"]]


def test_a_billion_laughs_are_refused() -> None:
    bomb = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    bomb += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    message = refusal(Pipeline, "\n".join(bomb))
    assert re.fullmatch(r"f\.yaml:\d+: a\d\S*: there are too many values; an alias \(\*name\) may repeat them", message)


def test_an_alias_inside_of_itself_is_refused() -> None:
    message = refusal(Pipeline, "dataset: a\nsources: &s\n  - *s\n")
    assert message == (
        "f.yaml:3: sources.0.0: values are nested more than 50 deep; an alias (*name) may repeat them"
    )


def test_endless_nesting_is_refused() -> None:
    assert "nested" in refusal(Pipeline, "sources: " + "[" * 20_000)
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
    except SpecError as error:
        assert all(line.startswith("f.yaml") for line in str(error).splitlines()[:1])


@given(st.integers(0, len(PIPELINE) - 1), st.sampled_from(list("\n\t :-[]{}&*!|>'\"%@`#,?x0")))
def test_any_slip_of_the_keyboard_is_taken_or_answered_with_a_line(at: int, key: str) -> None:
    try:
        parse_spec(Pipeline, PIPELINE[:at] + key + PIPELINE[at + 1 :], file="f.yaml")
    except SpecError as error:
        assert re.match(r"f\.yaml:\d+: ", str(error))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(list(Pipeline.model_fields)),
)
def test_any_value_in_any_field_is_taken_or_answered(value: object, field: str) -> None:
    import yaml

    document = {"dataset": "a", "sources": [{"url": "s3://b", "format": "text"}], field: value}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    try:
        parse_spec(Pipeline, text, file="f.yaml")
    except SpecError as error:
        assert str(error).startswith("f.yaml")
