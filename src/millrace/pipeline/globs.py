"""Which paths of a source are read: include and exclude globs, compiled once.

``*`` is any run of characters but ``/``, ``?`` one of them, ``[a-z]`` and ``[!a-z]`` one of a set; ``**`` as a
whole part of the path is any number of folders, also none (``**/*.py`` matches ``a.py``), and elsewhere any
characters at all, ``/`` too. A pattern that ends in ``/`` means everything below. Case counts, dot files are
like all others, and there is no escape but a set: ``[*]`` is a star.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.core.errors import UsageError
from millrace.core.spec import Source

__all__ = ["PathFilter", "path_filter"]


@dataclass(frozen=True, slots=True)
class _Glob:
    """One pattern, by parts. ``anywhere`` marks the parts that may hold any number of folders."""

    parts: tuple[str, ...]
    compiled: tuple[re.Pattern[str], ...]
    anywhere: tuple[bool, ...]

    @property
    def whole(self) -> str:
        """The regular expression of the whole path."""
        text = ""
        for i, part in enumerate(self.parts):
            last = i == len(self.parts) - 1
            if part == "**":
                text += ".+" if last else "(?:.+/)?"
            else:
                text += _part_regex(part, self.parts) + ("" if last else "/")
        return text

    def may_hold(self, folders: Sequence[str]) -> bool:
        """Whether some path below these folders could match."""
        states = {0}
        for folder in folders:
            following: set[int] = set()
            for state in _past_stars(states, self.parts):
                if self.parts[state] == "**":
                    following.add(state)
                elif self.anywhere[state]:
                    return True
                elif state < len(self.parts) - 1 and self.compiled[state].fullmatch(folder):
                    following.add(state + 1)
            if not following:
                return False
            states = following
        return True


def _past_stars(states: set[int], parts: tuple[str, ...]) -> set[int]:
    reached = set(states)
    for state in states:
        at = state
        while parts[at] == "**" and at + 1 < len(parts):
            at += 1
            reached.add(at)
    return reached


def _part_regex(part: str, pattern: Sequence[str]) -> str:
    text, i = "", 0
    while i < len(part):
        letter = part[i]
        i += 1
        if letter == "*":
            run = i
            while i < len(part) and part[i] == "*":
                i += 1
            text += ".*" if i > run else "[^/]*"
        elif letter == "?":
            text += "[^/]"
        elif letter == "[":
            end = part.find("]", i + (2 if part[i : i + 1] in {"!", "^"} else 1))
            if end < 0:
                text += re.escape(letter)
            else:
                text += _set_regex(part[i:end], pattern)
                i = end + 1
        else:
            text += re.escape(letter)
    return text


def _set_regex(inside: str, pattern: Sequence[str]) -> str:
    negated = inside[:1] in {"!", "^"}
    letters = inside[1:] if negated else inside
    items, i = "", 0
    while i < len(letters):
        if letters[i + 1 : i + 2] == "-" and i + 2 < len(letters):
            low, high = letters[i], letters[i + 2]
            if low > high:
                glob = "/".join(pattern)
                raise UsageError(f"the glob {glob!r} has the range {low}-{high}, which is empty; write {high}-{low}")
            items += f"{re.escape(low)}-{re.escape(high)}"
            i += 3
        else:
            items += re.escape(letters[i])
            i += 1
    return f"(?!/)[{'^' if negated else ''}{items}]"


def _glob(pattern: str) -> _Glob:
    text = pattern
    while text.startswith(("./", "/")):
        text = text.removeprefix("./").removeprefix("/")
    if text.endswith("/"):
        text += "**"
    if not text:
        raise UsageError(f"the glob {pattern!r} is empty; '**' means everything")
    parts: list[str] = []
    for part in text.split("/"):
        if not (part == "**" and parts and parts[-1] == "**"):
            parts.append(part)
    whole = tuple(parts)
    compiled = tuple(re.compile(_part_regex(part, whole), re.DOTALL) for part in whole)
    return _Glob(whole, compiled, tuple("**" in part for part in whole))


def _one_regex(globs: Sequence[_Glob]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{glob.whole})" for glob in globs), re.DOTALL)


@dataclass(frozen=True, slots=True)
class PathFilter:
    """The compiled globs of one source. Paths are relative to the source, with ``/`` between parts."""

    included: re.Pattern[str] | None
    excluded: re.Pattern[str] | None
    pruned: re.Pattern[str] | None
    globs: tuple[_Glob, ...]

    def includes(self, path: str) -> bool:
        """Whether an include matches (or there is none)."""
        return self.included is None or self.included.fullmatch(path) is not None

    def excludes(self, path: str) -> bool:
        """Whether an exclude matches."""
        return self.excluded is not None and self.excluded.fullmatch(path) is not None

    def matches(self, path: str) -> bool:
        """Whether the object is part of the source."""
        return self.includes(path) and not self.excludes(path)

    def dir_pruned(self, folder: str) -> bool:
        """Whether no path below ``folder`` can match, so that a listing need not go in."""
        if not folder:
            return False
        if self.pruned is not None and self.pruned.fullmatch(folder) is not None:
            return True
        return bool(self.globs) and not any(glob.may_hold(folder.split("/")) for glob in self.globs)


def path_filter(source: Source) -> PathFilter:
    """Compile a source's globs.

    Raises:
        UsageError: a glob makes no sense; names it.
    """
    include = tuple(_glob(pattern) for pattern in source.include)
    exclude = tuple(_glob(pattern) for pattern in source.exclude)
    below: list[_Glob] = []
    for glob in exclude:
        if glob.parts[-1] == "**":
            # What ``a/**`` excludes lies below every folder that ``a`` or ``a/**`` matches.
            below.append(glob)
            if len(glob.parts) > 1:
                below.append(_glob("/".join(glob.parts[:-1])))
    return PathFilter(
        _one_regex(include) if include else None,
        _one_regex(exclude) if exclude else None,
        _one_regex(below) if below else None,
        include,
    )
