"""The demo as a user runs it, and its judgement: every check fails when what it checks is doctored."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import msgspec
import pytest

from pd_fsm.examples.engine import demo, scenario
from pd_fsm.examples.engine.display import PlainDisplay
from pd_fsm.examples.engine.messages import Report, Result, Role
from pd_fsm.examples.engine.report import AIMS, LATE_AIM, Aim, Check, Evidence, Served, as_json, judge, pages_leaked, table
from pd_fsm.runtime.timeline import Life, Line

LIVE_PHASES = ("BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING")
TOKENS = (3, 1, 4, 1, 5)
ANSWERED_BY = {"finished": "SUCCESS", "aborted": "FAILED", "failed": "FAILED"}


# A run by hand that passes every check


def result(room: int, side: Role, outcome: str, verdict: str = "", reason: str = "", cause: str = "") -> Result:
    tokens = list(TOKENS) if (side, outcome) == ("decode", "finished") else []
    name = f"{side}-0"
    return Result(name, room, side, outcome, verdict or ANSWERED_BY[outcome], reason, cause, tokens=tokens, bytes_moved=4096)  # type: ignore[arg-type]


def served(number: int, prefill: Result, decode: Result, **more: object) -> Served:
    tokens = tuple(decode.tokens)
    outcome, reason = decode.outcome, decode.reason
    results: dict[Role, Result] = {"prefill": prefill, "decode": decode}
    return Served(number, 1000 + number, 80, "prefill-0", "decode-0", outcome, reason, results, tokens, tokens, **more)  # type: ignore[arg-type]


def finished(number: int, **more: object) -> Served:
    return served(number, result(1000 + number, "prefill", "finished"), result(1000 + number, "decode", "finished"), **more)


def aborted(number: int, aim: Aim) -> Served:
    if aim == LATE_AIM:
        return finished(number, aim=aim)
    phase, side = aim
    why = {each: ("the client left", "abort" if each == side else "peer_abort") for each in ("prefill", "decode")}
    prefill = result(1000 + number, "prefill", "aborted", "", *why["prefill"])
    decode = result(1000 + number, "decode", "aborted", "", *why["decode"])
    if phase == "SUCCESS":
        prefill = result(1000 + number, "prefill", "finished")
        decode = result(1000 + number, "decode", "aborted", "SUCCESS", *why["decode"])
    return served(number, prefill, decode, aim=aim)


def lost(number: int) -> Served:
    prefill = result(1000 + number, "prefill", "failed", "", "worker prefill-0 (pid 5) died: killed", "worker_lost")
    decode = result(1000 + number, "decode", "failed", "", "prefill-0 is lost: its address refuses connections", "peer_lost")
    return served(number, prefill, decode, is_victim=True)


def record(life: Life, room: int, phases: Sequence[str], reason: str = "") -> None:
    """A room that goes through these phases, 1 ms each, and is cleared after a verdict."""
    before = ""
    steps = [*phases, ""] if phases[-1] in {"SUCCESS", "FAILED"} else list(phases)
    for after in steps:
        at_ms = life.end_ms + 1
        why = reason if after == "FAILED" else ""
        event = "step" if after else "clear"
        life.add(
            Line(
                t_ms=at_ms,
                session=life.session,
                machine="room",
                event=event,
                room=room,
                generation=1,
                before=before,
                after=after,
                reason=why,
            )
        )
        before = after


def lives_of(requests: Sequence[Served]) -> list[Life]:
    """What the traces of these requests would say: the killed worker's first life breaks off."""
    first = Life("prefill-0", "prefill", "aa", 5, 0, 0)
    second = Life("prefill-0", "prefill", "bb", 6, 500, 500, number=2, closed=True)
    decode = Life("decode-0", "decode", "cc", 7, 0, 0, closed=True)
    for s in requests:
        if s.lost_worker:
            record(first, s.room, LIVE_PHASES)
        for side, life in (("prefill", second), ("decode", decode)):
            answer = s.results[side]  # type: ignore[index]
            if answer.cause == "worker_lost":
                continue
            last = LIVE_PHASES.index(s.aim[0]) + 1 if s.aim is not None and s.aim[0] in LIVE_PHASES else 3
            record(life, s.room, (*LIVE_PHASES[:last], answer.verdict), answer.reason)
    for life in (first, second, decode):
        life.finish()
    return [first, second, decode]


