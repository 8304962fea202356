"""A store that somebody else fills: it is read, and refuses whatever would change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from millrace.core.errors import ReadOnly
from millrace.core.ports import Bytes, Capabilities, ObjectInfo
from millrace.stores.keys import PutMode
from millrace.stores.layers.layer import Layer

__all__ = ["Sealed"]


class Sealed(Layer):
    """Passes reads on; nothing that writes reaches the store, not even a probe.

    Args:
        inner: The store wrapped.
        name: The store's name.
    """

    async def capabilities(self) -> Capabilities:
        """None of them."""
        return Capabilities(create_only=False, compare_and_swap=False)

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        """Refused.

        Raises:
            ReadOnly: always.
        """
        self._refuse(key)

    async def delete(self, key: str) -> None:
        """Refused.

        Raises:
            ReadOnly: always.
        """
        self._refuse(key)

    def _refuse(self, key: str) -> NoReturn:
        raise ReadOnly(
            f"{key!r} lies in {self.url}, whose files were adopted and are not Millrace's to change",
            store=self._name,
            key=key,
        )
