"""What a transfer library registers of a layout, and plans as addresses."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch

import pd_fsm
from pd_fsm import RawBuffer
from pd_fsm.core.wire import pack_pages
from pd_fsm.kv import KVLayout, Plan, make_plan
from pd_fsm.kv.registration import AddressTable, Block, Copies, batches_of, blocks_to_register, copies_of


def raw(address: int, items: int, item_bytes: int = 16, device: int | None = None) -> RawBuffer:
    return RawBuffer(address, items, item_bytes, device=device)


def layout_of(*buffers: object) -> KVLayout:
    return KVLayout([pd_fsm.paged("kv", buffers, 4)])


@pytest.mark.parametrize(
    ("buffers", "align", "blocks"),
    [
        ([raw(4096, 2), raw(8192, 2)], 1, [(4096, 32, True), (8192, 32, True)]),
        ([raw(4128, 2), raw(4096, 2)], 1, [(4096, 64, True)]),  # neighbours, whatever their order
        ([raw(4096, 8), raw(4112, 2)], 1, [(4096, 128, True)]),  # one inside the other
        ([raw(4096, 2), raw(4112, 4)], 1, [(4096, 80, True)]),
        ([raw(4096, 2, device=0), raw(4128, 2, device=0)], 1, [(4096, 32, False), (4128, 32, False)]),  # two allocations
        ([raw(4096, 4, device=0), raw(4128, 4, device=0)], 1, [(4096, 96, False)]),
        ([raw(4096, 2), raw(4128, 2, device=0)], 1, [(4096, 32, True), (4128, 32, False)]),
        ([raw(5000, 2)], 4096, [(4096, 4096, True)]),
        ([raw(5000, 2), raw(8190, 2)], 4096, [(4096, 8192, True)]),
    ],
)
def test_regions_are_registered_as_few_blocks(buffers: list[RawBuffer], align: int, blocks: list[tuple[int, int, bool]]) -> None:
    assert blocks_to_register(layout_of(*buffers), align) == tuple(Block(*block) for block in blocks)


def test_random_layouts_are_covered_and_never_overlap() -> None:
    dice = np.random.default_rng(4)
    for _ in range(200):
        buffers = [raw(int(a), int(n)) for a, n in zip(dice.integers(1, 4000, 6), dice.integers(1, 30, 6), strict=True)]
        blocks = blocks_to_register(layout_of(*buffers), int(dice.choice([1, 64])))
        for before, after in itertools.pairwise(blocks):
            assert before.address + before.nbytes < after.address
        for buffer in buffers:
            end = buffer.address + buffer.items * buffer.item_bytes
            assert any(b.address <= buffer.address and end <= b.address + b.nbytes for b in blocks)


def test_tensors_arrays_and_raw_memory_make_the_same_layout() -> None:
    tensor = torch.zeros((6, 4, 8), dtype=torch.uint8)
    array = tensor.numpy()
    same = RawBuffer(tensor.data_ptr(), 6, 32, owner=tensor, dtype="uint8")
    layouts = [layout_of(buffer) for buffer in (tensor, array, same)]
    assert len({layout.infos() for layout in layouts}) == 1
    assert {blocks_to_register(layout) for layout in layouts} == {(Block(tensor.data_ptr(), 192, True),)}
    layouts[2].regions[0].bytes_view()[:] = 7
    assert tensor.sum() == 7 * 192


@pytest.mark.parametrize("bad", [raw(0, 1), raw(4096, 0), raw(4096, 1, item_bytes=0)])
def test_raw_memory_that_is_none_is_refused(bad: RawBuffer) -> None:
    with pytest.raises(pd_fsm.ConfigError, match="at least 1"):
        layout_of(bad)


def table(*regions: tuple[int, int]) -> AddressTable:
    return AddressTable(np.array([a for a, _ in regions], np.uint64), np.array([n for _, n in regions], np.int64))


def plan(*rows: tuple[int, int, int, int]) -> Plan:
    region, source, destination, nbytes = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return Plan(region.astype(np.int32), source, destination, nbytes, int(nbytes.sum()))


def triples(copies: Copies) -> list[tuple[int, int, int]]:
    return list(zip(copies.source.tolist(), copies.destination.tolist(), copies.nbytes.tolist(), strict=True))


def test_a_plan_becomes_addresses_and_long_copies_are_cut() -> None:
    local, remote = table((1000, 100), (5000, 100)), table((2000, 100), (9000, 60))
    made = copies_of(plan((0, 0, 10, 25), (1, 50, 0, 10), (1, 7, 7, 0), (1, 60, 50, 10)), local, remote, 10)
    assert triples(made) == [
        (1000, 2010, 10), (1010, 2020, 10), (1020, 2030, 5), (5050, 9000, 10), (5060, 9050, 10)
    ]  # fmt: skip
    parts = [triples(part) for part in batches_of(made, 2, 20)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [len(list(part)) for part in (batches_of(made, 9, 10), batches_of(made, 9, 1))] == [5, 5]


@pytest.mark.parametrize("row", [(0, 90, 0, 11), (1, 0, 55, 6), (0, -1, 0, 4), (0, 0, -1, 4), (0, 0, 0, -1)])
def test_a_plan_that_leaves_a_region_is_refused(row: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="beyond the"):
        copies_of(plan(row), table((1000, 100), (5000, 100)), table((2000, 100), (9000, 60)), 1 << 20)


@pytest.mark.parametrize("regions", [[(0, 4)], [(1 << 57, 4)], [(4096, 0)], [(4096, -3)], [(4096, 1 << 62)]])
def test_a_table_that_no_machine_has_is_refused(regions: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="that no memory has"):
        table(*regions)
    with pytest.raises(ValueError, match="addresses for"):
        AddressTable(np.ones(2, np.uint64), np.ones(1, np.int64))


def test_sixteen_thousand_blocks_cost_less_than_ten_milliseconds() -> None:
    """Random pages, no two neighbours: from page numbers to lists of addresses, as a library takes them."""
    pages = np.random.default_rng(1).permutation(512)[:256] * 2
    layout = layout_of(*[raw((1 << 32) + n * (1 << 26), 1024, 1 << 16) for n in range(64)])
    own = AddressTable.of(layout)
    took = []
    for _ in range(7):
        began = time.perf_counter()
        made = make_plan(layout, (("kv", pack_pages(pages), pack_pages(pages[::-1])),), None)
        parts = [triples(part) for part in batches_of(copies_of(made, own, own, 1 << 26), 512, 1 << 26)]
        took.append(time.perf_counter() - began)
        assert sum(map(len, parts)) == 16_384
    assert min(took) < 0.010, took
