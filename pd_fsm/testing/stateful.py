"""Hypothesis state machines over the public API: an engine that calls in any order, and a network that says anything out of turn.

`EngineMachine` drives a prefill and a decode session as two schedulers would, sensibly or not: rooms are numbers out of a few, so
that they are used again while their last life is in the air. It compares real bytes: a receiver that succeeds has exactly what one
sender of that room handed in, and no page that belongs to its owner alone is ever written. `GossipMachine` adds frames of every
type with generations around the current ones, from strangers and from the peer about transfers that are over.

For your own transport: subclass one, set `transport`, and run its `TestCase`. Needs `hypothesis` (`pip install 'pd-fsm[testing]'`).
"""

from __future__ import annotations

import random
from typing import Any

import attrs
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

import pd_fsm
from pd_fsm.core import wire
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import ROOM, Phase
from pd_fsm.machines.room import TERMINAL
from pd_fsm.runtime.session import Handle, Session
from pd_fsm.testing import rude

PAGES, PAGE_SIZE, ROOMS = 12, 16, 3
_EDGES = {(row.source, row.target) for row in ROOM.rows()}
_ROUNDS_MAX = 2_000
_HARMLESS = (wire.Accepted, wire.Computed, wire.Ping, wire.Pong)
"""What an honest peer may say again of a transfer that is under way."""
_OF_THE_PROCESS = (wire.Hello, wire.Welcome, wire.Refuse, wire.Goodbye, wire.Draining, wire.Stranger)


@attrs.define(eq=False)
class Entry:
    """A room as the engine under test keeps it. `labels`: what it handed in, page by page; `closed`: that was all."""

    handle: Any
    pages: list[int]
    labels: list[int] = attrs.field(factory=list)
    closed: bool = False
    seen: Phase = Phase.BOOTSTRAPPING
    concluded: bool = False
    freed: bool = False


class EngineMachine(RuleBasedStateMachine):
    """Two sessions of one process, driven by hand. `transport` is a name or a factory, `options` go to both sides."""

    transport: Any = "memory"
    options: dict[str, Any] = {}  # noqa: RUF012 - for subclasses

    senders = Bundle("senders")
    receivers = Bundle("receivers")

    @initialize()
    def open_sessions(self) -> None:
        meet = pd_fsm.LocalRendezvous()
        self.pools = [np.zeros((PAGES, PAGE_SIZE), np.int32) for _ in range(2)]
        self.sessions: list[Session] = []
        self.entries: list[list[Entry]] = [[], []]
        for role, pool in zip(("prefill", "decode"), self.pools, strict=True):
            layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [pool], page_size=PAGE_SIZE)])
            self.sessions.append(
                pd_fsm.open_session(
                    role,
                    layout,
                    transport=self.transport,
                    transport_options=self.options,
                    rendezvous=meet.client(),
                    thread=False,
                    incarnation=f"{role} {random.getrandbits(32):08x}".encode().ljust(wire.INCARNATION_BYTES),
                )
            )
        self.prefill, self.decode = self.sessions
        self.free = [set(range(PAGES)), set(range(PAGES))]
        self.kept = [pool.copy() for pool in self.pools]  # what lies in pages that belong to their owner alone
        self.label = 0

    # --- what an engine does -------------------------------------------------------------------------------------------------

    @rule(target=senders, room=st.integers(0, ROOMS - 1))
    def open_sender(self, room: int) -> Any:
        return self._opened(0, room, lambda: self.prefill.send(room), [])

    @rule(target=receivers, room=st.integers(0, ROOMS - 1), count=st.integers(1, 3))
    def open_receiver(self, room: int, count: int) -> Any:
        pages = sorted(self.free[1])[:count]
        return self._opened(1, room, lambda: self.decode.receive(room, pages), pages) if len(pages) == count else multiple()

    def _opened(self, side: int, room: int, call: Any, pages: list[int]) -> Any:
        session = self.sessions[side]
        is_open = any(known["room"] == room for known in session.describe()["rooms"])
        try:
            handle: Handle = call()
        except LocalProtocolError:
            assert is_open, f"room {room} could not be opened, though it is not open"
            return multiple()
        assert not is_open, f"room {room} was opened twice"
        entry = Entry(handle, pages)
        self.free[side] -= set(pages)
        self.entries[side].append(entry)
        return entry

    @rule(entry=senders, last=st.booleans())
    def send(self, entry: Entry, last: bool) -> None:
        if not self.free[0]:
            return
        page = min(self.free[0])
        self.label += 1
        start = len(entry.labels) * PAGE_SIZE
        before = self.pools[0][page].copy()
        self.pools[0][page] = self.label
        try:
            entry.handle.send([page], (start, start + PAGE_SIZE), last=last)
        except LocalProtocolError:
            assert entry.closed, "a chunk in its order was refused"
            self.pools[0][page] = before
            return
        if entry.handle.phase in TERMINAL and entry.freed:  # ignored: the room is over
            self.pools[0][page] = before
            return
        self.free[0].discard(page)
        entry.pages.append(page)
        entry.labels.append(self.label)
        entry.closed = last

    @rule(entry=st.one_of(senders, receivers))
    def abort(self, entry: Entry) -> None:
        was = entry.handle.phase
        entry.handle.abort("drawn")
        assert entry.handle.phase is (was if was in TERMINAL else Phase.FAILED)

    @rule(entry=st.one_of(senders, receivers))
    def clear(self, entry: Entry) -> None:
        was = entry.handle.phase
        try:
            entry.handle.clear()
        except LocalProtocolError:
            assert was not in TERMINAL
        else:
            assert was in TERMINAL or entry.handle.cleared
            assert entry.handle.phase is was

    @rule(side=st.integers(0, 1), room=st.integers(0, ROOMS - 1))
    def cancel(self, side: int, room: int) -> None:
        self.sessions[side].cancel(room)

    @rule(side=st.integers(0, 1))
    def progress(self, side: int) -> None:
        self.sessions[side].driver.progress(rounds_max=1)

    @rule()
    def progress_both(self) -> None:
        for session in self.sessions:
            session.progress()

    @precondition(lambda self: any(self.entries))
    @rule(side=st.integers(0, 1))
    def poll_as_a_group(self, side: int) -> None:
        handles = [entry.handle for entry in self.entries[side]]
        assert self.sessions[side].group(handles).poll().tolist() == [handle.poll() for handle in handles]

    # --- what must hold ------------------------------------------------------------------------------------------------------

    @invariant()
    def phases_move_by_declared_edges(self) -> None:
        for entry in (*self.entries[0], *self.entries[1]):
            phase = entry.handle.phase
            assert phase is entry.seen or _reachable(entry.seen, phase), f"{entry.seen.name} became {phase.name}"
            assert (entry.handle.failure is not None) == (phase is Phase.FAILED)
            entry.seen = phase

    @invariant()
    def a_receiver_that_succeeds_has_what_one_sender_handed_in(self) -> None:
        for entry in self.entries[1]:
            if entry.handle.phase is Phase.SUCCESS and not entry.concluded:
                entry.concluded = True
                held = [int(self.pools[1][page][0]) for page in entry.pages]
                room = entry.handle.room
                sent = [known.labels for known in self.entries[0] if known.handle.room == room and known.closed]
                assert any(held[: len(labels)] == labels for labels in sent), f"room {room} holds {held}, handed in were {sent}"
                assert all((self.pools[1][page] == self.pools[1][page][0]).all() for page in entry.pages)

    @invariant()
    def pages_of_their_owner_are_never_written(self) -> None:
        for side, pool in enumerate(self.pools):
            for entry in self.entries[side]:
                if entry.handle.pages_free and not entry.freed:
                    assert entry.handle.phase in TERMINAL
                    entry.freed = True
                    self.free[side] |= set(entry.pages)
                    self.kept[side][entry.pages] = pool[entry.pages]
            mine = sorted(self.free[side])
            assert (pool[mine] == self.kept[side][mine]).all(), "a page that belongs to its owner alone was written"

    def teardown(self) -> None:
        if not hasattr(self, "sessions"):
            return
        for entry in (*self.entries[0], *self.entries[1]):
            if entry.handle.phase not in TERMINAL:
                entry.handle.abort("the end")
        for _ in range(_ROUNDS_MAX):
            if not self.prefill.progress() | self.decode.progress():
                break
        self.pages_of_their_owner_are_never_written()
        for session in self.sessions:
            about = session.describe()
            assert not about["ops"], about
            assert not about["leases"], about
            assert not about["links"], about
        assert all(entry.freed for entry in (*self.entries[0], *self.entries[1]))
        for session in self.sessions:
            session.close(timeout_s=0)


