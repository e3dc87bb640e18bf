"""One life of one engine process: a real session on its own clock, driven by `progress()`, which can be stopped and killed.

Everything that reaches a process goes through `do`: a dead one gets nothing, a stopped one gets it when it is woken. After each
drive the process is held to what must always be true of a session.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from pd_fsm.core import events as ev
from pd_fsm.core.session import Step
from pd_fsm.core.settings import Limits, Topology
from pd_fsm.kv import Plan
from pd_fsm.kv.landing import Landing
from pd_fsm.machines import LEASE, PEER, ROOM
from pd_fsm.runtime.session import open_session
from pd_fsm.runtime.trace import TraceWriter
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.testing.sim_agenda import Action
from pd_fsm.testing.sim_engine import Engine
from pd_fsm.testing.sim_memory import WORDS, Pool
from pd_fsm.testing.sim_network import Connection
from pd_fsm.testing.sim_options import DEADLINES, SMALL
from pd_fsm.testing.sim_rendezvous import Client
from pd_fsm.testing.world import Violation

if TYPE_CHECKING:
    from pd_fsm.testing.simulator import Simulation

SCHEME = "sim://"
CLOSE_MS = 2_000  # that a closing process waits for what it owes
DRIVES_MAX = 8  # of one session at one moment; more means that it never comes to rest
_EDGES = {
    table.name: {(r.event, table.states(r.source).name, table.states(r.target).name) for r in table.rows()}
    for table in (ROOM, LEASE, PEER)
}
_BOUNDS = {"rooms_max": "by_room", "tombstones_max": "tombstones", "early_offers_max": "early_count"}


class Planes:
    """The transport of one process: passes its session's calls on to the network and the fabric of the simulation."""

    descriptor = b""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._network = process.world.network
        self._fabric = process.world.fabric
        self._vouches = process.world.options.vouches
        self.endpoint = SCHEME + process.address
        self.notifies = process.world.options.notifies
        self.residual_ms = float(process.world.options.residual_ms)

    def connect(self, peer: bytes, endpoint: str) -> None:
        self._network.dial(self._process, peer, endpoint.removeprefix(SCHEME))

    def send(self, peer: bytes, frame: bytes) -> None:
        self._network.send(self._process, peer, frame)

    def disconnect(self, peer: bytes) -> None:
        self._process.dialled.pop(peer, None)

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        """Nothing to prepare."""

    def peer_down(self, peer: bytes) -> None:
        self._fabric.peer_down(self._process, peer)

    def expose(self, grant: ev.Expose) -> None:
        self._process.landing.expose(grant)
        self._process.exposed.add(grant.generation)

    def revoke(self, generation: int) -> bool:
        self._process.landing.revoke(generation)
        self._process.exposed.discard(generation)
        return self._vouches

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        self._fabric.submit(self._process, op, peer, generation, plan, notice)

    def cancel(self, op: int) -> None:
        self._fabric.cancel(self._process, op)


