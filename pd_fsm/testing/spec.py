"""The tie between the specification in Murphi and the code: which rows its rules name, and how its variables show the code's state.

`Viewer` turns a state of the explorer (real cores, frames, writes, what may still go wrong) into the specification's variables.
States that differ in nothing the specification speaks of (reasons, byte counts) look alike; everything else must be in the view, or
the comparison of all states and steps (`specs/check.py`) fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import attrs

from pd_fsm.core import wire
from pd_fsm.core.ledger import Link, Room
from pd_fsm.core.session import SessionCore
from pd_fsm.machines import LEASE, PEER, ROOM, Phase, Row
from pd_fsm.testing import spec_rumur
from pd_fsm.testing.cores import ROOM as ROOM_NUMBER
from pd_fsm.testing.model import OPEN, Model, WorldState
from pd_fsm.testing.scopes import Scope
from pd_fsm.testing.words import action_in_words

ROWS: Mapping[str, Row] = {row.id: row for table in (ROOM, LEASE, PEER) for row in table.rows()}
LEFT_OUT = {row.id: "the specification begins when the handshake is over, and its two processes stay" for row in PEER.rows()}
"""Rows that no rule names, with the reason."""
_KINDS = ("verdict_ack", "drained_ack", "accepted", "drained", "offer", "abort")
_PHASES = {
    Phase.FAILED: "Failed",
    Phase.BOOTSTRAPPING: "Bootstrapping",
    Phase.WAITING_FOR_INPUT: "Waiting",
    Phase.TRANSFERRING: "Transferring",
    Phase.SUCCESS: "Success",
}


# --- names -------------------------------------------------------------------------------------------------------------------


def rows_of(rule: str) -> tuple[str, ...]:
    """The row ids in a rule's name: `P.abort > room.fail:BOOTSTRAPPING + lease.conclude:PRIVATE`."""
    _, _, rows = rule.partition(" > ")
    return tuple(rows.split(" + ")) if rows else ()


def wrong_names(rules: Sequence[str]) -> list[str]:
    """What does not fit between the names of rules and the rows of the machines, both ways."""
    wrong = []
    named: set[str] = set()
    for rule in rules:
        if not re.match(r"(P|D|net|env)\.[a-z_]+( |$)", rule):
            wrong.append(f"rule {rule!r} does not say which side and what happened")
        states: dict[str, int] = {}
        for row_id in rows_of(rule):
            row = ROWS.get(row_id)
            if row is None:
                wrong.append(f"rule {rule!r} names {row_id!r}, which is no row")
                continue
            named.add(row_id)
            machine = row_id.split(".")[0]
            if states.get(machine, row.source) != row.source:
                wrong.append(f"rule {rule!r} takes {row_id!r} where the row before has led elsewhere")
            states[machine] = row.target
    wrong += [f"row {row!r} is in no rule" for row in ROWS if row not in named and row not in LEFT_OUT]
    wrong += [f"row {row!r} is left out, but a rule names it" for row in ROWS if row in named and row in LEFT_OUT]
    return wrong


# --- scopes ------------------------------------------------------------------------------------------------------------------


SMALLEST = {"P_ABORTS": 0, "D_ABORTS": 0, "DEADLINES": 1}
"""What differs in every scope from the values that the model's text has."""
ALONE: Mapping[str, Mapping[str, int]] = {
    "both-give-up": {"P_ABORTS": 1, "D_ABORTS": 1, "DEADLINES": 2, "FAILS": 1, "DOUBTS": 1},
    "prefill-dies": {"P_DEATHS": 1, "P_ABORTS": 1, "D_ABORTS": 1, "DOUBTS": 1},
    "decode-dies": {"D_DEATHS": 1, "P_ABORTS": 1, "DOUBTS": 1},
    "forgotten": {"SILENCES": 1, "D_ABORTS": 1, "LOSSES": 1},
    "lookups": {"LOOKUPS": 1, "P_ABORTS": 1, "D_ABORTS": 1},
    "planes": {"NOTIFIES": 2, "VOUCHES": 2, "CHUNKS": 2, "ANY_LAST": 1, "D_ABORTS": 1},
    "vouched": {"VOUCHES": 1, "CHUNKS": 2, "P_ABORTS": 1, "D_ABORTS": 1, "P_DEATHS": 1},
    "two-doubts": {"CHUNKS": 2, "P_ABORTS": 1, "DOUBTS": 2, "FAILS": 1},
    "two-grants": {"GENS": 2},
}
"""Scopes of the specification by itself: constants that differ from the smallest scope's."""