def _reachable(before: Phase, after: Phase) -> bool:
    """Whether declared edges lead there: between two looks a room may take several."""
    known, ahead = {before}, [before]
    while ahead:
        here = ahead.pop()
        for source, target in _EDGES:
            if source == here and target not in known:
                known.add(Phase(target))
                ahead.append(Phase(target))
    return after in known


class GossipMachine(EngineMachine):
    """The same engine, while frames arrive that nobody should have sent, or that are about what is over."""

    @rule(
        side=st.integers(0, 1),
        room=st.integers(0, ROOMS),
        offset=st.integers(-1, 1),
        index=st.integers(0, 200),
        known=st.booleans(),
    )
    def hear(self, side: int, room: int, offset: int, index: int, known: bool) -> None:
        """`offset` from the newest generation that decode has minted, which names its transfers on the wire."""
        session, peer = self.sessions[side], self.sessions[1 - side]
        newest = max((entry.handle.generation for entry in self.entries[1]), default=0)
        generation = max(newest + offset, 1)
        source = peer.incarnation if known else rude.STRANGER
        choices = list(rude.messages(room, generation, (session.incarnation, rude.STRANGER)))
        message = choices[index % len(choices)]
        if known and not self._honest(session, peer, generation, message):
            return
        via = message.addressed if isinstance(message, wire.Stranger) and message.addressed == rude.STRANGER else source
        session.driver.deliver(wire.encode(source, session.incarnation, message), via)

    def _honest(self, session: Session, peer: Session, generation: int, message: wire.Message) -> bool:
        """Whether the peer itself may say so: late or twice, but it does not lie about what is under way or will be."""
        if isinstance(message, _OF_THE_PROCESS):
            return False
        newest = max((entry.handle.generation for entry in self.entries[1]), default=0)
        core = session.driver.core
        under_way = (peer.incarnation, generation) in core.links or any(
            entry.handle.generation == generation and not entry.freed for entry in self.entries[1]
        )
        return isinstance(message, _HARMLESS) if under_way else generation <= newest
