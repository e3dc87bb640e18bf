"""What the demo claims, checked: pure functions from evidence to checks, and the table and the JSON report made of it.

Nothing here runs, waits or reads a file: the demo collects the evidence, this module judges it. A check must be able to fail, so
each one also refuses to pass on nothing (no finished request, no aborted one, no report).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from pd_fsm.examples.engine.messages import Hold, Report, Result, Role
from pd_fsm.machines.room import Phase
from pd_fsm.runtime.timeline import Life, RoomTrace, audit
from pd_fsm.runtime.timeline_svg import short_room

SIDES: tuple[Role, Role] = ("prefill", "decode")

# Causes that the router writes itself; everything else was learned through pd-fsm.
WORKER_LOST = "worker_lost"
MADE_UP = frozenset({WORKER_LOST, "router"})

Aim = tuple[Hold, Role]  # the phase in which, and the side on which a request is aborted

# Every abort that a request can meet. After Success only decode has something left to abort; prefill's is the late one.
AIMS: tuple[Aim, ...] = (
    ("BOOTSTRAPPING", "decode"),
    ("BOOTSTRAPPING", "prefill"),
    ("WAITING_FOR_INPUT", "decode"),
    ("WAITING_FOR_INPUT", "prefill"),
    ("TRANSFERRING", "decode"),
    ("TRANSFERRING", "prefill"),
    ("SUCCESS", "decode"),
    ("SUCCESS", "prefill"),
)
FIRST_CONTACT_AIM: Aim = ("BOOTSTRAPPING", "decode")  # before decode has ever met this prefill worker
LATE_AIM: Aim = ("SUCCESS", "prefill")  # nothing is left to abort: the request must finish as if nothing had happened


@attrs.frozen
class Served:
    """One request as the router and the reference saw it. A retry is another one, with its own room."""

    number: int
    room: int
    prompt_tokens: int
    prefill: str
    decode: str
    outcome: str  # "finished" | "aborted" | "failed"
    reason: str
    results: Mapping[Role, Result]
    tokens: Sequence[int] = ()
    expected: Sequence[int] = ()  # of the same model in one process; only of finished requests
    was_told: bool = False  # the router had to end it, because a worker did not learn it from its peer
    aim: Aim | None = None
    retry_of: int | None = None
    is_probe: bool = False  # sent to the restarted worker
    is_victim: bool = False  # was put on the worker that is killed

    @property
    def lost_worker(self) -> bool:
        """Its prefill worker died before it could answer."""
        return any(result.cause == WORKER_LOST for result in self.results.values())

    @property
    def bytes_moved(self) -> int:
        return max((result.bytes_moved for result in self.results.values()), default=0)

    @property
    def plan(self) -> str:
        return plan_words(self.aim, self.retry_of, self.is_probe, self.is_victim)


def plan_words(aim: Aim | None, retry_of: int | None, is_probe: bool, is_victim: bool) -> str:
    """What the demo meant to do with a request; empty for one that just runs."""
    if aim == LATE_AIM:
        return "abort by prefill, too late"
    if aim is not None:
        return f"abort by {aim[1]} in {aim[0] if aim[0] != Phase.SUCCESS.name else 'decoding'}"
    if retry_of is not None:
        return f"retry of {retry_of}"
    if is_probe:
        return "probe after the restart"
    return "held for the kill" if is_victim else ""


@attrs.frozen
class Evidence:
    """Everything that a run leaves behind."""

    asked: int  # requests that the caller wanted, without retries and probes
    served: Sequence[Served]
    killed: str  # name of the worker that was killed and restarted
    killed_pid: int
    workers: Sequence[str]  # all names
    reports: Mapping[str, Report]  # last report of each worker's last life
    exit_codes: Mapping[str, int | None]  # of each worker's last life; None: had to be killed
    lives: Sequence[Life]  # from the traces

    def side(self, request: Served, role: str) -> RoomTrace | None:
        """The last trace of a request's room on one side."""
        found = [room for life in self.lives for room in life.rooms.values() if room.room == request.room and room.role == role]
        return max(found, key=lambda room: room.opened_ms, default=None)


