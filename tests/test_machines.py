"""The declared machines: every cell against `transitions`, bad declarations refused, diagrams that show the table."""

from __future__ import annotations

import enum
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
from transitions import MachineError

from pd_fsm.machines import MACHINES, DefinitionError, Phase, Row, Table, diagram
from pd_fsm.machines.table import compile_machine

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"
TERMINAL = {"room": {"SUCCESS", "FAILED"}, "lease": {"QUIESCED"}, "peer": {"LOST", "REFUSED"}}

every_machine = pytest.mark.parametrize("table", MACHINES.values(), ids=MACHINES)


def valuations(table: Table) -> range:
    return range(1 << len(table.facts))


# --- the compiled table against the library that it was compiled from ------------------------------------------------------


class Subject:
    """A `transitions` model; its guards answer from a bit set of facts. `add_model` gives it state and triggers."""

    state: enum.IntEnum
    trigger: Any

    def __init__(self, table: Table, facts: int) -> None:
        for fact, bit in table.fact.items():
            setattr(self, fact, lambda holds=bool(facts & bit): holds)


def ask_transitions(table: Table, state: enum.IntEnum, event: str, facts: int) -> enum.IntEnum | None:
    """Where a real model goes, or None when it refuses the event in this state."""
    subject = Subject(table, facts)
    table.declaration.add_model(subject, initial=state)
    try:
        fired = subject.trigger(event)
    except MachineError:
        return None
    finally:
        table.declaration.remove_model(subject)
    assert fired, f"{state.name} {event}: a row exists and no guard of it held"
    return subject.state


def disagreements(table: Table) -> list[str]:
    found = []
    for state in table.states:
        for event, number in table.event.items():
            for facts in valuations(table):
                row = table.row(state, number, facts)
                compiled = None if row is None else table.states(row.target)
                real = ask_transitions(table, state, event, facts)
                if compiled is not real:
                    found.append(f"{state.name} {event} facts={facts:b}: compiled {compiled!r}, transitions {real!r}")
    return found


def mutants(table: Table) -> Iterator[tuple[str, Table]]:
    """The table with one cell wrong: each row removed, sent elsewhere, guarded the other way; a row in each late cell."""

    def changed(index: int, cell: Iterable[Row]) -> Table:
        return attrs.evolve(table, cells=(*table.cells[:index], tuple(cell), *table.cells[index + 1 :]))

    for index, cell in enumerate(table.cells):
        state, number = divmod(index, len(table.events))
        if not cell:
            extra = Row("extra", table.events[number], state, (state + 1) % len(table.states), 0, 0)
            yield f"{state} {table.events[number]} is no longer late", changed(index, [extra])
        for row in cell:
            others = [other for other in cell if other is not row]
            yield f"{row.id} removed", changed(index, others)
            elsewhere = attrs.evolve(row, target=(row.target + 1) % len(table.states))
            yield f"{row.id} elsewhere", changed(index, [*others, elsewhere])
            if row.care:
                yield f"{row.id} inverted", changed(index, [attrs.evolve(row, want=row.want ^ row.care), *others])


@every_machine
def test_every_cell_does_what_transitions_does(table: Table) -> None:
    assert disagreements(table) == []


@every_machine
def test_one_wrong_cell_is_noticed(table: Table) -> None:
    survivors = [what for what, mutant in mutants(table) if not disagreements(mutant)]
    assert survivors == []


# --- declarations that are refused -----------------------------------------------------------------------------------------


class Lamp(enum.IntEnum):
    OFF = 0
    ON = 1
    BROKEN = 2


Late = dict[tuple[str, tuple[Lamp, ...]], str]

