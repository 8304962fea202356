"""What is different about files that were adopted: they lie under keys of their own, and are not ours to write."""

from __future__ import annotations

from collections.abc import Collection

from millrace.catalog.versions import label
from millrace.core.facts import ReplicaEntry, VersionRecord
from millrace.core.keys import manifest_key, segment_key
from millrace.core.model import Digest, shard_key
from millrace.core.spec import Placement

__all__ = ["IN_PLACE", "is_in_place", "lost_words", "not_ours"]

IN_PLACE = Placement(replicas=1, min_clouds=1)
"""What is held against a file that was adopted: that it is there. Copies of it are whoever's it is to make."""


def is_in_place(entry: ReplicaEntry, adopted: Collection[str] = ()) -> bool:
    """Whether an object is a file that was adopted and nothing else.

    Millrace names its own by digest. A file that is named so too, since it was adopted from a store of another world,
    is known by where it lies.

    Args:
        entry: The object.
        adopted: Names of the places whose files were adopted.
    """
    digest = Digest(entry.digest)
    is_named_otherwise = entry.key not in {shard_key(digest), segment_key(digest), manifest_key(digest)}
    return is_named_otherwise or (bool(entry.stores) and all(name in adopted for name in entry.stores))


def lost_words(version: VersionRecord) -> str:
    """What to do about an object of which no whole copy is left."""
    adopted = version.lineage.spec.get("adopt")
    give_up = f"or give this version up with 'millrace rm {label(version)}'"
    if adopted is None:
        return (
            "no whole copy is left in any store; run the pipeline again with --fresh, which makes the same object "
            f"anew, {give_up}"
        )
    again = f"'millrace adopt {adopted.get('url')} --name {version.dataset}'"
    return (
        f"no whole copy is left in any store; put the file back as it was, adopt what is there now with {again}, "
        f"{give_up}"
    )


def not_ours(version: VersionRecord) -> str:
    """Why a repair does nothing about a file that was adopted."""
    return (
        f"the file was adopted where it lies and is not Millrace's to write; {lost_words(version).partition('; ')[2]}"
    )
