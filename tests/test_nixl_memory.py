"""Plans as items and blocks for NIXL, and descriptors that peers send."""

from __future__ import annotations

from typing import Any

import attrs
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pd_fsm
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan
from pd_fsm.transports.nixl_memory import (
    Blocks,
    Memory,
    Route,
    agent_incarnation,
    agent_name,
    blocks_of,
    local_memory,
    pack_descriptor,
    transfers_of,
    unpack_descriptor,
)

PEER, OTHER = b"D" * 16, b"E" * 16
PROBE = 4096
SIZES = ((8, 16), (8, 16), (5, 48), (12, 3))  # (items, item bytes) of each region


def memory(base: int, sizes: tuple[tuple[int, int], ...] = SIZES, mem: tuple[int, ...] = ()) -> Memory:
    """Regions far apart from each other, of host memory or as `mem` says."""
    items, item_bytes = (np.array(column, dtype=np.int64) for column in zip(*sizes, strict=True))
    address = (base + np.arange(len(sizes)) * 0x10000).astype(np.uint64)
    kinds = np.array(mem or (0,) * len(sizes), dtype=np.int8)
    first = np.zeros(len(sizes), dtype=np.int64)
    for kind in (0, 1):
        chosen = kinds == kind
        first[chosen] = np.cumsum(items[chosen]) - items[chosen]
    return Memory(address, items, item_bytes, np.zeros(len(sizes), dtype=np.int64), kinds, first)


def plan_of(*copies: tuple[int, int, int, int]) -> Plan:
    region, source, destination, nbytes = (np.array(column, dtype=np.int64) for column in zip(*copies, strict=True))
    return Plan(region.astype(np.int32), source, destination, nbytes, int(nbytes.sum()))


def placed(blocks: list[Blocks], route: Route) -> dict[int, int]:
    """Where each byte goes: destination address by source address."""
    moved: dict[int, int] = {}
    for block in blocks:
        for index in range(len(block)):
            source, destination, nbytes = int(block.source[index]), int(block.destination[index]), int(block.nbytes[index])
            if block.prepared:
                source, destination = (
                    _address(side, mem, item)
                    for side, mem, item in (
                        (route.local, block.source_mem, source),
                        (route.remote, block.destination_mem, destination),
                    )
                )
            for byte in range(nbytes):
                assert source + byte not in moved, "a byte is copied twice"
                moved[source + byte] = destination + byte
    return moved


def _address(side: Memory, mem: int, item: int) -> int:
    """What the library makes of an item number of a prepared list: the rows numbered through."""
    for address, item_bytes, _, stride, items in side.rows(mem).tolist():
        assert stride == item_bytes
        if item < items:
            return int(address + item * item_bytes)
        item -= items
    raise AssertionError("no such item")


def expected(plan: Plan, route: Route) -> dict[int, int]:
    moved = {}
    for region, source, destination, nbytes in zip(
        *(column.tolist() for column in (plan.region, plan.source, plan.destination, plan.nbytes)), strict=True
    ):
        begin, target = int(route.local.address[region]) + source, int(route.remote.address[region]) + destination
        moved |= {begin + byte: target + byte for byte in range(nbytes)}
    return moved