class Process:
    """`node` is its place in the deployment, which outlives it; its next life may have another `address`."""

    def __init__(self, world: Simulation, node: str, life: int, address: str) -> None:
        self.world = world
        self.agenda = world.agenda
        self.node = node
        self.address = address
        self.name = f"{node}.{life}"
        self.incarnation = hashlib.blake2b(f"{world.schedule.seed} {self.name}".encode(), digest_size=16).digest()
        self.dead = self.frozen = False
        self.closing_by_ms: float | None = None
        self.draining_by_ms: float | None = None
        self.restart_ms = 0.0
        self.dialled: dict[bytes, Connection] = {}
        self.accepted: dict[bytes, Connection] = {}
        self.exposed: set[int] = set()
        speed, offset, *_ = world.fates.draw(f"clock {self.name}")
        self._rate = 1 + world.options.skew * (2 * speed - 1)
        self._offset_ms = 1e6 * offset
        self._held: list[Action] = []
        self._drive_due = False
        self._timer_ms: float | None = None
        self._host: Host
        self._states: dict[tuple[str, int | bytes], str] = {}
        self._quiesced: set[int] = set()
        self.misfit = world.fates.one("layout", node) < world.options.misfits and not world.fates.healed
        self.pool = Pool(WORDS + 1 if self.misfit else WORDS)
        self.landing = Landing(self.pool.layout)
        self.role = "prefill" if node.startswith("P") else "decode"
        index, size = (int(node[1:]), world.options.prefills) if self.role == "prefill" else (0, 1)
        self.rendezvous = Client(world.rendezvous, self)
        self.session = open_session(
            self.role,
            self.pool.layout,
            transport=self._transport,
            rendezvous=self.rendezvous,
            topology=Topology(dp_rank=index, dp_size=size),
            name=self.name,
            deadlines=DEADLINES,
            limits=SMALL if world.options.small_limits else Limits(rooms_max=1_024),
            thread=False,
            clock_ms=self.clock_ms,
            incarnation=self.incarnation,
        )
        self.core = self.session.driver.core
        self._trace = TraceWriter(world.trace_path, self.core.identity, self.clock_ms) if world.trace_path else None
        self.core.trace = self._traced
        self.engine = Engine(self)

    def clock_ms(self) -> float:
        """The local clock: its own beginning, its own speed."""
        return self._offset_ms + self.agenda.now_ms * self._rate

    def _transport(self, host: Host) -> Transport:
        self._host = host
        planes = Planes(self)
        return Transport("sim", planes, planes, lambda _: None)

    # --- what reaches it -------------------------------------------------------------------------------------------------

    def do(self, action: Action) -> None:
        if self.dead:
            return
        if self.frozen:
            self._held.append(action)
        else:
            action()
            self.wake()

    def emit(self, event: ev.Event) -> None:
        self.do(lambda: self._host.emit(event))

    def deliver(self, frame: bytes, via: bytes) -> None:
        self.do(lambda: self._host.deliver(frame, via))

    def wake(self) -> None:
        """Its loop comes round, soon."""
        if not self._drive_due:
            self._drive_due = True
            lag_ms = self.world.options.lag_ms
            self.agenda.after(lag_ms * self.world.fates.one("lag", self.node) if lag_ms else 0.0, self._drive)

    # --- driving ---------------------------------------------------------------------------------------------------------

    def _drive(self) -> None:
        self._drive_due = False
        if self.dead or self.frozen:
            return
        for _ in range(DRIVES_MAX):
            worked = self.session.progress()
            acted = self.engine.react()
            if not worked and not acted:
                break
        else:
            raise Violation(f"livelock: {self.name} has been driven {DRIVES_MAX} times at {self.agenda.now_ms:.2f} ms")
        self._check()
        self._end_if_due()
        self._arm()

    def _arm(self) -> None:
        deadline_ms = self.core.deadline()
        if self.dead or deadline_ms is None:
            return
        when_ms = self.agenda.now_ms + max(0.0, (deadline_ms - self.clock_ms()) / self._rate) + 0.001
        if self._timer_ms is None or when_ms < self._timer_ms - 0.001:
            self._timer_ms = when_ms
            self.agenda.at(when_ms, lambda: self._timer(when_ms))

    def _timer(self, when_ms: float) -> None:
        if self._timer_ms == when_ms:
            self._timer_ms = None
            self._drive()

    # --- stop, kill, close -----------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        if not self.frozen or self.dead:
            return
        self.frozen = False
        held, self._held = self._held, []
        for action in held:
            action()
        self.wake()

    def kill(self) -> None:
        """Gone, with all that it knew. What it gave to the network and the fabric is not."""
        self.dead = True
        self._held.clear()
        self._host.reactor.close()
        if self._trace is not None:
            self._trace.close()
        self.world.fabric.writer_died(self)
        self.world.fabric.reader_died(self)
        self.world.network.went_down(self)
        self.world.went_down(self)

    @property
    def ending(self) -> bool:
        """Whether it is being drained or closed."""
        return self.closing_by_ms is not None or self.draining_by_ms is not None

    def begin_drain(self, bound_ms: float, restart_ms: float) -> None:
        if self.ending:
            return
        self.draining_by_ms, self.restart_ms = self.agenda.now_ms + bound_ms, restart_ms
        self.session.begin_drain("the operator drains it")
        if self.role == "prefill":
            self.rendezvous.wait_left()
        self.agenda.at(self.draining_by_ms, self.wake)

    def begin_close(self, restart_ms: float) -> None:
        """As `Session.close`, with its wait in virtual time."""
        if self.closing_by_ms is None:
            self.closing_by_ms, self.restart_ms = self.agenda.now_ms + CLOSE_MS, restart_ms
            self.session.driver.call(ev.ShutdownRequested(f"{self.name} was closed"))
            self.agenda.at(self.closing_by_ms, self.wake)

    def _end_if_due(self) -> None:
        now = self.agenda.now_ms
        drained = self.ending and self.session.drained
        if self.closing_by_ms is None and self.draining_by_ms is not None and now >= self.draining_by_ms and not drained:
            self.begin_close(self.restart_ms)
            self.wake()
        elif drained or (self.closing_by_ms is not None and now >= self.closing_by_ms):
            self.agenda.note(f"{self.name} is closed")
            self.session.close(0)
            self.rendezvous.leave()
            self.kill()

    # --- what must be true -----------------------------------------------------------------------------------------------

    def _traced(self, step: Step) -> None:
        """Only declared edges, from the state that the last one led to; memory is given back once."""
        self.world.coverage[step.row] += 1
        if self._trace is not None:
            self._trace.record(step)
            self._trace.flush()  # at once: several sessions share the file, and its order is the true one
        if step.before == step.after:
            return
        room, peer = step.room, step.peer
        assert room is not None or peer is not None
        key = (step.machine, room.generation if room is not None else peer.incarnation if peer is not None else b"")
        self.agenda.note(
            f"{self.node} {step.machine} {room.room if room else peer and peer.name}: {step.before or '-'} -> {step.after or '-'}"
        )
        if step.row in ("open", "clear"):
            if step.row == "open":
                self._states[key] = step.after
            return
        if (step.event, step.before, step.after) not in _EDGES[step.machine]:
            self.world.breach(f"undeclared edge: {step.machine} {step.before} -> {step.after} by {step.event} at {self.name}")
        if peer is None:
            known = self._states.get(key, "PRIVATE")
            if known != step.before:
                self.world.breach(
                    f"lost state: {step.machine} of room {room and room.room} at {self.name} was {known}, now {step.before}"
                )
            self._states[key] = step.after
        if step.machine == "lease" and step.after == "QUIESCED" and room is not None:
            if room.generation in self._quiesced:
                self.world.breach(f"released twice: room {room.room}, generation {room.generation} at {self.name}")
            self._quiesced.add(room.generation)

    def _check(self) -> None:
        core = self.core
        if self.world.breached:  # inside of a call of the driver, which swallowed it
            raise Violation(self.world.breached)
        if core.counts["driver_error"]:
            raise Violation(f"driver error: {self.name} met an unexpected error: {self.world.logged()}")
        opened = self.engine.open_generations()
        if set(core.registry.by_generation) != opened:
            strange = set(core.registry.by_generation) ^ opened
            raise Violation(
                f"rooms nobody opened: {self.name} has {sorted(core.registry.by_generation)}, its engine differs in {strange}"
            )
        for bound, table in _BOUNDS.items():
            found = getattr(core.registry, table)
            size = found if isinstance(found, int) else len(found)
            if size > getattr(core.limits, bound):
                raise Violation(f"bound exceeded: {self.name} has {size} {table}, {bound} is {getattr(core.limits, bound)}")
        if len(core.peers) > core.limits.peers_max:
            raise Violation(f"bound exceeded: {self.name} knows {len(core.peers)} peers, peers_max is {core.limits.peers_max}")

    def leftovers(self) -> list[str]:
        """What is still in the tables of a session that should be at rest."""
        core = self.core
        tables = {
            "ops": core.ops,
            "links": core.links,
            "leases": core.leases,
            "repeats": core.timers.repeats,
            "quarantined": core.quarantined,
            "rooms": core.registry.by_room,
            "tombstones": core.registry.tombstones,
            "early offers": core.registry.early_count,
        }
        left = [f"{self.name} still has {name}" for name, table in tables.items() if table]
        left += [f"{self.name} still sends {each}" for each in core.describe()["unanswered"]]
        left += [
            f"{self.name} still knows {peer.name} as {peer.state.name}: {peer.reason}"
            for peer in core.peers.values()
            if peer.state.name != "READY" or self.world.process(peer.incarnation).dead
        ]
        return left
