"""``sql``: one SELECT over each batch, record by record.

Columns that only pass through never enter DuckDB: the query computes what is computed, and says by a hidden row
number which rows stay; the rest is taken from the input. So every Arrow type survives, a filter copies only what it
keeps, and each row still knows where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.errors import SpecError, TransformError
from millrace.core.spec import SqlTransform
from millrace.pipeline.process.engine import DATA_ERRORS, Engine, sentence, unbound
from millrace.pipeline.process.isolate import RecordFault, isolate
from millrace.pipeline.process.repeat import require_same
from millrace.pipeline.process.rows import Origins, ProcessContext, Rows, cut
from millrace.pipeline.process.sqlcheck import check_select, column_refs, stars
from millrace.pipeline.records import BATCH_BYTES, BATCH_ROWS

__all__ = ["SqlPlan", "SqlStep"]


@dataclass(frozen=True, slots=True)
class _Taken:
    column: int


@dataclass(frozen=True, slots=True)
class _Computed:
    column: int


@dataclass(frozen=True, slots=True)
class SqlPlan:
    """A query made ready for one input schema.

    Attributes:
        schema: What comes out.
        columns: The input columns that DuckDB has to see.
        query: What it runs; None when rows and columns only pass through.
        hidden: The name of the row number, last in the query's output; None when rows can't be followed.
        outputs: For each output column, an input column or one of the query's, in order. Empty when ``hidden``
            is None: then the query gives all.
    """

    schema: pa.Schema
    columns: tuple[int, ...]
    query: str | None
    hidden: str | None
    outputs: tuple[_Taken | _Computed, ...]


def plan(engine: Engine, sql: str, schema: pa.Schema, where: str) -> SqlPlan:
    """Make a query ready for records of this schema.

    Raises:
        SpecError: it looks beyond one record, or does not fit the columns; the message names what.
    """
    names = tuple(schema.names)
    statement = check_select(engine, sql, names, where)
    node = statement["node"]
    readable = _readable(engine, schema, node, where)
    try:
        bound = engine.bind(sql, readable)
    except duckdb.Error as error:
        raise SpecError(f"{where}: {unbound(error, names)}") from error
    twice = next((n for i, n in enumerate(bound.names) if n in bound.names[:i]), None)
    if twice is not None:
        raise SpecError(f"{where}: two output columns are called {twice!r}; name one with AS, or use * REPLACE (...)")
    hidden = "__row"
    while any(hidden == n.casefold() for n in (*names, *bound.names)):
        hidden += "_"
    odd = frozenset(f.name for f, g in zip(schema, readable, strict=True) if f.type != g.type)
    tracked = _tracked(engine, statement, readable, bound, hidden, odd)
    if tracked is not None:
        query, columns, outputs = tracked
        fields = [schema.field(o.column) if isinstance(o, _Taken) else bound.field(i) for i, o in enumerate(outputs)]
        out = pa.schema([field.with_name(name) for field, name in zip(fields, bound.names, strict=True)])
        return SqlPlan(out, columns, query, hidden, outputs)
    if odd:
        field = schema.field(min(odd))
        raise SpecError(
            f"{where}: SQL can't read column {field.name!r} of type {field.type}; name the columns you need"
        )
    return SqlPlan(bound, tuple(range(len(names))), sql, None, ())


def _readable(engine: Engine, schema: pa.Schema, node: Mapping[str, Any], where: str) -> pa.Schema:
    """The schema, with a stand-in for each column that DuckDB has no type for and that need only pass through."""
    if all(engine.can_read(kind) for kind in set(schema.types)):
        return schema
    used = column_refs([i for i in node["select_list"] if i["class"] != "COLUMN_REF"] + [node["where_clause"]])
    fields = []
    for field in schema:
        readable = engine.can_read(field.type)
        if not readable and field.name.casefold() in used:
            raise SpecError(
                f"{where}: SQL can't read column {field.name!r} of type {field.type}; it can only pass through"
            )
        fields.append(field if readable else field.with_type(pa.int8()))
    return pa.schema(fields)


def _tracked(
    engine: Engine,
    statement: Mapping[str, Any],
    schema: pa.Schema,
    bound: pa.Schema,
    hidden: str,
    odd: frozenset[str],
) -> tuple[str | None, tuple[int, ...], tuple[_Taken | _Computed, ...]] | None:
    """The query rewritten to compute only what is computed, and each row's number; None if it can't be."""
    node = statement["node"]
    if any(star.get("expr") for star in stars(node["select_list"])):
        return None  # COLUMNS('regex') would find the hidden column
    items = _items(node, schema)
    kept = [item.tree for item in items if item.kept]
    if not kept and node["where_clause"] is None:
        outputs = tuple(_Taken(i) for item in items for i in item.taken or ())
        return (None, (), outputs) if len(outputs) == len(bound.names) else None
    tree = deepcopy({**statement, "node": {**node, "select_list": kept}})
    for star in stars(tree["node"]["select_list"]):
        star["exclude_list"] = [*star["exclude_list"], hidden]
    tree["node"]["select_list"].append(_column(hidden))
    whole = bool(stars(kept))
    if whole and odd:
        return None
    used = column_refs([kept, node["where_clause"]])
    columns = tuple(i for i, name in enumerate(schema.names) if whole or name.casefold() in used)
    seen = pa.schema([*(schema.field(i) for i in columns), pa.field(hidden, pa.int32())])
    try:
        query = engine.unparse(tree)
        given = engine.bind(query, seen).types[:-1]
    except duckdb.Error:
        return None
    order = _order(items, len(given))
    if order is None or len(order) != len(bound.names):
        return None
    same = all(isinstance(o, _Taken) or given[o.column] == bound.types[i] for i, o in enumerate(order))
    return (query, columns, order) if same else None


@dataclass(frozen=True, slots=True)
class _Item:
    """One item of a select list: the input columns it passes through (None if it computes), and whether SQL sees it."""

    tree: dict[str, Any]
    taken: list[int] | None
    kept: bool


def _items(node: Mapping[str, Any], schema: pa.Schema) -> list[_Item]:
    alias = str(node["from_table"].get("alias") or "records").casefold()
    # A new name that another expression uses has to stay where that expression finds it.
    used = column_refs([node["select_list"], node["where_clause"]]) - {name.casefold() for name in schema.names}
    trees = [part for tree in node["select_list"] for part in _expanded(tree, schema)]
    passed = [(tree, _passed(tree, schema, alias)) for tree in trees]
    return [_Item(tree, taken, taken is None or tree["alias"].casefold() in used) for tree, taken in passed]


def _expanded(item: dict[str, Any], schema: pa.Schema) -> list[dict[str, Any]]:
    """``* REPLACE (...)`` as the columns it stands for, so that the others pass through; other items as they are."""
    is_star = item["class"] == "STAR" and not any(
        item.get(key) for key in ("columns", "expr", "rename_list", "qualified_exclude_list")
    )
    names = [name.casefold() for name in schema.names]
    if not is_star or not item["replace_list"] or len(set(names)) != len(names):
        return [item]
    replaced = {part["key"].casefold(): part["value"] for part in item["replace_list"]}
    left_out = {str(name).casefold() for name in item["exclude_list"]}
    return [
        {**replaced[name.casefold()], "alias": name} if name.casefold() in replaced else _column(name)
        for name in schema.names
        if name.casefold() not in left_out
    ]


def _order(items: Sequence[_Item], given: int) -> tuple[_Taken | _Computed, ...] | None:
    """What each output column is, in order, when SQL gives ``given`` columns; None if that can't be told."""
    wide = [bool(stars([item.tree])) and item.taken is None for item in items]
    width = given - sum(item.kept for item in items) + 1  # of the one item that may give several columns
    if sum(wide) > 1 or (not any(wide) and width != 1):
        return None
    order: list[_Taken | _Computed] = []
    place = 0
    for item, is_wide in zip(items, wide, strict=True):
        count = width if is_wide else 1
        if item.taken is not None:
            order += [_Taken(i) for i in item.taken]
        else:
            order += [_Computed(place + i) for i in range(count)]
        place += count if item.kept else 0
    return tuple(order)


