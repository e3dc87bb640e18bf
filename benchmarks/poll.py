"""Polling: what a scheduler pays to see the phases of its rooms. The peer is the plain way, a list of `handle.poll()`."""

from __future__ import annotations

import numpy as np

import pd_fsm
from pd_fsm.benchmarks.rows import Row, per_call, quiet
from pd_fsm.transports.memory import Hub

POLL_GOAL_NS = 100.0
GROUP_GOAL_US = 50.0
GROUP_GOAL_ROOMS = 10_000


def run(*, quick: bool = False) -> list[Row]:
    sizes, repeats = ((1, 100), 5) if quick else ((1, 100, 1_000, GROUP_GOAL_ROOMS), 50)
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((4, 16), np.uint8)], page_size=16)])
    with pd_fsm.open_session("prefill", layout, transport="memory", transport_options={"hub": Hub()}, thread=False) as session:
        handles = [session.send(room) for room in range(max(sizes))]
        with quiet():
            return _single(handles[0], repeats) + [row for size in sizes for row in _many(session, handles[:size], repeats)]


def _single(handle: pd_fsm.Handle, repeats: int) -> list[Row]:
    calls = 2_000
    return [
        Row("handle.poll()", "ns", per_call(handle.poll, calls, repeats, 1e9), goal=POLL_GOAL_NS),
        Row("handle.phase", "ns", per_call(lambda: handle.phase, calls, repeats, 1e9)),
    ]


def _many(session: pd_fsm.Session, handles: list[pd_fsm.Sender], repeats: int) -> list[Row]:
    size = len(handles)
    calls = max(1, 2_000 // size)
    group = session.group(handles)
    plain = per_call(lambda: [handle.poll() for handle in handles], calls, repeats)
    assert group.poll().tolist() == [handle.poll() for handle in handles]
    return [
        Row(
            f"group.poll(), {size} rooms",
            "us",
            per_call(group.poll, calls, repeats),
            plain,
            "list of poll()",
            GROUP_GOAL_US if size == GROUP_GOAL_ROOMS else None,
        ),
        Row(
            f"poll_many(list), {size} rooms",
            "us",
            per_call(lambda: session.poll_many(handles), calls, repeats),
            plain,
            "list of poll()",
        ),
    ]
