"""The core's handshake: what does not fit is refused at once, and both values are named."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.core.wire import ComponentInfo
from pd_fsm.machines import PeerState, Phase
from tests.pair import ADDRESS, COMPONENTS, Pair, met, pages, silence

KV, AUX = COMPONENTS
P, D = b"P" * 16, b"D" * 16


# --- handshake ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("components", "said"),
    [
        ((KV,), "prefill-0 has the components ['aux', 'kv'] and decode-0 ['kv']"),
        ((KV, AUX, AUX), "a component twice"),
        ((AUX, KV), "prefill-0 has its components in the order ['kv', 'aux'] and decode-0 ['aux', 'kv']"),
        (
            (ComponentInfo("kv", "rows", "kv", 16, 1_000, (4_096, 4_096)), AUX),
            "component 'kv': kind is paged at prefill-0 and rows at decode-0",
        ),
        (
            (ComponentInfo("kv", "paged", "swa", 16, 1_000, (4_096, 4_096)), AUX),
            "component 'kv': space is kv at prefill-0 and swa at decode-0",
        ),
        (
            (ComponentInfo("kv", "paged", "kv", 32, 1_000, (4_096, 4_096)), AUX),
            "component 'kv': page_size is 16 at prefill-0 and 32 at decode-0",
        ),
        (
            (ComponentInfo("kv", "paged", "kv", 16, 1_000, (4_096, 2_048)), AUX),
            "item_bytes is 2 regions of 4096 bytes an item at prefill-0 and 2 regions of 2048/4096 bytes an item at decode-0",
        ),
        (
            (KV, ComponentInfo("aux", "rows", "aux", 0, 64, (256,))),
            "component 'aux': item_bytes is 1 regions of 128 bytes an item at prefill-0 and 1 regions of 256 bytes",
        ),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(components: tuple[ComponentInfo, ...], said: str) -> None:
    pair = Pair()
    pair.sides.remove(pair.d)
    pair.d = pair.side("decode", D, "decode-0", components)
    pair.d.step(ev.OpenReceive(7, dict.fromkeys(pair.d.core.spaces, b""), address=ADDRESS))
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, (pair.record(),)))
    pair.deliver()
    assert pair.d.failure().cause == "peer_refused"
    assert said in pair.d.failure().reason
    assert pair.d.did(ev.PeerDown) == [ev.PeerDown(P)]
    assert not pair.p.core.peers
    assert not pair.d.core.peers
    pair.idle()


def test_a_component_twice_cannot_smuggle_in_an_index_space() -> None:
    """The second one fits and would hide the first, whose page size of 0 an offer's check would divide by."""
    pair = Pair()
    twice = (ComponentInfo("kv", "paged", "x", 0, 9, (1,)), KV, AUX)
    pair.send(7)
    pair.p.tell(wire.Hello("x", "decode", "memory", (0, 1) * 4, twice, b""))
    assert len(pair.pending(wire.Refuse)) == 1
    pair.p.tell(wire.Offer(7, 1, {**pages(1), "x": b""}, 0, 16))
    assert not pair.p.core.links


def test_both_data_planes_learn_of_the_peer() -> None:
    pair = Pair()
    pair.receive(7)
    pair.deliver()
    assert pair.p.did(ev.PeerUp) == [ev.PeerUp(D, pair.d.core.identity.hello())]
    assert pair.d.did(ev.PeerUp) == [ev.PeerUp(P, pair.p.core.identity.welcome())]
    assert pair.d.did(ev.Connect) == [ev.Connect(P, "memory://p")]
    assert not pair.p.did(ev.Connect), "only decode dials"


def test_a_second_answer_of_the_rendezvous_is_late() -> None:
    pair = Pair()
    pair.send(7)
    receiving = pair.receive(7)
    assert pair.d.step(ev.PeersFound(receiving.generation, (pair.record(),))) == []
    assert pair.d.core.counts["late.peers_found"] == 1
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    assert receiving.state is Phase.SUCCESS
    assert not pair.d.peer().links


def test_the_number_of_items_may_differ() -> None:
    pair = Pair()
    pair.sides.remove(pair.d)
    small = (ComponentInfo("kv", "paged", "kv", 16, 20, (4_096, 4_096)), ComponentInfo("aux", "rows", "aux", 0, 4, (128,)))
    pair.d = pair.side("decode", D, "decode-0", small)
    pair.transferring(7)
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS


