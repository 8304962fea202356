"""A run's ledger: which tasks are done and what is known of them, in pages of coordination keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, Final

from millrace.core.errors import CoordError
from millrace.core.keys import ledger_page, ledger_prefix
from millrace.core.messages import Failure, Phase, PhaseInputs, TaskFacts, TaskId
from millrace.core.model import StageTime
from millrace.core.ports import Coordination, Lease, Write

__all__ = ["PAGE_TASKS", "Done", "Ledger", "decode_facts", "encode_facts"]

PAGE_TASKS: Final = 32
"""Tasks on a page: a page stays under 64 KB, and half a million chunks are 16,000 keys."""
_SENTENCE_BYTES: Final = 300
_NOTES_BYTES: Final = 500
"""What sentences may take of an entry, as JSON. They are for people; what is longer stands in logs and reports."""
_WRITES_AT_ONCE: Final = 50
_PAGES_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class Done:
    """What a phase's pages hold."""

    done: tuple[tuple[int, TaskFacts], ...]
    set_aside: tuple[tuple[int, Failure], ...]


def encode_facts(facts: TaskFacts) -> dict[str, Any]:
    """JSON-safe; what is empty or zero is left out, and so are the pages, which go elsewhere."""
    raw = {k: v for k, v in asdict(facts).items() if v and k not in {"stages", "pages", "meta_pages"}}
    if facts.first_quarantined:
        raw["first_quarantined"] = _clipped(facts.first_quarantined, _SENTENCE_BYTES)
    if facts.notes:
        raw["notes"] = _few(facts.notes)
    if facts.stages:
        raw["stages"] = [[s.stage, round(s.seconds, 6), s.rows, s.bytes] for s in facts.stages]
    return raw


def decode_facts(raw: dict[str, Any]) -> TaskFacts:
    """The facts that ``encode_facts`` wrote."""
    stages = tuple(StageTime(*s) for s in raw.get("stages", ()))
    rest = {k: v for k, v in raw.items() if k not in {"stages", "notes"}}
    return TaskFacts(**rest, stages=stages, notes=tuple(raw.get("notes", ())))


