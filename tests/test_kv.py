"""Layouts of the engine's memory, copy plans against an oracle that labels every byte, and what a grant lets in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pd_fsm.core.events import Expose
from pd_fsm.errors import ConfigError, WireError
from pd_fsm.kv import KVLayout, Plan, make_plan, paged, rows
from pd_fsm.kv.landing import Landing

WRITER, OTHER = b"W" * 16, b"O" * 16


def packed(indices: list[int]) -> bytes:
    return np.array(indices, dtype="<i4").tobytes()


def zeros(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape, dtype=np.uint8)


# --- layouts -----------------------------------------------------------------------------------------------------------------


def test_a_layout_of_numpy_and_torch_buffers_shares_their_memory() -> None:
    array = np.zeros((10, 4, 2, 8), dtype=np.float16)
    tensor = torch.zeros((12, 4, 2, 8), dtype=torch.bfloat16)
    layout = KVLayout([paged("kv", [array, tensor], 4), rows("aux", torch.zeros((5, 3), dtype=torch.int64), zeros(6, 1))])
    assert [region.item_bytes for region in layout.regions] == [4 * 2 * 8 * 2, 4 * 2 * 8 * 2, 24, 1]
    assert [region.items for region in layout.regions] == [10, 12, 5, 6]
    assert [layout.space_of(number) for number in range(4)] == ["kv", "kv", "aux", "aux"]
    kv, aux = layout.infos()
    assert (kv.items, kv.page_size, kv.kind, kv.item_bytes) == (10, 4, "paged", (128, 128)), "as many pages as its smallest buffer"
    assert (aux.items, aux.page_size, aux.kind, aux.item_bytes) == (5, 0, "rows", (24, 1))
    layout.regions[0].bytes_view()[128:130] = np.frombuffer(np.float16(1.5).tobytes(), np.uint8)
    layout.regions[1].bytes_view()[-2:] = np.frombuffer(np.float16(1.5).tobytes(), np.uint8)
    assert array[1, 0, 0, 0] == 1.5
    assert tensor[11, 3, 1, 7] != 0
    assert tensor[11, 3, 1, 6] == 0


def test_a_view_keeps_its_buffer_alive() -> None:
    import gc
    import weakref

    array = zeros(4, 4).copy()
    alive = weakref.ref(array)
    view = KVLayout([paged("kv", [array], 1)]).regions[0].bytes_view()
    del array
    gc.collect()
    assert alive() is not None
    view[:] = 7
    del view
    gc.collect()
    assert alive() is None


def test_slices_of_one_big_buffer_are_regions() -> None:
    big = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    layout = KVLayout([paged("kv", list(big), 1)])
    assert layout.regions[1].bytes_view().tolist() == big[1].ravel().tolist()


@pytest.mark.parametrize(
    ("buffer", "complaint"),
    [
        (zeros(4, 8)[:, ::2], "C-contiguous"),
        (np.asfortranarray(zeros(4, 8)), "C-contiguous"),
        (torch.zeros(4, 8).T, "C-contiguous"),
        (np.uint8(3), "numpy array or a RawBuffer is needed"),
        (np.zeros((), np.uint8), "dimension 0"),
        (torch.zeros(()), "dimension 0"),
        ([[1, 2], [3, 4]], "is a list"),
        (b"bytes", "is a bytes"),
        (zeros(0, 8), "holds no bytes"),
        (zeros(8, 0), "holds no bytes"),
        (np.empty((4, 2), dtype=object), "objects"),
        (np.frombuffer(bytes(16), np.uint8).reshape(4, 4), "read-only"),
    ],
)
def test_buffers_that_cannot_be_used_are_refused(buffer: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"component 'kv', buffer 1.*{complaint}"):
        paged("kv", [zeros(4, 8), buffer], 16)


@pytest.mark.parametrize("buffer", [zeros(4, 8), torch.zeros((4, 8))])
def test_a_single_buffer_instead_of_a_list_is_refused(buffer: Any) -> None:
    """Its pages would otherwise be taken for buffers."""
    with pytest.raises(ConfigError, match=r"'kv'.*list of buffers.*\(4, 8\)"):
        paged("kv", buffer, 16)


@pytest.mark.parametrize(
    ("components", "complaint"),
    [
        (lambda: [paged("a", [zeros(2, 2)], 1), paged("a", [zeros(2, 2)], 1)], "unique, got .*'a', 'a'"),
        (lambda: [rows("aux", zeros(2, 2))], "at least one paged component"),
        (list, "at least one paged component"),
        (lambda: [paged("a", [zeros(2, 2)], 16), paged("b", [zeros(2, 2)], 32)], "'kv' have page sizes 16 and 32"),
        (lambda: [paged("a", [zeros(2, 2)], 0)], "page_size must be at least 1 token, not 0"),
        (lambda: [paged("a", [], 1)], "'a' has no buffers"),
        (lambda: [paged("a", [zeros(2, 2)], 1), rows("aux")], "'aux' has no buffers"),
        (lambda: [paged("latents", [zeros(2, 2)], 1), rows("kv", zeros(2, 2))], "rows of 'kv'.*index space"),
        (lambda: [rows("aux", zeros(2, 2)), paged("kv", [zeros(2, 2)], 1, space="aux")], "rows of 'aux'.*index space"),
    ],
)
def test_layouts_that_contradict_themselves_are_refused(components: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        KVLayout(components())


def test_page_sizes_may_differ_between_index_spaces() -> None:
    layout = KVLayout([paged("full", [zeros(4, 2)], 16), paged("window", [zeros(9, 2)], 32, space="window")])
    assert {info.space: info.page_size for info in layout.infos()} == {"kv": 16, "window": 32}
    assert layout.aux_spaces() == ()


# --- plans -------------------------------------------------------------------------------------------------------------------

ITEMS = 9


def layouts(kv: list[int], window: list[int], aux: list[int]) -> KVLayout:
    """Two index spaces (the first of two components) and two aux components, with these bytes an item."""
    components = [paged("kv", [zeros(ITEMS, n) for n in kv], 4), rows("aux", *[zeros(ITEMS, n) for n in aux])]
    if window:
        components.insert(1, paged("window", [zeros(ITEMS, n) for n in window], 4, space="window"))
        components.append(paged("scales", [zeros(ITEMS, 1)], 4))
        components.append(rows("more", zeros(ITEMS, 2)))
    return KVLayout(components)


widths = st.lists(st.integers(1, 40), min_size=1, max_size=3)
runs = st.permutations(range(ITEMS)).flatmap(lambda order: st.integers(0, ITEMS).map(lambda n: list(order[:n])))
orders = runs | st.integers(0, ITEMS).map(lambda n: list(range(n)))


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(), kv=widths, window=st.just([]) | widths, aux=widths, row=st.none() | st.tuples(*[st.integers(0, ITEMS - 1)] * 2)
)
def test_a_plan_moves_every_byte_that_it_should_and_no_other(data: st.DataObject, kv: Any, window: Any, aux: Any, row: Any) -> None:
    source, target = layouts(kv, window, aux), layouts(kv, window, aux)
    spaces = ["kv", "window"] if window else ["kv"]
    pairs = {}
    for space in spaces:
        to = data.draw(orders)
        start = data.draw(st.integers(0, ITEMS - len(to)))
        pairs[space] = (
            data.draw(st.permutations(range(ITEMS)))[: len(to)]
            if data.draw(st.booleans())
            else list(range(start, start + len(to))),
            to,
        )
    # Every byte gets a label of its own; the oracle copies item by item.
    expected = []
    label = 1
    for number, region in enumerate(source.regions):
        source.regions[number].bytes_view()[:] = np.arange(label, label + region.nbytes) % 251
        target.regions[number].bytes_view()[:] = 252
        items = np.full((ITEMS, region.item_bytes), 252, np.uint8)
        space = source.space_of(number)
        moved = zip(*pairs[space], strict=True) if space in pairs else [row] if row else []
        for from_item, to_item in moved:
            items[to_item] = source.regions[number].bytes_view().reshape(ITEMS, -1)[from_item]
        expected.append(items.ravel())
        label += region.nbytes

    plan = make_plan(target, tuple((space, packed(a), packed(b)) for space, (a, b) in pairs.items()), row)

    for region, begin, to, nbytes in zip(plan.region, plan.source, plan.destination, plan.nbytes, strict=True):
        assert nbytes > 0
        target.regions[region].bytes_view()[to : to + nbytes] = source.regions[region].bytes_view()[begin : begin + nbytes]
    for number, region in enumerate(target.regions):
        assert region.bytes_view().tolist() == expected[number].tolist(), f"region {number}"
    moved_bytes = sum(
        region.item_bytes * (len(pairs[space][0]) if (space := source.space_of(n)) in pairs else bool(row))
        for n, region in enumerate(source.regions)
    )
    assert plan.total_bytes == moved_bytes == plan.nbytes.sum()
    assert [plan.region.dtype, plan.source.dtype, plan.destination.dtype, plan.nbytes.dtype] == [np.int32] + [np.int64] * 3
    changes = int((np.diff(plan.region) != 0).sum()) + 1 if len(plan) else 0
    assert len(set(plan.region.tolist())) == changes, "copies of one region are adjacent"


def kv_plan(source: list[int], target: list[int]) -> Plan:
    return make_plan(layouts([10], [], [1]), (("kv", packed(source), packed(target)),), None)


@pytest.mark.parametrize(
    ("source", "target", "copies"),
    [
        ([0, 1, 2, 3], [5, 6, 7, 8], [(0, 50, 40)]),
        ([0, 1, 2, 3], [5, 6, 8, 7], [(0, 50, 20), (20, 80, 10), (30, 70, 10)]),
        ([0, 1, 3, 4], [5, 6, 7, 8], [(0, 50, 20), (30, 70, 20)]),
        ([3, 2, 1], [3, 2, 1], [(30, 30, 10), (20, 20, 10), (10, 10, 10)]),  # descending neighbours are none
        ([4], [4], [(40, 40, 10)]),
        ([], [], []),
    ],
)
def test_neighbours_on_both_sides_become_one_copy(source: list[int], target: list[int], copies: list[tuple[int, ...]]) -> None:
    plan = kv_plan(source, target)
    assert list(zip(plan.source.tolist(), plan.destination.tolist(), plan.nbytes.tolist(), strict=True)) == copies


def test_plans_of_large_regions_do_not_overflow() -> None:
    plan = make_plan(
        KVLayout([paged("kv", [np.empty((1, 1 << 22), np.uint8)], 1)]), (("kv", packed([2_000_000]), packed([2_000_001])),), None
    )
    assert plan.source.tolist() == [2_000_000 << 22]
    assert plan.destination.tolist() == [2_000_001 << 22]


# --- grants ------------------------------------------------------------------------------------------------------------------

KV_BYTES, SCALE_BYTES, AUX_BYTES = 10, 3, 5


def landing() -> Landing:
    """Regions 0 (kv), 1 (aux), 2 (scales, indexed as kv)."""
    return Landing(
        KVLayout(
            [
                paged("kv", [zeros(ITEMS, KV_BYTES)], 4),
                rows("aux", zeros(ITEMS, AUX_BYTES)),
                paged("scales", [zeros(ITEMS, SCALE_BYTES)], 4),
            ]
        )
    )


def check(target: Landing, copies: list[tuple[int, int, int]], generation: int = 1, writer: bytes = WRITER) -> None:
    columns = list(zip(*copies, strict=True)) if copies else [[], [], []]
    target.check(writer, generation, np.array(columns[0], np.int32), np.array(columns[1], np.int64), np.array(columns[2], np.int64))


def refused(target: Landing, copies: list[tuple[int, int, int]], generation: int = 1, writer: bytes = WRITER) -> str:
    with pytest.raises(WireError) as caught:
        check(target, copies, generation, writer)
    return str(caught.value)


# Region by region: its index space, bytes an item, items. Some are as long as the longest, where one space's numbers meet the next.
REGIONS = [("kv", 10, 9), ("aux", 5, 4), ("kv", 3, 9), ("window", 7, 6), ("aux", 2, 9), ("kv", 1, 9)]


def mixed() -> Landing:
    buffers = [zeros(items, nbytes) for _, nbytes, items in REGIONS]
    return Landing(
        KVLayout(
            [
                paged("kv", buffers[:1], 4),
                rows("aux", buffers[1]),
                paged("scales", buffers[2:3], 4),
                paged("window", buffers[3:4], 4, space="window"),
                rows("more", buffers[4]),
                paged("index", buffers[5:], 4),
            ]
        )
    )


@st.composite
def near_copies(draw: st.DrawFn) -> tuple[int, int, int]:
    """A copy of whole items, more or less: what is nearly right is more telling than what is far off."""
    region = draw(st.integers(0, len(REGIONS) - 1))
    _, nbytes, items = REGIONS[region]
    begin = draw(st.integers(0, items)) * nbytes + draw(st.sampled_from([0, 0, 0, -1, 1]))
    return region, max(begin, 0), max(draw(st.integers(1, 4)) * nbytes + draw(st.sampled_from([0, 0, 0, -1, 1])), 1)


@settings(max_examples=500, deadline=None)
@given(
    granted=runs, window=st.sets(st.integers(0, 5)).map(list), row=st.integers(-1, 3), copies=st.lists(near_copies(), max_size=4)
)
def test_exactly_the_granted_bytes_may_be_written(granted: list[int], window: list[int], row: int, copies: list[Any]) -> None:
    target = mixed()
    target.expose(Expose(1, {"kv": packed(granted), "window": packed(window)}, row, (WRITER,)))
    indices = {"kv": granted, "window": window, "aux": [row] if row >= 0 else []}
    free = [{item * nbytes + at for item in indices[space] for at in range(nbytes)} for space, nbytes, _ in REGIONS]
    if all(set(range(begin, begin + nbytes)) <= free[region] for region, begin, nbytes in copies):
        check(target, copies)
    else:
        assert "generation 1 does not grant" in refused(target, copies)


def test_a_copy_stays_inside_its_own_region() -> None:
    """What follows the last page of one index space is not the first row of another, however they are numbered inside."""
    target = mixed()
    target.expose(Expose(1, {"kv": packed(list(range(9))), "window": packed(list(range(6)))}, 0, (WRITER,)))
    for region, (space, nbytes, items) in enumerate(REGIONS):
        last = 0 if space == "aux" else items - 1
        check(target, [(region, last * nbytes, nbytes)])
        assert "does not grant" in refused(target, [(region, last * nbytes, nbytes + 1)])
        assert "does not grant" in refused(target, [(region, last * nbytes, 2 * nbytes)])
        assert "does not grant" in refused(target, [(region, items * nbytes, nbytes)])


def test_a_granted_page_is_let_in_whole_and_not_a_byte_more() -> None:
    target = landing()
    target.expose(Expose(1, {"kv": packed([4, 2])}, 6, (WRITER, OTHER)))
    for copy in ((0, 20, 10), (0, 29, 1), (0, 40, 10), (1, 30, 5), (2, 6, 3)):
        check(target, [copy])
        check(target, [copy], writer=OTHER)
    for copy in ((0, 20, 11), (0, 19, 2), (0, 19, 1), (0, 30, 1), (1, 29, 2), (1, 30, 6), (2, 6, 4), (2, 5, 1), (0, 20, 30)):
        assert "does not grant" in refused(target, [copy])
        assert "does not grant" in refused(target, [(0, 20, 10), copy]), "one bad copy refuses them all"


@pytest.mark.parametrize(
    ("copies", "complaint"),
    [
        ([(3, 0, 1)], r"regions must be in 0..2, got 3..3"),
        ([(-1, 0, 1)], r"regions must be in 0..2, got -1"),
        ([(0, -10, 10)], "out of range"),
        ([(0, 20, 0)], "out of range"),
        ([(0, 20, -1)], "out of range"),
        ([(0, 20, (1 << 63) - 1)], "out of range"),
        ([(0, (1 << 63) - 1, 1)], "out of range"),
        ([(0, 1 << 48, 1 << 48)], "does not grant"),
        ([(0, ITEMS * KV_BYTES, 1)], "does not grant"),
    ],
)
def test_senseless_copies_are_refused(copies: list[tuple[int, int, int]], complaint: str) -> None:
    import re

    target = landing()
    target.expose(Expose(1, {"kv": packed(list(range(ITEMS)))}, 0, (WRITER,)))
    assert re.search(complaint, refused(target, copies))


def test_columns_of_different_lengths_are_refused() -> None:
    target = landing()
    target.expose(Expose(1, {"kv": packed([0])}, 0, (WRITER,)))
    with pytest.raises(WireError, match="1 regions, 2 offsets and 1 lengths"):
        target.check(WRITER, 1, np.zeros(1, np.int32), np.zeros(2, np.int64), np.ones(1, np.int64))


def test_only_its_writers_and_only_while_it_is_exposed() -> None:
    target = landing()
    inside = [(0, 20, 10)]
    assert "not exposed" in refused(target, inside)
    target.expose(Expose(1, {"kv": packed([2])}, -1, (WRITER,)))
    target.expose(Expose(2, {"kv": packed([3])}, -1, (OTHER,)))
    check(target, inside)
    assert "not granted" in refused(target, inside, writer=OTHER)
    assert "not granted" in refused(target, [], writer=OTHER), "an empty write brings a notice, so it is checked, too"
    assert "not granted" in refused(target, inside, generation=2)
    assert "not exposed" in refused(target, inside, generation=3)
    target.revoke(1)
    target.revoke(1)
    assert "generation 1 is not exposed" in refused(target, inside)
    assert "not exposed" in refused(target, [])
    check(target, [(0, 30, 10)], generation=2, writer=OTHER)
