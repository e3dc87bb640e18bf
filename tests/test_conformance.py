"""Every transport of this project passes the conformance kit, run as its users run it: a fresh pytest in an empty folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "pd_fsm.testing.conformance"
KIT = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", f"{PACKAGE}.plugin", "--pyargs"]
RUN_S = 280  # bounds a run that should end much sooner
PORT = {"control_port": "{port}"}
IPC = {"scheme": "ipc", "directory": "{directory}"}
RUNS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "memory": ("memory", {}, [PACKAGE]),
    "zmq-tcp": ("zmq", PORT, [PACKAGE]),
    "zmq-ipc": ("zmq", IPC, [f"{PACKAGE}.test_planes", f"{PACKAGE}.test_sessions"]),
    # Its processes take seconds to start; `make conformance TRANSPORT=nixl` runs those tests, too.
    "nixl": ("nixl", PORT, [f"{PACKAGE}.test_planes", f"{PACKAGE}.test_sessions", f"{PACKAGE}.test_faults"]),
    "mooncake": ("mooncake", PORT, [f"{PACKAGE}.test_planes", f"{PACKAGE}.test_processes"]),  # the rest: `make conformance`
}


def run(folder: Path, transport: str, options: dict[str, Any], *arguments: str) -> tuple[int, str]:
    """pytest's exit status and what it said."""
    folder.mkdir(exist_ok=True)
    command = [*KIT, *arguments, f"--pd-fsm-transport={transport}", f"--pd-fsm-transport-options={json.dumps(options)}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=RUN_S, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(RUN_S + 20)
@pytest.mark.parametrize("name", RUNS)
def test_a_built_in_transport_conforms(tmp_path: Path, name: str, request: pytest.FixtureRequest) -> None:
    if name in ("nixl", "mooncake"):
        request.getfixturevalue(f"{name}_library")
    transport, options, parts = RUNS[name]
    status, said = run(tmp_path / "run", transport, options, *parts)
    assert status == 0, said
    assert "skipped" not in said


def test_what_does_not_apply_is_said(tmp_path: Path) -> None:
    status, said = run(tmp_path / "run", "fake", {}, PACKAGE)
    assert "not applicable" in said
    assert "it plays the other side itself" in said
    assert "failed" not in said, status


def test_a_library_may_need_a_process_for_each_role(tmp_path: Path) -> None:
    status, said = run(tmp_path / "run", "zmq", {}, PACKAGE, "--pd-fsm-two-processes", "-k", "burst_of_rooms_is or scattered")
    assert status == 0, said
    assert "1 passed" in said
    assert "one session a process (--pd-fsm-two-processes)" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--pd-fsm-transport=no_such_module:create"], "'no_such_module:create' cannot be found: No module named 'no_such_module'"),
        (["--pd-fsm-transport=json:__doc__"], "is a str, not a factory"),
        (["--pd-fsm-transport=pigeon"], "no transport 'pigeon'"),
        (["--pd-fsm-transport=zmq", "--pd-fsm-transport-options={"], "is no JSON"),
        (["--pd-fsm-transport=zmq", "--pd-fsm-transport-options=[]"], "must be a JSON object"),
        ([], "give --pd-fsm-transport=module:factory"),
    ],
)
def test_a_command_that_cannot_work_says_why(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    command = [*KIT, PACKAGE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert complaint in done.stdout + done.stderr
