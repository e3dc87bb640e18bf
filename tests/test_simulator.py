"""The simulator: that it is deterministic, that it holds, and above all that it finds what is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pd_fsm import cli
from pd_fsm.core import events as ev
from pd_fsm.core import peers, receiver, sender, session, wire
from pd_fsm.core.ledger import Link, Peer, Room
from pd_fsm.core.registry import Registry
from pd_fsm.core.session import SessionCore
from pd_fsm.kv.landing import Landing
from pd_fsm.machines import LEASE, PEER, ROOM
from pd_fsm.runtime.session import Handle
from pd_fsm.runtime.timeline import timeline
from pd_fsm.testing import race
from pd_fsm.testing.minimise import minimise
from pd_fsm.testing.sim_schedule import Schedule, draw_schedule
from pd_fsm.testing.simulator import Result, replay, simulate

SEEDS = 60
FOUND_WITHIN = 60
SCHEDULES = sorted((Path(__file__).parent / "schedules").glob("*.json"))
"""Schedules that failed once, minimised. (A seed means another run as soon as what is drawn from it changes.)"""


def digests(seeds: range) -> str:
    return " ".join(simulate(seed).digest for seed in seeds)


# --- one seed, one run -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_in_every_process() -> None:
    """Also where the order of sets of bytes differs."""
    code = "from tests.test_simulator import digests; print(digests(range(6)))"
    environment = os.environ | {"PYTHONHASHSEED": "4711"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert answer.stdout.split() == digests(range(6)).split()


def test_different_seeds_differ() -> None:
    assert len(set(digests(range(8)).split())) == 8


def test_a_run_is_its_schedule_and_its_fates() -> None:
    """What the minimiser builds on: with its fates written out, a run is the same."""
    fates = 0
    for seed in range(8):
        schedule = draw_schedule(seed)
        drawn = replay(schedule)
        written = Schedule(seed, schedule.options, schedule.acts, drawn.fates)
        assert replay(written).digest == drawn.digest
        fates += len(drawn.fates)
    assert fates > 100


def test_a_story_does_not_change_the_run() -> None:
    told = simulate(3, story=True)
    assert told.digest == simulate(3).digest
    assert len(told.story) == told.events


# --- it holds ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report() -> race.Report:
    return race.run_seeds(range(SEEDS))


def test_seeds_hold(report: race.Report) -> None:
    assert report.failures == []
    assert report.events > 800 * SEEDS
    assert report.rooms > 40 * SEEDS


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda path: path.stem)
def test_schedules_that_failed_once(path: Path) -> None:
    assert replay(msgspec.json.decode(path.read_bytes(), type=Schedule)).failure == ""


def test_the_schedule_of_a_lost_peer_that_is_met_anew_fails_without_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_tell_over", _nothing)
    path = next(path for path in SCHEDULES if path.stem == "lost-and-met-anew")
    assert replay(msgspec.json.decode(path.read_bytes(), type=Schedule)).kind == "not concluded"


def test_the_seeds_reach_what_they_are_for(report: race.Report) -> None:
    """Every row of every machine, every way to end, and the messages that only trouble brings."""
    rows = {row.id for table in (ROOM, LEASE, PEER) for row in table.rows()}
    assert rows - set(report.coverage) == set()
    ends = {"SUCCESS", "refused", "abort", "peer_abort", "peer_failed", "peer_lost", "timeout", "transport", "protocol", "shutdown"}
    assert ends <= set(report.outcomes)
    seen = {
        "misdirected",
        "stranger",
        "wire_error",
        "duplicate.part",
        "late.computed",
        "late.write_unknown",
        "late.cancel",
    }
    assert {name for name in seen if not report.counts[name]} == set()
    assert report.counts["succeeded"] > report.rooms / 2


# --- it finds what is broken -------------------------------------------------------------------------------------------------

_receiver_failed, _sender_failed, _on_abort, _lose = receiver.failed, sender.failed, sender.on_abort, peers.lose
_on_part, _tell, _fail = receiver.on_part, sender._tell, SessionCore.fail


def _nothing(*_: object) -> None:
    pass


def _decode_frees_at_once(core: SessionCore, room: Room) -> None:
    _receiver_failed(core, room)
    for holder in list(room.lease.holders):
        core.settle(room, holder)


def _prefill_frees_at_once(core: SessionCore, room: Room) -> None:
    _sender_failed(core, room)
    for holder in list(room.lease.holders):
        core.settle(room, holder)


def _abort_after_clear_is_ignored(core: SessionCore, source: bytes, message: wire.Abort) -> None:
    if (source, message.generation) in core.links:
        _on_abort(core, source, message)


def _drained_before_the_writes_ended(core: SessionCore, source: bytes, message: wire.Abort) -> None:
    _on_abort(core, source, message)
    core.emit(ev.Send(source, wire.Drained(message.room, message.generation)))


def _silence_is_death(core: SessionCore, peer: Peer, reason: str, *, dead: bool) -> None:
    _lose(core, peer, reason, dead=True)


def _any_part_is_enough(room: Room) -> bool:
    return bool(room.links) and all(link.chunks_confirmed for link in room.links.values())


def _residual_is_over(core: SessionCore, link: Link) -> None:
    core.answered("abort", link.peer, link.generation)
    receiver.writer_gone(core, link)


def _the_last_reason_wins(core: SessionCore, room: Room, failure: ev.Failure) -> bool:
    room.failure = failure
    return _fail(core, room, failure)


def _parts_count_twice(core: SessionCore, peer: Peer, message: wire.Part) -> None:
    link = core.links.get((peer.incarnation, message.generation))
    if link is not None:
        link.chunks_confirmed.discard(message.chunk)
    _on_part(core, peer, message)


def _cleared_handles_keep_their_slot(handle: Handle) -> None:
    handle.cleared = True


BREACHES = {
    "bytes miscounted",
    "cancel lost",
    "failed without a cause",
    "false confirmation",
    "false drained",
    "false success",
    "freed too early",
    "landed in free pages",
    "mixed sources",
    "not concluded",
    "not forgotten",
    "probe failed",
    "read from free pages",
    "reason and phase differ",
    "reason changed",
    "terminal left",
    "told nobody",
    "write after drained",
    "wrong bytes",
}
"""What the planted bugs lead to, in the simulator's words; anything else would be a mistake of the simulator."""


