"""Every state of a real session core that an exploration meets, and what each stimulus does to it.

A core is deterministic, so it runs once for each pair of state and stimulus; the worlds are put together from what was learnt.
Time is abstract: a timer that is armed may run out at any moment, and is then given the time at which it would have been due.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeAlias

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import handshake, sender, wire
from pd_fsm.core.session import Identity, SessionCore, Step
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import LeaseState, PeerState, Phase
from pd_fsm.testing import rude
from pd_fsm.testing.invariants import CoreStep, broken_by
from pd_fsm.testing.scopes import Scope
from pd_fsm.testing.snapshot import clone, freeze, pending
from pd_fsm.testing.world import COMPONENTS, PAGE_TOKENS, pages

ROOM = 1
RESIDUAL_MS = 1_000.0
_GONE = (PeerState.LOST, PeerState.REFUSED)

Stimulus: TypeAlias = tuple[Any, ...]
"""What a core is given, as a hashable name: ("frame", number), ("open",), ("chunk", generation, index), ("timer", key), ..."""


class Cast:
    """The processes of a scope: P, P2, ... are prefill, D, D2, ... decode. A process is its place in `names`."""

    def __init__(self, scope: Scope) -> None:
        self.names = [*_numbered("P", scope.prefills), *_numbered("D", scope.decodes)]
        self.prefills = range(scope.prefills)
        self.decodes = range(scope.prefills, len(self.names))

    def incarnation(self, process: int, life: int) -> bytes:
        return f"{self.names[process]}.{life}".encode().ljust(wire.INCARNATION_BYTES, b"_")

    def whose(self, incarnation: bytes) -> tuple[int, int]:
        """The process and the life of an incarnation."""
        name, _, life = incarnation.rstrip(b"_").decode().partition(".")
        return self.names.index(name), int(life)

    def record(self, process: int, life: int) -> ev.PeerRecord:
        return ev.PeerRecord(self.incarnation(process, life), f"world://{self.names[process]}", self.names[process])


def name_of(incarnation: bytes) -> str:
    """`P` for its first life, `P.2` for its second."""
    return incarnation.rstrip(b"_").decode().removesuffix(".1")


def _numbered(letter: str, count: int) -> list[str]:
    return [letter if index == 0 else f"{letter}{index + 1}" for index in range(count)]


@attrs.frozen
class Frame:
    """A frame that was sent in some state. `sure` ones are notices of a data plane: they are neither lost nor repeated."""

    data: bytes
    sender: bytes
    destination: bytes
    message: wire.Message
    target: int
    sure: bool

    @property
    def kind(self) -> str:
        return str(self.message.__struct_config__.tag)


@attrs.frozen(eq=False)
class Outcome:
    """What a stimulus does to a core in one state. `looks_around`: some property of it needs a look at the world."""

    core: int
    effects: tuple[ev.Effect, ...]
    rows: tuple[str, ...]
    step: CoreStep
    wrong: str
    looks_around: bool


class Cores:
    """States by number. `rows_taken` counts the rows of the machines, over pairs of state and stimulus."""

    def __init__(self, scope: Scope, cast: Cast, frames: list[Frame], deadlines: Deadlines, limits: Limits) -> None:
        self.states: list[SessionCore] = []
        self.rows_taken: Counter[str] = Counter()
        self._scope = scope
        self._cast = cast
        self._frames = frames
        self._deadlines = deadlines
        self._limits = limits
        self._owner: list[tuple[int, int]] = []  # process and life
        self._numbers: dict[Hashable, int] = {}
        self._outcomes: dict[tuple[int, Stimulus], Outcome] = {}
        self._calls: dict[int, tuple[Stimulus, ...]] = {}

    def start(self, process: int, life: int) -> int:
        """The first state of a life."""
        role = "prefill" if process in self._cast.prefills else "decode"
        name = f"{self._cast.names[process]}.{life}" if life > 1 else self._cast.names[process]
        residual_ms = RESIDUAL_MS if self._scope.residual else 0.0
        incarnation = self._cast.incarnation(process, life)
        identity = Identity(incarnation, name, role, "world", Topology(), COMPONENTS, residual_ms=residual_ms)
        return self._number(process, life, SessionCore(identity, self._deadlines, self._limits))

    def _number(self, process: int, life: int, core: SessionCore) -> int:
        key = (process, life, freeze(core))
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.states)
            self.states.append(core)
            self._owner.append((process, life))
        return number

    def breaks(self, number: int) -> str:
        """What a rude environment breaks in state `number`, or "". What it leads to is not looked at."""
        for stimulus in self.rude(number):
            outcome = self._try(number, stimulus, keep=False)
            if outcome.wrong:
                return f"{outcome.wrong} ({outcome.step.event})"
        return ""

    def outcome(self, number: int, stimulus: Stimulus) -> Outcome:
        """What `stimulus` does in state `number`."""
        key = (number, stimulus)
        known = self._outcomes.get(key)
        if known is None:
            known = self._outcomes[key] = self._try(number, stimulus)
            self.rows_taken.update(known.rows)
        return known

    def _try(self, number: int, stimulus: Stimulus, *, keep: bool = True) -> Outcome:
        before = self.states[number]
        core = clone(before)
        rows: list[str] = []

        def note(step: Step) -> None:
            if step.row not in ("open", "clear"):
                rows.append(step.row)

        core.trace = note
        event, effects, error = None, [], None
        try:
            event = self._event(core, stimulus)
            effects = self._run(core, stimulus) if event is None else core.step(event, core.now_ms)
        except LocalProtocolError as refused:
            error = refused
        except Exception as raised:  # noqa: BLE001 - whatever it is, it is the finding
            step = CoreStep(before, before, event, (), raised, unchanged=True)
            return Outcome(
                number, (), tuple(rows), step, f"no event may raise: {type(raised).__name__}: {raised}", looks_around=False
            )
        core.trace = None
        after = self._number(*self._owner[number], core) if keep else -1
        step = CoreStep(before, core, event, tuple(effects), error, unchanged=after == number)
        return Outcome(after, tuple(effects), tuple(rows), step, broken_by(step), _looks_around(effects))

    # --- what the engine and the clock may do --------------------------------------------------------------------------------

    def calls(self, number: int) -> tuple[Stimulus, ...]:
        """What may be done to a core by its engine, but for `open`, and by its clock. Rude: calls are made whether or not they make
        sense, for every life of the room, also for one that was cleared."""
        known = self._calls.get(number)
        if known is None:
            core = self.states[number]
            known = self._calls[number] = (*self._engine(core), *self._clock(core))
        return known

    def _engine(self, core: SessionCore) -> Iterator[Stimulus]:
        chunks = self._scope.chunks
        for generation in range(1, last_generation(core) + 1):
            room = core.registry.by_generation.get(generation)
            if core.sends:
                index = 0 if room is None else len(room.chunks)
                if index < chunks or (room is not None and not room.live):
                    yield ("chunk", generation, min(index, chunks - 1))
            elif self._scope.granted_late:
                yield ("grant", generation)
            yield ("abort", generation)
            yield ("clear", generation)

    def _clock(self, core: SessionCore) -> Iterator[Stimulus]:
        for room in core.registry.by_generation.values():
            if room.live:
                yield ("deadline", room.generation)
        for key in core.timers.repeats:
            yield ("timer", key)
        for room in core.leases.values():
            if room.lease.state is LeaseState.REVOKING:
                yield ("timer", ("drain", b"", room.generation))
        for key in pending(core):
            yield ("timer", key)
        for peer in core.peers.values():
            if peer.state not in _GONE:
                yield ("silence", peer.incarnation, peer.epoch)
        if self._scope.expiry and core.registry.next_expiry() is not None:
            yield ("lapse",)

    def rude(self, number: int) -> Iterator[Stimulus]:
        """Every message from everybody, and a second report of every write that has ended."""
        core = self.states[number]
        for index, _ in enumerate(rude.frames(core, ROOM)):
            yield ("message", index)
        for op in range(1, last_op(core) + 2):
            if op not in core.ops:
                yield from ((kind, op) for kind in ("done", "failed", "unknown", "settled"))

    # --- what a stimulus is --------------------------------------------------------------------------------------------------

    def _run(self, core: SessionCore, stimulus: Stimulus) -> list[ev.Effect]:
        """What is no event: time, and the handshake that is over before a scope begins."""
        match stimulus:
            case ("timer", key):
                repeated = core.timers.repeats.get(key)
                return core.fire(key, max(core.now_ms, repeated.due_ms if repeated is not None else 0.0))
            case ("deadline", generation):
                room = core.registry.by_generation[generation]
                turn_ms = sender.turn_ms(core, room) + core.deadlines.transfer_ms if core.sends else 0.0
                return core.fire(("room", b"", generation), max(core.now_ms, room.deadline_ms, turn_ms))
            case ("silence", incarnation, epoch):
                peer = core.peers[incarnation]
                connecting = peer.state is PeerState.CONNECTING
                due = peer.since_ms + core.deadlines.handshake_ms if connecting else peer.heard_ms + core.deadlines.lost_ms
                return core.fire(("peer", incarnation, epoch), max(core.now_ms, due))
            case ("lapse",):
                core.now_ms = max(core.now_ms, core.registry.next_expiry() or 0.0)
                core.registry.expire(core.now_ms)
                return []
            case ("meet",):
                records = tuple(self._cast.record(process, 1) for process in self._cast.prefills)
                core.directory["", None] = records
                for record in records:
                    handshake.meet(core, record)
                return core.expire(core.now_ms)
        raise ValueError(f"no stimulus {stimulus!r}")

    def _event(self, core: SessionCore, stimulus: Stimulus) -> ev.Event | None:
        kind, *args = stimulus
        make = _EVENTS.get(kind)
        return None if make is None else make(self, core, *args)

    def _received(self, _: SessionCore, number: int) -> ev.Event:
        frame = self._frames[number]
        # On a connection speaks whoever is at that address: a Stranger for the process that was dialled, all others for themselves.
        via = frame.message.addressed if isinstance(frame.message, wire.Stranger) else frame.sender
        return ev.Received(frame.sender, frame.destination, frame.message, via)

    @staticmethod
    def _message(core: SessionCore, index: int) -> ev.Event:
        source, destination, message = next(itertools.islice(rude.frames(core, ROOM), index, None))
        return ev.Received(source, destination, message, message.addressed if isinstance(message, wire.Stranger) else source)

    def _open(self, core: SessionCore) -> ev.Event:
        if core.sends:
            return ev.OpenSend(ROOM, self._scope.decodes)
        granted = None if self._scope.granted_late else self._pages(last_generation(core) + 1)
        return ev.OpenReceive(ROOM, granted)

    def _grant(self, _: SessionCore, generation: int) -> ev.Event:
        return ev.GrantPages(generation, self._pages(generation))

    def _pages(self, generation: int) -> ev.Pages:
        """Pages of their own for each life of the room: those of an earlier one may be held still."""
        first = generation * self._scope.chunks
        return pages(range(first, first + self._scope.chunks))

    def _chunk(self, _: SessionCore, generation: int, index: int) -> ev.Event:
        start, last = index * PAGE_TOKENS, index == self._scope.chunks - 1
        return ev.ChunkReady(generation, start, start + PAGE_TOKENS, pages([index]), last)

    def _found(self, _: SessionCore, query: int, lives: tuple[int, ...]) -> ev.Event:
        return ev.PeersFound(query, tuple(self._cast.record(*known) for known in zip(self._cast.prefills, lives, strict=True)))

    def _done(self, core: SessionCore, op: int) -> ev.Event:
        return ev.WriteDone(op, core.space_bytes["kv"], self._scope.notifies)


def last_op(core: SessionCore) -> int:
    return core._last_op  # noqa: SLF001 - read only


def last_generation(core: SessionCore) -> int:
    return core.registry._last_generation  # noqa: SLF001 - read only


_EVENTS: dict[str, Callable[..., ev.Event]] = {
    "frame": Cores._received,  # noqa: SLF001 - the class's own table
    "message": lambda _, core, index: Cores._message(core, index),  # noqa: SLF001
    "open": Cores._open,  # noqa: SLF001
    "grant": Cores._grant,  # noqa: SLF001
    "chunk": Cores._chunk,  # noqa: SLF001
    "found": Cores._found,  # noqa: SLF001
    "done": Cores._done,  # noqa: SLF001
    "abort": lambda _, __, generation: ev.AbortRequested(generation, "the client left"),
    "clear": lambda _, __, generation: ev.ClearRequested(generation),
    "gone": lambda _, __, peer: ev.PeerUnreachable(peer, "nobody listens there", dead=True),
    "revoked": lambda _, __, generation: ev.Revoked(generation),
    "failed": lambda _, __, op: ev.WriteFailed(op, "it failed"),
    "unknown": lambda _, __, op: ev.WriteUnknown(op, "it timed out"),
    "settled": lambda _, __, op: ev.WriteSettled(op),
}


def _looks_around(effects: list[ev.Effect]) -> bool:
    return any(
        isinstance(effect, ev.ReleasePages | ev.Submit)
        or (isinstance(effect, ev.Publish) and effect.phase == Phase.SUCCESS)
        or (isinstance(effect, ev.Send) and isinstance(effect.message, wire.Drained))
        for effect in effects
    )
