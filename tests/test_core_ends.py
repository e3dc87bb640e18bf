"""The core's unusual ends: cancelled by number, drained sessions, nothing to send, dead writers, too much memory in doubt."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import Phase
from tests.pair import Pair, Side, met, pages

# --- cancelled by number -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["p", "d"])
def test_cancel_before_the_room_is_opened(pair: Pair, side: str) -> None:
    actor: Side = getattr(pair, side)
    actor.step(ev.CancelRequested(7, "client left"))
    room = pair.send(7) if side == "p" else pair.receive(7)
    assert actor.failure() == ev.Failure("abort", "client left")
    assert actor.released == [(7, room.generation)]
    actor.clear(room)
    room = pair.send(7) if side == "p" else pair.receive(7)
    assert room.live, "a cancel is for one life of the room"


def test_cancel_answers_the_offers_that_wait(pair: Pair) -> None:
    pair.receive(7)
    pair.receive(8)
    pair.deliver()
    pair.p.step(ev.CancelRequested(7, "client left"))
    pair.deliver()
    assert pair.d.failure().reason == "prefill-0 aborted: client left"
    assert pair.d.phase(8) is Phase.WAITING_FOR_INPUT
    pair.receive(9)
    pair.deliver()
    pair.p.step(ev.CancelRequested(10, "client left"))
    pair.receive(10)
    pair.deliver()
    assert pair.d.failure(10).reason == "prefill-0 aborted: client left"


def test_cancel_aborts_an_open_room(pair: Pair) -> None:
    sending, _ = pair.transferring(7)
    pair.p.step(ev.CancelRequested(7, "client left"))
    assert pair.p.failure().cause == "abort"
    pair.finish()
    pair.deliver()
    pair.idle()
    pair.p.clear(sending)
    assert pair.send(7).live


def test_cancel_of_a_room_that_was_given_up_hits_its_retry(pair: Pair) -> None:
    sending = pair.send(7)
    pair.p.abort(sending, "retracted")
    assert pair.p.step(ev.CancelRequested(7, "client left")) == []
    assert pair.p.failure().reason == "retracted"
    pair.p.clear(sending)
    sending = pair.send(7)
    assert pair.p.failure() == ev.Failure("abort", "client left")
    pair.p.clear(sending)
    assert pair.send(7).live


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_cancel_that_comes_late_does_not_hit_the_next_life(pair: Pair, side: str) -> None:
    sending, receiving = pair.transferring(7)
    pair.finish()
    pair.deliver()
    pair.p.clear(sending)
    pair.d.clear(receiving)
    actor: Side = getattr(pair, side)
    actor.step(ev.CancelRequested(7, "client left"))
    assert actor.core.counts["late.cancel"] == 1
    pair.transferring(7)
    pair.finish()
    pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.SUCCESS


def test_a_cancel_lapses() -> None:
    pair = met(Deadlines(tombstone_ms=1_000))
    pair.p.step(ev.CancelRequested(7, "client left"))
    pair.advance(1_000)
    assert pair.send(7).live


# --- drained sessions --------------------------------------------------------------------------------------------------------


def test_a_drained_prefill_finishes_what_runs_and_takes_nothing_new(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.receive(8)
    pair.deliver()
    pair.p.step(ev.DrainRequested("rolling update"))
    assert pair.p.step(ev.DrainRequested("again")) == []
    with pytest.raises(LocalProtocolError, match=r"is being drained \(rolling update\)"):
        pair.send(9)
    pair.deliver()
    assert "rolling update" in pair.d.failure(8).reason
    waiting = pair.receive(10)  # the rendezvous still lists it
    assert not waiting.links
    assert "is being drained" in waiting.lookup_reason
    pair.p.tell(wire.Offer(11, 99, pages(1), -1, 0))
    (verdict,) = pair.pending(wire.Verdict)
    assert isinstance(verdict, wire.Verdict)
    assert (verdict.success, verdict.cause) == (False, "shutdown")
    pair.finish()
    pair.deliver()
    assert sending.state is receiving.state is Phase.SUCCESS


# --- a rank with nothing to send ---------------------------------------------------------------------------------------------


def test_a_rank_without_readers_succeeds_with_its_last_chunk(pair: Pair) -> None:
    sending = pair.send(7, readers=0)
    assert sending.state is Phase.WAITING_FOR_INPUT
    pair.chunk(7, 0, 16, (1,), last=False)
    assert sending.state is Phase.TRANSFERRING
    pair.chunk(7, 16, 32, (2,), last=True)
    assert sending.state is Phase.SUCCESS
    assert pair.p.released == [(7, sending.generation)]
    assert not pair.writes
    pair.idle()


# --- bytes of a dead process that may still be in the network ----------------------------------------------------------------


def test_pages_of_a_dead_writer_wait_for_the_residual_time(pair: Pair) -> None:
    pair.d.core.identity.residual_ms = 3_000
    _, receiving = pair.transferring(7)
    pair.gone(pair.p)
    pair.d.step(ev.PeerUnreachable(b"P" * 16, "connection refused", dead=True))
    assert pair.d.failure().cause == "peer_lost"
    pair.d.step(ev.PeerUnreachable(b"P" * 16, "connection refused", dead=True))
    pair.advance(2_999)
    assert not pair.d.released
    pair.advance(1)
    assert pair.d.released == [(7, receiving.generation)]
    pair.idle()
    assert not pair.d.core.peers


# --- memory in doubt is bounded ----------------------------------------------------------------------------------------------


def two_in_doubt(policy: str) -> Pair:
    pair = Pair(limits=Limits(quarantined_rooms_max=2, on_quarantine_full=policy))
    pair.meet()
    for room in (7, 8, 9):
        pair.transferring(room)
    for op in list(pair.writes)[:2]:
        pair.p.step(ev.WriteUnknown(op, "timed out"))
        pair.p.step(ev.WriteUnknown(op, "timed out again"))
    pair.deliver()
    return pair


def test_no_room_is_opened_while_too_much_memory_is_in_doubt() -> None:
    pair = two_in_doubt("stop_admitting")
    assert pair.p.core.describe()["quarantined_rooms"] == 2
    with pytest.raises(LocalProtocolError, match=r"memory of 2 rooms is in doubt \(Limits\.quarantined_rooms_max\)"):
        pair.send(10)
    pair.finish()
    pair.deliver()
    assert pair.p.core.describe()["quarantined_rooms"] == 0
    assert pair.p.phase(9) is Phase.SUCCESS, "what runs goes on"
    assert pair.send(10).live
    assert len(pair.p.released) == 3


def test_a_fail_stop_session_ends_when_too_much_memory_is_in_doubt() -> None:
    pair = two_in_doubt("fail_stop")
    assert pair.p.failure(9).cause == "shutdown"
    assert "fail_stop" in pair.p.failure(9).reason
    with pytest.raises(LocalProtocolError, match="is closing"):
        pair.send(10)
    assert not pair.p.released
    pair.finish()
    pair.deliver()
    pair.idle()
