"""What a rendezvous remembers: registered ranks with leases, and which data-parallel rank serves a room.

Tables only: no HTTP, no thread, no clock of their own (time comes from the callable handed in, in monotonic milliseconds). They
are not thread-safe; their owner calls them from one thread or under its lock.

Ownership: a rank's slot (dp, tp, pp, cp) is changed only by who presents its lease, or after the lease lapsed. The lease is a
secret that the registrant chose before it asked, so a repeated registration whose answer was lost is recognised, and nobody else
is ever shown it. The incarnation is no proof: every reader of the table knows it. A process that was killed and started again at
the same address therefore waits until its predecessor's lease lapses; leases are short (LEASE_MS) and the refusal says for how
long. The alternative, asking the old address whether it still answers, would let anyone make the server connect anywhere, and
would take a stopped process for a dead one.
"""

from __future__ import annotations

import hmac
import ipaddress
import itertools
import math
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias
from urllib.parse import urlsplit

import attrs

from pd_fsm.core.events import PeerRecord
from pd_fsm.core.wire import INCARNATION_BYTES

LEASE_MS = 3_000  # renewed each third of it; also how long a rank that was killed blocks its own restart
PEERS_MAX = 16_384  # registered ranks of one server
RANKS_MAX = 16_384  # on one axis
ROOMS_MAX = 262_144  # rooms announced to one server; the oldest goes first
ROOM_AGE_MS_MAX = 300_000  # as long as a room may wait for its bootstrap
TEXT_CHARS_MAX = 256  # an endpoint or a name
MISSING_RANKS_SHOWN = 8

Slot: TypeAlias = tuple[int, int, int, int]
"""(dp, tp, pp, cp) ranks: one place in the deployment."""


class Taken(Exception):  # noqa: N818 - an answer, not an error of the server
    """The registration contradicts a live one. `retry_ms`: until that one lapses if its owner is gone."""

    def __init__(self, reason: str, retry_ms: float) -> None:
        super().__init__(reason)
        self.retry_ms = retry_ms


@attrs.define
class _Held:
    record: PeerRecord
    lease: str
    lapses_ms: float


class PeerTable:
    """Registered ranks of one prefill deployment, each counted once, each as long as its lease is renewed."""

    def __init__(self, lease_ms: float, clock_ms: Callable[[], float]) -> None:
        self.lease_ms = lease_ms
        self.generation = 0  # counts the changes of what `group` would answer
        self._clock_ms = clock_ms
        self._held: OrderedDict[Slot, _Held] = OrderedDict()  # all leases are equally long, so the first lapses first
        self._slot_of: dict[str, Slot] = {}

    def register(self, record: PeerRecord, lease: str) -> None:
        """Put `record` in its slot for one lease. Raises Taken if another holds the slot, or the deployment has other sizes."""
        now = self._lapse()
        slot = slot_of(record)
        held = self._held.get(slot)
        if held is not None and not hmac.compare_digest(held.lease.encode(), lease.encode()):
            raise Taken(f"{_name(slot)} is held by another lease, at {held.record.endpoint}", held.lapses_ms - now)
        if self._slot_of.get(lease, slot) != slot:
            raise Taken(f"this lease already holds {_name(self._slot_of[lease])}; take one lease for each rank", self.lease_ms)
        other = next((held for at, held in self._held.items() if at != slot), None)
        if other is not None and sizes_of(other.record) != sizes_of(record):
            theirs = (
                f"{_name(slot_of(other.record))} at {other.record.endpoint} has (dp, tp, pp, cp) sizes {sizes_of(other.record)}"
            )
            raise Taken(f"sizes {sizes_of(record)} do not fit: {theirs}", other.lapses_ms - now)
        if held is None and len(self._held) >= PEERS_MAX:
            raise Taken(f"{PEERS_MAX} ranks are registered, which is the limit", self.lease_ms)
        if held is None or held.record != record:
            self.generation += 1
        self._held[slot] = _Held(record, lease, now + self.lease_ms)
        self._held.move_to_end(slot)
        self._slot_of[lease] = slot

    def renew(self, lease: str) -> bool:
        """Extend a lease; False if it is unknown or lapsed: the rank has to register again."""
        now = self._lapse()
        slot = self._slot_of.get(lease)
        if slot is None:
            return False
        self._held[slot].lapses_ms = now + self.lease_ms
        self._held.move_to_end(slot)
        return True

    def remove(self, lease: str) -> bool:
        """Take the rank of this lease out; False if there is none."""
        self._lapse()
        slot = self._slot_of.get(lease)
        if slot is None:
            return False
        self._drop(slot)
        return True

    def records(self) -> list[PeerRecord]:
        """All live records, in order of their slots."""
        self._lapse()
        return [self._held[slot].record for slot in sorted(self._held)]

    def group(self, dp_rank: int) -> list[PeerRecord]:
        """The live records of one data-parallel rank, in order of (tp, pp, cp)."""
        return [record for record in self.records() if record.dp_rank == dp_rank]

    def dp_size(self) -> int | None:
        """The data-parallel size that the live records agree on, None while nothing is registered."""
        self._lapse()
        return next((held.record.dp_size for held in self._held.values()), None)

    def _lapse(self) -> float:
        now = self._clock_ms()
        while self._held:
            slot, held = next(iter(self._held.items()))
            if held.lapses_ms > now:
                break
            self._drop(slot)
        return now

    def _drop(self, slot: Slot) -> None:
        del self._slot_of[self._held.pop(slot).lease]
        self.generation += 1