@attrs.frozen
class Check:
    name: str
    ok: bool
    detail: str


def judge(evidence: Evidence) -> list[Check]:
    """All checks, each with what was seen. The demo succeeds only if all of them are ok."""
    return [
        check_answered(evidence),
        check_tokens(evidence),
        check_bytes(evidence),
        check_aborts(evidence),
        check_reasons(evidence),
        check_learned(evidence),
        check_kill(evidence),
        check_probes(evidence),
        check_the_rest(evidence),
        check_pages(evidence),
        check_traces(evidence),
        check_exits(evidence),
    ]


def _check(name: str, bad: Sequence[str], good: str, nothing: str = "") -> Check:
    """Ok if there is something to judge (`nothing` is empty) and nothing is wrong with it."""
    problems = [*([nothing] if nothing else []), *bad]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return Check(name, not problems, "; ".join(problems[:3]) + more if problems else good)


def check_answered(evidence: Evidence) -> Check:
    bad = [
        f"request {s.number} has no result of {side}"
        for s in evidence.served
        for side in ("prefill", "decode")
        if side not in s.results
    ]
    bad += [
        f"request {s.number} has outcome {s.outcome!r}"
        for s in evidence.served
        if s.outcome not in {"finished", "aborted", "failed"}
    ]
    first_tries = [s for s in evidence.served if s.retry_of is None and not s.is_probe]
    if len(first_tries) != evidence.asked:
        bad.append(f"{evidence.asked} requests were asked for and {len(first_tries)} were sent")
    rooms = {s.room for s in evidence.served}
    if len(rooms) != len(evidence.served):
        bad.append(f"{len(evidence.served)} requests share {len(rooms)} rooms")
    return _check("every request got its answer", bad, f"{len(evidence.served)} requests, {len(rooms)} rooms, both sides of each")


def check_tokens(evidence: Evidence) -> Check:
    finished = [s for s in evidence.served if s.outcome == "finished"]
    bad = [
        f"request {s.number} decoded {list(s.tokens)} instead of {list(s.expected)}"
        for s in finished
        if list(s.tokens) != list(s.expected) or not s.expected
    ]
    count = sum(len(s.tokens) for s in finished)
    good = f"{count} tokens of {len(finished)} requests equal those of the same model in one process"
    return _check("tokens equal the one-process run", bad, good, "" if finished else "no request finished")


def check_bytes(evidence: Evidence) -> Check:
    """Both sides count for themselves; a prefill worker that was killed could not say."""
    finished = [s for s in evidence.served if s.outcome == "finished" and not s.lost_worker]
    bad = []
    for s in finished:
        counts = {side: s.results[side].bytes_moved for side in SIDES if side in s.results}
        if len(set(counts.values())) != 1 or not s.bytes_moved:
            bad.append(f"request {s.number}: {counts}")
    good = f"{sum(s.bytes_moved for s in finished)} bytes of {len(finished)} requests"
    return _check("both sides count the same bytes", bad, good, "" if finished else "no request finished")


def check_aborts(evidence: Evidence) -> Check:
    aimed = [s for s in evidence.served if s.aim is not None]
    bad = [f"no request was aborted by {side} in {phase}" for phase, side in AIMS if (phase, side) not in {s.aim for s in aimed}]
    for s in aimed:
        wanted = "finished" if s.aim == LATE_AIM else "aborted"
        if s.outcome != wanted:
            bad.append(f"request {s.number} ({s.plan}) is {s.outcome} instead of {wanted}: {s.reason}")
        elif s.aim is not None and (seen := _aborted_in(evidence, s, s.aim)) != s.aim[0]:
            bad.append(f"request {s.number} ({s.plan}) was in {seen}")
    return _check(
        "aborts in every phase, from either side",
        bad,
        f"{len(aimed)} requests, {len(AIMS)} kinds of abort",
        "" if aimed else "none",
    )