def _passed(item: Mapping[str, Any], schema: pa.Schema, alias: str) -> list[int] | None:
    """The input columns that an item of the select list passes through unchanged; None if it computes something."""
    names = [n.casefold() for n in schema.names]
    if len(set(names)) != len(names):
        return None
    if item["class"] == "COLUMN_REF":
        parts = [p.casefold() for p in item["column_names"]]
        if len(parts) == 2 and parts[0] in {alias, "records"} and parts[0] not in names:
            parts = parts[1:]
        return [names.index(parts[0])] if len(parts) == 1 and parts[0] in names else None
    plain_star = item["class"] == "STAR" and not any(
        item.get(key) for key in ("columns", "expr", "replace_list", "rename_list", "qualified_exclude_list")
    )
    if not plain_star or not all(isinstance(name, str) for name in item["exclude_list"]):
        return None
    left_out = {name.casefold() for name in item["exclude_list"]}
    return [i for i, name in enumerate(names) if name not in left_out]


def _column(name: str) -> dict[str, Any]:
    return {
        "class": "COLUMN_REF",
        "type": "COLUMN_REF",
        "alias": "",
        "query_location": 0,
        "query_location_length": 0,
        "column_names": [name],
    }


class SqlStep:
    """One ``sql`` transform."""

    def __init__(self, engine: Engine, transform: SqlTransform, where: str) -> None:
        self._engine = engine
        self._transform = transform
        self._where = where
        self._plans: dict[pa.Schema, SqlPlan] = {}

    @property
    def label(self) -> str:
        """``sql: <its first 60 characters>``."""
        return f"sql: {' '.join(self._transform.sql.split())[:60]}"

    def prepare(self, schema: pa.Schema | None) -> pa.Schema | None:
        """Check the query, and bind it where the schema of its input is known; gives its output's schema.

        Raises:
            SpecError: it can't be run.
        """
        if schema is None:
            check_select(self._engine, self._transform.sql, None, self._where)
            return None
        return self._plan(schema).schema

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """Rows in, rows out.

        Raises:
            TransformError: the query fails on its own account.
            Nondeterministic: a sampled batch came out differently the second time.
        """
        for index, batch in enumerate(rows):
            try:
                ready = self._plan(batch.batch.schema)
            except SpecError as error:
                raise TransformError(str(error)) from error
            twice = context.is_sampled(index)

            def attempt(part: Rows, ready: SqlPlan = ready, twice: bool = twice) -> tuple[Rows, pa.RecordBatch | None]:
                return part, self._query(ready, part, context, twice=twice)

            found = isolate(batch, attempt, label=self.label)
            for fault, reason in found.faults:
                context.set_aside(fault.origins, 0, self.label, reason)
            for part, result in found.results:
                yield from _assemble(ready, part, result, context)

    def _plan(self, schema: pa.Schema) -> SqlPlan:
        if schema not in self._plans:
            # One schema at a time: chunks of one source share theirs.
            self._plans = {schema: plan(self._engine, self._transform.sql, schema, self._where)}
        return self._plans[schema]

    def _query(self, ready: SqlPlan, rows: Rows, context: ProcessContext, *, twice: bool) -> pa.RecordBatch | None:
        if ready.query is None:
            return None
        arrays = [rows.batch.column(i) for i in ready.columns]
        names = [rows.batch.schema.names[i] for i in ready.columns]
        if ready.hidden is not None:
            arrays.append(pa.array(np.arange(rows.count, dtype=np.int32)))
            names.append(ready.hidden)
        seen = pa.RecordBatch.from_arrays(arrays, names=names)
        result = self._guarded(ready.query, seen, context)
        if twice:
            again = self._guarded(ready.query, seen, context)
            require_same(result, again, label=self.label, rows=rows, ctx=context)
        return result

    def _guarded(self, query: str, seen: pa.RecordBatch, context: ProcessContext) -> pa.RecordBatch:
        with context.deadline(self.label, self._transform.timeout):
            try:
                return self._engine.query(query, seen)
            except DATA_ERRORS as error:
                raise RecordFault(sentence(error)) from error
            except (duckdb.Error, pa.ArrowException) as error:
                raise TransformError(f"{self.label}: {sentence(error)}") from error


