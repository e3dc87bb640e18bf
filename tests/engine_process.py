"""An engine in a process of its own, told what to do by lines of JSON on its standard input: `python -m tests.engine_process ...`.

`EngineProcess` is the other end, for tests; its `settings` are those of `open_session`. Each command is answered by one line, so a
test knows how far the process came before it stops or kills it.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import pd_fsm

PAGE_SIZE = 4
PAGES = 512
PAGE_BYTES = 64 << 10
ROOT = Path(__file__).parent.parent
ANSWER_S = 20.0  # for a line of the process; it starts in about a second
LIMITS = pd_fsm.Limits(in_flight_bytes_max=1 << 20)  # small, so that a transfer can be met in its middle
DEADLINES = pd_fsm.Deadlines(heartbeat_ms=100, lost_ms=600, repeat_min_ms=20, repeat_max_ms=200, handshake_ms=1_500)


def make_buffer(seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Pages of noise; the same seed gives the same in every process."""
    noise = np.random.default_rng(seed).integers(0, 256, (1 << 20) + 7, dtype=np.uint8)
    return np.resize(noise, PAGES * PAGE_BYTES).reshape(PAGES, PAGE_BYTES)


def open_engine(role: str, name: str, url: str, buffer: Any, **settings: Any) -> pd_fsm.Session:
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [buffer], PAGE_SIZE)])
    return pd_fsm.open_session(
        role, layout, rendezvous=url, name=name, **({"transport": "zmq", "deadlines": DEADLINES, "limits": LIMITS} | settings)
    )


class EngineProcess:
    """Starts the process, and ends it by its own pid when the test is over."""

    def __init__(self, role: str, name: str, url: str, seed: int, **settings: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine_process", role, name, url, str(seed), json.dumps(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.answer() == {"ready": True}

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def answer(self) -> dict[str, Any]:
        line = self._lines.get(timeout=ANSWER_S)
        assert line, f"the process ended: {self._process.stderr.read() if self._process.stderr else ''}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer
        return answer

    def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": command} | arguments) + "\n")
        return self.answer()

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(ANSWER_S)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> tuple[int, str]:
        """Close the session in an orderly way; (exit status, what was said on stderr)."""
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._process.stdin.close()
        status = self._process.wait(ANSWER_S)
        return status, self._process.stderr.read()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._process.poll() is None:
            self.kill()
        self._reader.join(ANSWER_S)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # a command that a killed process did not take
                continue


def main(role: str, name: str, url: str, seed: str, settings: str) -> int:
    buffer = make_buffer(int(seed))
    handles: dict[int, Any] = {}

    def run(do: str, room: int = 0, **arguments: Any) -> dict[str, Any]:
        if do == "open":
            handles[room] = session.send(room) if role == "prefill" else session.receive(room, arguments["pages"])
        elif do == "chunk":
            handles[room].send(arguments["pages"], tuple(arguments["tokens"]), last=arguments["last"])
        elif do == "wait":
            handles[room].wait(arguments["timeout_s"])
        elif do == "page":
            return {"first": buffer[arguments["page"]][:16].tolist()}
        handle = handles[room]
        return {"phase": handle.phase.name, "failure": handle.failure and handle.failure.reason, "pages_free": handle.pages_free}

    with open_engine(role, name, url, buffer, **json.loads(settings)) as session:
        print(json.dumps({"ready": True}), flush=True)  # noqa: T201 - the answer on the pipe
        for line in sys.stdin:
            try:
                answer = run(**json.loads(line))
            except Exception as error:  # noqa: BLE001 - the test sees it
                answer = {"error": repr(error)}
            print(json.dumps(answer), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
