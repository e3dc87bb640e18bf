"""A world of real session cores, wired by hand: a network that loses, holds and repeats, a data plane that lies still until
told how a write ended, processes that crash, freeze and restart, and a clock that only the test moves.

The world checks what must hold in every step, whoever the adversary is: declared phase changes only, memory released once and never
while somebody may touch it, success only with every byte in place. A breach raises Violation, with the story so far in `log`.

Nothing here is a stand-in for the session: every message goes through the real codec into a real `SessionCore`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Room
from pd_fsm.core.session import Identity, SessionCore, Step
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.core.wire import ComponentInfo, pack_pages, unpack_pages
from pd_fsm.errors import WireError
from pd_fsm.machines import ROOM, Phase

PAGE_TOKENS = 16
COMPONENTS = (
    ComponentInfo("kv", "paged", "kv", PAGE_TOKENS, 1_000, (4_096, 4_096), "bfloat16"),
    ComponentInfo("aux", "rows", "aux", 0, 64, (128,)),
)
DELIVERIES_MAX = 100_000  # in one go: more means that the sessions never come to rest
_PHASE_EDGES = {(row.source, row.target) for row in ROOM.rows()}


class Violation(AssertionError):  # noqa: N818 - reads as what it is
    """The world saw what must never happen."""


@attrs.define(eq=False)
class Packet:
    """A frame on its way. `kind` is the message's tag."""

    number: int
    source: str
    target: bytes
    target_actor: str
    kind: str
    frame: bytes


@attrs.define(eq=False)
class Write:
    """A submitted write that has not ended. `actor` submitted it; `orphaned_ms` is when its process died."""

    name: str
    actor: str
    life: int
    submit: ev.Submit
    unknown: bool = False
    cancelled: bool = False
    orphaned_ms: float | None = None


@attrs.define(eq=False)
class Rule:
    """What the network does to messages of a kind ("*": any) from an actor ("": any)."""

    action: str  # lose, hold, duplicate
    kind: str
    source: str
    left: int  # how often it still applies; -1 for ever

    def applies(self, packet: Packet) -> bool:
        return self.left != 0 and self.kind in ("*", packet.kind) and self.source in ("", packet.source)


@attrs.define(eq=False)
class Grant:
    """Decode pages of one generation, as the world sees them."""

    room: int
    pages: frozenset[int]
    aux_row: int
    writers: tuple[bytes, ...] = ()
    exposed: bool = True
    released: bool = False
    chunks_written: set[tuple[bytes, int]] = attrs.field(factory=set)  # by writer
    chunks_total: dict[bytes, int] = attrs.field(factory=dict)

    def complete(self) -> bool:
        """Whether every writer has said how many chunks it has, and all of them are here."""
        counts = Counter(writer for writer, _ in self.chunks_written)
        return bool(self.writers) and all(counts[w] and counts[w] == self.chunks_total.get(w) for w in self.writers)


@attrs.frozen
class Taken:
    """A row that a core took, as a trace has it. `room` and `generation` are -1 and 0 for a row of a peer."""

    actor: str
    life: int
    machine: str
    row: str
    room: int
    generation: int


@attrs.define(eq=False)
class Actor:
    """One engine process: its address outlives it, its core does not."""

    name: str
    role: str
    dp_rank: int
    dp_size: int
    vouches: bool
    notifies: bool
    components: tuple[ComponentInfo, ...]
    deadlines: Deadlines
    tp_rank: int = 0
    tp_size: int = 1
    transport: str = "world"
    life: int = 0
    core: SessionCore | None = None
    frozen: bool = False
    inbox: deque[ev.Event] = attrs.field(factory=deque)
    counts_seen: Counter[str] = attrs.field(factory=Counter)
    phases: dict[int, Phase] = attrs.field(factory=dict)  # by generation, of this life
    rooms: dict[int, int] = attrs.field(factory=dict)  # the room of each generation, also of cleared ones
    released: set[int] = attrs.field(factory=set)
    grants: dict[int, Grant] = attrs.field(factory=dict)
    routes: dict[bytes, str] = attrs.field(factory=dict)  # the actor at whose address it dials an incarnation

    @property
    def address(self) -> str:
        return f"world://{self.name}"

    @property
    def alive(self) -> SessionCore:
        if self.core is None:
            raise ValueError(f"{self.name} is not running")
        return self.core

    def room(self, room: int) -> Room | None:
        return self.core.registry.by_room.get(room) if self.core is not None else None