def _assemble(ready: SqlPlan, rows: Rows, result: pa.RecordBatch | None, context: ProcessContext) -> Iterator[Rows]:
    """Output columns from the query's result and the input, in pieces of bounded size."""
    if ready.hidden is None and result is not None:
        batch = pa.RecordBatch.from_arrays(result.columns, schema=ready.schema)
        yield from cut(Rows(batch, rows.origins.lost(batch, context.chunk)))
        return
    if result is None:
        arrays = [rows.batch.column(o.column) for o in ready.outputs if isinstance(o, _Taken)]
        yield Rows(pa.RecordBatch.from_arrays(arrays, schema=ready.schema), rows.origins)
        return
    chosen: npt.NDArray[np.int64] = result.column(result.num_columns - 1).to_numpy().astype(np.int64)
    if np.array_equal(chosen, np.arange(rows.count)):
        yield from cut(_gather(ready, rows, result, None))
        return
    for start, end in _pieces(ready, rows, chosen):
        yield from cut(_gather(ready, rows, result.slice(start, end - start), chosen[start:end]))


def _gather(ready: SqlPlan, rows: Rows, result: pa.RecordBatch, chosen: npt.NDArray[np.int64] | None) -> Rows:
    indices = None if chosen is None else pa.array(chosen)
    arrays = []
    for output in ready.outputs:
        if isinstance(output, _Computed):
            arrays.append(result.column(output.column))
        else:
            column = rows.batch.column(output.column)
            arrays.append(column if indices is None else column.take(indices))
    origins: Origins = rows.origins if chosen is None else rows.origins.take(chosen)
    return Rows(pa.RecordBatch.from_arrays(arrays, schema=ready.schema), origins)


def _pieces(ready: SqlPlan, rows: Rows, chosen: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of ``chosen`` so that taking the passed columns holds a bounded amount, whatever unnest repeated."""
    if len(chosen) <= rows.count:
        yield 0, len(chosen)
        return
    weight = np.ones(rows.count, np.int64)
    for column in {o.column for o in ready.outputs if isinstance(o, _Taken)}:
        array = rows.batch.column(column)
        if array.type in {pa.string(), pa.binary()}:
            weight += pc.fill_null(pc.binary_length(array), 0).to_numpy()
        else:
            weight += array.nbytes // max(1, rows.count)
    ends = np.cumsum(weight[chosen])
    start = 0
    while start < len(chosen):
        before = int(ends[start - 1]) if start else 0
        end = int(np.searchsorted(ends, before + BATCH_BYTES, side="right"))
        end = min(max(end, start + 1), start + BATCH_ROWS, len(chosen))
        yield start, end
        start = end
