"""How a session meets the others: registers its rank, announces its rooms, and finds the ranks that it needs.

A rendezvous turns answers into events and hands them to `emit`. It never decides what a failed lookup means for a room. Two of
them: `HttpRendezvous` asks bootstrap servers, `LocalRendezvous` serves the sessions of one process.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Protocol

from pd_fsm.core.events import LookupFailed, PeerRecord, PeersFound, RegistrationFailed
from pd_fsm.errors import LocalProtocolError
from pd_fsm.runtime.clock import now_ms
from pd_fsm.runtime.peer_table import PeerTable, RoomTable, Taken, slot_of, why_incomplete
from pd_fsm.runtime.rendezvous_http import Emit, HttpRendezvous

__all__ = ["Emit", "HttpRendezvous", "LocalRendezvous", "Rendezvous"]


class Rendezvous(Protocol):
    """What a session needs. Every call returns at once; `emit` is given to `start` and must be thread-safe and not block."""

    def start(self, emit: Emit) -> None:
        """Begin. Events come from the rendezvous' own thread, or from the calling thread where it has none."""

    def register(self, record: PeerRecord) -> None:
        """Make this rank known, and keep it known until `close()`. While it is not, RegistrationFailed says why, once for each
        change; with an empty reason once it is known again."""

    def announce(self, room: int, dp_rank: int) -> None:
        """Tell whoever asks by room number that this data-parallel rank serves `room`."""

    def lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:
        """Find all ranks of a prefill data-parallel rank; with None, of the one that serves `room`. `address` is where to ask,
        "" the rendezvous' own. Answered by exactly one PeersFound(query), with the serial of the room's announcement if that was
        asked for, or LookupFailed(query)."""

    def close(self, timeout_s: float = 1.0) -> None:
        """Take this rank out, answer what is open with LookupFailed, and end; idempotent."""


class LocalRendezvous:
    """The registry of the sessions of one process: no server, no thread, no lease. Thread-safe.

    Each session gets its own `client()`. Prefill engines with different addresses are kept apart; a single one can leave the
    address empty on both sides. The last registration of a rank wins: in one process there is nobody to defend against, and a
    session that was dropped without close(), as a test of a crash does, must not block its successor.
    """

    def __init__(self, clock_ms: Callable[[], float] = now_ms) -> None:
        self._clock_ms = clock_ms
        self._lock = threading.Lock()
        self._tables: dict[str, tuple[PeerTable, RoomTable]] = {}

    def client(self, address: str = "") -> Rendezvous:
        """A client that registers at `address`, and asks there unless a lookup names another one."""
        return _LocalClient(self, address)

    def register(self, address: str, record: PeerRecord) -> str:
        """Why the rank could not be registered, or ""."""
        with self._lock:
            try:
                self._at(address)[0].register(record, lease=repr(slot_of(record)))
            except Taken as taken:
                return str(taken)
        return ""

    def remove(self, address: str, record: PeerRecord) -> None:
        with self._lock:
            peers = self._at(address)[0]
            if record in peers.group(record.dp_rank):  # and not its successor
                peers.remove(repr(slot_of(record)))

    def announce(self, address: str, room: int, dp_rank: int) -> None:
        with self._lock:
            self._at(address)[1].announce({room: dp_rank})

    def find(self, query: int, address: str, room: int, dp_rank: int | None) -> PeersFound | LookupFailed:
        with self._lock:
            if address not in self._tables:
                return LookupFailed(query, f"nobody registered at {address!r}")
            peers, rooms = self._tables[address]
            announcement = 0
            if dp_rank is None and peers.dp_size() == 1:
                dp_rank = 0
            elif dp_rank is None:
                dp_rank, announcement = rooms.find([room]).get(room), rooms.serials([room]).get(room, 0)
            if dp_rank is None:
                return LookupFailed(query, f"room {room} is not registered yet with any data-parallel rank")
            records = peers.group(dp_rank)
        missing = why_incomplete(records, dp_rank)
        return PeersFound(query, tuple(records), announcement) if missing is None else LookupFailed(query, missing)

    def _at(self, address: str) -> tuple[PeerTable, RoomTable]:
        if address not in self._tables:
            self._tables[address] = (PeerTable(math.inf, self._clock_ms), RoomTable(self._clock_ms))
        return self._tables[address]


class _LocalClient:
    """One session's view of a LocalRendezvous. Emits on the calling thread, never under the registry's lock."""

    def __init__(self, registry: LocalRendezvous, address: str) -> None:
        self._registry = registry
        self._address = address
        self._emit: Emit | None = None
        self._records: list[PeerRecord] = []
        self._closed = False

    def start(self, emit: Emit) -> None:
        if self._emit is not None:
            raise LocalProtocolError("this rendezvous client was already started; each session needs its own")
        self._emit = emit

    def register(self, record: PeerRecord) -> None:
        emit = self._started()
        refused = self._registry.register(self._address, record)
        if refused:
            emit(RegistrationFailed(refused))
        else:
            self._records.append(record)

    def announce(self, room: int, dp_rank: int) -> None:
        self._started()
        self._registry.announce(self._address, room, dp_rank)

    def lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:
        emit = self._started()
        if self._closed:
            emit(LookupFailed(query, "the rendezvous client was closed"))
        else:
            emit(self._registry.find(query, address or self._address, room, dp_rank))

    def close(self, timeout_s: float = 1.0) -> None:  # noqa: ARG002 - the protocol's; nothing here takes time
        for record in self._records:
            self._registry.remove(self._address, record)
        self._records.clear()
        self._closed = True

    def _started(self) -> Emit:
        if self._emit is None:
            raise LocalProtocolError("this rendezvous client was not started; call start(emit) first")
        return self._emit
