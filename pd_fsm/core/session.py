"""The session: events in, effects out. Sans-IO: no thread, socket, clock, lock or random source.

`step(event, now_ms)` applies one event and returns the effects it asks for, in order. `deadline()` says when `expire(now_ms)`
wants to be called. Whoever drives it (`pd_fsm.runtime.driver`) holds one lock around each of these calls and executes the
effects outside of it. A machine's state is assigned in exactly one function, `move`.

The rules of each side live beside this file: `sender.py` (prefill), `receiver.py` (decode), `peers.py` (handshake, liveness).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import attrs
import msgspec

from pd_fsm.core import events as ev
from pd_fsm.core import peers, receiver, sender, wire
from pd_fsm.core.ledger import Lease, Link, Op, Peer, Room, aux_bytes, aux_rows, space_bytes, spaces
from pd_fsm.core.registry import Registry
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.core.timers import Key, Repeat, Timers
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import LEASE, ROOM, LeaseState, PeerState, Phase, Row, Table


class Subject(Protocol):
    """Anything that a machine describes."""

    state: Any


@attrs.frozen
class Step:
    """One change of a machine, for the trace."""

    machine: str
    row: str
    event: str
    before: str
    after: str
    room: Room | None
    peer: Peer | None


@attrs.define(eq=False)
class Identity:
    """Who this session is. `data` is the transport's descriptor and `components` the layout's, both sent in the handshake.
    `residual_ms`: how long bytes of a dead process may still be in the data plane's network."""

    incarnation: bytes
    name: str
    role: str
    transport: str
    topology: Topology
    components: tuple[wire.ComponentInfo, ...]
    data: bytes = b""
    residual_ms: float = 0.0

    def ranks(self) -> tuple[int, ...]:
        return attrs.astuple(self.topology)

    def hello(self) -> wire.Hello:
        return wire.Hello(self.name, self.role, self.transport, self.ranks(), self.components, self.data)

    def welcome(self) -> wire.Welcome:
        return wire.Welcome(self.name, self.role, self.transport, self.ranks(), self.components, self.data)


_ROOM_EVENT = ROOM.event
_FAIL = ROOM.event["fail"]
_CONCLUDE, _SETTLED, _UNKNOWN, _EXPOSE = (LEASE.event[e] for e in ("conclude", "settled", "unknown", "expose"))
_NO_HOLDER = LEASE.fact["no_holder"]
# An attribute of an enum costs more than a step of a table (before Python 3.12), so the hot paths name its members here.
_WAITING_FOR_INPUT, _TRANSFERRING, _SUCCESS = Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING, Phase.SUCCESS
_REVOKING, _QUIESCED = LeaseState.REVOKING, LeaseState.QUIESCED
FORGOTTEN_SPENT_MAX = 1 << 18
"""Spent generations kept one by one of all peers without a record together; beyond it the oldest peers keep only a floor."""


