"""Every row of the machines is taken by some scenario, and a row that nobody takes is told and painted."""

from __future__ import annotations

from pathlib import Path

import pytest

from pd_fsm.machines import MACHINES
from pd_fsm.testing import coverage

FOLDER = Path(__file__).parent / "scenarios"


@pytest.fixture(scope="module")
def scenarios() -> dict[str, int]:
    return coverage.of_scenarios(sorted(FOLDER.glob("*.txt")))


def test_every_row_is_taken_by_a_scenario(scenarios: dict[str, int]) -> None:
    assert coverage.never_taken({"scenarios": scenarios}) == []


def test_only_rows_are_counted(scenarios: dict[str, int]) -> None:
    assert set(scenarios) == {row.id for table in MACHINES.values() for row in table.rows()}


def test_the_simulator_and_the_explorer_name_rows_too() -> None:
    assert coverage.of_simulator(2)["room.fail:TRANSFERRING"] >= 0
    assert coverage.of_explorer(["grant"])["room.part_settled:TRANSFERRING[all_confirmed]"] > 0


def test_a_row_that_nobody_takes_is_told_and_painted(scenarios: dict[str, int], tmp_path: Path) -> None:
    without = {row: count for row, count in scenarios.items() if row != "lease.unknown:REVOKING"}
    taken = {"scenarios": without, "explorer": {}, "simulator": {}}
    assert coverage.never_taken(taken) == ["lease.unknown:REVOKING"]
    coverage.paint(taken, tmp_path)
    assert "never taken" in (tmp_path / "lease.svg").read_text()
    assert "never taken" not in (tmp_path / "room.svg").read_text()
    assert f"{scenarios['room.fail:TRANSFERRING']:,} / 0 / 0" in (tmp_path / "room.svg").read_text()


def test_a_row_that_was_never_taken_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "of_scenarios", lambda files: {})
    monkeypatch.setattr(coverage, "of_explorer", lambda names, jobs: {"room.fail:TRANSFERRING": 1})
    monkeypatch.setattr(coverage, "of_simulator", lambda seeds, jobs: {})
    assert coverage.main([str(FOLDER), "--out", str(tmp_path)]) == 1
