"""What the prefill and the decode scheduler share: requests, the watch over their rooms, and the way their memory comes back.

A scheduler is one object without a thread. `step()` does a bounded amount of work and never waits; whoever owns it (`worker.py`, or
a test) calls it in a loop. It must never touch a transfer: it opens rooms, reads phases and keeps pages until pd-fsm says that they
are free.
"""

from __future__ import annotations

import abc
from collections import Counter, deque
from collections.abc import Iterator
from typing import ClassVar

import attrs

import pd_fsm
from pd_fsm.examples.engine.kv_cache import PagedKVCache
from pd_fsm.examples.engine.messages import Hold, Outcome, Progress, Report, Result, Role, Serve, ToRouter, now_ms
from pd_fsm.examples.engine.model import Model


@attrs.define(eq=False)
class Request:
    """One request on one worker. `table` is its page table: the pages in the order of its tokens."""

    serve: Serve
    arrived_ms: float
    held: bool
    handle: pd_fsm.Sender | pd_fsm.Receiver | None = None
    table: list[int] = attrs.field(factory=list)
    row: int | None = None
    phase_ms: dict[str, float] = attrs.field(factory=lambda: {"QUEUED": 0.0})
    abort_reason: str = ""
    to_compute: deque[tuple[int, int]] = attrs.field(factory=deque)  # prefill: the chunks of the prompt that are left
    turn: int = 0  # prefill: when it had its last turn
    generated: list[int] = attrs.field(factory=list)  # decode

    @property
    def room(self) -> int:
        return self.serve.room

    @property
    def seen(self) -> str:
        """The last phase that was seen, or QUEUED."""
        return next(reversed(self.phase_ms))


class Scheduler(abc.ABC):
    """Owned by one thread. What it wants to tell the router collects in `outbox`."""

    side: ClassVar[Role]
    holds: ClassVar[frozenset[Hold]]  # the phases in which this side can hold a request

    def __init__(self, name: str, model: Model, cache: PagedKVCache, session: pd_fsm.Session) -> None:
        """`session` must have been opened with `cache.layout()`."""
        self.name = name
        self.model = model
        self.cache = cache
        self.session = session
        self.outbox: deque[ToRouter] = deque()
        self.requests: dict[int, Request] = {}
        self._leaving: list[Request] = []  # answered, but somebody may still read or write their pages
        self._counts: Counter[str] = Counter()

    # --- what the router asks --------------------------------------------------------------------------------------------

    def serve(self, message: Serve) -> None:
        if message.room not in self.requests:
            request = self.requests[message.room] = Request(message, arrived_ms=now_ms(), held=message.hold in self.holds)
            self._arrived(request)

    def _arrived(self, request: Request) -> None:  # noqa: B027 - not every side does something then
        """For a side that opens its room at once."""

    def release(self, room: int) -> None:
        if room in self.requests:
            self.requests[room].held = False

    def abort(self, room: int, reason: str) -> None:
        """Give a request up, in whatever phase it is. One that is not known (any more) is none of our business: aborts race."""
        request = self.requests.get(room)
        if request is None:
            return
        if request.handle is not None and request.seen != "SUCCESS":
            request.abort_reason = reason
            request.handle.abort(reason)  # the next step() sees Failed, or Success if the room was faster
        else:
            self._finish(request, "aborted", reason=reason, cause="abort")

    # --- one turn of the loop --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def step(self) -> bool:
        """Look at all rooms, take back memory, do one piece of work. True if there was any: then come again at once."""

    @property
    def idle(self) -> bool:
        """Nothing runs and all memory is back."""
        return not self.requests and not self._leaving

    def _poll(self) -> Iterator[tuple[Request, pd_fsm.Phase]]:
        """Read the phases of all rooms that have not concluded, in one gather, and yield those that changed."""
        self.session.progress()  # never blocks; a step of the session here saves a hop to its thread while the loop is busy
        watched = [(r, r.handle) for r in self.requests.values() if r.handle is not None and r.seen != "SUCCESS"]
        phases = self.session.poll_many([handle for _, handle in watched])
        for (request, _), value in zip(watched, phases, strict=True):
            phase = pd_fsm.Phase(int(value))
            if phase.name != request.seen:
                self._note(request, phase.name)
                yield request, phase

    def _note(self, request: Request, phase: str) -> None:
        at_ms = now_ms()
        request.phase_ms[phase] = at_ms - request.arrived_ms
        self.outbox.append(Progress(self.name, request.room, self.side, phase, at_ms))

    def _failed(self, request: Request) -> None:
        """The room failed. A verdict never waits for memory: the router learns it now, the pages come back when they are free."""
        assert request.handle is not None
        failure = request.handle.failure
        assert failure is not None, f"room {request.room} is Failed without a reason"
        outcome: Outcome = "aborted" if failure.cause in {"abort", "peer_abort"} else "failed"
        self._finish(request, outcome, failure.reason, failure.cause, failure.peer)

    def _finish(self, request: Request, outcome: Outcome, reason: str = "", cause: str = "", peer: str = "") -> None:
        """Answer the router and let the request go."""
        moved = 0
        if request.handle is not None:
            moved = request.handle.bytes_moved
            request.handle.clear()
        self._counts[outcome] += 1
        self._counts["bytes"] += moved
        self.outbox.append(
            Result(
                worker=self.name,
                room=request.room,
                side=self.side,
                outcome=outcome,
                verdict="SUCCESS" if request.seen == "SUCCESS" else "FAILED",
                reason=reason,
                cause=cause,
                peer=peer,
                tokens=request.generated,
                phase_ms=request.phase_ms,
                arrived_ms=request.arrived_ms,
                finished_ms=now_ms() - request.arrived_ms,
                bytes_moved=moved,
            )
        )
        del self.requests[request.room]
        self._leaving.append(request)

    def _reclaim(self) -> None:
        """Take back the memory of answered requests, as far as nobody else can touch it any more."""
        staying = []
        for request in self._leaving:
            if request.handle is None or request.handle.pages_free:
                self.cache.free(request.table, request.row)
            else:
                staying.append(request)
        self._leaving = staying

    # --- the end ---------------------------------------------------------------------------------------------------------

    def report(self, incarnation: str) -> Report:
        return Report(
            worker=self.name,
            incarnation=incarnation,
            role=self.side,
            pages_free=self.cache.pages.free,
            pages_total=self.cache.pages.total,
            rows_free=self.cache.rows.free,
            rows_total=self.cache.rows.total,
            finished=self._counts["finished"],
            aborted=self._counts["aborted"],
            failed=self._counts["failed"],
            bytes_moved=self._counts["bytes"],
            live_rooms=len(self.requests),
            session=self.session.describe(),
        )
