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


@attrs.frozen(eq=False)
class Grant:
    """Who may write, and the sorted item numbers for each index space (by its number in `Landing`)."""

    writers: tuple[bytes, ...]
    items: tuple[NDArray[np.int64], ...]


class Landing:
    """The grants of one session. Not thread-safe: whoever drives the session owns it."""

    def __init__(self, layout: KVLayout) -> None:
        self._views = [region.bytes_view() for region in layout.regions]
        self._spaces = sorted({component.space for component in layout.components})
        self._aux_spaces = layout.aux_spaces()
        self._space_of = np.array([self._spaces.index(layout.space_of(i)) for i in range(len(layout.regions))])
        self._item_bytes = np.array([region.item_bytes for region in layout.regions], dtype=np.int64)
        self._grants: dict[int, Grant] = {}

    def expose(self, grant: Expose) -> None:
        items = []
        for space in self._spaces:
            if space in self._aux_spaces:
                granted = np.array([grant.aux_row] if grant.aux_row >= 0 else [], dtype=np.int64)
            else:
                granted = np.sort(np.frombuffer(grant.pages[space], dtype="<i4").astype(np.int64))
            items.append(granted)
        self._grants[grant.generation] = Grant(grant.writers, tuple(items))

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
        if region.min() < 0 or region.max() >= len(self._views):
            raise WireError(f"regions must be in 0..{len(self._views) - 1}, got {region.min()}..{region.max()}")
        if nbytes.min() < 1 or offset.min() < 0 or nbytes.max() > 1 << 48 or offset.max() > 1 << 48:
            raise WireError(f"offsets {offset.min()}..{offset.max()} and lengths {nbytes.min()}..{nbytes.max()} are out of range")
        item_bytes = self._item_bytes[region]
        first = offset // item_bytes
        extent = (offset + nbytes - 1) // item_bytes - first
        spaces = self._space_of[region]
        for space in np.unique(spaces):
            chosen = spaces == space
            self._check_space(generation, int(space), grant.items[space], first[chosen], extent[chosen])

    def _check_space(
        self, generation: int, space: int, granted: NDArray[np.int64], first: NDArray[np.int64], extent: NDArray[np.int64]
    ) -> None:
        at = np.searchsorted(granted, first)
        inside = at + extent < len(granted)  # sorted and unique: first and last at this distance means all between, too
        safe = np.where(inside, at, 0)
        if (
            not len(granted)
            or not inside.all()
            or (granted[safe] != first).any()
            or (granted[safe + extent] != first + extent).any()
        ):
            raise WireError(
                f"a copy to items {first.min()}..{(first + extent).max()} of {self._spaces[space]!r} "
                f"touches items that generation {generation} does not grant"
            )

    def view(self, region: int) -> NDArray[np.uint8]:
        """All bytes of a region."""
        return self._views[region]
