"""The core's identities: generations, early and late messages, tombstones, and rooms whose number is used again."""

from __future__ import annotations

from itertools import permutations

import msgspec
import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Room
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import Phase
from tests.pair import ADDRESS, Pair, met, pages


def offer(pair: Pair, room: int = 7) -> wire.Offer:
    """The offer of decode's room, sent before or not."""
    request = pair.d.room(room).request
    assert request is not None
    assert request.pages is not None
    return wire.Offer(room, pair.d.room(room).generation, request.pages, request.aux_row, request.decode_prefix_len)


# --- only the owner opens ----------------------------------------------------------------------------------------------------


def test_a_second_open_is_refused(pair: Pair) -> None:
    pair.transferring(7)
    with pytest.raises(LocalProtocolError, match=r"room 7 is already open \(TRANSFERRING, generation 1\)"):
        pair.send(7)
    with pytest.raises(LocalProtocolError, match="room 7 is already open"):
        pair.d.step(ev.OpenReceive(7, pages(1), 0, 0, ADDRESS))
    pair.finish()
    pair.deliver()
    with pytest.raises(LocalProtocolError, match="SUCCESS"):
        pair.send(7)
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.SUCCESS


def test_generations_are_never_used_again(pair: Pair) -> None:
    seen = set()
    for _ in range(5):
        sending, receiving = pair.transferring(7)
        seen |= {("p", sending.generation), ("d", receiving.generation)}
        pair.finish()
        pair.deliver()
        pair.p.clear(sending)
        pair.d.clear(receiving)
    assert len(seen) == 10
    pair.idle()


# --- early offers ------------------------------------------------------------------------------------------------------------


def test_an_early_offer_waits_for_its_room(pair: Pair) -> None:
    pair.receive(7)
    pair.deliver(twice=True)
    assert pair.p.core.registry.early_count == 1
    assert not pair.p.core.registry.by_room
    pair.send(7)
    assert pair.p.phase(7) is Phase.WAITING_FOR_INPUT
    assert pair.p.core.registry.early_count == 0
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.deliver()
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS
    pair.idle()


def test_an_early_offer_lapses_unless_it_is_repeated() -> None:
    pair = met(Deadlines(early_offer_ms=5_000))
    pair.receive(7)
    pair.deliver()
    pair.advance(20_000)  # its sender repeats it: it stays
    assert pair.p.core.registry.early_count == 1
    pair.p.tell(offer(pair))
    pair.advance(4_900, lose=(wire.Offer,))
    assert pair.p.core.registry.early_count == 1
    pair.advance(200, lose=(wire.Offer,))
    assert pair.p.core.registry.early_count == 0
    pair.send(7)
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    pair.advance(2_000)
    assert pair.p.phase(7) is Phase.WAITING_FOR_INPUT


def test_early_offers_are_bounded() -> None:
    pair = met(limits=Limits(early_offers_max=2))
    for room in (1, 2, 3):
        pair.receive(room)
    pair.deliver()
    assert pair.p.core.registry.early_count == 2
    assert pair.d.failure(3).cause == "peer_failed"
    assert "Limits.early_offers_max" in pair.d.failure(3).reason
    pair.p.tell(offer(pair, 1))  # repeating one that waits needs no place
    pair.deliver()
    assert pair.d.phase(1) is Phase.WAITING_FOR_INPUT


def test_early_offers_of_a_lost_peer_are_forgotten(pair: Pair) -> None:
    pair.receive(7)
    pair.deliver()
    pair.p.step(ev.PeerUnreachable(b"D" * 16, "refused", dead=True))
    assert pair.p.core.registry.early_count == 0
    pair.send(7)
    assert not pair.p.core.links


# --- tombstones --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cleared", [False, True])
def test_a_reader_that_registers_late_learns_the_real_reason(pair: Pair, cleared: bool) -> None:
    sending = pair.send(7)
    pair.p.abort(sending, "prompt too long")
    if cleared:
        pair.p.clear(sending)
        pair.advance(100_000)
    receiving = pair.receive(7)
    pair.deliver()
    assert pair.d.failure() == ev.Failure("peer_abort", "prefill-0 aborted: prompt too long", "prefill-0")
    assert pair.d.released == [(7, receiving.generation)]
    pair.idle()


def test_a_tombstone_answers_each_reader_once(pair: Pair) -> None:
    """One reader was there, one comes late; whoever comes after that belongs to the room's next life."""
    other = pair.side("decode", b"E" * 16, "decode-1")
    sending = pair.send(7, readers=2)
    first = pair.receive(7)
    pair.deliver()
    pair.p.abort(sending, "no")
    pair.p.clear(sending)
    pair.deliver()
    assert pair.d.failure().reason.endswith("no")
    pair.receive(7, by=other)
    pair.deliver()
    assert other.failure().reason.endswith("no")
    pair.d.clear(first)
    pair.receive(7)
    pair.deliver()
    assert pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    assert pair.p.core.registry.early_count == 1