def _verdicts_are_kept(core: SessionCore, link: Link) -> None:
    if link.room.failure is None:
        _tell(core, link)


PLANTED: dict[str, tuple[Any, Any, Callable[..., Any]]] = {
    "decode's pages are free when it aborts": (receiver, "failed", _decode_frees_at_once),
    "prefill's pages are free when it aborts": (sender, "failed", _prefill_frees_at_once),
    "a concluded generation can be opened again": (Peer, "spend", _nothing),
    "an abort after clear() is ignored": (sender, "on_abort", _abort_after_clear_is_ignored),
    "drained is said while writes are outstanding": (sender, "on_abort", _drained_before_the_writes_ended),
    "an unknown outcome is taken for a failure": (
        session._HANDLERS,
        ev.WriteUnknown,
        sender.on_write_failed,
    ),
    "silence is taken for death": (peers, "lose", _silence_is_death),
    "any part is enough for success": (Room, "all_confirmed", _any_part_is_enough),
    "a revoked grant stays open": (Landing, "revoke", _nothing),
    "a landing is not checked": (Landing, "check", _nothing),
    "nothing is repeated": (SessionCore, "_repeat_due", _nothing),
    "bytes of the dead are forgotten": (receiver, "writer_dead", _residual_is_over),
    "the last reason wins": (SessionCore, "fail", _the_last_reason_wins),
    "a dead peer is looked for where it was": (peers, "forget_directory", _nothing),
    "a successor proves nothing": (peers, "absent", _nothing),
    "no room has a deadline": (SessionCore, "_room_deadline", _nothing),
    "prefill tells nobody that it failed": (sender, "_tell", _verdicts_are_kept),
    "a cancel of a room that is not open is forgotten": (Registry, "cancel", _nothing),
    "a cleared handle reads the next room": (Handle, "latch", _cleared_handles_keep_their_slot),
    "a part counts as often as it comes": (peers._RECEIVER_MESSAGES, wire.Part, _parts_count_twice),
}


