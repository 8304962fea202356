"""YAML text to a spec model, with errors that point at file, line and field. Pure: the caller reads the file."""

from __future__ import annotations

import difflib
import re
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from millrace.core.errors import SpecError
from millrace.core.spec import AtField, transform_kinds

__all__ = ["locate", "parse_spec"]

M = TypeVar("M", bound=BaseModel)
Path = tuple[str | int, ...]

_BYTES_MAX: Final = 4_000_000
_VALUES_MAX: Final = 50_000
_DEPTH_MAX: Final = 50


def parse_spec(model: type[M], text: str, *, file: str) -> M:
    """Validate one YAML document against ``model``.

    Args:
        model: ``World`` or ``Pipeline``.
        text: The file's content.
        file: Its name, for messages.

    Raises:
        SpecError: one line a problem, each ``file:line: field: what is wrong``.
    """
    if len(text) > _BYTES_MAX:
        raise SpecError(f"{file}: {len(text)} characters are more than a spec can need; is it the right file?")
    lines: dict[Path, int] = {}
    try:
        _check_depth(text, file)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = _build(node, (), lines, file) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise SpecError(f"{where}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{file}: this is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(
            f"{file}:1: expected keys such as {', '.join(list(model.model_fields)[:3])}, found {_what(data)}"
        )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        problems = [_sentence(e, lines, file, model) for e in errors if not _follows(e, errors)]
        raise SpecError("\n".join(dict.fromkeys(problems))) from error


def locate(text: str, dotted: str) -> int:
    """The line, from 1, of a field such as ``transforms.2.sql`` in a document that ``parse_spec`` accepted."""
    lines: dict[Path, int] = {}
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is not None:
        _build(node, (), lines, "")
    path = tuple(int(part) if part.isdigit() else part for part in dotted.split("."))
    return _line(path, lines)


def _check_depth(text: str, file: str) -> None:
    """Refuse brackets without end before they are composed, which recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH_MAX:
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise SpecError(f"{file}:{line}: file: values are nested more than {_DEPTH_MAX} deep")


def _build(node: yaml.Node, path: Path, lines: dict[Path, int], file: str) -> Any:
    """Plain data from YAML nodes, noting the line of each path and refusing duplicate keys.

    Aliases are followed, so what a few lines can stand for is bounded here.
    """
    line = node.start_mark.line + 1
    if len(path) > _DEPTH_MAX or len(lines) > _VALUES_MAX:
        what = (
            f"values are nested more than {_DEPTH_MAX} deep" if len(path) > _DEPTH_MAX else "there are too many values"
        )
        raise SpecError(f"{file}:{line}: {_dotted(path[:3])}: {what}; an alias (*name) may repeat them")
    lines[path] = line
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise SpecError(f"{file}:{line}: {_dotted(path) or 'file'}: a key is a word, not a list or a mapping")
            key = str(key_node.value)
            if key in result:
                raise SpecError(f"{file}:{line}: {_dotted((*path, key))}: the key is given twice")
            result[key] = _build(value_node, (*path, key), lines, file)
            lines[(*path, key)] = line
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), lines, file) for i, item in enumerate(node.value)]
    try:
        return yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError) as error:
        raise SpecError(
            f"{file}:{line}: {_dotted(path)}: {node.value[:80]!r} can't be read ({error}); put text in quotes"
        ) from error


def _follows(error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Whether it only says that a list is empty because what stands in it is wrong."""
    loc = error["loc"]
    return error["type"] == "too_short" and any(
        len(e["loc"]) > len(loc) and e["loc"][: len(loc)] == loc for e in errors
    )


def _sentence(error: ErrorDetails, lines: dict[Path, int], file: str, model: type[BaseModel]) -> str:
    path = _real_path(error["loc"], lines)
    message = error["msg"].removeprefix("Value error, ")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, AtField):
        path = (*path, *cause.path)
    if error["type"] == "extra_forbidden":
        message = _unknown(str(error["loc"][-1]), model)
    elif error["type"] == "missing":
        message = "is required"
    elif error["type"] == "too_short":
        message = f"give at least {error['ctx']['min_length']}"
    elif error["type"] not in {"value_error", "transform"}:
        message = re.sub(" or instance of .*", "", message)
        message = message.replace("valid tuple", "list").replace("valid dictionary", "mapping")
        message = f"{message[0].lower()}{message[1:]}, found {_what(error['input'])}"
    return f"{file}:{_line(path, lines)}: {_dotted(path) or 'file'}: {message}"


def _unknown(key: str, model: type[BaseModel]) -> str:
    known = _known_keys(model)
    if key in known:
        return "this key does not belong here"
    close = difflib.get_close_matches(key, known, n=1)
    return "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")


def _real_path(loc: tuple[int | str, ...], lines: dict[Path, int]) -> Path:
    """Drop the words pydantic adds for union branches and for keys, which are not in the file."""
    path: Path = ()
    for i, part in enumerate(loc):
        is_last = i == len(loc) - 1
        if len(path) == 2 and path[0] == "transforms" and len(loc) > 3 and i == 2 and part in transform_kinds():
            continue  # the branch of the union; the key of the same name comes after it
        if (*path, part) in lines or (is_last and not str(part).startswith(("function-", "lax-or-strict", "[key]"))):
            path = (*path, part)
    return path


def _line(path: Path, lines: dict[Path, int]) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def _dotted(path: Path) -> str:
    return ".".join(str(p) for p in path)


def _what(value: object) -> str:
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return names.get(type(value)) or repr(value)[:80]


def _known_keys(model: type[BaseModel]) -> list[str]:
    """Every key name any model reachable from ``model`` knows: enough to suggest a spelling."""
    seen: set[type[BaseModel]] = set()
    names: list[str] = []
    queue: list[Any] = [model]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            if item in seen:
                continue
            seen.add(item)
            for name, field in item.model_fields.items():
                names.append(field.alias or name)
                queue.append(field.annotation)
        else:
            queue.extend(getattr(item, "__args__", ()))
            queue.extend(m for m in getattr(item, "__metadata__", ()) if isinstance(m, type))
    return names
