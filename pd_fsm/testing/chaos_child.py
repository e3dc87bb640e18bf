"""One process of the chaos run, as the run sees it: started, told what to do by lines of JSON, ended by its own pid.

Nothing here waits without a deadline. Owned by one thread; a second one reads what the process says.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ANSWER_S = 15.0  # of a process, its start included
END_S = 5.0


class ChaosError(Exception):
    """Something did not come to pass in time, or a process failed to do what it was told."""


class Child:
    """One process; a context manager would end it too early, so its scene ends it."""

    def __init__(
        self, name: str, settings: dict[str, Any], log: Path, module: str = "pd_fsm.testing.chaos_worker", path: str = ""
    ) -> None:
        """`module` is what it runs with its settings; `path` becomes its PYTHONPATH, unless empty."""
        self.name = name
        self.log = log
        self._unread = 0  # answers that nobody waited for yet
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", module, json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches only the run, which then ends its processes
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | ({"PYTHONPATH": path} if path else {}),
            )
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def line(self) -> str:
        """The next thing it says."""
        try:
            line = self._lines.get(timeout=ANSWER_S)
        except queue.Empty:
            raise ChaosError(f"{self.name} did not answer within {ANSWER_S} s") from None
        if not line:
            raise ChaosError(f"{self.name} ended; its log ends with: {self.log.read_text(errors='replace')[-1500:]}")
        return line.decode()

    def post(self, do: str, **arguments: Any) -> None:
        """Give a command without waiting for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do} | arguments).encode() + b"\n")
        self._process.stdin.flush()
        self._unread += 1

    def do(self, do: str, **arguments: Any) -> Any:
        """Give a command; its answer."""
        self.post(do, **arguments)
        answer: Any = {}
        while self._unread:
            answer = json.loads(self.line())
            self._unread -= 1
            if "error" in answer:
                raise ChaosError(f"{self.name} could not do {do}: {answer['error']}")
        return answer

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self, *, kill: bool) -> int | None:
        """SIGKILL, or the end of its input (of the bootstrap server SIGTERM), on which it closes in an orderly way.

        Returns its exit status, None if it took longer than END_S.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        status = None
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            if not kill:
                if self.name == "bootstrap":
                    self.signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = self._process.wait(END_S)
        finally:
            if self._process.poll() is None:
                self._process.kill()  # also ends a stopped one
            self._process.wait(END_S)
            self._reader.join(END_S)
            self._process.stdout.close()
        return status
