"""Checkpoints at their edges: folders that can't be saved, manifests that were tampered with, names and steps."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.catalog.checkpoint_files import is_restored, prepare, scan
from millrace.catalog.checkpoint_manifest import (
    STEP_MAX,
    check_name,
    check_step,
    decode_manifest,
    encode_manifest,
    identity,
    json_safe,
    key_of,
    parse_key,
)
from millrace.core import keys
from millrace.core.errors import Corrupt, UsageError
from millrace.core.facts import CheckpointFile, CheckpointManifest, CheckpointPart
from millrace.core.model import Digest, digest_of

# --- folders ------------------------------------------------------------------------------------------------------


def test_files_are_found_with_links_to_them_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "b" / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "x\n\u00e9.bin").write_bytes(b"12")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "latest").symlink_to("b/x\n\u00e9.bin")
    (tmp_path / ".metadata").write_bytes(b"1")
    tree = scan(tmp_path)
    assert [(f.path, f.size_bytes) for f in tree.files] == [
        (".metadata", 1),
        ("a", 0),
        ("b/x\n\u00e9.bin", 2),
        ("latest", 2),
    ]
    assert tree.folders == ("b/empty/deep",)
    assert tree.size_bytes == 5
    (tmp_path.parent / "link").symlink_to(tmp_path)
    assert scan(tmp_path.parent / "link").files == tree.files


def _socket(root: Path) -> None:
    here = Path.cwd()
    os.chdir(root)  # a socket's whole path may have 107 letters at most
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("odd")
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: (root / "odd").symlink_to("/etc/hostname"), r"odd is a link that leads out of "),
        (lambda root: (root / "odd").symlink_to(".."), r"odd is a link that leads out of "),
        (lambda root: (root / "odd").symlink_to("nothing"), r"odd is a link to no file"),
        (lambda root: (root / "odd").symlink_to("."), r"odd is a link to no file"),
        (lambda root: (root / "odd").symlink_to("odd"), r"odd is a link to no file"),
        (lambda root: os.mkfifo(root / "odd"), r"odd is neither a file nor a folder"),
        (_socket, r"odd is neither a file nor a folder"),
        (lambda root: (root / os.fsdecode(b"odd-\xff")).touch(), r"is not a name in UTF-8"),
        (lambda root: (root / "good").unlink(), r"holds no file"),
        (lambda root: [(root / "good").unlink(), (root / "sub").mkdir()], r"holds no file"),
        (lambda root: [(root / "good").unlink(), root.rmdir()], r"state is not there"),
        (lambda root: [(root / "good").unlink(), root.rmdir(), root.touch()], r"state is not a folder"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, make: Any, says: str) -> None:
    root = tmp_path / "state"
    root.mkdir()
    (root / "good").write_bytes(b"1")
    make(root)
    with pytest.raises(UsageError, match=says):
        scan(root)


def test_a_restored_folder_is_told_from_one_that_was_changed(tmp_path: Path) -> None:
    manifest = made({"a/b": b"12", "c": b""}, folders=("a/e",))
    root = tmp_path / "out"
    prepare(root, manifest)
    assert not is_restored(root, manifest)
    (root / "a" / "b").write_bytes(b"12")
    assert is_restored(root, manifest)
    (root / "a" / "b").write_bytes(b"13")
    assert not is_restored(root, manifest)
    assert not is_restored(tmp_path / "nowhere", manifest)


# --- manifests ----------------------------------------------------------------------------------------------------


def made(files: dict[str, bytes], **more: Any) -> CheckpointManifest:
    return CheckpointManifest(
        name=more.pop("name", "run-7"),
        step=more.pop("step", 5),
        created_at_ms=more.pop("created_at_ms", 1),
        files=tuple(
            CheckpointFile(
                path=path,
                size_bytes=len(data),
                digest=digest_of(data),
                parts=tuple(
                    CheckpointPart(digest=digest_of(data[i : i + 2]), size_bytes=len(data[i : i + 2]))
                    for i in range(0, len(data), 2)
                ),
            )
            for path, data in files.items()
        ),
        **more,
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    json_values,
    st.integers(0, STEP_MAX),
    st.dictionaries(st.sampled_from(["a", "b/c", "\u00e9"]), st.binary(max_size=7)),
)
def test_what_is_written_comes_back(state: Any, step: int, files: dict[str, bytes]) -> None:
    manifest = made(files, step=step, loader_state=json_safe(state, "it"))
    data = encode_manifest(manifest)
    assert decode_manifest(data, key=key_of(manifest)) == manifest
    assert decode_manifest(memoryview(data), key=key_of(manifest)).loader_state == state
    later = manifest.model_copy(update={"created_at_ms": 9})
    assert identity(later) == identity(manifest)
    said = parse_key("run-7", key_of(manifest))
    assert said is not None
    assert (said.step, said.mark) == (step, identity(manifest)[:8])


@given(st.integers(0), st.integers(1, 255))
def test_a_flipped_bit_anywhere_is_noticed(at: int, bits: int) -> None:
    manifest = made({"a": b"123", "b": b""}, loader_state={"x": 1})
    data = bytearray(encode_manifest(manifest))
    data[at % len(data)] ^= bits
    with pytest.raises(Corrupt):
        decode_manifest(bytes(data), key=key_of(manifest))


@pytest.mark.parametrize("cut", [0, 1, 50, 100, -1])
def test_half_a_manifest_is_none(cut: int) -> None:
    manifest = made({"a": b"123"})
    with pytest.raises(Corrupt, match="is not the checkpoint's manifest that was written there"):
        decode_manifest(encode_manifest(manifest)[:cut], key=key_of(manifest))


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", "a//b", "", ".", "a/.", "a\0b", "a/"])
def test_a_manifest_does_not_reach_out_of_its_folder(path: str) -> None:
    for manifest in (made({path: b"1"}), made({"a": b"1"}, folders=(path,))):
        with pytest.raises(Corrupt, match="which is no path inside a checkpoint"):
            decode_manifest(encode_manifest(manifest), key=key_of(manifest))


def test_a_manifest_that_contradicts_itself_or_its_place_is_refused() -> None:
    good = made({"a": b"123"})
    (file,) = good.files
    for wrong in (
        file.model_copy(update={"size_bytes": 4}),
        file.model_copy(update={"parts": file.parts[:1]}),
        file.model_copy(update={"parts": (*file.parts, CheckpointPart(digest=digest_of(), size_bytes=0))}),
        made({"a": b"12"}).files[0].model_copy(update={"digest": digest_of(b"x")}),
        made({"a": b""}).files[0].model_copy(update={"digest": digest_of(b"x"), "size_bytes": 1}),
    ):
        bad = good.model_copy(update={"files": (wrong,)})
        with pytest.raises(Corrupt, match=r"don't make|is not the file"):
            decode_manifest(encode_manifest(bad), key=key_of(bad))
    other = made({"a": b"123"}, step=6)
    with pytest.raises(Corrupt, match=r"000000000005-.* holds the manifest of .*000000000006-"):
        decode_manifest(encode_manifest(other), key=key_of(good))
    newer = encode_manifest(good).replace(b"millrace-checkpoint/1", b"millrace-checkpoint/2")
    body = newer[newer.index(b'"checkpoint":') + 13 : -1]
    newer = b'{"sha256":"' + digest_of(body).encode() + b'","checkpoint":' + body + b"}"
    with pytest.raises(Corrupt, match="is no checkpoint this version can read: format"):
        decode_manifest(newer, key=key_of(good))


# --- names, steps, states -----------------------------------------------------------------------------------------


def deep(levels: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize("name", ["", "a/b", "../x", "Run", "a b", ".a", "a" * 64, None, 3, "a\n"])
def test_a_name_that_is_none_is_refused(name: object) -> None:
    with pytest.raises(UsageError, match=r"checkpoints: .*name"):
        check_name(name)


@pytest.mark.parametrize("step", [-1, STEP_MAX + 1, True, 1.0, "1", None])
def test_a_step_that_is_none_is_refused(step: object) -> None:
    with pytest.raises(UsageError, match="a checkpoint's step is"):
        check_step(step)


def test_numbers_of_other_libraries_are_steps_too() -> None:
    class Number:
        def __index__(self) -> int:
            return 7

    assert check_step(Number()) == 7
    assert check_step(STEP_MAX) == STEP_MAX


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": {1, 2}}, "not JSON serializable"),
        ({"a": float("nan")}, "not JSON compliant"),
        ({"a": (1, 2)}, "JSON would change it"),
        ({1: 2}, "JSON would change it"),
        (b"bytes", "not JSON serializable"),
        ("x" * 17_000_000, "save it as a file"),
        ({"a": "\ud800"}, "surrogates not allowed"),
        (deep(300), "recursion limit exceeded"),
        (deep(100_000), "give what JSON can hold"),
    ],
)
def test_a_loader_state_that_would_not_come_back_is_refused(state: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        json_safe(state, "the loader's state")


def test_the_keys_are_those_that_are_promised() -> None:
    digest = Digest("ab" * 32)
    assert keys.checkpoint_record("n", 3) == "checkpoints/n/000000000003"
    assert (keys.checkpoint_lease("n"), keys.checkpoint_lease("n", 3)) == (
        "checkpoints/n",
        "checkpoints/n/000000000003",
    )
    assert keys.checkpoint_manifest("n", 3, digest) == "checkpoints/n/000000000003-abababab.json"
    assert keys.checkpoint_object("n", digest) == f"checkpoints/n/objects/ab/{digest}"
    # One listing of a prefix finds all manifests, and no object.
    prefix = f"{keys.checkpoint_folder('n')}0"
    for step in (0, STEP_MAX):
        assert keys.checkpoint_manifest("n", step, digest).startswith(prefix)
    assert not keys.checkpoint_object("n", digest).startswith(prefix)
    assert parse_key("n", keys.checkpoint_object("n", digest)) is None
    assert parse_key("n", keys.checkpoint_manifest("m", 3, digest)) is None
