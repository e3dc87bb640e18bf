"""Where bytes from a peer may land: the granted pages of each exposed generation.

For data planes whose receiving side places the bytes itself. Each copy is checked against what was granted at the moment it
lands, so revoking is final: nothing that is still on its way can touch the pages afterwards. A peer's numbers are never
trusted.
"""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.core.events import Expose
from pd_fsm.errors import WireError
from pd_fsm.kv.layout import KVLayout

_largest = np.maximum.reduce


@attrs.frozen(eq=False)
class Grant:
    """Who may write, and the sorted numbers of the items granted, those of all index spaces in one row (see `Landing._base`)."""

    writers: tuple[bytes, ...]
    items: NDArray[np.int64]


class Landing:
    """The grants of one session. Not thread-safe: whoever drives the session owns it."""

    def __init__(self, layout: KVLayout) -> None:
        self._views = [region.bytes_view() for region in layout.regions]
        self._spaces = [layout.space_of(i) for i in range(len(layout.regions))]
        self._aux_spaces = layout.aux_spaces()
        self._item_bytes = np.array([region.item_bytes for region in layout.regions], dtype=np.int64)
        self._items = np.array([region.items for region in layout.regions], dtype=np.int64)
        self._base = {space: number * int(self._items.max()) for number, space in enumerate(sorted(set(self._spaces)))}
        """Where the items of each index space begin in one common numbering, so that one look-up serves all spaces."""
        self._base_of = np.array([self._base[space] for space in self._spaces], dtype=np.int64)
        self._grants: dict[int, Grant] = {}

    def expose(self, grant: Expose) -> None:
        items = []
        for space, base in self._base.items():
            if space not in self._aux_spaces:
                items.append(np.frombuffer(grant.pages[space], dtype="<i4").astype(np.int64) + base)
            elif grant.aux_row >= 0:
                items.append(np.array([grant.aux_row + base], dtype=np.int64))
        self._grants[grant.generation] = Grant(grant.writers, np.sort(np.concatenate(items)))

    def revoke(self, generation: int) -> None:
        """End an exposure; idempotent."""
        self._grants.pop(generation, None)

    def check(
        self,
        writer: bytes,
        generation: int,
        region: NDArray[np.int32],
        offset: NDArray[np.int64],
        nbytes: NDArray[np.int64],
    ) -> None:
        """Raise WireError unless every copy of `writer` lies inside items that this exposed generation grants to it.

        region: int32 [n]; offset, nbytes: int64 [n], bytes, as a peer sent them.
        """
        grant = self._grants.get(generation)
        if grant is None:
            raise WireError(f"generation {generation} is not exposed (any more)")
        if writer not in grant.writers:
            raise WireError(f"generation {generation} is not granted to {writer.hex()[:8]}")
        if not len(region) == len(offset) == len(nbytes):
            raise WireError(f"copies are {len(region)} regions, {len(offset)} offsets and {len(nbytes)} lengths")
        if not len(region):
            return
        # Seen as unsigned, a negative number is a very large one: one look at each column is enough.
        if _largest(region.view(np.uint32)) >= len(self._views):
            raise WireError(f"regions must be in 0..{len(self._views) - 1}, got {region.min()}..{region.max()}")
        if _largest((nbytes - 1).view(np.uint64)) >= 1 << 48 or _largest(offset.view(np.uint64)) > 1 << 48:
            raise WireError(f"offsets {offset.min()}..{offset.max()} and lengths {nbytes.min()}..{nbytes.max()} are out of range")
        item_bytes = self._item_bytes[region]
        first = offset // item_bytes
        last = (offset + nbytes - 1) // item_bytes
        exists = last < self._items[region]  # so a copy stays inside its own region, and its items inside their own space
        base = self._base_of[region]
        granted = grant.items
        at = np.searchsorted(granted, first + base)
        upto = at + last - first
        inside = exists & (upto < len(granted))
        at, upto = at * inside, upto * inside
        # The granted numbers are sorted and unique: with the first and the last at this distance all between are there, too.
        good = inside & (granted[at] == first + base) & (granted[upto] == last + base) if len(granted) else inside
        if not good.all():
            bad = int(np.argmin(good))
            raise WireError(
                f"a copy to items {first[bad]}..{last[bad]} of {self._spaces[region[bad]]!r} "
                f"touches items that generation {generation} does not grant"
            )

    def view(self, region: int) -> NDArray[np.uint8]:
        """All bytes of a region."""
        return self._views[region]