def _aborted_in(evidence: Evidence, s: Served, aim: Aim) -> str:
    """The last phase before FAILED in the trace of the side that aborts."""
    trace = evidence.side(s, aim[1])
    if trace is None:
        return "no trace"
    phases = [span.state for span in trace.phase.spans if span.state != Phase.FAILED.name]
    return phases[-1] if phases else "no phase"


def check_reasons(evidence: Evidence) -> Check:
    bad, count = [], 0
    for s in evidence.served:
        if s.outcome == "finished":
            continue
        count += 1
        if not s.reason:
            bad.append(f"request {s.number} is {s.outcome} without a reason")
        bad += [
            f"{side} of request {s.number} gives no reason"
            for side, r in s.results.items()
            if r.outcome != "finished" and not r.reason
        ]
    return _check("what did not finish says why", bad, f"{count} requests", "" if count else "every request finished")


def check_learned(evidence: Evidence) -> Check:
    """No worker needed to be told by the router what had become of its peer."""
    bad = [f"request {s.number} had to be ended by the router: {s.reason}" for s in evidence.served if s.was_told]
    for s in evidence.served:
        for side, result in s.results.items():
            died = side == "prefill" and s.prefill == evidence.killed and result.cause == WORKER_LOST
            if result.cause in MADE_UP and not died:
                bad.append(f"{side} of request {s.number} did not learn it from its peer: {result.reason}")
    told = sum(result.cause not in {"", "abort", *MADE_UP} for s in evidence.served for result in s.results.values())
    return _check(
        "peers learned it through pd-fsm",
        bad,
        f"{told} verdicts came from the other side",
        "" if told else "no side learned anything",
    )


def check_kill(evidence: Evidence) -> Check:
    lost = [s for s in evidence.served if s.lost_worker and s.outcome == "failed"]
    bad = [f"request {s.number} does not name {evidence.killed}: {s.reason!r}" for s in lost if evidence.killed not in s.reason]
    bad += [
        f"request {s.number} was held for the kill and is {s.outcome}" for s in evidence.served if s.is_victim and s not in lost
    ]
    retried = {s.retry_of for s in evidence.served}
    bad += [f"request {s.number} was not tried again" for s in lost if s.number not in retried]
    good = (
        f"{len(lost)} requests failed with kill -9 of {evidence.killed} (pid {evidence.killed_pid}), name it, and were tried again"
    )
    return _check(
        "the killed worker's requests failed with its name", bad, good, "" if lost else "no request was on the killed worker"
    )


def check_probes(evidence: Evidence) -> Check:
    probes = [s for s in evidence.served if s.is_probe]
    bad = [f"probe {s.number} is {s.outcome}: {s.reason}" for s in probes if s.outcome != "finished"]
    lives = [life for life in evidence.lives if life.session == evidence.killed]
    served_again = {room.room for life in lives[1:] for room in life.rooms.values() if room.verdict == Phase.SUCCESS.name}
    bad += [
        f"probe {s.number} left no success in the second life of {evidence.killed}" for s in probes if s.room not in served_again
    ]
    good = f"{len(probes)} probes succeeded on {evidence.killed} in its second life"
    return _check("the restarted worker serves again", bad, good, "" if probes else "no probe was sent")


def check_the_rest(evidence: Evidence) -> Check:
    """Whoever was neither aborted nor on the killed worker must not have noticed anything."""
    rest = [s for s in evidence.served if s.aim is None and not s.lost_worker]
    bad = [f"request {s.number} is {s.outcome}: {s.reason}" for s in rest if s.outcome != "finished"]
    return _check("all other requests finished", bad, f"{len(rest)} requests", "" if rest else "there were none")


def pages_leaked(evidence: Evidence) -> int:
    """Pages and aux rows that did not come back, on all workers together."""
    return sum(r.pages_total - r.pages_free + r.rows_total - r.rows_free for r in evidence.reports.values())


