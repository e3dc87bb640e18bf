"""The core's aborts: from either side, in every phase; a verdict at once, and one reason for both sides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.machines import LeaseState, Phase
from tests.pair import Pair, both_waiting, releases, settle_everything

# --- abort in every phase ----------------------------------------------------------------------------------------------------


def both_transferring(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (10, 11, 12))
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.finish()
    pair.deliver()
    pair.chunk(7, 16, 48, (2, 3), last=True, aux_row=0)
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.TRANSFERRING


def offer_in_flight(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7)
    assert pair.pending(wire.Offer)


LIVE = [both_waiting, both_transferring, offer_in_flight]


@pytest.mark.parametrize("prepare", LIVE)
def test_decode_aborts(pair: Pair, prepare: Callable[[Pair], None]) -> None:
    prepare(pair)
    sending, receiving = pair.p.room(7), pair.d.room(7)
    effects = pair.d.abort(receiving)
    assert effects[0] == ev.Publish(7, receiving.generation, Phase.FAILED)
    assert pair.d.failure() == ev.Failure("abort", "client left")
    assert receiving.lease.state is LeaseState.REVOKING
    assert not pair.d.released
    assert pair.d.abort(receiving, "again") == []
    assert pair.d.failure().reason == "client left"  # the first one stands
    pair.deliver()
    assert pair.p.failure() == ev.Failure("peer_abort", "decode-0 aborted: client left", "decode-0")
    assert releases(pair.d, receiving) == (0 if pair.writes else 1)
    assert [e.op for e in pair.p.did(ev.Cancel)] == list(pair.writes)
    settle_everything(pair)
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1
    assert not pair.p.sent(wire.Verdict)  # decode knows: it gave the room up


@pytest.mark.parametrize("prepare", LIVE)
def test_prefill_aborts(pair: Pair, prepare: Callable[[Pair], None]) -> None:
    prepare(pair)
    sending, receiving = pair.p.room(7), pair.d.room(7)
    effects = pair.p.abort(sending, "out of memory")
    assert effects[0] == ev.Publish(7, sending.generation, Phase.FAILED)
    assert pair.p.failure() == ev.Failure("abort", "out of memory")
    pair.deliver()
    assert pair.d.failure() == ev.Failure("peer_abort", "prefill-0 aborted: out of memory", "prefill-0")
    assert releases(pair.p, sending) == releases(pair.d, receiving) == (0 if pair.writes else 1)
    settle_everything(pair)
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1


@pytest.mark.parametrize("prepare", LIVE)
def test_both_abort_at_once(pair: Pair, prepare: Callable[[Pair], None]) -> None:
    prepare(pair)
    sending, receiving = pair.p.room(7), pair.d.room(7)
    pair.p.abort(sending)
    pair.d.abort(receiving)
    settle_everything(pair)
    assert pair.p.failure().cause == pair.d.failure().cause == "abort"
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1


@pytest.mark.parametrize("side", ["p", "d"])
def test_abort_without_a_peer_frees_at_once(side: str) -> None:
    pair = Pair()
    if side == "p":
        actor, room = pair.p, pair.send(7)
    else:
        pair.d.step(ev.OpenReceive(7, {"kv": b""}, address="x"))
        actor, room = pair.d, pair.d.room(7)
    effects = actor.abort(room)
    assert effects == [ev.Publish(7, room.generation, Phase.FAILED), ev.ReleasePages(7, room.generation)]
    pair.idle()
    if side == "d":  # what the rendezvous answers now comes too late
        assert pair.d.step(ev.PeersFound(room.generation, (pair.record(),))) == []
        assert pair.d.core.counts["late.peers_found"] == 1


def test_abort_while_the_peer_is_connecting() -> None:
    pair = Pair()
    receiving = pair.receive(7)
    pair.d.abort(receiving)
    assert releases(pair.d, receiving) == 1  # nothing was granted yet
    pair.deliver()
    assert pair.d.peer().up, "the handshake serves other rooms"
    assert not pair.d.sent(wire.Offer)
    pair.idle()


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("side", ["p", "d"])
def test_abort_after_success_changes_nothing(pair: Pair, side: str, cleared: bool) -> None:
    sending, receiving = pair.transferring(7)
    settle_everything(pair)
    actor, room = (pair.p, sending) if side == "p" else (pair.d, receiving)
    if cleared:
        actor.clear(room)
    assert actor.abort(room) == []
    assert room.state is Phase.SUCCESS
    assert room.failure is None
    pair.idle()


def test_a_late_abort_cannot_undo_success(pair: Pair) -> None:
    """Decode gives up while the proof of success is on its way: each side keeps its own verdict, and the memory is free."""
    sending, receiving = pair.transferring(7)
    pair.finish()
    pair.wire.clear()
    pair.d.abort(receiving)
    settle_everything(pair)
    assert (sending.state, receiving.state) == (Phase.SUCCESS, Phase.FAILED)
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1


def test_the_reason_is_cut_to_what_a_frame_may_hold(pair: Pair) -> None:
    both_waiting(pair)
    pair.d.abort(pair.d.room(7), "x" * 10_000)
    pair.deliver()
    both_waiting_again = pair.receive(8)
    pair.p.abort(pair.send(8), "y" * 10_000)
    pair.deliver()
    assert "xxx" in pair.p.failure(7).reason
    assert both_waiting_again.failure is not None
    assert "yyy" in both_waiting_again.failure.reason
    pair.idle()


def test_a_reason_that_is_no_text_still_travels(pair: Pair) -> None:
    """Half of a surrogate pair is a legal Python string and no legal UTF-8."""
    both_waiting(pair)
    pair.d.abort(pair.d.room(7), "bad \ud800 text")
    pair.deliver()
    assert "bad ? text" in pair.p.failure().reason
    pair.p.abort(pair.send(8), "bad \udc00 text")
    pair.receive(8)
    pair.deliver()
    assert "bad ? text" in pair.d.failure(8).reason
    pair.idle()
