"""Mutants of the core's functions, made by mutmut, and how many of them the core's own tests notice.

It owns the copy that mutmut works in and the report. It is a report and no gate: many mutants change nothing that anybody can see
(the text of an error, the first number of a sequence). It must never write outside of its output folder: mutmut rewrites sources.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import attrs

import pd_fsm

QUICK = ("wire", "timers")
_TESTS = ("__init__.py", "conftest.py", "pair.py", "needs.py", "test_core_*.py", "test_machines.py")
_RESULT = re.compile(r"^\s+pd_fsm\.core\.(?P<module>\w+)\.(?P<name>\S+__mutmut_\d+): (?P<status>.+?)\s*$", re.MULTILINE)
_CONFIG = """\
[tool.pytest.ini_options]
addopts = ["--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:timeout"]
pythonpath = ["."]
[tool.mutmut]
source_paths = ["pd_fsm"]
only_mutate = {only}
also_copy = ["tests", "docs"]
pytest_add_cli_args_test_selection = ["tests"]
use_git_change_detection = false
use_setproctitle = false
"""


@attrs.frozen
class Row:
    """What became of one module's mutants. `other` counts those that ended in another way, such as a crash, or were not run."""

    module: str
    mutants: int
    killed: int
    survived: int
    no_tests: int
    timeouts: int
    other: int
    survivors: tuple[str, ...]

    @property
    def score(self) -> float:
        """Percent of the mutants that a test noticed; one that never ends was noticed, too."""
        return 100 * (self.killed + self.timeouts) / self.mutants


def rows(results: str) -> list[Row]:
    """One row a module, from what `mutmut results --all true` prints. Lines of another form are left out."""
    found: dict[str, list[tuple[str, str]]] = {}
    for match in _RESULT.finditer(results):
        found.setdefault(match["module"], []).append((match["name"], match["status"]))
    table = []
    for module, mutants in sorted(found.items()):
        count = Counter(status for _, status in mutants)
        known = count["killed"], count["survived"], count["no tests"], count["timeout"]
        lives = tuple(name for name, status in mutants if status in {"survived", "no tests"})
        table.append(Row(module, len(mutants), *known, len(mutants) - sum(known), lives))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """`make mutate-functions`. Returns 0 unless nothing was mutated or the tests fail without a mutant."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.mutate_functions", description="Mutate the core's functions.")
    parser.add_argument("tests", type=Path, help="folder of the core's tests, beside docs/")
    parser.add_argument("--only", action="append", help=f"a module of the core (default: {', '.join(QUICK)})")
    parser.add_argument("--all", action="store_true", help="every module of the core (long)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="(default %(default)s)")
    args = parser.parse_args(argv)
    package = Path(pd_fsm.__file__).parent
    modules = ["*"] if args.all else args.only or QUICK
    copy = args.out / "mutate-functions"
    shutil.rmtree(copy, ignore_errors=True)
    (copy / "tests").mkdir(parents=True)
    shutil.copytree(package, copy / "pd_fsm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(args.tests.parent / "docs", copy / "docs")
    for pattern in _TESTS:
        for path in args.tests.glob(pattern):
            shutil.copy(path, copy / "tests")
    only = [f"pd_fsm/core/{module}.py" for module in modules]
    (copy / "pyproject.toml").write_text(_CONFIG.format(only=json.dumps(only)))
    with (copy / "log").open("w") as log:
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(args.jobs)]
        failed = subprocess.run(command, cwd=copy, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False).returncode
    if failed:
        print(f"mutmut ended with {failed}: is it installed, and do the tests pass without a mutant? See {copy / 'log'}")
        return 1
    command = [sys.executable, "-m", "mutmut", "results", "--all", "true"]
    table = rows(subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, text=True, check=True).stdout)
    _report(table)
    report = [attrs.asdict(row) | {"score": round(row.score, 1)} for row in table]
    (args.out / "mutate-functions.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return 0 if table else 1


def _report(table: Sequence[Row]) -> None:
    print(f"{'module':10} {'mutants':>8} {'killed':>7} {'survived':>9} {'no tests':>9} {'timeouts':>9} {'other':>6} {'score':>7}")
    for row in table:
        print(f"{row.module:10} {row.mutants:>8} {row.killed:>7} {row.survived:>9} {row.no_tests:>9}", end="")
        print(f" {row.timeouts:>9} {row.other:>6} {row.score:>6.1f}%")
    for row in table:
        for name in row.survivors:
            print(f"lives: {row.module}.{name}")
    if not table:
        print("nothing was mutated: is there such a module in pd_fsm/core?")


if __name__ == "__main__":
    sys.exit(main())
