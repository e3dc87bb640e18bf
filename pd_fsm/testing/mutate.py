"""Mutants of the declared machines, and who notices.

Each mutant is one change of a compiled table: a row dropped, a guard dropped or negated, a target changed, an empty cell filled.
The definition check and the comparison with `transitions` notice nearly all of them, because the table is no longer what was
declared; that says nothing about the properties. So every mutant must also be killed without a look at the declaration, by what
a machine must never do, by a scenario or by the explorer, or be listed in `SURVIVORS` with the reason why nothing can tell it from
the original. A listed mutant that is killed after all is an error, too: the list stays true.

The core looks at the phase before it asks the table in many places, so a filled cell that nobody asks is out of reach of scenarios
and explorer. Which cells are asked is measured; only the properties of the machine itself, under every event in every state, can
kill those mutants.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from pd_fsm.core import peers, receiver, sender
from pd_fsm.core import session as core
from pd_fsm.machines import MACHINES
from pd_fsm.machines.table import DefinitionError, Row, Table, check_definition
from pd_fsm.testing import explore, machine_properties, scenario
from pd_fsm.testing.scopes import SCOPES, Scope

_HOLDERS = (core, peers, receiver, sender)
"""Modules of the core that hold a table by its name."""

_IN_ORDER = "rows of a cell are looked at in order, and the row before this one takes all that its guard excludes"
SURVIVORS: dict[str, str] = {
    "room.peer_ready:BOOTSTRAPPING[!all_peers_known] without all_peers_known": _IN_ORDER,
    "room.part_settled:TRANSFERRING[!all_confirmed] without all_confirmed": _IN_ORDER,
    "lease.conclude:EXPOSED[!no_holder] without no_holder": _IN_ORDER,
    "lease.settled:REVOKING[!no_holder] without no_holder": _IN_ORDER,
    "lease.settled:QUARANTINED[!no_holder] without no_holder": _IN_ORDER,
}
"""Mutants that no behaviour can tell from the original, with the reason."""


@attrs.frozen
class Mutant:
    """A changed table. `name` says which machine, which cell, and what was changed."""

    name: str
    table: Table
    cell: int


def mutants(table: Table) -> Iterator[Mutant]:
    """Every single change of `table`."""
    for cell, rows in enumerate(table.cells):
        state, event = divmod(cell, table.width)
        where = f"{table.name}.{table.events[event]}:{table.states(state).name}"
        if not rows:
            for target in table.states:
                fresh = Row(f"{where} filled", table.events[event], state, target, 0, 0)
                yield Mutant(f"{where} filled -> {target.name}", _with(table, cell, (fresh,)), cell)
        for index, row in enumerate(rows):
            others = rows[:index], rows[index + 1 :]
            yield Mutant(f"{row.id} dropped", _with(table, cell, others[0] + others[1]), cell)
            for target in table.states:
                if target != row.target:
                    changed = attrs.evolve(row, target=target)
                    yield Mutant(f"{row.id} -> {target.name}", _with(table, cell, (*others[0], changed, *others[1])), cell)
            for fact, bit in table.fact.items():
                if row.care & bit:
                    free = attrs.evolve(row, care=row.care & ~bit, want=row.want & ~bit)
                    negated = attrs.evolve(row, want=row.want ^ bit)
                    yield Mutant(f"{row.id} without {fact}", _with(table, cell, (*others[0], free, *others[1])), cell)
                    yield Mutant(f"{row.id} with {fact} negated", _with(table, cell, (*others[0], negated, *others[1])), cell)


def _with(table: Table, cell: int, rows: tuple[Row, ...]) -> Table:
    cells = (*table.cells[:cell], rows, *table.cells[cell + 1 :])
    return attrs.evolve(table, cells=cells)


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The core runs on the mutant instead of the machine that it was made of."""
    name = mutant.table.name.upper()
    original = MACHINES[mutant.table.name]
    holders = [module for module in _HOLDERS if getattr(module, name, None) is original]
    for module in holders:
        setattr(module, name, mutant.table)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, name, original)


# --- who notices -------------------------------------------------------------------------------------------------------------


def by_definition(mutant: Mutant) -> str:
    """What the check at import says."""
    try:
        check_definition(mutant.table)
    except DefinitionError as error:
        return str(error)
    return ""


def by_declaration(mutant: Mutant) -> str:
    """Whether the table differs from what `transitions` was told. The tests compare each cell with real models."""
    original = MACHINES[mutant.table.name]
    return "" if mutant.table.cells == original.cells else "a cell differs from the declaration"


def by_machine(mutant: Mutant) -> str:
    """What the machine must never do, under every event in every state."""
    return machine_properties.broken(mutant.table)


def by_scenarios(files: Sequence[Path]) -> Callable[[Mutant], str]:
    """A scenario fails, be it an expectation, the story, or an assertion of the core."""

    def run(mutant: Mutant) -> str:
        with planted(mutant):
            for path in files:
                try:
                    scenario.run(path)
                except Exception as error:  # noqa: BLE001 - whatever it is, the mutant was noticed
                    return f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return ""

    return run


def by_explorer(scopes: Sequence[Scope]) -> Callable[[Mutant], str]:
    """A property breaks in a small world, or the world has another number of states."""

    def run(mutant: Mutant) -> str:
        with planted(mutant):
            for scope in scopes:
                exploration = explore.Exploration(scope, states_max=2 * scope.states)
                try:
                    found = exploration.run()
                except explore.TooManyStates:
                    return f"{scope.name}: more than twice as many states"
                if found is not None:
                    return f"{scope.name}: {found.wrong}"
                if len(exploration.states) != scope.states:
                    return f"{scope.name}: {len(exploration.states)} states instead of {scope.states}"
        return ""

    return run


