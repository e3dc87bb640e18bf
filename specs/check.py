"""Checks the specification, and that the code does what it says: `make spec`, or `python specs/check.py [STEP ...] [--long]`.

    names    every rule names rows of the machines, and every row has a rule
    mc       the model checker visits every state of each scope: safety, cover, liveness
    counts   the same scopes over real cores (`pd-fsm check`) have equally many states
    sets     at the smallest scope: the same states, and the same rows for the same steps
    gaps     each guard taken out must be noticed
    traces   recorded scenarios, simulations and real sessions are runs of the specification; spoilt ones are not

Prints a table, writes out/spec.json, and exits 1 if anything does not hold. What is needed and not installed is said, and fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pd_fsm.testing import spec, spec_gaps, spec_record, spec_rumur, spec_traces
from pd_fsm.testing.scopes import SCOPES, Scope

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "specs" / "handoff.m"
OUT = ROOT / "out" / "spec.json"
SEEDS = 10
SETS = "smallest"
_STORY_MAX = 40


class Table:
    """Rows as they come: step, what was looked at, how much of it, how long it took, and what is wrong ("" if nothing is)."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, step: str, about: str, size: str, seconds: float, wrong: str = "") -> None:
        self.rows.append(
            {"step": step, "about": about, "size": size, "seconds": round(seconds, 2), "ok": not wrong, "wrong": wrong}
        )
        print(f"{step:<7} {about:<58} {size:<42} {seconds:6.1f} s  {'ok' if not wrong else 'FAILED'}", flush=True)
        if wrong:
            print("        " + wrong.replace("\n", "\n        "), flush=True)

    @property
    def ok(self) -> bool:
        return all(row["ok"] for row in self.rows)


def _told(run: spec_rumur.Run) -> str:
    """A counterexample as lines to read."""
    return "\n".join([run.broken, *run.story[-_STORY_MAX:]]) if run.broken else ""


def names(model: str, table: Table, *, long: bool) -> None:  # noqa: ARG001 - all steps are called alike
    rules = spec_rumur.rule_names(model)
    rows = {row for rule in rules for row in spec.rows_of(rule)}
    wrong = spec.wrong_names(rules)
    table.add("names", "rules name rows, and rows have rules", f"{len(rules)} rules, {len(rows)} rows", 0.0, "\n".join(wrong))


def _scopes(*, long: bool) -> Iterator[Scope]:
    for scope in SCOPES:
        if not spec.why_not(scope) and (long or not scope.long):
            yield scope


def mc(model: str, table: Table, *, long: bool) -> None:
    """Model checking, and beside it the explorer's states of the same scopes."""
    shared = {scope.name: scope for scope in _scopes(long=long)}
    todo = {name: spec.constants(scope) for name, scope in shared.items()} | {
        name: {**spec.SMALLEST, **values} for name, values in spec.ALONE.items()
    }
    fired: set[str] = set()
    with ThreadPoolExecutor(2) as pool:
        runs = {name: pool.submit(spec_rumur.run, spec_rumur.with_constants(model, values)) for name, values in todo.items()}
        for name, future in runs.items():
            run = future.result()
            fired |= run.fired
            table.add("mc", name, f"{run.states:,} states", run.seconds, _told(run))
            if name in shared:
                _count(shared[name], run.states, table)
    never = sorted(set(spec_rumur.rule_names(model)) - fired)
    table.add(
        "mc", "every rule fires in some scope", f"{len(fired)} rules", 0.0, "\n".join(f"never fired: {rule}" for rule in never)
    )


def _count(scope: Scope, states: int, table: Table) -> None:
    start = time.perf_counter()
    found = len(spec.explored(scope, whole=False).ways)
    wrong = "" if found == states else f"{found} states over real cores, {states} in the specification"
    table.add("counts", f"{scope.name}: {scope.about}", f"{found:,} states over real cores", time.perf_counter() - start, wrong)


def sets(model: str, table: Table, *, long: bool) -> None:  # noqa: ARG001
    scope = next(scope for scope in SCOPES if scope.name == SETS)
    start = time.perf_counter()
    compared = spec.compared(model, scope)
    table.add(
        "sets",
        f"{scope.name}: {scope.about}",
        f"{compared.states:,} states, {compared.steps:,} steps",
        time.perf_counter() - start,
        compared.differs,
    )


