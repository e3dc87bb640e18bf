"""`pd-fsm bench`: run the groups, print a table of each, and keep every figure as JSON.

A missed goal is reported, never an error: what a shared machine measures is a figure, not a test. The exit status is 2 only when a
benchmark could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zmq

import pd_fsm
from pd_fsm.benchmarks import bulk, core, pairs, poll, room, transports
from pd_fsm.benchmarks.rows import Row, table


class Group(Protocol):
    """What a group's module has: `quick` measures less, to see that it works."""

    def __call__(self, *, quick: bool = False) -> list[Row]: ...


GROUPS: dict[str, Group] = {"core": core.run, "poll": poll.run, "room": room.run, "bulk": bulk.run, "transports": transports.run}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the groups that `argv` names, all by default. Returns the exit status."""
    args = _parser().parse_args(argv)
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        print(f"pd-fsm bench: no group {', '.join(unknown)}; there are {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    say: Callable[..., None] = _to_stderr if args.json == "-" else print
    documents: list[dict[str, Any]] = []
    try:
        for group in args.groups or GROUPS:
            rows = GROUPS[group](quick=args.quick)
            documents.append({"group": group, "quick": args.quick, **machine(), "rows": [row.as_dict() for row in rows]})
            _write(args.out / f"{group}.json", documents[-1])
            say(table(group, rows) + "\n")
    except (pairs.ChildFailed, OSError) as error:
        print(f"pd-fsm bench: {error}", file=sys.stderr)
        return 2
    missed = [f"{d['group']}: {row['name']}" for d in documents for row in d["rows"] if row["met"] is False]
    say("ours and peer are medians [p10 p90]; ratio is ours / peer" + (f"; missed goals: {'; '.join(missed)}" if missed else ""))
    if args.json == "-":
        print(json.dumps(documents, indent=1))
    elif args.json:
        _write(Path(args.json), documents)
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on, beside the code."""
    return {
        "pd_fsm": pd_fsm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "numpy": np.__version__,
        "pyzmq": zmq.pyzmq_version(),
        "libzmq": zmq.zmq_version(),
    }


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pd-fsm bench", description="Measure the session layer beside what one would use instead."
    )
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"{', '.join(GROUPS)}; all by default")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes and few repetitions: shows that it works, measures little"
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="all figures as JSON, on stdout or in FILE")
    parser.add_argument(
        "--out", type=Path, default=Path("out/bench"), metavar="DIR", help="where GROUP.json is kept (default %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