@pytest.mark.parametrize(
    ("role", "transport", "said"),
    [
        ("prefill", "memory", "prefill-0 and x have the roles prefill and prefill"),
        ("router", "memory", "have the roles prefill and router"),
        ("decode", "zmq", "prefill-0 uses transport 'memory' and x 'zmq'"),
    ],
)
def test_a_role_or_transport_that_does_not_fit_is_refused(role: str, transport: str, said: str) -> None:
    pair = Pair()
    ranks = (0, 1) * 4
    pair.p.tell(wire.Hello("x", role, transport, ranks, COMPONENTS, b""))
    (refusal,) = pair.pending(wire.Refuse)
    assert isinstance(refusal, wire.Refuse)
    assert said in refusal.reason
    assert not pair.p.core.peers
    receiving = pair.receive(7)
    pair.d.tell(wire.Welcome("x", role.replace("decode", "prefill").replace("router", "decode"), transport, ranks, COMPONENTS, b""))
    if role == "prefill":  # a welcome of a prefill session is what decode wants
        assert pair.d.peer().up
    else:
        assert pair.d.failure().cause == "peer_refused"
        assert pair.d.released == [(7, receiving.generation)]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ((), "no prefill rank matches tp_rank=0, pp_rank=0, cp_rank=0"),
        ((ev.PeerRecord(P, "e", "p", tp_rank=0, tp_size=2),), "p has tp_size=2 and decode-0 has tp_size=1"),
        ((ev.PeerRecord(P, "e", "p", pp_rank=0, pp_size=4),), "p has pp_size=4 and decode-0 has pp_size=1"),
        ((ev.PeerRecord(P, "e", "p", tp_rank=3),), "no prefill rank matches"),
    ],
)
def test_ranks_that_do_not_match_are_refused(pair: Pair, records: tuple[ev.PeerRecord, ...], said: str) -> None:
    pair.d.step(ev.OpenReceive(7, pages(1), address="new"))
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, records))
    assert pair.d.failure().cause == "peer_refused"
    assert said in pair.d.failure().reason
    pair.idle()


def test_a_rank_that_is_listed_twice_is_one_writer(pair: Pair) -> None:
    pair.send(7)
    pair.d.step(ev.OpenReceive(7, pages(1, 2), 3, address="new"))
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, (pair.record(), pair.record())))
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS
    assert not pair.d.peer().links
    pair.idle()


def test_the_rendezvous_is_asked_once_for_each_prefill_instance(pair: Pair) -> None:
    pair.d.effects.clear()
    pair.receive(1)  # known since the two have met
    assert not pair.d.did(ev.Lookup)
    for room, dp_rank in ((2, None), (3, None), (4, 1), (5, 1)):  # with several dp ranks each room may be served elsewhere
        pair.d.step(ev.OpenReceive(room, pages(room), address="dp", dp_rank=dp_rank))
        if ev.Lookup in map(type, pair.d.effects[-5:]) or room != 5:
            record = ev.PeerRecord(P, "memory://p", "prefill-0", dp_rank=1, dp_size=2)
            pair.d.step(ev.PeersFound(pair.d.room(room).generation, (record,)))
    assert [lookup.room for lookup in pair.d.did(ev.Lookup)] == [2, 3, 4]
    assert {pair.d.phase(room) for room in (2, 3, 4, 5)} == {Phase.WAITING_FOR_INPUT}


def test_peers_are_bounded() -> None:
    pair = met(limits=Limits(peers_max=1))
    second = pair.side("prefill", b"Q" * 16, "prefill-1")
    third = pair.side("decode", b"E" * 16, "decode-1")
    pair.d.step(ev.OpenReceive(7, pages(1), address="new"))
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, (pair.record(second),)))
    assert pair.d.failure().cause == "overload"
    assert "Limits.peers_max" in pair.d.failure().reason
    pair.receive(8, by=third)
    pair.deliver()
    assert third.failure(8).cause == "peer_refused"
    assert "Limits.peers_max" in third.failure(8).reason
    assert list(pair.p.core.peers) == [D]
    pair.idle()


def test_a_peer_that_does_not_answer_the_handshake_is_lost() -> None:
    pair = Pair(Deadlines(handshake_ms=2_500))
    receiving = pair.receive(7)
    silence(pair, pair.d, 2_400)
    assert receiving.live
    silence(pair, pair.d, 600)  # checked with the heartbeat
    assert pair.d.failure().cause == "peer_lost"
    assert "did not answer the handshake at memory://p within 2500 ms" in pair.d.failure().reason
    assert pair.d.released == [(7, receiving.generation)], "nothing was granted to it"
    assert not pair.d.core.peers
    pair.idle()


def test_a_welcome_again_changes_nothing(pair: Pair) -> None:
    receiving = pair.receive(7)
    pair.d.tell(pair.p.core.identity.welcome())
    pair.d.tell(wire.Refuse("too late"))
    assert pair.d.peer().state is PeerState.READY
    assert receiving.state is Phase.WAITING_FOR_INPUT
