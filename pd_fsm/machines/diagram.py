"""The declared machines as pictures and pages: Mermaid, DOT, SVG, a state by event matrix, and `docs/states.md`.

This module owns how a machine is shown, and nothing in what it shows is written here twice: every state, event, guard and reason
comes from the compiled table. Nothing that runs a session may import it, and only `main` touches files. The same tables always
give the same bytes, so the generated files are committed and a test compares them. From the root of the repository:

    python -m pd_fsm.machines.diagram --write    # or --check: exit status 1 and the names of the stale files
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from math import fsum, inf
from operator import mul
from pathlib import Path
from statistics import median
from xml.sax.saxutils import escape

import attrs
from transitions.extensions import GraphMachine

from pd_fsm.machines import MACHINES
from pd_fsm.machines.table import Row, Table

WRITE_COMMAND = "python -m pd_fsm.machines.diagram --write"

Edges = dict[tuple[int, int], list[Row]]

INTRODUCTION = f"""# The declared machines

Generated from `pd_fsm/machines` by `{WRITE_COMMAND}`; do not edit. A test fails when this page is stale.

Any event may come in any state, so every cell of a matrix says something. Either the machine moves to the state after the arrow,
or it *stays*: the event counts and changes no state; or the event is *late*: it came when it no longer matters and changes
nothing, for the reason in the note. Guards are facts in brackets, and `!` means that the fact must not hold. A terminal state has
no way out. A row id, as traces, coverage and the specification use it, is `machine.event:STATE[guards]`.
"""

# What a state means at a glance. Only colour: a state that is not listed is drawn as a step on the way.
STEP, GOOD, BAD, DOUBT = "#0969da", "#1a7f37", "#cf222e", "#9a6700"
NEVER = "never taken"
FILLS = {
    "SUCCESS": GOOD,
    "FAILED": BAD,
    "QUIESCED": GOOD,
    "QUARANTINED": DOUBT,
    "SUSPECT": DOUBT,
    "LOST": BAD,
    "REFUSED": BAD,
}


def render(name: str, fmt: str) -> str:
    """The machine `name` as text in one of FORMATS. Raises ValueError naming the choices when either is unknown."""
    if name not in MACHINES:
        raise ValueError(f"no machine {name!r}; choose one of {', '.join(MACHINES)}")
    if fmt not in FORMATS:
        raise ValueError(f"no diagram format {fmt!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[fmt](MACHINES[name])


def mermaid(table: Table) -> str:
    """A Mermaid state diagram, drawn by `transitions` itself from the declaration."""
    probe = type("Probe", (), {})()  # a graph machine without a model cannot draw
    GraphMachine(
        model=probe,
        states=list(table.states),
        transitions=_declared_rows(table),
        initial=table.states(table.initial),
        auto_transitions=False,
        graph_engine="mermaid",
        show_conditions=True,
    )
    drawn: list[str] = [line.strip() for line in probe.get_graph().source.splitlines()]
    # Only the edges of the drawing are kept: its title and colours would fight with the page's theme (and show the initial
    # state as the current one), every state has an edge, and a loop says "internal" by itself. It leaves out which states are
    # terminal.
    edges = [line.replace(" [internal]", "") for line in drawn if "-->" in line]
    edges += [f"{table.states(state).name} --> [*]" for state in table.terminal]
    return "\n".join(["stateDiagram-v2", "  direction LR", *(f"  {edge}" for edge in edges)]) + "\n"


def dot(table: Table) -> str:
    """A Graphviz graph; rows with the same two ends share an edge, a double border is a terminal state."""
    lines = [
        f"digraph {table.name} {{",
        "  rankdir=LR; bgcolor=transparent;",
        '  node [shape=box, style="rounded,filled", fontname="sans-serif", fontcolor=white];',
        '  edge [fontname="sans-serif", color="#7d8590", fontcolor="#7d8590"];',
        '  "" [shape=point, width=0.12, fillcolor="#7d8590", color="#7d8590"];',
    ]
    for state in table.states:
        fill = FILLS.get(state.name, STEP)
        borders = 2 if state in table.terminal else 1
        lines.append(f'  {state.name} [fillcolor="{fill}", color="{fill}", peripheries={borders}];')
    lines.append(f'  "" -> {table.states(table.initial).name};')
    for (source, target), rows in _edges(table).items():
        label = r"\n".join(_label(table, rows))
        style = ", style=dashed" if source == target else ""
        lines.append(f'  {table.states(source).name} -> {table.states(target).name} [label="{label}"{style}];')
    return "\n".join([*lines, "}"]) + "\n"


def matrix(table: Table) -> str:
    """Every state and event in a Markdown table; the reason of each late pair is a numbered note below it."""
    notes: dict[str, int] = {}
    grid = [["state", *table.events]]
    for state in table.states:
        marks = [word for word, holds in (("initial", state == table.initial), ("terminal", state in table.terminal)) if holds]
        line = [state.name + (f" ({', '.join(marks)})" if marks else "")]
        for number in range(len(table.events)):
            cell = table.cells[state * len(table.events) + number]
            if cell:
                line.append("; ".join(_outcome(table, row) for row in cell))
            else:
                why = table.late[state, number]
                line.append(f"late: {notes.setdefault(why, len(notes) + 1)}")
        grid.append(line)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in grid]
    return "\n".join([*lines, "", "Late, and harmless because:", "", *(f"{number}. {why}" for why, number in notes.items())]) + "\n"


def states_page() -> str:
    """The whole of docs/states.md."""
    parts = [INTRODUCTION]
    for name, table in MACHINES.items():
        module = sys.modules[table.states.__module__]
        purpose = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
        facts = [f"* `{fact}`: {meaning}" for fact, meaning in table.facts.items()] or ["None: no row of this machine is guarded."]
        parts += [
            f"\n## {name}\n\n{purpose}\n\n![The {name} machine]({name}.svg)\n",
            f"\n<details><summary>The same in Mermaid</summary>\n\n```mermaid\n{mermaid(table)}```\n\n</details>\n",
            "\n".join(["\n### Facts\n", *facts, ""]),
            f"\n### Every state and event\n\n{matrix(table)}",
            "\n".join(["\n### Rows\n", *(f"* `{row.id}`" for row in table.rows()), ""]),
        ]
    return "".join(parts)


def generated_files() -> dict[str, str]:
    """What --write writes: content by path, relative to the root of the repository."""
    return {"docs/states.md": states_page()} | {f"docs/{name}.svg": svg(table) for name, table in MACHINES.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 1 when --check found a stale file; 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.machines.diagram", description="Generate docs/states.md and the SVGs.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="write the files below the current directory")
    action.add_argument("--check", action="store_true", help="exit with 1 and name the files that are not current")
    if parser.parse_args(argv).write:
        for path, content in generated_files().items():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(content, encoding="utf-8")
        return 0
    stale = [
        path
        for path, text in generated_files().items()
        if not Path(path).is_file() or Path(path).read_text(encoding="utf-8") != text
    ]
    if stale:
        sys.stderr.write(f"stale: {', '.join(stale)}; run: {WRITE_COMMAND}\n")
    return 1 if stale else 0


# --- what the table says, in words ---------------------------------------------------------------------------------------


def _edges(table: Table) -> Edges:
    """Rows by (source, target): parallel rows become one edge with several labels."""
    edges: Edges = {}
    for row in table.rows():
        edges.setdefault((row.source, row.target), []).append(row)
    return edges


def _guards(table: Table, row: Row) -> str:
    names = [("" if row.want & bit else "!") + fact for fact, bit in table.fact.items() if row.care & bit]
    return f"[{' & '.join(names)}]" if names else ""


def _label(table: Table, rows: Sequence[Row], notes: Mapping[str, str] | None = None) -> list[str]:
    noted = {row.id: "" if notes is None else notes.get(row.id, NEVER) for row in rows}
    return [line for row in rows for line in (row.event, _guards(table, row), noted[row.id]) if line]


def _outcome(table: Table, row: Row) -> str:
    moved = "stays" if row.target == row.source else f"→ {table.states(row.target).name}"
    return f"{moved} {_guards(table, row)}".strip()


def _declared_rows(table: Table) -> list[dict[str, object]]:
    """The declaration's rows, read back from its `Machine`, so that any table can be drawn and not only ours."""
    return [
        {
            "trigger": event,
            "source": transition.source,
            "dest": transition.dest,
            "conditions": [guard.func for guard in transition.conditions if guard.target],
            "unless": [guard.func for guard in transition.conditions if not guard.target],
        }
        for event, declared in table.declaration.events.items()
        for transitions in declared.transitions.values()
        for transition in transitions
    ]


