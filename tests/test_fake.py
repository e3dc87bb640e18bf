"""The fake transport: both roles, bootstrap included; every scripted end in every phase; a real session under it."""

from __future__ import annotations

import numpy as np
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.transports.fake import ENDS, Script

DEADLINES = pd_fsm.Deadlines(bootstrap_ms=150, waiting_ms=150, transfer_ms=150)


def layout() -> pd_fsm.KVLayout:
    return pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((32, 16, 4), np.float32)], 16), pd_fsm.rows("aux", np.zeros((8, 2)))])


def fake_session(role: str, script: object = None, *, thread: bool = True) -> pd_fsm.Session:
    options = {"script": script} if script is not None else {}
    return pd_fsm.open_session(role, layout(), transport="fake", transport_options=options, deadlines=DEADLINES, thread=thread)


def open_room(session: pd_fsm.Session, role: str, room: int) -> pd_fsm.Handle:
    if role == "decode":
        return session.receive(room, [1, 2, 3], aux=1)
    sender = session.send(room)
    sender.send([4], (0, 16))
    sender.send([5, 6], (16, 40), last=True, aux=0)
    return sender


def at_rest(session: pd_fsm.Session) -> bool:
    seen = session.describe()
    return not (seen["ops"] or seen["links"] or seen["leases"] or seen["repeats"])


@pytest.mark.parametrize("thread", [True, False])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_room_bootstraps_and_succeeds_without_a_peer(role: str, thread: bool) -> None:
    with fake_session(role, thread=thread) as session:
        for room in range(5):
            handle = open_room(session, role, room)
            assert handle.wait(5) is Phase.SUCCESS
            assert handle.poll() == 4
            assert handle.pages_free
            handle.clear()
        assert at_rest(session)


# What the session makes of each scripted end: the phase in which it happens decides whether it can be seen at all.
EXPECTED = {
    ("prefill", "fail", Phase.BOOTSTRAPPING): "protocol",
    ("prefill", "abort", Phase.BOOTSTRAPPING): "protocol",
    ("prefill", "silence", Phase.BOOTSTRAPPING): "timeout",
    ("prefill", "fail", Phase.TRANSFERRING): "transport",
    ("prefill", "abort", Phase.TRANSFERRING): "peer_abort",
    ("prefill", "silence", Phase.TRANSFERRING): "timeout",
    ("decode", "fail", Phase.BOOTSTRAPPING): "peer_lost",
    ("decode", "abort", Phase.BOOTSTRAPPING): "peer_lost",
    ("decode", "silence", Phase.BOOTSTRAPPING): "timeout",
    ("decode", "fail", Phase.WAITING_FOR_INPUT): "peer_failed",
    ("decode", "abort", Phase.WAITING_FOR_INPUT): "peer_abort",
    ("decode", "silence", Phase.WAITING_FOR_INPUT): "timeout",
    ("decode", "fail", Phase.TRANSFERRING): "peer_failed",
    ("decode", "abort", Phase.TRANSFERRING): "peer_abort",
    ("decode", "silence", Phase.TRANSFERRING): "timeout",
}


@pytest.mark.parametrize(("role", "end", "at"), EXPECTED)
def test_a_scripted_end_fails_the_room_and_no_other(role: str, end: str, at: Phase) -> None:
    doomed = Script(end=end, at=at, reason="the script says so")
    with fake_session(role, lambda room: doomed if room == 66 else Script()) as session:
        before, failed, after = (open_room(session, role, room) for room in (1, 66, 2))
        assert failed.wait(5) is Phase.FAILED
        assert failed.failure is not None
        assert failed.failure.cause == EXPECTED[role, end, at]
        if failed.failure.cause in ("peer_abort", "peer_failed", "transport"):
            assert "the script says so" in failed.failure.reason
        failed.wait_pages_free(5)
        assert before.wait(5) is Phase.SUCCESS
        assert after.wait(5) is Phase.SUCCESS
        for handle in (before, failed, after):
            handle.clear()
        assert failed.poll() == Phase.FAILED, "the verdict stays readable after clear()"


@pytest.mark.parametrize("end", ["fail", "abort"])
def test_a_decode_that_leaves_before_anything_was_sent_aborts_the_sender(end: str) -> None:
    with fake_session("prefill", Script(end=end, at=Phase.WAITING_FOR_INPUT, reason="left early")) as session:
        sender = session.send(1)
        assert sender.wait(5) is Phase.FAILED
        assert sender.failure is not None
        assert sender.failure.cause == "peer_abort"
        assert "left early" in sender.failure.reason


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_an_abort_gives_failed_for_good(role: str) -> None:
    slow = Script(delay_ms=30)
    with fake_session(role, slow) as session:
        handle = open_room(session, role, 1)
        handle.abort("client left")
        assert handle.poll() == Phase.FAILED, "the verdict is there when abort() returns"
        # The scripted answers of a success still arrive; a second room's success shows that their time has passed.
        assert open_room(session, role, 2).wait(5) is Phase.SUCCESS
        assert handle.poll() == Phase.FAILED
        assert handle.failure == pd_fsm.Failure("abort", "client left")
        handle.wait_pages_free(5)


def test_a_delay_keeps_the_room_live_until_it_is_over() -> None:
    with fake_session("decode", Script(delay_ms=20), thread=False) as session:
        handle = open_room(session, "decode", 1)
        session.progress()
        assert handle.phase is Phase.BOOTSTRAPPING
        assert handle.wait(5) is Phase.SUCCESS


def test_a_script_must_be_one() -> None:
    with pytest.raises(pd_fsm.ConfigError, match="script must be a Script"):
        fake_session("decode", "fail please")
    with pytest.raises(ValueError, match="end"):
        Script(end="explode")
    assert "success" in ENDS
