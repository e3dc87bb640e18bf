"""The core's drains: memory comes back only with proof, and each debt is paid once, however bad the network is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.machines import LeaseState, Phase
from tests.pair import Pair, both_waiting, pages, releases, settle_everything

# --- drain: memory comes back only with proof --------------------------------------------------------------------------------


def done(op: int) -> ev.Event:
    return ev.WriteDone(op, 1)


def write_failed(op: int) -> ev.Event:
    return ev.WriteFailed(op, "cancelled")


@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("outcome", [done, write_failed, ev.WriteSettled])
def test_drained_follows_the_outcome_of_the_write(pair: Pair, outcome: Callable[[int], ev.Event], cleared: bool) -> None:
    sending, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver()
    if cleared:  # the debt outlives both handles
        pair.p.clear(sending)
        pair.d.clear(receiving)
    pair.advance(5_000)
    assert not pair.p.released
    assert not pair.d.released
    assert not pair.p.sent(wire.Drained)
    (op,) = pair.writes
    effects = pair.p.step(outcome(op))
    assert effects == [
        ev.Send(b"D" * 16, wire.Drained(7, receiving.generation)),
        ev.ReleasePages(7, sending.generation),
    ]
    assert not pair.d.released
    pair.deliver()
    assert releases(pair.d, receiving) == 1
    pair.idle()
    assert pair.p.step(outcome(op)) == []  # once more: late
    assert releases(pair.p, sending) == 1


def test_a_drain_that_takes_too_long_is_a_doubt_and_never_a_release(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver()
    pair.advance(pair.deadlines.drain_ms - 1)
    assert sending.lease.state is receiving.lease.state is LeaseState.REVOKING
    pair.advance(1)
    assert sending.lease.state is receiving.lease.state is LeaseState.QUARANTINED
    pair.advance(3_600_000)
    assert not pair.p.released
    assert not pair.d.released
    settle_everything(pair)
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1


def test_drained_waits_for_every_write_of_the_room(pair: Pair) -> None:
    pair.send(7)
    receiving = pair.receive(7, (10, 11, 12))
    pair.deliver()
    for index in range(3):
        pair.chunk(7, 16 * index, 16 * index + 16, (index,), last=False)
    pair.d.abort(receiving)
    pair.deliver()
    for op in (2, 3, 1):
        assert not pair.p.sent(wire.Drained)
        assert not pair.p.released
        pair.finish(op)
    pair.deliver()
    pair.idle()
    assert len(pair.p.released) == len(pair.d.released) == 1


def test_unknown_outcome_quarantines_until_it_is_settled(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    (op,) = pair.writes
    pair.p.step(ev.WriteUnknown(op, "timed out"))
    assert pair.p.failure() == ev.Failure("transport", "outcome of chunk 0 to decode-0 is unknown: timed out", "decode-0")
    assert sending.lease.state is LeaseState.QUARANTINED
    pair.deliver()
    assert pair.d.failure().cause == "peer_failed"
    assert "timed out" in pair.d.failure().reason
    pair.p.clear(sending)
    pair.advance(3_600_000)  # no time is long enough
    assert not pair.p.released
    assert not pair.d.released
    pair.p.step(ev.WriteUnknown(op, "again"))
    pair.p.step(ev.WriteSettled(op))
    pair.deliver()
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1
    pair.writes.clear()
    pair.idle()


def test_an_unknown_outcome_after_the_abort_quarantines_too(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver()
    (op,) = pair.writes
    pair.p.step(ev.WriteUnknown(op, "timed out"))
    assert pair.p.failure().cause == "peer_abort"
    assert sending.lease.state is LeaseState.QUARANTINED
    pair.finish(op)  # it ended well after all
    pair.deliver()
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1
    pair.idle()


@pytest.mark.parametrize("event", [ev.WriteDone(99, 1), ev.WriteFailed(99, "x"), ev.WriteUnknown(99, "x"), ev.WriteSettled(99)])
def test_an_outcome_of_no_write_is_late(pair: Pair, event: ev.Event) -> None:
    sending, _ = pair.transferring(7)
    assert pair.p.step(event) == []
    assert sending.state is Phase.TRANSFERRING
    settle_everything(pair)


def test_settled_is_no_outcome_of_a_live_room(pair: Pair) -> None:
    sending, _ = pair.transferring(7)
    (op,) = pair.writes
    assert pair.p.step(ev.WriteSettled(op)) == []
    assert pair.p.core.counts["late.write_settled"] == 1
    assert sending.state is Phase.TRANSFERRING
    settle_everything(pair)
    assert sending.state is Phase.SUCCESS


def test_an_offer_of_a_concluded_room_is_not_accepted(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.p.abort(sending)
    assert pair.p.tell(wire.Offer(7, receiving.generation, pages(10, 11), 3, 0)) == []  # its verdict is on the way
    settle_everything(pair)


def test_a_failed_write_fails_both_sides_with_its_reason(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    (op,) = pair.writes
    pair.writes.clear()
    effects = pair.p.step(ev.WriteFailed(op, "link down"))
    assert effects[-1] == ev.ReleasePages(7, sending.generation)
    assert pair.p.failure() == ev.Failure("transport", "write of chunk 0 to decode-0 failed: link down", "decode-0")
    pair.deliver()
    assert pair.d.failure().reason == "prefill-0 failed (transport): write of chunk 0 to decode-0 failed: link down"
    assert releases(pair.d, receiving) == 1
    pair.idle()


def test_a_writer_that_has_confirmed_everything_is_not_asked_to_stop() -> None:
    pair = Pair()
    second = pair.side("prefill", b"Q" * 16, "prefill-1")
    pair.d.step(ev.OpenReceive(7, pages(1), address="two"))
    receiving = pair.d.room(7)
    pair.d.step(ev.PeersFound(receiving.generation, (pair.record(), pair.record(second))))
    pair.deliver()
    pair.d.tell(wire.Part(7, receiving.generation, 0, 1, False, 1))
    effects = pair.d.abort(receiving)
    assert [e.peer for e in effects if isinstance(e, ev.Send)] == [second.incarnation]
    pair.deliver()
    assert releases(pair.d, receiving) == 1
    pair.idle()


def test_one_reader_aborts_and_the_other_learns_why(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    sending = pair.send(7, readers=2)
    for side in (pair.d, other):
        pair.receive(7, by=side)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    first, second = pair.writes
    pair.d.abort(pair.d.room(7))
    pair.deliver()
    assert other.failure().reason == "prefill-0 failed (peer_abort): decode-0 aborted: client left"
    pair.finish(first)
    pair.deliver()
    assert pair.d.released  # its own writer is done
    assert not other.released
    assert not pair.p.released
    pair.finish(second)
    pair.deliver()
    assert releases(other, other.room(7)) == releases(pair.p, sending) == 1
    pair.idle()


# --- the network loses, repeats and reorders ---------------------------------------------------------------------------------


def test_a_lost_abort_is_repeated_with_backoff_until_drained(pair: Pair) -> None:
    both_waiting(pair)
    pair.d.abort(pair.d.room(7))
    pair.d.clear(pair.d.room(7))
    pair.wire.clear()
    began = pair.now_ms
    times: list[float] = []
    while len(times) < 8:
        pair.now_ms = pair.d.core.deadline() or 0.0
        if any(isinstance(e, ev.Send) and isinstance(e.message, wire.Abort) for e in pair.d.expire()):
            times.append(pair.now_ms - began)
        pair.p.core.peers[b"D" * 16].heard_ms = pair.d.core.peers[b"P" * 16].heard_ms = pair.now_ms
        pair.wire.clear()
    assert times == [50, 150, 350, 750, 1_550, 3_150, 5_150, 7_150]
    pair.advance(2_000)
    pair.idle()
    assert pair.p.failure().cause == "peer_abort"


def test_an_abort_ends_the_repetition_of_the_verdict(pair: Pair) -> None:
    """Decode gives the room up by itself: it needs no verdict any more, only the Drained, and that has to wait for the write."""
    sending, receiving = pair.transferring(7)
    pair.p.abort(sending)
    pair.deliver(lose=(wire.Verdict,))
    pair.d.abort(receiving)
    pair.deliver()
    sent = len(pair.p.sent(wire.Verdict))
    pair.advance(10_000)
    assert len(pair.p.sent(wire.Verdict)) == sent
    settle_everything(pair)


def test_a_lost_drained_is_repeated_until_it_is_acknowledged(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver()
    pair.finish()
    pair.p.clear(pair.p.room(7))
    pair.deliver(lose=(wire.Drained,))
    assert not pair.d.released
    for _ in range(3):
        pair.advance(300, lose=(wire.DrainedAck,))
        assert releases(pair.d, receiving) == 1
        assert pair.p.core.links
    pair.advance(2_000)
    pair.idle()
    assert len(pair.p.sent(wire.Drained)) > 3


def test_everything_twice(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver(twice=True)
    pair.finish()
    pair.deliver(twice=True)
    assert releases(pair.p, sending) == releases(pair.d, receiving) == 1
    pair.idle()


def test_an_abort_that_overtakes_its_offer(pair: Pair) -> None:
    """Decode was told that nothing can touch its pages; the offer that comes later must not change that."""
    pair.send(7)
    receiving = pair.receive(7)
    (late,) = pair.pending(wire.Offer)
    pair.wire.clear()
    pair.d.abort(receiving)
    pair.deliver()
    assert releases(pair.d, receiving) == 1
    pair.p.tell(late)
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    assert not pair.p.core.links
    (verdict,) = pair.pending(wire.Verdict)
    assert isinstance(verdict, wire.Verdict)
    assert (verdict.success, verdict.cause) == (False, "peer_abort")
    pair.deliver()
    pair.p.abort(pair.p.room(7))
    pair.idle()


def test_an_abort_takes_back_an_offer_that_waits_for_its_room(pair: Pair) -> None:
    receiving = pair.receive(7)
    pair.deliver()
    assert pair.p.core.registry.early_count == 1
    pair.d.abort(receiving)
    pair.deliver()
    assert pair.p.core.registry.early_count == 0
    assert releases(pair.d, receiving) == 1
    pair.send(7)
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    assert not pair.p.core.links


# --- a data plane that vouches -----------------------------------------------------------------------------------------------


def test_revoked_frees_the_pages_and_the_abort_goes_on(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    effects = pair.d.abort(receiving)
    assert [type(e) for e in effects] == [ev.Publish, ev.Revoke, ev.Send]
    pair.wire.clear()
    assert pair.d.step(ev.Revoked(receiving.generation)) == [ev.ReleasePages(7, receiving.generation)]
    assert pair.d.step(ev.Revoked(receiving.generation)) == []
    pair.d.clear(receiving)
    pair.advance(100)
    assert pair.p.failure().cause == "peer_abort"
    settle_everything(pair)
    assert releases(pair.d, receiving) == 1


def test_revoked_means_nothing_while_the_room_lives(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    assert pair.d.step(ev.Revoked(receiving.generation)) == []
    assert pair.d.step(ev.Revoked(99)) == []
    assert receiving.lease.state is LeaseState.EXPOSED
    assert receiving.lease.holders == {pair.p.incarnation}
    settle_everything(pair)
    assert receiving.state is Phase.SUCCESS