# --- the picture ---------------------------------------------------------------------------------------------------------
#
# Live states stand in a line in the order in which they are reached. A terminal state that only the last of them leads to ends
# the line; the others stand below, under the middle of the states that lead to them. That is all the layout these machines
# need. Text is only ever on a fill of ours and lines are mid grey, so the picture reads on a light and on a dark page.

BOX_HEIGHT = 42.0
BOX_PADDING = 15.0
LINE_PX = 16.0  # height of a line of text
LABEL_PADDING = 7.0
BORDER_GAP = 4.0  # between a terminal state and its second border
CORNER = 20.0  # no edge meets the top of a state nearer to its corner
EDGE_SHOWN = 22.0  # of a straight edge, on either side of its label
LOOP_RISE = 34.0  # of the edge of a row that stays, above its state
PASS_RISE = 120.0  # of an edge that passes over one state
PASS_MORE = 45.0  # further up for the way back, and again for each state more
DROP = 158.0  # from the line to the states below it
START_LENGTH = 30.0
MARGIN = 10.0

STYLE = """
    text { font: 500 12.5px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; text-anchor: middle; }
    .state text { fill: #ffffff; font-weight: 600; }
    .state .border { fill: none; stroke-width: 1.6px; }
    .edge path, .start path { fill: none; stroke: #7d8590; stroke-width: 1.6px; marker-end: url(#arrow); }
    .stays path { stroke-dasharray: 4 3; }
    .start circle, #arrow path { fill: #7d8590; }
    .label rect { fill: #eaeef2; }
    .label text { fill: #1f2328; }
    .label .guard { fill: #57606a; }
  """

