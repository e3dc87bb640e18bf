"""Which rows of the machines were taken, by whom, painted on the diagrams. A row that nobody ever took fails the build.

    python -m pd_fsm.testing.coverage tests/scenarios [--scope NAME ...] [--seeds N] [--out out/coverage]

A row that no scenario, no small world and no simulated fleet takes is either dead, and should go, or it is not tested.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pd_fsm.machines import MACHINES
from pd_fsm.machines.diagram import svg
from pd_fsm.testing import explore, race, scenario
from pd_fsm.testing.scopes import SCOPES

SOURCES = ("scenarios", "explorer", "simulator")
QUICK_SCOPES = ("grant", "handshake", "unknown", "silence", "crash-decode")
Coverage = Mapping[str, Mapping[str, int]]
"""How often each row was taken, by source."""


def of_scenarios(files: Iterable[Path]) -> Counter[str]:
    """Rows that replaying these scenarios takes."""
    rows = _all_rows()  # a trace says "open" and "clear" of rooms, too
    return Counter(taken.row for path in files for taken in scenario.run(path).rows if taken.row in rows)


def of_explorer(names: Sequence[str], jobs: int = 1) -> Counter[str]:
    """Rows that the states of these scopes take, over pairs of core state and stimulus."""
    taken: Counter[str] = Counter()
    for report in explore.explore_all([scope for scope in SCOPES if scope.name in names], jobs):
        taken.update(report.rows)
    return taken


def of_simulator(seeds: int, jobs: int = 1) -> Counter[str]:
    """Rows that the first seeds take."""
    return Counter({row: count for row, count in race.run_seeds(range(seeds), jobs).coverage.items() if row in _all_rows()})


def _all_rows() -> set[str]:
    return {row.id for table in MACHINES.values() for row in table.rows()}


def never_taken(coverage: Coverage) -> list[str]:
    """Rows that no source took."""
    return sorted(row for row in _all_rows() if not any(taken.get(row) for taken in coverage.values()))


def paint(coverage: Coverage, folder: Path) -> None:
    """Draw each machine with how often each row was taken, as `ROW / scenarios / explorer / simulator`, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in MACHINES.items():
        notes = {
            row.id: " / ".join(f"{coverage.get(source, {}).get(row.id, 0):,}" for source in SOURCES)
            for row in table.rows()
            if any(taken.get(row.id) for taken in coverage.values())
        }
        (folder / f"{name}.svg").write_text(svg(table, notes))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when a row was never taken."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.coverage", description="Which rows of the machines are taken.")
    parser.add_argument("scenarios", type=Path, help="folder of scenario files")
    parser.add_argument("--scope", nargs="+", default=QUICK_SCOPES, metavar="NAME", help="scopes to explore (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=40, help="fleets to simulate (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/coverage"), help="pictures and figures (default %(default)s)")
    args = parser.parse_args(argv)
    coverage = {
        "scenarios": of_scenarios(sorted(args.scenarios.glob("*.txt"))),
        "explorer": of_explorer(args.scope, args.jobs),
        "simulator": of_simulator(args.seeds, args.jobs),
    }
    paint(coverage, args.out)
    (args.out / "rows.json").write_text(json.dumps(coverage, indent=1) + "\n")
    print(f"{'row':56}" + "".join(f" {source:>10}" for source in SOURCES))
    for table in MACHINES.values():
        for row in table.rows():
            print(f"{row.id:56}" + "".join(f" {coverage[source].get(row.id, 0):>10,}" for source in SOURCES))
    missing = never_taken(coverage)
    for name in missing:
        print(f"NEVER TAKEN: {name}: test it, or take it out of the machine")
    print(f"{len(_all_rows()) - len(missing)} of {len(_all_rows())} rows were taken; painted in {args.out}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
