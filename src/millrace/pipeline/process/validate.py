"""``validate``: what a record must keep; one that doesn't is set aside with the rule it broke."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from millrace.core.errors import SpecError, TransformError
from millrace.core.spec import ValidateRules
from millrace.pipeline.process.engine import DATA_ERRORS, Engine, over_records, sentence, unbound
from millrace.pipeline.process.isolate import RecordFault, isolate
from millrace.pipeline.process.rows import ProcessContext, Rows
from millrace.pipeline.process.sqlcheck import check_condition, column_refs

__all__ = ["ValidateStep", "require_columns"]

_TIMEOUT_S = 60.0


def require_columns(columns: Sequence[str], schema: pa.Schema, where: str) -> None:
    """That all of them are there.

    Raises:
        SpecError: one is not; names it, and those that are.
    """
    for name in columns:
        if name not in schema.names:
            raise SpecError(f"{where}: there is no column {name!r}; there are {', '.join(schema.names)}")


class ValidateStep:
    """``required`` and ``rules`` of one ``validate`` transform; ``unique`` is a key barrier of its own."""

    def __init__(self, engine: Engine, rules: ValidateRules, where: str) -> None:
        self._engine = engine
        self._rules = rules
        self._where = where
        self._checked: pa.Schema | None = None
        self._columns: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """``validate``."""
        return "validate"

    def prepare(self, schema: pa.Schema | None) -> None:
        """Check the rules, against the schema of what comes in where that is known.

        Raises:
            SpecError: a column isn't there, or a rule is no condition on one record.
        """
        columns = None if schema is None else tuple(schema.names)
        for i, rule in enumerate(self._rules.rules):
            check_condition(self._engine, rule, columns, f"{self._where}.rules.{i}")
        if schema is not None:
            self._bind(schema)

    def _bind(self, schema: pa.Schema) -> None:
        if self._checked is not None and schema.equals(self._checked):
            return
        require_columns(self._rules.required, schema, f"{self._where}.required")
        trees = [self._engine.parse(over_records(rule)) for rule in self._rules.rules]
        used = column_refs(trees)
        self._columns = tuple(i for i, name in enumerate(schema.names) if name.casefold() in used)
        for field in (schema.field(i) for i in self._columns):
            if not self._engine.can_read(field.type):
                raise SpecError(f"{self._where}.rules: SQL can't read column {field.name!r} of type {field.type}")
        seen = pa.schema([schema.field(i) for i in self._columns] or [pa.field("x", pa.int8())])
        for i, rule in enumerate(self._rules.rules):
            where = f"{self._where}.rules.{i}"
            try:
                bound = self._engine.bind(over_records(rule), seen)
            except duckdb.Error as error:
                raise SpecError(f"{where}: {unbound(error, schema.names)}") from error
            if bound.types != [pa.bool_()]:
                raise SpecError(f"{where}: {rule!r} gives {bound.types[0]}, not true or false")
        self._checked = schema

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """The rows that keep every rule; the others are set aside for the first one they break.

        Raises:
            TransformError: a column isn't there, or a rule fails on its own account.
        """
        for batch in rows:
            try:
                self._bind(batch.batch.schema)
            except SpecError as error:
                raise TransformError(str(error)) from error
            left = self._required(batch, context)
            if left.count and self._rules.rules:
                found = isolate(left, lambda part: self._kept(part, context), label=self.label)
                kept = found.results
                for fault, reason in found.faults:
                    self._blame(fault, reason, context)
            else:
                kept = [left]
            for part in kept:
                if part.count:
                    yield part

    def _required(self, rows: Rows, context: ProcessContext) -> Rows:
        mask = np.ones(rows.count, np.bool_)
        for name in self._rules.required:
            array = rows.batch.column(name)
            good: npt.NDArray[np.bool_] = array.is_valid().to_numpy(zero_copy_only=False)
            if pt.is_string(array.type) or pt.is_binary(array.type):
                full = pc.fill_null(pc.greater(pc.binary_length(array), 0), False)
                good = good & full.to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(mask & ~good).tolist():
                what = "empty" if array[row].is_valid else "null"
                context.set_aside(rows.origins, row, f"required: {name}", f"{name} is {what}")
            mask &= good
        return rows.keep(mask)

    def _kept(self, rows: Rows, context: ProcessContext) -> Rows:
        answers = self._ask(self._rules.rules, rows, context)
        mask = np.ones(rows.count, np.bool_)
        for rule, answer in zip(self._rules.rules, answers.columns, strict=True):
            good = pc.fill_null(answer, False).to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(mask & ~good).tolist():
                context.set_aside(rows.origins, row, rule, _broken(answer[row]))
            mask &= good
        return rows.keep(mask)

    def _ask(self, rules: Sequence[str], rows: Rows, context: ProcessContext) -> pa.RecordBatch:
        conditions = ", ".join(f"(\n{rule}\n) AS r{i}" for i, rule in enumerate(rules))
        arrays = [rows.batch.column(i) for i in self._columns] or [pa.nulls(rows.count, pa.int8())]
        names = [rows.batch.schema.names[i] for i in self._columns] or ["x"]
        seen = pa.RecordBatch.from_arrays(arrays, names=names)
        with context.deadline(self.label, _TIMEOUT_S):
            try:
                return self._engine.query(over_records(conditions), seen)
            except DATA_ERRORS as error:
                raise RecordFault(sentence(error)) from error
            except (duckdb.Error, pa.ArrowException) as error:
                raise TransformError(f"{self.label}: {sentence(error)}") from error

    def _blame(self, row: Rows, reason: str, context: ProcessContext) -> None:
        """Set aside one record that some rule fails for, under the first rule it doesn't keep."""
        for rule in self._rules.rules:
            try:
                answer = self._ask([rule], row, context).column(0)[0]
            except RecordFault as fault:
                context.set_aside(row.origins, 0, rule, fault.reason)
                return
            if not answer.as_py():
                context.set_aside(row.origins, 0, rule, _broken(answer))
                return
        raise TransformError(f"{self.label}: the rules fail on a record together ({reason}) and none of them alone")


def _broken(answer: pa.Scalar) -> str:
    return "it is false for this record" if answer.is_valid else "it is null for this record"
