"""schema: the JSON schemas of the two files a user writes, for editors; a copy lies in ``docs/schema``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from pydantic import BaseModel

from millrace.cli.app import app
from millrace.core.spec import Pipeline, World

__all__ = ["SpecKind", "field_texts", "json_schema", "schema_text"]

_ATTRIBUTE: Final = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")
_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class SpecKind(StrEnum):
    """Which of the two files."""

    WORLD = "world"
    PIPELINE = "pipeline"


_MODELS: Final[dict[SpecKind, type[BaseModel]]] = {SpecKind.WORLD: World, SpecKind.PIPELINE: Pipeline}


@app.command()
def schema(kind: Annotated[SpecKind, typer.Argument(help="Of the world file or of a pipeline file.")]) -> None:
    """Print the JSON schema of a world or pipeline file, for editors."""
    typer.echo(schema_text(kind), nl=False)


def schema_text(kind: SpecKind) -> str:
    """The schema as it is published: two spaces of indent, a line end at its end."""
    return json.dumps(json_schema(kind), indent=2, ensure_ascii=False) + "\n"


def json_schema(kind: SpecKind) -> dict[str, Any]:
    """The JSON schema (draft 2020-12), with what the docstrings say of each field as its description.

    An editor checks spelling, types and bounds with it. What needs the whole file (whether a placement can be met,
    units of sizes) is checked by ``millrace plan``.
    """
    found = _MODELS[kind].model_json_schema(by_alias=True)
    texts = {model.__name__: field_texts(model) for model in _reachable(_MODELS[kind])}
    for part in (found, *found.get("$defs", {}).values()):
        of = texts.get(part["title"], {})
        part["description"] = part["description"].partition("\n\nAttributes:")[0].replace("``", "`")
        for name, field in part.get("properties", {}).items():
            field.pop("title", None)
            if name in of:
                field["description"] = of[name].replace("``", "`")
    return {"$schema": _DIALECT, **found, "title": f"Millrace {kind.value} file"}


def field_texts(model: type[BaseModel]) -> dict[str, str]:
    """Field name to what the ``Attributes`` section of the model's docstring says of it."""
    texts: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")
    for line in section.splitlines():
        if match := _ATTRIBUTE.match(line):
            names = match["names"].split(", ")
            texts |= dict.fromkeys(names, match["text"].strip())
        elif line.strip():  # a continued line is indented deeper
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def _reachable(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """``model`` and every model its fields are made of."""
    seen: set[type[BaseModel]] = set()
    queue: list[Any] = [model]
    while queue:
        item = queue.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            if item not in seen:
                seen.add(item)
                yield item
                queue.extend(field.annotation for field in item.model_fields.values())
        else:
            queue.extend(getattr(item, "__args__", ()))