class SessionCore:
    """The core of one rank. Not thread-safe: its driver holds a lock around every call."""

    def __init__(self, identity: Identity, deadlines: Deadlines | None = None, limits: Limits | None = None) -> None:
        self.identity = identity
        self.sends = identity.role == "prefill"
        self.deadlines = deadlines or Deadlines()
        self.limits = limits or Limits()
        self.now_ms = 0.0
        self.registry = Registry(self.limits, self.deadlines)
        self.timers = Timers()
        self.peers: dict[bytes, Peer] = {}
        self.links: dict[tuple[bytes, int], Link] = {}  # (peer, decode's generation); outlives the room while something is owed
        self.ops: dict[int, Op] = {}
        self.leases: dict[int, Room] = {}  # by local generation: exposed memory that is not proven free yet
        self.directory: dict[tuple[str, int | None], tuple[ev.PeerRecord, ...]] = {}  # (address, dp_rank) -> this rank's writers
        self.absent: dict[bytes, str] = {}  # incarnations that are not at this endpoint (any more), oldest first
        self.forgotten: dict[bytes, tuple[set[int], int]] = {}  # peers without a record: what they spent, and a floor; oldest first
        self.spaces = spaces(identity.components)
        self.space_bytes = {space: space_bytes(identity.components, space) for space in self.spaces}
        self.aux_rows = aux_rows(identity.components)
        self.aux_bytes = aux_bytes(identity.components)
        self.counts: Counter[str] = Counter()
        self.quarantined: dict[int, Room] = {}  # by local generation: memory in doubt
        self.closing = ""
        self.draining = ""
        self.registration = ""
        self.trace: Callable[[Step], None] | None = None
        self._effects: list[ev.Effect] = []
        self._released: list[ev.ReleasePages] = []
        self._last_op = 0
        self._forgotten_count = 0
        self._last_epoch = 0

    # --- the interface of the driver -------------------------------------------------------------------------------------

    def step(self, event: ev.Event, now_ms: float) -> list[ev.Effect]:
        """Apply one event. Raises LocalProtocolError, with nothing changed, for the local engine's mistakes only."""
        self.now_ms = now_ms
        try:
            _HANDLERS[type(event)](self, event)
        finally:
            effects = self._take_effects()
        return effects

    def expire(self, now_ms: float) -> list[ev.Effect]:
        """Apply every deadline that is due. Call it after the events that are already there: completions come before timeouts."""
        self.now_ms = now_ms
        for key in self.timers.due(now_ms):
            self._fire(key)
        self.registry.expire(now_ms)
        return self._take_effects()

    def fire(self, key: Key, now_ms: float) -> list[ev.Effect]:
        """Apply this one timer as `expire` would at `now_ms`. For whoever explores every order in which timers may run out."""
        self.now_ms = now_ms
        self._fire(key)
        return self._take_effects()

    def deadline(self) -> float | None:
        """When expire() has something to do, in the milliseconds of `now_ms`, or None."""
        timer, expiry = self.timers.next_ms(), self.registry.next_expiry()
        if timer is None or expiry is None:
            return expiry if timer is None else timer
        return min(timer, expiry)

    # --- the only place where a state changes ----------------------------------------------------------------------------

    def move(self, table: Table, subject: Room | Lease | Peer, event: int, facts: int = 0, room: Room | None = None) -> Row | None:
        """Step one machine. Returns the row taken, or None for a late event, which is counted."""
        before = subject.state
        for row in table.cells[before * table.width + event]:  # `Table.row`, without the call
            if facts & row.care == row.want:
                break
        else:
            why = table.why_late(before, event)
            assert why is not None, f"{table.name}: {table.events[event]} in {before!r} is neither a row nor late"
            self.counts[f"late.{table.name}.{table.events[event]}"] += 1
            return None
        subject.state = row.target  # type: ignore[assignment]  # a member of table.states; each table has its own kind of subject
        if self.trace is not None:
            owner = subject if isinstance(subject, Room) else room
            peer = subject if isinstance(subject, Peer) else None
            self.trace(Step(table.name, row.id, row.event, before.name, subject.state.name, owner, peer))
        return row

    # --- rooms -----------------------------------------------------------------------------------------------------------

    def open(self, room: Room, phase_ms: int) -> None:
        self.registry.add(room)
        if self.trace is not None:
            self.trace(Step("room", "open", "open", "", room.state.name, room, None))
        self.publish(room)
        self._arm(room, self.now_ms + phase_ms)

    def check_open(self, room: int) -> None:
        """Refuse an open that cannot be. Raises LocalProtocolError."""
        if self.closing:
            raise LocalProtocolError(f"cannot open room {room}: the session is closing ({self.closing})")
        if self.draining:
            raise LocalProtocolError(f"cannot open room {room}: the session is being drained ({self.draining})")
        if len(self.quarantined) >= self.limits.quarantined_rooms_max:
            raise LocalProtocolError(
                f"cannot open room {room}: the memory of {len(self.quarantined)} rooms is in doubt "
                "(Limits.quarantined_rooms_max); describe()['leases'] says who holds it"
            )
        if not 0 <= room < 1 << 63:
            raise LocalProtocolError(f"room must be in 0..2**63-1, not {room}")
        active = self.registry.by_room.get(room)
        if active is not None:
            raise LocalProtocolError(
                f"room {room} is already open ({active.state.name}, generation {active.generation}); clear it first"
            )
        if len(self.registry.by_room) >= self.limits.rooms_max:
            raise LocalProtocolError(f"{self.limits.rooms_max} rooms are open (Limits.rooms_max); clear concluded ones or raise it")

    def publish(self, room: Room) -> None:
        self.emit(ev.Publish(room.room, room.generation, room.state))

    def room_move(self, room: Room, event: str, facts: int = 0) -> bool:
        """Step a room and publish what changed. True when a row was taken."""
        row = self.move(ROOM, room, _ROOM_EVENT[event], facts)
        if row is None:
            return False
        if row.source != row.target:
            self._entered(room)
        return True

    def progressed(self, room: Room) -> None:
        """The transfer of `room` made progress: its deadline starts anew."""
        if room.state is _TRANSFERRING:
            room.deadline_ms = self.now_ms + self.deadlines.transfer_ms

    def fail(self, room: Room, failure: ev.Failure) -> bool:
        """Conclude `room` as Failed, tell its peers, begin to take its memory back. False when it had concluded."""
        if not room.live:
            self.counts["late.room.fail"] += 1
            return False
        room.failure = failure  # stored before the phase, so that no reader sees Failed without its reason
        self.move(ROOM, room, _FAIL)
        self.counts[f"failed.{failure.cause}"] += 1
        self.publish(room)
        if room.sends:
            sender.failed(self, room)
        else:
            receiver.failed(self, room)
        self.conclude_lease(room)
        return True

    def _entered(self, room: Room) -> None:
        """`room` entered a phase by a row: publish it and start the clock of that phase."""
        self.publish(room)
        if room.state is _WAITING_FOR_INPUT:
            if room.sends:  # decode's clock goes on until prefill has opened the room, too
                self.rearm(room, self.deadlines.waiting_ms)
        elif room.state is _TRANSFERRING:
            self.rearm(room, self.deadlines.transfer_ms)
        elif room.state is _SUCCESS:
            self.counts["succeeded"] += 1
            if room.sends:
                sender.succeeded(self, room)
            else:
                receiver.succeeded(self, room)
            self.conclude_lease(room)

    def rearm(self, room: Room, phase_ms: int) -> None:
        """Start the clock of a phase."""
        earlier = self.now_ms + phase_ms < room.deadline_ms
        room.deadline_ms = self.now_ms + phase_ms
        if earlier:  # otherwise the entry that is already armed fires first and finds the later deadline
            self.timers.arm(room.deadline_ms, ("room", b"", room.generation))

    # --- leases ----------------------------------------------------------------------------------------------------------

    def expose(self, room: Room, holder: int | bytes) -> None:
        """`holder` may touch the memory of `room` from now on."""
        row = self.move(LEASE, room.lease, _EXPOSE, room=room)
        assert row is not None, f"room {room.room} concluded ({room.lease.state.name}); its memory must not be exposed"
        room.lease.holders.add(holder)
        self.leases[room.generation] = room

    def settle(self, room: Room, holder: int | bytes) -> None:
        """Proof that `holder` can touch the memory of `room` no more."""
        lease = room.lease
        if holder not in lease.holders:
            return
        lease.holders.discard(holder)
        self.move(LEASE, lease, _SETTLED, 0 if lease.holders else _NO_HOLDER, room)
        self._release_if_quiet(room)

    def conclude_lease(self, room: Room) -> None:
        self.move(LEASE, room.lease, _CONCLUDE, 0 if room.lease.holders else _NO_HOLDER, room)
        if room.lease.state is _REVOKING:
            self.timers.arm(self.now_ms + self.deadlines.drain_ms, ("drain", b"", room.generation))
        self._release_if_quiet(room)

    def doubt(self, room: Room) -> None:
        """A holder's end is unknown: the memory is quarantined until it is proven. The room was failed before."""
        assert not room.live, f"room {room.room} must be failed before its memory is in doubt"
        if self.move(LEASE, room.lease, _UNKNOWN, room=room) is None:
            return
        self.quarantined[room.generation] = room
        full = len(self.quarantined) >= self.limits.quarantined_rooms_max
        if full and self.limits.on_quarantine_full == "fail_stop":
            count = self.limits.quarantined_rooms_max
            shut_down(self, f"the memory of {count} rooms is in doubt (Limits.quarantined_rooms_max), and the policy is fail_stop")

    def _release_if_quiet(self, room: Room) -> None:
        if room.lease.state is _QUIESCED:
            assert not room.lease.holders, "released memory has a holder"
            self.leases.pop(room.generation, None)
            self.quarantined.pop(room.generation, None)
            self._released.append(ev.ReleasePages(room.room, room.generation))

    # --- messages that are repeated until they are answered --------------------------------------------------------------

    def repeat(self, kind: str, peer: bytes, generation: int, message: wire.Message | None) -> None:
        """Send now and again until `answered`; a repetition that is already running is left alone."""
        key = (kind, peer, generation)
        if key in self.timers.repeats:
            return
        backoff_ms = self.deadlines.repeat_min_ms
        self.timers.repeats[key] = Repeat(peer, message, self.now_ms + backoff_ms, backoff_ms)
        self.timers.arm(self.now_ms + backoff_ms, key)
        if message is not None:
            self.emit(ev.Send(peer, message))

    def answered(self, kind: str, peer: bytes, generation: int) -> bool:
        """End a repetition. False when there was none."""
        return self.timers.repeats.pop((kind, peer, generation), None) is not None

    def _fire(self, key: Key) -> None:
        kind, peer, number = key
        if kind == "room":
            self._room_deadline(number)
        elif kind == "peer":
            peers.on_tick(self, peer, number)
        elif kind == "residual":
            receiver.on_residual(self, peer, number)
        elif kind == "drain":
            self._drain_deadline(number)
        else:
            self._repeat_due(key)

    def _room_deadline(self, generation: int) -> None:
        room = self.registry.by_generation.get(generation)
        if room is None or not room.live:
            return
        later_ms = self._postponed_ms(room)
        if later_ms > self.now_ms:
            self._arm(room, later_ms)
        else:
            self.fail(room, ev.Failure("timeout", self._overdue(room)))

    def _postponed_ms(self, room: Room) -> float:
        """The deadline that a room has now that the entry of an earlier one has fired; in the past if it has run out."""
        if room.deadline_ms > self.now_ms:  # it was renewed since this entry was armed
            return room.deadline_ms
        if room.sends and sender.waits_for_grant(self, room):
            return self.now_ms + self.deadlines.waiting_ms
        if room.state is _TRANSFERRING:  # its writes may have been queued behind others that moved
            return sender.turn_ms(self, room) + self.deadlines.transfer_ms
        return 0.0

    def _arm(self, room: Room, deadline_ms: float) -> None:
        room.deadline_ms = deadline_ms
        self.timers.arm(deadline_ms, ("room", b"", room.generation))

    def _drain_deadline(self, generation: int) -> None:
        """A holder takes too long to prove that it is done, though it may be alive: a doubt, bounded and seen, but no release."""
        room = self.leases.get(generation)
        if room is not None and room.lease.state is LeaseState.REVOKING:
            self.doubt(room)

    def _repeat_due(self, key: Key) -> None:
        entry = self.timers.repeats.get(key)
        if entry is None or entry.due_ms > self.now_ms:  # answered, or answered and begun anew
            return
        entry.backoff_ms = min(entry.backoff_ms * 2, self.deadlines.repeat_max_ms)
        entry.due_ms = self.now_ms + entry.backoff_ms
        self.timers.arm(entry.due_ms, key)
        self.counts[f"repeated.{key[0]}"] += 1
        if entry.message is not None:
            self.emit(ev.Send(entry.peer, entry.message))
        else:
            receiver.look_up(self, key[2])

    # --- effects ---------------------------------------------------------------------------------------------------------

    def emit(self, effect: ev.Effect) -> None:
        self._effects.append(effect)

    def next_op(self) -> int:
        self._last_op += 1
        return self._last_op

    def next_epoch(self) -> int:
        self._last_epoch += 1
        return self._last_epoch

    def forget_if_done(self, peer: Peer) -> None:
        """Drop a peer that was given up, once nothing is owed to it and it owes nothing."""
        given_up = peer.state in (PeerState.LOST, PeerState.REFUSED)
        if given_up and not peer.links and self.peers.get(peer.incarnation) is peer:
            del self.peers[peer.incarnation]
            self.remember_spent(peer.incarnation, peer.spent, peer.spent_floor)
            self.emit(ev.Disconnect(peer.incarnation))

    def remember_spent(self, incarnation: bytes, generations: Iterable[int], floor: int = 0) -> None:
        """A peer without a record has spent these: an offer that was delayed must not bind later.

        One by one, because a room that still looks for its peer may have a lower generation than those that have concluded.
        """
        spent, known_floor = self.forgotten.pop(incarnation, (set(), 0))
        self._forgotten_count -= len(spent)
        spent.update(generations)
        if spent or floor or known_floor:
            self.forgotten[incarnation] = spent, max(floor, known_floor)
            self._forgotten_count += len(spent)
        if len(self.forgotten) > self.limits.peers_max:
            self._forgotten_count -= len(self.forgotten.pop(next(iter(self.forgotten)))[0])
        for oldest, (exact, low) in self.forgotten.items():
            if self._forgotten_count <= FORGOTTEN_SPENT_MAX:
                break
            self._forgotten_count -= len(exact)
            self.forgotten[oldest] = set(), max(low, *exact, 0)

    def recall_spent(self, peer: Peer) -> None:
        """A process that had been forgotten is met anew."""
        spent, peer.spent_floor = self.forgotten.pop(peer.incarnation, (set(), 0))
        self._forgotten_count -= len(spent)
        peer.spent = dict.fromkeys(sorted(spent))

    def _take_effects(self) -> list[ev.Effect]:
        effects = self._effects
        if self._released:
            effects += self._released  # always last: nothing of this step may touch the memory after its release
            self._released = []
        self._effects = []
        return effects

    # --- what an operator sees -------------------------------------------------------------------------------------------

    def peer_name(self, incarnation: bytes) -> str:
        peer = self.peers.get(incarnation)
        return peer.name if peer is not None and peer.name else incarnation.hex()[:8]

    def why_waiting(self, room: Room) -> str:
        """What a live `room` waits for, and who owes it."""
        return f"{room.state.name}: {self._awaits(room)}"

    def _overdue(self, room: Room) -> str:
        """Why the deadline of a live `room` ran out."""
        if room.state is Phase.TRANSFERRING:
            return f"TRANSFERRING without progress for {self.deadlines.transfer_ms} ms: {self._awaits(room)}"
        alone = room.state is Phase.BOOTSTRAPPING or receiver.unopened(room)
        limit_ms = self.deadlines.bootstrap_ms if alone else self.deadlines.waiting_ms
        return f"still {room.state.name} after {limit_ms} ms: {self._awaits(room)}"

    def _awaits(self, room: Room) -> str:
        if room.state is Phase.BOOTSTRAPPING:
            return sender.awaits(room) if room.sends else receiver.awaits(self, room)
        writing = any(link.ops for link in room.links.values())
        owing = [link.peer for link in room.links.values() if (link.ops if writing else not link.complete)]
        names = ", ".join(map(self.peer_name, owing))
        if room.sends and writing:
            return f"writing to {names}"
        if room.state is Phase.TRANSFERRING:
            return "the engine handed in no further chunk" if room.sends else f"waiting for parts from {names}"
        if room.sends:
            return "decode has granted no pages yet" if room.chunks else "no chunk was handed in"
        unopened = receiver.unopened(room)
        if unopened:
            return f"{', '.join(map(self.peer_name, unopened))} has not opened the room"
        granted = room.request is not None and room.request.pages is not None
        return f"no part came from {names}" if granted else "the engine has granted no pages yet"

    def describe(self) -> dict[str, Any]:
        """Every room, what it waits for, who may touch whose memory, every peer, and counters. Plain values, for JSON."""
        return {
            "name": self.identity.name,
            "role": self.identity.role,
            "incarnation": self.identity.incarnation.hex(),
            "closing": self.closing,
            "draining": self.draining,
            "quarantined_rooms": len(self.quarantined),
            "registration": self.registration or "ok",
            "rooms": [self._describe_room(room) for room in self.registry.by_room.values()],
            "leases": [
                {"room": room.room, "generation": room.generation, "state": room.lease.state.name, "holders": self._holders(room)}
                for room in self.leases.values()
            ],
            "peers": [
                {"name": peer.name, "incarnation": peer.incarnation.hex(), "state": peer.state.name, "reason": peer.reason}
                for peer in self.peers.values()
            ],
            "ops": len(self.ops),
            "links": len(self.links),
            "repeats": len(self.timers.repeats),
            "unanswered": [
                {"message": kind, "peer": self.peer_name(peer) if peer else "", "generation": generation}
                for kind, peer, generation in self.timers.repeats
            ],
            "early_offers": self.registry.early_count,
            "tombstones": len(self.registry.tombstones),
            "counts": dict(self.counts),
        }

    def _describe_room(self, room: Room) -> dict[str, Any]:
        return {
            "room": room.room,
            "generation": room.generation,
            "phase": room.state.name,
            "lease": room.lease.state.name,
            "peers": [self.peer_name(peer) for peer in room.links],
            "bytes_moved": room.bytes_moved,
            "waits_for": self.why_waiting(room) if room.live else "clear()",
            "failure": None if room.failure is None else msgspec.structs.asdict(room.failure),
        }

    def _holders(self, room: Room) -> list[str]:
        return [self.peer_name(h if isinstance(h, bytes) else self.ops[h].link.peer) for h in room.lease.holders]


