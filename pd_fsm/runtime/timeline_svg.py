"""Draw the timelines of all rooms as one SVG: a row a room, a thin bar for each side's phases.

Plain text out, no external program, no clock and no randomness: the same traces give the same bytes. Colours are mid tones with a
transparent background, so that the picture reads on a white and on a dark page. Reading traces is `timeline.py`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import attrs

from pd_fsm.machines.lease import LeaseState
from pd_fsm.machines.room import Phase

if TYPE_CHECKING:
    from pd_fsm.runtime.timeline import Life, RoomTrace

COLOURS = {  # in the order of the legend
    Phase.BOOTSTRAPPING.name: "#8f9aa8",
    Phase.WAITING_FOR_INPUT.name: "#dba32c",
    Phase.TRANSFERRING.name: "#3d8bfd",
    Phase.SUCCESS.name: "#2fa866",
    Phase.FAILED.name: "#e0525c",
}
OWED_COLOUR = "#b06fd8"  # a verdict stands, but somebody may still touch the memory
TEXT_COLOUR = "#7a8490"
OWED_LEASES = (LeaseState.REVOKING.name, LeaseState.QUARANTINED.name)

ROOMS_MAX = 400  # rows drawn; a picture of more is unreadable, and the Perfetto trace holds them all
WIDTH = 1360
LEFT, RIGHT = 216, 420  # columns of labels at both sides of the plot
BAR, GAP, PAD = 6, 2, 6  # height of a bar, space between the bars of a room, space between rooms
LANE = 13  # height of a line of labels above the plot
CHAR = 5.8  # width of a character at font size 10, on the safe side; long sentences have more narrow ones
REASON_CHARS = int((RIGHT - 26) / 5.4)


def short_room(room: int) -> str:
    """The room number as pictures and tables print it: its last five digits, which is enough to find it."""
    return str(room) if room < 100_000 else f"…{room % 100_000:05d}"


@attrs.frozen
class _Row:
    """Everything of one room number, on every side and in every generation."""

    room: int
    traces: tuple[RoomTrace, ...]  # in order of opening

    @property
    def sessions(self) -> list[str]:
        """The bars of the row from top to bottom: prefill above decode."""
        keys = {(trace.role != "prefill", trace.session) for trace in self.traces}
        return [session for _, session in sorted(keys)]

    @property
    def height(self) -> int:
        return len(self.sessions) * (BAR + GAP) - GAP + PAD

    @property
    def start_ms(self) -> float:
        return self.traces[0].opened_ms


@attrs.frozen
class _Scale:
    start_ms: float
    end_ms: float

    def x(self, t_ms: float) -> float:
        share = (t_ms - self.start_ms) / (self.end_ms - self.start_ms)
        return LEFT + min(max(share, 0.0), 1.0) * (WIDTH - LEFT - RIGHT)


def draw(lives: Sequence[Life]) -> str:
    """The picture as SVG text. Empty traces give a picture that says so."""
    rows = _rows(lives)
    if not rows:
        return _document(60, ['<text class="big" x="16" y="34">No room was opened in these traces.</text>'])
    shown = rows[:ROOMS_MAX]
    end_ms = max(trace.end_ms for row in shown for trace in row.traces)
    scale = _Scale(shown[0].start_ms, max(end_ms, shown[0].start_ms + 1.0))
    marks, mark_lanes = _place_marks(lives, scale)
    top = 68 + LANE * mark_lanes
    bottom = top + sum(row.height for row in shown)
    parts = [*_header(lives, rows), *_axis(scale, top, bottom)]
    parts += _marks(marks, top, bottom)
    y = top
    for number, row in enumerate(shown):
        if number % 2 == 0:
            parts.append(f'<rect class="stripe" x="8" y="{y}" width="{WIDTH - 16}" height="{row.height}"/>')
        parts += _row(row, y, scale)
        y += row.height
    notes = _notes(lives, len(rows) - len(shown))
    parts += [f'<text x="16" y="{bottom + 42 + 14 * n}">{escape(note)}</text>' for n, note in enumerate(notes)]
    return _document(bottom + 34 + 14 * len(notes), parts)


def _rows(lives: Sequence[Life]) -> list[_Row]:
    by_room: dict[int, list[RoomTrace]] = {}
    for life in lives:
        for trace in life.rooms.values():
            by_room.setdefault(trace.room, []).append(trace)
    rows = [
        _Row(room, tuple(sorted(traces, key=lambda trace: (trace.opened_ms, trace.session, trace.generation))))
        for room, traces in by_room.items()
    ]
    return sorted(rows, key=lambda row: (row.start_ms, row.room))


def _document(height: float, parts: list[str]) -> str:
    good, bad = COLOURS[Phase.SUCCESS.name], COLOURS[Phase.FAILED.name]
    style = [
        f"text{{font:10px 'DejaVu Sans',Helvetica,Arial,sans-serif;fill:{TEXT_COLOUR}}}",
        ".big{font-size:13px;font-weight:bold}.end{text-anchor:end}.mid{text-anchor:middle}",
        f".good{{fill:{good}}}.bad{{fill:{bad}}}.owed{{fill:{OWED_COLOUR}}}",
        f".stripe{{fill:{TEXT_COLOUR};fill-opacity:.09}}.grid{{stroke:{TEXT_COLOUR};stroke-opacity:.25}}",
        f".born,.dead{{stroke:{good};stroke-width:1.2;stroke-dasharray:5 3}}.dead{{stroke:{bad}}}",
        f".down{{fill:{bad};fill-opacity:.1}}.cross{{stroke:{bad};stroke-width:1.8;stroke-linecap:round}}",
        *(f".{name}{{fill:{colour}}}" for name, colour in COLOURS.items()),
    ]
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>{"".join(style)}</style>\n{body}\n</svg>\n'


def _header(lives: Sequence[Life], rows: list[_Row]) -> Iterator[str]:
    verdicts = [_verdict(row)[0] for row in rows]
    words = ((Phase.SUCCESS.name, "succeeded"), (Phase.FAILED.name, "failed"), ("", "without a verdict"))
    counts = ", ".join(f"{verdicts.count(verdict)} {word}" for verdict, word in words if verdict in verdicts)
    yield f'<text class="big" x="16" y="24">{len(rows)} rooms: {counts}</text>'
    sessions = f"{len({life.session for life in lives})} sessions, {len(lives)} lives; prefill is the upper bar, decode the lower"
    yield f'<text class="end" x="{WIDTH - 16}" y="24">{sessions}</text>'
    x = 16.0
    for name, css in [*((name, name) for name in COLOURS), ("verdict stands, memory still owed", "owed")]:
        yield f'<rect class="{css}" x="{x:.1f}" y="38" width="18" height="8" rx="2"/>'
        yield f'<text x="{x + 23:.1f}" y="46">{escape(name)}</text>'
        x += 23 + len(name) * 6.6 + 18


def _axis(scale: _Scale, top: float, bottom: float) -> Iterator[str]:
    span_ms = scale.end_ms - scale.start_ms
    step_ms = _nice_step(span_ms / 12)
    in_seconds = span_ms >= 2000
    decimals = max(0, -math.floor(math.log10(step_ms / 1000 if in_seconds else step_ms) + 1e-9))
    for number in range(int(span_ms / step_ms + 1e-9) + 1):
        offset_ms = number * step_ms
        x = scale.x(scale.start_ms + offset_ms)
        label = f"{offset_ms / 1000 if in_seconds else offset_ms:.{decimals}f} {'s' if in_seconds else 'ms'}"
        yield f'<line class="grid" x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom + 4}"/>'
        yield f'<text class="mid" x="{x:.1f}" y="{bottom + 17}">{label}</text>'


def _nice_step(least: float) -> float:
    """The next of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


