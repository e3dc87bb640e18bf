"""The poll board: phases in one byte each, slots that are used again, and handles that never read another room's slot."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.runtime.board import CONSTANT_SLOTS, PollBoard
from tests.live import make_engine


@pytest.fixture
def session() -> Iterator[pd_fsm.Session]:
    """A prefill that nobody dials: its rooms change only by what the test does."""
    limits = pd_fsm.Limits(rooms_max=200)
    with pd_fsm.open_session("prefill", make_engine("prefill", 1).layout, transport="memory", thread=False, limits=limits) as made:
        yield made


def fail_and_clear(handle: pd_fsm.Handle) -> None:
    handle.abort()
    handle.clear()


# --- the board itself --------------------------------------------------------------------------------------------------------


def test_published_phases_are_read_in_place() -> None:
    board = PollBoard(3)
    board.publish(7, Phase.BOOTSTRAPPING)
    board.publish(8, Phase.SUCCESS)
    slot = board.slot(7)
    assert board.phases[slot] == board.array[slot] == Phase.BOOTSTRAPPING
    board.publish(7, Phase.TRANSFERRING)
    assert board.slot(7) == slot, "a room keeps its slot"
    assert board.phases[slot] == board.array[slot] == Phase.TRANSFERRING
    assert board.array[board.slot(8)] == Phase.SUCCESS
    assert board.array.dtype == np.int8


def test_the_first_slots_hold_the_phases_themselves() -> None:
    board = PollBoard(1)
    board.publish(1, Phase.FAILED)
    assert [board.phases[phase] for phase in Phase] == list(Phase)
    assert board.slot(1) >= CONSTANT_SLOTS


def test_slots_are_used_again_and_never_twice() -> None:
    board = PollBoard(10)
    dice = random.Random(3)
    live: dict[int, int] = {}
    for generation in range(1, 500):
        if len(live) == 10 or (live and dice.random() < 0.5):
            gone = dice.choice(sorted(live))
            board.remove(gone)
            del live[gone]
            with pytest.raises(KeyError):
                board.slot(gone)
        else:
            live[generation] = dice.choice(list(Phase))
            board.publish(generation, live[generation])
        slots = [board.slot(known) for known in live]
        assert len(set(slots)) == len(slots)
        assert {known: board.phases[board.slot(known)] for known in live} == live


def test_a_full_board_is_an_error_and_not_another_rooms_slot() -> None:
    board = PollBoard(1)
    board.publish(1, Phase.BOOTSTRAPPING)
    with pytest.raises(AssertionError, match="rooms_max"):
        board.publish(2, Phase.SUCCESS)
    assert board.phases[board.slot(1)] == Phase.BOOTSTRAPPING


# --- handles -----------------------------------------------------------------------------------------------------------------


def test_a_handle_reads_one_byte(session: pd_fsm.Session) -> None:
    handle = session.send(1)
    assert handle.poll() == 1
    assert type(handle.poll()) is int
    assert handle.phase is Phase.BOOTSTRAPPING
    handle.abort()
    assert handle.poll() == 0
    assert handle.phase is Phase.FAILED


def test_a_cleared_handle_keeps_its_verdict_while_another_room_has_the_slot(session: pd_fsm.Session) -> None:
    first = session.send(1)
    slot = first.slot
    fail_and_clear(first)
    second = session.send(2)
    assert second.slot == slot, "the slot is used again"
    assert (first.phase, second.phase) == (Phase.FAILED, Phase.BOOTSTRAPPING)
    second.abort()
    second.clear()
    assert first.phase is second.phase is Phase.FAILED
    assert first.failure.cause == "abort"


def test_a_live_room_cannot_be_cleared(session: pd_fsm.Session) -> None:
    handle = session.send(1)
    with pytest.raises(pd_fsm.LocalProtocolError, match="BOOTSTRAPPING"):
        handle.clear()
    assert handle.phase is Phase.BOOTSTRAPPING
    fail_and_clear(handle)
    handle.clear()
    assert session.describe()["rooms"] == []


def test_a_session_can_be_full_and_be_used_again() -> None:
    with pd_fsm.open_session(
        "prefill", make_engine("prefill", 1).layout, transport="memory", thread=False, limits=pd_fsm.Limits(rooms_max=1)
    ) as session:
        for room in range(50):
            handle = session.send(room)
            with pytest.raises(pd_fsm.LocalProtocolError, match=r"1 rooms are open \(Limits.rooms_max\)"):
                session.send(room + 1)
            fail_and_clear(handle)


def test_a_room_may_be_opened_while_another_one_is_being_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The core's room and its slot go in one step: in between, another thread's room would find the board full."""
    with pd_fsm.open_session(
        "prefill", make_engine("prefill", 1).layout, transport="memory", thread=False, limits=pd_fsm.Limits(rooms_max=1)
    ) as session:
        handle = session.send(1)
        handle.abort()
        opened: list[pd_fsm.Handle] = []
        remove = session._board.remove
        opener = threading.Thread(target=lambda: opened.append(session.send(2)))

        def remove_late(generation: int) -> None:
            opener.start()
            opener.join(0.05)  # it can get no further than the lock
            remove(generation)

        monkeypatch.setattr(session._board, "remove", remove_late)
        handle.clear()
        opener.join(5)
        assert [other.phase for other in opened] == [Phase.BOOTSTRAPPING]
        assert handle.phase is Phase.FAILED


