"""What a benchmark reports: rows of medians with their spread, beside what they are compared with and the goal they should meet."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs


@attrs.frozen
class Spread:
    """A median and the range that holds the middle 80 % of `count` samples."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, samples: Iterable[float]) -> Spread:
        """Of at least one sample. Raises ValueError for none."""
        ordered = sorted(samples)
        if not ordered:
            raise ValueError("a spread needs at least one sample")
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


@attrs.frozen
class Row:
    """One measured figure. `ratio` is ours / peer; with `higher_is_better` a goal is a minimum, else a maximum.

    `goal` is in `unit`, or a ratio to the peer with `goal_is_ratio`; None when the figure has no goal of its own.
    """

    name: str
    unit: str
    ours: Spread
    peer: Spread | None = None
    peer_name: str = ""
    goal: float | None = None
    goal_is_ratio: bool = False
    higher_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        return None if self.peer is None else self.ours.median / self.peer.median

    @property
    def met(self) -> bool | None:
        figure = self.ratio if self.goal_is_ratio else self.ours.median
        if self.goal is None or figure is None:
            return None
        return figure >= self.goal if self.higher_is_better else figure < self.goal

    def goal_text(self) -> str:
        if self.goal is None:
            return ""
        return f"{'>=' if self.higher_is_better else '<'} {self.goal:g}{'x' if self.goal_is_ratio else ' ' + self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "name": self.name,
            "ours": self.ours.median,
            "peer": None if self.peer is None else self.peer.median,
            "ratio": self.ratio,
            "unit": self.unit,
            "goal": self.goal_text() or None,
            "met": self.met,
            "p10": self.ours.p10,
            "p90": self.ours.p90,
            "samples": self.ours.count,
            "peer_name": self.peer_name or None,
            "peer_p10": None if self.peer is None else self.peer.p10,
            "peer_p90": None if self.peer is None else self.peer.p90,
        }


def per_call(call: Callable[[], object], calls: int, repeats: int, scale: float = 1e6) -> Spread:
    """Time of one `call()`, in microseconds unless `scale` says otherwise: `repeats` samples of `calls` calls each."""
    times = range(calls)
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in times:
            call()
        samples.append((time.perf_counter() - began) / calls * scale)
    return Spread.of(samples)


class quiet:  # noqa: N801 - reads as a statement
    """Context: the garbage collector rests, as in timeit, so that a pass over everybody's objects is not one figure's noise."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *_: object) -> None:
        gc.enable()


def table(group: str, rows: Sequence[Row]) -> str:
    """The rows for people: medians, the middle 80 % in brackets, ratio = ours / peer."""
    head = ("name", "ours", "peer", "ratio", "unit", "goal", "met")
    lines = [head] + [
        (
            row.name,
            _figure(row.ours),
            "" if row.peer is None else f"{_figure(row.peer)} {row.peer_name}",
            "" if row.ratio is None else f"{row.ratio:.3g}",
            row.unit,
            row.goal_text(),
            {None: "", True: "yes", False: "NO"}[row.met],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return f"{group}\n" + "\n".join(text)


def _figure(spread: Spread) -> str:
    return f"{spread.median:.4g} [{spread.p10:.4g} {spread.p90:.4g}]"