PAINT = f"""  .never path {{ stroke: {BAD}; }}
    .label .never, .never .label text {{ fill: {BAD}; font-weight: 600; }}
  """

ARROW = """<defs>
    <marker id="arrow" viewBox="0 0 10 10" refX="9.5" refY="5"
            markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse" orient="auto">
      <path d="M 0 0.8 L 10 5 L 0 9.2 Z"/>
    </marker>
  </defs>"""

Point = tuple[float, float]
Curve = tuple[Point, Point, Point, Point]  # a cubic Bezier curve


@attrs.frozen
class _Box:
    """A rectangle by its centre."""

    x: float
    y: float
    width: float
    height: float = BOX_HEIGHT

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2


def svg(table: Table, notes: Mapping[str, str] | None = None) -> str:
    """The diagram as an SVG that stands alone and needs no Graphviz to draw. Rows with the same two ends share an edge.

    With `notes`, by row id, each row's note stands below it, and a row without one is painted as never taken.
    """
    edges = _edges(table)
    labels = {ends: _label(table, rows, notes) for ends, rows in edges.items()}
    line, below = _ranks(table, edges)
    boxes = _place(table, line, below, labels)
    start = boxes[table.initial]
    dot_x = start.left - START_LENGTH
    body = [f'<g class="start"><circle cx="{_n(dot_x)}" cy="0" r="6"/><path d="M {_n(dot_x)} 0 H {_n(start.left - 1)}"/></g>']
    drawn = [_Box(dot_x, 0, 12, 12), *boxes.values()]
    for ends, curve, at in _route(line, below, boxes, labels):
        label = _label_box(labels[ends], at, above=ends[0] == ends[1])
        body.append(_draw_edge(edges[ends], curve, labels[ends], label))
        drawn.append(label)
    for state, box in boxes.items():
        body.append(_draw_state(table.states(state).name, box, terminal=state in table.terminal))
    left, top = min(box.left for box in drawn) - MARGIN, min(box.top for box in drawn) - MARGIN
    width, height = max(box.right for box in drawn) + MARGIN - left, max(box.bottom for box in drawn) + MARGIN - top
    size = f'viewBox="{_n(left)} {_n(top)} {_n(width)} {_n(height)}" width="{_n(width)}" height="{_n(height)}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>The {escape(table.name)} machine</title>",
        f"<desc>Generated by {WRITE_COMMAND}; do not edit.</desc>",
        f"<style>{STYLE if notes is None else STYLE + PAINT}</style>",
        ARROW,
    ]
    return "\n  ".join([*head, *body]) + "\n</svg>\n"


