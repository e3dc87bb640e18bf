"""Two real session cores wired back to back in memory: a prefill and a decode, driven by hand with a virtual clock.

Nothing happens by itself: messages wait in `wire` until delivered (or dropped, or delivered twice), writes wait in `writes`
until the test says how they ended. Every message goes through the real codec.
"""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Peer, Room
from pd_fsm.core.session import Identity, SessionCore, Step
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.core.wire import ComponentInfo, pack_pages
from pd_fsm.machines import Phase

PAGE_SIZE = 16
COMPONENTS = (
    ComponentInfo("kv", "paged", "kv", PAGE_SIZE, 1_000, (4_096, 4_096)),
    ComponentInfo("aux", "rows", "aux", 0, 64, (128,)),
)
ADDRESS = "http://bootstrap"
E = TypeVar("E")


def pages(*indices: int) -> dict[str, bytes]:
    return {"kv": pack_pages(indices)}


@attrs.define(eq=False)
class Side:
    """One core and everything that its driver would know."""

    core: SessionCore
    pair: Pair
    effects: list[ev.Effect] = attrs.field(factory=list)
    steps: list[Step] = attrs.field(factory=list)
    released: list[tuple[int, int]] = attrs.field(factory=list)
    published: list[tuple[int, int, Phase]] = attrs.field(factory=list)

    @property
    def incarnation(self) -> bytes:
        return self.core.identity.incarnation

    def step(self, event: ev.Event) -> list[ev.Effect]:
        return self._apply(self.core.step(event, self.pair.now_ms))

    def expire(self) -> list[ev.Effect]:
        return self._apply(self.core.expire(self.pair.now_ms))

    def room(self, room: int) -> Room:
        return self.core.registry.by_room[room]

    def phase(self, room: int) -> Phase:
        return self.room(room).state

    def peer(self, side: Side | None = None) -> Peer:
        """What this side knows of another one (default: the other side)."""
        return self.core.peers[(side or self.pair.other(self)).incarnation]

    def failure(self, room: int = 7) -> ev.Failure:
        found = self.room(room).failure
        assert found is not None, f"room {room} did not fail"
        return found

    def tell(self, message: wire.Message, source: Side | None = None) -> list[ev.Effect]:
        """Hand this side a message as if `source` (default: the other side) had sent it."""
        return self.step(ev.Received((source or self.pair.other(self)).incarnation, self.incarnation, message))

    def abort(self, room: Room, reason: str = "client left") -> list[ev.Effect]:
        return self.step(ev.AbortRequested(room.generation, reason))

    def clear(self, room: Room) -> list[ev.Effect]:
        return self.step(ev.ClearRequested(room.generation))

    def sent(self, kind: type) -> list[wire.Message]:
        """Every message of that type that this side has sent so far."""
        return [e.message for e in self.effects if isinstance(e, ev.Send) and isinstance(e.message, kind)]

    def did(self, kind: type[E]) -> list[E]:
        """Every effect of that type that this side has asked for so far."""
        return [e for e in self.effects if isinstance(e, kind)]

    def _apply(self, effects: list[ev.Effect]) -> list[ev.Effect]:
        for index, effect in enumerate(effects):
            match effect:
                case ev.Send(peer, message):
                    self.pair.wire.append((self, peer, wire.encode(self.incarnation, peer, message)))
                case ev.Submit():
                    self.pair.writes[effect.op] = effect
                case ev.Publish(room, generation, phase):
                    self.published.append((room, generation, Phase(phase)))
                case ev.ReleasePages(room, generation):
                    assert all(isinstance(later, ev.ReleasePages) for later in effects[index:]), "a release is the last effect"
                    self.released.append((room, generation))
                case _:
                    pass
        self.effects += effects
        return effects