def test_a_reader_that_was_answered_is_not_answered_again_from_the_tombstone(pair: Pair) -> None:
    """It learned the verdict before the room was cleared; its next offer is a retry, which waits for the room's next life."""
    sending = pair.send(7)
    pair.p.abort(sending, "first try")
    receiving = pair.receive(7)
    pair.deliver()
    assert pair.d.failure().reason.endswith("first try")
    pair.p.clear(sending)
    pair.d.clear(receiving)
    pair.receive(7)
    pair.deliver()
    assert pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    pair.send(7)
    pair.deliver()
    assert pair.p.phase(7) is Phase.WAITING_FOR_INPUT


def test_tombstones_lapse_and_are_bounded() -> None:
    pair = met(Deadlines(tombstone_ms=1_000), Limits(tombstones_max=2))
    for room in (1, 2, 3):
        pair.p.abort(pair.send(room), "gone")
        pair.p.clear(pair.p.room(room))
    assert list(pair.p.core.registry.tombstones) == [2, 3]
    pair.advance(999)
    pair.receive(3)
    pair.deliver()
    assert pair.d.phase(3) is Phase.FAILED
    pair.advance(1)
    assert not pair.p.core.registry.tombstones
    pair.receive(2)
    pair.deliver()
    assert pair.d.phase(2) is Phase.WAITING_FOR_INPUT


