"""The record of every step, one JSON object a line: for timelines, for coverage, for whoever debugs a failed room at night.

Lines are collected under the session's lock and written by whoever drives; a killed process loses at most its last round. Times are
those of the session's clock: CLOCK_MONOTONIC, which all processes of one host share, unless it was given another one.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pd_fsm.core.session import Identity, Step
from pd_fsm.errors import ConfigError
from pd_fsm.runtime.clock import now_ms

_encode = msgspec.json.Encoder().encode


class TraceWriter:
    """Appends the steps of one session to a file; several lives of one name may share it. `record` needs the session's lock.

    Raises ConfigError for a path that cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Identity, clock_ms: Callable[[], float] = now_ms) -> None:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file: io.BufferedWriter | None = Path(path).open("ab")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ConfigError(f"cannot write the trace of {identity.name} to {path}: {error.strerror}") from error
        self._identity = identity
        self._clock_ms = clock_ms
        self._lines: deque[dict[str, Any]] = deque()  # filled by one thread while another one empties it
        self._line("session", event="open", incarnation=identity.incarnation.hex(), pid=os.getpid())
        self.flush()

    def record(self, step: Step) -> None:
        fields: dict[str, Any] = {"row": step.row, "event": step.event, "before": step.before, "after": step.after}
        if step.room is not None:
            room = step.room
            fields |= {"room": room.room, "generation": room.generation, "bytes": room.bytes_moved}
            fields["reason"] = room.failure.reason if room.failure and step.machine == "room" else ""
        if step.peer is not None:
            fields |= {"peer": step.peer.name, "reason": step.peer.reason}
        self._line(step.machine, **fields)

    def _line(self, machine: str, **fields: Any) -> None:
        head = {"t_ms": round(self._clock_ms(), 4), "session": self._identity.name, "role": self._identity.role}
        self._lines.append(head | {"machine": machine} | fields)

    def flush(self) -> None:
        if self._lines and self._file is not None:
            while self._lines:
                self._file.write(_encode(self._lines.popleft()) + b"\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._line("session", event="close", incarnation=self._identity.incarnation.hex(), pid=os.getpid())
            self.flush()
            self._file.close()
            self._file = None
