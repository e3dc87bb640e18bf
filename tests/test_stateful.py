"""The state machines of `pd_fsm.testing.stateful` find nothing here, and something when a rule of the core is broken.

`HYPOTHESIS_PROFILE` chooses how much: dev, ci, nightly.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from pd_fsm.core import events as ev
from pd_fsm.core import receiver, sender
from pd_fsm.core import session as core
from pd_fsm.testing.stateful import EngineMachine, GossipMachine
from pd_fsm.transports import memory


@pytest.mark.parametrize("machine", [EngineMachine, GossipMachine])
def test_nothing_is_found(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine)


def a_revoke_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data plane vouches that nothing lands any more, and lets it land."""
    monkeypatch.setattr(memory.MemoryPlanes, "revoke", lambda *_: True)


def any_part_is_success(monkeypatch: pytest.MonkeyPatch) -> None:
    real = receiver._confirmed
    monkeypatch.setattr(receiver, "_confirmed", lambda session, link, *, complete: real(session, link, complete=True))


def an_abort_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "on_abort", lambda *_: None)


def a_cleared_room_keeps_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_forget", lambda *_: None)


QUICK = settings(
    max_examples=1_000, stateful_step_count=30, deadline=None, database=None, derandomize=True, phases=(Phase.generate,)
)
BROKEN: list[tuple[Callable[[pytest.MonkeyPatch], None], type[RuleBasedStateMachine]]] = [
    (a_revoke_is_not_kept, EngineMachine),
    (any_part_is_success, EngineMachine),
    (an_abort_is_not_answered, EngineMachine),
    (a_cleared_room_keeps_its_link, EngineMachine),
]


@pytest.mark.parametrize(("plant", "machine"), BROKEN, ids=[plant.__name__ for plant, _ in BROKEN])
def test_a_broken_rule_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], machine: type[RuleBasedStateMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        run_state_machine_as_test(machine, settings=QUICK)


def test_a_generation_of_another_room_is_found_by_gossip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger may end a room, if nobody looks who speaks."""

    def on_received(session: core.SessionCore, event: ev.Received) -> None:
        message: Any = event.message
        for link in list(session.links.values()):
            if link.generation == getattr(message, "generation", 0) and link.room.live and not session.sends:
                receiver._confirmed(session, link, complete=True)

    real = core._HANDLERS[ev.Received]
    monkeypatch.setitem(core._HANDLERS, ev.Received, lambda session, event: (real(session, event), on_received(session, event)))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(GossipMachine, settings=QUICK)


def test_the_testing_package_needs_no_hypothesis() -> None:
    code = "import sys, pd_fsm.testing; sys.exit(any(name in sys.modules for name in ('hypothesis', 'pytest')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
