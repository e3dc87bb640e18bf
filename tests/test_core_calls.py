"""The engine's own mistakes are refused and change nothing; what an operator and a trace see."""

from __future__ import annotations

import json

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Limits
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import MACHINES, Phase
from tests.pair import Pair, met, pages


@pytest.fixture
def pair() -> Pair:
    return Pair()


# --- the engine's own mistakes are refused and change nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        (ev.ChunkReady(0, 0, 16, pages(1), False), "must start at token 16"),
        (ev.ChunkReady(0, 17, 32, pages(1), False), "must start at token 16"),
        (ev.ChunkReady(0, 16, 8, pages(), False), "not end before it starts"),
        (ev.ChunkReady(0, 16, 20, pages(1), False), "only the end of the last chunk"),
        (ev.ChunkReady(0, 16, 48, pages(1), False), "2 pages of 16 tokens needed for 'kv', got 1"),
        (ev.ChunkReady(0, 16, 32, pages(1, 2), False), "1 pages of 16 tokens needed for 'kv', got 2"),
        (ev.ChunkReady(0, 16, 32, pages(1_000), False), "must be in 0..999, got 1000..1000"),
        (ev.ChunkReady(0, 16, 32, pages(-1), False), "must be in 0..999, got -1..-1"),
        (ev.ChunkReady(0, 16, 32, {"kv": b"12345"}, False), "5 bytes"),
        (ev.ChunkReady(0, 16, 32, {}, False), "pages are needed for"),
        (ev.ChunkReady(0, 16, 32, {**pages(1), "x": b""}, False), "pages are needed for"),
        (ev.ChunkReady(0, 16, 32, pages(1), False, 0), "aux row goes with the last chunk"),
        (ev.ChunkReady(0, 16, 32, pages(1), True, 64), "aux row 64 is not one of this layout's 64"),
    ],
)
def test_bad_chunks_are_refused(pair: Pair, chunk: ev.ChunkReady, said: str) -> None:
    room = pair.send(7)
    pair.receive(7, (10, 11, 12))
    pair.deliver()
    pair.chunk(7, 0, 16, (0,), last=False)
    before = json.dumps(pair.p.core.describe()), len(pair.p.effects), len(room.chunks)
    bad = ev.ChunkReady(room.generation, chunk.start, chunk.end, chunk.pages, chunk.last, chunk.aux_row)
    with pytest.raises(LocalProtocolError, match="room 7, tokens") as error:
        pair.p.step(bad)
    assert said in str(error.value)
    assert (json.dumps(pair.p.core.describe()), len(pair.p.effects), len(room.chunks)) == before
    pair.chunk(7, 16, 32, (1,), last=True, aux_row=63)
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is Phase.SUCCESS


def test_no_chunk_after_the_last_one(pair: Pair) -> None:
    pair.transferring(7)
    with pytest.raises(LocalProtocolError, match="the last chunk was already handed in"):
        pair.chunk(7, 32, 48, (3,), last=True)


def test_a_chunk_for_a_room_that_concluded_meanwhile_is_no_mistake(pair: Pair) -> None:
    """The engine cannot know yet that the room failed, and it may go on with any chunk, even a wrong one."""
    sending, _ = pair.transferring(7)
    pair.p.abort(sending)
    assert pair.p.step(ev.ChunkReady(sending.generation, 99, 3, {}, False)) == []
    assert pair.p.core.counts["late.chunk"] == 1
    assert len(sending.chunks) == 1


def test_chunks_of_a_room_are_bounded() -> None:
    pair = Pair(limits=Limits(chunks_max=2))
    pair.send(7)
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.chunk(7, 16, 32, (2,), last=False)
    with pytest.raises(LocalProtocolError, match=r"Limits\.chunks_max"):
        pair.chunk(7, 32, 48, (3,), last=True)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (ev.OpenReceive(7, {}), "pages are needed for"),
        (ev.OpenReceive(7, pages(1, 1)), "granted twice"),
        (ev.OpenReceive(7, pages(1_000)), "must be in 0..999"),
        (ev.OpenReceive(7, pages(-1, 3)), "got -1..3"),
        (ev.OpenReceive(7, {"kv": b"123"}), "3 bytes"),
        (ev.OpenReceive(7, pages(1), 64), "aux row 64"),
        (ev.OpenReceive(7, pages(1), -2), "aux row -2"),
        (ev.OpenReceive(7, pages(1), 0, 8), "page size 16, not 8"),
        (ev.OpenReceive(7, pages(1), 0, -16), "not -16"),
        (ev.OpenReceive(-1, pages(1)), "0..2**63-1"),
        (ev.OpenReceive(1 << 63, pages(1)), "0..2**63-1"),
        (ev.OpenSend(7), "open it with receive()"),
    ],
)
def test_bad_opens_of_decode_are_refused(event: ev.Event, said: str) -> None:
    pair = met()
    before = json.dumps(pair.d.core.describe())
    with pytest.raises(LocalProtocolError) as error:
        pair.d.step(event)
    assert said in str(error.value)
    assert json.dumps(pair.d.core.describe()) == before
    assert not pair.d.effects


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (ev.OpenSend(7, -1), "readers must be 0"),
        (ev.OpenSend(-1), "0..2**63-1"),
        (ev.OpenReceive(7, pages(1)), "open it with send()"),
    ],
)
def test_bad_opens_of_prefill_are_refused(pair: Pair, event: ev.Event, said: str) -> None:
    with pytest.raises(LocalProtocolError) as error:
        pair.p.step(event)
    assert said in str(error.value)
    assert not pair.p.effects
    assert not pair.p.core.registry.by_room