def test_a_reader_that_comes_after_success_is_told_that_it_is_over(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    pair.transferring(7)
    pair.finish()
    pair.deliver()
    pair.receive(7, by=other)
    pair.deliver()
    assert "room 7 has already ended here (SUCCESS)" in other.failure().reason


def test_opening_the_room_again_ends_its_tombstone(pair: Pair) -> None:
    pair.p.abort(pair.send(7))
    pair.p.clear(pair.p.room(7))
    pair.send(7)
    pair.receive(7)
    pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.WAITING_FOR_INPUT


# --- which announcement a room is bound by -----------------------------------------------------------------------------------


def look_up(pair: Pair, announcement: int) -> Room:
    """Open room 7 on decode, or ask again for it, and answer that one of two data-parallel ranks announced it."""
    if 7 not in pair.d.core.registry.by_room:
        pair.d.step(ev.OpenReceive(7, pages(10, 11), 3, 0, "http://data-parallel"))
    room, record = pair.d.room(7), msgspec.structs.replace(pair.record(), dp_size=2)
    pair.d.step(ev.PeersFound(room.generation, (record,), announcement))
    return room


def end(pair: Pair, room: Room) -> None:
    pair.d.abort(room, "retracted")
    pair.deliver()
    pair.d.clear(room)


def test_a_room_is_not_bound_again_by_the_announcement_of_one_that_failed(pair: Pair) -> None:
    pair.send(7)
    first = look_up(pair, 5)
    pair.deliver()
    end(pair, first)
    assert pair.p.phase(7) is Phase.FAILED
    second = look_up(pair, 5)
    assert not second.links
    why = "no prefill rank was found: the rendezvous still names the rank of the attempt that failed: prefill-0"
    assert pair.d.core.describe()["rooms"][0]["waits_for"] == f"BOOTSTRAPPING: {why}"
    end(pair, second)  # it was never bound, and the announcement is no fresher for that
    third = look_up(pair, 5)
    pair.advance(pair.deadlines.bootstrap_ms - 1)
    assert not look_up(pair, 5).links
    assert third.live
    look_up(pair, 6)
    assert third.state is Phase.WAITING_FOR_INPUT


def test_an_announcement_stays_good_if_prefill_was_not_told_of_the_attempt_that_failed() -> None:
    pair = Pair()
    pair.send(7)
    first = look_up(pair, 5)
    pair.deliver(lose=(wire.Welcome,))
    assert first.announcement == 5
    assert first.state is Phase.BOOTSTRAPPING
    end(pair, first)
    assert not pair.d.sent(wire.Offer)
    assert look_up(pair, 5).announcement == 5
    pair.advance(5_000)
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.WAITING_FOR_INPUT


def test_only_an_attempt_that_failed_makes_its_announcement_outdated(pair: Pair) -> None:
    sending = pair.send(7)
    first = look_up(pair, 5)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    assert sending.state is first.state is Phase.SUCCESS
    pair.d.clear(first)
    assert look_up(pair, 5).announcement == 5


def test_what_is_outdated_is_forgotten_with_the_tombstone() -> None:
    pair = met(Deadlines(tombstone_ms=1_000))
    pair.send(7)
    first = look_up(pair, 5)
    pair.deliver()
    end(pair, first)
    pair.advance(1_000)
    assert look_up(pair, 5).announcement == 5
    unknown = pair.d.room(7)
    pair.deliver()
    end(pair, unknown)
    assert look_up(pair, 0).links, "a rendezvous that gives no serials is taken at its word"


# --- a generation concludes once ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reopened", [False, True])
def test_a_repeated_offer_cannot_open_a_concluded_generation_again(pair: Pair, reopened: bool) -> None:
    sending, receiving = pair.transferring(7)
    late = offer(pair)
    pair.finish()
    pair.deliver()
    pair.idle()
    pair.p.clear(sending)
    pair.d.clear(receiving)
    if reopened:
        pair.send(7)
    pair.p.tell(late)
    assert not pair.p.core.links
    assert pair.p.core.registry.early_count == 0
    (verdict,) = pair.pending(wire.Verdict)
    assert isinstance(verdict, wire.Verdict)
    assert not verdict.success
    assert f"generation {late.generation} of room 7 has already concluded" in verdict.reason
    pair.deliver()
    if reopened:
        assert pair.p.phase(7) is Phase.BOOTSTRAPPING


def test_a_refusal_is_repeated_word_for_word(pair: Pair) -> None:
    pair.p.abort(pair.send(7), "prompt too long")
    pair.receive(7)
    late = offer(pair)
    pair.deliver(lose=(wire.Verdict,))
    pair.p.clear(pair.p.room(7))
    pair.send(7)
    pair.p.tell(late)
    pair.deliver()
    assert pair.d.failure().reason == "prefill-0 aborted: prompt too long"
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING


def test_spent_generations_are_bounded_by_a_floor() -> None:
    pair = met(limits=Limits(spent_generations_max=3))
    late = []
    for room in range(6):
        pair.transferring(room)
        late.append(offer(pair, room))
        pair.finish()
        pair.deliver()
    peer = pair.p.peer()
    assert len(peer.spent) == 3
    assert peer.spent_floor == late[2].generation
    for room in range(6):
        pair.p.clear(pair.p.room(room))
        pair.send(room)
        pair.p.tell(late[room])
    assert not pair.p.core.links
    pair.d.clear(pair.d.room(5))
    pair.receive(5)
    pair.deliver()
    assert pair.p.phase(5) is Phase.WAITING_FOR_INPUT, "a new generation lies above the floor"


def test_an_offer_that_waits_for_its_room_does_not_sink_below_the_floor() -> None:
    """Decode offered early; while prefill's queue holds the request back, more rooms conclude than are remembered."""
    pair = met(limits=Limits(spent_generations_max=3))
    waiting = pair.receive(100)
    pair.deliver()
    for room in range(6):
        pair.transferring(room)
        pair.finish()
        pair.deliver()
    assert waiting.generation < pair.p.peer().spent_floor
    pair.p.tell(offer(pair, 100))  # repeated, as long as it is not accepted
    pair.deliver()
    assert waiting.live
    pair.send(100)
    pair.deliver()
    assert pair.p.phase(100) is waiting.state is Phase.WAITING_FOR_INPUT


def test_concluded_generations_stay_spent_when_the_peer_is_met_anew(pair: Pair) -> None:
    """Prefill lost and forgot decode. A delayed offer that comes after the new handshake must not bind: its pages are free."""
    sending, receiving = pair.transferring(7)
    late = offer(pair)
    pair.finish()
    pair.deliver()
    pair.p.clear(sending)
    pair.d.clear(receiving)
    pair.p.step(ev.PeerOverflowed(b"D" * 16, "it does not read"))
    assert b"D" * 16 not in pair.p.core.peers
    pair.send(7)
    pair.p.tell(pair.d.core.identity.hello())
    assert pair.p.peer().up
    pair.p.tell(late)
    assert not pair.p.core.links
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    pair.wire.clear()
    receiving = pair.receive(7)  # a new generation is welcome
    pair.deliver()
    assert pair.p.phase(7) is Phase.WAITING_FOR_INPUT


def test_a_room_older_than_concluded_ones_may_offer_when_its_peer_is_met_anew() -> None:
    """It was still looking for its prefill when prefill gave decode up: its generation is lower, and was never offered."""
    pair = Pair()
    for room in (7, 8, 9):
        pair.send(room)
    pair.p.tell(pair.d.core.identity.hello())
    pair.p.tell(wire.Offer(7, 5, pages(1), -1, 0))
    pair.p.tell(wire.Offer(10, 4, pages(1), -1, 0))  # parked: prefill has not opened this room
    pair.p.tell(wire.Abort(7, 5, "abort", "left"))
    pair.p.step(ev.PeerOverflowed(b"D" * 16, "it does not read"))
    assert b"D" * 16 not in pair.p.core.peers
    pair.p.tell(pair.d.core.identity.hello())
    pair.p.tell(wire.Offer(8, 5, pages(1), -1, 0))
    pair.send(10)
    pair.p.tell(wire.Offer(10, 4, pages(1), -1, 0))
    assert not pair.p.core.links, "what was offered before it was given up is spent"
    pair.p.tell(wire.Offer(9, 3, pages(1), -1, 0))
    assert pair.p.phase(9) is Phase.WAITING_FOR_INPUT


def test_what_forgotten_peers_spent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_fsm.core.session.FORGOTTEN_SPENT_MAX", 4)
    core = Pair(limits=Limits(peers_max=3)).p.core
    core.remember_spent(b"a", [2, 4, 6])
    core.remember_spent(b"b", [1])
    assert core.forgotten == {b"a": ({2, 4, 6}, 0), b"b": ({1}, 0)}
    core.remember_spent(b"b", [3])
    assert core.forgotten == {b"a": (set(), 6), b"b": ({1, 3}, 0)}, "the oldest keeps a floor"
    core.remember_spent(b"c", [], floor=9)
    core.remember_spent(b"d", [7])
    assert core.forgotten == {b"b": ({1, 3}, 0), b"c": (set(), 9), b"d": ({7}, 0)}


def test_an_abort_answered_by_a_stranger_counts_when_the_handshake_follows() -> None:
    """Prefill does not know decode, and says Drained. The offer that this abort had overtaken must not bind later."""
    pair = Pair()
    pair.send(7)
    pair.p.tell(wire.Abort(7, 5, "abort", "left"))
    pair.p.tell(pair.d.core.identity.hello())
    pair.p.tell(wire.Offer(7, 5, pages(1), -1, 0))
    assert not pair.p.core.links
    pair.p.tell(wire.Offer(7, 6, pages(1), -1, 0))
    assert len(pair.p.core.links) == 1


# --- the same number again, while the last life is still in the air ----------------------------------------------------------


LATE = ("done", "part", "verdict", "drained", "abort", "offer")


@pytest.mark.parametrize("order", list(permutations(LATE))[::29])
def test_late_messages_of_one_life_do_not_touch_the_next(pair: Pair, order: tuple[str, ...]) -> None:
    sending, receiving = pair.transferring(7)
    (old_op,), old = tuple(pair.writes), receiving.generation
    pair.writes.clear()
    late_offer = offer(pair)
    pair.d.abort(receiving)
    pair.deliver()
    pair.p.clear(sending)
    pair.d.clear(receiving)
    sending, receiving = pair.transferring(7)
    (new_op,) = pair.writes
    for what in order:
        if what == "done":
            pair.p.step(ev.WriteDone(old_op, 10))
        elif what == "part":
            pair.d.tell(wire.Part(7, old, 0, 1, True, 10))
        elif what == "verdict":
            pair.d.tell(wire.Verdict(7, old, True, "", "", 10))
            pair.d.tell(wire.Verdict(7, old, False, "abort", "old", 10))
        elif what == "drained":
            pair.d.tell(wire.Drained(7, old))
        elif what == "abort":
            pair.p.tell(wire.Abort(7, old, "abort", "old"))
        else:
            pair.p.tell(late_offer)
        assert sending.state is Phase.TRANSFERRING
        assert receiving.state is Phase.WAITING_FOR_INPUT
        assert sending.bytes_moved == receiving.bytes_moved == 0
        assert (7, sending.generation) not in pair.p.released
        assert (7, receiving.generation) not in pair.d.released
    pair.finish(new_op)
    pair.deliver()
    assert sending.state is receiving.state is Phase.SUCCESS
    assert len(pair.p.released) == len(set(pair.p.released)) == 2
    assert len(pair.d.released) == len(set(pair.d.released)) == 2
    pair.idle()


def test_messages_that_name_another_room_are_ignored(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    g = receiving.generation
    for message in (
        wire.Part(8, g, 0, 1, True, 1),
        wire.Verdict(8, g, True, "", "", 0),
        wire.Verdict(8, g, False, "abort", "no", 0),
        wire.Drained(8, g),
        wire.Accepted(8, g),
    ):
        pair.d.tell(message)
    assert receiving.state is Phase.WAITING_FOR_INPUT
    pair.p.tell(wire.Offer(8, g, pages(1), -1, 0))
    assert sending.state is Phase.TRANSFERRING
    assert not [m for m in pair.p.sent(wire.Accepted) if isinstance(m, wire.Accepted) and m.room == 8]
