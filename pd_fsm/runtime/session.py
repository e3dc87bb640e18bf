"""The native API: what an engine embeds.

Every call of the engine returns at once: it takes the session's lock for one step of the core and does no I/O. What must happen
because of it is done by the driver, on its thread or in `Session.progress()`. Nothing that a peer, a transport or a timer does
raises here; it is a phase and a `Failure`.
"""

from __future__ import annotations

import contextlib
import operator
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.events import Failure
from pd_fsm.core.ledger import Room
from pd_fsm.core.session import Identity, SessionCore
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.core.wire import pack_pages
from pd_fsm.errors import ConfigError, LocalProtocolError, RoomFailed, WaitTimeout, WireError
from pd_fsm.kv import KVLayout
from pd_fsm.machines import Phase
from pd_fsm.runtime.board import PollBoard
from pd_fsm.runtime.clock import now_ms
from pd_fsm.runtime.driver import Driver
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.rendezvous import HttpRendezvous, Rendezvous
from pd_fsm.runtime.trace import TraceWriter
from pd_fsm.runtime.transport import Factory, Host, make_transport

PageIndices: TypeAlias = "Sequence[int] | NDArray[np.integer[Any]]"
Pages: TypeAlias = "PageIndices | Mapping[str, PageIndices]"
"""Page numbers in the order of the sequence; for a layout with several index spaces, one list for each by name."""
HandleT = TypeVar("HandleT", bound="Handle")
_PHASES = tuple(sorted(Phase))  # by value, which costs a fifth of a call of the enum
_slot_of = operator.attrgetter("_slot")
_COUNT_MAX = (1 << 31) - 1
LINGER_MS = 500
"""How long the last frames, the goodbyes among them, get to leave a closing session."""


class Handle:
    """A room as its owner sees it. Thread-safe. As a context manager it aborts a room that is still live, and clears it."""

    __slots__ = ("_board", "_groups", "_room", "_session", "_slot", "cleared")

    def __init__(self, session: Session, room: Room, slot: int) -> None:
        self._session = session
        self._room = room
        self._board = session.phases
        self._slot = slot
        self.cleared = False
        self._groups: list[HandleGroup] = []

    @property
    def room(self) -> int:
        return self._room.room

    @property
    def generation(self) -> int:
        """Unique among all rooms that this process ever opened."""
        return self._room.generation

    def poll(self) -> int:
        """The phase as an integer; one read of the poll board, never blocks. Stays the last phase after `clear()`."""
        return self._board[self._slot]

    @property
    def phase(self) -> Phase:
        return _PHASES[self._board[self._slot]]

    @property
    def failure(self) -> Failure | None:
        """Why the room failed; None while it did not. Set before the phase shows FAILED."""
        return self._room.failure

    @property
    def pages_free(self) -> bool:
        """Whether the room concluded and nobody else can touch its memory any more. Valid after `clear()`, too.

        Pages of a failed room must not go back to their allocator before this is True, on either side.
        """
        return not self._room.live and self._room.lease.owned

    @property
    def bytes_moved(self) -> int:
        """Bytes of confirmed parts, both for the sender and the receiver."""
        return self._room.bytes_moved

    def abort(self, reason: str = "aborted by the engine") -> None:
        """Fail the room, now. The other side is told why. Does nothing to a room that concluded."""
        self._session.driver.call(ev.AbortRequested(self._room.generation, str(reason)))

    def clear(self) -> None:
        """Forget the room; idempotent. Raises LocalProtocolError while it is live. What is owed about its memory goes on."""
        self._session.clear(self)

    def raise_for_failure(self) -> None:
        """Raise RoomFailed if the room failed."""
        if self._room.failure is not None:
            raise RoomFailed(self._room.room, self._room.failure)

    def wait(self, timeout_s: float) -> Phase:
        """Wait until the room concluded. For scripts and tests; a scheduler polls. Raises WaitTimeout; the room goes on."""
        # The board and not the room, which another thread may be moving at this moment: what was waited for must be what is read.
        ended = (Phase.SUCCESS, Phase.FAILED)
        self._session.wait_until(lambda: self.poll() in ended, timeout_s, f"room {self.room} to conclude", self)
        return self.phase

    def wait_pages_free(self, timeout_s: float) -> None:
        """Wait until `pages_free`. For scripts and tests. Raises WaitTimeout."""
        self._session.wait_until(lambda: self.pages_free, timeout_s, f"the pages of room {self.room}", self)

    def __enter__(self: HandleT) -> HandleT:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._room.live:
            self.abort(f"left by {kind.__name__}: {error}" if kind else "left before it concluded")
        self.clear()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} room={self.room} generation={self.generation} {self.phase.name}>"

    def latch(self) -> None:
        """Point at the constant slot of the last phase, before the room's own slot goes to another room. For the session."""
        self.cleared = True
        self._slot = self._board[self._slot]
        for group in self._groups:
            group.moved(self)

    @property
    def slot(self) -> int:
        """The room's place on the poll board. For groups."""
        return self._slot

    @property
    def groups(self) -> list[HandleGroup]:
        return self._groups


