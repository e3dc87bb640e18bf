"""A message names a room and a generation: one that names another room with a generation of ours moves nothing of ours."""

from __future__ import annotations

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from tests.pair import Pair


def test_drained_of_another_room_does_not_end_the_wait_for_ours(pair: Pair) -> None:
    """The abort would not be repeated any more, and the pages would never come back."""
    _, receiver = pair.transferring(7)
    pair.d.abort(receiver)
    asked = ("abort", pair.p.incarnation, receiver.generation)
    pair.d.tell(wire.Drained(8, receiver.generation))
    assert asked in pair.d.core.timers.repeats
    assert not receiver.lease.owned
    pair.d.tell(wire.Drained(7, receiver.generation))
    assert asked not in pair.d.core.timers.repeats
    assert receiver.lease.owned


def test_drained_of_another_room_does_not_answer_a_rejection(pair: Pair) -> None:
    pair.d.step(ev.CancelRequested(9, "never opened"))
    ((_, _, generation),) = [key for key in pair.d.core.timers.repeats if key[0] == "abort"]
    pair.d.tell(wire.Drained(8, generation))
    assert ("abort", pair.p.incarnation, generation) in pair.d.core.timers.repeats
    pair.d.tell(wire.Drained(9, generation))
    assert ("abort", pair.p.incarnation, generation) not in pair.d.core.timers.repeats


def test_abort_of_another_room_fails_none(pair: Pair) -> None:
    sender, receiver = pair.transferring(7)
    pair.p.tell(wire.Abort(8, receiver.generation, "abort", "of another room"))
    assert sender.live


def test_acknowledgement_of_another_room_ends_no_repetition(pair: Pair) -> None:
    sender, receiver = pair.transferring(7)
    pair.p.abort(sender)
    pair.p.tell(wire.VerdictAck(8, receiver.generation))
    assert ("verdict", pair.d.incarnation, receiver.generation) in pair.p.core.timers.repeats
    pair.p.tell(wire.Abort(7, receiver.generation, "peer_abort", "it was told"))
    pair.finish()
    assert ("drained", pair.d.incarnation, receiver.generation) in pair.p.core.timers.repeats
    pair.p.tell(wire.DrainedAck(8, receiver.generation))
    assert ("drained", pair.d.incarnation, receiver.generation) in pair.p.core.timers.repeats