class Ledger:
    """The pages of one run, as this process knows them; it is the only writer, and its lease guards that.

    Args:
        run: The run's id.
        coord: Where the pages are.
        lease: The run's lease; a write under a lost one raises ``Fenced``.
    """

    def __init__(self, run: int, coord: Coordination, lease: Lease) -> None:
        self._run = run
        self._coord = coord
        self._lease = lease
        self._pages: dict[str, dict[str, Any]] = {}
        self._dirty: dict[str, None] = {}

    async def load(self, phases: Iterable[Phase]) -> dict[str, Done]:
        """Read every page of these phases.

        Raises:
            CoordError: a page is damaged; names it.
        """
        found: dict[str, Done] = {}
        for phase in phases:
            prefix = after = ledger_prefix(self._run, phase.name)
            done: list[tuple[int, TaskFacts]] = []
            aside: list[tuple[int, Failure]] = []
            # A few pages at a time: in between, whoever keeps the lease alive has a turn.
            while entries := await self._coord.list(prefix, after=after, limit=_PAGES_AT_ONCE):
                for entry in entries:
                    self._pages[entry.key] = _page(entry.key, entry.value)
                part = self._of([entry.key for entry in entries])
                done += part.done
                aside += part.set_aside
                after = entries[-1].key
            found[phase.name] = Done(tuple(done), tuple(aside))
        return found

    def record(self, task: TaskId, facts: TaskFacts) -> None:
        """Note a finished task; ``commit`` makes it durable."""
        self._put(task, encode_facts(facts))

    def set_aside(self, task: TaskId, failure: Failure) -> None:
        """Note a quarantined chunk; ``commit`` makes it durable."""
        self._put(task, {"failure": {**asdict(failure), "message": _clipped(failure.message, 2 * _SENTENCE_BYTES)}})

    async def commit(self) -> None:
        """Write the pages that changed.

        Raises:
            Fenced: another process drives this run now.
        """
        while self._dirty:
            keys = list(self._dirty)[:_WRITES_AT_ONCE]
            writes = [Write(k, json.dumps(self._pages[k], separators=(",", ":")).encode()) for k in keys]
            await self._coord.commit(writes, guard=self._lease)
            for key in keys:
                del self._dirty[key]

    def inputs(self, phase: Phase, phases: Sequence[Phase]) -> PhaseInputs:
        """What the tasks of ``phase`` read of the phases before it."""
        if phase.kind == "persist":
            wanted = [p for p in phases if p.kind == "main"]
        elif phase.kind == "resolve":
            wanted = [p for p in phases if p.kind == "survey" and p.barrier == phase.barrier]
        else:
            limit = phase.barrier if phase.kind == "survey" else len(phases)
            wanted = [p for p in phases if p.kind == "resolve" and p.barrier < limit]
        return PhaseInputs(phase.name, tuple((p.name, self._packed(p)) for p in wanted))

    def set_aside_in(self, phase: Phase) -> tuple[tuple[int, Failure], ...]:
        """The chunks this phase set aside."""
        return self._of(self._keys(phase)).set_aside

    def facts(self, phase: Phase) -> tuple[tuple[int, TaskFacts], ...]:
        """The finished tasks of a phase."""
        return self._of(self._keys(phase)).done

    def _put(self, task: TaskId, entry: dict[str, Any]) -> None:
        key = ledger_page(self._run, task.phase, task.index // PAGE_TASKS)
        self._pages.setdefault(key, {})[str(task.index)] = entry
        self._dirty[key] = None

    def _keys(self, phase: Phase) -> list[str]:
        prefix = ledger_prefix(self._run, phase.name)
        return sorted(key for key in self._pages if key.startswith(prefix))

    def _of(self, keys: Iterable[str]) -> Done:
        """What these pages hold, by index; pages in order."""
        done: list[tuple[int, TaskFacts]] = []
        aside: list[tuple[int, Failure]] = []
        for key in keys:
            try:
                for index, entry in sorted(((int(i), e) for i, e in self._pages[key].items()), key=itemgetter(0)):
                    if "failure" in entry:
                        aside.append((index, Failure(**entry["failure"])))
                    else:
                        done.append((index, decode_facts(entry)))
            except (ValueError, TypeError, AttributeError) as error:
                raise _damaged(key, error) from error
        return Done(tuple(done), tuple(aside))

    def _packed(self, phase: Phase) -> bytes:
        """32 bytes a task: only the digests are looked at, for there may be half a million."""
        packed = bytearray(32 * phase.tasks)
        for key in self._keys(phase):
            for index, entry in self._pages[key].items():
                if "failure" not in entry:
                    at = 32 * int(index)
                    packed[at : at + 32] = bytes.fromhex(entry["output"])
        return bytes(packed)


def _few(notes: Sequence[str]) -> list[str]:
    """The first notes, as many as there is room for."""
    kept: list[str] = []
    room = _NOTES_BYTES
    for note in notes:
        kept.append(_clipped(note, min(room, _SENTENCE_BYTES)))
        room -= len(json.dumps(kept[-1]))
        if room < _SENTENCE_BYTES // 2:
            break
    return kept


def _clipped(sentence: str, json_bytes: int) -> str:
    """``sentence``, cut so that it takes at most so many bytes as JSON."""
    if len(json.dumps(sentence)) <= json_bytes:
        return sentence
    kept = sentence[:json_bytes]
    while len(json.dumps(kept)) > json_bytes - 3:
        kept = kept[: len(kept) * 3 // 4]
    return f"{kept}..."


def _page(key: str, value: bytes) -> dict[str, Any]:
    try:
        page = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _damaged(key, error) from error
    if not isinstance(page, dict):
        raise _damaged(key, "it is not a mapping")
    return page


def _damaged(key: str, why: object) -> CoordError:
    return CoordError(f"the ledger page {key} is damaged: {why}; start a new run with --fresh")