@attrs.frozen
class _Mark:
    x: float
    until: float  # the shaded stretch in which the process was down ends here; x when there is none
    text: str
    died: bool
    lane: int


def _place_marks(lives: Sequence[Life], scale: _Scale) -> tuple[list[_Mark], int]:
    """Where a process died (label left of the line) and where its next life began (label right of it).

    Labels get as many lanes above the plot as they need not to overlap; returns the marks and the number of lanes.
    """
    starts = {(life.session, life.number): scale.x(life.start_ms) for life in lives}
    wanted: list[tuple[float, float, str, bool]] = []
    for life in lives:
        next_start = starts.get((life.session, life.number + 1))
        x = scale.x(life.end_ms)
        if not life.closed:
            wanted.append(
                (x, x, f"{life.session}: trace breaks off", True)
                if next_start is None
                else (x, next_start, f"{life.session} died", True)
            )
        if next_start is not None:
            wanted.append((next_start, next_start, f"{life.session} restarted", False))
    marks: list[_Mark] = []
    lane_ends: list[float] = []
    for x, until, text, died in sorted(wanted):
        width = len(text) * CHAR + 12
        begin, end = (x - width, x) if died else (x, x + width)
        lane = next((number for number, lane_end in enumerate(lane_ends) if lane_end <= begin), len(lane_ends))
        lane_ends[lane : lane + 1] = [end]
        marks.append(_Mark(x, until, text, died, lane))
    return marks, len(lane_ends)


