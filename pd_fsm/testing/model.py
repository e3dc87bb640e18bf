"""The world as one hashable value over real cores: sessions of both roles, a hostile network, open writes, pages, faults left.

A `WorldState` is compared, stored and counted; nothing in it changes. What the environment may do is `Model.actions`; what it does
is `Model.apply`, which checks every property of `pd_fsm.testing.invariants` on the way and raises `Violation` with what is wrong.

The network is a set: frames have no order, and a frame that is sent again while it is under way is the same one. Delivering takes
it away, unless it is repeated; it may be lost. How much of that happens, and of all other faults, is the state's budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.session import SessionCore
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.machines import Phase
from pd_fsm.testing.cores import ROOM, Cast, Cores, Frame, Outcome, Stimulus
from pd_fsm.testing.invariants import Surroundings, broken_around
from pd_fsm.testing.scopes import Scope
from pd_fsm.testing.world import Violation

OPEN, UNKNOWN, ORPHAN = 0, 1, 2
"""How it stands with a write: it has not ended; nobody knows whether it has; its process died with it in the network."""

Action: TypeAlias = tuple[Any, ...]
"""What the environment does: ("call", process, stimulus), ("deliver", frame), ("lose", frame), ("end", write, outcome), ..."""


class WorldState(NamedTuple):
    """One state. `cores`: numbers of `Cores`, -1 for a process that is dead; `lives`: how often each was started; `network`: frames
    under way; `writes`: (write, status) that have not ended; `landed`: writes whose bytes lie in pages of a live room; `budget`:
    what may still happen, by `Model.budget_names`."""

    cores: tuple[int, ...]
    lives: tuple[int, ...]
    network: frozenset[int]
    writes: frozenset[tuple[int, int]]
    landed: frozenset[int]
    budget: tuple[int, ...]


@attrs.frozen
class Write:
    """A write that was submitted in some state."""

    process: int
    life: int
    submit: ev.Submit
    target: int
    target_life: int


@attrs.frozen(eq=False)
class Edge:
    """Where an action leads, and for each core that it moved: the process, the stimulus, what that did."""

    target: WorldState
    steps: tuple[tuple[int, Stimulus, Outcome], ...] = ()

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows of the machines that were taken, in order."""
        return tuple(row for _, _, outcome in self.steps for row in outcome.rows)