def _ranks(table: Table, edges: Edges) -> tuple[list[int], list[int]]:
    """The states in the line and the states below it."""
    reached = [table.initial]
    for state in reached:  # grows while it is walked: breadth first, in the order of declaration
        reached += [target for source, target in edges if source == state and target not in reached]
    terminal = table.terminal
    line = [state for state in reached if state not in terminal]
    below = [state for state in reached if state in terminal]
    ends_line = [state for state in below if [source for source, target in edges if target == state] == line[-1:]][:1]
    return line + ends_line, [state for state in below if state not in ends_line]


def _place(table: Table, line: list[int], below: list[int], labels: Mapping[tuple[int, int], list[str]]) -> dict[int, _Box]:
    """Where each state stands; the box of a terminal state includes its second border."""
    rim = {state: BORDER_GAP if state in table.terminal else 0.0 for state in (*line, *below)}
    width = {state: _text_px(table.states(state).name) * 1.04 + 2 * (BOX_PADDING + rim[state]) for state in rim}  # semi-bold
    height = {state: BOX_HEIGHT + 2 * rim[state] for state in rim}
    label_px = {ends: _label_box(lines, (0, 0)).width for ends, lines in labels.items()}
    boxes: dict[int, _Box] = {line[0]: _Box(0, 0, width[line[0]], height[line[0]])}
    for before, state in pairwise(line):
        between = max(label_px.get((before, state), 0), label_px.get((state, before), 0)) + 2 * EDGE_SHOWN
        loops = (label_px.get((before, before), 0) + label_px.get((state, state), 0)) / 2 + MARGIN
        x = boxes[before].x + max((width[before] + width[state]) / 2 + between, loops)
        boxes[state] = _Box(x, 0, width[state], height[state])
    middles = {state: median(boxes[source].x for source, target in labels if target == state) for state in below}
    right = -inf
    for state in sorted(below, key=lambda state: middles[state]):
        x = max(middles[state], right + EDGE_SHOWN + width[state] / 2)
        boxes[state] = _Box(x, DROP, width[state], height[state])
        right = boxes[state].right
    return boxes


def _route(
    line: list[int], below: list[int], boxes: dict[int, _Box], edges: Collection[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Curve, Point]]:
    """Each edge with its curve and the point of the curve where the label goes."""
    for source, target in edges:
        if target in below:
            continue
        ahead = line.index(target) - line.index(source)
        if abs(ahead) == 1:
            curve = _along(boxes[source], boxes[target], ahead, bowed=(target, source) in edges)
        else:
            curve = _over(boxes[source], boxes[target], ahead)
        yield (source, target), curve, _at(curve, 0.5)
    for target in below:
        yield from _down(target, below, boxes, edges)


def _along(source: _Box, target: _Box, ahead: int, *, bowed: bool) -> Curve:
    """Between neighbours in the line; an edge and its opposite bow away from each other."""
    begin, end = (source.right, target.left - 1) if ahead > 0 else (source.left, target.right + 1)
    reach = (end - begin) / 3
    port, bow = (-7 * ahead, -22 * ahead) if bowed else (0, 0)
    return (begin, port), (begin + reach, bow), (end - reach, bow), (end, port)


def _over(source: _Box, target: _Box, ahead: int) -> Curve:
    """A loop on one state, or an arc over the states in between; back goes over forth."""
    rise = LOOP_RISE if ahead == 0 else PASS_RISE + PASS_MORE * (2 * abs(ahead) - 4 + (ahead < 0))
    spread = 20 if ahead == 0 else 0
    control = source.top - rise * 4 / 3  # a cubic curve reaches three quarters of the way to its controls
    return (
        (source.x - spread, source.top),
        (source.x - 1.5 * spread, control),
        (target.x + 1.5 * spread, control),
        (target.x + spread, target.top - 1),
    )


