"""The benchmarks run and give figures that make sense. No time is asserted: that is what the benchmarks themselves report."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pd_fsm.benchmarks import pairs, poll, run
from pd_fsm.benchmarks.rows import Row, Spread, table

KEYS = {"name", "ours", "peer", "ratio", "unit", "goal", "met"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[Any]]:
    """One quick run of all groups: (where it kept its figures, what it printed, its documents)."""
    out = tmp_path_factory.mktemp("bench")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(poll, "GROUP_GOAL_ROOMS", 100)  # the largest group of a quick run
        assert run.main(["--quick", "--json", str(out / "all.json"), "--out", str(out)]) == 0
    return out, printed.getvalue(), json.loads((out / "all.json").read_text())


@pytest.mark.parametrize("group", run.GROUPS)
def test_a_group_gives_well_formed_rows(group: str, quick: tuple[Path, str, list[Any]]) -> None:
    out, printed, documents = quick
    (document,) = (document for document in documents if document["group"] == group)
    assert document == json.loads((out / f"{group}.json").read_text())
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert math.isfinite(row["ours"])
        assert 0 < row["p10"] <= row["ours"] <= row["p90"]
        assert (row["peer"] is None) == (row["ratio"] is None) == (row["peer_name"] is None)
        if row["peer"] is not None:
            assert row["ratio"] == pytest.approx(row["ours"] / row["peer"])
            assert 0 < row["peer_p10"] <= row["peer"] <= row["peer_p90"]
        assert (row["goal"] is None) == (row["met"] is None)
        assert row["name"] in printed
    names = [(row["name"], row["peer_name"]) for row in document["rows"]]
    assert len(set(names)) == len(names), "a figure can be told by its name and its peer"


def test_every_goal_has_a_row(quick: tuple[Path, str, list[Any]]) -> None:
    goals = {row["goal"] for document in quick[2] for row in document["rows"]} - {None}
    assert goals == {"< 2 us", "< 100 ns", "< 50 us", "< 400 us", ">= 0.8x", ">= 0.9x", ">= 0.95x"}


def test_json_on_stdout_is_nothing_but_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["poll", "--quick", "--json", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert [document["group"] for document in json.loads(said.out)] == ["poll"]
    assert "handle.poll()" in said.err


def test_an_unknown_group_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["pol", "--out", str(tmp_path / "bench")]) == 2
    assert "no group pol; there are core, poll, room, bulk, transports" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def test_a_child_that_fails_is_told_with_what_it_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_settings(*, quick: bool = False) -> list[Row]:
        pairs.run_pair("bulk", {"quick": quick})
        return []

    monkeypatch.setitem(run.GROUPS, "bulk", without_settings)
    assert run.main(["bulk", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pd-fsm bench: bulk prefill ended without a result" in said
    assert "KeyError: 'rounds'" in said


def test_a_spread_is_the_median_and_the_middle_of_the_samples() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0, 11.0, 8.0, 9.0, 10.0, 7.0])
    assert spread == Spread(6.0, 2.0, 10.0, 11)
    assert Spread.of([1.0, 2.0]).median == 1.5
    with pytest.raises(ValueError, match="at least one sample"):
        Spread.of([])


@pytest.mark.parametrize(
    ("row", "ratio", "goal", "met"),
    [
        (Row("a", "us", Spread.of([3.0])), None, "", None),
        (Row("a", "us", Spread.of([3.0]), Spread.of([6.0])), 0.5, "", None),
        (Row("a", "us", Spread.of([3.0]), Spread.of([6.0]), "b", 4.0), 0.5, "< 4 us", True),
        (Row("a", "us", Spread.of([4.0]), goal=4.0), None, "< 4 us", False),
        (
            Row("a", "GB/s", Spread.of([4.0]), Spread.of([5.0]), "b", 0.8, goal_is_ratio=True, higher_is_better=True),
            0.8,
            ">= 0.8x",
            True,
        ),
        (
            Row("a", "GB/s", Spread.of([3.9]), Spread.of([5.0]), "b", 0.8, goal_is_ratio=True, higher_is_better=True),
            0.78,
            ">= 0.8x",
            False,
        ),
    ],
)
def test_whether_a_goal_is_met(row: Row, ratio: float | None, goal: str, met: bool | None) -> None:
    assert row.ratio == pytest.approx(ratio)
    assert row.goal_text() == goal
    assert row.met is met
    assert {None: "", True: "yes", False: "NO"}[met] in table("group", [row]).splitlines()[-1]
