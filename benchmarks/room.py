"""One small room over loopback between two processes: from open on both sides to success on both.

Both children open at one agreed moment; a figure is the time from the earlier open to the later success. Four schedulers: one that
drives the session itself, and one that leaves it to the session's thread; each idle, or busy in Python between two looks.
The peer is the same exchange without a session layer: three bare ZeroMQ messages (a request, the bytes, an acknowledgement) between
two sockets, driven by a blocking poll.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import zmq

import pd_fsm
from pd_fsm.benchmarks import pairs
from pd_fsm.benchmarks.rows import Row, Spread

GOAL_US = 400.0
PAGE_SIZE = 16
AUX_BYTES = 128
PAGES = 64
BUSY_US = 50.0
"""How long the busy scheduler computes in Python between two looks."""
IDLE_WAIT_MS = 1.0
"""How long the idle scheduler that drives the session sleeps at the most; what arrives wakes it."""
IDLE_SLEEP_S = 100e-6
"""How long the idle scheduler with a threaded session sleeps between two looks."""


@attrs.frozen
class Kind:
    """A kind of page: `regions` buffers with `item_bytes` a page each."""

    name: str
    regions: int
    item_bytes: int
    goal: float | None


KINDS = (Kind("16 KiB page", 4, 4 << 10, GOAL_US), Kind("4 MiB page", 64, 64 << 10, None))
SCHEDULERS = ("progress, idle", "thread, idle", "progress, busy", "thread, busy")


def run(*, quick: bool = False) -> list[Row]:
    repeats, rooms = (1, 10) if quick else (5, 200)
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(repeats):
        for kind in KINDS:
            for scheduler in (*SCHEDULERS, "bare"):
                count = max(5, rooms // 10) if scheduler == "thread, busy" else rooms
                figures.setdefault((kind.name, scheduler), []).extend(_measure(kind, scheduler, count))
    rows = []
    for kind in KINDS:
        bare = Spread.of(figures[kind.name, "bare"])
        for scheduler in SCHEDULERS:
            goal = kind.goal if scheduler.endswith("idle") else None
            rows.append(
                Row(f"{kind.name}, {scheduler}", "us", Spread.of(figures[kind.name, scheduler]), bare, "3 zmq messages", goal)
            )
    return rows


def _measure(kind: Kind, scheduler: str, rooms: int) -> list[float]:
    """Microseconds of each room, without the first tenth, in a fresh pair of processes."""
    told = {"regions": kind.regions, "item_bytes": kind.item_bytes, "scheduler": scheduler, "rooms": rooms}
    results = pairs.run_pair("room", told)
    p, d = results["prefill"], results["decode"]
    opened = map(min, zip(p["opened"], d["opened"], strict=True))
    succeeded = map(max, zip(p["succeeded"], d["succeeded"], strict=True))
    times = [(end - begin) / 1e3 for begin, end in zip(opened, succeeded, strict=True)]
    return times[len(times) // 10 :]


# --- the children ------------------------------------------------------------------------------------------------------------


def _compute(microseconds: float) -> int:
    """Pure Python that never lets go of the interpreter lock by itself."""
    end = time.perf_counter_ns() + int(microseconds * 1e3)
    spins = 0
    while time.perf_counter_ns() < end:
        spins += 1
    return spins


def _looks(session: pd_fsm.Session, scheduler: str) -> Callable[[], object]:
    """What the scheduler does between two looks at its room."""

    def drive() -> None:
        if not session.progress():
            session.wait(IDLE_WAIT_MS)

    if scheduler == "progress, idle":
        return drive
    if scheduler == "thread, idle":
        return lambda: time.sleep(IDLE_SLEEP_S)
    if scheduler == "progress, busy":
        return lambda: (session.progress(), _compute(BUSY_US))
    return lambda: _compute(BUSY_US)


def child(role: str) -> None:
    told = pairs.settings()
    if told["scheduler"] == "bare":
        _bare(role, told)
        return
    shape = (PAGES, told["item_bytes"])
    buffers = [np.full(shape, index % 251 + 1 if role == "prefill" else 0, np.uint8) for index in range(told["regions"])]
    aux = np.full((PAGES, AUX_BYTES), 7 if role == "prefill" else 0, np.uint8)
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", buffers, PAGE_SIZE), pd_fsm.rows("aux", aux)])
    meeting = pairs.Meeting.of_prefill() if role == "prefill" else pairs.Meeting.of_decode(told["meeting"])
    threaded = told["scheduler"].startswith("thread")
    start = pairs.Start(told["start"], role)
    with pd_fsm.open_session(role, layout, rendezvous=meeting.registry.client(), name=f"{role}-0", thread=threaded) as session:
        if role == "prefill":
            pairs.report(meeting.record())
        result = _rooms(session, start, told, prefill=role == "prefill")
        start.wait(session.progress)  # neither closes while the other still works
    start.close()
    if role == "decode":
        _check(buffers, aux, told["rooms"])
    pairs.report(result)


def _rooms(session: pd_fsm.Session, start: pairs.Start, told: dict[str, Any], *, prefill: bool) -> dict[str, list[int]]:
    look = _looks(session, told["scheduler"])
    result: dict[str, list[int]] = {"opened": [], "succeeded": []}
    for room in range(told["rooms"]):
        start.wait(session.progress)
        page = room % PAGES
        result["opened"].append(time.monotonic_ns())
        handle: pd_fsm.Sender | pd_fsm.Receiver
        if prefill:
            handle = session.send(room)
            handle.send([page], (0, PAGE_SIZE), last=True, aux=page)
        else:
            handle = session.receive(room, [page], aux=page)
        deadline = time.monotonic() + pairs.STEP_TIMEOUT_S
        while handle.poll() not in (pd_fsm.Phase.SUCCESS, pd_fsm.Phase.FAILED):
            look()
            if time.monotonic() > deadline:
                raise TimeoutError(f"room {room} is {handle.phase.name} after {pairs.STEP_TIMEOUT_S} s")
        result["succeeded"].append(time.monotonic_ns())
        handle.raise_for_failure()
        handle.clear()
    return result


def _check(buffers: list[Any], aux: Any, rooms: int) -> None:
    """Every byte of every page that was sent is where it belongs."""
    pages = min(rooms, PAGES)
    for index, buffer in enumerate(buffers):
        assert (buffer[:pages] == index % 251 + 1).all(), f"region {index} is not what prefill sent"
        assert not buffer[pages:].any(), f"region {index} has bytes in pages that were never granted"
    assert (aux[:pages] == 7).all(), "the aux rows are not what prefill sent"


def _bare(role: str, told: dict[str, Any]) -> None:
    """Three messages: decode asks, prefill sends the bytes, decode acknowledges."""
    payload = bytes(told["regions"] * told["item_bytes"] + AUX_BYTES)
    prefill = role == "prefill"
    start = pairs.Start(told["start"], role)
    result: dict[str, list[int]] = {"opened": [], "succeeded": []}
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(pairs.STEP_TIMEOUT_S * 1e3))
        if prefill:
            port = socket.bind_to_random_port("tcp://127.0.0.1")
            pairs.report(port)
        else:
            socket.connect(f"tcp://127.0.0.1:{told['meeting']}")
        for _ in range(told["rooms"]):
            start.wait(lambda: None)
            result["opened"].append(time.monotonic_ns())
            if prefill:
                socket.recv()
                socket.send(payload, copy=False)
                socket.recv()
            else:
                socket.send(b"request")
                assert len(socket.recv(copy=False)) == len(payload)
                socket.send(b"ack")
            result["succeeded"].append(time.monotonic_ns())
        start.wait(lambda: None)
    start.close()
    pairs.report(result)


if __name__ == "__main__":
    child(sys.argv[1])