PRESS_LIGHTS = {"trigger": "press", "source": Lamp.OFF, "dest": Lamp.ON, "conditions": ["has_power"]}
PRESS_IDLES = {"trigger": "press", "source": Lamp.OFF, "dest": None, "unless": ["has_power"]}
PRESS_DARKENS = {"trigger": "press", "source": Lamp.ON, "dest": Lamp.OFF}
SMASH = {"trigger": "smash", "source": [Lamp.OFF, Lamp.ON], "dest": Lamp.BROKEN}
LAMP_ROWS = (PRESS_LIGHTS, PRESS_IDLES, PRESS_DARKENS, SMASH)
PRESS_LATE: Late = {("press", (Lamp.BROKEN,)): "a broken lamp stays dark"}
SMASH_LATE: Late = {("smash", (Lamp.BROKEN,)): "it is broken already"}
LAMP_LATE = PRESS_LATE | SMASH_LATE


def compile_lamp(
    rows: Sequence[Mapping[str, Any]] = LAMP_ROWS,
    facts: Sequence[str] = ("has_power",),
    late: Late = LAMP_LATE,
    terminal: tuple[Lamp, ...] = (Lamp.BROKEN,),
) -> Table:
    return compile_machine("lamp", Lamp, Lamp.OFF, rows, dict.fromkeys(facts, "a fact of the lamp"), late, terminal)


def refused(why: str, **declaration: Any) -> None:
    with pytest.raises(DefinitionError, match=why):
        compile_lamp(**declaration)


def test_a_fact_named_twice_in_a_row_is_refused() -> None:
    doubled = PRESS_LIGHTS | {"conditions": ["has_power", "has_power"]}
    refused("names a fact twice", rows=(doubled, PRESS_IDLES, PRESS_DARKENS, SMASH))
    both_ways = PRESS_LIGHTS | {"unless": ["has_power"]}
    refused("names a fact twice", rows=(both_ways, PRESS_IDLES, PRESS_DARKENS, SMASH))


def test_callbacks_are_refused_because_a_table_runs_none() -> None:
    refused(r"'press' has \['after'\]", rows=(PRESS_LIGHTS | {"after": "glow"}, PRESS_IDLES, PRESS_DARKENS, SMASH))


def test_a_dead_end_that_is_not_declared_terminal_is_refused() -> None:
    refused("BROKEN is a dead end", terminal=())


def test_states_of_another_machine_are_refused() -> None:
    refused("which is no Lamp", late=PRESS_LATE | {("smash", (Phase.SUCCESS,)): "foreign"})  # type: ignore[dict-item]
    refused("which is no Lamp", rows=(*LAMP_ROWS, {"trigger": "smash", "source": Phase.FAILED, "dest": Lamp.OFF}))
    refused("which is no Lamp", rows=(*LAMP_ROWS, {"trigger": "smash", "source": Lamp.OFF, "dest": Phase.FAILED}))


def test_states_that_cannot_index_a_table_are_refused() -> None:
    sparse = enum.IntEnum("sparse", {"A": 0, "B": 2})
    with pytest.raises(DefinitionError, match=r"must be numbered 0\.\.1"):
        compile_machine("sparse", sparse, sparse["A"], (), {}, {}, ())


def test_the_declaration_that_the_next_tests_break_is_sound() -> None:
    lamp = compile_lamp()
    assert disagreements(lamp) == []
    assert [row.id for row in lamp.rows()] == [
        "lamp.press:OFF[has_power]",
        "lamp.press:OFF[!has_power]",
        "lamp.smash:OFF",
        "lamp.press:ON",
        "lamp.smash:ON",
    ]


def test_two_rows_that_can_fire_together_are_refused() -> None:
    always = {key: value for key, value in PRESS_IDLES.items() if key != "unless"}
    refused(r"OFF press: 2 rows fire .* exactly \['has_power'\]", rows=(PRESS_LIGHTS, always, PRESS_DARKENS, SMASH))


def test_a_guard_valuation_without_a_row_is_refused() -> None:
    refused(r"OFF press: 0 rows fire \[\] when exactly \[\]", rows=(PRESS_LIGHTS, PRESS_DARKENS, SMASH))


