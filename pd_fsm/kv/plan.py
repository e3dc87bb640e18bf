"""Copy plans: which bytes go where, for all layers at once, in numpy.

A plan is four aligned arrays over copies. Regions are numbers into the layout, which both sides share; addresses are made by
whoever owns the memory. Neighbouring pages that are neighbours on both sides become one copy. There is no Python loop over
pages.
"""

from __future__ import annotations

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.core.events import Copies
from pd_fsm.kv.layout import KVLayout


@attrs.frozen(eq=False)
class Plan:
    """`nbytes[i]` bytes from `region[i]` at `source[i]` to the same region of the other side at `destination[i]`.

    region: int32 [n] region number; source, destination, nbytes: int64 [n], in bytes. Copies of one region are adjacent.
    """

    region: NDArray[np.int32]
    source: NDArray[np.int64]
    destination: NDArray[np.int64]
    nbytes: NDArray[np.int64]
    total_bytes: int

    def __len__(self) -> int:
        return len(self.region)

    def cut(self, bytes_max: int) -> Plan:
        """The same plan with no copy longer than `bytes_max`; itself when none is."""
        if self.total_bytes <= bytes_max or self.nbytes.max() <= bytes_max:
            return self
        pieces = -(-self.nbytes // bytes_max)
        owner = np.repeat(np.arange(len(self)), pieces)
        step = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * bytes_max
        return Plan(
            self.region[owner],
            self.source[owner] + step,
            self.destination[owner] + step,
            np.minimum(self.nbytes[owner] - step, bytes_max),
            self.total_bytes,
        )


def make_plan(layout: KVLayout, copies: Copies, aux: tuple[int, int] | None) -> Plan:
    """The plan of one operation: `copies` of pages for each index space, and the aux row (source, destination) if any.

    Page numbers are trusted here: the core has checked them against both sides' layouts.
    """
    if all(len(source) <= 4 for _, source, _ in copies):
        return _one_page_plan(layout, copies, aux)
    parts = []
    for space, packed_source, packed_destination in copies:
        source = np.frombuffer(packed_source, dtype="<i4").astype(np.int64)
        destination = np.frombuffer(packed_destination, dtype="<i4").astype(np.int64)
        parts.append(_space_part(layout, space, source, destination))
    if aux is not None:
        one = np.array([aux[0]], dtype=np.int64), np.array([aux[1]], dtype=np.int64)
        parts += [_space_part(layout, space, *one) for space in layout.aux_spaces()]
    region, source, destination, nbytes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Plan(region, source, destination, nbytes, int(nbytes.sum()))


def _one_page_plan(layout: KVLayout, copies: Copies, aux: tuple[int, int] | None) -> Plan:
    """The plan of at most one page of each index space: there is nothing to merge, and arrays of a few numbers cost more to compute
    with than to write down."""
    items = [(space, int.from_bytes(s, "little"), int.from_bytes(d, "little")) for space, s, d in copies if s]
    if aux is not None:
        items += [(space, *aux) for space in layout.aux_spaces()]
    rows = [
        (region, source * nbytes, destination * nbytes, nbytes)
        for space, source, destination in items
        for region, nbytes in layout.space_items(space)
    ]
    region, source, destination, nbytes = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Plan(
        np.array(region, dtype=np.int32),
        np.array(source, dtype=np.int64),
        np.array(destination, dtype=np.int64),
        np.array(nbytes, dtype=np.int64),
        sum(nbytes),
    )


def _space_part(
    layout: KVLayout, space: str, source: NDArray[np.int64], destination: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Copies of one index space: runs of pages that are adjacent on both sides, times its regions."""
    assert len(source) == len(destination), f"{len(source)} source pages for {len(destination)} destination pages"
    regions, item_bytes = layout.space_regions(space)
    count = len(source)
    starts_run = np.ones(count, dtype=bool)
    starts_run[1:] = (np.diff(source) != 1) | (np.diff(destination) != 1)
    first = np.flatnonzero(starts_run)
    pages = np.diff(np.append(first, count))
    return (
        np.repeat(regions, len(first)),
        np.multiply.outer(item_bytes, source[first]).ravel(),
        np.multiply.outer(item_bytes, destination[first]).ravel(),
        np.multiply.outer(item_bytes, pages).ravel(),
    )
