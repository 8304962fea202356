"""The transforms in docs/transforms.md do what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Pipeline
from millrace.core.specfile import parse_spec
from millrace.pipeline.process import Chain, ProcessContext
from millrace.pipeline.records import Records

PAGE = (Path(__file__).parents[2] / "docs" / "transforms.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
[PYTHON] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
HEAD = 'dataset: docs\nsources:\n  - {url: "file://./data", format: text}\n'


def test_the_page_has_an_example_of_each() -> None:
    kinds = {kind for text in YAML for kind in re.findall(r"- (\w+):", text)}
    assert kinds >= {"sql", "python", "validate", "dedup", "tokenize"}


@pytest.mark.parametrize("text", YAML)
def test_examples_run(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "clean.py").write_text(PYTHON)
    monkeypatch.syspath_prepend(tmp_path)
    spec = parse_spec(Pipeline, HEAD + text, file="pipeline.yaml")
    batch = pa.RecordBatch.from_pydict({"path": ["a.txt", "b.txt"], "text": ["  Cafe\u0301\n" + "x" * 300, "y" * 250]})
    rejected: list[Quarantined] = []

    def records() -> Iterator[Records]:
        yield Records(batch, np.arange(2, dtype=np.int32), np.zeros(2, np.int64))

    chunk = Chunk(0, 0, (SourceObject("a.txt", 9, "v"), SourceObject("b.txt", 9, "v")), 0, 18)
    chain = Chain.build(spec.transforms, base=tmp_path, schema=batch.schema)
    losers = [np.empty(0, np.int64)] * chain.barriers
    context = ProcessContext(chunk, "byte", rejected.append, lambda name, seconds: nullcontext(), losers)
    assert sum(found.num_rows for found in chain.run(records(), context)) > 0
    assert rejected == []
    chain.close()
