"""The two roles in processes of their own: killed, stopped, closed and restarted in the middle of a burst of transfers.

When exactly it strikes is drawn, so each run tries another moment. What the survivor must do is the same for every moment: conclude
all of its rooms with a reason, give memory back only when nothing can touch it, and serve the next life of the other side.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

from pd_fsm.testing.chaos import leaked_pages, lost_rooms, wrong_bytes
from pd_fsm.testing.chaos_child import Child
from pd_fsm.testing.conformance.target import Capabilities, free_port

pytestmark = pytest.mark.pd_fsm_needs("peer", "processes")
SIDES = ("prefill", "decode")
BURST = 40
PATIENCE_S = 20.0
STRIKE_MS_MAX = 60.0
ENDS = ("SUCCESS", "peer_lost", "peer_failed", "peer_refused", "peer_abort", "transport", "abort: as told")
"""How rooms of a survivor may end."""
DEADLINES = {"heartbeat_ms": 100, "lost_ms": 1_500, "repeat_min_ms": 20, "repeat_max_ms": 200, "handshake_ms": 5_000}


@attrs.define(eq=False)
class Pair:
    """A prefill and a decode process. Whoever makes it ends it."""

    transport: str
    options: dict[str, Any]
    folder: Path
    directory: Path
    port: int
    residual_ms: float
    children: dict[str, Child] = attrs.field(factory=dict)
    greetings: dict[str, dict[str, str]] = attrs.field(factory=dict)
    opened: dict[str, list[int]] = attrs.field(factory=lambda: {"prefill": [], "decode": []})
    lives: int = 0
    room: int = 0

    def start(self, *sides: str) -> None:
        """A new life of these sides; decode learns who its prefill is."""
        for side in sides:
            self.lives += 1
            settings = {
                "role": side,
                "name": side,
                "seed": f"{side}/{self.lives}",
                "transport": self.transport,
                "options": self.options,
                "directory": str(self.directory),
                "port": self.port,
                "deadlines": DEADLINES,
                "in_flight_bytes_max": 16 << 10,
            }
            log = self.folder / f"{side}-{self.lives}.log"
            path = os.pathsep.join(each for each in (str(Path.cwd()), *sys.path) if each)
            self.children[side] = Child(side, settings, log, "pd_fsm.testing.conformance.child", path)
            self.opened[side] = []
        for side in sides:
            self.greetings[side] = json.loads(self.children[side].line())
        self.children["decode"].do("meet", **self.greetings["prefill"])

    def burst(self, rooms: int = BURST) -> list[int]:
        """Hand over that many rooms at once; nobody waits for anything."""
        numbers = list(range(self.room, self.room + rooms))
        self.room += rooms
        for side in SIDES:
            self.children[side].post("open", rooms=numbers)
            self.opened[side] += numbers
        self.children["prefill"].post("send", rooms=numbers, half=True)
        self.children["prefill"].post("send", rooms=numbers)
        return numbers

    def rooms(self, side: str) -> dict[str, Any]:
        seen: dict[str, Any] = self.children[side].do("rooms")
        return seen

    def until_over(self, *sides: str, free: bool = True, routed: bool = False) -> None:
        """Every room of these sides concluded and, with `free`, its memory is back; `routed` with a router, see `route`."""
        deadline = time.monotonic() + PATIENCE_S
        left: list[Any] = [""]
        while left:
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s for {left[:5]}"
            for side in sides if routed else ():
                self.route(side)
            left = [
                (side, room, seen) for side in sides for room, seen in self.rooms(side).items() if not (seen[1] and seen[2] >= free)
            ]
            time.sleep(0.01)

    def route(self, side: str) -> None:
        """What a router does: it ends what had not met the other side when that was gone, as nobody else tells this one."""
        unmet = [int(room) for room, seen in self.rooms(side).items() if seen[0] == "BOOTSTRAPPING"]
        self.children[side].do("abort", rooms=unmet)

    def judge(self, side: str) -> dict[str, Any]:
        """What must hold for a side, whatever happened to the other one. Its report."""
        report: dict[str, Any] = self.children[side].do("report")
        assert not lost_rooms(self.opened[side], report)
        assert not wrong_bytes(report)
        assert report["late_writes"] == 0, f"{report['late_writes']} free pages of {side} were written to"
        assert leaked_pages(report) == 0, f"pages of {side} neither came back nor are they listed as in doubt"
        assert not report["describe"]["counts"].get("driver_error"), self.log(side)
        return report

    def probe(self) -> None:
        """New rooms between the present lives succeed."""
        for side in SIDES:
            self.children[side].do("clear")
        numbers = self.burst(4)
        self.until_over(*SIDES, free=False)
        for side in SIDES:
            seen = self.rooms(side)
            assert {seen[str(room)][1] for room in numbers} == {"SUCCESS"}, {room: seen[str(room)] for room in numbers}

    def log(self, side: str) -> str:
        return self.children[side].log.read_text(errors="replace")[-3_000:]

    def end(self) -> None:
        for child in self.children.values():
            child.end(kill=True)


@pytest.fixture
def pair(pytestconfig: pytest.Config, capabilities: Capabilities, tmp_path: Path, directory: Path) -> Iterator[Pair]:
    named = pytestconfig.getoption("--pd-fsm-transport")
    options = json.loads(pytestconfig.getoption("--pd-fsm-transport-options"))
    made = Pair(named, options, tmp_path, directory, free_port() if capabilities.fixed_port else 0, capabilities.residual_ms)
    try:
        made.start(*SIDES)
        yield made
    finally:
        made.end()


def strike_after(pair: Pair, harm: Callable[[], None]) -> None:
    """A burst, and `harm` at a moment of it that is drawn."""
    pair.burst()
    time.sleep(random.uniform(0, STRIKE_MS_MAX) / 1e3)
    harm()


def other(side: str) -> str:
    return "decode" if side == "prefill" else "prefill"


def test_a_burst_of_rooms_is_handed_over(pair: Pair) -> None:
    pair.burst()
    pair.until_over(*SIDES)
    for side in SIDES:
        assert {life["outcome"] for life in pair.judge(side)["lives"]} == {"SUCCESS"}
        assert pair.children.pop(side).end(kill=False) == 0, "it ends in an orderly way"


@pytest.mark.parametrize("side", SIDES)
def test_rooms_are_aborted_in_the_middle_of_a_burst(pair: Pair, side: str) -> None:
    pair.burst(4)
    pair.until_over(*SIDES)  # so that both know each other: what never met nobody tells
    rooms = pair.burst()
    for room in random.sample(rooms, len(rooms) // 2):
        pair.children[side].post("abort", rooms=[room])
    pair.until_over(side)
    pair.children[other(side)].post("abort", rooms=[int(room) for room, seen in pair.rooms(other(side)).items() if not seen[1]])
    pair.until_over(*SIDES)
    for each in SIDES:
        pair.judge(each)
    pair.probe()


@pytest.mark.parametrize("side", SIDES)
def test_a_stopped_process_that_goes_on_loses_nothing(pair: Pair, side: str) -> None:
    """For less than what makes a peer lost."""
    strike_after(pair, lambda: pair.children[side].signal(signal.SIGSTOP))
    time.sleep(0.3)
    pair.children[side].signal(signal.SIGCONT)
    pair.until_over(*SIDES)
    for each in SIDES:
        assert {life["outcome"] for life in pair.judge(each)["lives"]} == {"SUCCESS"}


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
@pytest.mark.parametrize("side", SIDES)
def test_one_side_ends_in_the_middle_of_a_burst(pair: Pair, side: str, killed: bool) -> None:
    """By SIGKILL, or in an orderly way: then its memory is unregistered and freed while writes are on their way."""
    statuses: list[int | None] = []
    strike_after(pair, lambda: statuses.append(pair.children.pop(side).end(kill=killed)))
    if not killed:
        assert statuses == [0], f"{side} did not close in an orderly way: {statuses}"
    survivor = other(side)
    pair.until_over(survivor, free=False, routed=True)
    time.sleep(min(pair.residual_ms / 1e3, 3.0) + 0.3)  # what the network held has landed
    report = pair.judge(survivor)
    for life in report["lives"]:
        assert life["outcome"].startswith(ENDS), life
    pair.start(side)
    pair.probe()
    for each in SIDES:
        pair.judge(each)