def why_not(scope: Scope) -> str:
    """Why the specification does not cover a scope of the explorer, empty if it does."""
    if (scope.prefills, scope.decodes) != (1, 1):
        return "it has several processes of a role"
    if any(scope.crashes) or scope.silences:
        return "a process dies or is given up"
    if scope.granted_late:
        return "decode reserves its pages late"
    if not scope.met or scope.rude or scope.residual:
        return "it begins before the handshake, or strangers speak"
    return ""


def constants(scope: Scope) -> dict[str, int]:
    """The constants of the specification that make it look at `scope`."""
    return {
        **SMALLEST,
        "LIVES": scope.opens[0],
        "GENS": scope.opens[1],
        "CHUNKS": scope.chunks,
        "P_ABORTS": scope.aborts[0],
        "D_ABORTS": scope.aborts[1],
        "FAILS": scope.failures,
        "DOUBTS": scope.unknowns,
        "LOSSES": scope.losses,
        "DUPLICATES": scope.duplicates,
        "DEADLINES": ("none", "quiet", "any").index(scope.deadlines),
        "EXPIRY": int(scope.expiry),
        "VOUCHES": int(scope.vouches),
        "NOTIFIES": int(scope.notifies),
    }


# --- views -------------------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Viewer:
    """Views of the states of one model. Keeps what it found out about each core and frame."""

    model: Model
    _cores: dict[int, int] = attrs.field(factory=dict)
    _frames: dict[int, str] = attrs.field(factory=dict)
    _fragments: dict[frozenset[str], int] = attrs.field(factory=dict)
    _texts: list[frozenset[str]] = attrs.field(factory=list)
    _ops: list[dict[int, str]] = attrs.field(factory=list)

    def key(self, state: WorldState) -> tuple[object, ...]:
        """Equal for two states exactly when their views are, and much cheaper."""
        cores = tuple(self._core(number) for number in state.cores)
        frames = frozenset(self._frame(number) for number in state.network)
        return cores, frames, self._writes(state, cores[0]), self._landed(state), state.budget

    def view(self, state: WorldState) -> frozenset[str]:
        """The specification's variables that are not false, 0, None, Gone or Private, as "name:value"."""
        sending, receiving = (self._core(number) for number in state.cores)
        left = dict(zip(self.model.budget_names, state.budget, strict=True))
        opens = self.model.scope.opens
        counted = {
            "p_opened": opens[0] - left["open P"],
            "d_opened": opens[1] - left["open D"],
            "p_aborts": left["abort P"],
            "d_aborts": left["abort D"],
            "fails": left["failure"],
            "doubts": left["unknown"],
            "losses": left["loss"],
            "duplicates": left["duplicate"],
        }
        return frozenset(
            {f"{name}:{value}" for name, value in counted.items() if value}
            | self._texts[sending]
            | self._texts[receiving]
            | {self._frame(number) for number in state.network}
            | self._writes(state, sending)
            | self._landed(state)
        )

    def _core(self, number: int) -> int:
        known = self._cores.get(number)
        if known is None:
            core = self.model.cores.states[number]
            text = frozenset(_sending(core) if core.sends else _receiving(core))
            ops = {op.id: f"p[{op.link.room.generation}].write[{op.chunk}]" for op in core.ops.values()}
            whole = text | {f"{op} {name}" for op, name in ops.items()}
            known = self._fragments.get(whole)
            if known is None:
                known = self._fragments[whole] = len(self._texts)
                self._texts.append(text)
                self._ops.append(ops)
            self._cores[number] = known
        return known

    def _frame(self, number: int) -> str:
        known = self._frames.get(number)
        if known is None:
            known = self._frames[number] = _frame(self.model.frames[number].message)
        return known

    def _writes(self, state: WorldState, sending: int) -> frozenset[str]:
        ops = self._ops[sending]
        status = {OPEN: "Busy"}
        return frozenset(f"{ops[self.model.writes[write].submit.op]}:{status.get(how, 'Doubtful')}" for write, how in state.writes)

    def _landed(self, state: WorldState) -> frozenset[str]:
        submits = [self.model.writes[write].submit for write in state.landed]
        return frozenset(f"landed[{submit.generation}][{submit.notice.chunk}]:true" for submit in submits)


