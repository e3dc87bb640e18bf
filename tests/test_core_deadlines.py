"""The core's clocks: every phase and every obligation has its own, and what is lost is sent again."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Deadlines, Topology
from pd_fsm.core.timers import Timers
from pd_fsm.machines import Phase
from tests.pair import Pair, Side, pages

DEADLINES = Deadlines(bootstrap_ms=5_000, waiting_ms=4_000, transfer_ms=3_000, handshake_ms=2_000, lost_ms=1_000_000)


def met(deadlines: Deadlines = DEADLINES) -> Pair:
    pair = Pair(deadlines)
    pair.meet()
    return pair


@pytest.fixture
def pair() -> Pair:
    return met()


def fails_after(pair: Pair, side: Side, ms: float) -> ev.Failure:
    """Room 7 of `side` lives for `ms` from now, and no millisecond longer."""
    pair.advance(ms - 1)
    assert side.room(7).live, side.room(7).failure
    pair.advance(1)
    found = side.failure()
    assert found.cause == "timeout"
    return found


# --- rooms -------------------------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_sender() -> None:
    pair = met(Deadlines(bootstrap_ms=5_000))
    sending = pair.send(7, readers=2)
    pair.receive(7)
    pair.deliver()
    found = fails_after(pair, pair.p, 5_000)
    assert found.reason == "still BOOTSTRAPPING after 5000 ms: 1 of 2 decode ranks have offered pages"
    assert pair.p.released == [(7, sending.generation)]
    assert "1 of 2 decode ranks" in pair.d.failure().reason  # the one that did offer is told why
    pair.idle()


def test_bootstrap_of_a_receiver(pair: Pair) -> None:
    pair.d.step(ev.OpenReceive(7, pages(1), address="elsewhere"))
    generation = pair.d.room(7).generation
    pair.d.step(ev.LookupFailed(generation, "connection refused"))
    pair.d.step(ev.LookupFailed(99, "of a room that is not there"))
    found = fails_after(pair, pair.d, 5_000)
    assert found.reason == "still BOOTSTRAPPING after 5000 ms: no prefill rank was found: connection refused"
    pair.idle()


def test_bootstrap_names_the_peer_that_did_not_answer() -> None:
    pair = Pair(Deadlines(bootstrap_ms=1_000))
    pair.receive(7)
    pair.wire.clear()
    pair.advance(1_000, lose=(wire.Hello,))
    assert pair.d.failure().reason.endswith("no handshake with prefill-0 at memory://p")


def test_waiting_of_a_sender_and_a_receiver(pair: Pair) -> None:
    pair.send(7)
    pair.advance(4_000)  # the clock of each phase begins with the phase
    pair.receive(7)
    pair.deliver()
    pair.advance(3_999)
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    pair.now_ms += 1
    pair.p.expire()
    pair.d.expire()
    assert pair.p.failure().reason == "still WAITING_FOR_INPUT after 4000 ms: no chunk was handed in"
    assert pair.d.failure().reason == "still WAITING_FOR_INPUT after 4000 ms: no part came from prefill-0"
    pair.deliver()
    pair.idle()
    assert len(pair.p.released) == len(pair.d.released) == 1


def test_transfer_without_progress(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (10, 11, 12))
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.advance(2_000)
    pair.finish()
    pair.deliver()
    pair.advance(2_000)
    pair.chunk(7, 16, 32, (2,), last=False)  # handing in is progress of the sender, not of the receiver
    found = fails_after(pair, pair.d, 1_000)
    assert found.reason == "TRANSFERRING without progress for 3000 ms: waiting for parts from prefill-0"
    pair.deliver()
    assert not pair.d.released, "a timeout is no proof"
    pair.finish()
    pair.deliver()
    pair.idle()


@pytest.mark.parametrize("progress", ["part", "chunk"])
def test_progress_renews_the_deadline(pair: Pair, progress: str) -> None:
    pair.send(7)
    pair.receive(7, tuple(range(20, 40)))
    pair.deliver()
    for index in range(10):
        pair.chunk(7, 16 * index, 16 * index + 16, (index,), last=False)
        if progress == "part":
            pair.finish()
            pair.deliver()
        pair.advance(2_999, lose=(wire.Abort,))
        assert pair.p.phase(7) is Phase.TRANSFERRING
    pair.advance(1)
    assert pair.p.failure().cause == "timeout"


@pytest.mark.parametrize(
    ("writing", "said"), [(True, "writing to decode-0"), (False, "the engine handed in no further chunk")], ids=["write", "engine"]
)
def test_a_sender_says_whether_a_write_or_the_engine_is_late(pair: Pair, writing: bool, said: str) -> None:
    pair.send(7)
    pair.receive(7)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    if not writing:
        pair.finish()
        pair.deliver()
    pair.advance(2_999, lose=(wire.Abort,))
    pair.now_ms += 1
    pair.p.expire()
    assert pair.p.failure().reason == f"TRANSFERRING without progress for 3000 ms: {said}"


def test_a_receiver_names_only_the_writers_that_owe_something(pair: Pair) -> None:
    second = pair.side("prefill", b"Q" * 16, "prefill-1")
    for side in (pair.p, second):
        side.step(ev.OpenSend(7))
    pair.d.step(ev.OpenReceive(7, pages(1), address="two"))
    generation = pair.d.room(7).generation
    pair.d.step(ev.PeersFound(generation, (pair.record(), pair.record(second))))
    pair.deliver()
    pair.d.tell(wire.Part(7, generation, 0, 1, True, 1), pair.p)
    assert pair.d.phase(7) is Phase.TRANSFERRING
    assert fails_after(pair, pair.d, 3_000).reason.endswith("waiting for parts from prefill-1")


def test_a_completion_that_is_there_comes_before_the_timeout(pair: Pair) -> None:
    """Driver's contract: events first, then deadlines. At the very moment of the deadline both have come."""
    sending, _ = pair.transferring(7)
    pair.now_ms = sending.deadline_ms
    pair.finish()
    pair.p.expire()
    assert sending.state is Phase.SUCCESS


