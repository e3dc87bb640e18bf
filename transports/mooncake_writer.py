"""All outstanding writes of one session: which copies go next, what became of them, and when it is proven that nothing more lands.

A write goes as flights of bounded size, few at a time to each peer; rooms and peers take turns. Nothing here calls the library
while it holds the lock: whoever works takes a job (`take`), does it without the lock, and reports back. So any number of threads
can work, a peer that does not answer keeps at most one of them, and no wait for a flight keeps one at all.

A flight that failed, or does not end, is in doubt. The proof that nothing of it lands any more has three steps: its connections
are closed (a copy that failed alone closed its own; for a batch, a new engine takes the place of the whole one, which is closed
when the flights of others have ended); then the peer's engine answers, or refuses because it has ended; then `residual_ms` pass,
for what was in between.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import partial

import attrs

from pd_fsm.core import events as ev
from pd_fsm.errors import PdError, WireError
from pd_fsm.kv import Plan
from pd_fsm.kv.registration import AddressTable, Copies, batches_of, copies_of
from pd_fsm.runtime.transport import Host
from pd_fsm.transports import mooncake_engine as library
from pd_fsm.transports.mooncake_engine import Engine, Ticket
from pd_fsm.transports.mooncake_peer import Remote, unpack

logger = logging.getLogger("pd_fsm.transports.mooncake")

FLIGHT_COPIES_MAX = 512
FLIGHT_BYTES_MAX = 64 << 20
FLIGHTS_PER_PEER = 2
"""Over tcp the library queues 1,024 copies for a peer, lets 1,024 more wait for a second, and fails what is above."""
POLL_S_MIN, POLL_S_MAX = 50e-6, 5e-3
POLL_S_SLOW = 0.05
AGAIN_S_MIN, AGAIN_S_MAX = 0.05, 10.0

FIGURES = ("bytes", "flights", "errors", "stalled", "unknown", "settled", "engines", "unanswered", "refused")

Job = Callable[[], None]


@attrs.define(eq=False)
class Home:
    """An engine with what depends on it: a new one takes its place when writes are in doubt."""

    engine: Engine
    number: int
    calls: int = 0
    """How many threads are in a call of it. It may be closed when none is."""
    flights: set[Flight] = attrs.field(factory=set)
    doubts: list[Doubt] = attrs.field(factory=list)
    owners: dict[str, bytes] = attrs.field(factory=dict)
    """Which peer each target was when it was opened here: the library caches what it knows of a target for ever."""
    retiring: bool = False
    closing: bool = False
    closed: bool = False


@attrs.define(eq=False)
class Lane:
    """One peer: its writes by generation, the one whose turn it is first."""

    peer: bytes
    descriptor: bytes = b""
    remote: Remote | None = None
    """None when it is given up."""
    queue: dict[int, deque[Write]] = attrs.field(factory=dict)
    home: int = -1
    """Number of the engine that has opened it."""
    flights: int = 0
    busy: bool = False
    """Somebody submits for it, or opens it."""


@attrs.define(eq=False)
class Write:
    op: int
    lane: Lane
    remote: Remote
    generation: int
    plan: Plan
    rest: Iterator[Copies] | None = None
    """Only for whoever has the lane, as `following`."""
    following: Copies | None = None
    flights: int = 0
    doubts: int = 0
    whole: bool = False
    """All of it was submitted."""
    stopped: bool = False
    """Nothing more of it is submitted."""
    reported: bool = False
    """As unknown."""
    error: str = ""


@attrs.define(eq=False)
class Flight:
    write: Write
    home: Home
    nbytes: int
    began: float
    ticket: Ticket | None = None
    stalled: bool = False


@attrs.define(eq=False)
class Doubt:
    """A write of which a flight failed, or ended with its engine. `home`: whose connections are not known to be closed."""

    write: Write
    home: Home | None
    again_s: float = AGAIN_S_MIN


class Writer:
    """Every method may be called from any thread. Outcomes go to the host's inbox."""

    def __init__(
        self,
        host: Host,
        protocol: str,
        make_engine: Callable[[], Engine],
        *,
        residual_ms: float,
        stall_ms: float,
        workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(FIGURES, 0))
        self._host = host
        self._protocol = protocol
        self._make_engine = make_engine
        self._residual_s, self._stall_s = residual_ms / 1e3, stall_ms / 1e3
        self._clock = clock
        self._local = AddressTable.of(host.layout)
        self._changed = threading.Condition()
        self._watched_until = math.inf  # how long whoever waits for the clock sleeps; the others wait for him
        self._home = Home(make_engine(), 0)
        self._retired: Home | None = None
        self._lanes: dict[bytes, Lane] = {}
        self._ready: deque[Lane] = deque()
        self._writes: dict[int, Write] = {}
        self._due: list[tuple[float, int, Job]] = []
        self._order = itertools.count()
        self._waits = 0  # workers that wait for a peer; one is always left for the others
        self._waits_max = workers - 1
        self.stopping = False

    # --- what the session says -------------------------------------------------------------------------------------------

    def begin_lane(self, peer: bytes, descriptor: bytes) -> None:
        try:
            remote = unpack(descriptor, self._protocol, self._host.layout)
        except WireError as error:
            with self._changed:
                self.counts["refused"] += 1
                self._host.emit(ev.PeerUnreachable(peer, f"it cannot be written to: {error}", dead=False))
                self._end_lane(peer, str(error))
            return
        with self._changed:
            lane = self._lanes.setdefault(peer, Lane(peer))
            if lane.descriptor != descriptor:
                self._end_lane_writes(lane, "the peer's memory has changed")
                lane.remote, lane.descriptor, lane.home = remote, descriptor, -1

    def end_lane(self, peer: bytes) -> None:
        """Everything outstanding gets its outcome now."""
        with self._changed:
            self._end_lane(peer, "the peer was given up")

    def _end_lane(self, peer: bytes, why: str) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            return
        lane.remote, lane.descriptor = None, b""
        self._end_lane_writes(lane, why)
        self._forget_if_idle(lane)

    def _end_lane_writes(self, lane: Lane, why: str) -> None:
        for write in [write for write in self._writes.values() if write.lane is lane]:
            self._stop(write, why)
            if write.flights:
                self._report_unknown(write, f"{why} while it was on its way")

    def begin_write(self, op: int, peer: bytes, generation: int, plan: Plan) -> None:
        with self._changed:
            lane = self._lanes.get(peer)
            if lane is None or lane.remote is None or self.stopping:
                self._host.emit(ev.WriteFailed(op, "there is no connection to the peer"))
                return
            write = self._writes[op] = Write(op, lane, lane.remote, generation, plan)
            lane.queue.setdefault(generation, deque()).append(write)
            self._offer(lane)

    def cancel(self, op: int) -> None:
        """What is on its way cannot be stopped; nothing more follows."""
        with self._changed:
            write = self._writes.get(op)
            if write is not None:
                self._stop(write, "cancelled")

    def halt(self, timeout_s: float) -> bool:
        """Submit nothing more, and wait for what is on its way. False when some of it did not end in time."""
        with self._changed:
            for peer in list(self._lanes):
                self._end_lane(peer, "the session was closed")
            self._changed.wait_for(lambda: not (self._home.flights or (self._retired and self._retired.flights)), timeout_s)
            self.stopping = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not (self._home.calls or (self._retired and self._retired.calls)), timeout_s)

    def close(self) -> None:
        """Destroy the engines. Only after `halt` returned True."""
        for home in filter(None, (self._home, self._retired)):
            home.engine.close()

    def figures(self) -> dict[str, int]:
        with self._changed:
            return dict(self.counts) | {"outstanding": len(self._writes), "peers": len(self._lanes)}

    # --- jobs ------------------------------------------------------------------------------------------------------------

    def take(self) -> Job | None:
        """The next thing to do, to be called without a lock; waits until there is one. None when the session is closed."""
        with self._changed:
            while not self.stopping:
                now = self._clock()
                if self._due and self._due[0][0] <= now:
                    return heapq.heappop(self._due)[2]
                for _ in range(len(self._ready)):
                    job = self._job_of(self._ready.popleft())
                    if job is not None:
                        return job
                due = self._due[0][0] if self._due else math.inf
                if due >= self._watched_until:
                    self._changed.wait()
                else:
                    self._watched_until = due
                    self._changed.wait(due - now)
                    self._watched_until = math.inf
            return None

    def _job_of(self, lane: Lane) -> Job | None:
        """Under the lock: what to do for a lane that is ready."""
        home = self._home
        if lane.busy or not lane.queue or lane.remote is None:
            return None
        if lane.home == home.number:
            if lane.flights >= FLIGHTS_PER_PEER:
                return None
            lane.busy = True
            home.calls += 1
            return lambda: self._submit(lane, home)
        if self._waits >= self._waits_max:
            self._later(AGAIN_S_MIN, lambda: self._offer_again(lane))
            return None
        remote = lane.remote
        if home.owners.setdefault(remote.target, lane.peer) != lane.peer:
            self._retire(home)  # what the library knows of that target is of its predecessor
            self._later(AGAIN_S_MIN, lambda: self._offer_again(lane))
            return None
        lane.busy = True
        self._begin_wait()
        self._changed.notify()
        return lambda: self._open(lane, home, remote)

    def _offer(self, lane: Lane) -> None:
        if lane not in self._ready:
            self._ready.append(lane)
        self._changed.notify()

    def _offer_again(self, lane: Lane) -> None:
        with self._changed:
            self._offer(lane)

    def _later(self, delay_s: float, job: Job) -> None:
        """Only by workers: whoever plans something is going to look at the clock next."""
        heapq.heappush(self._due, (self._clock() + delay_s, next(self._order), job))

    def _begin_wait(self) -> None:
        self._waits += 1
        self._changed.notify()  # somebody else looks at the clock

    def _end_wait(self) -> None:
        self._waits -= 1

    def _end_call(self, home: Home) -> None:
        home.calls -= 1
        if self.stopping:
            self._changed.notify_all()
        self._close_if_done(home)

    # --- peers and flights -----------------------------------------------------------------------------------------------

    def _open(self, lane: Lane, home: Home, remote: Remote) -> None:
        """Make sure that a peer answers, before the engine asks it under its own lock."""
        answer = library.answers(remote.address, remote.port)
        with self._changed:
            lane.busy = False
            self._end_wait()
            if answer is library.Answer.ALIVE:
                lane.home = home.number
            elif answer is library.Answer.GONE and lane.remote is remote:
                self._end_lane_writes(lane, f"the peer's Mooncake engine is gone: nobody listens at {remote.target}")
            else:
                self.counts["unanswered"] += 1
                self._later(1.0, lambda: self._offer_again(lane))
                return
            self._forget_if_idle(lane)
            self._offer(lane)

    def _submit(self, lane: Lane, home: Home) -> None:
        """Send the next flight of the room whose turn it is."""
        with self._changed:
            write = next((writes[0] for writes in lane.queue.values()), None)
        copies = None if write is None else self._next_copies(write)
        flight = None
        with self._changed:
            if write is not None and not write.stopped:
                write.whole = write.following is None
                if copies is not None:  # from now on an outcome waits for it
                    flight = Flight(write, home, int(copies.nbytes.sum()), self._clock())
                    home.flights.add(flight)
                    lane.flights += 1
                    write.flights += 1
                self._turn(lane, write)
        if flight is not None and copies is not None:
            columns = (column.tolist() for column in (copies.source, copies.destination, copies.nbytes))
            flight.ticket = home.engine.submit(flight.write.remote.target, *columns)
        with self._changed:
            lane.busy = False
            if flight is not None and flight.ticket is not None:
                self.counts["flights"] += 1
                self._later(0.0, partial(self._look, flight, flight.ticket))
            elif flight is not None:
                self._refused(flight)
            self._offer(lane)
            self._end_call(home)

    def _next_copies(self, write: Write) -> Copies | None:
        """What follows, None when there is nothing."""
        if write.rest is None:
            try:
                copies = copies_of(write.plan, self._local, write.remote.table, FLIGHT_BYTES_MAX)
            except ValueError as error:
                with self._changed:
                    self._stop(write, str(error))
                return None
            write.rest = batches_of(copies, FLIGHT_COPIES_MAX, min(FLIGHT_BYTES_MAX, self._host.limits.in_flight_bytes_max))
            write.following = next(write.rest, None)
        now, write.following = write.following, next(write.rest, None)
        return now

    def _turn(self, lane: Lane, write: Write) -> None:
        """The next room's turn; a write of which all is submitted leaves the queue."""
        writes = lane.queue.pop(write.generation)
        if write.whole:
            writes.popleft()
        if writes:
            lane.queue[write.generation] = writes
        self._finish_if_done(write)

    def _refused(self, flight: Flight) -> None:
        """The library took nothing, or not all. Over tcp its refusal comes before anything begins."""
        self._land(flight)
        write, reason = flight.write, "Mooncake refused the transfer"
        write.whole = False
        if self._protocol != "tcp":
            self._doubt(write, flight.home, reason)
        self._stop(write, reason)

    def _look(self, flight: Flight, ticket: Ticket) -> None:
        """Whether a flight has ended."""
        with self._changed:
            home = flight.home
            if flight not in home.flights or home.closing:
                return
            home.calls += 1
        status = home.engine.check(ticket)
        done = status == library.DONE
        ended = done or status == library.FAILED
        if ended and ticket.batch:
            with self._changed:
                self._changed.notify()  # in case the rest takes longer than it should
            done = home.engine.finish(ticket) and done
        with self._changed:
            if ended:
                self._ended(flight, done)
            else:
                age = self._clock() - flight.began
                if age >= self._stall_s and not flight.stalled:
                    self._stall(flight)
                self._later(
                    min(max(age / 16, POLL_S_MIN), POLL_S_MAX if age < 1 else POLL_S_SLOW), lambda: self._look(flight, ticket)
                )
            self._end_call(home)

    def _land(self, flight: Flight) -> None:
        """It is not on its way any more."""
        flight.home.flights.discard(flight)
        flight.write.flights -= 1
        lane = flight.write.lane
        if flight.home is self._home:
            lane.flights -= 1
        self._offer(lane)
        self._forget_if_idle(lane)
        if not self._home.flights:
            self._changed.notify_all()  # for `halt`

    def _ended(self, flight: Flight, good: bool) -> None:
        self._land(flight)
        write = flight.write
        if good:
            self.counts["bytes"] += flight.nbytes
        else:
            self.counts["errors"] += 1
            reason = "Mooncake failed the transfer"
            alone = flight.ticket is not None and not flight.ticket.batch  # a copy alone has closed its connection
            self._doubt(write, None if alone else flight.home, reason)
            self._stop(write, reason)
        self._finish_if_done(write)

    def _stall(self, flight: Flight) -> None:
        flight.stalled = True
        self.counts["stalled"] += 1
        self._report_unknown(flight.write, f"no end after {self._stall_s:g} s (transport option `stall_ms`)")
        self._stop(flight.write, "stalled")
        self._retire(flight.home)

    # --- outcomes --------------------------------------------------------------------------------------------------------

    def _stop(self, write: Write, why: str) -> None:
        """Submit nothing more of it. Its outcome comes when what is on its way has ended."""
        if write.stopped:
            return
        write.stopped = True
        write.error = write.error or why
        queue = write.lane.queue
        writes = queue.get(write.generation)
        if writes and write in writes:
            writes.remove(write)
            if not writes:
                del queue[write.generation]
        self._finish_if_done(write)

    def _report_unknown(self, write: Write, reason: str) -> None:
        if not write.reported:
            write.reported = True
            self.counts["unknown"] += 1
            self._host.emit(ev.WriteUnknown(write.op, reason))

    def _finish_if_done(self, write: Write) -> None:
        """Say how an operation ended, once nothing of it is on its way or in doubt and nothing more follows."""
        if write.flights or write.doubts or not (write.stopped or write.whole) or self._writes.get(write.op) is not write:
            return
        del self._writes[write.op]
        if write.reported:
            self.counts["settled"] += 1
            self._host.emit(ev.WriteSettled(write.op))
        elif not write.whole:
            self._host.emit(ev.WriteFailed(write.op, write.error))
        else:
            self._host.emit(ev.WriteDone(write.op, write.plan.total_bytes, notified=False))

    def _forget_if_idle(self, lane: Lane) -> None:
        if lane.remote is None and not lane.flights and not lane.busy and self._lanes.get(lane.peer) is lane:
            del self._lanes[lane.peer]

    # --- doubt -----------------------------------------------------------------------------------------------------------

    def _doubt(self, write: Write, home: Home | None, reason: str) -> None:
        self._report_unknown(write, reason)
        write.doubts += 1
        doubt = Doubt(write, home)
        self._later(0.0, lambda: self._verify(doubt))

    def _verify(self, doubt: Doubt) -> None:
        """Look for the proof that nothing more of it lands."""
        remote, home = doubt.write.remote, doubt.home
        with self._changed:
            if self._waits >= self._waits_max:
                self._later(AGAIN_S_MIN, lambda: self._verify(doubt))
                return
            self._begin_wait()
        answer = library.answers(remote.address, remote.port)
        with self._changed:
            self._end_wait()
            home = None if home is None or home.closed else home
            if answer is library.Answer.GONE or (answer is library.Answer.ALIVE and home is None):
                self._later(self._residual_s, lambda: self._settle(doubt))
            elif home is not None:  # its connections may be open as long as the engine is there
                home.doubts.append(doubt)
                self._retire(home)
            else:
                doubt.again_s = min(2 * doubt.again_s, AGAIN_S_MAX)
                self._later(doubt.again_s, lambda: self._verify(doubt))

    def _settle(self, doubt: Doubt) -> None:
        with self._changed:
            doubt.write.doubts -= 1
            self._finish_if_done(doubt.write)

    def _retire(self, home: Home) -> None:
        """Let a new engine take its place, once."""
        if not home.retiring:
            home.retiring = True
            self._later(0.0, self._replace)

    def _replace(self) -> None:
        with self._changed:
            old = self._home
            if self._retired is not None:
                self._later(AGAIN_S_MIN, self._replace)
                return
            old.calls += 1  # so that nobody closes meanwhile
            self._changed.notify()
        try:
            engine = self._make_engine()
        except PdError:
            logger.exception("%s: Mooncake does not start anew; unknown outcomes stay unknown meanwhile", self._host.name)
            with self._changed:
                self._later(AGAIN_S_MAX, self._replace)
                self._end_call(old)
            return
        with self._changed:
            self.counts["engines"] += 1
            self._home, self._retired = Home(engine, old.number + 1), old
            for lane in self._lanes.values():
                lane.flights = 0  # those of the old engine do not count here
                self._offer(lane)
            self._end_call(old)

    def _close_if_done(self, home: Home) -> None:
        """Close a retired engine when all that is still on its way there is unknown anyway."""
        if home is self._retired and not home.calls and not home.closing and all(f.write.reported for f in home.flights):
            home.closing = True
            self._later(0.0, lambda: self._close_home(home))

    def _close_home(self, home: Home) -> None:
        home.engine.close()
        with self._changed:
            self._retired, home.closed = None, True
            doubts = [*home.doubts]
            for flight in home.flights:
                flight.write.flights -= 1
                flight.write.doubts += 1
                doubts.append(Doubt(flight.write, None))
            home.flights.clear()
            home.doubts.clear()
            for doubt in doubts:
                doubt.home, doubt.again_s = None, AGAIN_S_MIN
                self._later(0.0, partial(self._verify, doubt))
            self._changed.notify_all()
