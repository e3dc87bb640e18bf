"""Every scenario file replays on the real core, word for word; the runner itself can fail; the table of records is current.

To bring the logged lines up to date: `python -m pd_fsm.testing.records tests/scenarios --rewrite`, then read the diff.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pd_fsm.testing import records
from pd_fsm.testing.scenario import ScenarioError, run

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "scenarios"
FILES = sorted(FOLDER.glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    run(path)


def test_runtime_tests_that_scenarios_name_exist() -> None:
    """They are run by this suite under their own names; here only that no name is stale."""
    named = {node for record in map(records.read, FILES) for node in record.runtime}
    files = sorted({node.partition("::")[0] for node in named})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout
    collected = {line.partition("[")[0] for line in listed.splitlines()} | set(listed.splitlines())
    assert named <= collected, f"no such tests: {sorted(named - collected)}"


def test_table_of_records_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert records.main(["tests/scenarios", "--docs", "docs/records.md", "--check"]) == 0, "run: make docs"


def write(folder: Path, text: str) -> Path:
    path = folder / "X1-made-up.txt"
    path.write_text("# X1: made up\n" + text)
    return path


OPENED = "P open 1\n  P room 1: BOOTSTRAPPING\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (OPENED + "expect P 1 SUCCESS\n", "room 1 is BOOTSTRAPPING"),
        ("P open 1\n  P room 1: SUCCESS\nexpect P 1 BOOTSTRAPPING\n", "expected\n  P room 1: SUCCESS"),
        (OPENED, "expects nothing"),
        ("P dance 1\nexpect idle\n", "cannot 'dance'"),
        (OPENED + "P open 1\nexpect idle\n", "already open"),
        ("refused: P open 1\nexpect idle\n", "was not refused"),
        (OPENED + "expect idle\n", "not idle"),
        ("expect P peer D READY\n", "peer D is unknown"),
        ("expect P count late.part\n", "late.part is 0"),
        ("expect P table rooms 3\n", "rooms has 0 entries"),
        ("world P D speed=3\nexpect idle\n", "unknown settings"),
    ],
)
def test_what_does_not_hold_is_told(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ScenarioError, match=r"X1-made-up\.txt") as error:
        run(write(tmp_path, text))
    assert why in str(error.value)


def test_rewrite_changes_the_log_and_never_the_law(tmp_path: Path) -> None:
    path = write(tmp_path, "P open 1\n  something else\nexpect P 1 BOOTSTRAPPING\n")
    run(path, rewrite=True)
    assert path.read_text() == "# X1: made up\nP open 1\n  P room 1: BOOTSTRAPPING\nexpect P 1 BOOTSTRAPPING\n"
    run(path)
    broken = write(tmp_path, "P open 1\nexpect P 1 FAILED\n")
    with pytest.raises(ScenarioError):
        run(broken, rewrite=True)


def test_the_report_counts_what_holds(tmp_path: Path) -> None:
    write(tmp_path, "P open 1\n  P room 1: BOOTSTRAPPING\nexpect P 1 BOOTSTRAPPING\n")
    (tmp_path / "X2-fails.txt").write_text("# X2: fails\nP open 1\nexpect P 1 FAILED\n")
    report = tmp_path / "report.json"
    assert records.main([str(tmp_path), "--report", str(report)]) == 1
    assert '"passed": 1' in report.read_text()
    assert '"failed": 1' in report.read_text()
    assert records.main([str(tmp_path / "empty")]) == 2
