"""Compile a machine declared with `transitions` into a flat table, and refuse a bad declaration.

`transitions` is the authority: it expands list sources, `unless` and internal rows, and it draws the diagrams. One trigger of it
costs 4 to 8 us and 5 KB a model, though, so what runs is a table with one cell for each (state, event): a tuple of rows, each a
bit mask over named facts. A test drives real `transitions` models through every cell and compares.

This module must never assign a state: it answers what would happen, and the core's single `move` does it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
from transitions import Machine

StateT = TypeVar("StateT", bound=enum.IntEnum)


class DefinitionError(Exception):
    """A declared machine is contradictory or incomplete. Raised at import, so it can never reach production."""


@attrs.frozen
class Row:
    """One guarded transition.

    `care` is the mask of facts that the row looks at and `want` the values it asks of them, both bit sets over
    `Table.facts`; the row fires when `facts & care == want`. `target == source` is an internal row (Stayed).
    """

    id: str
    event: str
    source: int
    target: int
    care: int
    want: int


@attrs.frozen
class Table:
    """A compiled machine. Immutable, shared by every subject of its kind, safe to use from any thread.

    `cells[state * width + event]` holds the rows of that pair. States are the integers of `states`; events and
    facts are numbered in order of declaration (`event["start"]`, `fact["all_confirmed"]`). `facts` says what each fact means.
    """

    name: str
    states: type[enum.IntEnum]
    initial: int
    terminal: tuple[int, ...]
    events: tuple[str, ...]
    facts: Mapping[str, str]
    width: int
    cells: tuple[tuple[Row, ...], ...]
    late: Mapping[tuple[int, int], str]
    event: Mapping[str, int]
    fact: Mapping[str, int]
    declaration: Machine = attrs.field(repr=False)

    def row(self, state: int, event: int, facts: int = 0) -> Row | None:
        """The row that fires, or None when there is none: then `why_late` tells noise from a mistake."""
        for row in self.cells[state * self.width + event]:
            if facts & row.care == row.want:
                return row
        return None

    def why_late(self, state: int, event: int) -> str | None:
        """Why `event` is harmless in `state`, or None when the pair is neither a row nor late."""
        return self.late.get((state, event))

    def rows(self) -> list[Row]:
        return [row for cell in self.cells for row in cell]


def compile_machine(
    name: str,
    states: type[StateT],
    initial: StateT,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    late: Mapping[tuple[str, tuple[StateT, ...]], str],
    terminal: Iterable[StateT],
) -> Table:
    """Declare `rows` as a `transitions.Machine`, flatten it and check it.

    `facts` maps each fact to its meaning, `late` (event, states) to a reason. `terminal` are exactly the states without a way
    out. Raises DefinitionError with the offending pair when two rows can fire together, a guard valuation has no row, a terminal
    state has a way out or another one has none, a state cannot be reached, or a (state, event) pair is neither a row nor late;
    and for whatever of a declaration the table would not carry, such as callbacks.
    """
    if sorted(states) != list(range(len(states))):
        raise DefinitionError(f"{name}: states must be numbered 0..{len(states) - 1}, they index the table; got {sorted(states)}")
    for row in rows:
        _check_row(name, states, row)
    machine = Machine(
        model=None,
        states=list(states),
        transitions=[dict(row) for row in rows],
        initial=initial,
        auto_transitions=False,  # the default adds to_<STATE>() triggers, which would resurrect a failed room
        send_event=False,
    )
    events = tuple(machine.events)
    fact_bit = {fact: 1 << index for index, fact in enumerate(facts)}
    event_number = {event: index for index, event in enumerate(events)}
    cells: list[tuple[Row, ...]] = [()] * (len(states) * len(events))
    for event in events:
        for source_name, transitions in machine.events[event].transitions.items():
            source = states[source_name]
            cell = []
            for transition in transitions:
                guards = [(str(c.func), c.target) for c in transition.conditions]
                unknown = [fact for fact, _ in guards if fact not in fact_bit]
                if unknown:
                    raise DefinitionError(f"{name}: row {source_name} {event} names undeclared facts {unknown}")
                if len({fact for fact, _ in guards}) != len(guards):
                    raise DefinitionError(f"{name}: row {source_name} {event} names a fact twice: {[fact for fact, _ in guards]}")
                care = sum(fact_bit[fact] for fact, _ in guards)
                want = sum(fact_bit[fact] for fact, wanted in guards if wanted)
                target = source if transition.dest is None else states[transition.dest]
                row_id = _row_id(name, event, source, care, want, fact_bit)
                cell.append(Row(row_id, event, source, target, care, want))
            cells[source * len(events) + event_number[event]] = tuple(cell)
    table = Table(
        name=name,
        states=states,
        initial=initial,
        terminal=tuple(terminal),
        events=events,
        facts=dict(facts),
        width=len(events),
        cells=tuple(cells),
        late=_expand_late(name, states, late, event_number),
        event=event_number,
        fact=fact_bit,
        declaration=machine,
    )
    check_definition(table)
    return table


def check_definition(table: Table) -> None:
    """Refuse what `transitions` accepts silently. Raises DefinitionError naming the state and the event."""
    for state in table.states:
        for number, event in enumerate(table.events):
            _check_cell(table, state, number, event)
    for state in table.states:
        rows = [row.id for row in table.rows() if row.source == state]
        if rows and state in table.terminal:
            raise DefinitionError(f"{table.name}: {state.name} is terminal but has rows {rows}")
        if not rows and state not in table.terminal:
            raise DefinitionError(f"{table.name}: {state.name} is a dead end but is not declared terminal")
    reached = {table.initial}
    frontier = [table.initial]
    while frontier:
        at = frontier.pop()
        fresh = {row.target for row in table.rows() if row.source == at} - reached
        reached |= fresh
        frontier += fresh
    if reached != set(table.states):
        missing = [state.name for state in table.states if state not in reached]
        raise DefinitionError(f"{table.name}: no path leads to {missing}")


def _check_cell(table: Table, state: enum.IntEnum, number: int, event: str) -> None:
    where = f"{table.name}: {state.name} {event}"
    cell = table.cells[state * len(table.events) + number]
    late = table.why_late(state, number)
    if cell and late:
        raise DefinitionError(f"{where} is both a row and late ({late})")
    if not cell and not late:
        raise DefinitionError(f"{where} is neither a row nor late")
    if not cell:
        return
    for facts in range(1 << len(table.facts)):
        firing = [row.id for row in cell if facts & row.care == row.want]
        if len(firing) != 1:
            holding = [fact for fact, bit in table.fact.items() if facts & bit]
            raise DefinitionError(f"{where}: {len(firing)} rows fire {firing} when exactly {holding} hold")


def _check_row(name: str, states: type[enum.IntEnum], row: Mapping[str, Any]) -> None:
    """Refuse what `transitions` would accept and the table would drop, or include silently."""
    extra = set(row) - {"trigger", "source", "dest", "conditions", "unless"}
    if extra:
        raise DefinitionError(f"{name}: row {row['trigger']!r} has {sorted(extra)}; a table runs no callbacks")
    if row["source"] == "*":
        raise DefinitionError(f"{name}: source '*' would include the terminal states; list the sources")
    sources = row["source"] if isinstance(row["source"], list) else [row["source"]]
    for state in (*sources, row["dest"]):
        if state is not None and not isinstance(state, states):
            raise DefinitionError(f"{name}: row {row['trigger']!r} names {state!r}, which is no {states.__name__}")


def _expand_late(
    name: str, kind: type[StateT], late: Mapping[tuple[str, tuple[StateT, ...]], str], event_number: Mapping[str, int]
) -> dict[tuple[int, int], str]:
    expanded: dict[tuple[int, int], str] = {}
    for (event, states), why in late.items():
        if event not in event_number:
            raise DefinitionError(f"{name}: late event {event!r} appears in no row")
        for state in states:
            if not isinstance(state, kind):
                raise DefinitionError(f"{name}: late event {event!r} is listed for {state!r}, which is no {kind.__name__}")
            pair = (int(state), event_number[event])
            if pair in expanded:
                raise DefinitionError(f"{name}: {event!r} is listed late twice in state {state!r}")
            expanded[pair] = why
    return expanded


def _row_id(name: str, event: str, source: enum.IntEnum, care: int, want: int, fact_bit: Mapping[str, int]) -> str:
    """`room.part_settled:TRANSFERRING[all_confirmed]`: unique, and readable in traces, coverage and the spec."""
    guards = [("" if want & bit else "!") + fact for fact, bit in fact_bit.items() if care & bit]
    return f"{name}.{event}:{source.name}" + (f"[{','.join(guards)}]" if guards else "")
