"""The search over other people's layers finds what a small layer does wrong, on a shortest schedule, and nothing in a right one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import pytest

from pd_fsm.machines import Phase
from pd_fsm.testing.peer_layers import report
from pd_fsm.testing.peer_layers.adapter import FAILED, SUCCESS, Action
from pd_fsm.testing.peer_layers.pd_fsm_layer import PdFsmLayer
from pd_fsm.testing.peer_layers.search import (
    ABORT_FAILS,
    ABSORBING,
    CLEAR_IS_COMPLETE,
    EVIDENCE,
    NO_CALL_RAISES,
    NO_RETURN,
    PROPERTIES,
    RAISE_IS_COMPLETE,
    search,
)


class Toy:
    """A layer of a dictionary of integers, as they are written first. `faults` says what it gets wrong."""

    plays_peer = False

    def __init__(self, *faults: str) -> None:
        self.name = "toy"
        self._faults = faults
        self.reset()

    def reset(self) -> None:
        self._table: dict[int, tuple[int, int]] = {}  # room: life, status
        self._extra: set[int] = set()
        self._life = 0

    def status(self) -> int | None:
        return self._table[7][1] if 7 in self._table else None

    def remains(self) -> Mapping[str, str]:
        return {"extra": "7"} if 7 in self._extra else {}

    def fingerprint(self) -> Hashable:
        return tuple(self._table.items()), tuple(self._extra), self._life

    def actions(self) -> list[Action]:
        return [
            Action("create", "create", "", lambda p, _: not p.open and p.life < 2, lambda _: self._create()),
            Action("poll", "poll", "", lambda p, _: p.open, lambda _: self._table[7][1]),
            Action("send", "send", "", lambda p, _: p.open and p.life not in p.sent, lambda _: None),
            Action("abort", "abort", "", lambda p, _: p.open and not p.aborted, lambda _: self._abort()),
            Action("clear", "clear", "", lambda p, _: p.open and p.polled == SUCCESS, lambda _: self._clear()),
            Action("raise", "raise", "", lambda p, _: p.open and p.polled == FAILED, lambda _: self._raise()),
            Action(
                "done", "done", "", lambda p, n: n in p.sent and n not in p.ended, lambda n: self._update(n, SUCCESS), per_life=True
            ),
            Action(
                "fail",
                "failed",
                "",
                lambda p, n: n in p.sent and n not in p.ended,
                lambda n: self._update(n, FAILED),
                per_life=True,
            ),
        ]

    def _create(self) -> None:
        self._life += 1
        self._table[7] = (self._life, 2)
        self._extra.add(7)

    def _update(self, life: int, status: int) -> None:
        if "raises" in self._faults and 7 not in self._table:
            raise KeyError(7)
        current = self._table.get(7)
        stale = current is None or current[0] != life
        if stale and "revives" in self._faults and current is None:
            self._table[7] = (life, status)
        elif current is not None and (not stale or "no lives" in self._faults) and (current[1] != FAILED or "max" in self._faults):
            self._table[7] = (current[0], status)

    def _abort(self) -> None:
        if "deaf" not in self._faults and self._table[7][1] != SUCCESS:
            self._table[7] = (self._table[7][0], FAILED)

    def _clear(self) -> None:
        del self._table[7]
        if "leaks" not in self._faults:
            self._extra.discard(7)

    def _raise(self) -> None:
        self._clear()
        if "silent" not in self._faults:
            raise RuntimeError("why it failed")


def test_a_layer_that_is_right_breaks_nothing() -> None:
    result = search(Toy())
    assert result.findings == ()
    assert result.states > 20


@pytest.mark.parametrize(
    ("faults", "broken", "schedule"),
    [
        (["revives"], NO_RETURN[FAILED], ("create", "send", "abort", "poll", "raise", "fail (life 1)")),
        (["revives"], NO_RETURN[SUCCESS], ("create", "send", "abort", "poll", "raise", "done (life 1)")),
        (["raises"], NO_CALL_RAISES, ("create", "send", "abort", "poll", "raise", "done (life 1)")),
        (["max"], ABSORBING, ("create", "send", "abort", "done (life 1)")),
        (["no lives"], EVIDENCE, ("create", "send", "abort", "poll", "raise", "create", "done (life 1)", "poll")),
        (["deaf"], ABORT_FAILS, ("create", "abort", "poll")),
        (["leaks"], CLEAR_IS_COMPLETE, ("create", "send", "done (life 1)", "poll", "clear")),
        (["silent"], RAISE_IS_COMPLETE, ("create", "abort", "poll", "raise")),
    ],
)
def test_a_fault_is_found_on_a_shortest_schedule(faults: list[str], broken: str, schedule: tuple[str, ...]) -> None:
    found = {finding.property: finding.schedule for finding in search(Toy(*faults)).findings}
    assert found[broken] == schedule


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_our_own_layer_breaks_nothing(side: str) -> None:
    result = search(PdFsmLayer(side), depth_max=6)
    assert result.findings == ()
    assert result.states > 50


def test_a_bug_planted_in_our_own_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed is no longer absorbing: a late completion makes a success of it."""
    from pd_fsm.core import sender, session

    def on_abort(core: session.SessionCore, source: bytes, message: object) -> None:
        for room in core.registry.by_room.values():
            if room.state is Phase.FAILED:
                room.state = Phase.SUCCESS
                core.publish(room)

    monkeypatch.setattr(sender, "on_abort", on_abort)
    found = {finding.property for finding in search(PdFsmLayer("sender"), depth_max=8).findings}
    assert ABSORBING in found


def test_the_table_has_a_row_for_each_property() -> None:
    result = {
        "layer": "mooncake sender",
        "states": 9,
        "findings": [{"property": NO_RETURN[FAILED], "what": "it is there", "schedule": ("create", "clear")}],
    }
    rows = report.rows_of("sglang 0.5.11", [result])
    assert [row["property"] for row in rows] == list(PROPERTIES)
    (found,) = [row for row in rows if row["found"]]
    assert found["schedule"] == ["create", "clear"]
    assert found["thread"].endswith("/24539")