class Sender(Handle):
    """The prefill side of a room."""

    __slots__ = ()

    @property
    def decode_prefix_len(self) -> int | None:
        """Tokens that decode already has, so that prefill need not send them; None until all readers have offered."""
        return self._room.decode_prefix_len()

    def send(self, pages: Pages, tokens: tuple[int, int], *, last: bool = False, aux: int | None = None) -> None:
        """Hand in one chunk: tokens [start, end) of the sequence were computed into `pages`.

        Chunks continue each other, and all but the last end on a page boundary. It may be called before the peers are known: chunks
        are kept until they are. `aux` is the aux row that goes with the last chunk. The pages stay untouched until `pages_free`.
        Raises LocalProtocolError for a chunk that does not fit; a room that concluded ignores it.
        """
        packed = self._session.pack(pages)
        try:
            start, end = tokens
        except (TypeError, ValueError):
            raise LocalProtocolError(f"room {self.room}: tokens must be (start, end), not {tokens!r}") from None
        start, end = _integer("tokens", start, 0, _COUNT_MAX), _integer("tokens", end, 0, _COUNT_MAX)
        self._session.driver.call(ev.ChunkReady(self.generation, start, end, packed, bool(last), _row(aux)))


class Receiver(Handle):
    """The decode side of a room."""

    __slots__ = ()

    @property
    def tokens_computed(self) -> int | None:
        """Tokens that prefill holds for a room that was opened without pages, when it is done; None before."""
        return self._room.tokens_computed

    def grant(self, pages: Pages, *, aux: int | None = None, decode_prefix_len: int = 0, tokens: int | None = None) -> None:
        """Give a room that was opened with `pages=None` its pages, at the latest when `tokens_computed` says how many are needed.

        Raises LocalProtocolError for pages that are not this layout's, or a room that has its pages; a room that concluded
        ignores it.
        """
        prefix = _integer("decode_prefix_len", decode_prefix_len, 0, _COUNT_MAX)
        self._session.driver.call(ev.GrantPages(self.generation, self._session.pack(pages), _row(aux), prefix, _tokens(tokens)))


