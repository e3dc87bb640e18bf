"""What a transfer library must register of a layout, and plans as addresses. Never touches the memory.

Libraries register blocks of memory and take addresses; a plan has region numbers and offsets. Everything here is numpy over all
copies of a plan at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.kv.layout import KVLayout
from pd_fsm.kv.plan import Plan

ADDRESS_BITS = 57
"""The widest virtual address of a 64-bit machine."""


@attrs.frozen
class Block:
    """Memory to register in one piece. `host` is False for device memory."""

    address: int
    nbytes: int
    host: bool


def blocks_to_register(layout: KVLayout, align_bytes: int = 1) -> tuple[Block, ...]:
    """The layout's regions as few blocks, in order of their addresses; no two of them overlap.

    Buffers that overlap become one block, and so do neighbours in host memory; neighbours on a device may be separate allocations,
    which no library registers as one. `align_bytes` widens each block to multiples of it, for libraries that map whole pages.
    """
    assert align_bytes > 0, align_bytes
    merged: list[Block] = []
    for region in sorted(layout.regions, key=lambda region: region.address):
        begin = region.address // align_bytes * align_bytes
        end = -(-(region.address + region.nbytes) // align_bytes) * align_bytes
        before = merged[-1] if merged else Block(0, 0, not region.host)
        reach = before.address + before.nbytes
        if before.host == region.host and (begin < reach or (begin == reach and region.host)):
            merged[-1] = Block(before.address, max(end, reach) - before.address, region.host)
        else:
            merged.append(Block(begin, end - begin, region.host))
    return tuple(merged)


@attrs.frozen(eq=False)
class AddressTable:
    """Where each region of one side begins, uint64 [R], and how long it is, int64 [R], in bytes."""

    address: NDArray[np.uint64]
    nbytes: NDArray[np.int64]

    def __attrs_post_init__(self) -> None:
        """Raises ValueError for regions that no machine has: a peer's table is not to be trusted."""
        if len(self.address) != len(self.nbytes):
            raise ValueError(f"{len(self.address)} addresses for {len(self.nbytes)} lengths")
        if (self.address == 0).any() or (self.address >> np.uint64(ADDRESS_BITS)).any():
            raise ValueError("one of the regions has an address that no memory has")
        if (self.nbytes < 1).any() or (self.nbytes > 1 << 48).any():
            raise ValueError("one of the regions has a size that no memory has")

    @classmethod
    def of(cls, layout: KVLayout) -> AddressTable:
        regions = layout.regions
        return cls(
            np.array([region.address for region in regions], dtype=np.uint64),
            np.array([region.nbytes for region in regions], dtype=np.int64),
        )


@attrs.frozen(eq=False)
class Copies:
    """`nbytes[i]` bytes, int64, from address `source[i]` to the other side's address `destination[i]`, uint64."""

    source: NDArray[np.uint64]
    destination: NDArray[np.uint64]
    nbytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.nbytes)


def copies_of(plan: Plan, local: AddressTable, remote: AddressTable, bytes_max: int) -> Copies:
    """A plan as addresses, no copy longer than `bytes_max`. Raises ValueError when it leaves a region of either side."""
    region = plan.region
    for what, offset, table in (("source", plan.source, local), ("destination", plan.destination, remote)):
        beyond = (offset < 0) | (plan.nbytes < 0) | (offset + plan.nbytes > table.nbytes[region])
        if beyond.any():
            bad = int(np.argmax(beyond))
            raise ValueError(f"bytes {offset[bad]}+{plan.nbytes[bad]} are beyond the {what}'s region {region[bad]}")
    plan = plan.cut(bytes_max)
    source = local.address[plan.region] + plan.source.astype(np.uint64)
    destination = remote.address[plan.region] + plan.destination.astype(np.uint64)
    nbytes = plan.nbytes
    if not nbytes.all():  # a copy of nothing
        some = nbytes > 0
        source, destination, nbytes = source[some], destination[some], nbytes[some]
    return Copies(source, destination, nbytes)


def batches_of(copies: Copies, copies_max: int, bytes_max: int) -> Iterator[Copies]:
    """The same copies in order, at most `copies_max` and, unless one copy alone is longer, `bytes_max` at a time."""
    ends = np.cumsum(copies.nbytes)
    begin = 0
    while begin < len(copies):
        done = int(ends[begin - 1]) if begin else 0
        end = min(max(int(np.searchsorted(ends, done + bytes_max, side="right")), begin + 1), begin + copies_max)
        part = slice(begin, end)
        yield Copies(copies.source[part], copies.destination[part], copies.nbytes[part])
        begin = end