def asked_cells(files: Sequence[Path], scopes: Sequence[Scope]) -> set[tuple[str, int]]:
    """The cells that the core asks in any scenario or small world, as (machine, cell). Of an unchanged core."""
    asked: set[tuple[str, int]] = set()
    real = core.SessionCore.move

    def move(session: Any, table: Table, subject: Any, event: int, *args: Any, **options: Any) -> Row | None:
        asked.add((table.name, subject.state * table.width + event))
        return real(session, table, subject, event, *args, **options)

    core.SessionCore.move = move  # type: ignore[method-assign, assignment]
    try:
        for path in files:
            scenario.run(path)
        for scope in scopes:
            explore.explore(scope)
    finally:
        core.SessionCore.move = real  # type: ignore[method-assign]
    return asked


@attrs.frozen
class Verdict:
    """One mutant and what each killer said of it: "" of those that saw nothing, None of those that were not asked because the core
    never asks the cell (`asked`)."""

    mutant: str
    static: dict[str, str]
    behaviour: dict[str, str | None]
    reason: str
    asked: bool

    @property
    def killed(self) -> bool:
        return any(self.behaviour.values())

    @property
    def ok(self) -> bool:
        return self.killed != bool(self.reason)


def judge(mutant: Mutant, killers: dict[str, Callable[[Mutant], str]], *, asked: bool) -> Verdict:
    """Ask everybody. Killers that run the core are asked only about cells that it asks."""
    static = {"definition": by_definition(mutant), "declaration": by_declaration(mutant)}
    behaviour: dict[str, str | None] = {"machine": by_machine(mutant), **dict.fromkeys(killers)}
    for name, killer in killers.items() if asked else ():
        behaviour[name] = killer(mutant)
    return Verdict(mutant.name, static, behaviour, SURVIVORS.get(mutant.name, ""), asked)


# --- the command line --------------------------------------------------------------------------------------------------------

QUICK_SCOPES = ("grant", "duplicates", "crash")
"""Between them the core asks all that it ever asks; small ones first, for the mutants that any of them kills."""


def main(argv: Sequence[str] | None = None) -> int:
    """`make mutate`. Returns 0 when every mutant is killed by behaviour, or is listed and lives."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.mutate", description="Mutate the declared machines.")
    parser.add_argument("scenarios", type=Path, help="folder of scenario files")
    parser.add_argument("--machine", choices=sorted(MACHINES), action="append", help="only these machines")
    parser.add_argument("--only", help="only mutants whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("out/mutate.json"), help="(default %(default)s)")
    args = parser.parse_args(argv)
    files = sorted(args.scenarios.glob("*.txt"))
    named = {scope.name: scope for scope in SCOPES}
    scopes = [named[name] for name in QUICK_SCOPES]
    killers = {"scenarios": by_scenarios(files), "explorer": by_explorer(scopes)}
    chosen = [
        mutant
        for name in args.machine or MACHINES
        for mutant in mutants(MACHINES[name])
        if not args.only or args.only in mutant.name
    ]
    start = time.perf_counter()
    asked = asked_cells(files, scopes)

    def one(index: int) -> Verdict:
        mutant = chosen[index]
        return judge(mutant, killers, asked=(mutant.table.name, mutant.cell) in asked)

    verdicts = _in_processes(one, len(chosen), args.jobs)
    _report(verdicts, killers, time.perf_counter() - start)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps([attrs.asdict(v) | {"killed": v.killed, "ok": v.ok} for v in verdicts], indent=1) + "\n")
    return 0 if verdicts and all(verdict.ok for verdict in verdicts) else 1


_task: Callable[[int], Verdict]


def _run_task(index: int) -> Verdict:
    return _task(index)


def _in_processes(task: Callable[[int], Verdict], count: int, jobs: int) -> list[Verdict]:
    """Mutants are planted by changing modules, so each process works on its own copy of them."""
    global _task  # noqa: PLW0603 - what a forked process finds; a closure cannot be sent to it
    _task = task
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_run_task, range(count), chunksize=4)


def _report(verdicts: Sequence[Verdict], killers: dict[str, Callable[[Mutant], str]], seconds: float) -> None:
    print(f"{'machine':8} {'mutants':>8} {'definition':>11} {'properties':>11} {'asked by the core':>18}", end="")
    print("".join(f" {name:>10}" for name in killers) + f" {'listed':>7} {'live on':>8}")
    for machine in MACHINES:
        own = [verdict for verdict in verdicts if verdict.mutant.startswith(f"{machine}.")]
        if own:
            print(f"{machine:8} {len(own):>8} {_count(bool(v.static['definition']) for v in own):>11}", end="")
            print(f" {_count(bool(v.behaviour['machine']) for v in own):>11} {_count(v.asked for v in own):>18}", end="")
            print("".join(f" {_count(bool(v.behaviour[name]) for v in own):>10}" for name in killers), end="")
            print(f" {_count(bool(v.reason) for v in own):>7} {_count(not v.killed for v in own):>8}")
    print(f"{seconds:.0f} s; scenarios and explorer run the core, and only mutants of cells that it asks are shown to them")
    for verdict in verdicts:
        if not verdict.killed:
            print(f"lives: {verdict.mutant}: {verdict.reason or 'NOT LISTED: which property is missing?'}")
        elif verdict.reason:
            seen = next(said for said in verdict.behaviour.values() if said)
            print(f"LISTED, but killed: {verdict.mutant} by {seen}: take it off the list")


def _count(flags: Iterable[bool]) -> int:
    return sum(flags)


if __name__ == "__main__":
    sys.exit(main())