class HandleGroup:
    """Handles that are polled together: `poll()` of thousands is one gather. Not thread-safe; made by `Session.group`."""

    def __init__(self, session: Session, handles: Iterable[Handle] = ()) -> None:
        self._board = session.board_array
        self._index: dict[Handle, int] = {}
        self._slots: NDArray[np.intp] = np.empty(64, dtype=np.intp)
        self._phases: NDArray[np.int8] = np.empty(64, dtype=np.int8)
        self.handles: list[Handle] = []
        """In the order of the array that `poll()` returns."""
        for handle in handles:
            self.add(handle)

    def __len__(self) -> int:
        return len(self.handles)

    def add(self, handle: Handle) -> None:
        """Add a handle; one that is there already is left alone."""
        if handle in self._index:
            return
        count = len(self.handles)
        if count == len(self._slots):
            self._slots = np.resize(self._slots, 2 * count)
            self._phases = np.empty(2 * count, dtype=np.int8)
        self._index[handle] = count
        self._slots[count] = handle.slot
        self.handles.append(handle)
        handle.groups.append(self)

    def discard(self, handle: Handle) -> None:
        """Take a handle out, in constant time: the last one takes its place."""
        index = self._index.pop(handle, None)
        if index is None:
            return
        handle.groups.remove(self)
        last = self.handles.pop()
        if last is not handle:
            self.handles[index] = last
            self._index[last] = index
            self._slots[index] = last.slot

    def poll(self) -> NDArray[np.int8]:
        """int8 [len(handles)]: the phases, aligned with `handles`. The array is the group's own and valid until the next call."""
        count = len(self.handles)
        return self._board.take(self._slots[:count], out=self._phases[:count], mode="clip")

    def moved(self, handle: Handle) -> None:
        """The handle's slot changed. For the handle."""
        self._slots[self._index[handle]] = handle.slot