def test_open_rooms_are_bounded() -> None:
    pair = Pair(limits=Limits(rooms_max=2))
    pair.send(1)
    pair.send(2)
    with pytest.raises(LocalProtocolError, match=r"Limits\.rooms_max"):
        pair.send(3)
    pair.p.abort(pair.p.room(1))
    with pytest.raises(LocalProtocolError, match=r"Limits\.rooms_max"):
        pair.send(3)
    pair.p.clear(pair.p.room(1))
    pair.send(3)


def test_clear_before_the_end_is_refused_and_later_idempotent(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    for side, room in ((pair.p, sending), (pair.d, receiving)):
        with pytest.raises(LocalProtocolError, match=r"room 7 is (TRANSFERRING|WAITING_FOR_INPUT)"):
            side.clear(room)
    pair.finish()
    pair.deliver()
    for side, room in ((pair.p, sending), (pair.d, receiving)):
        for _ in range(2):
            side.clear(room)
        side.abort(room)  # of a room that is forgotten: late, and harmless
        assert side.core.counts["late.abort"] == 1
    pair.p.step(ev.ChunkReady(sending.generation, 32, 48, pages(3), True))
    assert pair.p.core.counts["late.chunk"] == 1
    pair.idle()


# --- what an operator and a trace see ---------------------------------------------------------------------------------------


def test_steps_are_declared_rows_and_effects_are_in_order(pair: Pair) -> None:
    pair.transferring(7)
    pair.finish()
    pair.deliver()
    for side in (pair.p, pair.d):
        side.clear(side.room(7))
        declared = {row.id: row for table in MACHINES.values() for row in table.rows()}
        for step in side.steps:
            if step.row in {"open", "clear"}:
                assert step.machine == "room"
                continue
            row, states = declared[step.row], MACHINES[step.machine].states
            assert (step.event, step.before, step.after) == (row.event, states(row.source).name, states(row.target).name)
        walk = [(s.before, s.after) for s in side.steps if s.machine == "room" and s.before != s.after]
        assert walk == [
            ("", "BOOTSTRAPPING"),
            ("BOOTSTRAPPING", "WAITING_FOR_INPUT"),
            ("WAITING_FOR_INPUT", "TRANSFERRING"),
            ("TRANSFERRING", "SUCCESS"),
            ("SUCCESS", ""),
        ]
    order = [type(e).__name__ for e in pair.d.effects if not isinstance(e, ev.Send)]
    assert order == [
        *("Publish", "Lookup", "Connect", "PeerUp", "Publish", "Expose"),
        *("Publish", "Publish", "Revoke", "ReleasePages"),
    ]
    at = pair.d.effects.index(pair.d.did(ev.Expose)[0])
    assert at < pair.d.effects.index(ev.Send(b"P" * 16, pair.d.sent(wire.Offer)[0])), "no grant travels before it is enforced"


def test_describe_names_who_owes_what(pair: Pair) -> None:
    sending, receiving = pair.transferring(7)
    told = json.loads(json.dumps(pair.p.core.describe()))
    assert told["rooms"][0]["phase"] == "TRANSFERRING"
    assert told["rooms"][0]["waits_for"] == "TRANSFERRING: writing to decode-0"
    assert told["leases"] == [{"room": 7, "generation": sending.generation, "state": "EXPOSED", "holders": ["decode-0"]}]
    told = json.loads(json.dumps(pair.d.core.describe()))
    assert "no part came from prefill-0" in told["rooms"][0]["waits_for"]
    pair.d.abort(receiving)
    pair.d.clear(receiving)
    told = json.loads(json.dumps(pair.d.core.describe()))
    assert told["rooms"] == []
    assert told["leases"] == [{"room": 7, "generation": receiving.generation, "state": "REVOKING", "holders": ["prefill-0"]}]
    assert told["unanswered"] == [{"message": "abort", "peer": "prefill-0", "generation": receiving.generation}]
    pair.deliver()
    pair.finish()
    told = json.loads(json.dumps(pair.p.core.describe()))
    assert told["rooms"][0]["waits_for"] == "clear()"
    assert told["rooms"][0]["failure"]["cause"] == "peer_abort"
    assert told["unanswered"] == [{"message": "drained", "peer": "decode-0", "generation": receiving.generation}]
    pair.deliver()
    for side in (pair.p, pair.d):
        told = json.loads(json.dumps(side.core.describe()))
        assert told["leases"] == []
        assert told["unanswered"] == []
