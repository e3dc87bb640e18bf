"""The rude environment: every message, from every kind of peer, in every phase of a room."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import get_args

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Deadlines
from pd_fsm.machines import Phase
from tests.pair import ADDRESS, COMPONENTS, Pair, Side, pages

KINDS = get_args(wire.Message)
RANKS = (1, 2, 0, 1, 0, 1, 3, 4)


# --- the rude environment: every message, from every kind of peer, in every phase -------------------------------------------


def bootstrapping(pair: Pair) -> None:
    pair.send(7)
    pair.d.step(ev.OpenReceive(7, pages(10, 11), 3, 0, "elsewhere"))


def waiting(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7)
    pair.deliver()


def announced(pair: Pair) -> None:
    """Decode has offered, and reserves its pages later."""
    pair.send(7)
    pair.d.step(ev.OpenReceive(7, None, address=ADDRESS))
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True)


def transferring(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.finish()
    pair.chunk(7, 16, 32, (2,), last=True, aux_row=0)
    pair.deliver()


def success(pair: Pair) -> None:
    transferring(pair)
    pair.finish()
    pair.deliver()


def failed(pair: Pair) -> None:
    transferring(pair)
    pair.d.abort(pair.d.room(7))
    pair.deliver()


def cleared(pair: Pair) -> None:
    failed(pair)
    pair.p.clear(pair.p.room(7))
    pair.d.clear(pair.d.room(7))


def known(pair: Pair, side: Side) -> None:
    """The peer is up, as it is."""


def suspect(pair: Pair, side: Side) -> None:
    side.step(ev.PeerUnreachable(pair.other(side).incarnation, "reset"))


def lost(pair: Pair, side: Side) -> None:
    side.step(ev.PeerOverflowed(pair.other(side).incarnation, "it does not read"))


def dead(pair: Pair, side: Side) -> None:
    side.step(ev.PeerUnreachable(pair.other(side).incarnation, "refused", dead=True))


def unknown(pair: Pair, side: Side) -> None:
    """Told apart below: the message comes from somebody else."""


def nonsense(room: int, generation: int, side: Side) -> list[wire.Message]:
    """Every message type, twice where its meaning depends on what it says."""
    identity = side.core.identity
    return [
        *(wire.Hello("h", role, "memory", RANKS, COMPONENTS, b"") for role in ("prefill", "decode")),
        *(wire.Welcome("w", role, "memory", RANKS, COMPONENTS, b"") for role in ("prefill", "decode")),
        wire.Refuse("no"),
        wire.Stranger(identity.incarnation),
        wire.Stranger(b"P" * 16),
        wire.Stranger(b"D" * 16),
        wire.Offer(room, generation, pages(10, 11), 3, 0),
        wire.Offer(room, generation, {}, -1, 0),
        wire.Accepted(room, generation),
        wire.Computed(room, generation, 32),
        wire.Part(room, generation, 0, 0, False, 1),
        wire.Part(room, generation, 1, 2, True, 1),
        wire.Verdict(room, generation, True, "", "", 1),
        wire.Verdict(room, generation, False, "abort", "no", 1),
        wire.VerdictAck(room, generation),
        wire.Abort(room, generation, "abort", "no"),
        wire.Drained(room, generation),
        wire.DrainedAck(room, generation),
        wire.Ping(),
        wire.Pong(),
        wire.Draining("soon"),
        wire.Goodbye("no", False),
        wire.Goodbye("no", True),
    ]


@pytest.mark.parametrize("peer_state", [known, suspect, lost, dead, unknown])
@pytest.mark.parametrize("phase", [bootstrapping, waiting, announced, transferring, success, failed, cleared])
def test_no_message_raises_opens_a_room_or_undoes_a_verdict(
    phase: Callable[[Pair], None], peer_state: Callable[[Pair, Side], None]
) -> None:
    assert {type(m) for m in nonsense(1, 1, Pair().p)} == set(KINDS)
    for name in ("p", "d"):
        for index in range(len(nonsense(1, 1, Pair().p))):
            for room, offset in ((7, 0), (7, 1_000), (8, 0), (8, 1_000)):
                rude(phase, peer_state, name, index, room, offset)


def rude(
    phase: Callable[[Pair], None], peer_state: Callable[[Pair, Side], None], name: str, index: int, room: int, offset: int
) -> None:
    pair = Pair(Deadlines(lost_ms=5_000))
    pair.meet()
    phase(pair)
    generation = max(pair.d.core.registry._last_generation, 1)
    side: Side = getattr(pair, name)
    peer_state(pair, side)
    before = dict(side.core.registry.by_room)
    phases = {number: (r.state, r.failure) for number, r in before.items() if not r.live}
    source = b"X" * 16 if peer_state is unknown else pair.other(side).incarnation
    message = nonsense(room, generation + offset, side)[index]
    for destination in (side.incarnation, b"Z" * 16, wire.NOBODY):
        side.step(ev.Received(source, destination, message))
        assert side.core.registry.by_room == before, message
        assert {n: (r.state, r.failure) for n, r in before.items() if n in phases} == phases, message
        json.dumps(side.core.describe())
    assert len(side.released) == len(set(side.released)), message
    pair.deliver()
    for each in (pair.p, pair.d):
        for live in list(each.core.registry.by_room.values()):
            each.abort(live)
    pair.finish()
    pair.advance(12_000)
    for each in (pair.p, pair.d):
        each.core.timers.repeats = {k: v for k, v in each.core.timers.repeats.items() if k[0] != "hello"}
        assert len(each.released) == len(set(each.released)), message
    pair.idle()


@pytest.mark.parametrize("name", ["p", "d"])
def test_messages_of_the_wrong_role_change_nothing(name: str) -> None:
    """What only prefill says is nothing to prefill, and the same for decode."""
    pair = Pair()
    pair.meet()
    transferring(pair)
    side: Side = getattr(pair, name)
    generation = pair.d.room(7).generation
    wrong: list[wire.Message] = [
        wire.Offer(7, generation, pages(1), -1, 0),
        wire.VerdictAck(7, generation),
        wire.DrainedAck(7, generation),
        wire.Abort(7, generation, "abort", "no"),
    ]
    if name == "p":
        wrong = [
            wire.Accepted(7, generation),
            wire.Computed(7, generation, 32),
            wire.Part(7, generation, 1, 2, True, 1),
            wire.Verdict(7, generation, True, "", "", 1),
            wire.Verdict(7, generation, False, "abort", "no", 1),
            wire.Drained(7, generation),
            wire.Refuse("no"),
            side.core.identity.welcome(),
        ]
    for message in wrong:
        assert side.tell(message) == [], message
        assert side.core.counts[f"unexpected.{type(message).__name__}"] >= 1
    assert side.phase(7) is Phase.TRANSFERRING
    pair.finish()
    pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.SUCCESS