def _sending(core: SessionCore) -> Iterator[str]:
    """A prefill session as `p`, `parked`, `spent` and `p_refuses`."""
    tombstone = core.registry.tombstones.get(ROOM_NUMBER)
    if tombstone is not None and tombstone.failure is not None and tombstone.unmet > 0:
        yield "p_refuses:true"
    for place, (_, _, generation) in enumerate(core.registry._early_rooms.get(ROOM_NUMBER, ()), 1):  # noqa: SLF001 - read only
        yield f"parked[{place}]:{generation}"
    for peer in core.peers.values():
        yield from (f"spent[{generation}]:true" for generation in peer.spent)
    links = {link.room.generation: link for link in core.links.values()}
    rooms = {**{number: link.room for number, link in links.items()}, **core.registry.by_generation}
    for number, room in rooms.items():
        link = links.get(number)
        yield from _room(f"p[{number}]", core, room, link)
        here = number in core.registry.by_generation
        yield from _if(here and room.readers - len(room.links) - room.refused > 0, f"p[{number}].unmet")
        if room.live or link is not None:
            yield from (f"p[{number}].chunks:{count}" for count in (len(room.chunks),) if count)
            yield from _if(room.closed, f"p[{number}].closed")
        if link is not None:
            yield f"p[{number}].gen:{link.generation}"
            yield from (f"p[{number}].confirmed[{chunk}]:true" for chunk in link.chunks_confirmed)
            yield from _if(link.told, f"p[{number}].told")
            yield from _if(link.verdict_acked, f"p[{number}].verdict_acked")
            yield from _if(link.drain_asked, f"p[{number}].drain_asked")


def _receiving(core: SessionCore) -> Iterator[str]:
    """A decode session as `d`."""
    links = {link.generation: link for link in core.links.values()}
    rooms = {**{number: link.room for number, link in links.items()}, **core.registry.by_generation}
    for number, room in rooms.items():
        link = links.get(number)
        yield from _room(f"d[{number}]", core, room, link)
        yield from _if(any(key[0] == "offer" and key[2] == number for key in core.timers.repeats), f"d[{number}].offering")
        if link is not None and room.live:
            yield from (f"d[{number}].confirmed[{chunk}]:true" for chunk in link.chunks_confirmed)
            yield from (f"d[{number}].total:{total}" for total in (link.chunks_total,) if total)


def _room(name: str, core: SessionCore, room: Room, link: Link | None) -> Iterator[str]:
    yield f"{name}.phase:{_PHASES[room.state]}"
    lease = room.lease.state.name.capitalize()
    yield from (f"{name}.lease:{state}" for state in (lease,) if state != "Private")
    yield from _if(room.generation in core.registry.by_generation, f"{name}.open")
    yield from _if(link is not None, f"{name}.linked")


def _if(holds: object, name: str) -> Iterator[str]:
    if holds:
        yield f"{name}:true"


def _frame(message: wire.Message) -> str:
    kind, generation = str(message.__struct_config__.tag), getattr(message, "generation", 0)
    if isinstance(message, wire.Verdict):
        return f"net_success[{generation}]:true" if message.success else f"net_failure[{generation}][{_bool(message.nbytes)}]:true"
    if isinstance(message, wire.Part):
        return f"net_part[{generation}][{message.chunk}][{_bool(message.chunks_total)}]:true"
    if kind not in _KINDS:
        raise ValueError(f"the specification has no {kind}")
    return f"net_{kind}[{generation}]:true"


def _bool(value: int) -> str:
    return "true" if value else "false"


NOTHING = (":false", ":0", ":None", ":Gone", ":Private")


def spoken(variables: frozenset[str]) -> frozenset[str]:
    """A state of the specification without what every view leaves out: variables that say that there is nothing."""
    return frozenset(variable for variable in variables if not variable.endswith(NOTHING))