# --- local events ------------------------------------------------------------------------------------------------------------


def _on_abort_requested(session: SessionCore, event: ev.AbortRequested) -> None:
    room = session.registry.by_generation.get(event.generation)
    if room is None:
        session.counts["late.abort"] += 1
        return
    session.fail(room, ev.Failure("abort", wire.clip(event.reason)))


def _on_clear_requested(session: SessionCore, event: ev.ClearRequested) -> None:
    room = session.registry.by_generation.get(event.generation)
    if room is None:
        return
    if room.live:
        raise LocalProtocolError(f"room {room.room} is {room.state.name}; abort it, or wait until it concludes, before clear()")
    session.registry.remove(room)
    if room.cancelled is not None:
        session.registry.cancel(room.room, room.cancelled, session.now_ms)
    else:
        session.registry.bury(room, session.now_ms)
    if session.trace is not None:
        session.trace(Step("room", "clear", "clear", room.state.name, "", room, None))


def _on_shutdown_requested(session: SessionCore, event: ev.ShutdownRequested) -> None:
    shut_down(session, event.reason or "it was closed")


def shut_down(session: SessionCore, reason: str) -> None:
    """No new rooms; running ones fail. What is owed about memory goes on until the driver says goodbye."""
    if session.closing:
        return
    session.closing = reason
    for room in list(session.registry.by_room.values()):
        if room.live:
            session.fail(room, ev.Failure("shutdown", reason))


