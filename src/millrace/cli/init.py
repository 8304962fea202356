"""init: a world file and a pipeline file to begin with, and a little data, so that they work as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from millrace.cli.app import app, perform
from millrace.cli.options import JsonOption
from millrace.cli.output import Output
from millrace.cli.schema import SpecKind, schema_text
from millrace.core.errors import UsageError

__all__ = ["PIPELINE_YAML", "WORLD_YAML", "write_example"]

WORLD_YAML: Final = """\
# yaml-language-server: $schema=.millrace/schema/world.json
# world.yaml: where things are. Paths are relative to this file.
# Here each "cloud" is a folder; put s3://bucket/prefix, gs://... or az://... in its place when you have one.
clouds:
  aws:
    regions:
      us-east-1:
        jurisdiction: us            # whose law holds there: what placement.allow in a pipeline speaks of
        stores:
          aws-main: {url: "file://./world/aws"}
  gcp:
    regions:
      us-central1:
        jurisdiction: us
        stores:
          gcp-main: {url: "file://./world/gcp"}
  azure:
    regions:
      westeurope:
        jurisdiction: eu
        stores:
          az-main: {url: "file://./world/azure"}
  ibm:
    regions:
      us-south:
        jurisdiction: us
        stores:
          ibm-main: {url: "file://./world/ibm"}

# here: aws/us-east-1               # the site this machine is in: one replica of each shard stays in its cloud
# state: ./.millrace                # runs, versions and leases are kept here
"""

PIPELINE_YAML: Final = """\
# yaml-language-server: $schema=.millrace/schema/pipeline.json
# pipeline.yaml: what should happen. Paths are relative to this file.
dataset: example                    # each run that makes something new makes a version: example@1, example@2 ...

sources:
  - url: "file://./data"            # a folder, a prefix of a bucket, or one object
    include: ["**/*.txt"]           # no include means everything; ** crosses folders
    format: text                    # or lines, jsonl, csv, parquet, arrow, webdataset, mds, files

transforms:                         # in this order; leave them out to keep records as they are
  - sql: "SELECT path, trim(text) AS text FROM records WHERE length(text) > 20"
  - validate: {required: [text], rules: ["length(text) < 1000000"]}
  - dedup: [text]                   # of records with the same text, the first stays
  # - python: "clean:normalise"     # normalise(batch) in clean.py beside this file; RecordBatch in and out
  # - tokenize: {column: text, tokenizer: bytes, pack: 2048}

shards: {size: 64MB, block_rows: 1024, block_size: 8MB, compression: none}

placement:
  replicas: 3                       # copies of each shard, each in another store
  min_clouds: 2                     # in at least this many clouds
  allow: [us, eu]                   # jurisdictions data may lie in

quarantine: {limit: 0.1%}           # the run stops when more of its records than this are bad
"""

_DATA: Final[Mapping[str, str]] = {
    "data/mill.txt": (
        "A millrace is the channel that leads water from a river to a mill wheel, and away again.\n"
        "How much water the wheel gets is decided at the gate, not by the wheel.\n"
    ),
    "data/wheel.txt": (
        "An overshot wheel is filled from above and turned by the weight of the water.\n"
        "An undershot wheel is pushed from below and turned by the speed of it.\n"
    ),
    "data/notes/gate.txt": (
        "Close the gate before you mend the wheel.\nOpen it a little at a time: what rushes in can't be called back.\n"
    ),
    "data/notes/gate-copy.txt": (
        "Close the gate before you mend the wheel.\nOpen it a little at a time: what rushes in can't be called back.\n"
    ),
    "data/notes/todo.txt": "grease the axle\n",
}


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them; made if it isn't there.")] = Path(
        "."
    ),
    force: Annotated[bool, typer.Option("--force", help="Write over world.yaml and pipeline.yaml.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a world file, a pipeline file and a little data: a pair that works as it stands."""
    output = Output(as_json=as_json)

    async def work() -> list[str]:
        return write_example(folder, force=force)

    written = perform(output, work)
    output.document({"folder": str(folder), "written": written})
    for name in written:
        output.line(f"wrote {folder / name}")
    go_there = "" if folder == Path(".") else f"cd {shlex.quote(str(folder))}, then: "
    output.line(f"next: {go_there}millrace plan pipeline.yaml, then: millrace run pipeline.yaml")


def write_example(folder: Path, *, force: bool = False) -> list[str]:
    """Write the example into ``folder``.

    The data is written only where there is no ``data`` yet, whatever ``force`` says.

    Args:
        folder: Made if it isn't there.
        force: Write over the two YAML files.

    Returns:
        What was written, relative to ``folder``.

    Raises:
        UsageError: a YAML file is there already, or the folder can't be written to.
    """
    specs = {"world.yaml": WORLD_YAML, "pipeline.yaml": PIPELINE_YAML}
    there = [str(folder / name) for name in specs if (folder / name).exists()]
    if there and not force:
        verb = "is" if len(there) == 1 else "are"
        raise UsageError(f"{' and '.join(there)} {verb} there already; name another folder, or write over with --force")
    schemas = {f".millrace/schema/{kind.value}.json": schema_text(kind) for kind in SpecKind}
    data = {} if (folder / "data").exists() else _DATA
    files = {**specs, **data, **schemas}
    try:
        for name, text in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{folder} can't be written to: {error.strerror}: {error.filename}") from error
    return list(files)
