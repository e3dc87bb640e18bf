"""The core's rooms whose pages are granted late: when prefill has computed the prompt."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Room
from pd_fsm.core.settings import Deadlines
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import LeaseState, Phase
from tests.pair import ADDRESS, Pair, met, pages


def without_pages(pair: Pair, room: int = 7) -> Room:
    pair.d.step(ev.OpenReceive(room, None, address=ADDRESS))
    return pair.d.room(room)


def grant(pair: Pair, room: int = 7, prefix: int = 0) -> list[ev.Effect]:
    return pair.d.step(ev.GrantPages(pair.d.room(room).generation, pages(10, 11), 3, prefix))


def computed(pair: Pair) -> tuple[Room, Room]:
    """Prefill has the whole prompt, and decode knows it."""
    sending, receiving = pair.send(7), without_pages(pair)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.chunk(7, 16, 32, (2,), last=True, aux_row=0)
    pair.deliver()
    return sending, receiving


# --- pages that are granted late ---------------------------------------------------------------------------------------------


def test_pages_are_reserved_when_the_prompt_is_computed(pair: Pair) -> None:
    sending, receiving = computed(pair)
    assert sending.state is receiving.state is Phase.WAITING_FOR_INPUT
    assert receiving.tokens_computed == 32
    assert not pair.writes
    assert receiving.lease.state is LeaseState.PRIVATE
    grant(pair)
    assert receiving.lease.state is LeaseState.EXPOSED
    pair.deliver()
    assert [w.copies[0][2] for w in pair.writes.values()] == [pages(10)["kv"], pages(11)["kv"]]
    pair.finish()
    pair.deliver()
    assert sending.state is receiving.state is Phase.SUCCESS
    pair.idle()


@pytest.mark.parametrize("when", ["before the peer is known", "before the chunks", "before the last chunk"])
def test_pages_may_be_granted_at_any_time(pair: Pair, when: str) -> None:
    pair.send(7)
    receiving = without_pages(pair)
    if when == "before the peer is known":
        grant(pair)
    pair.deliver()
    if when == "before the chunks":
        grant(pair)
    pair.chunk(7, 0, 16, (1,), last=False)
    if when == "before the last chunk":
        assert not pair.writes
        grant(pair)
    pair.deliver()
    assert len(pair.writes) == 1
    pair.chunk(7, 16, 32, (2,), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS
    pair.idle()


@pytest.mark.parametrize("lost", [wire.Offer, wire.Computed, wire.Accepted])
def test_a_late_grant_succeeds_though_messages_are_lost(pair: Pair, lost: type) -> None:
    pair.send(7)
    receiving = without_pages(pair)
    pair.deliver(lose=(lost,))
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.deliver(lose=(lost,))
    pair.advance(100)
    grant(pair)
    pair.deliver(lose=(lost,))
    pair.advance(5_000)
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS
    pair.idle()


def test_a_delayed_answer_to_the_announcement_does_not_stop_the_grant(pair: Pair) -> None:
    """The offer with the pages is lost, and an old Accepted comes: it must not be taken for the answer to the pages."""
    _, receiving = computed(pair)
    grant(pair)
    pair.deliver(lose=(wire.Offer,))
    pair.d.tell(wire.Accepted(7, receiving.generation))
    pair.advance(10_000)
    assert pair.writes
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS
    pair.idle()


def test_a_delayed_answer_before_the_prompt_is_computed(pair: Pair) -> None:
    pair.send(7)
    receiving = without_pages(pair)
    pair.deliver()
    grant(pair)
    pair.deliver(lose=(wire.Offer,))
    pair.d.tell(wire.Accepted(7, receiving.generation))
    pair.advance(5_000)
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.advance(10_000)
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS
    pair.idle()


def test_computed_answers_the_announcement(pair: Pair) -> None:
    pair.send(7)
    without_pages(pair)
    pair.deliver(lose=(wire.Accepted,))
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.deliver(lose=(wire.Accepted,))
    sent = len(pair.d.sent(wire.Offer))
    pair.advance(10_000)
    assert len(pair.d.sent(wire.Offer)) == sent


def test_the_clock_of_the_announcement_is_not_that_of_the_grant(pair: Pair) -> None:
    """Both are repeated under the same key; the first one's turn comes while the second has just been sent."""
    pair.receive(6)  # keeps the cached registration in use: room 7 offers at once
    pair.wire.clear()
    without_pages(pair)
    pair.now_ms += 30
    grant(pair)
    pair.wire.clear()
    pair.now_ms += 30
    repeated = [e.message for e in pair.d.expire() if isinstance(e, ev.Send) and isinstance(e.message, wire.Offer)]
    assert [offer.room for offer in repeated] == [6]
    pair.now_ms += 20
    repeated = [e.message for e in pair.d.expire() if isinstance(e, ev.Send) and isinstance(e.message, wire.Offer)]
    assert [offer.room for offer in repeated] == [7]


def test_an_announcement_that_comes_again_takes_no_pages_back(pair: Pair) -> None:
    _, receiving = computed(pair)
    grant(pair)
    pair.deliver()
    pair.p.tell(wire.Offer(7, receiving.generation, {}, -1, 0))
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS


