"""1 GiB of KV cache over a transfer library, beside the bare library on the same blocks, in turns in the same two processes.

32 layers, K and V, pages of 64 KiB. Contiguous pages are neighbours on both sides; fragmented ones are in random order on both. The
bare side is one agent or engine more in each process, over the same memory: it writes the same pages as the library does best, and
nothing else. Ours counts from `send` to success on both sides. A library that is not installed has no rows.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.benchmarks import pairs
from pd_fsm.benchmarks.rows import Row, Spread
from pd_fsm.transports import mooncake_engine
from pd_fsm.transports.nixl_agent import Agent, State

LIBRARIES = ("nixl", "mooncake")
CASES = (("contiguous", 1, 0.95), ("contiguous", 16, 0.95), ("fragmented", 1, 0.90), ("fragmented", 16, 0.90))
"""(order of the pages, chunks, share of the bare library's throughput that is the goal)."""
REGIONS = 64
PAGE_BYTES = 64 << 10
PAGE_SIZE = 16


def run(*, quick: bool = False) -> list[Row]:
    pages, repeats, rounds = (4, 1, 2) if quick else (256, 3, 15)
    rows = []
    for library in filter(find_spec, LIBRARIES):
        for order, chunks, goal in CASES:
            ours: list[float] = []
            bare: list[float] = []
            for _ in range(repeats):
                told = {"library": library, "order": order, "chunks": min(chunks, pages), "pages": pages, "rounds": rounds}
                results = pairs.run_pair("transports", told)
                ours += results["prefill"]["ours"][1:]  # the first of each makes the connection
                bare += results["prefill"]["bare"][1:]
            size = f"{REGIONS * pages * PAGE_BYTES / (1 << 30):g} GiB"
            name = f"{library}, {size} {order}, {chunks} chunk{'s' if chunks > 1 else ''}"
            peer = f"bare {library}"
            rows.append(Row(name, "GB/s", Spread.of(ours), Spread.of(bare), peer, goal, goal_is_ratio=True, higher_is_better=True))
    return rows


# --- the children ------------------------------------------------------------------------------------------------------------


def child(role: str) -> None:
    told = pairs.settings()
    prefill, pages = role == "prefill", told["pages"]
    start = pairs.Start(told["start"], role)
    buffers = [np.full((pages, PAGE_BYTES), region + 1 if prefill else 0, np.uint8) for region in range(REGIONS)]
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", buffers, PAGE_SIZE)])
    order = np.arange(pages)
    if told["order"] == "fragmented":
        order = np.random.default_rng(1 if prefill else 2).permutation(pages)
    meeting = pairs.Meeting.of_prefill() if prefill else pairs.Meeting.of_decode(told["meeting"])
    settings: dict[str, Any] = {"transport": told["library"], "name": f"{role}-0", "thread": False}
    with pd_fsm.open_session(role, layout, rendezvous=meeting.registry.client(), **settings) as session:
        if prefill:
            pairs.report(meeting.record())
        bare = BARE[told["library"]](prefill, buffers, Path(told["start"]).with_name("bare"))
        took: dict[str, list[int]] = {"ours": [], "bare": []}
        for room in range(told["rounds"]):
            began = start.wait(session.progress)
            took["ours"].append(_ours(session, room, order, told["chunks"]) - began)
            if room == 0:  # the bare transfers that follow write the same
                _check(buffers)
            began = start.wait(session.progress)
            if prefill:
                took["bare"].append(bare.write(order, told["chunks"]) - began)
        start.wait(session.progress)
        bare.close()
    start.close()
    total = REGIONS * pages * PAGE_BYTES
    pairs.report({what: [total / nanoseconds for nanoseconds in times] for what, times in took.items()})


def _ours(session: pd_fsm.Session, room: int, order: NDArray[np.int64], chunks: int) -> int:
    """One room; when it succeeded here, in ns."""
    handle: pd_fsm.Sender | pd_fsm.Receiver
    if session.driver.core.sends:
        handle = session.send(room)
        begin = 0
        for part in np.array_split(order, chunks):
            end = begin + len(part)
            handle.send(part, (begin * PAGE_SIZE, end * PAGE_SIZE), last=end == len(order))
            begin = end
    else:
        handle = session.receive(room, order)
    handle.wait(pairs.STEP_TIMEOUT_S)
    ended = time.monotonic_ns()
    handle.raise_for_failure()
    handle.clear()
    return ended


def _check(buffers: list[NDArray[np.uint8]]) -> None:
    """All bytes are there."""
    for region, buffer in enumerate(buffers):
        assert (buffer == region + 1).all(), f"region {region}: bytes are not what prefill sent"


class BareNixl:
    """An agent of its own over the same buffers, with the library's own merging and nothing of a session."""

    def __init__(self, prefill: bool, buffers: list[NDArray[np.uint8]], meeting: Path) -> None:
        self.agent = Agent(f"bare-{'prefill' if prefill else 'decode'}", "UCX", {}, 0.0 if prefill else 10.0, telemetry=False)
        rows = [[buffer.ctypes.data, PAGE_BYTES, 0, PAGE_BYTES, len(buffer)] for buffer in buffers]
        blocks = [[address, nbytes * count, device] for address, nbytes, device, _, count in rows]
        self.agent.register("DRAM", np.array(blocks, dtype=np.uint64))
        self._pages = len(buffers[0])
        if not prefill:
            np.save(meeting.with_suffix(".npy"), np.array(rows, dtype=np.uint64))
            meeting.with_suffix(".new").write_bytes(self.agent.metadata())
            meeting.with_suffix(".new").rename(meeting)
            return
        deadline = time.monotonic() + pairs.STEP_TIMEOUT_S
        while not meeting.exists():
            assert time.monotonic() < deadline, "the other side's bare agent did not come"
            time.sleep(0.01)
        self.agent.add_peer("bare-decode", meeting.read_bytes())
        self._local = self.agent.prepare("", "DRAM", np.array(rows, dtype=np.uint64))
        self._remote = self.agent.prepare("bare-decode", "DRAM", np.load(meeting.with_suffix(".npy")))

    def close(self) -> None:
        self.agent.close()

    def write(self, order: NDArray[np.int64], chunks: int) -> int:
        """Write every page in all regions; when the last one was placed, in ns."""
        targets = order if (order == np.arange(len(order))).all() else np.random.default_rng(2).permutation(len(order))
        first = np.arange(REGIONS)[:, None] * self._pages
        handles = []
        for sources, places in zip(np.array_split(order, chunks), np.array_split(targets, chunks), strict=True):
            numbers = [(first + pages).ravel().astype(np.int32) for pages in (sources, places)]
            handles.append(self.agent.make_prepared(self._local, numbers[0], self._remote, numbers[1]))
            state, reason = self.agent.post(handles[-1], b"")
            assert state in (State.DONE, State.POSTED), reason
        for handle in handles:
            while (state := self.agent.check(handle)[0]) is State.POSTED:
                continue
            assert state is State.DONE, "a bare transfer failed"
        ended = time.monotonic_ns()
        for handle in handles:
            self.agent.release(handle)
        return ended


class BareMooncake:
    """An engine of its own over the same buffers: batches of at most 1,024 blocks, one after the other, waited for by the library.

    Neighbouring pages are merged, as ours are.
    """

    def __init__(self, prefill: bool, buffers: list[NDArray[np.uint8]], meeting: Path) -> None:
        self._engine = mooncake_engine.load_library("tcp").TransferEngine()
        assert self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self._own = np.array([buffer.ctypes.data for buffer in buffers], dtype=np.uint64)
        assert self._engine.batch_register_memory(self._own.tolist(), [buffer.nbytes for buffer in buffers]) == 0
        if not prefill:
            new = meeting.with_suffix(".new.npy")
            np.save(new, np.append(self._own, np.uint64(self._engine.get_rpc_port())))
            new.rename(meeting)
            return
        deadline = time.monotonic() + pairs.STEP_TIMEOUT_S
        while not meeting.exists():
            assert time.monotonic() < deadline, "the other side's bare engine did not come"
            time.sleep(0.01)
        with meeting.open("rb") as said:
            *theirs, port = np.load(said).tolist()
        self._theirs, self._target = np.array(theirs, dtype=np.uint64), f"127.0.0.1:{port}"

    def write(self, order: NDArray[np.int64], chunks: int) -> int:
        """Write every page in all regions; when the last one was placed, in ns."""
        targets = order if (order == np.arange(len(order))).all() else np.random.default_rng(2).permutation(len(order))
        for sources, places in zip(np.array_split(order, chunks), np.array_split(targets, chunks), strict=True):
            first = np.flatnonzero((np.diff(sources, prepend=-2) != 1) | (np.diff(places, prepend=-2) != 1))
            nbytes = np.diff(np.append(first, len(sources))) * PAGE_BYTES
            columns = [
                (base[:, None] + (pages[first] * PAGE_BYTES).astype(np.uint64)).ravel().tolist()
                for base, pages in ((self._own, sources), (self._theirs, places))
            ]
            lengths = np.tile(nbytes, REGIONS).tolist()
            for begin in range(0, len(lengths), 1_024):
                batch = [column[begin : begin + 1_024] for column in (*columns, lengths)]
                assert self._engine.batch_transfer_sync_write(self._target, *batch) == 0, "a bare transfer failed"
        return time.monotonic_ns()

    def close(self) -> None:
        self._engine = None


BARE: dict[str, Any] = {"nixl": BareNixl, "mooncake": BareMooncake}


if __name__ == "__main__":
    child(sys.argv[1])