def _on_drain_requested(session: SessionCore, event: ev.DrainRequested) -> None:
    """No new rooms, here or from peers; running ones finish. Offers that were waiting for a room are answered."""
    if session.draining:
        return
    session.draining = event.reason or "it is being drained"
    for peer in list(session.peers.values()):
        if peer.up:
            session.emit(ev.Send(peer.incarnation, wire.Draining(wire.clip(session.draining))))
    if session.sends:
        sender.refuse_early(session, ev.Failure("shutdown", f"{session.identity.name} takes no new rooms: {session.draining}"))


def _on_cancel_requested(session: SessionCore, event: ev.CancelRequested) -> None:
    """Give a room up by its number, before or after it is opened here."""
    failure = ev.Failure("abort", wire.clip(event.reason))
    room = session.registry.by_room.get(event.room)
    if room is not None:
        if room.live:
            session.fail(room, failure)
        elif room.failure is not None and room.failure.cause in ("abort", "peer_abort"):
            room.cancelled = failure  # given up to be tried again, maybe: then the client that left is not served after all
        return
    if session.registry.over(event.room):  # it comes late, and must not fail the next life of that number
        session.counts["late.cancel"] += 1
        return
    session.registry.cancel(event.room, failure, session.now_ms)
    if session.sends:
        sender.refuse_early(session, failure, event.room)
    else:
        receiver.reject(session, event.room, failure)