def check_pages(evidence: Evidence) -> Check:
    bad = [f"{name} did not report" for name in evidence.workers if name not in evidence.reports]
    for name, r in evidence.reports.items():
        if (r.pages_free, r.rows_free) != (r.pages_total, r.rows_total):
            bad.append(f"{name} has {r.pages_free} of {r.pages_total} pages and {r.rows_free} of {r.rows_total} aux rows")
        if r.live_rooms:
            bad.append(f"{name} still has {r.live_rooms} rooms")
    pages = sum(r.pages_total for r in evidence.reports.values())
    return _check(
        "all pages came back",
        bad,
        f"{pages} pages on {len(evidence.reports)} workers",
        "" if evidence.reports else "no worker reported",
    )


def check_traces(evidence: Evidence) -> Check:
    """The traces are whole, and say of each room what the workers said."""
    bad = audit(evidence.lives)
    for s in evidence.served:
        for side, result in s.results.items():
            if result.cause in MADE_UP:
                continue
            trace = evidence.side(s, side)
            if trace is None:
                bad.append(f"the room of request {s.number} is not in the trace of {result.worker}")
            elif trace.verdict != result.verdict:
                bad.append(
                    f"request {s.number}: {result.worker} says {result.verdict}, its trace says {trace.verdict or 'nothing'}"
                )
    rooms = sum(len(life.rooms) for life in evidence.lives)
    good = f"{rooms} rooms in {len(evidence.lives)} lives of {len({life.session for life in evidence.lives})} sessions"
    return _check("traces are complete and agree", bad, good, "" if rooms else "no traces")


def check_exits(evidence: Evidence) -> Check:
    bad = [f"{name} ended with {evidence.exit_codes.get(name)}" for name in evidence.workers if evidence.exit_codes.get(name) != 0]
    return _check(
        "all workers ended cleanly", bad, f"{len(evidence.workers)} exit codes are 0", "" if evidence.workers else "no workers"
    )


COLUMNS = ("#", "room", "workers", "prompt", "boot ms", "wait ms", "move ms", "KiB", "tokens", "verdict", "plan", "reason")
NUMERIC_COLUMNS = frozenset({"#", "prompt", "boot ms", "wait ms", "move ms", "KiB", "tokens"})


def table(evidence: Evidence) -> list[tuple[str, ...]]:
    """One row a request, in the order of COLUMNS. Times are how long each phase lasted on the decode side, from its trace."""
    rows = []
    for s in evidence.served:
        trace = evidence.side(s, "decode")
        spans = {span.state: span.end_ms - span.start_ms for span in trace.phase.spans} if trace else {}
        times = (f"{spans[name]:.1f}" if name in spans else "" for name in (p.name for p in Phase if 0 < p < Phase.SUCCESS))
        rows.append(
            (
                str(s.number),
                short_room(s.room),
                f"{s.prefill} → {s.decode}",
                str(s.prompt_tokens),
                *times,
                f"{s.bytes_moved / 1024:.0f}",
                str(len(s.tokens) or ""),
                s.outcome,
                s.plan,
                s.reason,
            )
        )
    return rows


def as_json(evidence: Evidence, checks: Sequence[Check], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The machine-readable report. `requests` counts retries and probes too, so that the three outcomes add up to it."""
    outcomes = [s.outcome for s in evidence.served]
    return {
        **settings,
        "asked": evidence.asked,
        "requests": len(evidence.served),
        "succeeded": outcomes.count("finished"),
        "aborted": outcomes.count("aborted"),
        "failed": outcomes.count("failed"),
        "tokens_equal": check_tokens(evidence).ok,
        "pages_leaked": pages_leaked(evidence),
        "bytes_moved": sum(s.bytes_moved for s in evidence.served),
        "killed": evidence.killed,
        "ok": all(check.ok for check in checks),
        "checks": [attrs.asdict(check) for check in checks],
        "rooms": [
            {
                "number": s.number,
                "room": str(s.room),
                "prefill": s.prefill,
                "decode": s.decode,
                "prompt_tokens": s.prompt_tokens,
                "tokens": len(s.tokens),
                "bytes_moved": s.bytes_moved,
                "outcome": s.outcome,
                "plan": s.plan,
                "reason": s.reason,
                "causes": {side: result.cause for side, result in s.results.items() if result.cause},
            }
            for s in evidence.served
        ],
    }
