"""A pipeline's transforms, made ready once a worker and run over one chunk after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from millrace.core.errors import TransformError
from millrace.core.spec import Dedup, PythonTransform, SqlTransform, Tokenize, Transform, Validate
from millrace.pipeline.process.barrier import KeyBarrier
from millrace.pipeline.process.engine import Engine
from millrace.pipeline.process.keys import KeyBatch
from millrace.pipeline.process.plain import plain_batch, plain_schema
from millrace.pipeline.process.python import PythonStep
from millrace.pipeline.process.rows import Origins, ProcessContext, Rows, Step
from millrace.pipeline.process.sql import SqlStep
from millrace.pipeline.process.tokenize import TokenizeStep
from millrace.pipeline.process.validate import ValidateStep, require_columns
from millrace.pipeline.records import Records

__all__ = ["Chain", "count_barriers"]


def count_barriers(transforms: Sequence[Transform]) -> int:
    """How many key barriers there are: each ``dedup``, and each ``validate`` with ``unique``. Reads only the spec."""
    return sum(isinstance(t, Dedup) or (isinstance(t, Validate) and bool(t.validate_.unique)) for t in transforms)


class Chain:
    """Transforms in order. Not for two threads at once; one chunk after another is fine.

    Attributes:
        barriers: How many key barriers it has.
        schema: What comes out, where that is known before it runs: after a ``python`` step it is not.
    """

    def __init__(self, steps: Sequence[Step], schema: pa.Schema | None, engine: Engine) -> None:
        self._steps = tuple(steps)
        self._engine = engine
        self.schema = schema
        self.barriers = sum(isinstance(step, KeyBarrier) for step in steps)

    @classmethod
    def build(cls, transforms: Sequence[Transform], *, base: Path, schema: pa.Schema) -> Chain:
        """Make the transforms ready: parse and check SQL, import functions, open the tokenizer.

        Imports user code, so the caller keeps watch over the time it takes.

        Args:
            transforms: From the spec.
            base: The pipeline file's folder: tokenizer files are relative to it, and it is on ``sys.path``.
            schema: What the reader says of the source's records.

        Raises:
            SpecError: one can't do what it says; the message begins with its field (``transforms.2.sql: ...``).
            TransformError: a module raised as it was imported.
        """
        engine = Engine()
        try:
            return cls._built(engine, transforms, base, plain_schema(schema))
        except BaseException:
            engine.close()
            raise

    @classmethod
    def _built(cls, engine: Engine, transforms: Sequence[Transform], base: Path, schema: pa.Schema) -> Chain:
        steps: list[Step] = []
        known: pa.Schema | None = schema
        barriers = 0
        for i, transform in enumerate(transforms):
            where = f"transforms.{i}"
            match transform:
                case SqlTransform():
                    sql = SqlStep(engine, transform, f"{where}.sql")
                    known = sql.prepare(known)
                    steps.append(sql)
                case PythonTransform():
                    steps.append(PythonStep(transform, base, f"{where}.python"))
                    known = None
                case Validate(validate_=rules):
                    if rules.required or rules.rules:
                        checks = ValidateStep(engine, rules, f"{where}.validate")
                        checks.prepare(known)
                        steps.append(checks)
                    if rules.unique:
                        steps.append(_barrier(barriers, rules.unique, known, f"{where}.validate.unique", rejects=True))
                        barriers += 1
                case Dedup(dedup=columns):
                    steps.append(_barrier(barriers, columns, known, f"{where}.dedup", rejects=False))
                    barriers += 1
                case Tokenize():
                    tokens = TokenizeStep(transform, base, f"{where}.tokenize")
                    known = tokens.prepare(known)
                    steps.append(tokens)
        return cls(steps, known, engine)

    def run(self, records: Iterator[Records], context: ProcessContext) -> Iterator[pa.RecordBatch]:
        """The whole chain over one chunk: plain batches of bounded size, never empty ones.

        Args:
            records: The chunk's, from the reader.
            context: With the losers of every barrier.

        Raises:
            TransformError: a transform failed on its own account.
            Nondeterministic: it gave two outputs for one input.
        """
        for rows in self._flow(records, context, self._steps):
            yield rows.batch

    def survey(self, records: Iterator[Records], context: ProcessContext, barrier: int) -> Iterator[KeyBatch]:
        """Run up to one barrier: the keys of the rows that arrive there.

        Args:
            records: The chunk's, from the reader.
            context: With the losers of the barriers before.
            barrier: Which, from 0.

        Raises:
            TransformError, Nondeterministic: as ``run``.
        """
        at = [i for i, step in enumerate(self._steps) if isinstance(step, KeyBarrier)][barrier]
        step = self._steps[at]
        if isinstance(step, KeyBarrier):
            yield from step.survey(self._flow(records, context, self._steps[:at]))

    def _flow(self, records: Iterator[Records], context: ProcessContext, steps: Sequence[Step]) -> Iterator[Rows]:
        needed = sum(isinstance(step, KeyBarrier) for step in steps)
        if len(context.losers) < needed:
            raise ValueError(f"{needed} key barriers need as many lists of losers, and there are {len(context.losers)}")
        stream = _enter(records, context)
        for step in steps:
            stream = step.run(stream, context)
        return stream

    def close(self) -> None:
        """Let go of the SQL engine."""
        self._engine.close()


def _enter(records: Iterator[Records], context: ProcessContext) -> Iterator[Rows]:
    for item in records:
        count = item.batch.num_rows
        context.counts.rows_in += count
        if count:
            try:
                batch = plain_batch(item.batch)
            except pa.ArrowException as error:
                raise TransformError(f"the records of {context.chunk.describe()} can't be laid out: {error}") from error
            yield Rows(batch, Origins(item.objects.astype(np.int32, copy=False), item.positions))


def _barrier(number: int, columns: Sequence[str], schema: pa.Schema | None, where: str, *, rejects: bool) -> KeyBarrier:
    if schema is not None:
        require_columns(columns, schema, where)
    return KeyBarrier(number, columns, rejects=rejects)