def test_a_timeout_of_a_concluded_room_does_nothing(pair: Pair) -> None:
    pair.transferring(7)
    pair.finish()
    pair.deliver()
    pair.p.clear(pair.p.room(7))
    pair.advance(100_000)
    assert pair.d.phase(7) is Phase.SUCCESS
    assert not any(count.startswith("failed.") for side in (pair.p, pair.d) for count in side.core.counts)


def test_an_idle_session_has_no_room_deadline_left() -> None:
    pair = Pair(DEADLINES)
    assert pair.p.core.deadline() is None
    pair.send(7)
    assert pair.p.core.deadline() == pair.now_ms + 5_000
    pair.p.abort(pair.p.room(7))
    pair.advance(5_000)
    assert pair.p.core.deadline() is None


# --- repetition --------------------------------------------------------------------------------------------------------------


def times_sent(pair: Pair, side: Side, kind: type, until_ms: float) -> list[float]:
    """When `side` sends `kind` from now on, while nothing is delivered; offsets in ms."""
    began, times = pair.now_ms, []
    while (due := side.core.deadline()) is not None and due <= began + until_ms:
        pair.now_ms = max(due, pair.now_ms)
        found = [e for e in side.expire() if (e.message if isinstance(e, ev.Send) else e).__class__ is kind]
        times += [pair.now_ms - began] * len(found)
    pair.wire.clear()
    return times


BACKOFF = [50, 150, 350, 750, 1_550, 3_150, 5_150, 7_150]


def long_met() -> Pair:
    return met(Deadlines(lost_ms=1_000_000))


def test_an_unanswered_hello_is_repeated() -> None:
    pair = Pair(Deadlines(handshake_ms=20_000))
    pair.receive(7)
    pair.wire.clear()
    assert times_sent(pair, pair.d, wire.Hello, 8_000) == BACKOFF
    pair.advance(2_000)
    pair.deliver()
    assert pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    assert not times_sent(pair, pair.d, wire.Hello, 8_000)