def gaps(model: str, table: Table, *, long: bool) -> None:  # noqa: ARG001
    with ThreadPoolExecutor(2) as pool:
        for group, runs in zip(spec_gaps.GAPS, pool.map(lambda group: spec_gaps.check(model, *group), spec_gaps.GAPS), strict=True):
            for gap, run in zip(group[1], runs, strict=True):
                wrong = "" if run.broken else "the checker notices nothing when this guard is gone"
                table.add("gaps", gap.name, f"{run.states:,} states, story of {len(run.story)} steps", run.seconds, wrong)


def traces(model: str, table: Table, *, long: bool) -> None:
    start = time.perf_counter()
    found: dict[str, list[tuple[spec_traces.Trace, str]]] = {"scenarios": [], "simulator": [], "sessions": [], "demo": []}
    for path in sorted((ROOT / "tests" / "scenarios").glob("*.txt")):
        found["scenarios"] += spec_traces.rooms_of(path.stem, spec_traces.of_scenario(path))
    with tempfile.TemporaryDirectory(prefix="pd-fsm-spec-") as folder:
        for seed in range(1, SEEDS * (10 if long else 1) + 1):
            found["simulator"] += spec_traces.rooms_of(f"seed {seed}", spec_record.simulated(seed, Path(folder)))
        found["sessions"] += spec_traces.rooms_of("sessions", spec_record.real_sessions(Path(folder)))
    demo = sorted((ROOT / "out" / "demo").rglob("*.ndjson"))
    if demo:  # of the last `make demo`
        found["demo"] += spec_traces.rooms_of("demo", spec_traces.of_files(demo))
    print(f"        recorded in {time.perf_counter() - start:.1f} s", flush=True)
    followed = [trace for kind in found.values() for trace, why in kind if not why]
    checked = spec_traces.check(model, followed)
    for source, all_of_it in found.items():
        if not all_of_it:
            continue
        own = [trace for trace, why in all_of_it if not why]
        left_out = Counter(why for _, why in all_of_it if why)
        wrong = [f"{trace.name}: {verdict.failing}" for trace in own if not (verdict := checked.verdicts[trace.rows]).accepted]
        size = f"{len(own)} rooms, {len({trace.rows for trace in own})} different"
        table.add("traces", source, size, checked.seconds if source == "scenarios" else 0.0, "\n".join(wrong))
        for why, count in left_out.most_common():
            print(f"          {count:3} rooms left out: {why}")
    _spoilt(model, followed, table)


def _spoilt(model: str, followed: Sequence[spec_traces.Trace], table: Table) -> None:
    """What must be rejected is."""
    start = time.perf_counter()
    spoilt = spec_traces.spoilt(followed)
    checked = spec_traces.check(model, spoilt, explain=False)
    wrong = [trace.name for trace in spoilt if checked.verdicts[trace.rows].accepted]
    named = spec_traces.check(model, spoilt[:1]).verdicts[spoilt[0].rows].failing
    table.add(
        "traces",
        f"spoilt ones are rejected; the first at {named}",
        f"{len(spoilt)} spoilt",
        time.perf_counter() - start,
        "\n".join(wrong),
    )


STEPS: dict[str, Callable[..., None]] = {"names": names, "sets": sets, "mc": mc, "gaps": gaps, "traces": traces}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check the specification, and the code against it.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--long", action="store_true", help="larger scopes, more simulations")
    args = parser.parse_args(argv)
    unknown = set(args.steps) - set(STEPS)
    if unknown:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if lacking := spec_rumur.missing():
        print(f"specs/check.py: {lacking}", file=sys.stderr)
        return 2
    model, table, start = MODEL.read_text(), Table(), time.perf_counter()
    for step in args.steps or STEPS:
        STEPS[step](model, table, long=args.long)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(table.rows, indent=1) + "\n")
    held = sum(row["ok"] for row in table.rows)
    print(f"{held} of {len(table.rows)} checks hold, in {time.perf_counter() - start:.0f} s; {OUT.relative_to(ROOT)} has them all")
    return 0 if table.ok else 1


if __name__ == "__main__":
    sys.exit(main())
