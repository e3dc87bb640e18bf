"""Every interleaving of a small world, breadth first over real cores: safety on every edge, and that all of it can still end.

`explore` visits each state of a scope once. A property that breaks gives the shortest way there, as a story that can be saved as a
scenario file and replayed. When nothing breaks, it goes backwards from the states at rest: a state that cannot come to rest any
more, whatever happens next, is a leak (memory that never comes back, a room that nobody can end), which no look at single steps
would find.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import attrs

from pd_fsm.testing import story
from pd_fsm.testing.model import Action, Model, WorldState
from pd_fsm.testing.scopes import SCOPES, Scope
from pd_fsm.testing.story import scope_of
from pd_fsm.testing.words import action_in_words
from pd_fsm.testing.world import Violation

STATES_MAX = 5_000_000
ENDLESS = "it can always come to rest"


class TooManyStates(ValueError):  # noqa: N818 - reads as what it is
    """A world is too large to be looked at whole."""


@attrs.frozen
class Counterexample:
    """What broke, and the shortest way there: one action a line."""

    wrong: str
    actions: tuple[str, ...]


@attrs.define
class Report:
    """What an exploration found. `rows`: how often each row of the machines was taken, over pairs of core state and stimulus."""

    scope: str
    states: int
    edges: int
    core_states: int
    depth: int
    seconds: float
    rows: dict[str, int]
    counterexample: Counterexample | None = None
    expected_states: int = 0
    expected_edges: int = 0

    @property
    def ok(self) -> bool:
        """Nothing breaks, and the numbers are the pinned ones, where there are any."""
        pinned = self.expected_states, self.expected_edges
        return self.counterexample is None and (not self.expected_states or (self.states, self.edges) == pinned)


class Exploration:
    """All states of a scope: `states[i]` with the edges that lead on in `sources`, `targets`."""

    def __init__(self, scope: Scope, states_max: int = STATES_MAX) -> None:
        self.scope = scope
        self.model = Model(scope)
        self._states_max = states_max
        self.states: list[WorldState] = [self.model.initial]
        self.numbers: dict[WorldState, int] = {self.model.initial: 0}
        self.sources = array("I")
        self.targets = array("I")
        self._parent = array("I", [0])
        self._action: list[Action] = [()]
        self.depth = 0

    def run(self) -> Counterexample | None:
        """Visit everything. Returns the first thing that breaks, on a shortest way, or None."""
        model = self.model
        probed = 0
        level, following = [0], []
        while level:
            for number in level:
                state = self.states[number]
                for action in model.actions(state):
                    try:
                        target = model.apply(state, action).target
                    except Violation as violation:
                        return Counterexample(str(violation), (*self.way_to(number), action_in_words(model, action)))
                    if target == state:
                        continue
                    while self.scope.rude and probed < len(model.cores.states):
                        wrong = model.cores.breaks(probed)
                        if wrong:
                            return Counterexample(wrong, (*self.way_to(number), action_in_words(model, action)))
                        probed += 1
                    known = self.numbers.get(target)
                    if known is None:
                        known = self.numbers[target] = len(self.states)
                        self.states.append(target)
                        self._parent.append(number)
                        self._action.append(action)
                        following.append(known)
                        if known >= self._states_max:
                            raise TooManyStates(
                                f"scope {self.scope.name!r} has more than {self._states_max} states; make it smaller"
                            )
                    self.sources.append(number)
                    self.targets.append(known)
            level, following = following, []
            self.depth += bool(level)
        return self._stuck()

    def way_to(self, number: int) -> tuple[str, ...]:
        """A shortest way from the first state, in words."""
        way: list[str] = []
        while number:
            way.append(action_in_words(self.model, self._action[number]))
            number = self._parent[number]
        return tuple(reversed(way))

    def _stuck(self) -> Counterexample | None:
        """The nearest state from which the world cannot come to rest any more, if there is one."""
        can_rest = bytearray(len(self.states))
        into: list[list[int]] = [[] for _ in self.states]
        for source, target in zip(self.sources, self.targets, strict=True):
            into[target].append(source)
        ahead = [number for number, state in enumerate(self.states) if self.model.at_rest(state)]
        for number in ahead:
            can_rest[number] = 1
        while ahead:
            for source in into[ahead.pop()]:
                if not can_rest[source]:
                    can_rest[source] = 1
                    ahead.append(source)
        stuck = can_rest.find(0)
        if stuck < 0:
            return None
        return Counterexample(f"{ENDLESS}: {self._remains(self.states[stuck])}", self.way_to(stuck))

    def _remains(self, state: WorldState) -> str:
        """What no continuation clears."""
        kept = []
        for name, number in zip(self.model.cast.names, state.cores, strict=True):
            if number >= 0:
                about = self.model.cores.states[number].describe()
                kept += [f"{name} holds the memory of room {lease['room']} ({lease['state']})" for lease in about["leases"]]
                kept += [f"{name} has room {room['room']} {room['phase']}" for room in about["rooms"]]
        return "; ".join(kept) or "something is owed for ever"

    def report(self, found: Counterexample | None, seconds: float) -> Report:
        return Report(
            self.scope.name,
            len(self.states),
            len(self.sources),
            len(self.model.cores.states),
            self.depth,
            seconds,
            dict(self.model.cores.rows_taken),
            found,
            self.scope.states,
            self.scope.edges,
        )


def explore(scope: Scope) -> Report:
    """Visit every state of a scope and check every property."""
    start = time.perf_counter()
    exploration = Exploration(scope)
    found = exploration.run()
    return exploration.report(found, time.perf_counter() - start)


def explore_all(scopes: Sequence[Scope], jobs: int) -> Iterator[Report]:
    """Explore several scopes, `jobs` at a time, each in a process of its own. Reports come in the order of `scopes`."""
    if jobs == 1:
        yield from map(explore, scopes)
        return
    largest_first = sorted(scopes, key=lambda scope: -scope.states)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {scope.name: pool.submit(explore, scope) for scope in largest_first}
        for scope in scopes:
            yield waiting[scope.name].result()


# --- the command line --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """`pd-fsm check`. Returns 0 when every property holds in every state and the numbers of states are the pinned ones."""
    parser = argparse.ArgumentParser(
        prog="pd-fsm check", description="Explore every interleaving of small worlds of real session cores."
    )
    parser.add_argument("scope", nargs="*", help="a scope, and settings of it as NAME=VALUE; default: all but the long ones")
    parser.add_argument("--all", action="store_true", help="the long scopes, too")
    parser.add_argument("--list", action="store_true", help="list the scopes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="scopes at a time (default %(default)s)")
    parser.add_argument("--pin", action="store_true", help="print the numbers to pin in pd_fsm/testing/scopes.py")
    parser.add_argument("--save", type=Path, help="where to write a counterexample (default out/check/SCOPE.txt)")
    parser.add_argument("--replay", type=Path, help="tell the story of a scenario file that was saved")
    parser.add_argument("--json", type=Path, help="write the reports as JSON")
    args = parser.parse_args(argv)
    if args.list:
        for scope in SCOPES:
            print(f"{scope.name:14} {scope.states:>9,} states  {scope.about}" + (" (long)" if scope.long else ""))
        return 0
    if args.replay:
        return _replay(args.replay)
    try:
        scopes = _chosen(args.scope, everything=args.all)
    except ValueError as error:
        print(f"pd-fsm check: {error}", file=sys.stderr)
        return 2
    reports = []
    print(f"{'scope':14} {'states':>9} {'edges':>10} {'of a core':>9} {'depth':>5} {'seconds':>8}  result")
    for scope, report in zip(scopes, explore_all(scopes, args.jobs), strict=True):
        reports.append(report)
        print(_line(report), flush=True)
        if report.counterexample is not None:
            _tell(scope, report.counterexample, args.save or Path("out/check") / f"{scope.name or 'scope'}.txt")
    if args.pin:
        for report in reports:
            print(f"{report.scope}: states={report.states}, edges={report.edges}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([attrs.asdict(report) | {"ok": report.ok} for report in reports], indent=1) + "\n")
    return 0 if all(report.ok for report in reports) else 1


def _chosen(words: Sequence[str], *, everything: bool) -> list[Scope]:
    if any("=" in word for word in words):
        return [scope_of(words)]
    names = {scope.name: scope for scope in SCOPES}
    if words:
        missing = [word for word in words if word not in names]
        if missing:
            raise ValueError(f"no scope {missing[0]!r}; there are {', '.join(names)}")
        return [names[word] for word in words]
    return [scope for scope in SCOPES if everything or not scope.long]


def _line(report: Report) -> str:
    if report.counterexample is not None:
        result = "BROKEN"
    elif not report.expected_states:
        result = "holds; no numbers are pinned"
    elif report.ok:
        result = "holds"
    else:
        result = f"holds, but {report.expected_states:,} states and {report.expected_edges:,} edges are pinned"
    return (
        f"{report.scope:14} {report.states:>9,} {report.edges:>10,} {report.core_states:>9,} {report.depth:>5} "
        f"{report.seconds:>8.1f}  {result}"
    )


def _tell(scope: Scope, found: Counterexample, path: Path) -> None:
    text = story.write("F001", found.wrong, scope, found.actions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"\n{found.wrong}\nThe shortest way there, {len(found.actions)} actions:\n\n{text}\nsaved as {path}\n")


def _replay(path: Path) -> int:
    """Do what a saved schedule says, and show what happens now."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith((" ", "#"))]
    replay = story.Replay(scope_of(lines[0].split()[2:]))
    for action in lines[1:]:
        if action.startswith("expect "):
            continue
        print(action)
        try:
            for line in replay.act(action):
                print(f"  {line}")
        except Violation as violation:
            print(f"  VIOLATION {violation}")
            return 1
    print("at rest" if replay.at_rest() else "not at rest: what can happen next was not looked at")
    return 0


if __name__ == "__main__":
    sys.exit(main())