def test_clearing_from_several_threads_clears_once(session: pd_fsm.Session) -> None:
    for room in range(50):
        handle = session.send(room)
        handle.abort()
        errors: list[BaseException] = []
        gate = threading.Barrier(3)

        def clear(handle: pd_fsm.Handle = handle, gate: threading.Barrier = gate, errors: list[BaseException] = errors) -> None:
            gate.wait(5)
            try:
                handle.clear()
            except BaseException as error:  # noqa: BLE001 - shown by the test
                errors.append(error)

        clearing = [threading.Thread(target=clear) for _ in range(3)]
        for thread in clearing:
            thread.start()
        for thread in clearing:
            thread.join(5)
        assert errors == []
    slots = {session.send(room).slot for room in range(60)}
    assert len(slots) == 60, "no slot was given back twice"


# --- many handles ------------------------------------------------------------------------------------------------------------


def test_poll_many_is_aligned_with_its_handles(session: pd_fsm.Session) -> None:
    handles = [session.send(room) for room in range(5)]
    handles[1].abort()
    fail_and_clear(handles[3])
    session.send(99)
    phases = session.poll_many(handles)
    assert phases.dtype == np.int8
    assert phases.tolist() == [1, 0, 1, 0, 1]
    assert session.poll_many([]).tolist() == []
    handles[0].abort()
    assert phases.tolist() == [1, 0, 1, 0, 1], "the array is the caller's own"
    assert session.poll_many(session.group(handles)).tolist() == [0, 0, 1, 0, 1]
    assert session.poll_many(tuple(reversed(handles))).tolist() == [1, 0, 1, 0, 0]


def test_a_group_follows_its_handles_through_anything(session: pd_fsm.Session) -> None:
    """Random opens, aborts, clears, additions and removals: the gather always says what each handle says by itself."""
    dice = random.Random(11)
    group = session.group()
    other = session.group()
    handles: list[pd_fsm.Handle] = []
    for room in range(600):
        roll = dice.random()
        if roll < 0.45 or not handles:
            if sum(handle.poll() != 0 for handle in handles) < 150:
                handles.append(session.send(room))
                group.add(handles[-1])
                if dice.random() < 0.3:
                    other.add(handles[-1])
        elif roll < 0.6:
            dice.choice(handles).abort()
        elif roll < 0.75:
            fail_and_clear(dice.choice(handles))
        elif roll < 0.9:
            gone = dice.choice(handles)
            group.discard(gone)
            group.discard(gone)
            if dice.random() < 0.5:
                handles.remove(gone)
                fail_and_clear(gone)
        else:
            group.add(dice.choice(handles))
        for pool in (group, other):
            assert pool.poll().tolist() == [handle.poll() for handle in pool.handles]
            assert len(pool) == len(pool.handles) == len(set(pool.handles))
    assert len(group) > 64, "it has grown beyond its first size"


def test_an_empty_group_polls_to_nothing(session: pd_fsm.Session) -> None:
    group = session.group()
    assert group.poll().shape == (0,)
    handle = session.send(1)
    group.discard(handle)
    group.add(handle)
    group.discard(handle)
    assert group.poll().shape == (0,)
    fail_and_clear(handle)