def _down(
    target: int, below: list[int], boxes: dict[int, _Box], edges: Collection[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Curve, Point]]:
    """Every edge to one state below: the outermost enter at its sides where the way is free, the others at its top."""
    box = boxes[target]
    sources = sorted((source for source, end in edges if end == target), key=lambda state: boxes[state].x)
    others = [boxes[state].x for state in below if state != target]
    from_left = boxes[sources[0]].x < box.left - EDGE_SHOWN and not any(x < box.x for x in others)
    from_right = boxes[sources[-1]].x > box.right + EDGE_SHOWN and not any(x > box.x for x in others)
    at_top = sources[from_left : len(sources) - from_right]
    for source in sources:
        exits = sorted((end for begin, end in edges if begin == source and end in below), key=lambda state: boxes[state].x)
        aside = (exits.index(target) - (len(exits) - 1) / 2) * boxes[source].width / (len(exits) + 0.5)
        begin = (boxes[source].x + aside, boxes[source].bottom)
        if source in at_top:
            end = (min(max(begin[0], box.left + CORNER), box.right - CORNER), box.top - 1)
            bend = (end[1] - begin[1]) * 0.5
            curve = begin, (begin[0], begin[1] + bend), (end[0], end[1] - bend), end
        else:
            side = -1 if boxes[source].x < box.x else 1
            end = (box.left - 1 if side < 0 else box.right + 1, box.y)
            curve = begin, (begin[0], end[1]), (begin[0] - side * 24, end[1]), end
        yield (source, target), curve, _at_height(curve, (begin[1] + box.top) / 2)


def _at(curve: Curve, t: float) -> Point:
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
    # `fsum` and not `sum`, which adds floats in another way since Python 3.12: the drawing must be the same everywhere.
    xs, ys = zip(*curve, strict=True)
    return fsum(map(mul, weights, xs)), fsum(map(mul, weights, ys))


def _at_height(curve: Curve, y: float) -> Point:
    """The point of a curve that only descends at the height `y`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _at(curve, middle)[1] < y else (low, middle)
    return _at(curve, low)


def _text_px(text: str) -> float:
    """A generous width of a text: fonts differ, and a label that is a little wide harms nobody."""
    return fsum(4.2 if c in "filjt.,:;!'|[] " else 9.1 if c.isupper() else 7.3 for c in text)


def _label_box(lines: Sequence[str], at: Point, *, above: bool = False) -> _Box:
    width = max(map(_text_px, lines)) + 2 * LABEL_PADDING
    height = LINE_PX * len(lines) + LABEL_PADDING
    return _Box(at[0], at[1] + LABEL_PADDING - height / 2 if above else at[1], width, height)


def _draw_edge(rows: Sequence[Row], curve: Curve, lines: Sequence[str], label: _Box) -> str:
    (x, y), *rest = curve
    path = f"M {_n(x)} {_n(y)} C " + ", ".join(f"{_n(x)} {_n(y)}" for x, y in rest)
    texts = "".join(
        f'<text x="{_n(label.x)}" y="{_n(label.top + LABEL_PADDING / 2 + LINE_PX * (number + 0.76))}"'
        + (' class="guard"' if text.startswith("[") else "")
        + f">{escape(text)}</text>"
        for number, text in enumerate(lines)
    )
    kind = "edge stays" if rows[0].source == rows[0].target else "edge"
    kind += " never" if NEVER in lines else ""
    ids = escape(" ".join(row.id for row in rows))
    return f'<g class="{kind}"><title>{ids}</title><path d="{path}"/><g class="label">{_rect(label, 5)}{texts}</g></g>'


def _draw_state(name: str, box: _Box, *, terminal: bool) -> str:
    fill = FILLS.get(name, STEP)
    border = ""
    if terminal:
        border = _rect(box, 12, f' class="border" stroke="{fill}"')
        box = _Box(box.x, box.y, box.width - 2 * BORDER_GAP, box.height - 2 * BORDER_GAP)
    paint = f' fill="{fill}"'
    text = f'<text x="{_n(box.x)}" y="{_n(box.y + 4.5)}">{escape(name)}</text>'
    return f'<g class="state">{border}{_rect(box, 9, paint)}{text}</g>'


def _rect(box: _Box, radius: float, more: str = "") -> str:
    return f'<rect x="{_n(box.left)}" y="{_n(box.top)}" width="{_n(box.width)}" height="{_n(box.height)}" rx="{_n(radius)}"{more}/>'


def _n(value: float) -> str:
    """A coordinate with at most one decimal, so that files do not differ in the noise of floating point."""
    return f"{round(value, 1) + 0:.1f}".removesuffix(".0")


FORMATS: dict[str, Callable[[Table], str]] = {"mermaid": mermaid, "dot": dot, "svg": svg, "table": matrix}

if __name__ == "__main__":
    sys.exit(main())
