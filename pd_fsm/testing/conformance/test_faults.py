"""Real sessions over the transport under test, with everything at the wrong moment: aborts at every point of a room's life, frames
that are lost, doubled, late and out of order, outcomes that are late, doubled or unknown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pd_fsm.testing.conformance.faults import Faults
from pd_fsm.testing.conformance.storm import CONCLUDED, Storm
from pd_fsm.testing.conformance.target import Target

pytestmark = pytest.mark.pd_fsm_needs("peer")
POINTS_MAX = 60
ORDERS = 4

FAULTS = {
    "none": Faults(),
    "loss": Faults(lose=0.25),
    "duplicates": Faults(duplicate=0.5, delay=0.3),
    "reordering": Faults(delay=0.6, late_ms=30),
    "late outcomes": Faults(late_outcome=0.7, late_ms=30),
    "unknown outcomes": Faults(unknown_outcome=0.4),
    "echoes of outcomes": Faults(echo_outcome=0.8, late_outcome=0.3),
    "all": Faults(lose=0.1, duplicate=0.2, delay=0.3, late_outcome=0.2, unknown_outcome=0.1, echo_outcome=0.3),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_every_room_ends_and_all_memory_comes_back(target: Target, directory: Path, name: str, seed: int) -> None:
    """Aborts included, every byte of a success as it was computed, and no byte in memory that was given back."""
    with Storm(target, directory, FAULTS[name], f"{name}/{seed}") as storm:
        storm.run()
        assert name == "none" or storm.faulty.injected > 0
        storm.finish()


@pytest.mark.parametrize("late", [False, True], ids=["granted early", "granted late"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_an_abort_at_every_point_of_a_rooms_life(target: Target, directory: Path, side: str, late: bool) -> None:
    """After 0, 1, 2, ... rounds of one session or the other, in several orders of the two, until a room is over before its abort
    comes. One room number is used throughout."""
    with Storm(target, directory, Faults(), f"{side}/{late}") as storm:
        for order in range(ORDERS):
            reached = next((point for point in range(POINTS_MAX) if not abort_at(storm, side, late, order, point)), None)
            assert reached is not None, f"no room was over within {POINTS_MAX} rounds: later points were not tried"
            # With two rounds the last chunk is handed in after the second; with three, a round of both sides may be enough for it.
            assert reached > 2, "the room was over before its last chunk was handed in"
        storm.finish()


def abort_at(storm: Storm, side: str, late: bool, order: int, point: int) -> bool:
    """One room, aborted after `point` rounds. False when it was over before."""
    aborter = storm.prefill if side == "prefill" else storm.decode
    dice = random.Random(f"{order}/{point}")
    storm.prefill.open([1])
    storm.decode.open([1], late=late)
    storm.prefill.send([1], half=True)
    handle = aborter.of_room[1].handle
    for n in range(point):
        if handle.poll() in CONCLUDED:
            break
        engine = dice.choice((storm.prefill, storm.decode))
        if not storm.step(engine):
            storm.step()  # nothing was to do there: a round of the other one counts as well
        if n == point // 2:
            storm.prefill.send([1])
        if late and n == point // 3:
            storm.decode.grant([1])
    over = handle.poll() in CONCLUDED
    storm.abort(aborter, 1)
    assert over or handle.failure is not None, "the verdict is there at once"
    storm.until(lambda: all(life.free for life in storm.lives()), f"an abort after {point} rounds is over")
    storm.prefill.clear()
    storm.decode.clear()
    return not over
