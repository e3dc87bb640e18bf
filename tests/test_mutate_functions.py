"""The report on mutated functions counts every mutant once, and names those that live."""

from __future__ import annotations

from pd_fsm.testing.mutate_functions import rows

RESULTS = """\
    pd_fsm.core.wire.x_clip__mutmut_1: killed
    pd_fsm.core.wire.x_clip__mutmut_2: survived
    pd_fsm.core.wire.x_clip__mutmut_3: timeout
    pd_fsm.core.wire.x_clip__mutmut_4: segfault
    pd_fsm.core.timers.xǁTimersǁarm__mutmut_12: no tests
To see a mutant, use `show`
"""


def test_each_mutant_is_counted_once() -> None:
    timers, wire = rows(RESULTS)
    assert (timers.module, timers.mutants, timers.no_tests, timers.score) == ("timers", 1, 1, 0.0)
    assert timers.survivors == ("xǁTimersǁarm__mutmut_12",)
    assert (wire.mutants, wire.killed, wire.survived, wire.timeouts, wire.other) == (4, 1, 1, 1, 1)
    assert wire.survivors == ("x_clip__mutmut_2",)
    assert wire.score == 50.0


def test_nothing_mutated_is_no_row() -> None:
    assert rows("") == []