def worker_report(name: str, pages_free: int = 10, rows_free: int = 4, live_rooms: int = 0) -> Report:
    role: Role = "prefill" if name.startswith("prefill") else "decode"
    return Report(name, "bb", role, pages_free, 10, rows_free, 4, 1, 1, 1, 4096, live_rooms, {})


def good() -> Evidence:
    requests = [aborted(number, aim) for number, aim in enumerate(AIMS, start=1)]
    requests += [finished(9), lost(10), finished(11, retry_of=10), finished(12, is_probe=True)]
    workers = ["prefill-0", "decode-0"]
    return Evidence(
        asked=10,
        served=requests,
        killed="prefill-0",
        killed_pid=5,
        workers=workers,
        reports={name: worker_report(name) for name in workers},
        exit_codes=dict.fromkeys(workers, 0),
        lives=lives_of(requests),
    )


def change(evidence: Evidence, number: int, **fields: object) -> Evidence:
    """Doctor one request."""
    requests = [attrs.evolve(s, **fields) if s.number == number else s for s in evidence.served]  # type: ignore[arg-type]
    return attrs.evolve(evidence, served=requests)


def answer(evidence: Evidence, number: int, side: Role, new: Result) -> Evidence:
    """Doctor what one side said of one request."""
    s = next(s for s in evidence.served if s.number == number)
    return change(evidence, number, results={**s.results, side: new})


def failing(evidence: Evidence) -> set[str]:
    return {check.name for check in judge(evidence) if not check.ok}


def test_a_good_run_passes_every_check() -> None:
    assert [(check.name, check.detail) for check in judge(good()) if not check.ok] == []


