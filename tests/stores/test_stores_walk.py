"""Listing a directory tree: links, odd names, what can't be read, and what is left out."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.core.errors import AccessDenied, NotFound, StoreError
from millrace.stores.keys import HIDDEN_DIR
from millrace.stores.local import LocalStore


def keys_of(
    root: Path,
    prefix: str = "",
    *,
    follow_symlinks: bool = True,
    prune: Callable[[str], bool] | None = None,
    on_broken: Callable[[str, StoreError], None] | None = None,
    must_exist: bool = False,
) -> list[str]:
    async def main() -> list[str]:
        store = LocalStore(
            root,
            name="disk",
            follow_symlinks=follow_symlinks,
            prune=prune,
            on_broken=on_broken,
            must_exist=must_exist,
        )
        try:
            return sorted([info.key async for page in store.list(prefix) for info in page])
        finally:
            await store.aclose()

    return asyncio.run(main())


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def test_pages_are_bounded_and_complete(tmp_path: Path) -> None:
    for number in range(5000):
        (tmp_path / f"{number:04d}").touch()

    async def main() -> None:
        store = LocalStore(tmp_path, name="disk")
        pages = [page async for page in store.list()]
        assert len(pages) == 2
        assert len({info.key for page in pages for info in page}) == 5000
        await store.aclose()

    asyncio.run(main())


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    assert keys_of(tmp_path / "none") == []
    assert keys_of(tmp_path, "none/of/it") == []
    with pytest.raises(NotFound, match="there is no directory"):
        keys_of(tmp_path / "none", must_exist=True)
    make(tmp_path, "file")
    assert keys_of(tmp_path / "file") == []
    with pytest.raises(NotFound, match="there is no directory"):
        keys_of(tmp_path / "file", must_exist=True)
    assert keys_of(tmp_path, "file/below", must_exist=True) == []


def test_pruned_directories_are_not_entered(tmp_path: Path) -> None:
    make(tmp_path, "keep/a", "keep/skip/b", "skip/c", "d")
    asked = []

    def prune(relative: str) -> bool:
        asked.append(relative)
        return relative.endswith("skip")

    assert keys_of(tmp_path, prune=prune) == ["d", "keep/a"]
    assert sorted(asked) == ["keep", "keep/skip", "skip"]


def test_links_are_followed_or_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "root/real/a", "outside/b")
    (tmp_path / "root/file").symlink_to("real/a")
    (tmp_path / "root/dir").symlink_to("../outside")
    assert keys_of(tmp_path / "root") == ["dir/b", "file", "real/a"]
    assert keys_of(tmp_path / "root", follow_symlinks=False) == ["real/a"]
    (tmp_path / "alias").symlink_to("root")
    assert keys_of(tmp_path / "alias") == ["dir/b", "file", "real/a"]


@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_into_its_own_ancestor_is_named(tmp_path: Path, target: str) -> None:
    make(tmp_path, "sub/deep/a")
    (tmp_path / "sub/deep/round").symlink_to(target)
    with pytest.raises(StoreError, match=r"'sub/deep/round'.*a link to a directory it lies in.*exclude it"):
        keys_of(tmp_path)
    broken: list[str] = []
    assert keys_of(tmp_path, on_broken=lambda relative, _: broken.append(relative)) == ["sub/deep/a"]
    assert broken == ["sub/deep/round"]
    assert keys_of(tmp_path, prune=lambda relative: relative.endswith("round")) == ["sub/deep/a"]


def test_two_links_into_each_other_end(tmp_path: Path) -> None:
    make(tmp_path, "a/1", "b/2")
    (tmp_path / "a/to_b").symlink_to("../b")
    (tmp_path / "b/to_a").symlink_to("../a")
    broken: list[str] = []
    found = keys_of(tmp_path, on_broken=lambda relative, _: broken.append(relative))
    assert found == ["a/1", "a/to_b/2", "b/2", "b/to_a/1"]
    assert sorted(broken) == ["a/to_b/to_a", "b/to_a/to_b"]


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    make(tmp_path, "a")
    (tmp_path / "gone").symlink_to("nothing")
    with pytest.raises(NotFound, match=r"the link 'gone'.*leads to nothing"):
        keys_of(tmp_path)
    (tmp_path / "gone").unlink()
    (tmp_path / "self").symlink_to("self")
    with pytest.raises(StoreError, match=r"'self'.*leads to itself"):
        keys_of(tmp_path)
    broken: list[tuple[str, str]] = []
    assert keys_of(tmp_path, on_broken=lambda relative, error: broken.append((relative, error.key))) == ["a"]
    assert broken == [("self", "self")]


def test_names_with_spaces_newlines_and_other_letters(tmp_path: Path) -> None:
    names = sorted(["a b", "two\nlines", "日本語/é", "\N{PILE OF POO}", " lead", "tab\t"])
    make(tmp_path, *names)
    assert keys_of(tmp_path) == names


@pytest.mark.parametrize("name", [b"bad\xff.txt", b"dir\xfe/inner"])
def test_a_name_that_is_not_utf8_is_named(tmp_path: Path, name: bytes) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb"):
        pass
    make(tmp_path, "good")
    first = name.split(b"/")[0]
    with pytest.raises(StoreError, match="is not valid UTF-8; rename or exclude it") as refused:
        keys_of(tmp_path)
    assert repr(first) in str(refused.value)
    str(refused.value).encode()
    broken: list[str] = []
    assert keys_of(tmp_path, on_broken=lambda relative, _: broken.append(relative)) == ["good"]
    assert [os.fsencode(relative) for relative in broken] == [first]
    if b"/" in name:
        assert keys_of(tmp_path, prune=lambda relative: relative.startswith("dir")) == ["good"]


def test_a_directory_without_permission_is_named() -> None:
    with tempfile.TemporaryDirectory(prefix="millrace-test-") as made:
        root = Path(made)
        make(root, "a", "closed/b")
        root.chmod(0o755)
        (root / "closed").chmod(0)
        is_root = os.geteuid() == 0
        if is_root:  # to whom permissions mean nothing
            os.seteuid(65534)
        try:
            with pytest.raises(AccessDenied, match=r"permission denied to read 'closed'.*exclude it"):
                keys_of(root)
            broken: list[str] = []
            assert keys_of(root, on_broken=lambda relative, _: broken.append(relative)) == ["a"]
            assert broken == ["closed"]
            assert keys_of(root, prune=lambda relative: relative == "closed") == ["a"]
        finally:
            if is_root:
                os.seteuid(0)
            (root / "closed").chmod(0o700)


def test_temporary_files_are_never_listed(tmp_path: Path) -> None:
    make(tmp_path, f"{HIDDEN_DIR}/x.part", f"inner/{HIDDEN_DIR}/lock", "inner/a")
    assert keys_of(tmp_path) == ["inner/a"]


def test_a_deep_tree(tmp_path: Path) -> None:
    here = tmp_path
    for number in range(150):
        here = here / f"d{number}"
    here.mkdir(parents=True)
    (here / "leaf").touch()
    (found,) = keys_of(tmp_path)
    assert found.endswith("d149/leaf")