def plant(patch: pytest.MonkeyPatch, bug: str) -> None:
    where, name, wrong = PLANTED[bug]
    if isinstance(where, dict):
        patch.setitem(where, name, wrong)
    else:
        patch.setattr(where, name, wrong)


def first_failure(bug: str) -> Result:
    for seed in range(FOUND_WITHIN):
        result = simulate(seed)
        if result.failure:
            return result
    raise AssertionError(f"{FOUND_WITHIN} seeds do not find that {bug}")


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    plant(monkeypatch, bug)
    assert first_failure(bug).kind in BREACHES


@pytest.mark.parametrize(
    ("bug", "acts_max"),
    [("decode's pages are free when it aborts", 3), ("bytes of the dead are forgotten", 3), ("a revoked grant stays open", 3)],
)
def test_a_failing_seed_is_minimised(monkeypatch: pytest.MonkeyPatch, bug: str, acts_max: int) -> None:
    plant(monkeypatch, bug)
    failed = first_failure(bug)
    schedule = draw_schedule(failed.seed)
    small, _ = minimise(schedule, failed)
    again = replay(small, story=True)
    assert again.kind == failed.kind
    assert len(small.acts) <= acts_max < len(schedule.acts)
    assert small.fates is not None
    assert len(small.fates) <= 2
    lines = race.story(small, again)
    assert lines[-1].endswith(f"VIOLATION {again.failure}")
    assert len(lines) < 160


def test_a_failure_that_does_not_repeat_is_told_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    results = [simulate(3), simulate(4)]
    for result in results:
        result.failure = "wrong bytes: somewhere"
    monkeypatch.setattr(race, "simulate", lambda _, **__: results.pop())
    assert race.run_twice_if_it_fails(3).kind == "not deterministic"


def test_nothing_to_minimise() -> None:
    with pytest.raises(ValueError, match="seed 3 did not fail"):
        minimise(draw_schedule(3), simulate(3))


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_writes_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "out" / "race.json"
    assert cli.main(["race", "--sim", "--seeds", "4", "--first", "2", "--json", str(report)]) == 0
    figures = json.loads(report.read_text())
    assert figures["seeds"] == 4
    assert figures["failures"] == []
    assert figures["events"] > 400
    assert figures["coverage"]["room.start:WAITING_FOR_INPUT"] > 0
    assert "4 seeds" in capsys.readouterr().out


def test_the_command_repeats_and_explains_a_failing_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bug = "decode's pages are free when it aborts"
    plant(monkeypatch, bug)
    seed = first_failure(bug).seed
    assert race.main(["--sim", "--seeds", str(seed + 1)]) == 1
    assert f"pd-fsm race --sim --seed {seed} --minimise" in capsys.readouterr().err
    saved = tmp_path / "schedule.json"
    assert race.main(["--sim", "--seed", str(seed), "--minimise", "--save", str(saved)]) == 1
    told = capsys.readouterr().out
    assert "FAILED freed too early" in told
    assert f"repeat: pd-fsm race --sim --seed {seed} --minimise" in told
    assert race.main(["--sim", "--schedule", str(saved)]) == 1
    monkeypatch.undo()
    assert race.main(["--sim", "--schedule", str(saved)]) == 0


def test_a_run_leaves_a_trace_that_the_timeline_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.ndjson"
    assert race.main(["--sim", "--seed", "5", "--trace", str(path)]) == 0
    assert race.main(["--sim", "--seeds", "2", "--first", "5", "--traces", str(tmp_path / "traces")]) == 0
    assert (tmp_path / "traces" / "5.ndjson").read_text().splitlines()[1:] == path.read_text().splitlines()[1:]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    result = simulate(5)
    assert sum(result.coverage.values()) == len([line for line in lines if line["machine"] != "session"])
    assert {line["session"] for line in lines} >= {"P0.1", "D0.1"}
    lives = timeline([path], svg=tmp_path / "picture.svg", perfetto=None)
    assert len(lives) == len([line for line in lines if line["machine"] == "session" and line["event"] == "open"])