class Pair:
    """A prefill side `p` and a decode side `d`; `side()` adds more."""

    def __init__(self, deadlines: Deadlines | None = None, limits: Limits | None = None) -> None:
        self.now_ms = 1_000.0
        self.wire: deque[tuple[Side, bytes, bytes]] = deque()
        self.writes: dict[int, ev.Submit] = {}
        self.deadlines = deadlines or Deadlines()
        self.limits = limits
        self.sides: list[Side] = []
        self.p = self.side("prefill", b"P" * 16, "prefill-0")
        self.d = self.side("decode", b"D" * 16, "decode-0")

    def side(
        self,
        role: str,
        incarnation: bytes,
        name: str,
        components: tuple[ComponentInfo, ...] = COMPONENTS,
        transport: str = "memory",
    ) -> Side:
        identity = Identity(incarnation, name, role, transport, Topology(), components)
        core = SessionCore(identity, self.deadlines, self.limits)
        side = Side(core, self)
        core.trace = side.steps.append
        self.sides.append(side)
        return side

    def gone(self, side: Side) -> None:
        """The process of `side` ends: nothing reaches it any more, and none of its writes goes on."""
        self.sides.remove(side)
        for op in [op for op, write in self.writes.items() if side.core.sends and op in side.core.ops and write in side.effects]:
            del self.writes[op]

    def other(self, side: Side) -> Side:
        return self.p if side.core.identity.role == "decode" else self.d

    def record(self, side: Side | None = None) -> ev.PeerRecord:
        side = side or self.p
        return ev.PeerRecord(side.incarnation, "memory://p", side.core.identity.name)

    # --- the network -----------------------------------------------------------------------------------------------------

    def deliver(self, *, lose: tuple[type, ...] = (), twice: bool = False, bounded: int = 10_000) -> int:
        """Deliver messages until none is left, losing those of the given types. Returns how many were delivered."""
        delivered = 0
        while self.wire:
            sender, peer, frame = self.wire.popleft()
            source, destination, message = wire.decode(frame)
            if isinstance(message, lose):
                continue
            receiver = next((side for side in self.sides if side.incarnation == peer), None)
            if receiver is None:
                receiver = self.other(sender)  # another process answers at that address
            for _ in range(2 if twice else 1):
                receiver.step(ev.Received(source, destination, message))
                delivered += 1
            assert delivered < bounded, "the two sessions never come to rest"
        return delivered

    def pending(self, kind: type) -> list[wire.Message]:
        return [m for m in (wire.decode(frame)[2] for _, _, frame in self.wire) if isinstance(m, kind)]

    def advance(self, ms: float, **how: object) -> None:
        """Let time pass, firing every deadline on its way and delivering what it causes."""
        end = self.now_ms + ms
        while True:
            due = [t for t in (side.core.deadline() for side in self.sides) if t is not None and t <= end]
            if not due:
                break
            self.now_ms = max(self.now_ms, min(due))
            for side in list(self.sides):
                side.expire()
            self.deliver(**how)  # type: ignore[arg-type]
        self.now_ms = end

    # --- usual steps -----------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Bring both sides to a completed handshake, by a room that is opened, aborted and cleared."""
        self.receive(999_999)
        self.deliver()
        generation = self.d.room(999_999).generation
        self.d.step(ev.AbortRequested(generation, "only to meet"))
        self.deliver()
        self.d.step(ev.ClearRequested(generation))
        self.p.core.counts.clear()
        self.d.core.counts.clear()
        for side in (self.p, self.d):
            for log in (side.effects, side.steps, side.released, side.published):
                log.clear()

    def send(self, room: int, readers: int = 1) -> Room:
        self.p.step(ev.OpenSend(room, readers))
        return self.p.room(room)

    def receive(
        self, room: int, indices: tuple[int, ...] = (10, 11), aux_row: int = 3, prefix: int = 0, by: Side | None = None
    ) -> Room:
        """Open a receiving room (by default on `d`), with the rendezvous' answer at once."""
        side = by or self.d
        effects = side.step(ev.OpenReceive(room, pages(*indices), aux_row, prefix, ADDRESS))
        for effect in effects:
            if isinstance(effect, ev.Lookup):
                side.step(ev.PeersFound(effect.query, (self.record(),)))
        return side.room(room)

    def chunk(self, room: int, start: int, end: int, indices: tuple[int, ...], *, last: bool, aux_row: int = -1) -> None:
        self.p.step(ev.ChunkReady(self.p.room(room).generation, start, end, pages(*indices), last, aux_row))

    def finish(self, op: int | None = None, *, notified: bool = False) -> None:
        """One write, or all of them, end well; with `notified` the data plane itself tells decode."""
        for number in [op] if op is not None else list(self.writes):
            write = self.writes.pop(number)
            if notified:
                reader = next(side for side in self.sides if side.incarnation == write.peer)
                reader.tell(write.notice, self.p)
            self.p.step(ev.WriteDone(number, write.notice.nbytes, notified))

    def transferring(self, room: int, aux_row: int = 3) -> tuple[Room, Room]:
        """A room of two pages with its only write in flight."""
        sending, receiving = self.send(room), self.receive(room, aux_row=aux_row)
        self.deliver()
        self.chunk(room, 0, 32, (1, 2), last=True, aux_row=0 if aux_row >= 0 else -1)
        return sending, receiving

    def idle(self) -> None:
        """At rest nothing is left: no operation, link, lease, repetition."""
        for side in self.sides:
            core = side.core
            assert not core.ops, side.core.identity.name
            assert not core.links, side.core.identity.name
            assert not core.leases, side.core.identity.name
            assert not core.timers.repeats, (side.core.identity.name, core.timers.repeats)


def met(deadlines: Deadlines | None = None, limits: Limits | None = None) -> Pair:
    """A pair that has completed its handshake."""
    pair = Pair(deadlines, limits)
    pair.meet()
    return pair


def both_waiting(pair: Pair) -> None:
    """Room 7, open and known on both sides."""
    pair.send(7)
    pair.receive(7)
    pair.deliver()


def releases(side: Side, room: Room) -> int:
    """How often the memory of this life of a room was given back."""
    return side.released.count((room.room, room.generation))


def settle_everything(pair: Pair) -> None:
    """Finish all writes and let the messages come to rest; neither may be needed twice."""
    pair.deliver()
    pair.finish()
    pair.deliver()
    pair.idle()


def silence(pair: Pair, side: Side, ms: float) -> None:
    """`side` lives on, and hears nothing for `ms`."""
    end = pair.now_ms + ms
    while (due := side.core.deadline()) is not None and due <= end:
        pair.now_ms = max(pair.now_ms, due)
        side.expire()
    pair.now_ms = end
    pair.wire.clear()
