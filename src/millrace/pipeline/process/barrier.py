"""Key barriers: ``dedup``, and the ``unique`` of ``validate``. Which rows lose is known before the chunk runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from millrace.core.errors import TransformError
from millrace.pipeline.process.keys import KeyBatch, row_keys
from millrace.pipeline.process.rows import ProcessContext, Rows

__all__ = ["KeyBarrier"]


class KeyBarrier:
    """A place where rows whose key was seen earlier in the run leave.

    Args:
        number: Which barrier of the chain, from 0.
        columns: Whose values are the key.
        rejects: Whether losers are set aside (``unique``) rather than dropped and counted (``dedup``).
    """

    def __init__(self, number: int, columns: Sequence[str], *, rejects: bool) -> None:
        self._number = number
        self._columns = tuple(columns)
        self._rejects = rejects

    @property
    def label(self) -> str:
        """``dedup: path`` or ``unique: path``."""
        return f"{'unique' if self._rejects else 'dedup'}: {', '.join(self._columns)}"

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """The rows that don't lose."""
        losers = context.losers[self._number]
        last = 0
        first = 0
        for batch in rows:
            self._require(batch)
            end = int(np.searchsorted(losers, first + batch.count))
            mask: npt.NDArray[np.bool_] = np.ones(batch.count, np.bool_)
            mask[losers[last:end] - first] = False
            last = end
            first += batch.count
            for row in np.flatnonzero(~mask).tolist():
                if self._rejects:
                    names = ", ".join(self._columns)
                    context.set_aside(
                        batch.origins, row, self.label, f"the same {names} appears earlier in the dataset"
                    )
                else:
                    context.counts.duplicates += 1
            kept = batch.keep(mask)
            if kept.count:
                yield kept
        if last != len(losers):
            raise TransformError(
                f"{self.label}: the survey of this chunk saw row {int(losers[last])} and this pass has only {first}; "
                "an earlier transform gives different output for the same input"
            )

    def survey(self, rows: Iterator[Rows]) -> Iterator[KeyBatch]:
        """The keys of the rows that arrive."""
        first = 0
        for batch in rows:
            self._require(batch)
            try:
                yield row_keys(batch.batch, self._columns, first)
            except TransformError as error:
                raise TransformError(f"{self.label}: {error}") from error
            first += batch.count

    def _require(self, rows: Rows) -> None:
        for name in self._columns:
            if name not in rows.batch.schema.names:
                known = ", ".join(rows.batch.schema.names)
                raise TransformError(f"{self.label}: there is no column {name!r}; there are {known}")