def test_a_way_out_of_a_terminal_state_is_refused() -> None:
    repair = {"trigger": "smash", "source": Lamp.BROKEN, "dest": Lamp.OFF}
    refused(r"BROKEN is terminal but has rows \['lamp.smash:BROKEN'\]", rows=(*LAMP_ROWS, repair), late=PRESS_LATE)


def test_a_state_that_cannot_be_reached_is_refused() -> None:
    refused(r"no path leads to \['BROKEN'\]", rows=(*LAMP_ROWS[:3], SMASH | {"dest": None}))


def test_a_pair_that_is_neither_a_row_nor_late_is_refused() -> None:
    refused("BROKEN press is neither a row nor late", late=SMASH_LATE)


def test_a_pair_that_is_both_a_row_and_late_is_refused() -> None:
    refused("ON press is both a row and late", late=LAMP_LATE | {("press", (Lamp.ON,)): "no"})


def test_a_wildcard_source_is_refused() -> None:
    refused(r"source '\*'", rows=(*LAMP_ROWS[:3], SMASH | {"source": "*"}), late=PRESS_LATE)


def test_an_undeclared_fact_is_refused() -> None:
    refused(r"OFF press names undeclared facts \['has_power'\]", facts=("has_bulb",))


def test_a_late_entry_for_an_unknown_event_is_refused() -> None:
    refused("late event 'kick' appears in no row", late=LAMP_LATE | {("kick", (Lamp.BROKEN,)): "no"})


def test_a_pair_that_is_listed_late_twice_is_refused() -> None:
    refused("'smash' is listed late twice", late=LAMP_LATE | {("smash", (Lamp.BROKEN, Lamp.BROKEN)): "no"})


# --- what engines, traces and the specification rely on --------------------------------------------------------------------


def test_phase_integers_are_the_public_ones() -> None:
    assert {phase.name: phase.value for phase in Phase} == {
        "FAILED": 0,
        "BOOTSTRAPPING": 1,
        "WAITING_FOR_INPUT": 2,
        "TRANSFERRING": 3,
        "SUCCESS": 4,
    }
    assert min(Phase) is Phase.FAILED, "engines take the minimum over ranks: one failed rank must decide"
    assert max(Phase) is Phase.SUCCESS, "engines take the minimum over ranks: success needs every rank"


@every_machine
def test_states_are_dense_integers(table: Table) -> None:
    assert [int(state) for state in table.states] == list(range(len(table.states))), "cells are indexed by the state"


@every_machine
def test_no_trigger_jumps_to_a_state(table: Table) -> None:
    subject = Subject(table, 0)
    table.declaration.add_model(subject)
    table.declaration.remove_model(subject)
    assert [name for name in (*dir(subject), *table.events) if name.startswith("to_")] == []


@every_machine
def test_terminal_states_absorb_every_event(table: Table) -> None:
    absorbing = {
        state.name
        for state in table.states
        if all(table.row(state, event, facts) is None for event in table.event.values() for facts in valuations(table))
    }
    assert absorbing == TERMINAL[table.name]
    for state in absorbing:
        for event, number in table.event.items():
            assert table.why_late(table.states[state], number), f"{state} {event} has no reason"


def test_row_ids_are_unique() -> None:
    ids = [row.id for table in MACHINES.values() for row in table.rows()]
    assert len(ids) == len(set(ids))


# --- diagrams --------------------------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    source: str
    target: str
    event: str
    guard: str


def declared_edges(table: Table) -> list[Edge]:
    """The rows as a diagram should show them, read from the row ids."""
    edges = []
    for row in table.rows():
        found = re.fullmatch(r"\w+\.(?P<event>\w+):(?P<source>\w+)(?:\[(?P<guards>.+)\])?", row.id)
        assert found
        guards = " & ".join(found["guards"].split(",")) if found["guards"] else ""
        edges.append(Edge(found["source"], table.states(row.target).name, found["event"], guards))
    return sorted(edges)


