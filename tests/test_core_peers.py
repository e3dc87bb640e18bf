"""The core's peers: handshake, liveness, loss, death, replacement, goodbye. Silence is never taken for proof."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import LeaseState, PeerState, Phase
from tests.pair import Pair, pages, silence

P, D = b"P" * 16, b"D" * 16


# --- liveness ----------------------------------------------------------------------------------------------------------------


def test_silence_makes_suspect_then_lost_and_never_free(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    silence(pair, pair.d, 2_000)
    assert pair.d.peer().state is PeerState.READY
    assert len(pair.d.sent(wire.Ping)) == 2
    silence(pair, pair.d, 1_000)
    assert pair.d.peer().state is PeerState.SUSPECT
    assert receiving.live
    silence(pair, pair.d, 6_900)
    assert receiving.live
    silence(pair, pair.d, 1_100)
    assert pair.d.peer().state is PeerState.LOST
    assert pair.d.failure().cause == "peer_lost"
    assert "it was silent for 10000 ms" in pair.d.failure().reason
    assert receiving.lease.state is LeaseState.QUARANTINED
    silence(pair, pair.d, 3_600_000)
    assert not pair.d.released


def test_a_sign_of_life_ends_the_suspicion(pair: Pair) -> None:
    pair.transferring(7)
    silence(pair, pair.d, 9_000)
    assert pair.d.peer().state is PeerState.SUSPECT
    pair.d.tell(wire.Pong())
    assert pair.d.peer().state is PeerState.READY
    silence(pair, pair.d, 2_900)
    assert pair.d.peer().state is PeerState.READY


def test_two_that_hear_each_other_are_never_suspected(pair: Pair) -> None:
    pair.advance(60_000)
    assert pair.p.peer().state is pair.d.peer().state is PeerState.READY
    assert not [s for side in (pair.p, pair.d) for s in side.steps if s.machine == "peer"]
    assert len(pair.p.sent(wire.Ping)) + len(pair.d.sent(wire.Ping)) <= 121


def test_a_ping_is_answered(pair: Pair) -> None:
    assert pair.p.tell(wire.Ping()) == [ev.Send(D, wire.Pong())]
    assert pair.d.tell(wire.Ping()) == [ev.Send(P, wire.Pong())]
    assert pair.p.tell(wire.Pong()) == []


def test_a_broken_connection_is_a_suspicion_and_a_refused_one_is_proof(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.d.step(ev.PeerUnreachable(P, "connection reset"))
    assert pair.d.peer().state is PeerState.SUSPECT
    assert receiving.live
    pair.d.step(ev.PeerUnreachable(P, "connection reset"))
    effects = pair.d.step(ev.PeerUnreachable(P, "connection refused", dead=True))
    assert pair.d.failure().reason == "prefill-0 is lost: connection refused"
    assert effects[-1] == ev.ReleasePages(7, receiving.generation)
    assert {type(e) for e in effects} == {ev.PeerDown, ev.Publish, ev.Revoke, ev.Disconnect, ev.ReleasePages}
    assert P not in pair.d.core.peers
    pair.d.step(ev.PeerUnreachable(P, "connection refused", dead=True))
    assert pair.d.core.counts["late.unreachable"] == 1
    # the reader's death frees nothing of prefill: its own write may still read the pages
    pair.p.step(ev.PeerUnreachable(D, "connection refused", dead=True))
    assert pair.p.failure().cause == "peer_lost"
    assert not pair.p.released
    assert pair.p.core.peers
    pair.finish()
    assert pair.p.released == [(7, sending.generation)]
    assert D not in pair.p.core.peers
    pair.idle()


def test_proof_of_death_ends_a_quarantine(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    silence(pair, pair.d, 12_000)
    pair.d.clear(receiving)
    assert receiving.lease.state is LeaseState.QUARANTINED
    pair.d.step(ev.PeerUnreachable(P, "connection refused", dead=True))
    assert pair.d.released == [(7, receiving.generation)]
    pair.gone(pair.p)
    pair.idle()


@pytest.mark.parametrize("drained", [False, True])
def test_a_lost_peer_that_says_goodbye(pair: Pair, drained: bool) -> None:
    """It was only slow, and now it closes: when it has drained, that is the proof that was missing."""
    _, receiving = pair.transferring(7)
    silence(pair, pair.d, 12_000)
    pair.d.tell(wire.Goodbye("restart", drained))
    assert bool(pair.d.released) is drained
    assert receiving.lease.state is (LeaseState.QUIESCED if drained else LeaseState.QUARANTINED)


def test_a_lost_peer_answers_after_all(pair: Pair) -> None:
    """Both stopped hearing each other. The abort goes on, and frees the pages when it is answered."""
    sending, receiving = pair.transferring(7)
    silence(pair, pair.d, 12_000)
    silence(pair, pair.p, 12_000)
    assert pair.p.failure().cause == pair.d.failure().cause == "peer_lost"
    assert not pair.p.released
    pair.advance(3_000)
    assert not pair.d.released
    pair.finish()
    pair.advance(3_000)
    assert pair.p.released == [(7, sending.generation)]
    assert pair.d.released == [(7, receiving.generation)]
    pair.idle()
    assert not pair.d.core.peers
    pair.p.clear(sending)
    pair.d.clear(receiving)
    pair.transferring(7)  # and they meet anew
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS


def test_what_is_owed_survives_that_the_peer_is_met_anew(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    silence(pair, pair.d, 12_000)
    assert pair.d.peer().state is PeerState.LOST
    pair.receive(8)  # the rendezvous still lists it: a new handshake
    pair.deliver()
    assert pair.d.peer().state is PeerState.READY
    assert receiving.lease.state is LeaseState.QUARANTINED
    pair.advance(2_000)
    pair.finish()
    pair.deliver()
    assert pair.d.released == [(7, receiving.generation)]


def test_what_is_spent_survives_that_the_peer_is_met_anew(pair: Pair) -> None:
    """One transfer concluded, another keeps the record of the lost reader: neither may open again after the new handshake."""
    first, second = pair.transferring(7), pair.transferring(8)
    pair.finish(min(pair.writes))
    pair.deliver()
    pair.p.step(ev.PeerOverflowed(D, "it does not read"))
    assert pair.p.peer().state is PeerState.LOST
    pair.p.tell(pair.d.core.identity.hello())
    assert pair.p.peer().up
    for room, (sending, receiving) in ((7, first), (8, second)):
        pair.p.clear(sending)
        pair.send(room)
        pair.p.tell(wire.Offer(room, receiving.generation, pages(10, 11), 3, 0))
        assert pair.p.phase(room) is Phase.BOOTSTRAPPING
    pair.finish()
    pair.p.tell(wire.Offer(8, second[1].generation, pages(10, 11), 3, 0))
    assert pair.p.phase(8) is Phase.BOOTSTRAPPING


def test_a_verdict_is_owed_after_the_peer_was_met_anew(pair: Pair) -> None:
    """Decode had all parts and succeeded; prefill lost it before the write was reported. The debt must not stay for ever."""
    sending, receiving = pair.transferring(7)
    (op,) = pair.writes
    pair.d.tell(pair.writes[op].notice)
    assert receiving.state is Phase.SUCCESS
    silence(pair, pair.p, 12_000)
    assert pair.p.failure().cause == "peer_lost"
    pair.p.tell(pair.d.core.identity.hello())
    assert pair.p.peer().up
    pair.finish(op)
    pair.deliver()
    assert pair.p.released == [(7, sending.generation)]
    assert receiving.state is Phase.SUCCESS
    pair.idle()


def test_a_vouched_room_does_not_wait_for_a_lost_peer(pair: Pair) -> None:
    """The data plane proved the pages free and the peer is lost: nothing is left to ask for."""
    for room, first in ((7, "revoked"), (8, "lost")):
        pair.send(room)
        receiving = pair.receive(room)
        pair.deliver(lose=(wire.Abort,))
        if first == "revoked":
            pair.d.abort(receiving)
            pair.d.step(ev.Revoked(receiving.generation))
    assert len(pair.d.core.links) == 2
    pair.d.step(ev.PeerOverflowed(P, "it does not read"))
    assert len(pair.d.core.links) == 1
    assert pair.d.core.describe()["quarantined_rooms"] == 1, "not the one that was proven free before"
    pair.d.step(ev.Revoked(pair.d.room(8).generation))
    assert pair.d.core.describe()["quarantined_rooms"] == 0
    assert len(pair.d.released) == 2
    assert not pair.d.core.links
    assert not pair.d.core.timers.repeats
    assert not pair.d.core.peers


# --- replaced and forgotten --------------------------------------------------------------------------------------------------


def test_another_process_at_the_address_is_proof_of_death(pair: Pair) -> None:
    _, receiving = pair.transferring(7)
    new = pair.side("prefill", b"Q" * 16, "prefill-0")
    pair.gone(pair.p)
    pair.p = new
    pair.d.abort(receiving)
    pair.deliver()  # the abort for the old process reaches the new one
    assert new.sent(wire.Stranger) == [wire.Stranger(P)]
    assert pair.d.released == [(7, receiving.generation)]
    assert not pair.d.core.peers
    pair.d.clear(receiving)
    pair.transferring(7)  # the cached registration is gone, too
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS
    pair.idle()


def test_a_registration_of_a_dead_process_is_not_believed(pair: Pair) -> None:
    pair.d.step(ev.PeerUnreachable(P, "connection refused", dead=True))
    receiving = pair.receive(7)
    assert receiving.state is Phase.BOOTSTRAPPING
    assert not receiving.links
    assert "the rendezvous still lists prefill-0" in receiving.lookup_reason
    assert receiving.lookup_reason.endswith("which is gone")
    new = pair.side("prefill", b"Q" * 16, "prefill-0")
    pair.d.step(ev.PeersFound(receiving.generation, (pair.record(new),)))
    pair.deliver()
    assert receiving.state is Phase.WAITING_FOR_INPUT


def test_a_peer_that_forgot_us_is_lost_and_the_pages_wait_for_its_word(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    pair.p.step(ev.PeerOverflowed(D, "it does not read"))
    assert pair.p.failure().reason == "decode-0 is lost: it does not read"
    pair.d.tell(wire.Stranger(P))
    assert pair.d.failure().reason == "prefill-0 is lost: it has given this session up"
    assert receiving.lease.state is LeaseState.QUARANTINED
    pair.deliver()
    assert not pair.d.released
    pair.finish()
    pair.advance(2_000)
    assert pair.d.released == [(7, receiving.generation)]
    assert pair.p.released == [(7, sending.generation)]
    pair.idle()


def test_strangers_are_answered_and_known_ones_are_not_lost_by_an_echo(pair: Pair) -> None:
    pair.p.step(ev.Received(b"X" * 16, P, wire.Ping()))
    assert pair.wire[-1][1] == b"X" * 16
    assert pair.pending(wire.Stranger) == [wire.Stranger(P)]
    pair.wire.clear()
    assert pair.d.step(ev.Received(b"X" * 16, D, wire.Stranger(b"Y" * 16))) == []
    assert pair.d.core.counts["late.stranger"] == 1
    connecting = Pair()
    receiving = connecting.receive(7)
    connecting.d.tell(wire.Stranger(P))  # an echo of our earlier life: only the handshake's answer counts now
    assert receiving.live


# --- the end of a session ----------------------------------------------------------------------------------------------------


def test_shutdown_fails_what_lives_and_opens_nothing_new(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    pair.transferring(7)
    pair.receive(8)
    pair.deliver()
    pair.p.step(ev.ShutdownRequested("prefill-0 was closed"))
    assert pair.p.step(ev.ShutdownRequested("again")) == []
    with pytest.raises(LocalProtocolError, match=r"is closing \(prefill-0 was closed\)"):
        pair.send(9)
    pair.receive(10, by=other)
    pair.advance(2_000)
    assert pair.p.failure() == ev.Failure("shutdown", "prefill-0 was closed")
    assert pair.d.failure(7).reason == "prefill-0 failed (shutdown): prefill-0 was closed"
    assert pair.d.failure(8).reason == "prefill-0 failed (shutdown): prefill-0 was closed"
    assert other.failure(10) == ev.Failure("peer_refused", "prefill-0 was closed", "prefill-0")
    pair.finish()
    pair.deliver()
    pair.idle()


def test_shutdown_without_a_reason_is_a_shutdown(pair: Pair) -> None:
    pair.transferring(7)
    pair.d.step(ev.ShutdownRequested(""))
    assert pair.d.failure().cause == "shutdown"
    with pytest.raises(LocalProtocolError, match="is closing"):
        pair.receive(8)


@pytest.mark.parametrize("drained", [True, False])
def test_goodbye_says_whether_memory_is_safe(pair: Pair, drained: bool) -> None:
    _, receiving = pair.transferring(7)
    pair.p.step(ev.ShutdownRequested("closed"))
    pair.wire.clear()
    if drained:
        pair.finish()
        pair.wire.clear()
    pair.p.step(ev.GoodbyeRequested("closed"))
    assert pair.pending(wire.Goodbye) == [wire.Goodbye("closed", drained)]
    pair.gone(pair.p)
    (_, _, frame) = pair.wire.pop()
    pair.d.step(ev.Received(P, D, wire.decode(frame)[2]))
    assert pair.d.failure().reason == "prefill-0 is lost: it closed: closed"
    assert receiving.lease.state is (LeaseState.QUIESCED if drained else LeaseState.QUARANTINED)
    assert bool(pair.d.released) is drained


def test_registration_is_shown(pair: Pair) -> None:
    assert pair.p.core.describe()["registration"] == "ok"
    pair.p.step(ev.RegistrationFailed("connection refused"))
    assert pair.p.core.describe()["registration"] == "connection refused"
    pair.p.step(ev.RegistrationFailed(""))
    assert pair.p.core.describe()["registration"] == "ok"
