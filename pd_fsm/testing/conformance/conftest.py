"""Fixtures of the kit's tests."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from pd_fsm.testing.conformance.engines import World
from pd_fsm.testing.conformance.plugin import CAPABILITIES, TARGET
from pd_fsm.testing.conformance.target import Capabilities, Target

TEST_S = 60
"""How long a test may take before it is ended: a call that blocks must fail its test, not stop the run."""


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    """End a test that hangs. A call that does not even return to Python ends the run, with all stacks on standard error."""
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield  # somebody else watches, pytest-timeout for example
        return

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"this test hung for {TEST_S} s; the traceback shows where")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, TEST_S)
    faulthandler.dump_traceback_later(2 * TEST_S, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def target(pytestconfig: pytest.Config) -> Target:
    """The transport under test."""
    return pytestconfig.stash[TARGET]


@pytest.fixture
def capabilities(pytestconfig: pytest.Config) -> Capabilities:
    """What it declares."""
    return pytestconfig.stash[CAPABILITIES]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An empty folder for the transport's own files, with a short name: socket files have little room for one."""
    made = tmp_path / "s"
    made.mkdir()
    return made


@pytest.fixture(params=[True, False], ids=["thread", "progress"])
def world(request: pytest.FixtureRequest, target: Target, directory: Path) -> Iterator[World]:
    """Engines that meet; their sessions have threads of their own, or are driven by the test."""
    made = World(target, request.param, directory)
    yield made
    made.close()