def _on_goodbye_requested(session: SessionCore, event: ev.GoodbyeRequested) -> None:
    drained = not session.ops
    for peer in list(session.peers.values()):
        session.emit(ev.Send(peer.incarnation, wire.Goodbye(wire.clip(event.reason), drained)))


def _on_registration_failed(session: SessionCore, event: ev.RegistrationFailed) -> None:
    session.registration = event.reason


_HANDLERS: dict[type, Callable[[SessionCore, Any], None]] = {
    ev.OpenSend: sender.on_open,
    ev.ChunkReady: sender.on_chunk,
    ev.GrantPages: receiver.on_grant,
    ev.CancelRequested: _on_cancel_requested,
    ev.DrainRequested: _on_drain_requested,
    ev.WriteDone: sender.on_write_done,
    ev.WriteFailed: sender.on_write_failed,
    ev.WriteUnknown: sender.on_write_unknown,
    ev.WriteSettled: sender.on_write_settled,
    ev.OpenReceive: receiver.on_open,
    ev.PeersFound: receiver.on_peers_found,
    ev.LookupFailed: receiver.on_lookup_failed,
    ev.Revoked: receiver.on_revoked,
    ev.Received: peers.on_received,
    ev.PeerUnreachable: peers.on_unreachable,
    ev.PeerOverflowed: peers.on_overflowed,
    ev.RegistrationFailed: _on_registration_failed,
    ev.AbortRequested: _on_abort_requested,
    ev.ClearRequested: _on_clear_requested,
    ev.ShutdownRequested: _on_shutdown_requested,
    ev.GoodbyeRequested: _on_goodbye_requested,
}