class Session:
    """One rank's session layer. Made by `open_session`. Thread-safe, except `group`s and `close`."""

    def __init__(
        self, driver: Driver, board: PollBoard, reactor: Reactor, layout: KVLayout, leave_rendezvous: Callable[[], None]
    ) -> None:
        self.driver = driver
        self.layout = layout
        self.phases = board.phases
        self.board_array = board.array
        self._board = board
        self._leave_rendezvous = leave_rendezvous
        self._reactor = reactor
        self._closers: list[Any] = []
        self._closed = False
        self._single_space = next(iter(driver.core.spaces)) if len(driver.core.spaces) == 1 else None

    @property
    def name(self) -> str:
        return self.driver.core.identity.name

    @property
    def incarnation(self) -> bytes:
        """16 random bytes that name this life of this process."""
        return self.driver.core.identity.incarnation

    # --- rooms -----------------------------------------------------------------------------------------------------------

    def send(self, room: int, *, readers: int = 1) -> Sender:
        """Open `room` on the prefill side. `readers` is how many decode ranks this rank writes to.

        Raises LocalProtocolError if the room is open already, the session is closing, or `Limits.rooms_max` is reached.
        """
        return self._open(ev.OpenSend(_room(room), _integer("readers", readers, 0, _COUNT_MAX)), Sender)

    def receive(
        self,
        room: int,
        pages: Pages | None,
        *,
        aux: int | None = None,
        decode_prefix_len: int = 0,
        tokens: int | None = None,
        prefill: str | None = None,
        prefill_dp_rank: int | None = None,
    ) -> Receiver:
        """Open `room` on the decode side and grant `pages`, in the order of the sequence after the prefix, to its prefill ranks.

        `aux` is the row that receives the aux data; `decode_prefix_len` how many tokens at the start are here already (a multiple
        of the page size); `tokens` the length of the whole prompt, so that a prefill which computed another one fails the room;
        `prefill` where to look the prefill up, default the session's rendezvous; without `prefill_dp_rank` the rendezvous is
        asked which data-parallel rank serves the room. With `pages=None` they are reserved later, by
        `Receiver.grant`, for example when prefill is done (`Receiver.tokens_computed`). Raises LocalProtocolError as `send`
        does, and for pages that are not this layout's.
        """
        if not (prefill is None or isinstance(prefill, str)):
            raise LocalProtocolError(f"prefill must be the address of a bootstrap server, not {prefill!r}")
        request = ev.OpenReceive(
            _room(room),
            None if pages is None else self.pack(pages),
            _row(aux),
            _integer("decode_prefix_len", decode_prefix_len, 0, _COUNT_MAX),
            prefill or "",
            None if prefill_dp_rank is None else _integer("prefill_dp_rank", prefill_dp_rank, 0, _COUNT_MAX),
            _tokens(tokens),
        )
        return self._open(request, Receiver)

    def _open(self, event: ev.OpenSend | ev.OpenReceive, kind: type[HandleT]) -> HandleT:
        driver = self.driver
        with driver.lock:
            driver.apply(driver.core.step(event, driver.clock_ms()))
            opened = driver.core.registry.by_room[event.room]
            handle = kind(self, opened, self._board.slot(opened.generation))
        self._reactor.wake()
        return handle

    def cancel(self, room: int, reason: str = "cancelled by the engine") -> None:
        """Abort a room by its number, also one that is not open here yet: it fails when it is opened, and its peers learn it.

        What is not open yet is remembered for `Deadlines.tombstone_ms`. A room that concluded is left alone, but one that was
        aborted and is not cleared yet fails at once when it is opened again: a cancel outlives a retraction. For one that was
        cleared the cancel is late: the next request with that number is not touched, for `Deadlines.tombstone_ms`.
        """
        self.driver.call(ev.CancelRequested(_room(room), str(reason)))

    def begin_drain(self, reason: str = "the engine is being drained") -> None:
        """Take no new rooms; running ones finish. Peers are told, and a prefill rank leaves the rendezvous. Returns at once.

        When `drained`, close the session; the engine can then open another one, in the other role too.
        """
        self.driver.call(ev.DrainRequested(reason))
        if self.driver.core.sends:  # the rendezvous may take its bounded time over it, so not on this thread
            threading.Thread(target=self._leave_rendezvous, name=f"pd-fsm-leave-{self.name}", daemon=True).start()

    @property
    def drained(self) -> bool:
        """Whether nothing is left to finish: no live room, no write, no memory that somebody else may touch."""
        with self.driver.lock:
            live = any(room.live for room in self.driver.core.registry.by_room.values())
        return not live and not self._owes()

    def clear(self, handle: Handle) -> None:
        """Forget a room, and give its slot on the poll board back in the same step. For the handle."""
        driver = self.driver
        with driver.lock:
            if handle.cleared:
                return
            driver.apply(driver.core.step(ev.ClearRequested(handle.generation), driver.clock_ms()))
            handle.latch()
            self._board.remove(handle.generation)
        self._reactor.wake()

    def pack(self, pages: Pages) -> ev.Pages:
        """Page numbers as the core wants them: packed, by index space."""
        if isinstance(pages, Mapping):
            return {space: _pack(indices) for space, indices in pages.items()}
        if self._single_space is None:
            raise LocalProtocolError(f"pages must be given for each index space {sorted(self.driver.core.spaces)}")
        return {self._single_space: _pack(pages)}

    # --- polling ---------------------------------------------------------------------------------------------------------

    def group(self, handles: Iterable[Handle] = ()) -> HandleGroup:
        """Handles that are polled together, for passes over thousands of rooms."""
        return HandleGroup(self, handles)

    def poll_many(self, handles: Sequence[Handle] | HandleGroup) -> NDArray[np.int8]:
        """int8 [len(handles)]: their phases. A `HandleGroup` is polled without touching its handles one by one."""
        if isinstance(handles, HandleGroup):
            return handles.poll()
        slots = np.fromiter(map(_slot_of, handles), dtype=np.intp, count=len(handles))
        return self.board_array.take(slots)

    def progress(self) -> bool:
        """Drive the session a bounded step from the engine's own loop; never blocks. True when something was done.

        With `thread=True` it is optional and spares a busy engine the hand-over between threads.
        """
        return self.driver.progress()

    def wait(self, timeout_ms: float) -> None:
        """Sleep until there is something to drive, at most `timeout_ms`. For loops that drive the session themselves."""
        self.driver.wait(timeout_ms)

    def wait_until(self, done: Any, timeout_s: float, what: str, handle: Handle) -> None:
        """Wait for `done()`, driving the session if nobody else does. Raises WaitTimeout. For the handle."""
        deadline = time.monotonic() + timeout_s
        while not done():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                with self.driver.lock:
                    why = self.driver.core.why_waiting(handle._room) if handle._room.live else handle.phase.name  # noqa: SLF001
                raise WaitTimeout(f"waited {timeout_s} s for {what}; {why}")
            if self.driver.threaded:
                with self.driver.concluded:
                    if not done():
                        self.driver.concluded.wait(min(left_s, 0.05))
            elif not self.progress():
                self.wait(min(left_s * 1e3, 50.0))

    # --- the rest --------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Every room and what it waits for, leases and their holders, peers, table sizes, counters; plain values, for JSON."""
        with self.driver.lock:
            seen = self.driver.core.describe()
        return seen | {"transport": self.driver.transport_figures()}

    def on_close(self, closer: Any) -> None:
        """Have `closer()` called when the session closes, in reverse order. For open_session."""
        self._closers.append(closer)

    def close(self, timeout_s: float = 2.0) -> None:
        """Fail what is live, wait at most `timeout_s` until nothing can touch anybody's memory, say goodbye, end. Idempotent.

        Leaves no thread, socket or file. Memory that could not be proven free in time stays exposed to its writers: do not
        unmap it while `describe()["leases"]` lists it.
        """
        if self._closed:
            return
        self._closed = True
        driver = self.driver
        reason = f"{self.name} was closed"
        driver.call(ev.ShutdownRequested(reason))
        driver.stop_thread(timeout_s)
        deadline = time.monotonic() + timeout_s
        while self._owes() and time.monotonic() < deadline:
            if not driver.progress():
                driver.wait(min(20.0, (deadline - time.monotonic()) * 1e3))
        driver.call(ev.GoodbyeRequested(reason))
        driver.progress()
        driver.retire(timeout_s)
        for closer in reversed(self._closers):
            closer()

    def _owes(self) -> bool:
        with self.driver.lock:
            core = self.driver.core
            return bool(core.ops or core.links or core.leases)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _integer(what: str, value: object, least: int, most: int) -> int:
    """`value` as a plain int; numpy's are converted, what only looks like a number is refused before a room or a frame holds it."""
    number = value if type(value) is int else None  # nearly always; the rest costs more than the room's own step
    if number is None and not isinstance(value, (bool, np.bool_)):
        with contextlib.suppress(TypeError):
            number = operator.index(value)  # type: ignore[arg-type]  # that is the question
    if number is None:
        raise LocalProtocolError(f"{what} must be an integer, not {value!r:.64}")
    if not least <= number <= most:
        raise LocalProtocolError(f"{what} must be in {least}..{most}, not {number}")
    return number


