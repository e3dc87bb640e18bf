"""The specification and the code say the same, and the checks that say so can fail. `make spec` looks at more, and takes longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pd_fsm.testing import spec, spec_gaps, spec_rumur, spec_traces
from pd_fsm.testing.scopes import Scope

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(300)  # a C compiler runs for each model, and other work may share the machine
MODEL = (ROOT / "specs" / "handoff.m").read_text()
TINY = Scope(name="tiny", about="one room, one chunk, nothing goes wrong but deadlines")


def test_the_tools_are_here() -> None:
    assert not spec_rumur.missing()


def test_rules_name_rows_and_rows_have_rules() -> None:
    assert spec.wrong_names(spec_rumur.rule_names(MODEL)) == []


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("P.abort > room.fail:SUCCESS", "is no row"),
        ("P.abort > lease.conclude:PRIVATE + lease.expose:EXPOSED", "has led elsewhere"),
        ("abort", "does not say which side"),
        ("D.heard > peer.heard:SUSPECT", "is left out, but a rule names it"),
    ],
)
def test_names_that_do_not_fit_are_found(rule: str, what: str) -> None:
    wrong = spec.wrong_names([*spec_rumur.rule_names(MODEL), rule])
    assert any(what in one for one in wrong), wrong


def test_a_row_without_a_rule_is_found() -> None:
    rules = [rule for rule in spec_rumur.rule_names(MODEL) if "lease.unknown:REVOKING" not in rule]
    assert spec.wrong_names(rules) == ["row 'lease.unknown:REVOKING' is in no rule"]


def test_every_state_and_step_of_the_smallest_world_is_the_same() -> None:
    compared = spec.compared(MODEL, TINY)
    assert not compared.differs, compared.differs
    assert compared.states > 1_000


def test_a_specification_that_does_less_is_told_apart() -> None:
    tired = MODEL.replace('rule "D.repeat_abort"\n    d[g].linked', 'rule "D.repeat_abort"\n    false & d[g].linked', 1)
    assert tired != MODEL
    assert "the specification lacks" in spec.compared(tired, TINY).differs


def test_guards_taken_out_are_noticed() -> None:
    scope, gaps = spec_gaps.GAPS[3]
    for gap, run in zip(gaps, spec_gaps.check(MODEL, scope, gaps), strict=True):
        assert run.broken, gap.name
        assert run.story, gap.name


def test_every_gap_is_where_it_is_looked_for() -> None:
    for _, gaps in spec_gaps.GAPS:
        assert spec_gaps.with_gaps(MODEL, gaps) != MODEL


def test_a_scenario_is_a_run_of_the_specification_and_a_spoilt_one_is_not() -> None:
    recorded = spec_traces.of_scenario(next((ROOT / "tests" / "scenarios").glob("B016-*.txt")))
    traces = [trace for trace, left_out in spec_traces.rooms_of("B016", recorded) if not left_out]
    assert len(traces) == 3
    spoilt = spec_traces.Trace("spoilt", tuple(row for row in traces[1].rows if row != ("P", "lease.settled:EXPOSED")))
    checked = spec_traces.check(MODEL, [traces[1], spoilt], explain=False)
    assert checked.verdicts[traces[1].rows].accepted
    assert not checked.verdicts[spoilt.rows].accepted
