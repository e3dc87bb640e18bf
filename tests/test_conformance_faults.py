"""The conformance kit sees what it is for: each fault breaks one sentence of the contract, and the named check finds it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from pd_fsm.testing.conformance import rig as rigs
from pd_fsm.testing.conformance.rig import Rig
from pd_fsm.testing.conformance.target import Target
from pd_fsm.testing.conformance.test_planes import TestControl as Control
from pd_fsm.testing.conformance.test_planes import TestData as Data
from pd_fsm.testing.conformance.test_planes import TestEnds as Ends
from pd_fsm.testing.conformance.test_planes import TestGrants as Grants
from tests import carrier
from tests.test_conformance import PACKAGE, run

Check: TypeAlias = Callable[[Rig], None]
COPIED = Path(carrier.__file__)
PAGE = COPIED.parent.parent / "docs" / "conformance.md"

FAULTS: dict[str, tuple[Check, dict[str, Any], str]] = {
    "is done too early": (Data().test_scattered_pages_arrive_and_nothing_else_changes, {}, "not all of its bytes are there"),
    "is done twice": (Data().test_many_writes_at_once_end_once_each, {}, "is done, and WriteDone came"),
    "settles what it knew": (
        Data().test_scattered_pages_arrive_and_nothing_else_changes,
        {},
        "is outstanding, and WriteSettled came",
    ),
    "counts a byte too many": (Data().test_scattered_pages_arrive_and_nothing_else_changes, {}, "bytes; it has"),
    "notifies too late": (Data().test_scattered_pages_arrive_and_nothing_else_changes, {}, "its notice has not been handed over"),
    "writes a byte too many": (
        Data().test_scattered_pages_arrive_and_nothing_else_changes,
        {"landing": False},
        "",
    ),
    "loses the end of a long plan": (lambda rig: Data().test_a_plan_of_many_blocks(rig, 16_384), {}, "not all of its bytes"),
    "hangs on an empty plan": (Data().test_parts_of_no_length_do_no_harm, {}, "have no outcome"),
    "blocks in submit": (Data().test_a_reader_that_does_not_move_blocks_nobody, {}, "it blocks whoever drives"),
    "answers each cancel": (lambda rig: Data().test_a_cancelled_write_has_its_outcome_once(rig, "at once"), {}, "WriteFailed came"),
    "forgets what is cancelled": (
        lambda rig: Data().test_a_cancelled_write_has_its_outcome_once(rig, "at once"),
        {},
        "have no outcome",
    ),
    "fails what still lands": (
        lambda rig: Data().test_a_cancelled_write_has_its_outcome_once(rig, "at once"),
        {"landing": False},
        "changed, and nothing may touch them",
    ),
    "forgets a lost peer's writes": (lambda rig: Data().test_every_write_of_a_lost_peer_has_its_outcome(rig, 0), {}, "no outcome"),
    "raises for a lost peer": (Data().test_a_write_to_nobody_fails, {}, ""),
    "takes any descriptor": (Data().test_a_descriptor_that_makes_no_sense_costs_only_its_peer, {}, "told to be unreachable"),
    "vouches falsely": (lambda rig: Grants().test_nothing_lands_after_a_revocation_that_vouches(rig, 0), {"landing": False}, ""),
    "ignores grants": (Grants().test_only_what_is_granted_can_be_written, {}, "nobody had granted it"),
    "retries by itself": (Grants().test_only_what_is_granted_can_be_written, {}, "changed, and nothing may touch them"),
    "lands after close": (Ends().test_nothing_lands_in_a_side_that_closed, {}, ""),
    "reads after close": (Ends().test_a_writer_that_closed_reads_its_memory_no_more, {}, "memory was read after close"),
    "raises for an endpoint": (Control().test_an_endpoint_that_makes_no_sense_costs_only_its_peer, {}, ""),
    "cuts large frames": (Control().test_a_frame_of_the_largest_size_arrives, {}, "until it is there"),
    "names the wrong connection": (Control().test_a_frame_comes_on_the_connection_of_its_sender_or_nobodys, {}, "got a frame of"),
    "lets frames overtake": (Control().test_frames_arrive_whole_and_in_order_in_both_directions, {}, "overtook each other"),
    "cannot disconnect twice": (Control().test_connecting_again_and_disconnecting_twice_is_harmless, {}, ""),
    "calls silence death": (Control().test_a_silent_peer_is_not_called_dead, {}, "is dead, which lives"),
}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that fails by waiting need not wait long here."""
    monkeypatch.setattr(rigs, "CALL_S_MAX", carrier.BLOCK_S / 2)
    monkeypatch.setattr(rigs, "PATIENCE_S", 2.0)


def check(name: str, options: dict[str, Any], folder: Path) -> None:
    """Run the check of a fault on a carrier with these options. Raises what the check does."""
    rig = Rig(Target(carrier.create, options), folder, vouches=options.get("landing", True) or name == "vouches falsely")
    try:
        FAULTS[name][0](rig)
    finally:
        rig.close()


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(tmp_path: Path, name: str) -> None:
    options, told = FAULTS[name][1:]
    with pytest.raises((AssertionError, KeyError, ValueError)) as error:
        check(name, options | {"fault": name}, tmp_path)
    assert told in str(error.value)


@pytest.mark.parametrize("landing", ["true", "false"])
def test_the_same_carrier_without_a_fault_conforms(tmp_path: Path, landing: str) -> None:
    """As a third party would run it: its module in the folder where pytest runs."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(COPIED, folder / "my_carrier.py")
    status, said = run(
        folder, "my_carrier:create", {"landing": landing == "true"}, f"{PACKAGE}.test_planes", f"{PACKAGE}.test_faults"
    )
    assert status == 0, said
    assert ("revoke() returns False" in said) == (landing == "false")


def test_the_command_fails_for_a_transport_with_a_fault(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(COPIED, folder / "my_carrier.py")
    options = {"fault": "is done twice"}
    status, said = run(folder, "my_carrier:create", options, f"{PACKAGE}.test_planes", "-k", "many_writes_at_once")
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "is done, and WriteDone came" in said


def test_the_example_of_the_page_has_its_bug_and_its_fix(tmp_path: Path) -> None:
    wrong, cancel = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    begin, end = wrong.index("    def cancel("), wrong.index("    def end(")
    for name, code in (("wrong", wrong), ("right", wrong[:begin] + cancel + "\n" + wrong[end:])):
        # Copies of a real library take time; these would be over before anybody cancels them.
        slow = code.replace(
            "            target[region][to", "            __import__('time').sleep(0.002)\n            target[region][to"
        )
        folder = tmp_path / name
        folder.mkdir()
        (folder / "carrier.py").write_text(slow)
        wanted = pytest.ExitCode.TESTS_FAILED if name == "wrong" else pytest.ExitCode.OK
        for _ in range(8 if name == "wrong" else 1):  # the bug is a race of real threads, which a run may miss
            status, said = run(
                folder, "carrier:create", {}, f"{PACKAGE}.test_planes", "-k", "cancelled or lost_peer or comes_after"
            )
            if status == wanted:
                break
        assert status == wanted, said
        assert ("and nothing may touch them" in said) == (name == "wrong")