def test_an_unanswered_lookup_is_repeated() -> None:
    pair = long_met()
    assert ev.Lookup in map(type, pair.d.step(ev.OpenReceive(7, pages(1), address="new")))
    assert times_sent(pair, pair.d, ev.Lookup, 8_000) == BACKOFF
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, (pair.record(),)))
    assert not times_sent(pair, pair.d, ev.Lookup, 8_000)


def test_an_unanswered_offer_is_repeated() -> None:
    pair = long_met()
    receiving = pair.receive(7)
    pair.wire.clear()
    assert times_sent(pair, pair.d, wire.Offer, 8_000) == BACKOFF
    pair.d.tell(wire.Accepted(7, receiving.generation))
    assert not times_sent(pair, pair.d, wire.Offer, 8_000)


@pytest.mark.parametrize("answer", ["part", "success", "failed"])
def test_a_part_or_a_verdict_stops_the_offer_as_well(answer: str) -> None:
    pair = long_met()
    generation = pair.receive(7).generation
    answers: dict[str, wire.Message] = {
        "part": wire.Part(7, generation, 0, 0, False, 1),
        "success": wire.Verdict(7, generation, True, "", "", 1),
        "failed": wire.Verdict(7, generation, False, "abort", "no", 1),
    }
    pair.d.tell(answers[answer])
    assert not times_sent(pair, pair.d, wire.Offer, 8_000)


@pytest.mark.parametrize("success", [True, False])
def test_an_unacknowledged_verdict_is_repeated(success: bool) -> None:
    pair = long_met()
    sending, receiving = pair.transferring(7)
    if success:
        pair.finish()
    else:
        pair.p.abort(sending)
        pair.finish()
    pair.p.clear(sending)
    pair.wire.clear()
    assert times_sent(pair, pair.p, wire.Verdict, 8_000) == BACKOFF
    pair.p.tell(wire.VerdictAck(7, receiving.generation))
    assert not times_sent(pair, pair.p, wire.Verdict, 8_000)
    assert not pair.p.core.links


def test_an_unacknowledged_drained_is_repeated() -> None:
    pair = long_met()
    _, receiving = pair.transferring(7)
    pair.d.abort(receiving)
    pair.deliver()
    pair.finish()
    pair.wire.clear()
    assert times_sent(pair, pair.p, wire.Drained, 8_000) == BACKOFF
    pair.p.tell(wire.DrainedAck(7, receiving.generation))
    assert not times_sent(pair, pair.p, wire.Drained, 8_000)


@pytest.mark.parametrize(
    "lost",
    [wire.Hello, wire.Welcome, wire.Offer, wire.Accepted, wire.Part, wire.Verdict, wire.VerdictAck],
)
def test_a_room_succeeds_though_every_first_copy_is_lost(lost: type) -> None:
    pair = Pair()
    pair.send(7)
    pair.receive(7)
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    for _ in range(3):
        pair.deliver(lose=(lost,))
        pair.finish()
        pair.deliver(lose=(lost,))
        pair.advance(60)
        pair.finish()
        pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.SUCCESS
    pair.idle()


def test_topology_and_deadlines_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match=r"tp_rank must be in 0\.\.1 for tp_size=2, not 2"):
        Topology(tp_rank=2, tp_size=2)
    with pytest.raises(ValueError, match="heartbeat_ms must be positive, not 0"):
        Deadlines(heartbeat_ms=0)


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_armed() -> None:
    timers = Timers()
    for when_ms, kind in ((2.0, "last"), (1.0, "z"), (1.0, "a"), (0.5, "first"), (1.0, "m")):
        timers.arm(when_ms, (kind, b"", 0))
    assert [key[0] for key in timers.due(1.0)] == ["first", "z", "a", "m"]
    assert timers.next_ms() == 2.0