DOCTORED: list[tuple[str, Callable[[Evidence], Evidence], str]] = [
    ("one token differs", lambda e: change(e, 9, tokens=(3, 1, 4, 1, 6)), "tokens equal"),
    ("a token is missing", lambda e: change(e, 9, tokens=TOKENS[:-1]), "tokens equal"),
    ("nothing was generated", lambda e: change(e, 9, tokens=(), expected=()), "tokens equal"),
    (
        "the sides count other bytes",
        lambda e: answer(e, 9, "prefill", msgspec.structs.replace(e.served[8].results["prefill"], bytes_moved=4095)),
        "same bytes",
    ),
    (
        "no byte moved",
        lambda e: change(
            e, 9, results={side: msgspec.structs.replace(r, bytes_moved=0) for side, r in e.served[8].results.items()}
        ),
        "same bytes",
    ),
    ("nothing finished", lambda e: attrs.evolve(e, served=[s for s in e.served if s.outcome != "finished"]), "tokens equal"),
    ("a side never answered", lambda e: change(e, 9, results={"decode": result(1009, "decode", "finished")}), "got its answer"),
    ("a request was not sent", lambda e: attrs.evolve(e, asked=11), "got its answer"),
    ("two requests share a room", lambda e: change(e, 9, room=1010), "got its answer"),
    ("a kind of abort is missing", lambda e: change(e, 3, aim=AIMS[0]), "aborts in every phase"),
    ("an aborted request finished", lambda e: change(e, 5, outcome="finished"), "aborts in every phase"),
    ("a late abort took effect", lambda e: change(e, 8, outcome="aborted"), "aborts in every phase"),
    ("an abort hit another phase", lambda e: change(change(e, 3, aim=AIMS[4]), 5, aim=AIMS[2]), "aborts in every phase"),
    ("an abort without a reason", lambda e: change(e, 5, reason=""), "says why"),
    (
        "a side without a reason",
        lambda e: answer(e, 5, "prefill", result(1005, "prefill", "aborted", "", "", "peer_abort")),
        "says why",
    ),
    ("the router had to tell", lambda e: change(e, 5, was_told=True), "through pd-fsm"),
    (
        "the router made it up",
        lambda e: answer(e, 5, "decode", result(1005, "decode", "failed", "", "silent", "router")),
        "through pd-fsm",
    ),
    ("the failure names nobody", lambda e: change(e, 10, reason="something broke"), "killed worker"),
    ("a victim survived", lambda e: change(e, 10, outcome="finished"), "killed worker"),
    ("the lost one was not retried", lambda e: change(e, 11, retry_of=None), "killed worker"),
    ("a probe failed", lambda e: change(e, 12, outcome="failed", reason="timeout"), "restarted worker"),
    ("no probe was sent", lambda e: change(e, 12, is_probe=False), "restarted worker"),
    ("a probe ran in the first life", lambda e: attrs.evolve(e, lives=[e.lives[1], e.lives[0], e.lives[2]]), "restarted worker"),
    ("a bystander failed", lambda e: change(e, 9, outcome="failed", reason="timeout"), "all other requests"),
    (
        "a page is missing",
        lambda e: attrs.evolve(e, reports={**e.reports, "decode-0": worker_report("decode-0", pages_free=9)}),
        "pages came back",
    ),
    (
        "an aux row is missing",
        lambda e: attrs.evolve(e, reports={**e.reports, "decode-0": worker_report("decode-0", rows_free=3)}),
        "pages came",
    ),
    (
        "a room is left",
        lambda e: attrs.evolve(e, reports={**e.reports, "prefill-0": worker_report("prefill-0", live_rooms=1)}),
        "pages came",
    ),
    ("a worker did not report", lambda e: attrs.evolve(e, reports={"decode-0": worker_report("decode-0")}), "pages came back"),
    ("a trace is missing", lambda e: attrs.evolve(e, lives=e.lives[:2]), "traces are complete"),
    (
        "a trace says otherwise",
        lambda e: answer(e, 9, "prefill", result(1009, "prefill", "finished", "FAILED")),
        "traces are complete",
    ),
    (
        "a trace was not closed",
        lambda e: attrs.evolve(e, lives=[*e.lives[:2], attrs.evolve(e.lives[2], closed=False)]),
        "traces are complete",
    ),
    ("a worker crashed at the end", lambda e: attrs.evolve(e, exit_codes={**e.exit_codes, "decode-0": 1}), "ended cleanly"),
    ("a worker had to be killed", lambda e: attrs.evolve(e, exit_codes={**e.exit_codes, "decode-0": None}), "ended cleanly"),
]


@pytest.mark.parametrize(("doctor", "check"), [case[1:] for case in DOCTORED], ids=[case[0] for case in DOCTORED])
def test_a_doctored_run_fails_the_check(doctor: Callable[[Evidence], Evidence], check: str) -> None:
    names = failing(doctor(good()))
    assert any(check in name for name in names), names


def test_the_report_counts_outcomes_leaks_and_bytes() -> None:
    evidence = attrs.evolve(good(), reports={"decode-0": worker_report("decode-0", pages_free=7, rows_free=3)})
    evidence = change(evidence, 9, tokens=(9,))
    assert pages_leaked(evidence) == 4
    content = as_json(evidence, judge(evidence), {"transport": "zmq"})
    assert (content["requests"], content["succeeded"], content["aborted"], content["failed"]) == (12, 4, 7, 1)
    assert (content["tokens_equal"], content["pages_leaked"], content["bytes_moved"], content["ok"]) == (False, 4, 12 * 4096, False)
    json.dumps(content)


def test_the_table_shows_each_request_with_its_phases_and_reason() -> None:
    rows = table(good())
    assert len(rows) == 12
    by_number = {row[0]: row for row in rows}
    assert by_number["10"][9:] == ("failed", "held for the kill", "prefill-0 is lost: its address refuses connections")
    assert by_number["3"][4:7] == ("1.0", "1.0", ""), "aborted while it waited for input: never moved"
    assert by_number["11"][10] == "retry of 10"


