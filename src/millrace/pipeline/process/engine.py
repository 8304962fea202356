"""One closed-off DuckDB connection a worker: no files, no network, no extensions, one thread, UTC."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import pyarrow as pa

from millrace.pipeline.process.plain import plain_batch

__all__ = ["DATA_ERRORS", "Engine", "Function", "SqlSyntax", "over_records", "sentence", "unbound"]

DATA_ERRORS: Final = (duckdb.DataError, duckdb.InvalidInputException)
"""What a record can be to blame for: a conversion, a range, a bad argument. Everything else is the query's fault."""

_CONFIG: Final = {
    "threads": 1,  # one order of rows, and the worker pool already uses the other cores
    "enable_external_access": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "python_enable_replacements": False,  # or a Python variable could be read as a table
    "preserve_insertion_order": True,
}


class SqlSyntax(Exception):
    """A text is not one SELECT statement; the message says why. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class Function:
    """What DuckDB says of all functions of one name.

    Attributes:
        kinds: ``scalar``, ``aggregate``, ``window``, ``macro``, ``table`` ...
        stable: Whether every scalar of that name gives the same for the same arguments, in every query.
        macro: The definitions, if it is a macro.
    """

    kinds: frozenset[str]
    stable: bool
    macros: tuple[str, ...] = ()


class Engine:
    """A connection, and what is asked of it. Not for two threads at once."""

    def __init__(self) -> None:
        self._connection = duckdb.connect(":memory:", config=_CONFIG)
        self._connection.execute("SET TimeZone = 'UTC'")
        self._functions: dict[str, Function] | None = None
        self._connection.execute("SET lock_configuration = true")

    def close(self) -> None:
        """Let go of the connection."""
        self._connection.close()

    def functions(self) -> Mapping[str, Function]:
        """Every function DuckDB knows, by lowercase name."""
        if self._functions is None:
            rows = self._connection.execute(
                "SELECT lower(function_name), list(DISTINCT function_type), "
                "bool_and(coalesce(stability, 'CONSISTENT') = 'CONSISTENT'), "
                "list(DISTINCT macro_definition) FILTER (function_type = 'macro' AND macro_definition IS NOT NULL) "
                "FROM duckdb_functions() GROUP BY 1"
            ).fetchall()
            self._functions = {
                name: Function(frozenset(kinds), bool(stable), tuple(sorted(macros or ())))
                for name, kinds, stable, macros in rows
            }
        return self._functions

    def parse(self, sql: str) -> list[dict[str, Any]]:
        """The statements of a text, as DuckDB's own syntax trees.

        Raises:
            SqlSyntax: it is not SQL, or something other than SELECT.
        """
        tree = json.loads(self._text("SELECT json_serialize_sql(?)", sql))
        if tree.get("error", True):
            if "Only SELECT" in tree.get("error_message", ""):
                raise SqlSyntax("only one SELECT ... FROM records is understood")
            raise SqlSyntax(f"this is not SQL: {sentence(tree.get('error_message', ''))}")
        return list(tree["statements"])

    def unparse(self, statement: Mapping[str, Any]) -> str:
        """SQL text for a tree.

        Raises:
            duckdb.Error: DuckDB can't make text of it.
        """
        tree = json.dumps({"error": False, "statements": [statement]})
        return self._text("SELECT json_deserialize_sql(?)", tree)

    def _text(self, sql: str, argument: str) -> str:
        # Fetched to the end: an open result would block the connection for what comes next.
        return str(self._connection.execute(sql, [argument]).fetchall()[0][0])

    def query(self, sql: str, records: pa.RecordBatch) -> pa.RecordBatch:
        """Run a query over ``records``; plain types out, rows in the order of the input.

        Raises:
            duckdb.Error: whatever it says.
        """
        self._connection.register("records", records)
        try:
            table = self._connection.sql(sql).to_arrow_table().combine_chunks()
        finally:
            self._connection.unregister("records")
        arrays = [
            column.chunk(0) if column.num_chunks else pa.array([], field.type)
            for column, field in zip(table.columns, table.schema, strict=True)
        ]
        # Built by schema and not by name: names may repeat, and must be seen to be refused.
        return plain_batch(pa.RecordBatch.from_arrays(arrays, schema=table.schema))

    def bind(self, sql: str, schema: pa.Schema) -> pa.Schema:
        """The schema a query gives, without running it over anything.

        Raises:
            duckdb.Error: it can't be bound to these columns.
        """
        return self.query(sql, _empty(schema)).schema

    def can_read(self, kind: pa.DataType) -> bool:
        """Whether DuckDB has a type for this one."""
        try:
            self.bind("SELECT * FROM records", pa.schema([("x", kind)]))
        except (duckdb.Error, pa.ArrowException):
            return False
        return True


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def over_records(expressions: str) -> str:
    """A query of these expressions. The line ends keep a ``--`` comment in them from swallowing what follows."""
    return "\n".join(("SELECT", expressions, "FROM records"))


def sentence(message: object) -> str:
    """The first, telling part of what DuckDB says, on one line, without its pointer into the query."""
    text = re.split(r"\n\s*(?:LINE \d+:|Candidate )", str(message))[0]
    text = re.sub(r"^[A-Z][A-Za-z ]+ Error: ", "", text.strip())
    return re.sub(r"\s+", " ", text).strip()[:300]


def unbound(error: duckdb.Error, columns: Sequence[str]) -> str:
    """Why a query doesn't fit these columns."""
    missing = re.search(r'Referenced column "(.+?)" not found', str(error))
    if missing is None:
        return sentence(error)
    return f"there is no column {missing[1]!r}; there are {', '.join(columns)}"