def _room(room: object) -> int:
    return _integer("room", room, 0, (1 << 63) - 1)


def _row(aux: object) -> int:
    return -1 if aux is None else _integer("aux", aux, -1 << 63, 1 << 63)  # the core knows which rows there are


def _tokens(tokens: object) -> int | None:
    return None if tokens is None else _integer("tokens", tokens, 0, _COUNT_MAX)


def _pack(indices: PageIndices) -> bytes:
    if isinstance(indices, np.ndarray):
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise LocalProtocolError(f"page numbers must be a one-dimensional integer array, not {indices.dtype} {indices.shape}")
        if len(indices) and not (indices.min() >= -(1 << 31) and indices.max() < 1 << 31):  # casting would make others of them
            raise LocalProtocolError(f"page numbers must be below 2**31, got {indices.min()}..{indices.max()}")
        return indices.astype("<i4").tobytes()
    try:
        return pack_pages(indices)
    except (TypeError, OverflowError) as error:
        raise LocalProtocolError(f"page numbers must be integers below 2**31: {error}") from error


def open_session(
    role: str,
    kv: KVLayout,
    *,
    transport: str | Factory = "zmq",
    rendezvous: str | Rendezvous | None = None,
    topology: Topology | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    deadlines: Deadlines | None = None,
    limits: Limits | None = None,
    trace: str | None = None,
    thread: bool = True,
    transport_options: Mapping[str, Any] | None = None,
    clock_ms: Callable[[], float] = now_ms,
    incarnation: bytes | None = None,
) -> Session:
    """Open the session layer of one rank.

    `role` is "prefill" or "decode". `kv` describes the memory that is handed over; it must outlive the session. `transport` is the
    name of an installed transport or a factory, with `transport_options`. `rendezvous` is the URL of a bootstrap server or a
    Rendezvous object; transports that bring their own need none. `host` is the address to bind and advertise. `trace` is a file for
    the NDJSON record of every step. With `thread=False` nothing moves unless the caller runs `progress()`.

    `clock_ms` and `incarnation` are for simulations: the clock of every deadline and of the trace (default CLOCK_MONOTONIC; it must
    never go back), and the 16 bytes that name this life (default random; two lives must never share them). Waits of scripts and
    tests (`wait`, `close`) stay on the real clock.

    Raises ConfigError for settings that cannot work (an address that cannot be bound, an unknown transport) and MissingDependency
    for a library that is not installed. Whatever was begun is undone.
    """
    if role not in ("prefill", "decode"):
        raise ConfigError(f"role must be 'prefill' or 'decode', not {role!r}")
    if incarnation is not None and (len(incarnation) != wire.INCARNATION_BYTES or incarnation == wire.NOBODY):
        raise ConfigError(f"incarnation must be {wire.INCARNATION_BYTES} bytes that are not all zero, not {incarnation!r}")
    limits = limits or Limits()
    identity = Identity(
        incarnation=secrets.token_bytes(wire.INCARNATION_BYTES) if incarnation is None else incarnation,
        name=name or role,
        role=role,
        transport="",
        topology=topology or Topology(),
        components=kv.infos(),
    )
    core = SessionCore(identity, deadlines, limits)
    board = PollBoard(limits.rooms_max)
    reactor = Reactor()
    session: Session | None = None
    undo: list[Any] = [reactor.close]
    try:
        writer = TraceWriter(trace, identity, clock_ms) if trace else None
        if writer is not None:
            core.trace = writer.record
            undo.append(writer.close)
        driver = Driver(core, kv, board, reactor, writer, clock_ms)
        made = make_transport(
            transport,
            Host(identity.incarnation, role, identity.name, host, kv, limits, reactor, driver.emit, driver.deliver, clock_ms),
            transport_options or {},
        )
        undo.append(lambda: made.close(LINGER_MS))
        identity.transport, identity.data, identity.residual_ms = made.name, made.data.descriptor, made.data.residual_ms
        _check_greeting(identity)
        meeting = _rendezvous(rendezvous, made.rendezvous, made.name)
        meeting.start(driver.emit)
        undo.append(meeting.close)
        driver.attach(made, meeting)
        if role == "prefill":
            meeting.register(_record(identity, made.control.endpoint))
        session = Session(driver, board, reactor, kv, meeting.close)
        for closer in undo:
            session.on_close(closer)
        if thread:
            driver.start_thread()
    finally:
        if session is None:
            for closer in reversed(undo):
                closer()
    return session


def _check_greeting(identity: Identity) -> None:
    """What no peer would read must not be found out by silence. Raises ConfigError."""
    try:
        wire.decode(wire.encode(identity.incarnation, wire.NOBODY, identity.hello()))
    except (ValueError, WireError) as error:
        raise ConfigError(f"the name or the layout of {identity.name[:64]!r} exceeds what a greeting can carry: {error}") from error


def _rendezvous(given: str | Rendezvous | None, own: Rendezvous | None, transport: str) -> Rendezvous:
    if isinstance(given, str):
        return HttpRendezvous(given)
    chosen = given or own
    if chosen is None:
        raise ConfigError(f"transport {transport!r} needs a rendezvous: pass the URL of a bootstrap server (`pd-fsm bootstrap`)")
    return chosen


def _record(identity: Identity, endpoint: str) -> ev.PeerRecord:
    t = identity.topology
    return ev.PeerRecord(
        identity.incarnation,
        endpoint,
        identity.name,
        dp_rank=t.dp_rank,
        dp_size=t.dp_size,
        tp_rank=t.tp_rank,
        tp_size=t.tp_size,
        pp_rank=t.pp_rank,
        pp_size=t.pp_size,
        cp_rank=t.cp_rank,
        cp_size=t.cp_size,
    )