def labelled(source: str, target: str, words: str) -> list[Edge]:
    """`press [has_power] press [!has_power]` names two rows."""
    return [Edge(source, target, event, guard) for event, guard in re.findall(r"(\w+)(?: \[([^]]+)\])?", words)]


@every_machine
def test_mermaid_shows_every_row(table: Table) -> None:
    head, *lines = diagram.render(table.name, "mermaid").splitlines()
    assert head == "stateDiagram-v2"
    drawn = [re.fullmatch(r"  (\S+) --> (\S+): (.+)", line) for line in lines]
    assert sorted(edge for d in drawn if d for edge in labelled(d[1], d[2], d[3].replace(" |", ""))) == declared_edges(table)
    rest = {line.strip() for line, d in zip(lines, drawn, strict=True) if not d}
    assert rest == {"direction LR", f"[*] --> {table.states(table.initial).name}"} | {f"{s} --> [*]" for s in TERMINAL[table.name]}


@every_machine
def test_dot_shows_every_row(table: Table) -> None:
    text = diagram.render(table.name, "dot")
    nodes = dict(re.findall(r"^  (\w+) \[.*peripheries=(\d)\];$", text, re.MULTILINE))
    assert nodes == {state.name: "2" if state.name in TERMINAL[table.name] else "1" for state in table.states}
    drawn = re.findall(r'^  (\w+) -> (\w+) \[label="([^"]+)"', text, re.MULTILINE)
    assert sorted(edge for a, b, label in drawn for edge in labelled(a, b, label.replace(r"\n", " "))) == declared_edges(table)


class Rect(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Rect) -> bool:
        return self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom

    def touches(self, x: float, y: float) -> bool:
        return self.left - 2 <= x <= self.right + 2 and self.top - 2 <= y <= self.bottom + 2


def outer_rect(element: ET.Element) -> Rect:
    first = element.find(f"{SVG}rect")
    assert first is not None
    x, y, width, height = (float(first.attrib[key]) for key in ("x", "y", "width", "height"))
    return Rect(x, y, x + width, y + height)


def texts(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def check_picture(table: Table) -> None:
    """States, labels and what each edge connects, read back from the drawing; nothing lies over anything else."""
    root = ET.fromstring(diagram.svg(table))
    groups = {kind: [g for g in root.iter(f"{SVG}g") if kind in g.get("class", "").split()] for kind in ("state", "edge", "label")}
    states = {texts(group)[0]: outer_rect(group) for group in groups["state"]}
    assert set(states) == {state.name for state in table.states}
    drawn = []
    for group in groups["edge"]:
        path = group.find(f"{SVG}path")
        assert path is not None
        x, y, *_, end_x, end_y = map(float, re.findall(r"-?[\d.]+", path.attrib["d"]))
        (source,) = [name for name, box in states.items() if box.touches(x, y)]
        (target,) = [name for name, box in states.items() if box.touches(end_x, end_y)]
        drawn += labelled(source, target, " ".join(texts(group)))
    assert sorted(drawn) == declared_edges(table)
    labels = {" ".join(texts(group)) + f" #{number}": outer_rect(group) for number, group in enumerate(groups["label"])}
    boxes = states | labels
    assert [(a, b) for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])] == []
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    for name, box in boxes.items():
        inside = left < box.left and top < box.top and box.right < left + width and box.bottom < top + height
        assert inside, f"{name} is cut off"


@every_machine
def test_svg_shows_every_row(table: Table) -> None:
    check_picture(table)
    root = ET.fromstring(diagram.render(table.name, "svg"))
    bordered = {texts(g)[0] for g in root.iter(f"{SVG}g") if g.get("class") == "state" and len(g.findall(f"{SVG}rect")) == 2}
    assert bordered == TERMINAL[table.name]
    ids = " ".join(title.text or "" for title in root.iterfind(f"{SVG}g/{SVG}title")).split()
    assert sorted(ids) == sorted(row.id for row in table.rows())


