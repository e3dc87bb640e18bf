"""What the demo shows while it runs, and its tables: live with rich on a terminal, else a few plain lines.

Only shows: it reads the router's objects and must never change them or decide anything. Output that cannot be written (a closed
pipe) ends the demo like any other trouble.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TextIO

import attrs

from pd_fsm.examples.engine.report import COLUMNS, NUMERIC_COLUMNS, Check
from pd_fsm.examples.engine.router import Request, Router
from pd_fsm.runtime.timeline_svg import COLOURS, short_room

if TYPE_CHECKING:
    from rich.console import RenderableType

STATUS_EVERY_S = 2.0  # plain: at most one status line in this time
REFRESH_EVERY_S = 0.1  # rich: redraw at most this often
ACTIVE_MAX = 16  # rich: rows of the table of running requests
GOOD, BAD = COLOURS["SUCCESS"], COLOURS["FAILED"]
OUTCOME_STYLES = {"finished": GOOD, "aborted": COLOURS["WAITING_FOR_INPUT"], "failed": BAD}


@attrs.frozen
class Running:
    """A request that is not done, as the display needs it."""

    number: int
    request: Request
    plan: str


class Display(Protocol):
    """Used from the demo's thread only. A context manager, because a live display must give the terminal back."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *error: object) -> None: ...
    def note(self, news: str) -> None:
        """Something worth a line of its own."""

    def update(self, router: Router, running: Sequence[Running], outcomes: Sequence[str], total: int) -> None:
        """Called on every turn of the loop with the outcomes of all requests that are done; draws only as often as is good."""

    def table(self, rows: Iterable[Sequence[str]]) -> None: ...
    def checks(self, checks: Iterable[Check]) -> None: ...


def make_display(stream: TextIO) -> Display:
    """Rich if `stream` is a terminal and rich is installed, else plain lines."""
    if not stream.isatty():
        return PlainDisplay(stream)
    try:
        import rich  # noqa: F401, PLC0415 - an optional dependency
    except ImportError:
        return PlainDisplay(stream)
    return RichDisplay(stream)


def summary(outcomes: Sequence[str], total: int) -> str:
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in ("finished", "aborted", "failed"))
    return f"{len(outcomes)}/{total} done: {counts}"


class PlainDisplay:
    """For pipes, logs and CI."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.started = clock()
        self.last_status = self.started
        self.last_text = ""

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.flush()

    def note(self, news: str) -> None:
        print(f"{self.clock() - self.started:6.1f} s  {news}", file=self.stream, flush=True)

    def update(self, router: Router, running: Sequence[Running], outcomes: Sequence[str], total: int) -> None:  # noqa: ARG002
        text = f"{summary(outcomes, total)}, {len(running)} running"
        if text != self.last_text and self.clock() - self.last_status >= STATUS_EVERY_S:
            self.last_status, self.last_text = self.clock(), text
            self.note(text)

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        lines = [COLUMNS, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
        for line in lines:
            cells = zip(COLUMNS, line, widths, strict=True)
            text = "  ".join(cell.rjust(width) if name in NUMERIC_COLUMNS else cell.ljust(width) for name, cell, width in cells)
            print(text.rstrip(), file=self.stream)

    def checks(self, checks: Iterable[Check]) -> None:
        for check in checks:
            print(f"{'OK  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}", file=self.stream)


class RichDisplay:
    """For people: news scrolls by, below it the workers, a progress bar and the running requests are redrawn in place."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console  # noqa: PLC0415 - an optional dependency
        from rich.live import Live  # noqa: PLC0415

        self.console = Console(file=stream)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.started = time.monotonic()
        self.last_drawn = 0.0

    def __enter__(self) -> RichDisplay:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def note(self, news: str) -> None:
        self.console.print(f"{time.monotonic() - self.started:6.1f} s  {news}", highlight=False, markup=False)

    def update(self, router: Router, running: Sequence[Running], outcomes: Sequence[str], total: int) -> None:
        if time.monotonic() - self.last_drawn >= REFRESH_EVERY_S or len(outcomes) == total:
            self.last_drawn = time.monotonic()
            self.live.update(self._picture(router, running, outcomes, total), refresh=True)

    def _picture(self, router: Router, running: Sequence[Running], outcomes: Sequence[str], total: int) -> RenderableType:
        from rich.console import Group  # noqa: PLC0415
        from rich.progress_bar import ProgressBar  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        workers = Text()
        for name, worker in sorted(router.workers.items(), reverse=True):
            alive = f"pid {worker.pid}" if worker.alive else "dead"
            life = f", life {worker.lives}" if worker.lives > 1 else ""
            workers.append(f" {name} ({alive}{life}) ", style="" if worker.alive else f"bold {BAD}")
        rooms = Table(box=None, pad_edge=False)
        for column in ("#", "room", "prefill", "phase", "decode", "phase", "age", "plan"):
            rooms.add_column(column, justify="right" if column in {"#", "age"} else "left", no_wrap=True)
        for entry in running[:ACTIVE_MAX]:
            request = entry.request
            phases = (request.phases.get("prefill", ""), request.phases.get("decode", ""))
            cells = [Text(phase, style=COLOURS.get(phase, "")) for phase in phases]
            age = f"{time.monotonic() - request.submitted_ms / 1000:.1f} s"
            room = short_room(request.room)
            rooms.add_row(str(entry.number), room, request.prefill, cells[0], request.decode, cells[1], age, entry.plan)
        bar = ProgressBar(total=max(total, 1), completed=len(outcomes), width=60)
        return Group(Text(), workers, bar, Text(summary(outcomes, total)), rooms)

    def table(self, rows: Iterable[Sequence[str]]) -> None:
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, pad_edge=False)
        for column in COLUMNS:
            numeric = column in NUMERIC_COLUMNS
            table.add_column(column, justify="right" if numeric else "left", no_wrap=column != "reason")
        for row in rows:
            verdict = row[COLUMNS.index("verdict")]
            table.add_row(*(Text(cell, style=OUTCOME_STYLES[verdict] if cell == verdict else "") for cell in row))
        self.console.print(table)

    def checks(self, checks: Iterable[Check]) -> None:
        from rich.text import Text  # noqa: PLC0415

        for check in checks:
            verdict = Text("OK  ", style=f"bold {GOOD}") if check.ok else Text("FAIL", style=f"bold {BAD}")
            self.console.print(Text.assemble(verdict, f"  {check.name}: {check.detail}"))