def test_a_room_that_waits_for_pages_says_so() -> None:
    pair = met(Deadlines(waiting_ms=1_000, lost_ms=100_000))
    sending, receiving = computed(pair)
    assert pair.p.core.why_waiting(sending) == "WAITING_FOR_INPUT: decode has granted no pages yet"
    pair.now_ms += 1_000
    for side in (pair.p, pair.d):
        side.expire()
    assert sending.live, "decode is alive and may take its time; its own deadline counts"
    said = "still WAITING_FOR_INPUT after 1000 ms: the engine has granted no pages yet"
    assert pair.d.failure() == ev.Failure("timeout", said)
    pair.deliver()
    assert pair.p.failure() == ev.Failure("peer_failed", f"decode-0 failed (timeout): {said}", "decode-0")
    assert receiving.lease.state is LeaseState.QUIESCED


@pytest.mark.parametrize("side", ["p", "d"])
def test_a_room_without_pages_aborts_and_holds_none(pair: Pair, side: str) -> None:
    sending, receiving = computed(pair)
    if side == "d":
        pair.d.abort(receiving)
        assert pair.d.released == [(7, receiving.generation)]
    else:
        pair.p.abort(sending)
    pair.deliver()
    assert {pair.p.failure().cause, pair.d.failure().cause} == {"abort", "peer_abort"}
    assert len(pair.p.released) == len(pair.d.released) == 1
    grant(pair)
    assert pair.d.core.counts["late.grant"] == 1
    pair.idle()


def test_a_room_without_pages_leaves_nothing_when_its_peer_is_lost(pair: Pair) -> None:
    """No memory was granted, so nothing is owed to a process that may never answer again."""
    _, receiving = computed(pair)
    pair.d.step(ev.PeerOverflowed(b"P" * 16, "it does not read"))
    assert pair.d.failure().cause == "peer_lost"
    assert pair.d.released == [(7, receiving.generation)]
    assert not pair.d.core.links
    assert not pair.d.core.peers
    assert not pair.d.core.timers.repeats


def test_a_peer_that_is_met_anew_before_it_knew_that_it_was_lost(pair: Pair) -> None:
    """Decode gave prefill up, and with it a room without pages; prefill noticed nothing, and asks a living decode for them."""
    sending, receiving = computed(pair)
    pair.d.step(ev.PeerOverflowed(b"P" * 16, "it does not read"))
    pair.d.clear(receiving)
    pair.wire.clear()
    pair.receive(8)  # it is greeted again
    pair.deliver()
    assert pair.p.core.peers[b"D" * 16].up
    pair.advance(pair.d.core.deadlines.repeat_max_ms)
    assert sending.failure is not None
    assert "does not read" in sending.failure.reason
    assert sending.lease.owned
    assert not [key for key in pair.p.core.timers.repeats if key[2] == receiving.generation]


def test_a_late_copy_of_computed_ends_no_room(pair: Pair) -> None:
    """Decode has all parts and forgot the room; prefill's last write has not been reported yet."""
    sending, receiving = computed(pair)
    grant(pair)
    pair.deliver()
    for write in pair.writes.values():
        pair.d.tell(write.notice, pair.p)
    assert receiving.state is Phase.SUCCESS
    pair.d.clear(receiving)
    pair.d.tell(wire.Computed(7, receiving.generation, 32))
    pair.deliver()
    assert sending.live
    pair.finish(notified=True)
    assert sending.state is Phase.SUCCESS


def test_grants_that_cannot_be_are_refused(pair: Pair) -> None:
    without_pages(pair)
    for bad, said in (
        (ev.GrantPages(pair.d.room(7).generation, pages(1, 1)), "granted twice"),
        (ev.GrantPages(pair.d.room(7).generation, {"kv": b"1"}), "multiple of 4"),
        (ev.GrantPages(pair.d.room(7).generation, pages(1), 64), "aux row 64"),
    ):
        with pytest.raises(LocalProtocolError) as error:
            pair.d.step(bad)
        assert said in str(error.value)
    grant(pair)
    with pytest.raises(LocalProtocolError, match="room 7 has its pages"):
        grant(pair)
    pair.d.step(ev.GrantPages(99, pages(1)))
    assert pair.d.core.counts["late.grant"] == 1


def test_a_late_grant_is_checked_by_prefill(pair: Pair) -> None:
    sending, receiving = computed(pair)
    pair.p.tell(wire.Offer(7, receiving.generation, pages(1_000), -1, 0))
    assert sending.failure is not None
    assert sending.failure.cause == "protocol"
    assert not pair.writes


def test_success_without_pages_cannot_be(pair: Pair) -> None:
    _, receiving = computed(pair)
    pair.d.tell(wire.Part(7, receiving.generation, 0, 1, False, 1))
    assert receiving.state is Phase.WAITING_FOR_INPUT
    pair.d.tell(wire.Verdict(7, receiving.generation, True, "", "", 1))
    assert pair.d.failure().cause == "protocol"
