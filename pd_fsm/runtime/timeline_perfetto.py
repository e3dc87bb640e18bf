"""Show traces as Chrome trace events, which ui.perfetto.dev and chrome://tracing open.

Only a view: reading and judging traces is `timeline.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pd_fsm.machines.room import Phase

if TYPE_CHECKING:
    from pd_fsm.runtime.timeline import Life, RoomTrace


def chrome_trace(lives: Sequence[Life]) -> dict[str, Any]:
    """The traces as Chrome trace events (opens in ui.perfetto.dev and chrome://tracing); times in microseconds from the first line.

    One process a life of a session. Rooms are packed into lanes (threads) so that no two overlap in one; each room is a slice
    with its phases inside, its lease lies in the lane below, failures and peer changes are instant events. Room numbers are
    strings in the arguments: a viewer in JavaScript would round them.
    """
    origin_ms = min((life.start_ms for life in lives), default=0.0)
    events: list[dict[str, Any]] = []
    for pid, life in enumerate(lives, start=1):
        events += _process(pid, life, origin_ms)
    return {
        "displayTimeUnit": "ms",
        "otherData": {"clock": "CLOCK_MONOTONIC", "origin_ms": round(origin_ms, 3)},
        "traceEvents": events,
    }


def _process(pid: int, life: Life, origin_ms: float) -> list[dict[str, Any]]:
    def us(t_ms: float) -> float:
        return round((t_ms - origin_ms) * 1000, 1)

    def slice_(name: str, category: str, tid: int, span: tuple[float, float], args: dict[str, Any]) -> dict[str, Any]:
        start, end = us(span[0]), us(span[1])
        return {
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "name": name,
            "cat": category,
            "ts": start,
            "dur": round(end - start, 1),
            "args": args,
        }

    def instant(name: str, category: str, tid: int, t_ms: float, args: dict[str, Any]) -> dict[str, Any]:
        scope = "p" if tid == 0 else "t"
        return {"ph": "i", "s": scope, "pid": pid, "tid": tid, "name": name, "cat": category, "ts": us(t_ms), "args": args}

    def meta(name: str, tid: int, value: dict[str, Any]) -> dict[str, Any]:
        return {"ph": "M", "pid": pid, "tid": tid, "name": name, "args": value}

    events = [
        meta("process_name", 0, {"name": life.title}),
        meta("process_sort_index", 0, {"sort_index": pid}),
        meta("thread_name", 0, {"name": "session"}),
    ]
    identity = {"incarnation": life.incarnation, "pid": life.pid}
    events.append(instant("open", "session", 0, life.start_ms, identity))
    events.append(instant("close" if life.closed else "trace ends without close", "session", 0, life.end_ms, identity))
    for change in life.peers:
        args: dict[str, Any] = {
            "peer": change.peer,
            "row": change.row,
            "before": change.before,
            "after": change.after,
            "reason": change.reason,
        }
        events.append(instant(f"{change.peer} {change.after}", "peer", 0, change.t_ms, args))
    for number, lane in enumerate(_lanes(life.rooms.values())):
        phases, leases = 2 * number + 1, 2 * number + 2
        events += [
            meta("thread_name", phases, {"name": f"rooms {number + 1}"}),
            meta("thread_name", leases, {"name": f"leases {number + 1}"}),
        ]
        events += [meta("thread_sort_index", tid, {"sort_index": tid}) for tid in (phases, leases)]
        for room in lane:
            args = {"room": str(room.room), "generation": room.generation, "bytes": room.bytes, "reason": room.reason}
            phase_end_ms = max((span.end_ms for span in room.phase.spans), default=room.opened_ms)
            whole = {**args, "verdict": room.verdict or "none"}
            events.append(slice_(f"room {room.room}", "room", phases, (room.opened_ms, phase_end_ms), whole))
            events += [slice_(span.state, "phase", phases, (span.start_ms, span.end_ms), args) for span in room.phase.spans]
            events += [
                slice_(f"lease {span.state}", "lease", leases, (span.start_ms, span.end_ms), args) for span in room.lease.spans
            ]
            if room.verdict == Phase.FAILED.name:
                events.append(instant(f"failed: {room.reason}", "failure", phases, room.concluded_ms, args))
    return events


def _lanes(rooms: Iterable[RoomTrace]) -> list[list[RoomTrace]]:
    """First fit by time of opening: a lane takes a room when the one before it has ended, its lease included."""
    lanes: list[list[RoomTrace]] = []
    for room in sorted(rooms, key=lambda room: (room.opened_ms, room.room, room.generation)):
        free = next((lane for lane in lanes if lane[-1].end_ms <= room.opened_ms), None)
        if free is None:
            lanes.append([room])
        else:
            free.append(room)
    return lanes
