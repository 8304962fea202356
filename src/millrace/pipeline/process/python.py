"""``python``: a user's function, RecordBatch to RecordBatch."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from millrace.core.errors import Nondeterministic, SpecError, TransformError
from millrace.core.spec import PythonTransform
from millrace.pipeline.process.isolate import RecordFault, isolate
from millrace.pipeline.process.plain import plain_batch
from millrace.pipeline.process.repeat import require_same
from millrace.pipeline.process.rows import ProcessContext, Rows, cut

__all__ = ["PythonStep", "load"]


def load(name: str, base: Path, where: str) -> Callable[[pa.RecordBatch], Any]:
    """Import ``module:function``. The folder it lies in is on ``sys.path`` already.

    Args:
        name: As in the spec.
        base: The pipeline file's folder, for messages.
        where: The field in the spec, for messages.

    Raises:
        SpecError: there is no such module or function, or it can't be called.
        TransformError: the module raised as it was imported.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise SpecError(
                f"{where}: there is no module {error.name!r} in {base} or among the installed packages"
            ) from error
        raise SpecError(f"{where}: {module_name} needs the module {error.name!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise TransformError(f"{where}: importing {module_name} failed with {_words(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        close = difflib.get_close_matches(function_name, [n for n in vars(module) if not n.startswith("_")], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        file = getattr(module, "__file__", None) or module_name
        raise SpecError(f"{where}: there is no function {function_name!r} in {file}{hint}")
    if not callable(function) or inspect.isclass(function):
        raise SpecError(f"{where}: {name} is {_article(function)}, not a function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise SpecError(f"{where}: {name} must be a plain function that returns one RecordBatch, not async or yielding")
    found: Callable[[pa.RecordBatch], Any] = function
    return found


class PythonStep:
    """One ``python`` transform."""

    def __init__(self, transform: PythonTransform, base: Path, where: str) -> None:
        self._transform = transform
        self._function = load(transform.python, base, where)

    @property
    def label(self) -> str:
        """``python m:f``."""
        return f"python {self._transform.python}"

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """Rows in, rows out.

        Raises:
            TransformError: it returned what it must not, or fails on records together and on none alone.
            Nondeterministic: a sampled batch came out differently the second time.
        """
        rule = f"python: {self._transform.python}"
        expected: pa.Schema | None = None
        for index, batch in enumerate(rows):
            twice = context.is_sampled(index)

            def attempt(part: Rows, twice: bool = twice) -> tuple[Rows, pa.RecordBatch]:
                return part, self._call(part, context, twice=twice)

            found = isolate(batch, attempt, label=self.label)
            for fault, reason in found.faults:
                context.set_aside(fault.origins, 0, rule, reason)
            for part, result in found.results:
                expected = expected or result.schema
                self._same_schema(expected, result.schema)
                yield from cut(Rows(result, part.origins.lost(result, context.chunk)))

    def _call(self, rows: Rows, context: ProcessContext, *, twice: bool) -> pa.RecordBatch:
        result = self._checked(self._guarded(rows, context))
        if twice:
            try:
                again = self._checked(self._guarded(rows, context))
            except RecordFault as fault:
                raise Nondeterministic(
                    f"{self.label} gives different output for the same input: it went well once and failed the next "
                    f"time with {fault.reason}"
                ) from fault
            require_same(result, again, label=self.label, rows=rows, ctx=context)
        return result

    def _guarded(self, rows: Rows, context: ProcessContext) -> object:
        with context.deadline(self.label, self._transform.timeout):
            try:
                return self._function(rows.batch)
            except (Exception, SystemExit) as error:
                raise RecordFault(_words(error)) from error

    def _checked(self, result: object) -> pa.RecordBatch:
        if not isinstance(result, pa.RecordBatch):
            hint = "; use table.combine_chunks().to_batches()[0]" if isinstance(result, pa.Table) else ""
            kind = type(result)
            name = (
                kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__.split('.')[0]}.{kind.__name__}"
            )
            raise TransformError(f"{self.label} returned {name}, not a pyarrow.RecordBatch{hint}")
        names = result.schema.names
        double = next((n for i, n in enumerate(names) if n in names[:i]), None)
        if double is not None:
            raise TransformError(f"{self.label} returned two columns called {double!r}")
        if not names:
            raise TransformError(f"{self.label} returned a batch without columns")
        try:
            result.validate(full=True)
            return plain_batch(result)
        except pa.ArrowException as error:
            raise TransformError(f"{self.label} returned a malformed batch: {_line(error)}") from error

    def _same_schema(self, expected: pa.Schema, found: pa.Schema) -> None:
        if expected.equals(found):
            return
        first = f"as the chunk's first batch has it ({', '.join(expected.names)})"
        for field in expected:
            if field.name not in found.names:
                raise TransformError(f"{self.label} left out column {field.name!r} in a later batch of the chunk")
            other = found.field(field.name)
            if not other.equals(field):
                raise TransformError(
                    f"{self.label}: column {field.name!r} is {_kind(field)} in the chunk's first batch and "
                    f"{_kind(other)} in a later one; give its type, as in pa.array(values, pa.{field.type})"
                )
        for name in found.names:
            if name not in expected.names:
                raise TransformError(f"{self.label} added column {name!r} in a later batch of the chunk")
        raise TransformError(f"{self.label}: the columns of a later batch are not in the same order {first}")


def _kind(field: pa.Field) -> str:
    return str(field.type) if field.nullable else f"{field.type} (not null)"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}".rstrip(": ")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _article(value: object) -> str:
    return "a class" if inspect.isclass(value) else f"of type {type(value).__name__}"
