"""What SQL may say about records: anything that looks at one record and nothing else.

The rule is held by walking DuckDB's own syntax tree with a list of what is allowed; what is not on it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from millrace.core.errors import SpecError
from millrace.pipeline.process.engine import Engine, SqlSyntax, over_records

__all__ = ["check_condition", "check_select", "column_refs", "stars"]

_OTHERS: Final = "depends on other records; SQL runs here record by record, so that the result is the same however"
_OTHERS_END: Final = "the input is cut"
_OUTSIDE: Final = "depends on something other than the record, so a second run would differ"

_MODIFIERS: Final = {
    "LIMIT_MODIFIER": "LIMIT/OFFSET",
    "LIMIT_PERCENT_MODIFIER": "LIMIT",
    "ORDER_MODIFIER": "ORDER BY",
    "DISTINCT_MODIFIER": "DISTINCT",
}
_TABLES: Final = {
    "JOIN": "a join",
    "SUBQUERY": "a subquery",
    "PIVOT": "PIVOT",
    "EXPRESSION_LIST": "VALUES",
    "CTE": "WITH",
    "SHOW_REF": "DESCRIBE or SHOW",
}
_CLASSES: Final = frozenset(
    {"COLUMN_REF", "CONSTANT", "FUNCTION", "OPERATOR", "CAST", "CASE", "COMPARISON", "CONJUNCTION", "BETWEEN"}
    | {"STAR", "LAMBDA", "LAMBDA_REF", "COLLATE", "TYPE"}
)
# These read as columns and become functions when there is no such column.
_CLOCK_NAMES: Final = frozenset(
    {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp", "get_current_timestamp"}
)
# Some DuckDB calls these consistent, and they read the clock, the session, the build or the layout in memory.
_UNSTABLE: Final = frozenset(
    {"current_localtime", "current_localtimestamp", "version", "current_setting", "getvariable", "vector_type"}
)


def check_select(engine: Engine, sql: str, columns: tuple[str, ...] | None, where: str) -> dict[str, Any]:
    """The statement, if it is one SELECT over ``records`` that looks at one record at a time.

    Args:
        engine: Parses.
        sql: The text.
        columns: The columns of ``records``, or None when they are not known yet.
        where: The field in the spec, for messages.

    Raises:
        SpecError: it says what can't be used, and why.
    """
    try:
        statements = engine.parse(sql)
    except SqlSyntax as error:
        raise SpecError(f"{where}: {error}") from None
    if len(statements) != 1:
        raise SpecError(f"{where}: there are {len(statements)} statements; write one SELECT over records")
    node = statements[0]["node"]
    _check_node(node, where)
    known = frozenset(c.casefold() for c in columns or ())
    check = _Expressions(engine, known, _table_names(node["from_table"]), where)
    check.walk([node["select_list"], node["where_clause"]])
    return statements[0]


def check_condition(engine: Engine, text: str, columns: tuple[str, ...] | None, where: str) -> None:
    """That ``text`` is one expression over one record.

    Raises:
        SpecError: it is something else; the message says what.
    """
    statement = check_select(engine, over_records(text), columns, where)
    node = statement["node"]
    items = node["select_list"]
    if len(items) != 1 or items[0]["alias"] or node["where_clause"] is not None or stars(items):
        raise SpecError(f"{where}: this is not one condition")
    if any(_function_name(part) in {"unnest", "unlist"} for part in _dicts(items)):
        raise SpecError(f"{where}: unnest makes several rows of a record, and a condition has one answer")


def _check_node(node: Mapping[str, Any], where: str) -> None:
    if node["type"] != "SELECT_NODE":
        what = {"SET_OPERATION_NODE": "UNION, INTERSECT or EXCEPT"}.get(node["type"], "WITH")
        raise _others(where, what)
    if node["cte_map"]["map"]:
        raise _others(where, "WITH")
    for modifier in node["modifiers"]:
        raise _others(where, _MODIFIERS.get(modifier["type"], modifier["type"].replace("_MODIFIER", "")))
    if node["group_expressions"] or node["group_sets"] or node["aggregate_handling"] != "STANDARD_HANDLING":
        raise _others(where, "GROUP BY")
    for key, what in {"having": "HAVING", "qualify": "QUALIFY", "sample": "SAMPLE"}.items():
        if node.get(key):
            raise _others(where, what)
    table = node["from_table"]
    if table["type"] == "TABLE_FUNCTION":
        raise SpecError(
            f"{where}: the table function {table['function']['function_name']} can't be used: "
            "SQL reads FROM records and nothing else"
        )
    if table["type"] in _TABLES:
        raise _others(where, _TABLES[table["type"]])
    if table["type"] != "BASE_TABLE" or table.get("at_clause"):
        raise SpecError(f"{where}: a transform reads its input, the table records")
    if table.get("column_name_alias"):
        raise SpecError(f"{where}: columns can't be renamed in FROM; write SELECT old AS new")
    if table.get("sample"):
        raise _others(where, "SAMPLE")
    qualified = table.get("schema_name") or table.get("catalog_name")
    if table["table_name"].casefold() != "records" or qualified:
        raise SpecError(f"{where}: there is no table {table['table_name']!r}; the only one is records")


def _table_names(table: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"records", (table.get("alias") or "records").casefold()})


def _others(where: str, what: str) -> SpecError:
    return SpecError(f"{where}: {what} can't be used: it {_OTHERS} {_OTHERS_END}")


class _Expressions:
    """A walk over expressions that raises at the first one that is not allowed."""

    def __init__(self, engine: Engine, columns: frozenset[str], tables: frozenset[str], where: str) -> None:
        self._engine = engine
        self._columns = columns
        self._tables = tables
        self._where = where

    def walk(self, tree: Any) -> None:
        for part in _dicts(tree):
            kind = part.get("class")
            if kind is None:
                continue
            if kind == "WINDOW":
                raise _others(self._where, f"the window function {part.get('function_name', '')}".rstrip())
            if kind == "SUBQUERY":
                raise _others(self._where, "a subquery")
            if kind not in _CLASSES or part.get("type") == "GROUPING_FUNCTION":
                name = str(kind).lower().replace("_", " ")
                raise SpecError(f"{self._where}: a {name} expression can't be used in a transform")
            if kind == "FUNCTION":
                self._function(part)
            elif kind == "COLUMN_REF":
                self._column(part)

    def _function(self, part: Mapping[str, Any]) -> None:
        name = _function_name(part)
        if name in {"unnest", "unlist"}:
            return
        if name in _UNSTABLE or (name == "age" and len(part.get("arguments", part.get("children", ()))) == 1):
            raise self._outside(f"{name}()")
        function = self._engine.functions().get(name)
        if function is None:
            return  # binding says so, with a suggestion
        if not function.kinds & {"scalar", "macro"}:
            if "aggregate" in function.kinds:
                raise _others(self._where, f"the aggregate {name}()")
            if "window" in function.kinds:
                raise _others(self._where, f"the window function {name}()")
            raise SpecError(f"{self._where}: {name}() can't be used: SQL reads FROM records and nothing else")
        if not function.stable:
            raise self._outside(f"{name}()")
        for definition in function.macros:
            # A macro's own parameters look like columns; none has the name of a clock.
            inner = _Expressions(self._engine, frozenset(), frozenset(), f"{self._where}: {name}() is a macro")
            inner.walk([s["node"]["select_list"] for s in self._engine.parse(f"SELECT {definition}")])

    def _column(self, part: Mapping[str, Any]) -> None:
        names = part["column_names"]
        name = names[-1].casefold()
        if name in self._columns:
            return
        if len(names) == 1 and name in _CLOCK_NAMES:
            raise self._outside(name)
        if name == "rowid":
            raise _others(self._where, "rowid")
        if len(names) == 1 and name in self._tables:
            raise SpecError(f"{self._where}: {names[0]!r} is the table, not a column; name the columns you need")

    def _outside(self, what: str) -> SpecError:
        return SpecError(f"{self._where}: {what} can't be used: it {_OUTSIDE}")


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a tree, constants' insides apart."""
    if isinstance(tree, dict):
        yield tree
        if tree.get("class") != "CONSTANT":
            for value in tree.values():
                yield from _dicts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _dicts(value)


def _function_name(part: Mapping[str, Any]) -> str:
    return str(part["function_name"]).casefold() if part.get("class") == "FUNCTION" else ""


def column_refs(tree: Any) -> frozenset[str]:
    """Every name, in lowercase, that might mean a column: each part of each reference."""
    refs = (part["column_names"] for part in _dicts(tree) if part.get("class") == "COLUMN_REF")
    return frozenset(name.casefold() for names in refs for name in names)


def stars(tree: Any) -> list[dict[str, Any]]:
    """Every ``*`` and ``COLUMNS(...)`` in a tree."""
    return [part for part in _dicts(tree) if part.get("class") == "STAR"]