def _marks(marks: list[_Mark], top: float, bottom: float) -> Iterator[str]:
    for mark in marks:
        y = top - 8 - LANE * mark.lane
        line, text, offset = ("dead", "bad end", -4) if mark.died else ("born", "good", 4)
        if mark.until > mark.x:
            yield f'<rect class="down" x="{mark.x:.1f}" y="{top}" width="{mark.until - mark.x:.1f}" height="{bottom - top}"/>'
        yield f'<line class="{line}" x1="{mark.x:.1f}" y1="{y - 8}" x2="{mark.x:.1f}" y2="{bottom + 4}"/>'
        yield f'<text class="{text}" x="{mark.x + offset:.1f}" y="{y}">{escape(mark.text)}</text>'


def _row(row: _Row, y: float, scale: _Scale) -> Iterator[str]:
    middle = y + row.height / 2 + 3.5
    yield f'<text x="16" y="{middle:.1f}"><title>room {row.room}</title>{short_room(row.room)}</text>'
    yield f'<text x="76" y="{middle:.1f}">{escape(_cut(" → ".join(row.sessions), 24))}</text>'
    _, words, css = _verdict(row)
    full = f"<title>{escape(words)}</title>" if len(words) > REASON_CHARS else ""
    yield f'<text class="{css}" x="{WIDTH - RIGHT + 14}" y="{middle:.1f}">{full}{escape(_cut(words, REASON_CHARS))}</text>'
    for number, session in enumerate(row.sessions):
        bar_y = y + PAD / 2 + number * (BAR + GAP)
        for trace in row.traces:
            if trace.session == session:
                yield from _bar(trace, bar_y, scale)


def _bar(trace: RoomTrace, y: float, scale: _Scale) -> Iterator[str]:
    """Phases as a bar; what follows the verdict is a thin line, because then the room only waits to be cleared."""
    name = f"{trace.session} room {trace.room}"
    for span in trace.phase.spans:
        css = span.state if span.state in COLOURS else "stripe"
        after_verdict = span.state == trace.verdict
        tip = f"{name} generation {trace.generation}: {span.state} {span.end_ms - span.start_ms:.1f} ms"
        tip += f", {trace.reason}" if after_verdict and trace.reason else ""
        yield _rect(css, (scale.x(span.start_ms), scale.x(span.end_ms)), (y + 2, 2) if after_verdict else (y, BAR), tip)
    for span in trace.lease.spans:
        start_ms = max(span.start_ms, trace.concluded_ms)
        if span.state in OWED_LEASES and trace.verdict and span.end_ms > start_ms:
            tip = f"{name}: lease {span.state} {span.end_ms - start_ms:.1f} ms"
            yield _rect("owed", (scale.x(start_ms), scale.x(span.end_ms)), (y + 2, 2), tip)
    if trace.verdict == Phase.FAILED.name:
        x, middle = scale.x(trace.concluded_ms), y + BAR / 2
        yield f'<path class="cross" d="M{x - 2.6:.1f} {middle - 2.6:.1f}l5.2 5.2m0-5.2l-5.2 5.2"/>'


def _rect(css: str, across: tuple[float, float], down: tuple[float, float], tip: str) -> str:
    """`across` is (left, right), `down` (top, height). Never narrower than a pixel: a short state must not vanish."""
    left, right = across
    box = f'x="{left:.1f}" y="{down[0]}" width="{max(right - left, 1.0):.1f}" height="{down[1]}"'
    return f'<rect class="{css}" {box}><title>{escape(tip)}</title></rect>'


def _verdict(row: _Row) -> tuple[str, str, str]:
    """(verdict, words, css class) of a room: of its latest generations the first failure wins, because it is the cause."""
    latest = list({trace.session: trace for trace in row.traces}.values())
    failed = sorted(
        (trace for trace in latest if trace.verdict == Phase.FAILED.name), key=lambda trace: (trace.concluded_ms, trace.session)
    )
    if failed:
        first = failed[0]
        return first.verdict, f"{first.session}: {first.reason or 'no reason given'}", "bad"
    if all(trace.verdict == Phase.SUCCESS.name for trace in latest):
        return Phase.SUCCESS.name, f"{_bytes(max(trace.bytes for trace in latest))} in {_duration(row)}", ""
    return "", "no verdict in the traces", ""


def _duration(row: _Row) -> str:
    return f"{max(trace.concluded_ms for trace in row.traces) - row.start_ms:.0f} ms"


def _bytes(count: int) -> str:
    if count < 1024:
        return f"{count} B"
    return f"{count / 1024:.0f} KiB" if count < 1024 * 1024 else f"{count / 1024 / 1024:.1f} MiB"


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _notes(lives: Sequence[Life], hidden: int) -> list[str]:
    notes = [f"{life.title}: {life.torn} torn line skipped (killed while it was writing)" for life in lives if life.torn]
    if hidden:
        notes.append(f"{hidden} more rooms are not drawn; the Perfetto trace holds them all")
    return notes
