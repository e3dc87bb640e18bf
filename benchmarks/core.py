"""The core alone: one step for each kind of event, and a room's whole life on both sides. No thread, no socket, no clock.

The peer of a step is one trigger of the `transitions` library that the machines are declared with: what a step would cost at the
least if the declaration itself were run instead of the table compiled from it. Most steps take several rows of several machines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transitions import Machine

from pd_fsm.benchmarks.rows import Row, Spread, quiet
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.session import Identity, SessionCore
from pd_fsm.core.settings import Topology
from pd_fsm.core.wire import ComponentInfo, pack_pages
from pd_fsm.machines import ROOM, Phase
from pd_fsm.machines.room import ROWS

STEP_GOAL_US = 2.0
PAGE_SIZE = 16
COMPONENTS = (
    ComponentInfo("kv", "paged", "kv", PAGE_SIZE, 1_024, (4_096,) * 4),
    ComponentInfo("aux", "rows", "aux", 0, 64, (128,)),
)
PAGES = {"kv": pack_pages([7])}
RECORD = ev.PeerRecord(b"P" * 16, "none://", "prefill-0")

Samples = dict[str, list[float]]


def run(*, quick: bool = False) -> list[Row]:
    rooms, repeats = (64, 3) if quick else (256, 40)
    trigger = _transitions(rooms, repeats)
    steps: Samples = {}
    lives: list[float] = []
    framed: list[float] = []
    with quiet():
        for _ in range(repeats):
            total, count = _batch(rooms, steps)
            lives.append(total)
            framed.append(_one_by_one(rooms))
    every = [sum(column) / len(steps) for column in zip(*steps.values(), strict=True)]
    rows = [Row("step, mean over a room's events", "us", Spread.of(every), trigger, "transitions", STEP_GOAL_US)]
    rows += [Row(f"step {name}", "us", Spread.of(times), trigger, "transitions", STEP_GOAL_US) for name, times in steps.items()]
    rows.append(Row(f"open to cleared, both sides, {count} steps", "us", Spread.of(lives)))
    rows.append(Row("the same with every message encoded and decoded", "us", Spread.of(framed)))
    rows.append(Row("machine table, one row", "us", _table_rows(rooms, repeats), trigger, "transitions"))
    return rows


def _pair() -> tuple[SessionCore, SessionCore]:
    """A prefill and a decode core after their handshake."""
    prefill, decode = (
        SessionCore(Identity(incarnation * 16, name, role, "none", Topology(), COMPONENTS))
        for incarnation, name, role in ((b"P", "prefill-0", "prefill"), (b"D", "decode-0", "decode"))
    )
    prefill.step(ev.Received(b"D" * 16, b"P" * 16, decode.identity.hello()), 0.0)
    return prefill, decode


def _batch(rooms: int, steps: Samples) -> tuple[float, int]:
    """`rooms` lives side by side, so that each kind of event is timed in one go. Returns (microseconds a life, steps a life)."""
    prefill, decode = _pair()
    p, d = prefill.identity.incarnation, decode.identity.incarnation
    numbers = range(1, rooms + 1)
    taken: dict[str, float] = {}

    def timed(name: str, core: SessionCore, events: list[ev.Event]) -> list[Any]:
        step = core.step
        began = time.perf_counter()
        effects = [step(event, 1.0) for event in events]
        taken[name] = (time.perf_counter() - began) / rooms * 1e6
        return [effect for some in effects for effect in some]

    # The first room finds and greets the prefill; the others are measured with the peer known, as in a running engine.
    decode.step(ev.OpenReceive(0, PAGES, 0), 1.0)
    decode.step(ev.PeersFound(1, (RECORD,)), 1.0)
    decode.step(ev.Received(p, d, prefill.identity.welcome()), 1.0)
    decode.directory.setdefault(("", None), (RECORD,))

    def sent(effects: list[Any], kind: type) -> list[Any]:
        return [e.message for e in effects if type(e) is ev.Send and type(e.message) is kind]

    opened = timed("OpenReceive", decode, [ev.OpenReceive(n, PAGES, 0) for n in numbers])
    timed("OpenSend", prefill, [ev.OpenSend(n) for n in numbers])
    generations = [prefill.registry.by_room[n].generation for n in numbers]
    offers = sent(opened, wire.Offer)
    accepted = sent(timed("Offer", prefill, [ev.Received(d, p, offer) for offer in offers]), wire.Accepted)
    timed("Accepted", decode, [ev.Received(p, d, message) for message in accepted])
    submitted = timed("ChunkReady", prefill, [ev.ChunkReady(g, 0, PAGE_SIZE, PAGES, last=True, aux_row=0) for g in generations])
    submits = [effect for effect in submitted if type(effect) is ev.Submit]
    timed("Part", decode, [ev.Received(p, d, submit.notice) for submit in submits])
    timed("WriteDone", prefill, [ev.WriteDone(submit.op, submit.notice.nbytes, notified=True) for submit in submits])
    theirs = [decode.registry.by_room[n].generation for n in numbers]
    timed("Revoked", decode, [ev.Revoked(g) for g in theirs])
    timed("ClearRequested, decode", decode, [ev.ClearRequested(g) for g in theirs])
    timed("ClearRequested, prefill", prefill, [ev.ClearRequested(g) for g in generations])
    assert prefill.counts["succeeded"] == decode.counts["succeeded"] == rooms, "every room of a benchmark succeeds"
    for name, microseconds in taken.items():
        steps.setdefault(name, []).append(microseconds)
    return sum(taken.values()), len(taken)


def _one_by_one(rooms: int) -> float:
    """Whole lives, one after the other, with every message through the codec. Microseconds a life."""
    prefill, decode = _pair()
    p, d = prefill.identity.incarnation, decode.identity.incarnation
    decode.directory["", None] = (RECORD,)
    decode.step(ev.OpenReceive(0, PAGES, 0), 1.0)
    decode.step(ev.Received(p, d, prefill.identity.welcome()), 1.0)

    def carry(effects: list[ev.Effect], to: SessionCore, me: bytes, other: bytes) -> list[ev.Effect]:
        answers: list[ev.Effect] = []
        for effect in effects:
            if type(effect) is ev.Send:
                answers += to.step(ev.Received(*wire.decode(wire.encode(me, other, effect.message))), 1.0)
        return answers

    began = time.perf_counter()
    for number in range(1, rooms + 1):
        prefill.step(ev.OpenSend(number), 1.0)
        sending = prefill.registry.by_room[number].generation
        prefill.step(ev.ChunkReady(sending, 0, PAGE_SIZE, PAGES, last=True, aux_row=0), 1.0)
        answers = carry(decode.step(ev.OpenReceive(number, PAGES, 0), 1.0), prefill, d, p)
        receiving = decode.registry.by_room[number].generation
        carry(answers, decode, p, d)
        for submit in [effect for effect in answers if type(effect) is ev.Submit]:
            decode.step(ev.Received(*wire.decode(wire.encode(p, d, submit.notice))), 1.0)
            prefill.step(ev.WriteDone(submit.op, submit.notice.nbytes, notified=True), 1.0)
        decode.step(ev.Revoked(receiving), 1.0)
        decode.step(ev.ClearRequested(receiving), 1.0)
        prefill.step(ev.ClearRequested(sending), 1.0)
    microseconds = (time.perf_counter() - began) / rooms * 1e6
    assert prefill.counts["succeeded"] == decode.counts["succeeded"] == rooms, "every room of a benchmark succeeds"
    return microseconds


# --- the machine itself, compiled and not ------------------------------------------------------------------------------------


def _timed_lives(life: Callable[[], None], rooms: int, repeats: int, steps: int) -> Spread:
    samples = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(rooms):
            life()
        samples.append((time.perf_counter() - began) / rooms / steps * 1e6)
    return Spread.of(samples)


def _table_rows(rooms: int, repeats: int) -> Spread:
    known, confirmed = ROOM.fact["all_peers_known"], ROOM.fact["all_confirmed"]
    plan = [(ROOM.event[e], facts) for e, facts in (("peer_ready", known), ("start", 0), ("part_settled", confirmed))]

    def life() -> None:
        state = Phase.BOOTSTRAPPING
        for event, facts in plan:
            row = ROOM.row(state, event, facts)
            assert row is not None
            state = Phase(row.target)

    with quiet():
        return _timed_lives(life, rooms, repeats, len(plan))


class _Model:
    """What `transitions` drives: a room with both facts true."""

    state: Phase

    def all_peers_known(self) -> bool:
        return True

    def all_confirmed(self) -> bool:
        return True


def _transitions(rooms: int, repeats: int) -> Spread:
    """One trigger of a `transitions` model of the same rows, the models reset by hand between lives."""
    machine = Machine(
        model=None,
        states=list(Phase),
        transitions=[dict(row) for row in ROWS],
        initial=Phase.BOOTSTRAPPING,
        auto_transitions=False,
    )
    model: Any = _Model()
    machine.add_model(model)

    def life() -> None:
        machine.set_state(Phase.BOOTSTRAPPING, model)
        model.peer_ready()
        model.start()
        model.part_settled()

    with quiet():
        return _timed_lives(life, rooms, repeats, 3)