ROUTES = {
    "host to host": Route.between(memory(1 << 20), memory(1 << 24)),
    "mixed": Route.between(memory(1 << 20, mem=(0, 1, 1, 0)), memory(1 << 24, mem=(1, 1, 0, 0))),
    "more pages there": Route.between(memory(1 << 20), memory(1 << 24, tuple((items + 3, nbytes) for items, nbytes in SIZES))),
    "other pages there": Route.between(memory(1 << 20), memory(1 << 24, tuple((items, nbytes * 2) for items, nbytes in SIZES))),
}


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Copies of whole items, of runs of them, and of any bytes; each source byte at most once."""
    copies = []
    for region, (items, item_bytes) in enumerate(SIZES):
        at = 0
        while at < items and draw(st.booleans()):
            count = draw(st.integers(1, items - at))
            ragged = draw(st.booleans()) and item_bytes > 2
            destination = draw(st.integers(0, items - count)) * item_bytes
            copies.append((region, at * item_bytes + ragged, destination, count * item_bytes - 2 * ragged))
            at += count
    return plan_of(*copies) if copies else plan_of((0, 0, 0, 16))


@settings(deadline=None)
@given(plans(), st.sampled_from(sorted(ROUTES)), st.sampled_from([7, 64, 1 << 20]))
def test_blocks_move_exactly_the_plans_bytes(plan: Plan, route: str, bytes_max: int) -> None:
    chosen = ROUTES[route]
    blocks = blocks_of(plan, chosen, bytes_max)
    assert placed(blocks, chosen) == expected(plan, chosen)
    cut = [piece for block in blocks for piece in transfers_of(block, bytes_max, 3)]
    assert placed(cut, chosen) == expected(plan, chosen)
    for piece in cut:
        assert 1 <= len(piece) <= 3
        assert piece.nbytes.sum() <= bytes_max or len(piece) == 1


def test_whole_items_go_by_prepared_lists_and_what_is_not_by_plain_blocks() -> None:
    route = ROUTES["host to host"]
    assert [block.prepared for block in blocks_of(plan_of((0, 16, 32, 16), (2, 48, 0, 96)), route, 1 << 20)] == [True]
    assert [block.prepared for block in blocks_of(plan_of((0, 16, 32, 8)), route, 1 << 20)] == [False]
    assert [block.prepared for block in blocks_of(plan_of((0, 16, 0, 32)), ROUTES["other pages there"], 1 << 20)] == [False]


def test_long_runs_stay_merged() -> None:
    """Written out, a run of a million pages would cost as much as a million copies."""
    sizes = ((1 << 20, 8),)
    route = Route.between(memory(1 << 30, sizes), memory(1 << 40, sizes))
    (blocks,) = blocks_of(plan_of((0, 0, 0, 8 << 20)), route, 1 << 20)
    assert not blocks.prepared
    assert len(blocks) == 8
    (few,) = blocks_of(plan_of((0, 0, 0, 8 * 100)), route, 1 << 20)
    assert few.prepared


def test_kinds_of_memory_are_kept_apart() -> None:
    route = ROUTES["mixed"]
    blocks = blocks_of(plan_of((0, 0, 0, 16), (1, 0, 0, 16), (2, 0, 0, 48), (3, 0, 0, 3)), route, 1 << 20)
    assert sorted((block.source_mem, block.destination_mem) for block in blocks) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("copy", [(0, 0, 120, 16), (0, 0, 128, 16), (3, 0, 34, 3), (2, 0, 0, 5 * 48 + 1)])
def test_nothing_goes_beyond_the_end_of_a_region_of_the_peer(copy: tuple[int, int, int, int]) -> None:
    """In a prepared list it would be the first item of the next region."""
    with pytest.raises(WireError, match="beyond the end of region"):
        blocks_of(plan_of((0, 0, 0, 16), copy), ROUTES["host to host"], 1 << 20)


def test_neighbours_in_host_memory_are_registered_as_one_block() -> None:
    whole = np.zeros((4, 6, 64), np.uint8)
    there = pd_fsm.KVLayout([pd_fsm.paged("kv", list(whole), 4), pd_fsm.paged("again", [whole[0]], 4)])
    assert local_memory(there).blocks(there, 0).tolist() == [[whole.ctypes.data, whole.nbytes, 0]]
    raw = [pd_fsm.RawBuffer(1 << 20, 6, 64, device=3), pd_fsm.RawBuffer((1 << 20) + 384, 6, 64, device=3)]
    device = pd_fsm.KVLayout([pd_fsm.paged("kv", raw, 4)])
    assert local_memory(device).blocks(device, 1).tolist() == [[1 << 20, 384, 3], [(1 << 20) + 384, 384, 3]]


# --- descriptors -------------------------------------------------------------------------------------------------------------


def layout(regions: int = 2, pages: int = 6, page_bytes: int = 64) -> pd_fsm.KVLayout:
    return pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((pages, page_bytes), np.uint8) for _ in range(regions)], 4)])


def metadata(name: str) -> bytes:
    return b"nixlSerDes|Agent" + len(name).to_bytes(8, "little") + name.encode() + b"|and the rest"


def descriptor(of: bytes = PEER, secret: bytes = b"", **changes: Any) -> bytes:
    """A good one, with some values changed before it is sealed."""
    said = local_memory(layout())
    return pack_descriptor(of, changes.pop("metadata", metadata(agent_name(of))), PROBE, attrs.evolve(said, **changes), secret)


def test_a_descriptor_arrives_as_it_was() -> None:
    there = layout()
    descriptor = pack_descriptor(PEER, metadata(agent_name(PEER)), PROBE, local_memory(there), b"")
    said, probe, seen = unpack_descriptor(descriptor, PEER, layout(), b"")
    assert probe == PROBE
    assert said == metadata(agent_name(PEER))
    assert seen.address.tolist() == [region.address for region in there.regions]
    assert seen.items.tolist() == [6, 6]
    assert seen.first.tolist() == [0, 6]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"", "malformed"),
        (b"\x90" * 50, "malformed"),
        (descriptor()[:-1], "malformed"),
        (descriptor() + b"x", "malformed"),
        (descriptor(OTHER), "not its own"),
        (descriptor(secret=b"other"), "another secret"),
        (descriptor(metadata=metadata(agent_name(OTHER))), "not of its own agent"),
        (descriptor(metadata=b"nixlSerDes|"), "not of its own agent"),
        (descriptor(items=np.array([6], dtype=np.int64)), "differ in length"),
        (descriptor(items=np.array([6, 0], dtype=np.int64)), "a size that no memory has"),
        (descriptor(items=np.array([6, -6], dtype=np.int64)), "a size that no memory has"),
        (descriptor(items=np.array([6, 1 << 62], dtype=np.int64)), "a size that no memory has"),
        (
            descriptor(items=np.array([6, 1 << 40], dtype=np.int64), item_bytes=np.array([64, 1], dtype=np.int64)),
            "more than a prepared list can number",
        ),
        (descriptor(address=np.array([0, 4096], dtype=np.uint64)), "an address that no memory has"),
        (descriptor(address=np.array([4096, 1 << 63], dtype=np.uint64)), "an address that no memory has"),
        (
            pack_descriptor(PEER, metadata(agent_name(PEER)), PROBE, local_memory(layout(regions=3)), b""),
            "it has 3 regions, this side 2",
        ),
    ],
)
def test_a_descriptor_that_makes_no_sense_is_refused(bad: bytes, why: str) -> None:
    with pytest.raises(WireError, match=why):
        unpack_descriptor(bad, PEER, layout(), b"")


def test_no_flipped_bit_reaches_the_library() -> None:
    """NIXL parses metadata in native code, and a few flipped bytes were seen to crash it."""
    good = descriptor(secret=b"shared")
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        with pytest.raises(WireError):
            unpack_descriptor(bytes(bad), PEER, layout(), b"shared")


def test_another_version_is_named() -> None:
    parts = msgspec.msgpack.decode(descriptor())
    with pytest.raises(WireError, match="has version 9, not 1"):
        unpack_descriptor(msgspec.msgpack.encode([9, *parts[1:]]), PEER, layout(), b"")


def test_only_who_knows_the_secret_is_taken() -> None:
    sealed = descriptor(secret=b"shared")
    assert unpack_descriptor(sealed, PEER, layout(), b"shared")
    for guess in (b"", b"other", b"shared" * 20):
        with pytest.raises(WireError, match="another secret"):
            unpack_descriptor(sealed, PEER, layout(), guess)


def test_agent_names_are_bound_to_the_incarnation() -> None:
    assert agent_incarnation(agent_name(PEER)) == PEER
    assert agent_name(PEER) != agent_name(OTHER)
    for foreign in ("", "pd-fsm", "pd-fsm-", "pd-fsm-44", "pd-fsm-" + "zz" * 16, "xx-" + "44" * 16):
        assert agent_incarnation(foreign) == b""