def test_svg_keeps_edges_apart_that_no_machine_has_yet() -> None:
    """Edges that pass over a state, there and back, and over its loop."""
    jumps = (
        {"trigger": "step", "source": [Lamp.OFF, Lamp.BROKEN], "dest": Lamp.ON},
        {"trigger": "jump", "source": Lamp.OFF, "dest": Lamp.BROKEN},
        {"trigger": "step", "source": Lamp.ON, "dest": Lamp.BROKEN},
        {"trigger": "jump", "source": Lamp.BROKEN, "dest": Lamp.OFF},
        {"trigger": "jump", "source": Lamp.ON, "dest": None},
    )
    check_picture(compile_machine("jumps", Lamp, Lamp.OFF, jumps, {}, {}, ()))


@every_machine
def test_matrix_fills_every_cell(table: Table) -> None:
    text = diagram.render(table.name, "table")
    notes = dict(re.findall(r"^(\d+)\. (.+)$", text, re.MULTILINE))
    header, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert header == ["state", *table.events]
    assert [line[0].split(" ")[0] for line in lines] == [state.name for state in table.states]
    shown = []
    for state, line in zip(table.states, lines, strict=True):
        for number, cell in enumerate(line[1:]):
            if cell.startswith("late: "):
                assert notes[cell.removeprefix("late: ")] == table.why_late(state, number)
                continue
            for outcome in cell.split("; "):
                found = re.fullmatch(r"(?:stays|→ (\w+))(?: \[(.+)\])?", outcome)
                assert found, outcome
                shown.append(Edge(state.name, found[1] or state.name, table.events[number], found[2] or ""))
    assert sorted(shown) == declared_edges(table)


@every_machine
def test_page_explains_facts_reasons_and_rows(table: Table) -> None:
    page = diagram.states_page()
    section = page[page.index(f"\n## {table.name}\n") :].removeprefix("\n").split("\n## ")[0]
    assert re.findall(r"^\* `(.+)`$", section, re.MULTILINE) == [row.id for row in table.rows()]
    assert set(re.findall(r"^\d+\. (.+)$", section, re.MULTILINE)) == set(table.late.values())
    assert re.findall(r"^\* `(\w+)`: \S+", section, re.MULTILINE) == list(table.facts)
    assert diagram.mermaid(table) in section


def test_coloured_states_exist() -> None:
    assert set(diagram.FILLS) <= {state.name for table in MACHINES.values() for state in table.states}


def test_unknown_machine_or_format_names_the_choices() -> None:
    with pytest.raises(ValueError, match="no machine 'rom'; choose one of room, lease, peer"):
        diagram.render("rom", "svg")
    with pytest.raises(ValueError, match="no diagram format 'png'; choose one of mermaid, dot, svg, table"):
        diagram.render("room", "png")


# --- generated files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["docs/states.md", *(f"docs/{name}.svg" for name in MACHINES)])
def test_generated_file_is_current(path: str) -> None:
    file = ROOT / path
    current = file.is_file() and file.read_text(encoding="utf-8") == diagram.generated_files()[path]
    assert current, f"{path} is stale; run: {diagram.WRITE_COMMAND}"


def test_check_names_stale_files_and_write_mends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert diagram.main(["--write"]) == 0
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")} == set(diagram.generated_files())
    assert diagram.main(["--check"]) == 0
    Path("docs/room.svg").write_text("old", encoding="utf-8")
    Path("docs/states.md").unlink()
    assert diagram.main(["--check"]) == 1
    assert capsys.readouterr().err == f"stale: docs/states.md, docs/room.svg; run: {diagram.WRITE_COMMAND}\n"
    assert diagram.main(["--write"]) == 0
    assert diagram.main(["--check"]) == 0