@pytest.mark.parametrize("requests", [scenario.REQUESTS_MIN, 48, 100])
def test_the_plan_has_every_abort_the_victims_and_some_that_just_run(requests: int) -> None:
    planned = scenario.plan(requests, seed=3)
    assert len(planned) == requests
    assert {p.aim for p in planned if p.aim} == set(AIMS)
    assert sum(p.is_victim for p in planned) == len(scenario.VICTIM_HOLDS)
    assert any(p.aim is None and not p.is_victim for p in planned)
    assert planned == scenario.plan(requests, seed=3) != scenario.plan(requests, seed=4)


@pytest.mark.parametrize("argument", ["--requests=2", "--prefill=0", "--decode=x", "--seed=-1"])
def test_senseless_options_are_refused(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.parse([argument])
    assert ended.value.code == 2
    assert argument.split("=", maxsplit=1)[0] in capsys.readouterr().err


def test_a_failed_check_is_printed_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay(sys.stdout).checks(
        [Check("all pages came back", False, "decode-0 has 9 of 10 pages"), Check("tokens", True, "fine")]
    )
    assert capsys.readouterr().out == "FAIL  all pages came back: decode-0 has 9 of 10 pages\nOK    tokens: fine\n"


# The real thing


def start_demo(out: Path, *options: str) -> subprocess.Popen[str]:
    """As its own process group, so that a test's interrupt reaches it and nothing else."""
    return subprocess.Popen(
        [sys.executable, "-m", "pd_fsm.examples.engine.demo", "--out", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float) -> str:
    """What it printed. The demo ends its own children, so it is asked to before it is killed."""
    try:
        return process.communicate(timeout=timeout_s)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        printed, _ = process.communicate(timeout=20)
        pytest.fail(f"the demo was not done after {timeout_s} s; it printed:\n{printed}")


def pids_of(out: Path) -> set[int]:
    """Every worker process of a run, from the first line of its trace."""
    return {int(json.loads(trace.read_text().split("\n", 1)[0])["pid"]) for trace in (out / "traces").glob("*.ndjson")}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(150)
def test_the_demo_serves_aborts_survives_a_kill_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = start_demo(out, "--requests", "14", "--seed", "5")
    printed = finish(process, timeout_s=120)
    assert process.returncode == 0, printed
    assert "FAIL" not in printed
    assert printed.count("\nOK ") == len(judge(good()))
    content = json.loads((out / "report.json").read_text())
    assert content["ok"] is True
    assert content["tokens_equal"] is True
    assert content["pages_leaked"] == 0
    assert content["transport"] == "zmq"
    assert content["bytes_moved"] > 100_000
    assert content["requests"] == content["succeeded"] + content["aborted"] + content["failed"]
    assert content["requests"] >= 14 + content["failed"] + scenario.PROBES
    assert content["aborted"] == len(AIMS) - 1
    assert content["failed"] >= len(scenario.VICTIM_HOLDS)
    words = "".join(ET.parse(out / "timeline.svg").getroot().itertext())
    assert "prefill-0 died" in words
    assert "prefill-0 restarted" in words
    slices = [event for event in json.loads((out / "trace.perfetto.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {"BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS", "FAILED"} <= {event["name"] for event in slices}
    assert not any(is_running(pid) for pid in pids_of(out))


@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_ends_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "demo"
    process = start_demo(out)
    assert process.stdout is not None
    line = ""
    while "serving on" not in line:
        line = process.stdout.readline()
        assert line, "the demo ended before it served"
    pids = pids_of(out)
    assert len(pids) == 3
    process.send_signal(number)
    printed = finish(process, timeout_s=30)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    assert not any(is_running(pid) for pid in pids), "a worker outlived the demo"


@pytest.mark.timeout(90)
def test_a_demo_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    process = start_demo(out, "--transport", "pigeon")
    printed = finish(process, timeout_s=60)
    assert process.returncode == 1, printed
    assert "pigeon" in printed
    assert re.search(r"(prefill|decode)-\d \(pid \d+\) ended with 1", printed)
