"""JSON lines one at a time: what a line must hold, what is wrong with it, and which types a sample shows."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from millrace.pipeline.formats.columns import JSON_TYPE, TIME_TYPE, to_times, type_word
from millrace.pipeline.formats.objects import BOM

__all__ = ["BadLine", "Fields", "LineParser", "Sample"]

_BLANK: Final = b" \t\r\n"


class BadLine(Exception):
    """A line that must be rejected.

    Attributes:
        rule: ``json``, ``utf-8`` or ``schema``.
        reason: One sentence.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Fields:
    """What lines should hold.

    Attributes:
        kinds: The type of each field, in the records' order.
        strict: Reject lines with other fields, instead of leaving those out.
    """

    kinds: Mapping[str, pa.DataType]
    strict: bool


class _MinusZero(int):
    """``-0``: a whole number that is another one as a double."""


_MINUS_ZERO: Final = _MinusZero(0)


def _integer(digits: str) -> int:
    return _MINUS_ZERO if digits == "-0" else int(digits)


_DECODER: Final = json.JSONDecoder(parse_int=_integer)


class _WrongValue(Exception):
    """A value that doesn't fit its column; the argument says what it is."""


def _word(value: object) -> str:
    words = {bool: "a bool", int: "a whole number", _MinusZero: "a whole number", float: "a number", str: "a string"}
    return words.get(type(value), "a list" if isinstance(value, list) else "an object")


def _to_string(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongValue(_word(value))
    return _encodable(value)


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _WrongValue("text with half of a surrogate pair") from None
    return text


def _to_int64(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _WrongValue(_word(value))
    if not -(2**63) <= value < 2**63:
        raise _WrongValue("a whole number of more than 64 bits")
    return int(value)


def _to_double(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _WrongValue(_word(value))
    if isinstance(value, _MinusZero):
        return -0.0
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _WrongValue("not a finite number")
    return number


def _to_bool(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongValue(_word(value))
    return value


def _to_json(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise _WrongValue("holds NaN or an infinity") from None
    return _encodable(text)


def _to_time(value: object) -> object:
    text = _to_string(value)
    try:
        return to_times(pa.array([text], pa.string()))[0]
    except pa.ArrowInvalid:
        raise _WrongValue(f"{text[:40]!r}") from None


def _to_binary(value: object) -> bytes:
    text = _to_string(value)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _WrongValue("not base64") from None


_CONVERT: Final[Mapping[pa.DataType, Callable[[object], object]]] = {
    pa.string(): _to_string,
    pa.int64(): _to_int64,
    pa.float64(): _to_double,
    pa.bool_(): _to_bool,
    JSON_TYPE: _to_json,
    TIME_TYPE: _to_time,
    pa.binary(): _to_binary,
}


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadLine("utf-8", f"the line is not UTF-8: {error.reason} at its byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadLine("json", f"the line is not JSON: {error.msg} at its character {error.pos}") from None
    except RecursionError:
        raise BadLine("json", "the line is not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise BadLine("json", f"the line is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise BadLine("json", f"the line is {_word(value) if value is not None else 'null'}, not a JSON object")
    return value


class LineParser:
    """Reads one line after another into values, in the order of ``fields``."""

    def __init__(self, fields: Fields) -> None:
        self._names = frozenset(fields.kinds)
        self._strict = fields.strict
        self._columns = [(name, kind, _CONVERT[kind]) for name, kind in fields.kinds.items()]

    def parse(self, line: bytes, *, first: bool) -> list[object] | None:
        """The values of one line, or None when it is blank.

        Args:
            line: Its bytes, with or without what ends it.
            first: Whether it begins its file, and may begin with a byte order mark.

        Raises:
            BadLine: it isn't a JSON object with these fields.
        """
        if first and line.startswith(BOM):
            line = line[len(BOM) :]
        if not line.strip(_BLANK):
            return None
        found = _object(line)
        if self._strict and not found.keys() <= self._names:
            name = next(name for name in found if name not in self._names)
            reason = f"field {name[:80]!r} is not among those the sample showed; list the fields to read under columns"
            raise BadLine("schema", reason)
        row: list[object] = []
        for name, kind, convert in self._columns:
            value = found.get(name)
            if value is not None:
                try:
                    value = convert(value)
                except _WrongValue as wrong:
                    way_out = "; list it under columns with a type that fits all" if self._strict else ""
                    reason = f"field {name[:80]!r} is {wrong}, expected {type_word(kind)}{way_out}"
                    raise BadLine("schema", reason) from None
            row.append(value)
        return row


class Sample:
    """The fields and types that lines show, in the order in which fields first appear."""

    def __init__(self) -> None:
        self._kinds: dict[str, pa.DataType | None] = {}

    def look(self, lines: Iterable[bytes], *, first: bool) -> None:
        """Take in these lines; bad ones are left for the reader to reject. ``first``: they begin their file."""
        for line in lines:
            if first and line.startswith(BOM):
                line = line[len(BOM) :]
            first = False
            try:
                found = _object(line) if line.strip(_BLANK) else {}
            except BadLine:
                continue
            for name, value in found.items():
                self._kinds[name] = _widened(self._kinds.get(name), value)

    @property
    def kinds(self) -> dict[str, pa.DataType]:
        """The types; a field that was always null is a string."""
        return {name: pa.string() if kind is None else kind for name, kind in self._kinds.items()}


def _widened(kind: pa.DataType | None, value: object) -> pa.DataType | None:
    if value is None or kind == JSON_TYPE:
        return kind
    if isinstance(value, list | dict):
        return JSON_TYPE
    new = next(
        arrow
        for python, arrow in ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64()), (str, pa.string()))
        if isinstance(value, python)
    )
    if kind is None or (kind == pa.int64() and new == pa.float64()):
        return new
    return kind  # the first type stays; lines with another are the reader's to reject