class RoomTable:
    """room -> dp_rank as its prefill rank announced it; bounded in number and age. A later announcement replaces an earlier
    one: a room that is retracted and dispatched again may be served by another rank.

    Each announcement has a serial, by which decode knows one that led it to a room that is over. Serials begin anywhere, so that
    those of a restarted server differ. An announcement made again, because its answer or the server was lost, or by another rank
    of the same data-parallel rank, has a new serial: decode may then follow it once more to an owner that has ended, and learns of
    that by its deadline only.
    """

    def __init__(self, clock_ms: Callable[[], float]) -> None:
        self._clock_ms = clock_ms
        self._rooms: OrderedDict[int, tuple[int, int, float]] = OrderedDict()  # (dp_rank, serial, since when), oldest first
        self._serial = secrets.randbits(52)  # below 2**53 for good, where any JSON reader is exact

    def __len__(self) -> int:
        self._expire()
        return len(self._rooms)

    def announce(self, rooms: Mapping[int, int]) -> None:
        now = self._expire()
        for room, dp_rank in rooms.items():
            self._serial += 1
            self._rooms[room] = (dp_rank, self._serial, now)
            self._rooms.move_to_end(room)
        while len(self._rooms) > ROOMS_MAX:
            self._rooms.popitem(last=False)

    def find(self, rooms: Iterable[int]) -> dict[int, int]:
        """The dp_rank of each of `rooms` that is known."""
        self._expire()
        return {room: self._rooms[room][0] for room in rooms if room in self._rooms}

    def serials(self, rooms: Iterable[int]) -> dict[int, int]:
        """The serial, from 1, of the announcement of each of `rooms` that is known."""
        self._expire()
        return {room: self._rooms[room][1] for room in rooms if room in self._rooms}

    def _expire(self) -> float:
        now = self._clock_ms()
        while self._rooms:
            room, (_, _, since_ms) = next(iter(self._rooms.items()))
            if now - since_ms <= ROOM_AGE_MS_MAX:
                break
            del self._rooms[room]
        return now


def why_incomplete(records: Sequence[PeerRecord], dp_rank: int) -> str | None:
    """None when `records`, of one data-parallel rank and of equal sizes, are all its tp x pp x cp ranks; else what is missing."""
    if not records:
        return f"no rank of dp_rank {dp_rank} is registered"
    sizes = (records[0].tp_size, records[0].pp_size, records[0].cp_size)
    have = {(record.tp_rank, record.pp_rank, record.cp_rank) for record in records}
    absent = math.prod(sizes) - len(have)
    if absent <= 0:
        return None
    wanted = (rank for rank in itertools.product(*map(range, sizes)) if rank not in have)
    named = ", ".join("tp{} pp{} cp{}".format(*rank) for rank in itertools.islice(wanted, MISSING_RANKS_SHOWN))
    more = f" and {absent - MISSING_RANKS_SHOWN} more" if absent > MISSING_RANKS_SHOWN else ""
    return f"{absent} of {math.prod(sizes)} ranks of dp_rank {dp_rank} are not registered: {named}{more}"


def check_record(record: PeerRecord, remote: str = "") -> None:
    """Raise ValueError with what is wrong in a record that came from outside. `remote` is the address it came from, if known:
    an endpoint that only its own host can reach is refused when it is advertised to another one."""
    if len(record.incarnation) != INCARNATION_BYTES:
        raise ValueError(f"incarnation must be {INCARNATION_BYTES} bytes, not {len(record.incarnation)}")
    for what, text in (("endpoint", record.endpoint), ("name", record.name)):
        if len(text) > TEXT_CHARS_MAX or not text.isprintable():
            raise ValueError(f"{what} must be at most {TEXT_CHARS_MAX} printable characters, not {text[:TEXT_CHARS_MAX]!r}")
    for axis, rank, size in zip(("dp", "tp", "pp", "cp"), slot_of(record), sizes_of(record), strict=True):
        if not 1 <= size <= RANKS_MAX:
            raise ValueError(f"{axis}_size must be in 1..{RANKS_MAX}, not {size}")
        if not 0 <= rank < size:
            raise ValueError(f"{axis}_rank must be in 0..{size - 1} for {axis}_size={size}, not {rank}")
    if not record.endpoint:
        raise ValueError("endpoint must say where the rank can be reached, not be empty")
    host = urlsplit(record.endpoint).hostname or ""  # raises ValueError itself for a broken IPv6 address
    if host in ("*", "0.0.0.0", "::"):  # noqa: S104 - refused, not bound
        raise ValueError(f"endpoint {record.endpoint!r} is where a socket listens, not an address that a peer can reach")
    if is_loopback(host) and remote and not is_loopback(remote):
        raise ValueError(f"endpoint {record.endpoint!r} cannot be reached from other hosts; advertise an address that {remote} has")


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, means the local host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def slot_of(record: PeerRecord) -> Slot:
    return (record.dp_rank, record.tp_rank, record.pp_rank, record.cp_rank)


def sizes_of(record: PeerRecord) -> Slot:
    return (record.dp_size, record.tp_size, record.pp_size, record.cp_size)


def _name(slot: Slot) -> str:
    return "rank dp{} tp{} pp{} cp{}".format(*slot)
