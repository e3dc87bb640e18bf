"""A session's client of HTTP bootstrap servers: the thread behind `rendezvous.HttpRendezvous`.

It owns the thread, its loop and its HTTP session, and turns answers into events. It never runs on the caller's thread, never lets
anything wait without a deadline, and never repeats a lookup: the core does. What it keeps alive on its own is this rank's
registration and the announcements of its rooms, because no room waits for their answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, TypeAlias, TypeVar

import attrs
import msgspec
from msgspec import Meta

from pd_fsm.core.events import LookupFailed, PeerRecord, PeersFound, RegistrationFailed
from pd_fsm.core.wire import Room
from pd_fsm.errors import LocalProtocolError
from pd_fsm.runtime.bootstrap_client import BootstrapClient, NoAnswer, base_url
from pd_fsm.runtime.bootstrap_routes import ROOMS_PER_REQUEST_MAX, Rank, Serial, Size
from pd_fsm.runtime.peer_table import PEERS_MAX, Slot, check_record, sizes_of, slot_of, why_incomplete

TIMEOUT_MS = 2_000
LOOKUPS_MAX = 65_536  # asked and not answered yet; more are answered LookupFailed at once
ANNOUNCED_MAX = 65_536  # rooms remembered so that a restarted server can be told again; the oldest goes first
RETRY_MIN_MS = 100.0  # of a registration that failed; doubles
RETRY_MAX_MS = 1_000.0
RENEW_MIN_MS = 100.0  # whatever lease a server answers, it is not asked more often
CLOSED = "the rendezvous client was closed"


class _Granted(msgspec.Struct):
    lease_ms: float
    server: str = ""


class _Peers(msgspec.Struct):
    peers: Annotated[list[PeerRecord], Meta(max_length=PEERS_MAX)]


class _Rooms(msgspec.Struct):
    rooms: Annotated[dict[Room, Rank], Meta(max_length=ROOMS_PER_REQUEST_MAX)]
    dp_size: Size | None
    announcements: Annotated[dict[Room, Serial], Meta(max_length=ROOMS_PER_REQUEST_MAX)] = {}


@attrs.frozen(eq=False)
class _Announcement:
    """That a room was opened here. No two are equal: one that is made again while it is being sent is sent once more, because the
    server must count it."""

    dp_rank: int


Records: TypeAlias = tuple[PeerRecord, ...]
Owner: TypeAlias = tuple[int, int]
"""The dp_rank that serves a room, and the serial of the announcement that says so, 0 when none was needed."""
Emit: TypeAlias = Callable[[PeersFound | LookupFailed | RegistrationFailed], None]
T = TypeVar("T")


class HttpRendezvous:
    """A session's client of HTTP bootstrap servers: its own at `url`, and others by the address of a lookup.

    One daemon thread runs everything; the caller's thread only fills bounded tables. `timeout_ms` bounds each lookup and each
    request. The token goes to every server that is asked. A lookup asked again under the same `query` while it is open is the
    same lookup. Raises ConfigError for an unusable url or token, MissingDependency without aiohttp. Thread-safe.
    """

    def __init__(self, url: str, token: str | None = None, timeout_ms: float = TIMEOUT_MS) -> None:
        self.url = base_url(url)
        self._http = BootstrapClient(token, timeout_ms)
        self._close_s = 0.0
        self._lock = threading.Lock()  # guards the next four, which callers touch
        self._closed = False
        self._open: set[int] = set()  # queries that are not answered yet
        self._unsent: OrderedDict[int, _Announcement] = OrderedDict()  # by room
        self._dropped = 0  # announcements lost to ANNOUNCED_MAX since the last report
        # The rest belongs to the thread.
        self._stop, self._announce_wanted = asyncio.Event(), asyncio.Event()
        self._announced: OrderedDict[int, _Announcement] = OrderedDict()
        self._server = ""
        self._reported: dict[object, str] = {}
        self._registrations: dict[Slot, tuple[str, asyncio.Task[None]]] = {}  # its lease, and who keeps it
        self._groups: dict[tuple[str, int], asyncio.Task[Records]] = {}  # requests in flight, shared by their lookups
        self._asking: dict[str, list[tuple[int, asyncio.Future[Owner]]]] = {}  # by address: rooms to ask for
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._emit: Emit = _not_started

    def start(self, emit: Emit) -> None:
        if self._thread is not None:
            raise LocalProtocolError(f"the rendezvous client of {self.url} was already started; each session needs its own")
        self._emit = emit
        self._loop = asyncio.new_event_loop()
        main = self._loop.create_task(self._main())  # first in the loop, so that everything else finds its HTTP session
        self._thread = threading.Thread(target=self._run, args=(self._loop, main), name="pd-fsm-rendezvous", daemon=True)
        self._thread.start()

    def register(self, record: PeerRecord) -> None:
        """As the protocol says; registering the same rank again replaces its record. Raises LocalProtocolError for a bad record."""
        try:
            check_record(record)
        except ValueError as error:
            raise LocalProtocolError(f"this rank cannot be registered: {error}") from error
        with self._lock:
            self._call(self._begin_registration, record)

    def announce(self, room: int, dp_rank: int) -> None:
        with self._lock:
            if not self._unsent:
                self._call(self._announce_wanted.set)
            if room not in self._unsent and len(self._unsent) >= ANNOUNCED_MAX:
                self._unsent.popitem(last=False)
                self._dropped += 1
            self._unsent[room] = _Announcement(dp_rank)

    def lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:
        with self._lock:
            if query in self._open:
                return
            if len(self._open) < LOOKUPS_MAX and self._call(self._begin_lookup, query, address, room, dp_rank):
                self._open.add(query)
                return
            why = CLOSED if self._closed else f"{LOOKUPS_MAX} lookups are waiting, which is the limit"
        self._emit(LookupFailed(query, why))

    def close(self, timeout_s: float = 1.0) -> None:
        with self._lock:
            if not self._closed and self._loop is not None:
                self._close_s = max(0.0, timeout_s) * 0.8  # the rest is for closing what is left
                self._call(self._stop.set)
            self._closed = True
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _call(self, function: Callable[..., None], *arguments: object) -> bool:
        """Have the thread run it soon; False once closed. With the lock held, because close() ends the loop."""
        if self._closed:
            return False
        if self._loop is None:
            raise LocalProtocolError(f"the rendezvous client of {self.url} was not started; call start(emit) first")
        self._loop.call_soon_threadsafe(function, *arguments)
        return True

    # --- everything below runs on the thread ---------------------------------------------------------------------------------

    def _run(self, loop: asyncio.AbstractEventLoop, main: asyncio.Task[None]) -> None:
        try:
            loop.run_until_complete(main)
            loop.run_until_complete(loop.shutdown_default_executor())  # where host names are resolved
        finally:
            with self._lock:
                self._closed = True
            for query in list(self._open):  # none, unless something unforeseen ended the loop
                self._answer(LookupFailed(query, CLOSED))
            loop.close()

    async def _main(self) -> None:
        async with self._http:
            self._spawn(self._announce_rooms())
            await self._stop.wait()
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            removals = [
                self._http.ask("DELETE", self.url, "/v1/peers", dict, {"lease": held}) for held, _ in self._registrations.values()
            ]
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.gather(*removals, return_exceptions=True), self._close_s)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # a failure nobody waits for any more is no news
        return task

    # --- this rank ----------------------------------------------------------------------------------------------------------

    def _begin_registration(self, record: PeerRecord) -> None:
        lease, previous = self._registrations.get(slot_of(record), (secrets.token_hex(16), None))
        if previous is not None:
            previous.cancel()
        self._registrations[slot_of(record)] = (lease, self._spawn(self._keep_registered(record, lease)))

    async def _keep_registered(self, record: PeerRecord, lease: str) -> None:
        registered, renew_ms, failures = False, 0.0, 0
        while True:
            try:
                if registered:
                    await self._http.ask("POST", self.url, "/v1/peers/renew", dict, {"lease": lease}, timeout_ms=renew_ms)
                else:
                    granted = await self._http.ask("PUT", self.url, "/v1/peers", _Granted, {"record": record, "lease": lease})
                    registered, renew_ms = True, max(RENEW_MIN_MS, granted.lease_ms / 3)
                    self._meet(granted.server)
                self._report(slot_of(record), "")
                failures, wait_ms = 0, renew_ms
            except NoAnswer as error:
                if registered and error.status == 404:  # the lease lapsed, or the server was restarted and knows nobody
                    registered = False
                    continue
                self._report(slot_of(record), str(error))
                failures += 1
                wait_ms = min(error.retry_ms, RETRY_MAX_MS) if error.retry_ms > 0 else _backoff_ms(failures)
            await asyncio.sleep(wait_ms / 1000)

    def _meet(self, server: str) -> None:
        """Another server answers at our address: it knows none of the rooms that its predecessor was told."""
        if self._server not in ("", server):
            with self._lock:
                self._unsent = OrderedDict({**self._announced, **self._unsent})
            self._announced.clear()
            self._announce_wanted.set()
        self._server = server

    async def _announce_rooms(self) -> None:
        failures = 0
        while True:
            await self._announce_wanted.wait()
            with self._lock:
                batch = dict(itertools.islice(self._unsent.items(), ROOMS_PER_REQUEST_MAX))
                dropped, self._dropped = self._dropped, 0
                if not batch:
                    self._announce_wanted.clear()
                    continue
            refused = False
            try:
                rooms = {room: announcement.dp_rank for room, announcement in batch.items()}
                await self._http.ask("POST", self.url, "/v1/rooms", dict, {"rooms": rooms})
                failures, reason = 0, ""
            except NoAnswer as error:
                failures, reason = failures + 1, f"rooms are not announced: {error}"
                refused = error.status == 400  # it will not be taken later either
            if dropped:
                reason = (
                    f"more than {ANNOUNCED_MAX} rooms wait to be announced, the oldest were dropped; {reason or 'now it works'}"
                )
            self._report("rooms", reason)
            if failures and not refused:
                await asyncio.sleep(_backoff_ms(failures) / 1000)
                continue
            with self._lock:
                for room, announcement in batch.items():
                    if self._unsent.get(room) is announcement:  # else it was announced again meanwhile
                        del self._unsent[room]
            self._announced.update({} if refused else batch)
            while len(self._announced) > ANNOUNCED_MAX:
                self._announced.popitem(last=False)

    def _report(self, subject: object, reason: str) -> None:
        """Tell the session what is not registered, once for each change."""
        if self._reported.get(subject, "") == reason:
            return
        self._reported[subject] = reason
        open_reasons = [text for text in self._reported.values() if text]
        self._emit(RegistrationFailed("; ".join(open_reasons)))

    # --- the others ---------------------------------------------------------------------------------------------------------

    def _begin_lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:
        assert self._loop is not None
        task = self._spawn(self._find(address, room, dp_rank))
        timer = self._loop.call_later(self._http.timeout_ms / 1000, task.cancel)
        task.add_done_callback(lambda _: self._end_lookup(query, address, task, timer))

    def _end_lookup(self, query: int, address: str, task: asyncio.Task[tuple[Records, int]], timer: asyncio.TimerHandle) -> None:
        """Every lookup ends here, whichever way: this is where it gets its one answer."""
        timer.cancel()
        if not task.cancelled() and task.exception() is None:
            self._answer(PeersFound(query, *task.result()))
        elif not task.cancelled():
            self._answer(LookupFailed(query, str(task.exception())))
        elif self._stop.is_set():
            self._answer(LookupFailed(query, CLOSED))
        else:
            self._answer(LookupFailed(query, f"{address or self.url}: no answer within {self._http.timeout_ms:.0f} ms"))

    def _answer(self, answer: PeersFound | LookupFailed) -> None:
        with self._lock:
            self._open.discard(answer.query)
        self._emit(answer)

    async def _find(self, address: str, room: int, dp_rank: int | None) -> tuple[Records, int]:
        """The ranks, and the serial of the announcement that led to them."""
        base = base_url(address) if address else self.url
        announcement = 0
        if dp_rank is None:
            dp_rank, announcement = await self._owner_of(base, room)
        request = self._groups.get((base, dp_rank))
        if request is None:
            request = self._groups[base, dp_rank] = self._spawn(self._fetch_group(base, dp_rank))
            request.add_done_callback(lambda _: self._groups.pop((base, dp_rank)))
        return await asyncio.shield(request), announcement  # one lookup that gives up does not cancel it for the others

    async def _fetch_group(self, base: str, dp_rank: int) -> Records:
        answer = await self._http.ask("GET", base, f"/v1/peers?dp_rank={dp_rank}", _Peers)
        try:
            _check_group(answer.peers, dp_rank)
        except ValueError as error:
            raise NoAnswer(f"{base}: the answer about dp_rank {dp_rank} is not valid: {error}") from error
        missing = why_incomplete(answer.peers, dp_rank)
        if missing is not None:
            raise NoAnswer(f"{base}: {missing}")
        return tuple(answer.peers)

    async def _owner_of(self, base: str, room: int) -> Owner:
        waiting = self._asking.get(base)
        if waiting is None:
            waiting = self._asking[base] = []
            self._spawn(self._ask_rooms(base))
        future: asyncio.Future[Owner] = asyncio.get_running_loop().create_future()
        waiting.append((room, future))
        return await future

    async def _ask_rooms(self, base: str) -> None:
        """Ask `base` about rooms, one request at a time: what comes meanwhile is the next batch, and fails with this one."""
        waiting = self._asking[base]
        try:
            while waiting:
                batch = waiting[:ROOMS_PER_REQUEST_MAX]
                rooms = sorted({room for room, _ in batch})
                answer = await self._http.ask("POST", base, "/v1/rooms/query", _Rooms, {"rooms": rooms})
                del waiting[: len(batch)]
                for room, future in batch:
                    dp_rank = 0 if answer.dp_size == 1 else answer.rooms.get(room)
                    if future.done():  # its lookup gave up
                        continue
                    if dp_rank is None:
                        future.set_exception(NoAnswer(f"{base}: room {room} is not registered yet with any data-parallel rank"))
                    else:
                        future.set_result((dp_rank, 0 if answer.dp_size == 1 else answer.announcements.get(room, 0)))
        except NoAnswer as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
        finally:
            del self._asking[base]


def _check_group(records: Sequence[PeerRecord], dp_rank: int) -> None:
    """Raise ValueError unless `records` can be ranks of one deployment's `dp_rank`, each once."""
    for record in records:
        check_record(record)
        if record.dp_rank != dp_rank or sizes_of(record) != sizes_of(records[0]):
            raise ValueError(f"it mixes deployments or data-parallel ranks: {record.endpoint} does not belong there")
    if len({slot_of(record) for record in records}) != len(records):
        raise ValueError("a rank is listed twice")


def _backoff_ms(failures: int) -> float:
    return min(RETRY_MAX_MS, math.ldexp(RETRY_MIN_MS, min(failures - 1, 16))) * random.uniform(0.75, 1.0)


def _not_started(_: object) -> None:
    raise AssertionError("nothing is emitted before start()")
