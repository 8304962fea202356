"""Places whose files were adopted: opened as stores to read from, beside the world's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from millrace.core.errors import UsageError
from millrace.core.facts import AdoptedStore, decode
from millrace.core.keys import ADOPTED
from millrace.core.model import StoreSite
from millrace.core.ports import Coordination, Store

__all__ = ["AdoptedStores", "Readable", "load_adopted"]

_PAGE: Final = 200


@dataclass(frozen=True, slots=True)
class Readable:
    """Everything that datasets are read from: the world's stores, and the places whose files were adopted.

    Attributes:
        stores: By name. Those of ``adopted`` take no writes.
        sites: Each of them as decisions see it, the world's first. For reading only: nothing is placed by these.
        adopted: The names of those that aren't the world's.
    """

    stores: Mapping[str, Store]
    sites: tuple[StoreSite, ...]
    adopted: frozenset[str]


async def load_adopted(coord: Coordination) -> dict[str, AdoptedStore]:
    """Every place whose files were adopted, by name."""
    found: dict[str, AdoptedStore] = {}
    after = ""
    while page := await coord.list(ADOPTED, after=after, limit=_PAGE):
        for entry in page:
            fact = decode(AdoptedStore, entry.value, key=entry.key)
            found[fact.name] = fact
        after = page[-1].key
    return found


class AdoptedStores:
    """The adopted stores of a world, opened once each and closed together.

    Args:
        coord: Where they are recorded.
        open_one: Opens one, sealed.
        sites: The world's: they know the jurisdiction of a site better than a record of it.
    """

    def __init__(
        self, coord: Coordination, open_one: Callable[[AdoptedStore], Store], sites: Sequence[StoreSite]
    ) -> None:
        self._coord = coord
        self._open_one = open_one
        self._jurisdictions = {(site.cloud, site.region): site.jurisdiction for site in sites}
        self._open: dict[str, tuple[AdoptedStore, Store]] = {}
        self._retired: list[Store] = []

    async def beside(self, stores: Mapping[str, Store], sites: Sequence[StoreSite]) -> Readable:
        """The world's own stores and sites with the adopted ones, as they are recorded now.

        A place that can't be opened here (its library is missing) is left out; who reads from it is told that it
        isn't there.
        """
        adopted: dict[str, Store] = {}
        places: list[StoreSite] = []
        for name, fact in (await load_adopted(self._coord)).items():
            store = None if name in stores else self._opened(fact)
            if store is not None:
                adopted[name] = store
                law = self._jurisdictions.get((fact.cloud, fact.region), fact.jurisdiction)
                places.append(StoreSite(name, fact.cloud, fact.region, law))
        return Readable({**stores, **adopted}, (*sites, *places), frozenset(adopted))

    async def aclose(self) -> None:
        """Close all that were opened."""
        for store in (*self._retired, *(store for _, store in self._open.values())):
            await store.aclose()
        self._retired.clear()
        self._open.clear()

    def _opened(self, fact: AdoptedStore) -> Store | None:
        known, store = self._open.get(fact.name, (None, None))
        if store is None or known != fact:
            if store is not None:
                self._retired.append(store)  # somebody may be reading from it
            try:
                store = self._open_one(fact)
            except UsageError:
                self._open.pop(fact.name, None)
                return None
            self._open[fact.name] = (fact, store)
        return store