# --- all states and steps of a scope -----------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Explored:
    """What of a scope the specification can see: all views, the shortest way to each, and, when asked for, all steps."""

    views: list[frozenset[str]] = attrs.field(factory=list)
    ways: list[tuple[int, str]] = attrs.field(factory=list)
    steps: set[tuple[int, int, tuple[str, ...]]] = attrs.field(factory=set)
    states: int = 0

    def way_to(self, number: int) -> list[str]:
        way = []
        while number:
            number, action = self.ways[number]
            way.append(action)
        return way[::-1]


def explored(scope: Scope, *, whole: bool = True) -> Explored:
    """Every state of `scope` by breadth-first search over real cores.

    With `whole`, each state of the explorer is visited and every step is kept; without, states that look alike are visited once,
    which is sound when they also act alike: that is what the comparison with `whole` shows at the smallest scopes.
    """
    model = Model(scope)
    viewer = Viewer(model)
    found = Explored()
    numbers: dict[object, int] = {}
    seen: set[object] = set()
    start = model.initial
    numbers[viewer.key(start)] = 0
    found.views.append(viewer.view(start) if whole else frozenset())
    found.ways.append((0, ""))
    level: list[tuple[WorldState, int]] = [(start, 0)]
    seen.add(start)
    while level:
        following: list[tuple[WorldState, int]] = []
        for state, number in level:
            found.states += 1
            for action in model.actions(state):
                edge = model.apply(state, action)
                target = edge.target
                if target == state:
                    continue
                key = viewer.key(target)
                known = numbers.get(key)
                fresh = known is None
                if known is None:
                    known = numbers[key] = len(found.ways)
                    found.ways.append((number, action_in_words(model, action)))
                    if whole:
                        found.views.append(viewer.view(target))
                if whole:
                    if number != known:
                        found.steps.add((number, known, edge.rows))
                    fresh = target not in seen
                    seen.add(target)
                if fresh:
                    following.append((target, known))
        level = following
    return found


@attrs.frozen
class Compared:
    """How a scope in the specification and over real cores compare; `differs` is "" if all states and steps are the same."""

    states: int
    steps: int
    differs: str


def compared(model: str, scope: Scope) -> Compared:
    """Compare all states of `scope`, and all steps with the rows that they take, in both directions."""
    code = explored(scope)
    run = spec_rumur.run(spec_rumur.with_constants(model, constants(scope)), dump=True, optimise="-O0")
    states = {name: spoken(variables) for name, variables in spec_rumur.states_of(run).items()}
    there = {variables: name for name, variables in states.items()}
    here = {variables: number for number, variables in enumerate(code.views)}
    if run.broken:
        return Compared(len(states), 0, run.broken)
    for number, view in enumerate(code.views):
        if view not in there:
            return Compared(len(states), 0, _lacking("the specification", view, there, code.way_to(number)))
    for view, name in there.items():
        if view not in here:
            return Compared(len(states), 0, _lacking("the code", view, here, _story_of(run, name)))
    spec_steps = {(states[a], states[b], rows_of(rule)) for a, b, rule in spec_rumur.steps_of(run) if a != b}
    code_steps = {(code.views[a], code.views[b], rows) for a, b, rows in code.steps}
    for whose, missing in (("the specification", code_steps - spec_steps), ("the code", spec_steps - code_steps)):
        for before, after, rows in missing:
            way = code.way_to(here[before])
            changes = f"{sorted(before - after)} to {sorted(after - before)}"
            return Compared(
                len(states), len(spec_steps), f"{whose} lacks a step with the rows {rows}: {changes}\n" + "\n".join(way)
            )
    return Compared(len(states), len(spec_steps), "")


def _lacking(whose: str, view: frozenset[str], others: Mapping[frozenset[str], object], way: Sequence[str]) -> str:
    """The first state that one side lacks, what is nearest to it there, and the way to it."""
    nearest = min(others, key=lambda other: len(other ^ view))
    return f"{whose} lacks the state with {sorted(view - nearest)} for {sorted(nearest - view)}, which is reached by\n" + "\n".join(
        way
    )


def _story_of(run: spec_rumur.Run, name: str) -> list[str]:
    """The rules on the way to a state of a dump."""
    came: dict[str, tuple[str, str]] = {}
    for before, after, rule in spec_rumur.steps_in_order(run):
        came.setdefault(after, (before, rule))
    way: list[str] = []
    seen: set[str] = set()
    while name in came and name not in seen:
        seen.add(name)
        name, rule = came[name]
        way.append(rule)
    return way[::-1]
