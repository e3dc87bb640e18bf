"""1 GiB from one process to another over tcp, beside a bare PUSH/PULL pair of the same ZeroMQ in the same run.

Contiguous pages become one long copy a region; fragmented ones are 64 KiB copies in random order on both sides. The bare pair sends
the same bytes without copying them and throws them away at the other end, in messages of the size that it moves best; a second bare
pair places what arrives in its memory, as a KV cache needs. Every measurement is a fresh pair of processes, taken in turns.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.benchmarks import pairs
from pd_fsm.benchmarks.rows import Row, Spread

GOAL_RATIO = 0.8
PAGE_SIZE = 16
REGIONS = 2
PAGE_BYTES = 64 << 10
MESSAGE_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Sizes that the bare pair may choose from."""
OURS = ("contiguous", "fragmented")
BARE = ("bare", "bare, placed")


def run(*, quick: bool = False) -> list[Row]:
    total, repeats, rounds = (32 << 20, 1, 1) if quick else (1 << 30, 5, 3)
    rates: dict[str, list[float]] = {what: [] for what in OURS}
    bare: dict[str, dict[int, list[float]]] = {what: {size: [] for size in MESSAGE_BYTES} for what in BARE}
    for turn in range(repeats):
        for what in OURS:
            rates[what] += _measure({"what": what, "total": total, "rounds": rounds})
        for what, sizes in bare.items():
            for size in MESSAGE_BYTES if turn == 0 else _best(sizes):
                sizes[size] += _measure({"what": what, "total": total, "rounds": rounds, "message": size})
    best = {what: Spread.of(sizes[_best(sizes)[0]]) for what, sizes in bare.items()}
    rows = []
    label = f"{total / (1 << 30):g} GiB"
    for what in OURS:
        ours = Spread.of(rates[what])
        rows.append(
            Row(f"{label}, {what}", "GB/s", ours, best["bare"], "PUSH/PULL", GOAL_RATIO, goal_is_ratio=True, higher_is_better=True)
        )
        rows.append(Row(f"{label}, {what}", "GB/s", ours, best["bare, placed"], "PUSH/PULL, placed", higher_is_better=True))
    for what, sizes in bare.items():
        rows += [
            Row(f"{what}, messages of {size >> 10} KiB", "GB/s", Spread.of(samples), higher_is_better=True)
            for size, samples in sizes.items()
        ]
    return rows


def _best(sizes: dict[int, list[float]]) -> list[int]:
    """The two message sizes that moved most so far, the better one first: the others are measured in the first turn only."""
    return sorted(sizes, key=lambda size: Spread.of(sizes[size]).median, reverse=True)[:2]


def _measure(told: dict[str, Any]) -> list[float]:
    """GB/s of each round but the first, which warms the memory of both sides."""
    results = pairs.run_pair("bulk", told)
    began, ended = results["prefill"], results["decode"]
    return [told["total"] / (max(e, b[1]) - b[0]) for b, e in zip(began, ended, strict=True)][1:]


# --- the children ------------------------------------------------------------------------------------------------------------


def child(role: str) -> None:
    # An engine's process has freed large blocks long before it serves; glibc then keeps freed memory of such sizes (mallopt(3),
    # dynamic M_MMAP_THRESHOLD) instead of fetching fresh pages for every message, at some microsecond each. Both sides get that.
    bytearray(16 << 20)
    told = pairs.settings()
    told["rounds"] += 1
    start = pairs.Start(told["start"], role)
    if told["what"] in OURS:
        _ours(role, told, start)
    else:
        _bare(role, told, start)
    start.close()


def _ours(role: str, told: dict[str, Any], start: pairs.Start) -> None:
    prefill = role == "prefill"
    pages = told["total"] // REGIONS // PAGE_BYTES
    buffers = [_memory(pages, region + 1 if prefill else 0) for region in range(REGIONS)]
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", buffers, PAGE_SIZE)])
    order = np.arange(pages)
    if told["what"] == "fragmented":
        order = np.random.default_rng(1 if prefill else 2).permutation(pages)
    meeting = pairs.Meeting.of_prefill() if prefill else pairs.Meeting.of_decode(told["meeting"])
    times: list[Any] = []
    with pd_fsm.open_session(role, layout, rendezvous=meeting.registry.client(), name=f"{role}-0", thread=False) as session:
        if prefill:
            pairs.report(meeting.record())
        for room in range(told["rounds"]):
            start.wait(session.progress)
            began = time.monotonic_ns()
            handle: pd_fsm.Sender | pd_fsm.Receiver
            if prefill:
                handle = session.send(room)
                handle.send(order, (0, PAGE_SIZE * pages), last=True)
            else:
                handle = session.receive(room, order)
            handle.wait(pairs.STEP_TIMEOUT_S)
            ended = time.monotonic_ns()
            handle.raise_for_failure()
            handle.clear()
            times.append((began, ended) if prefill else ended)
        start.wait(session.progress)
    if not prefill:
        _check(buffers, order, told["what"])
    pairs.report(times)


def _memory(pages: int, region: int) -> NDArray[np.uint8]:
    """Pages that are in memory already; on the sending side each begins with its own number."""
    buffer = np.full((pages, PAGE_BYTES), region, np.uint8)
    if region:
        buffer[:, :4] = np.arange(pages, dtype="<u4").view(np.uint8).reshape(pages, 4)
    return buffer


def _check(buffers: list[NDArray[np.uint8]], order: NDArray[np.int64], what: str) -> None:
    """Each page that arrived is the one that belongs there, whole."""
    pages = len(order)
    sent = np.arange(pages) if what == "contiguous" else np.random.default_rng(1).permutation(pages)
    for region, buffer in enumerate(buffers):
        numbers = buffer[:, :4].copy().view("<u4").ravel()
        assert (numbers[order] == sent).all(), f"region {region}: pages are not where they belong"
        assert (buffer[:, 4:] == region + 1).all(), f"region {region}: bytes are not what prefill sent"


def _bare(role: str, told: dict[str, Any], start: pairs.Start) -> None:
    message, count = told["message"], told["total"] // told["message"]
    prefill, place = role == "prefill", told["what"] == "bare, placed"
    memory = np.full((count, message), 1 if prefill else 0, np.uint8) if prefill or place else None
    times: list[Any] = []
    with zmq.Context() as context, context.socket(zmq.PUSH if prefill else zmq.PULL) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(pairs.STEP_TIMEOUT_S * 1e3))
        if prefill:
            pairs.report(socket.bind_to_random_port("tcp://127.0.0.1"))
        else:
            socket.connect(f"tcp://127.0.0.1:{told['meeting']}")
        for _ in range(told["rounds"]):
            began = start.wait(lambda: None)
            for index in range(count):
                if prefill:
                    assert memory is not None
                    socket.send(memory[index], copy=False)
                    continue
                frame = socket.recv(copy=False)
                if memory is not None:
                    memory[index] = np.frombuffer(frame.buffer, np.uint8)
            times.append((began, began) if prefill else time.monotonic_ns())
        start.wait(lambda: None)
    pairs.report(times)


if __name__ == "__main__":
    child(sys.argv[1])