class Model:
    """The world of one scope. Not thread-safe; its tables grow with the states that are met."""

    def __init__(self, scope: Scope, deadlines: Deadlines | None = None, limits: Limits | None = None) -> None:
        self.scope = scope
        self.cast = Cast(scope)
        self.frames: list[Frame] = []
        self.writes: list[Write] = []
        self.cores = Cores(scope, self.cast, self.frames, deadlines or Deadlines(), limits or Limits())
        self._frame_numbers: dict[tuple[bytes, bool], int] = {}
        self._write_numbers: dict[tuple[int, int, int, bytes, int, bytes], int] = {}
        budget = {
            "loss": scope.losses,
            "duplicate": scope.duplicates,
            "failure": scope.failures,
            "unknown": scope.unknowns,
            "silence": scope.silences,
        }
        for process, name in enumerate(self.cast.names):
            side = 0 if process in self.cast.prefills else 1
            budget |= {f"open {name}": scope.opens[side], f"abort {name}": scope.aborts[side], f"crash {name}": scope.crashes[side]}
        self.budget_names = list(budget)
        self._budget = {name: index for index, name in enumerate(budget)}
        self.initial = self._begin(tuple(budget.values()))

    def _begin(self, budget: tuple[int, ...]) -> WorldState:
        lives = tuple(1 for _ in self.cast.names)
        cores = tuple(self.cores.start(process, 1) for process in range(len(lives)))
        state = WorldState(cores, lives, frozenset(), frozenset(), frozenset(), budget)
        if self.scope.met:  # every decode knows every prefill: the handshake as it goes when nothing is lost
            for process in self.cast.decodes:
                state = self._step(state, process, ("meet",), []).target
            while state.network:
                state = self.apply(state, ("deliver", min(state.network))).target
        return state

    # --- what may happen -------------------------------------------------------------------------------------------------

    def actions(self, state: WorldState) -> Iterator[Action]:
        """Everything that the environment may do in `state`; what changes nothing is not left out."""
        left = {name: state.budget[index] for name, index in self._budget.items()}
        timely = self.scope.deadlines == "any" or (self.scope.deadlines == "quiet" and self._is_quiet(state))
        for process, core in enumerate(state.cores):
            if core < 0:
                yield ("restart", process)
            else:
                yield from self._of_process(state, process, left, timely=timely)
        for frame in state.network:
            yield ("deliver", frame)
            if not self.frames[frame].sure:
                if left["duplicate"]:
                    yield ("repeat", frame)
                if left["loss"]:
                    yield ("lose", frame)
        for write, status in state.writes:
            yield from self._ends(state, write, status, left)

    def _of_process(self, state: WorldState, process: int, left: dict[str, int], *, timely: bool) -> Iterator[Action]:
        name, core = self.cast.names[process], state.cores[process]
        if left[f"open {name}"]:
            yield ("call", process, ("open",))
        for stimulus in self.cores.calls(core):
            kind = stimulus[0]
            if kind == "abort" and not left[f"abort {name}"]:
                continue
            if (kind == "deadline" and not timely) or (kind == "silence" and not left["silence"]):
                continue
            yield ("call", process, stimulus)
        for peer in self.cores.states[core].peers.values():
            other, life = self.cast.whose(peer.incarnation)
            if not peer.dead and (state.cores[other] < 0 or state.lives[other] != life):
                yield ("call", process, ("gone", peer.incarnation))
        if left[f"crash {name}"]:
            yield ("crash", process)

    def _is_quiet(self, state: WorldState) -> bool:
        """Whether nothing is under way and nobody can open the room any more."""
        if state.network or state.writes:
            return False
        for name, number in zip(self.cast.names, state.cores, strict=True):
            is_open = number >= 0 and ROOM in self.cores.states[number].registry.by_room
            if not is_open and state.budget[self._budget[f"open {name}"]]:
                return False
        return True

    def _ends(self, state: WorldState, write: int, status: int, left: dict[str, int]) -> Iterator[Action]:
        there = self._target_of(state, self.writes[write]) is not None
        if status == UNKNOWN:
            yield ("end", write, "settled")
        elif status == OPEN:
            if there:
                yield ("end", write, "done")
            if left["failure"] or not there:
                yield ("end", write, "failed")
            if left["unknown"]:
                yield ("end", write, "unknown")

    # --- what it does ----------------------------------------------------------------------------------------------------

    def apply(self, state: WorldState, action: Action) -> Edge:
        """Do one action. Raises Violation when a property does not hold."""
        return _APPLY[action[0]](self, state, *action[1:])

    def _call(self, state: WorldState, process: int, stimulus: Stimulus) -> Edge:
        if stimulus[0] == "timer" and stimulus[1][0] == "residual":  # that long after its death nothing of it is in the network
            _, peer, generation = stimulus[1]
            state = state._replace(writes=frozenset(w for w in state.writes if not self._is_orphan(w, peer, generation)))
        edge = self._step(state, process, stimulus, [])
        if edge.target == state:
            return edge
        kind = stimulus[0]
        if kind in ("open", "abort"):
            return self._charged(edge, f"{kind} {self.cast.names[process]}")
        return self._charged(edge, "silence") if kind == "silence" else edge

    def _is_orphan(self, write: tuple[int, int], peer: bytes, generation: int) -> bool:
        made = self.writes[write[0]]
        whose = self.cast.incarnation(made.process, made.life)
        return write[1] == ORPHAN and whose == peer and made.submit.generation == generation

    def _deliver(self, state: WorldState, frame: int) -> Edge:
        return self._hand_over(state._replace(network=state.network - {frame}), frame)

    def _repeat(self, state: WorldState, frame: int) -> Edge:
        return self._charged(self._hand_over(state, frame), "duplicate")

    def _lose(self, state: WorldState, frame: int) -> Edge:
        return self._charged(Edge(state._replace(network=state.network - {frame})), "loss")

    def _hand_over(self, state: WorldState, frame: int) -> Edge:
        target = self.frames[frame].target
        return self._step(state, target, ("frame", frame), []) if state.cores[target] >= 0 else Edge(state)

    def _crash(self, state: WorldState, process: int) -> Edge:
        """kill -9. What it had handed to the network may still land, where the data plane has such a time."""
        writes = frozenset(w for w in state.writes if self.writes[w[0]].process != process)
        if self.scope.residual:
            writes |= {(w, ORPHAN) for w, _ in state.writes if self.writes[w].process == process}
        landed = frozenset(write for write in state.landed if self.writes[write].target != process)
        gone = state._replace(cores=_with(state.cores, process, -1), writes=writes, landed=landed)
        return self._charged(Edge(gone), f"crash {self.cast.names[process]}")

    def _restart(self, state: WorldState, process: int) -> Edge:
        life = state.lives[process] + 1
        cores = _with(state.cores, process, self.cores.start(process, life))
        return Edge(state._replace(cores=cores, lives=_with(state.lives, process, life)))

    def _end(self, state: WorldState, write: int, outcome: str) -> Edge:
        made = self.writes[write]
        op = made.submit.op
        state = state._replace(writes=frozenset(w for w in state.writes if w[0] != write))
        if outcome == "unknown":
            state = state._replace(writes=state.writes | {(write, UNKNOWN)})
            return self._charged(self._step(state, made.process, ("unknown", op), []), "unknown")
        if outcome == "settled":
            return self._step(state, made.process, ("settled", op), [])
        if outcome == "done":
            if self.scope.vouches and not self._is_exposed(state, made):
                outcome = "failed"  # refused by whoever places it
            else:
                return self._placed(state, write)
        elif self._target_of(state, made) is not None:
            return self._charged(self._step(state, made.process, ("failed", op), []), "failure")
        return self._step(state, made.process, ("failed", op), [])

    def _placed(self, state: WorldState, write: int) -> Edge:
        made = self.writes[write]
        if self._is_exposed(state, made):
            state = state._replace(landed=state.landed | {write})
        if self.scope.notifies:
            data = wire.encode(self.cast.incarnation(made.process, made.life), made.submit.peer, made.submit.notice)
            state = state._replace(network=state.network | {self._frame(made.process, data, sure=True)})
        return self._step(state, made.process, ("done", made.submit.op), [])

    def _target_of(self, state: WorldState, made: Write) -> SessionCore | None:
        """The core that a write goes to, unless that life is over."""
        number = state.cores[made.target]
        return self.cores.states[number] if number >= 0 and state.lives[made.target] == made.target_life else None

    def _is_exposed(self, state: WorldState, made: Write) -> bool:
        core = self._target_of(state, made)
        room = core.registry.by_generation.get(made.submit.generation) if core is not None else None
        return room is not None and room.live

    # --- one core --------------------------------------------------------------------------------------------------------

    def _step(self, state: WorldState, process: int, stimulus: Stimulus, steps: list[tuple[int, Stimulus, Outcome]]) -> Edge:
        """Give a core a stimulus, and do what it asks for. `steps` collects what was done on the way."""
        outcome = self.cores.outcome(state.cores[process], stimulus)
        steps.append((process, stimulus, outcome))
        wrong = outcome.wrong
        if not wrong and outcome.looks_around:
            wrong = broken_around(outcome.step, self._surroundings(state, process))
        if wrong:
            raise Violation(wrong)
        state = state._replace(cores=_with(state.cores, process, outcome.core))
        follow: list[Stimulus] = []
        for effect in outcome.effects:
            match effect:
                case ev.Send(peer=peer, message=message):
                    data = wire.encode(self.cast.incarnation(process, state.lives[process]), peer, message)
                    state = state._replace(network=state.network | {self._frame(process, data, sure=False)})
                case ev.Submit():
                    state = state._replace(writes=state.writes | {(self._write(process, state.lives[process], effect), OPEN)})
                case ev.Lookup(query=query):
                    follow.append(("found", query, tuple(state.lives[prefill] for prefill in self.cast.prefills)))
                case ev.Revoke(generation=generation) if self.scope.vouches:
                    follow.append(("revoked", generation))
                case ev.Publish(generation=generation, phase=Phase.SUCCESS | Phase.FAILED):
                    state = state._replace(landed=self._landed_elsewhere(state, process, generation))
        for stimulus_ in follow:
            state = self._step(state, process, stimulus_, steps).target
        return Edge(state, tuple(steps))

    def _landed_elsewhere(self, state: WorldState, process: int, generation: int) -> frozenset[int]:
        """What has landed in rooms that are live still."""
        if process in self.cast.prefills:
            return state.landed
        return frozenset(
            w for w in state.landed if self.writes[w].target != process or self.writes[w].submit.generation != generation
        )

    def _surroundings(self, state: WorldState, process: int) -> Surroundings:
        life = state.lives[process]
        under_way = [self.writes[write] for write, _ in state.writes]

        def landed(generation: int) -> dict[bytes, tuple[set[int], int]]:
            found: dict[bytes, tuple[set[int], int]] = {}
            for write in map(self.writes.__getitem__, state.landed):
                if write.target == process and write.submit.generation == generation:
                    writer = self.cast.incarnation(write.process, write.life)
                    chunks, total = found.get(writer, (set(), 0))
                    found[writer] = (chunks | {write.submit.notice.chunk}, total or write.submit.notice.chunks_total)
            return found

        def free(peer: bytes, generation: int) -> bool:
            target, target_life = self.cast.whose(peer)
            if self.scope.vouches or state.cores[target] < 0 or state.lives[target] != target_life:
                return False
            return generation not in self.cores.states[state.cores[target]].leases

        return Surroundings(
            frozenset((write.submit.peer, write.submit.generation) for write in under_way),
            frozenset(write.submit.op for write in under_way if (write.process, write.life) == (process, life)),
            landed,
            free,
            self.scope.vouches,
        )

    def at_rest(self, state: WorldState) -> bool:
        """Whether nothing is left: no room, no memory held, nothing owed, in any process that lives."""
        for number in state.cores:
            core = self.cores.states[number] if number >= 0 else None
            if core and (core.registry.by_room or core.leases or core.links or core.ops or core.timers.repeats):
                return False
        return True

    # --- small things ----------------------------------------------------------------------------------------------------

    def _charged(self, edge: Edge, what: str) -> Edge:
        index = self._budget[what]
        budget = edge.target.budget
        return Edge(edge.target._replace(budget=_with(budget, index, budget[index] - 1)), edge.steps)

    def _frame(self, process: int, data: bytes, *, sure: bool) -> int:
        known = self._frame_numbers.get((data, sure))
        if known is None:
            source, destination, message = wire.decode(data)
            if destination == wire.NOBODY:  # a Hello that does not know whom it will meet
                raise ValueError(f"{self.cast.names[process]} sends {type(message).__name__} to nobody in particular")
            known = self._frame_numbers[data, sure] = len(self.frames)
            self.frames.append(Frame(data, source, destination, message, self.cast.whose(destination)[0], sure))
        return known

    def _write(self, process: int, life: int, submit: ev.Submit) -> int:
        packed = b"/".join(part for _, source, target in submit.copies for part in (source, target))
        key = (process, life, submit.op, submit.peer, submit.generation, packed)
        known = self._write_numbers.get(key)
        if known is None:
            known = self._write_numbers[key] = len(self.writes)
            self.writes.append(Write(process, life, submit, *self.cast.whose(submit.peer)))
        return known


_APPLY: dict[str, Callable[..., Edge]] = {
    "call": Model._call,  # noqa: SLF001 - the class's own table
    "deliver": Model._deliver,  # noqa: SLF001
    "repeat": Model._repeat,  # noqa: SLF001
    "lose": Model._lose,  # noqa: SLF001
    "crash": Model._crash,  # noqa: SLF001
    "restart": Model._restart,  # noqa: SLF001
    "end": Model._end,  # noqa: SLF001
}


def _with(values: tuple[int, ...], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
