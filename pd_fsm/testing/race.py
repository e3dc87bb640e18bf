"""`pd-fsm race --sim`: run seeds of the simulator, and tell of a failing one what repeats it, and as a short story what happened.

A failing seed is run twice: a hash that differs means that the simulation itself is not deterministic, which is a failure, too.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import msgspec

from pd_fsm.testing.minimise import minimise
from pd_fsm.testing.sim_options import Options
from pd_fsm.testing.sim_schedule import Schedule, draw_schedule
from pd_fsm.testing.simulator import Result, replay, simulate

STORY_LINES_MAX = 120
FAILURES_SHOWN_MAX = 5
_QUIET = (" Ping", " Pong")  # of the story: they say only that time passes


@attrs.define
class Report:
    """All runs of one call. `coverage` counts the rows taken, by row id."""

    seeds: int = 0
    events: int = 0
    rooms: int = 0
    seconds: float = 0.0
    virtual_s: float = 0.0
    failures: list[dict[str, Any]] = attrs.field(factory=list)
    coverage: Counter[str] = attrs.field(factory=Counter)
    counts: Counter[str] = attrs.field(factory=Counter)
    outcomes: Counter[str] = attrs.field(factory=Counter)

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.events += result.events
        self.rooms += result.rooms
        self.virtual_s += result.virtual_ms / 1e3
        self.coverage += result.coverage
        self.counts += result.counts
        self.outcomes += result.outcomes
        if result.failure:
            self.failures.append({"seed": result.seed, "failure": result.failure, "repeat": command(result.seed)})


def command(seed: int) -> str:
    """What repeats a seed."""
    return f"pd-fsm race --sim --seed {seed}"


def run_twice_if_it_fails(seed: int, traces: Path | None = None) -> Result:
    """One seed. A failure that a second run does not repeat to the last event is one of the simulation."""
    result = simulate(seed, trace_path=None if traces is None else traces / f"{seed}.ndjson")
    if result.failure:
        again = simulate(seed)
        if again.digest != result.digest:
            second = (
                f"the second run has the hash {again.digest} and not {result.digest}, and ended with: {again.failure or 'nothing'}"
            )
            result.failure = f"not deterministic: {second}; the first with: {result.failure}"
    return result


def run_seeds(seeds: Iterable[int], jobs: int = 1, traces: Path | None = None) -> Report:
    """Run each seed, in `jobs` processes. For callers that want the figures or the coverage. `traces` is a folder for a trace of
    each seed, `SEED.ndjson`: its lines are in the true order, over all sessions, whatever their clocks say."""
    report, begun_s = Report(), time.monotonic()
    run = functools.partial(run_twice_if_it_fails, traces=traces)
    if jobs > 1:
        with ProcessPoolExecutor(jobs) as pool:
            for result in pool.map(run, seeds, chunksize=8):
                report.add(result)
    else:
        for result in map(run, seeds):
            report.add(result)
    report.seconds = time.monotonic() - begun_s
    return report


def story(schedule: Schedule, result: Result) -> list[str]:
    """A run as lines to read: the world, what was done to it, what the network and the data plane did, and what happened."""
    nothing = Options()
    differs = {name: getattr(schedule.options, name) for name in Options.__struct_fields__}
    world = ", ".join(f"{name}={value}" for name, value in differs.items() if value != getattr(nothing, name))
    lines = [f"seed {schedule.seed}: {world}", f"what is done ({len(schedule.acts)}):"]
    lines += [f"  {act.at_ms:10.2f} {act}" for act in schedule.acts]
    lines.append(f"what the network and the data plane do ({len(result.fates)}):")
    lines += [f"  {key}: {fate}" for key, fate in itertools.islice(result.fates.items(), STORY_LINES_MAX)]
    told = [line for line in result.story if not any(word in line for word in _QUIET)]
    lines.append("what happens:")
    if len(told) > STORY_LINES_MAX:
        lines.append(f"  ... {len(told) - STORY_LINES_MAX} lines")
    lines += [f"  {line}" for line in told[-STORY_LINES_MAX:]]
    return lines


def _explain(seed: int, *, shorten: bool, save: Path | None) -> int:
    """Run one seed, twice if it fails, and tell its story. Returns the exit status."""
    schedule = draw_schedule(seed)
    result = replay(schedule, story=True)
    figures = f"{result.events} events, {result.rooms} rooms, {result.virtual_ms / 1e3:.1f} s of their time"
    print(f"seed {seed}: hash {result.digest}, {figures}")
    if not result.failure:
        print("held")
        return 0
    print(f"FAILED {result.failure}")
    again = simulate(seed)
    if again.digest != result.digest:
        print(f"not deterministic: the second run has the hash {again.digest} and ended with {again.failure or 'no failure'}")
        return 1
    if shorten:
        schedule, runs = minimise(schedule, result)
        result = replay(schedule, story=True)
        print(f"minimised in {runs} runs to {len(schedule.acts)} actions and {len(schedule.fates or {})} fates: {result.failure}")
    print("\n".join(story(schedule, result)))
    if save is not None:
        save.write_bytes(msgspec.json.format(msgspec.json.encode(schedule)))
        print(f"wrote the schedule to {save}; repeat it with: pd-fsm race --sim --schedule {save}")
    print(f"repeat: {command(seed)}{' --minimise' if shorten else ''}")
    return 1


def _replay_file(path: Path) -> int:
    schedule = msgspec.json.decode(path.read_bytes(), type=Schedule)
    result = replay(schedule, story=True)
    print("\n".join(story(schedule, result)))
    print(f"hash {result.digest}: {'FAILED ' + result.failure if result.failure else 'held'}")
    return int(bool(result.failure))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pd-fsm race", description="Look for races of the session layer.")
    parser.add_argument("--sim", action="store_true", required=True, help="simulate real sessions under faults and a virtual clock")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=int, default=100, metavar="N", help="how many seeds to run (default %(default)s)")
    what.add_argument("--seed", type=int, metavar="S", help="run one seed, and tell what happened if it fails")
    what.add_argument("--schedule", type=Path, metavar="FILE", help="replay a schedule that --save wrote")
    parser.add_argument("--first", type=int, default=0, metavar="S", help="the first seed of --seeds (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that run seeds (default %(default)s)")
    parser.add_argument("--minimise", action="store_true", help="shrink a failing seed to a short schedule (up to a minute)")
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="with --seed: write the failing, maybe minimised schedule as JSON"
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help="with --seed: append every step of every session as NDJSON")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="with --seeds: a trace of each seed, in files of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --seeds: write the figures, the failures and the coverage")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if everything held, 1 if something failed."""
    args = _parser().parse_args(argv)
    if args.schedule is not None:
        return _replay_file(args.schedule)
    if args.seed is not None:
        if args.trace is not None:
            simulate(args.seed, trace_path=args.trace)
        return _explain(args.seed, shorten=args.minimise, save=args.save)
    report = run_seeds(range(args.first, args.first + args.seeds), args.jobs, args.traces)
    for failure in report.failures[:FAILURES_SHOWN_MAX]:
        print(f"seed {failure['seed']} FAILED {failure['failure']}\n  {failure['repeat']} --minimise", file=sys.stderr)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(attrs.asdict(report), indent=1, sort_keys=True) + "\n")
    ended = ", ".join(f"{count} {how}" for how, count in report.outcomes.most_common())
    print(
        f"{report.seeds} seeds, {report.events} events, {report.rooms} rooms, {report.virtual_s:.0f} s of their time in "
        f"{report.seconds:.1f} s: {len(report.failures)} failed\nrooms ended with {ended}"
    )
    if report.failures and args.minimise:
        _explain(report.failures[0]["seed"], shorten=True, save=args.save)
    return int(bool(report.failures))
