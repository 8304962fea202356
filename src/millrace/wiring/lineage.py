"""What a version was made of: the spec, the sources, the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.core.facts import Lineage
from millrace.core.model import digest_of
from millrace.core.spec import Pipeline, PythonTransform, SqlTransform, Tokenize, Validate
from millrace.pipeline.plan import Plan

__all__ = ["canonical_spec", "identity_of", "lineage_of"]


def canonical_spec(pipeline: Pipeline) -> dict[str, Any]:
    """The validated pipeline as plain data: units resolved, defaults filled in."""
    return pipeline.model_dump(mode="json", by_alias=True)


def lineage_of(pipeline: Pipeline, plan: Plan, base: Path) -> Lineage:
    """Where a version made by ``plan`` comes from.

    Args:
        pipeline: As validated.
        plan: Over its sources.
        base: The pipeline file's folder, where its transform modules and tokenizer files lie.
    """
    spec = canonical_spec(pipeline)
    return Lineage(
        sources=tuple(
            {"url": source.url, "format": source.format, "objects": objects, "bytes": size}
            for source, (objects, size) in zip(pipeline.sources, _counted(pipeline, plan), strict=True)
        ),
        spec=spec,
        spec_digest=digest_of(_canonical_json(spec)),
        plan_digest=plan.digest,
        code=_code(pipeline, base),
    )


def identity_of(lineage: Lineage) -> str:
    """The same work has the same identity: spec, plan and code."""
    return digest_of(_canonical_json([lineage.spec_digest, lineage.plan_digest, lineage.code]))


def _canonical_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _counted(pipeline: Pipeline, plan: Plan) -> list[tuple[int, int]]:
    groups = plan.objects.select(["source", "size"]) if isinstance(plan.objects, pa.Table) else plan.objects
    owner = groups["source"].to_numpy()
    sizes = groups["size"].to_numpy()
    return [(int((owner == i).sum()), int(sizes[owner == i].sum(dtype="int64"))) for i in range(len(pipeline.sources))]


def _code(pipeline: Pipeline, base: Path) -> dict[str, str]:
    code = {name: importlib.metadata.version(name) for name in ("millrace", "pyarrow")}
    for transform in pipeline.transforms:
        match transform:
            case PythonTransform():
                module = transform.python.partition(":")[0]
                code[f"python {module}"] = _module_digest(module)
            case Tokenize() if transform.tokenize.tokenizer != "bytes":
                code["tokenizers"] = importlib.metadata.version("tokenizers")
                file = base / transform.tokenize.tokenizer
                code[f"tokenizer {transform.tokenize.tokenizer}"] = hashlib.sha256(file.read_bytes()).hexdigest()
            case SqlTransform() | Validate():
                code["duckdb"] = importlib.metadata.version("duckdb")
    return code


def _module_digest(module: str) -> str:
    """Of the module's file, or its distribution's word for it when it has none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return "built-in"
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()
