"""The whole ladder of checks, cheapest first, and one table: what was looked at, how much of it, how long it took, what came out.

    python -m pd_fsm.testing.verify            in the size that fits a pull request: under 10 minutes on 2 cores
    python -m pd_fsm.testing.verify --long 20  each step that much larger, as far as it can be scaled

Needs a checkout: scenarios, tests and the specification are not installed. Every step runs in a process of its own with a deadline.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

STEP_S_MAX = 3_600
_OUT = Path("out/verify")


@attrs.frozen
class Step:
    """One rung. `command` is run with the interpreter; `size` reads from its output what was looked at."""

    name: str
    finds: str
    command: tuple[str, ...]
    size: Callable[[str], dict[str, int]]
    environment: dict[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Outcome:
    """What came of a step."""

    step: str
    size: dict[str, int]
    seconds: float
    result: str


def steps(factor: int) -> list[Step]:
    """The ladder; `factor` scales what can be scaled."""
    long = factor > 1
    profile = {"HYPOTHESIS_PROFILE": "nightly" if long else "ci"}
    every_transport = ("tests/test_memory.py", "tests/test_zmq.py", "tests/test_conformance.py", "tests/test_conformance_faults.py")
    return [
        Step("machines", "holes, overlaps, ways out of terminals", _pytest("tests/test_machines.py"), _passed),
        Step(
            "scenarios",
            "known races coming back",
            ("-m", "pytest", "-q", "tests/test_scenarios.py"),
            lambda text: {"scenarios": len(list(Path("tests/scenarios").glob("*.txt"))), **_passed(text)},
        ),
        Step(
            "explorer",
            "every interleaving in scope, leaks",
            ("-m", "pd_fsm.testing.explore", "--json", str(_OUT / "explorer.json"), *(["--all"] if long else [])),
            lambda _: _sums("explorer.json", "states", "edges"),
        ),
        Step(
            "simulator",
            "long runs, timing, many rooms",
            (
                "-m",
                "pd_fsm",
                "race",
                "--sim",
                "--seeds",
                str(200 * factor),
                "--jobs",
                _jobs(),
                "--json",
                str(_OUT / "simulator.json"),
            ),
            lambda _: _figures("simulator.json", "seeds", "events", "rooms"),
        ),
        Step("hypothesis", "odd calls, values, gossip", _pytest("tests/test_stateful.py", "-s"), _passed, profile),
        Step("coverage", "rows that nobody takes", _module("coverage", "tests/scenarios", "--jobs", _jobs()), _rows),
        Step(
            "mutants",
            "properties that nobody wrote",
            _module("mutate", "tests/scenarios", "--json", str(_OUT / "mutants.json")),
            lambda _: {"mutants": len(_read("mutants.json"))},
        ),
        Step(
            "specification",
            "design errors, code that drifts",
            ("specs/check.py", *(["--long"] if long else [])),
            lambda _: _spec(),
        ),
        Step("wire", "crashes on hostile bytes", _pytest("tests/test_core_wire.py", "tests/test_core_rude.py"), _passed, profile),
        Step("conformance", "adapters that differ", _pytest(*every_transport), _passed),
        Step("other layers", "a search that finds nothing", _pytest("tests/test_peer_layers.py"), _passed),
    ]


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"pd_fsm.testing.{name}", *arguments)


def _jobs() -> str:
    return str(os.cpu_count() or 1)


def _passed(text: str) -> dict[str, int]:
    found = re.findall(r"(\d+) passed", text)
    return {"tests": int(found[-1])} if found else {}


def _rows(text: str) -> dict[str, int]:
    found = re.search(r"(\d+) of \d+ rows were taken", text)
    return {"rows": int(found[1])} if found else {}


def _read(name: str) -> Any:
    path = _OUT / name
    return json.loads(path.read_text()) if path.exists() else []


def _sums(name: str, *keys: str) -> dict[str, int]:
    return {key: sum(row[key] for row in _read(name)) for key in keys}


def _figures(name: str, *keys: str) -> dict[str, int]:
    figures = _read(name)
    return {key: int(figures[key]) for key in keys} if figures else {}


def _spec() -> dict[str, int]:
    path = Path("out/spec.json")
    rows = json.loads(path.read_text()) if path.exists() else []
    return {"checks": len(rows)}


def run(step: Step) -> Outcome:
    """Run one step to its end or its deadline; what it prints goes to `out/verify/STEP.log`."""
    begun = time.perf_counter()
    log = _OUT / f"{step.name.replace(' ', '-')}.log"
    try:
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, *step.command],
                env={**os.environ, **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=STEP_S_MAX,
                check=False,
            )
        result = "holds" if done.returncode == 0 else f"FAILED (exit status {done.returncode}): {log}"
    except subprocess.TimeoutExpired:
        result = f"FAILED: not done after {STEP_S_MAX} s: {log}"
    seconds = time.perf_counter() - begun
    size = step.size(log.read_text())
    if result == "holds" and not any(size.values()):
        result = f"FAILED: it looked at nothing: {log}"
    return Outcome(step.name, size, round(seconds, 1), result)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every step holds."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.verify", description="Run the ladder of checks.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="only these steps")
    parser.add_argument("--long", type=int, default=1, metavar="FACTOR", help="scale what can be scaled (default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("out/verify.json"), help="(default %(default)s)")
    args = parser.parse_args(argv)
    if not Path("tests/scenarios").is_dir():
        parser.error("run it in the root of a checkout: the scenarios, tests and the specification are not installed")
    ladder = steps(args.long)
    unknown = set(args.steps) - {step.name for step in ladder}
    if unknown:
        parser.error(f"no step {min(unknown)!r}; there are {', '.join(step.name for step in ladder)}")
    _OUT.mkdir(parents=True, exist_ok=True)
    outcomes = []
    print(f"{'step':14} {'finds':40} {'looked at':44} {'seconds':>8}  result", flush=True)
    for step in ladder:
        if args.steps and step.name not in args.steps:
            continue
        outcome = run(step)
        outcomes.append(outcome)
        size = ", ".join(f"{count:,} {what}" for what, count in outcome.size.items())
        print(f"{step.name:14} {step.finds:40} {size:44} {outcome.seconds:>8.1f}  {outcome.result}", flush=True)
    print(f"{'all':14} {'':40} {'':44} {sum(outcome.seconds for outcome in outcomes):>8.1f}")
    args.json.write_text(json.dumps([attrs.asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 0 if all(outcome.result == "holds" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
