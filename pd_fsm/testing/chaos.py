"""Real faults with real processes: `python -m pd_fsm.testing.chaos`. Ends with 0 only if every room ended as it should.

Each fault gets a fresh small fleet over ZeroMQ on loopback, with rooms in every phase when it strikes (`chaos_scene.py`,
`chaos_faults.py`). This file judges what the processes saw: the checks are pure functions of their reports.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from pd_fsm.core.events import CAUSES
from pd_fsm.testing.chaos_child import ChaosError
from pd_fsm.testing.chaos_faults import FAULTS, SUCCESS, Fault
from pd_fsm.testing.chaos_scene import SIDES, Scene

Report: TypeAlias = Mapping[str, Any]
"""What `chaos_worker.Engine.report` returns."""
CHARS_MAX, LINES_MAX = 300, 12  # of what is wrong with one fault, on the screen; the report has it all
TABLES = ("rooms", "ops", "links", "leases", "repeats", "unanswered", "early_offers", "quarantined_rooms")


# --- checks ------------------------------------------------------------------------------------------------------------------


def lost_rooms(opened: Sequence[int], report: Report) -> list[str]:
    """Rooms that were opened and did not conclude, are not known, or failed without a cause and a reason."""
    lost = []
    known = Counter(life["room"] for life in report["lives"])
    for room, times in Counter(opened).items():
        if known[room] != times:
            lost.append(f"room {room} was opened {times} times on {report['role']}, which knows {known[room]}")
    for life in report["lives"]:
        cause, _, reason = life["outcome"].partition(": ")
        if cause != "SUCCESS" and (cause not in CAUSES or not reason.strip()):
            lost.append(f"room {life['room']} on {report['role']} ended without a reason: {life['outcome']!r}")
    return lost


def leaked_pages(report: Report) -> int:
    """Items that are neither free nor listed by the session as memory in doubt."""
    return report["items"] - report["items_free"] - quarantined_pages(report)  # type: ignore[no-any-return]  # an int of JSON


def quarantined_pages(report: Report) -> int:
    """Items of rooms whose leases `describe()` shows as QUARANTINED, with somebody who holds them."""
    doubted = {
        lease["generation"] for lease in report["describe"]["leases"] if lease["state"] == "QUARANTINED" and lease["holders"]
    }
    return sum(life["held"] for life in report["lives"] if life["generation"] in doubted)


def wrong_bytes(report: Report) -> list[str]:
    """Rooms that decode calls a success without the bytes that prefill computed."""
    lives = report["lives"] if report["role"] == "decode" else []
    return [
        f"room {life['room']} succeeded with wrong bytes"
        for life in lives
        if life["outcome"] == "SUCCESS" and life["bytes_ok"] is not True
    ]


def left_over(report: Report, peer: str) -> list[str]:
    """What should be empty and is not; `peer` is the incarnation of the other side, the only one that should be known."""
    described, role = report["describe"], report["role"]
    left = [f"{role} still has {table}: {described[table]}" for table in TABLES if described[table]]
    known = [(each["state"], each["incarnation"]) for each in described["peers"]]
    if known != [("READY", peer)]:
        left.append(f"{role} knows the peers {known}, and should know {peer} as READY")
    if described["counts"].get("driver_error"):
        left.append(f"the driver of {role} met {described['counts']['driver_error']} errors; see its log")
    return left


def unexpected(fault: Fault, groups: Mapping[str, Iterable[int]], retried: Iterable[int], report: Report) -> list[str]:
    """Rooms that ended otherwise than this fault explains. The last life of a room that was tried again must succeed."""
    group_of = {room: group for group, rooms in groups.items() for room in rooms}
    last = {life["room"]: life for life in report["lives"]}
    again = {room: last.get(room) for room in retried}
    wrong = []
    for life in report["lives"]:
        group = group_of.get(life["room"], "?")
        pattern = SUCCESS if life is again.get(life["room"]) else fault.allowed(report["role"], group)
        if not re.match(pattern, life["outcome"]):
            wrong.append(f"{report['role']}.{group} room {life['room']} ended {life['outcome']!r}; allowed is {pattern}")
    return wrong


def split_verdicts(prefill: Report, decode: Report) -> list[int]:
    """Rooms whose two sides ended differently: possible when a fault hits the last acknowledgement, worth a note."""
    ends = [{life["room"]: life["outcome"] == "SUCCESS" for life in report["lives"]} for report in (prefill, decode)]
    return sorted(room for room in ends[0].keys() & ends[1].keys() if ends[0][room] != ends[1][room])


# --- a fault -----------------------------------------------------------------------------------------------------------------


@attrs.define
class Result:
    """How one fault went."""

    fault: str
    seed: str
    rooms: int = 0
    outcomes: dict[str, int] = attrs.field(factory=dict)
    """Both sides counted: a room that succeeded counts twice; "killed" for those of a killed process."""
    probe_ok: bool = False
    lost_without_reason: int = 0
    pages_leaked: int = 0
    pages_quarantined: int = 0
    late_writes: int = 0
    violations: list[str] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        counts = self.lost_without_reason + self.pages_leaked + self.late_writes + len(self.violations)
        return self.probe_ok and not counts


def judge(fault: Fault, scene: Scene, reports: Sequence[Report], result: Result) -> None:
    """Add what the reports of prefill and decode say to the result."""
    outcomes: Counter[str] = Counter({"killed": scene.killed} if scene.killed else {})
    lost: list[str] = []
    for report, other in zip(reports, reversed(SIDES), strict=True):
        role = report["role"]
        outcomes.update(life["outcome"].partition(":")[0] or "none" for life in report["lives"])
        lost += lost_rooms(scene.opened[role], report)
        result.pages_leaked += leaked_pages(report)
        result.pages_quarantined += quarantined_pages(report)
        result.late_writes += report["late_writes"]
        result.violations += wrong_bytes(report) + left_over(report, scene.incarnation(other))
        result.violations += unexpected(fault, scene.groups, scene.retried, report)
    result.lost_without_reason = len(lost)
    result.violations += lost
    split = split_verdicts(*reports)
    if split:
        result.notes.append(f"{len(split)} rooms ended differently on the two sides")
    result.rooms = len({room for rooms in scene.groups.values() for room in rooms})
    result.outcomes = dict(sorted(outcomes.items()))


def run_fault(fault: Fault, seed: int, folder: Path) -> Result:
    """One fault with a fleet of its own. What goes wrong is in the result, never raised."""
    result = Result(fault.name, f"{seed}/{fault.name}")
    began = time.monotonic()
    scene = Scene(folder / fault.name, result.seed, dict(fault.deadlines), fault.proxied)
    try:
        with scene:
            try:
                scene.stage()
                fault.inject(scene)
                scene.finish()
                scene.probe()
                result.probe_ok = True
                scene.rest()
            except ChaosError as error:
                result.violations.append(str(error))
                scene.calm()
            judge(fault, scene, [scene.report(side) for side in SIDES], result)
            scene.end()
    except (ChaosError, OSError) as error:
        result.violations.append(str(error))
    if not result.rooms:  # not even reports came
        result.probe_ok = False
        result.lost_without_reason = sum(map(len, scene.opened.values()))
    result.violations += scene.wrong
    result.notes += scene.notes
    result.seconds = round(time.monotonic() - began, 2)
    return result


# --- the run -----------------------------------------------------------------------------------------------------------------


def summary(results: Sequence[Result], seed: int) -> dict[str, Any]:
    """The content of the report file."""
    totals = {
        name: sum(getattr(result, name) for result in results)
        for name in ("rooms", "lost_without_reason", "pages_leaked", "late_writes")
    }
    return {
        **totals,
        "faults": len(results),
        "probe_ok": bool(results) and all(result.probe_ok for result in results),
        "violations": sum(len(result.violations) for result in results),
        "seed": seed,
        "results": [attrs.asdict(result) for result in results],
    }


def passed(report: Mapping[str, Any]) -> bool:
    """Whether a report says that everything went as it should."""
    bad = ("lost_without_reason", "pages_leaked", "late_writes", "violations")
    return report["probe_ok"] is True and not any(report[name] for name in bad)


def line(result: Result) -> str:
    ends = " ".join(f"{cause}={count}" for cause, count in result.outcomes.items())
    verdict = "ok" if result.ok else "FAILED"
    counts = f"{result.rooms:>5} {result.lost_without_reason:>4} {result.pages_leaked:>6} {result.late_writes:>4}"
    return f"{result.fault:<30}{counts}  {'yes' if result.probe_ok else 'NO':<5} {verdict:<7}{result.seconds:>5.1f}s  {ends}"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every fault went as it should, 1 when one did not, 2 for a fault that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.chaos", description="Real faults with real processes.")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--report", type=Path, default=Path("out/chaos.json"))
    parser.add_argument("--quick", action="store_true", help="a few faults, in less than half a minute")
    parser.add_argument("--only", metavar="NAME", action="append", help="this fault; can be given more than once")
    args = parser.parse_args(argv)
    names = [fault.name for fault in FAULTS]
    unknown = set(args.only or ()) - set(names)
    if unknown:
        sys.stderr.write(f"no fault {sorted(unknown)}; there are {', '.join(names)}\n")
        return 2
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    chosen = [fault for fault in FAULTS if (fault.name in args.only if args.only else fault.quick or not args.quick)]
    folder = args.report.parent / "chaos"
    shutil.rmtree(folder, ignore_errors=True)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"seed {seed}; logs and traces in {folder}\n")
    sys.stdout.write(f"{'fault':<30}{'rooms':>5} {'lost':>4} {'leaked':>6} {'late':>4}  {'probe':<5} {'':<7}\n")
    results: list[Result] = []
    for fault in chosen:
        result = run_fault(fault, seed, folder)
        results.append(result)
        sys.stdout.write(line(result) + "\n")
        sys.stdout.write("".join(f"    {violation[:CHARS_MAX]}\n" for violation in result.violations[:LINES_MAX]))
        sys.stdout.flush()
    report = summary(results, seed)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    verdict = "passed" if passed(report) else "FAILED"
    sys.stdout.write(
        f"{verdict}: {report['faults']} faults, {report['rooms']} rooms, {report['lost_without_reason']} lost without a reason, "
        f"{report['pages_leaked']} pages leaked, {report['late_writes']} late writes, seed {seed}, report in {args.report}\n"
    )
    return 0 if passed(report) else 1


if __name__ == "__main__":
    sys.exit(main())
