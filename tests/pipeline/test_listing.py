from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import SourceError, UsageError
from millrace.core.model import SourceObject
from millrace.core.ports import ObjectInfo
from millrace.core.spec import Source
from millrace.pipeline.globs import path_filter
from millrace.pipeline.listing import Listing, list_source
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryStore


def source(include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Source:
    return Source(url="file://./data", format="text", include=tuple(include), exclude=tuple(exclude))


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.py", ["a.py", ".py", ".a.py"], ["a/b.py", "a.pyc", "A.PY"]),
        ("**/*.py", ["a.py", "a/b.py", "a/b/c.py", ".x/y.py"], ["a.txt", "a/b"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "ab/c", "b/a/c"]),
        ("**", ["a", "a/b"], []),
        ("a/**/z", ["a/z", "a/b/z", "a/b/c/z"], ["az", "a/bz", "z"]),
        ("**/data/**", ["data/x", "a/data/x/y"], ["data", "mydata/x"]),
        ("?.txt", ["a.txt", "é.txt", "\n.txt"], ["ab.txt", "/.txt"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "x"]),
        ("[!a-c]x", ["dx"], ["ax", "/x"]),
        ("[^a]x", ["bx", "^x"], ["ax"]),
        ("[]]x", ["]x"], ["x"]),
        ("[*]x", ["*x"], ["ax"]),
        ("[x", ["[x"], ["x"]),
        ("./a/", ["a/b", "a/b/c"], ["a"]),
        ("/a", ["a"], ["b/a"]),
        ("**.py", ["a.py", "a/b.py"], ["a.txt"]),
        ("a+b(c).{x,y}", ["a+b(c).{x,y}"], ["aab(c).x"]),
        ("with space\n.txt", ["with space\n.txt"], []),
    ],
)
def test_a_glob_means_what_it_says(glob: str, yes: list[str], no: list[str]) -> None:
    wanted = path_filter(source([glob]))
    assert [p for p in yes if not wanted.matches(p)] == []
    assert [p for p in no if wanted.matches(p)] == []


@pytest.mark.parametrize("glob", ["", "./", "[z-a]"])
def test_a_senseless_glob_is_named(glob: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(glob))):
        path_filter(source([glob]))


_parts = st.sampled_from(["a", "b", "ab", ".c"])
_paths = st.lists(_parts, min_size=1, max_size=4).map("/".join)
_globs = st.lists(st.sampled_from(["a", "b", "*", "**", "?", "a*", "**b"]), min_size=1, max_size=4).map("/".join)


@given(st.lists(_globs, max_size=3), st.lists(_globs, max_size=3), _paths)
def test_a_pruned_folder_holds_nothing_that_matches(include: list[str], exclude: list[str], path: str) -> None:
    wanted = path_filter(source(include, exclude))
    parts = path.split("/")
    if wanted.matches(path):
        assert not any(wanted.dir_pruned("/".join(parts[:i])) for i in range(len(parts)))


def test_folders_that_cannot_match_are_pruned() -> None:
    wanted = path_filter(source(["src/**/*.py", "*.md"], ["**/node_modules/**", "src/old/"]))
    assert [
        d for d in ("docs", "src", "src/a", "src/old", "src/node_modules", "src/old/x") if wanted.dir_pruned(d)
    ] == [
        "docs",
        "src/old",
        "src/node_modules",
        "src/old/x",
    ]


def listed(store: MemoryStore | LocalStore, src: Source) -> Listing:
    return asyncio.run(list_source(store, src))


async def filled(*keys: str) -> MemoryStore:
    store = MemoryStore()
    for key in keys:
        await store.put(key, [key.encode()])
    return store


def test_objects_come_in_the_order_of_their_bytes_with_size_and_version() -> None:
    keys = ["b", "a/z", "a", "é", "z", "ﬀ", "😀", "a b", "a\nb", ".hidden", "a/.git/x"]
    store = asyncio.run(filled(*keys))
    objects = list(listed(store, source()))
    assert [o.path for o in objects] == sorted(keys, key=str.encode)
    assert [o.size_bytes for o in objects] == [len(o.path.encode()) for o in objects]
    assert [o.version for o in objects] == [str(keys.index(o.path) + 1) for o in objects]


def test_progress_hears_what_was_seen() -> None:
    store = asyncio.run(filled(*(f"{i}.txt" for i in range(2500))))
    seen: list[int] = []
    listing = asyncio.run(list_source(store, source(["1*"]), progress=seen.append))
    assert seen == [1000, 2000, 2500]
    assert len(listing) == 1111


def test_a_source_with_nothing_in_it_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match=r"file://\./data has no objects"):
        listed(asyncio.run(filled()), source())


def test_globs_that_leave_nothing_say_what_they_left_out() -> None:
    store = asyncio.run(filled("a.txt", "b.txt", "c.py"))
    with pytest.raises(UsageError, match=r"of 3 objects seen, 2 match no include \('\*\.py'\) and 1 match an exclude"):
        listed(store, source(["*.py"], ["c*"]))


def test_a_directory_on_disk(tmp_path: Path) -> None:
    for name in ("a b.txt", "ü/näme.txt", "new\nline.txt", ".dot/.x", "skip/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    src = source(exclude=["skip/**"])
    (tmp_path / "skip").chmod(0)
    store = LocalStore(tmp_path, name="src", prune=path_filter(src).dir_pruned)
    try:
        assert [o.path for o in listed(store, src)] == [".dot/.x", "a b.txt", "new\nline.txt", "ü/näme.txt"]
    finally:
        (tmp_path / "skip").chmod(0o700)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"file://\./data can't be read"):
        listed(LocalStore(tmp_path / "none", name="src", must_exist=True), source())


class OneNameStore(MemoryStore):
    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        yield [ObjectInfo("ok", 1, "1", 0), ObjectInfo("caf\udce9.txt", 1, "1", 0)]


def test_a_name_that_is_not_utf8_is_named() -> None:
    with pytest.raises(SourceError, match=r"caf\\udce9\.txt', a name that is not UTF-8"):
        listed(OneNameStore(), source())
    assert [o.path for o in listed(OneNameStore(), source(exclude=["caf*"]))] == ["ok"]


def test_a_listing_is_a_sequence() -> None:
    objects = [SourceObject("a", 1, "x"), SourceObject("b", 2, "y"), SourceObject("c", 3, "")]
    listing = Listing.of(reversed(objects))
    assert list(listing) == objects
    assert list(listing[1:]) == objects[1:]
    assert listing[-1] == objects[-1]
    with pytest.raises(IndexError):
        listing[3]
    assert list(Listing.of([])) == []
