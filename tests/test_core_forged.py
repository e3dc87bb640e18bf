"""A connection speaks for the process at its other end, and for no other."""

from __future__ import annotations

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.machines import LeaseState, PeerState, Phase
from tests.pair import Pair

INTRUDER = b"X" * 16


def receive(pair: Pair, message: wire.Message, *, source: bytes, via: bytes) -> None:
    pair.d.step(ev.Received(source, pair.d.incarnation, message, via))


def test_nobody_else_can_declare_a_peer_gone_and_free_its_pages(pair: Pair) -> None:
    pair.transferring(7)
    room = pair.d.room(7)
    receive(pair, wire.Stranger(pair.p.incarnation), source=INTRUDER, via=INTRUDER)
    assert pair.d.core.counts["forged"] == 1
    assert room.state is not Phase.FAILED
    assert room.lease.state is LeaseState.EXPOSED
    assert pair.d.core.peers[pair.p.incarnation].state is PeerState.READY


def test_nobody_can_speak_as_another(pair: Pair) -> None:
    pair.transferring(7)
    room = pair.d.room(7)
    verdict = wire.Verdict(7, room.generation, True, "", "", 0)
    receive(pair, verdict, source=pair.p.incarnation, via=INTRUDER)
    assert pair.d.core.counts["forged"] == 1
    assert room.live


def test_who_answers_at_the_address_may_say_that_the_peer_is_gone(pair: Pair) -> None:
    pair.transferring(7)
    room = pair.d.room(7)
    receive(pair, wire.Stranger(pair.p.incarnation), source=INTRUDER, via=pair.p.incarnation)
    assert room.failure is not None
    assert room.failure.cause == "peer_lost"
    assert pair.d.core.counts["forged"] == 0