class World:
    """Actors named P... are prefill, D... decode. `settle` delivers messages in order, unless a rule says otherwise."""

    def __init__(self, deadlines: Deadlines | None = None, limits: Limits | None = None) -> None:
        self.now_ms = 0.0
        self.deadlines = deadlines or Deadlines()
        self.limits = limits or Limits()
        self.actors: dict[str, Actor] = {}
        self.network: deque[Packet] = deque()
        self.held: list[Packet] = []
        self.rules: list[Rule] = []
        self.cuts: set[tuple[str, str]] = set()
        self.writes: dict[str, Write] = {}
        self.ended: dict[str, Write] = {}  # how they ended was reported
        self.sent: Counter[tuple[str, str]] = Counter()  # messages, by actor and kind
        self.registry: dict[str, ev.PeerRecord] = {}  # by actor: the rendezvous
        self.rendezvous_up = True
        self.rendezvous_slow = False
        self.lookups: deque[tuple[Actor, int, ev.Lookup]] = deque()  # of a slow rendezvous: by whom, in which life
        self.residual_ms = 0.0  # how long bytes of a dead process may stay in the network, as the data plane declares it
        self.announced: dict[int, tuple[int, int]] = {}  # dp_rank and serial of each room, at the rendezvous
        self.log: list[str] = []
        self.rows: list[Taken] = []  # since the beginning, in order
        self._incarnations: dict[bytes, tuple[str, int]] = {}
        self._packets = 0
        self._announcements = 0

    # --- actors ----------------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        vouches: bool = False,
        notifies: bool = False,
        components: tuple[ComponentInfo, ...] = COMPONENTS,
        deadlines: Deadlines | None = None,
        tp_rank: int = 0,
        tp_size: int = 1,
    ) -> Actor:
        """Start a process. `vouches`: its data plane can prove that nothing lands after a revoke; `notifies`: it tells the peer
        of each
        part by itself."""
        role = {"P": "prefill", "D": "decode"}[name[0]]
        actor = self.actors[name] = Actor(name, role, dp_rank, dp_size, vouches, notifies, components, deadlines or self.deadlines)
        actor.tp_rank, actor.tp_size = tp_rank, tp_size
        self.start(actor)
        return actor

    def start(self, actor: Actor) -> None:
        """Begin a (new) life at the same address."""
        assert actor.core is None, f"{actor.name} is running"
        actor.life += 1
        incarnation = f"{actor.name}.{actor.life}".encode().ljust(16, b"_")
        topology = Topology(dp_rank=actor.dp_rank, dp_size=actor.dp_size, tp_rank=actor.tp_rank, tp_size=actor.tp_size)
        identity = Identity(
            incarnation, actor.name, actor.role, actor.transport, topology, actor.components, residual_ms=self.residual_ms
        )
        actor.core = SessionCore(identity, actor.deadlines, self.limits)
        actor.core.trace = lambda step: self._traced(actor, step)
        actor.frozen = False
        actor.inbox.clear()
        actor.counts_seen = Counter()
        actor.phases, actor.rooms, actor.released, actor.grants = {}, {}, set(), {}
        self._incarnations[incarnation] = (actor.name, actor.life)
        if actor.role == "prefill":
            self.register(actor)

    def register(self, actor: Actor, at: Actor | None = None) -> None:
        """List a prefill actor at the rendezvous, in place of an earlier life. `at`: with the address of another one."""
        incarnation = actor.alive.identity.incarnation
        self.registry[actor.name] = ev.PeerRecord(
            incarnation,
            (at or actor).address,
            actor.name,
            dp_rank=actor.dp_rank,
            dp_size=actor.dp_size,
            tp_rank=actor.tp_rank,
            tp_size=actor.tp_size,
        )

    def crash(self, actor: Actor) -> None:
        """kill -9: everything the process knew is gone; what it had handed to the network or the data plane is not."""
        actor.core = None
        actor.inbox.clear()
        for write in self.writes.values():
            if write.actor == actor.name and write.orphaned_ms is None:
                write.orphaned_ms = self.now_ms

    def thaw(self, actor: Actor) -> None:
        """SIGCONT: what waited in its sockets comes first, then its clock."""
        actor.frozen = False
        while actor.inbox:
            self.step(actor, actor.inbox.popleft())
        self.apply(actor, actor.alive.expire(self.now_ms))

    def sees(self, actor: Actor, other: Actor, *, dead: bool) -> None:
        """The transport of `actor` reports about the last life of `other` that it knew."""
        for peer in list(actor.alive.peers.values()):
            name, life = self._incarnations[peer.incarnation]
            if name == other.name and (other.core is None or life < other.life or not dead):
                why = f"nobody listens at {other.address}" if dead else f"the connection to {other.address} broke"
                self.step(actor, ev.PeerUnreachable(peer.incarnation, why, dead))

    def overflows(self, actor: Actor, other: Actor) -> None:
        """`other` does not read, and what `actor` has queued for it has reached its bound."""
        for peer in list(actor.alive.peers.values()):
            if self._incarnations[peer.incarnation][0] == other.name:
                limit = self.limits.outbox_messages_max
                why = f"it does not read: {limit} messages are queued (Limits.outbox_messages_max)"
                self.step(actor, ev.PeerOverflowed(peer.incarnation, why))

    # --- stepping --------------------------------------------------------------------------------------------------------

    def step(self, actor: Actor, event: ev.Event) -> None:
        if actor.core is None:
            return
        if actor.frozen:
            actor.inbox.append(event)
            return
        self.apply(actor, actor.core.step(event, self.now_ms))

    def apply(self, actor: Actor, effects: list[ev.Effect]) -> None:
        for effect in effects:
            handler = _EFFECTS.get(type(effect))
            if handler is not None:
                handler(self, actor, effect)
        self._note_counts(actor)

    def settle(self) -> None:
        """Deliver what the network lets through until nothing moves."""
        delivered = 0
        while self.network:
            self.deliver(self.network.popleft())
            delivered += 1
            if delivered > DELIVERIES_MAX:
                raise Violation("the sessions never come to rest")

    def deliver(self, packet: Packet) -> None:
        rule = next((rule for rule in self.rules if rule.applies(packet)), None)
        if rule is not None:
            rule.left -= 1 if rule.left > 0 else 0
            if rule.action == "hold":
                self.held.append(packet)
                return
            if rule.action == "lose":
                self._note_loss("lost", packet)
                return
        if (packet.source, packet.target_actor) in self.cuts:
            self._note_loss("cut off", packet)
            return
        self.hand_over(packet)
        if rule is not None and rule.action == "duplicate":
            self.log.append(f"again: {packet.source} -> {packet.target_actor} {packet.kind}")
            self.hand_over(packet)

    def _note_loss(self, how: str, packet: Packet) -> None:
        if packet.kind not in ("ping", "pong"):
            self.log.append(f"{how}: {packet.source} -> {packet.target_actor} {packet.kind}")

    def hand_over(self, packet: Packet) -> None:
        actor = self.actors.get(packet.target_actor)
        if actor is not None and actor.core is not None:
            self.receive(actor, packet.frame, packet.source)

    def receive(self, actor: Actor, frame: bytes, via: str = "") -> None:
        """Bytes arrive at a process, as its driver would take them."""
        try:
            source, destination, message = wire.decode(frame)
        except WireError as error:
            actor.alive.counts["wire_error"] += 1
            self.log.append(f"{actor.name} drops a frame: {error}")
            self._note_counts(actor)
            return
        # On the connection to an actor speaks whatever process is at its address now.
        named = message.addressed if isinstance(message, wire.Stranger) else source
        known = actor.routes.get(named, self._incarnations.get(named, ("", 0))[0]) == via
        self.step(actor, ev.Received(source, destination, message, named if known or not via else b"?"))

    def release(self, kind: str = "*") -> None:
        """Let held messages go on, in the order in which they were sent. Rules that hold them end."""
        self.rules = [rule for rule in self.rules if not (rule.action == "hold" and kind in ("*", rule.kind))]
        going = [packet for packet in self.held if kind in ("*", packet.kind)]
        self.held = [packet for packet in self.held if packet not in going]
        self.network.extend(going)

    def wait(self, ms: float) -> None:
        """Let time pass: each deadline on its way fires in order, and what it causes is delivered before the next."""
        end = self.now_ms + ms
        while True:
            due = [
                (core_due, actor.name)
                for actor in self.actors.values()
                if actor.core is not None
                and not actor.frozen
                and (core_due := actor.core.deadline()) is not None
                and core_due <= end
            ]
            if not due:
                break
            when, name = min(due)
            self.now_ms = max(self.now_ms, when)
            actor = self.actors[name]
            self.apply(actor, actor.alive.expire(self.now_ms))
            self.settle()
        self.now_ms = end

    # --- writes ----------------------------------------------------------------------------------------------------------

    def end_write(self, name: str, outcome: str, reason: str = "as scripted") -> None:
        """How a write ended: done, failed, unknown or settled. One of a process that died can only land: its bytes arrive."""
        write = self.writes[name]
        actor = self.actors[write.actor]
        op = write.submit.op
        if write.orphaned_ms is not None:
            self._land(write)
            del self.writes[name]
            return
        if outcome == "unknown":
            write.unknown = True
            self.step(actor, ev.WriteUnknown(op, reason))
            return
        if outcome == "done" and not write.unknown:
            refused = self._land(write)
            self.ended[name] = self.writes.pop(name)
            if refused:
                self.step(actor, ev.WriteFailed(op, refused))
                return
            if actor.notifies:
                notice = wire.encode(actor.alive.identity.incarnation, write.submit.peer, write.submit.notice)
                self._post(actor, write.submit.peer, "part", notice)
                self.settle()
            self.step(actor, ev.WriteDone(op, write.submit.notice.nbytes, actor.notifies))
            return
        if outcome in ("done", "settled"):  # a write of unknown outcome that ends well after all
            self._land(write)
            self.ended[name] = self.writes.pop(name)
            self.step(actor, ev.WriteSettled(op))
            return
        self.ended[name] = self.writes.pop(name)
        self.step(actor, ev.WriteFailed(op, reason))

    def report_again(self, name: str, outcome: str) -> None:
        """The data plane reports a write that has ended a second time. Nothing lands."""
        write = self.ended[name]
        op = write.submit.op
        reports: dict[str, ev.Event] = {
            "done": ev.WriteDone(op, write.submit.notice.nbytes, self.actors[write.actor].notifies),
            "failed": ev.WriteFailed(op, "reported again"),
            "unknown": ev.WriteUnknown(op, "reported again"),
            "settled": ev.WriteSettled(op),
        }
        self.step(self.actors[write.actor], reports[outcome])

    def _land(self, write: Write) -> str:
        """The bytes of a write arrive. Returns why the receiving data plane refused them, "" when they are placed."""
        name, life = self._incarnations[write.submit.peer]
        actor = self.actors[name]
        if actor.core is None or life != actor.life:
            return "the process that granted the pages is gone"
        grant = actor.grants.get(write.submit.generation)
        if grant is None:
            raise Violation(f"{write.name} writes to pages that {name} never granted")
        touched = self._touched(write)
        if not touched <= grant.pages:
            raise Violation(f"{write.name} writes to pages {sorted(touched - grant.pages)} that {name} did not grant")
        if write.submit.aux is not None and write.submit.aux[1] != grant.aux_row:
            raise Violation(f"{write.name} writes to aux row {write.submit.aux[1]} of {name}, which granted row {grant.aux_row}")
        if not grant.exposed and actor.vouches:
            return "the grant was revoked"
        if grant.released:
            raise Violation(f"{write.name} landed in pages of {name} room {grant.room} after they were released")
        notice, writer = write.submit.notice, self._incarnation_of(write)
        grant.chunks_written.add((writer, notice.chunk))
        if notice.chunks_total:
            grant.chunks_total[writer] = notice.chunks_total
        return ""

    def _incarnation_of(self, write: Write) -> bytes:
        return next(known for known, life in self._incarnations.items() if life == (write.actor, write.life))

    @staticmethod
    def _touched(write: Write) -> set[int]:
        return {page for _, _, packed in write.submit.copies for page in unpack_pages(packed)}

    # --- effects ---------------------------------------------------------------------------------------------------------

    def _on_send(self, actor: Actor, effect: ev.Send) -> None:
        frame = wire.encode(actor.alive.identity.incarnation, effect.peer, effect.message)
        if isinstance(effect.message, wire.Part):
            self._note_empty(actor, effect.peer, effect.message)
        self._post(actor, effect.peer, effect.message.__struct_config__.tag, frame)

    def _note_empty(self, actor: Actor, peer: bytes, part: wire.Part) -> None:
        """A chunk of which decode has everything already: it is in its place without a write."""
        target, life = self._incarnations[peer]
        grant = self.actors[target].grants.get(part.generation)
        if grant is None or life != self.actors[target].life or part.nbytes or part.aux:
            return
        writer = actor.alive.identity.incarnation
        grant.chunks_written.add((writer, part.chunk))
        if part.chunks_total:
            grant.chunks_total[writer] = part.chunks_total

    def _post(self, actor: Actor, peer: bytes, kind: object, frame: bytes) -> None:
        self._packets += 1
        self.sent[actor.name, str(kind)] += 1
        target = actor.routes.get(peer) or self._incarnations.get(peer, ("nobody", 0))[0]
        if kind not in ("ping", "pong"):  # they come by the hundred and say nothing
            self.log.append(f"{actor.name} -> {target} {kind}")
        self.network.append(Packet(self._packets, actor.name, peer, target, str(kind), frame))

    def _on_submit(self, actor: Actor, effect: ev.Submit) -> None:
        name = f"{actor.name}:{effect.op}"
        copies = ", ".join(_copies(effect))
        self.log.append(f"{actor.name} writes {name}: room {effect.notice.room} chunk {effect.notice.chunk}, pages {copies}")
        write = self.writes[name] = Write(name, actor.name, actor.life, effect)
        target_name, life = self._incarnations[effect.peer]
        target_actor = self.actors[target_name]
        grant = target_actor.grants.get(effect.generation)
        if target_actor.core is not None and life == target_actor.life and grant is not None and grant.released:
            raise Violation(f"{name} was submitted to pages of {target_name} that were released")
        assert not write.unknown

    def _on_cancel(self, actor: Actor, effect: ev.Cancel) -> None:
        name = f"{actor.name}:{effect.op}"
        self.log.append(f"{actor.name} cancels {name}")
        if name in self.writes:
            self.writes[name].cancelled = True

    def _on_publish(self, actor: Actor, effect: ev.Publish) -> None:
        phase = Phase(effect.phase)
        before = actor.phases.get(effect.generation)
        if before is not None and (before, phase) not in _PHASE_EDGES:
            raise Violation(f"{actor.name} room {effect.room} went from {before.name} to {phase.name}, which is no declared edge")
        if before is None and phase is not Phase.BOOTSTRAPPING:
            raise Violation(f"{actor.name} room {effect.room} began as {phase.name}")
        actor.phases[effect.generation] = phase
        actor.rooms[effect.generation] = effect.room
        room = actor.alive.registry.by_generation.get(effect.generation)
        if phase is Phase.FAILED:
            failure = room.failure if room is not None else None
            if failure is None:
                raise Violation(f"{actor.name} room {effect.room} failed without a reason")
            self.log.append(f"{actor.name} room {effect.room}: FAILED ({failure.cause}: {failure.reason})")
        else:
            self.log.append(f"{actor.name} room {effect.room}: {phase.name}")
        if phase is Phase.SUCCESS and actor.role == "decode":
            grant = actor.grants[effect.generation]
            if not grant.complete():
                placed = sorted((self._incarnations[writer][0], chunk) for writer, chunk in grant.chunks_written)
                total = {self._incarnations[writer][0]: count for writer, count in grant.chunks_total.items()}
                raise Violation(f"{actor.name} room {effect.room} succeeded with chunks {placed} of {total}")

    def _on_expose(self, actor: Actor, effect: ev.Expose) -> None:
        pages = frozenset(page for packed in effect.pages.values() for page in unpack_pages(packed))
        for generation, other in actor.grants.items():
            if other.released or generation == effect.generation or not other.exposed:
                continue
            if other.pages & pages:
                raise Violation(f"{actor.name} grants pages {sorted(other.pages & pages)} of room {other.room} a second time")
            if effect.aux_row >= 0 and other.aux_row == effect.aux_row:
                raise Violation(f"{actor.name} grants aux row {other.aux_row} of room {other.room} a second time")
        room = actor.alive.registry.by_generation[effect.generation].room
        actor.grants[effect.generation] = Grant(room, pages, effect.aux_row, effect.writers)

    def _on_revoke(self, actor: Actor, effect: ev.Revoke) -> None:
        grant = actor.grants.get(effect.generation)
        if grant is not None:
            grant.exposed = False
        if actor.vouches:
            self.step(actor, ev.Revoked(effect.generation))

    def _on_release(self, actor: Actor, effect: ev.ReleasePages) -> None:
        if effect.generation in actor.released:
            raise Violation(f"{actor.name} released the memory of room {effect.room}, generation {effect.generation}, twice")
        if actor.phases[effect.generation] not in (Phase.SUCCESS, Phase.FAILED):
            raise Violation(f"{actor.name} released the memory of room {effect.room}, which is live")
        actor.released.add(effect.generation)
        self.log.append(f"{actor.name} room {effect.room}: memory free")
        for write in self.writes.values():
            if actor.role == "prefill" and write.actor == actor.name and write.life == actor.life:
                op = actor.alive.ops.get(write.submit.op)
                if op is not None and op.link.room.generation == effect.generation:
                    raise Violation(f"{actor.name} released source pages that {write.name} still reads")
            if actor.role == "decode" and self._may_land(actor, effect.generation, write):
                raise Violation(f"{actor.name} released pages of room {effect.room} that {write.name} may still write")
        if effect.generation in actor.grants:
            actor.grants[effect.generation].released = True

    def _may_land(self, actor: Actor, generation: int, write: Write) -> bool:
        name, life = self._incarnations[write.submit.peer]
        if (name, life) != (actor.name, actor.life) or write.submit.generation != generation or actor.vouches:
            return False
        return write.orphaned_ms is None or self.now_ms < write.orphaned_ms + self.residual_ms

    def _on_lookup(self, actor: Actor, effect: ev.Lookup) -> None:
        if self.rendezvous_slow:
            self.lookups.append((actor, actor.life, effect))
        else:
            self._answer(actor, effect)

    def answer_lookups(self) -> None:
        """A slow rendezvous answers, in the order of the questions."""
        self.rendezvous_slow = False
        while self.lookups:
            actor, life, effect = self.lookups.popleft()
            if life == actor.life:
                self._answer(actor, effect)

    def _answer(self, actor: Actor, effect: ev.Lookup) -> None:
        if not self.rendezvous_up:
            self.step(actor, ev.LookupFailed(effect.query, "the rendezvous does not answer"))
            return
        dp_rank, announcement = effect.dp_rank, 0
        if dp_rank is None and {record.dp_size for record in self.registry.values()} == {1}:
            dp_rank = 0
        elif dp_rank is None:
            dp_rank, announcement = self.announced.get(effect.room, (None, 0))
        if dp_rank is None:
            self.step(actor, ev.LookupFailed(effect.query, f"room {effect.room} is not registered with any rank yet"))
            return
        records = tuple(record for record in self.registry.values() if record.dp_rank == dp_rank)
        if records:
            self.step(actor, ev.PeersFound(effect.query, records, announcement))
        else:
            self.step(actor, ev.LookupFailed(effect.query, f"no rank of dp_rank {dp_rank} is registered"))

    def _on_announce(self, actor: Actor, effect: ev.Announce) -> None:
        self._announcements += 1
        self.announced[effect.room] = (actor.dp_rank, self._announcements)

    def _on_connect(self, actor: Actor, effect: ev.Connect) -> None:
        name = effect.endpoint.removeprefix("world://")
        actor.routes[effect.peer] = name  # whoever lives there now

    # --- the story -------------------------------------------------------------------------------------------------------

    def _traced(self, actor: Actor, step: Step) -> None:
        room = (step.room.room, step.room.generation) if step.room is not None else (-1, 0)
        self.rows.append(Taken(actor.name, actor.life, step.machine, step.row, *room))
        if step.machine == "peer" and step.peer is not None and step.before != step.after:
            self.log.append(f"{actor.name} peer {step.peer.name}: {step.after}")
        elif step.machine == "lease" and step.room is not None and step.before != step.after:
            self.log.append(f"{actor.name} room {step.room.room}: lease {step.after}")
        elif step.row == "clear" and step.room is not None:
            self.log.append(f"{actor.name} room {step.room.room}: cleared")

    def _note_counts(self, actor: Actor) -> None:
        if actor.core is None:
            return
        fresh = actor.core.counts - actor.counts_seen
        for what, count in sorted(fresh.items()):
            if not what.startswith(("failed.", "succeeded", "repeated.")):
                self.log.append(f"{actor.name} counts {what}" + (f" x{count}" if count > 1 else ""))
        actor.counts_seen = Counter(actor.core.counts)

    # --- questions -------------------------------------------------------------------------------------------------------

    def describe_write(self, name: str) -> str:
        """What an open write copies: `7,8 -> 2,3 aux 1 -> 4`."""
        return " ".join(_copies(self.writes[name].submit))

    def idle_problems(self) -> list[str]:
        """What keeps the world from being at rest: at idle every table is empty and no message or write is on its way."""
        problems = [f"{packet.source} -> {packet.target_actor} {packet.kind} is held" for packet in self.held]
        problems += [f"{name} has not ended" for name, write in self.writes.items() if write.orphaned_ms is None]
        for actor in self.actors.values():
            if actor.core is None:
                continue
            core = actor.core
            tables: dict[str, Iterable[object]] = {
                "operations": core.ops,
                "links": core.links,
                "leases": core.leases,
                "repetitions": core.timers.repeats,
                "live rooms": [room for room in core.registry.by_room.values() if room.live],
            }
            problems += [f"{actor.name} has {what}: {list(table)}" for what, table in tables.items() if list(table)]
        return problems


def _copies(submit: ev.Submit) -> list[str]:
    pages = [f"{_numbers(source)} -> {_numbers(target)}" for _, source, target in submit.copies]
    return pages + ([f"aux {submit.aux[0]} -> {submit.aux[1]}"] if submit.aux else [])


def _numbers(packed: bytes) -> str:
    return ",".join(map(str, unpack_pages(packed))) or "none"


def pages(indices: Iterable[int]) -> ev.Pages:
    return {"kv": pack_pages(indices)}


_EFFECTS: dict[type, Callable[[World, Actor, object], None]] = {
    ev.Send: World._on_send,  # type: ignore[dict-item]  # noqa: SLF001 - the class's own table
    ev.Submit: World._on_submit,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Cancel: World._on_cancel,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Publish: World._on_publish,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Expose: World._on_expose,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Revoke: World._on_revoke,  # type: ignore[dict-item]  # noqa: SLF001
    ev.ReleasePages: World._on_release,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Lookup: World._on_lookup,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Announce: World._on_announce,  # type: ignore[dict-item]  # noqa: SLF001
    ev.Connect: World._on_connect,  # type: ignore[dict-item]  # noqa: SLF001
}
