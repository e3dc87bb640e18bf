"""The demo's child processes: started with a log each, watched, ended by their own pid, never left behind.

Children run in sessions of their own, so that Ctrl-C reaches only the demo, which then ends them. Nothing here waits without a
deadline. Owned by one thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

LOG_TAIL_CHARS = 1500
END_GRACE_S = 3.0  # SIGTERM, then after this SIGKILL


class ChildDied(Exception):  # noqa: N818 - reads as what it is
    """A child ended that should be running; the message has the end of its log."""


@attrs.frozen
class Child:
    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self) -> str:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace").strip()
        return text[-LOG_TAIL_CHARS:] or "(it printed nothing)"


class Processes:
    """A context manager: whatever happens inside, no child outlives it."""

    def __init__(self, log_folder: Path) -> None:
        self.log_folder = log_folder
        self.children: dict[str, Child] = {}  # the present life of each name
        self._lives: dict[str, int] = {}

    def start(self, name: str, arguments: Sequence[str]) -> Child:
        """Start `python <arguments>`; stdout and stderr go to `<name>.<life>.log`."""
        life = self._lives[name] = self._lives.get(name, 0) + 1
        log = self.log_folder / f"{name}.{life}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
        child = self.children[name] = Child(name, process, log)
        return child

    def kill(self, name: str, timeout_s: float) -> None:
        """kill -9 and wait until the process is gone."""
        child = self.children.pop(name)
        os.kill(child.pid, signal.SIGKILL)
        child.process.wait(timeout_s)

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Stopped with SIGSTOP inside the block."""
        pid = self.children[name].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def check(self) -> None:
        """Raise ChildDied if one has ended."""
        for child in self.children.values():
            if child.process.poll() is not None:
                raise ChildDied(
                    f"{child.name} (pid {child.pid}) ended with {child.process.returncode}; its log ends with:\n{child.tail()}"
                )

    def exit_code(self, name: str, timeout_s: float) -> int | None:
        """Wait for a child that was asked to end. None if it did not within `timeout_s`; then it is ended by `__exit__`."""
        child = self.children[name]
        try:
            code = child.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        del self.children[name]
        return code

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        running = [child.process for child in self.children.values() if child.process.poll() is None]
        try:
            for process in running:
                process.terminate()
            _wait_for_all(running, END_GRACE_S)
        finally:  # a second Ctrl-C must not leave them behind either
            for process in running:
                if process.poll() is None:
                    process.kill()
            _wait_for_all(running, END_GRACE_S)
            self.children.clear()


def _wait_for_all(running: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
