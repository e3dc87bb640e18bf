"""Two processes for a benchmark: fresh interpreters, a common clock, a common start, and an end whatever happens.

A child is `python -m pd_fsm.benchmarks.<module> <side>` with its settings as JSON on stdin. It prints a line of JSON when it can be
met, and one with its result. The two children agree on each start through a few words of shared memory, so that no pipe or signal
of the benchmark itself is part of what is measured; CLOCK_MONOTONIC is the same for both.
"""

from __future__ import annotations

import json
import mmap
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

import pd_fsm
from pd_fsm.core.events import PeersFound

READY_TIMEOUT_S = 60.0
RESULT_TIMEOUT_S = 300.0
STEP_TIMEOUT_S = 60.0
"""How long a child waits for the other one, or for one room."""
HEAD_START_NS = 400_000
"""Between the agreement on a start and the start; the last part of it is spun away, so both begin within microseconds."""
_WORD = struct.Struct("<q")
_ROLES = ("prefill", "decode")


class ChildFailed(Exception):  # noqa: N818 - reads as what it is
    """A child of a benchmark ended, or did not answer in time; the message has what it printed."""


# --- the parent --------------------------------------------------------------------------------------------------------------


def run_pair(module: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Run both sides of `module` with the same settings. Returns {"prefill": result, "decode": result}. Raises ChildFailed."""
    with tempfile.TemporaryDirectory(prefix="pd-fsm-bench-") as folder:
        Path(folder, "start").write_bytes(bytes(_WORD.size * 4))
        children = {role: _Child(module, role, Path(folder)) for role in _ROLES}
        try:
            first, second = (children[role] for role in _ROLES)
            first.tell(settings | {"start": str(Path(folder, "start"))})
            meeting = first.answer(READY_TIMEOUT_S)
            second.tell(settings | {"start": str(Path(folder, "start")), "meeting": meeting})
            return {role: child.answer(RESULT_TIMEOUT_S) for role, child in reversed(children.items())}
        finally:
            for child in children.values():
                child.end()


class _Child:
    def __init__(self, module: str, role: str, folder: Path) -> None:
        self._name = f"{module} {role}"
        self._log = folder / f"{role}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and modules
                [sys.executable, "-m", f"pd_fsm.benchmarks.{module}", role],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )

    def tell(self, settings: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(settings).encode() + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            raise self._failed("ended before it was told anything") from None

    def answer(self, timeout_s: float) -> Any:
        """Its next line, decoded."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            raise self._failed("ended without a result" if ready else f"did not answer within {timeout_s} s")
        return json.loads(line)

    def _failed(self, what: str) -> ChildFailed:
        return ChildFailed(f"{self._name} {what}: {self._log.read_text(errors='replace')[-2_000:] or '(it printed nothing)'}")

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


# --- a child -----------------------------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """What the parent told this child."""
    told: dict[str, Any] = json.loads(sys.stdin.readline())
    return told


def report(result: Any) -> None:
    """One line for the parent."""
    print(json.dumps(result), flush=True)


class Start:
    """Agrees with the other child on when to begin. `idle` is called while it waits, to keep whatever runs here alive."""

    def __init__(self, path: str, role: str) -> None:
        with Path(path).open("r+b") as file:
            self._words = mmap.mmap(file.fileno(), 0)
        self._me = _ROLES.index(role)
        self._round = 0

    def wait(self, idle: Callable[[], object]) -> int:
        """Wait until both are here, then until the agreed moment. Returns it, in ns of the monotonic clock."""
        self._round += 1
        self._put(self._me, self._round)
        deadline = time.monotonic() + STEP_TIMEOUT_S
        while self._get(1 - self._me) < self._round or (self._me and self._get(2) < self._round):
            idle()
            time.sleep(50e-6)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the other side did not come to round {self._round} within {STEP_TIMEOUT_S} s")
        if self._me == 0:  # the first side names the moment, then that it did
            self._put(3, time.monotonic_ns() + HEAD_START_NS)
            self._put(2, self._round)
        begin = self._get(3)
        while time.monotonic_ns() < begin:
            pass
        return begin

    def _get(self, word: int) -> int:
        value: int = _WORD.unpack_from(self._words, word * _WORD.size)[0]
        return value

    def _put(self, word: int, value: int) -> None:
        _WORD.pack_into(self._words, word * _WORD.size, value)

    def close(self) -> None:
        self._words.close()


@attrs.frozen
class Meeting:
    """How the decode child finds the prefill child without a bootstrap server: its registration, handed over by the parent."""

    registry: pd_fsm.LocalRendezvous

    @classmethod
    def of_prefill(cls) -> Meeting:
        return cls(pd_fsm.LocalRendezvous())

    @classmethod
    def of_decode(cls, told: dict[str, Any]) -> Meeting:
        registry = pd_fsm.LocalRendezvous()
        registry.register("", pd_fsm.PeerRecord(bytes.fromhex(told["incarnation"]), told["endpoint"], told["name"]))
        return cls(registry)

    def record(self) -> dict[str, Any]:
        """The registration of this child's prefill session, for `of_decode` in the other one."""
        found = self.registry.find(0, "", 0, 0)
        assert isinstance(found, PeersFound), found.reason
        record = found.records[0]
        return {"incarnation": record.incarnation.hex(), "endpoint": record.endpoint, "name": record.name}
