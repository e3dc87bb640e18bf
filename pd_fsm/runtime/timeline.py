"""Read the sessions' NDJSON traces and show them: a Perfetto trace and a picture of every room.

A trace is what the core did, one line a step, so everything here is derived from it and nothing is guessed: a process that was
killed leaves a torn last line and no `close`, and then its life ends at its last whole line. One session name can have several
lives (a restart is another incarnation), in one file that was appended to or in several files; rooms are kept apart by life and
generation. The clock of all traces is CLOCK_MONOTONIC, so only files of one host may be put together.

This module never judges a room: `audit` only says where a trace contradicts itself or stops too early.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import attrs
import msgspec

from pd_fsm.errors import PdError
from pd_fsm.machines.lease import LeaseState
from pd_fsm.machines.room import TERMINAL, Phase
from pd_fsm.runtime.timeline_perfetto import chrome_trace
from pd_fsm.runtime.timeline_svg import draw

TERMINAL_NAMES = frozenset(phase.name for phase in TERMINAL)
FREE_LEASE_NAMES = frozenset({LeaseState.PRIVATE.name, LeaseState.QUIESCED.name})


class TraceError(PdError):
    """A file is not a trace, or is broken where no crash can have broken it. Names the file and the line."""


class Line(msgspec.Struct, kw_only=True):
    """One line of a trace; which fields are set depends on `machine` (room, lease, peer or session)."""

    t_ms: float
    session: str
    machine: str
    event: str
    role: str = ""
    room: int = 0
    generation: int = 0
    peer: str = ""
    row: str = ""
    before: str = ""
    after: str = ""
    reason: str = ""
    bytes: int = 0
    incarnation: str = ""
    pid: int = 0


@attrs.frozen
class Span:
    """A state that was held from `start_ms` to `end_ms` (monotonic clock)."""

    state: str
    start_ms: float
    end_ms: float


@attrs.define
class Track:
    """The states of one machine in order of time. `gaps` are steps that do not continue where the last one ended."""

    spans: list[Span] = attrs.Factory(list)
    gaps: list[str] = attrs.Factory(list)
    state: str = ""
    since_ms: float = 0.0

    def step(self, line: Line) -> None:
        if self.state and line.before != self.state:
            self.gaps.append(f"{line.machine} row {line.row!r} starts from {line.before or 'nothing'}, but it was in {self.state}")
        if line.after != self.state:
            self.end(line.t_ms)
            self.state, self.since_ms = line.after, line.t_ms

    def end(self, t_ms: float) -> None:
        if self.state:
            self.spans.append(Span(self.state, self.since_ms, t_ms))


@attrs.define
class RoomTrace:
    """One generation of one room in one life of a session."""

    session: str
    role: str
    room: int
    generation: int
    opened_ms: float
    phase: Track = attrs.Factory(Track)
    lease: Track = attrs.Factory(Track)
    verdict: str = ""  # SUCCESS, FAILED, or "" when the trace ends before
    concluded_ms: float = 0.0
    reason: str = ""
    bytes: int = 0
    cleared: bool = False

    @property
    def end_ms(self) -> float:
        return max((span.end_ms for span in (*self.phase.spans, *self.lease.spans)), default=self.opened_ms)


@attrs.define
class Life:
    """One life of one session: from its `open` line to its `close`, or to its last whole line if it was killed or still runs."""

    session: str
    role: str
    incarnation: str
    pid: int
    start_ms: float
    end_ms: float
    number: int = 1  # 1 for the first life of this session name
    closed: bool = False
    torn: int = 0  # lines cut short by a crash
    rooms: dict[tuple[int, int], RoomTrace] = attrs.Factory(dict)
    peers: list[Line] = attrs.Factory(list)
    clock_ran_back: bool = False

    @property
    def title(self) -> str:
        return self.session if self.number == 1 else f"{self.session} (life {self.number})"

    def add(self, line: Line) -> None:
        self.clock_ran_back |= line.t_ms < self.end_ms
        self.end_ms = max(self.end_ms, line.t_ms)
        if line.machine == "session":
            self.closed |= line.event == "close"
        elif line.machine == "peer":
            self.peers.append(line)
        else:
            self._add_to_room(line)

    def _add_to_room(self, line: Line) -> None:
        key = (line.room, line.generation)
        room = self.rooms.get(key)
        if room is None:
            room = self.rooms[key] = RoomTrace(self.session, self.role, line.room, line.generation, line.t_ms)
        if line.machine == "lease":
            room.lease.step(line)
            return
        room.phase.step(line)
        room.bytes = max(room.bytes, line.bytes)
        room.cleared |= line.event == "clear"
        if line.after in TERMINAL_NAMES and not room.verdict:
            room.verdict, room.concluded_ms, room.reason = line.after, line.t_ms, line.reason

    def finish(self) -> None:
        """Close what is still open at the last moment that is known of this life."""
        for room in self.rooms.values():
            room.phase.end(self.end_ms)
            room.lease.end(self.end_ms)


def read(paths: Iterable[str | Path]) -> list[Life]:
    """All lives in these files, in order of their start. Raises TraceError for what is not a trace, OSError for no file."""
    lives = [life for path in paths for life in _read_file(Path(path))]
    lives.sort(key=lambda life: (life.start_ms, life.session))
    counts: dict[str, int] = {}
    for life in lives:
        life.number = counts[life.session] = counts.get(life.session, 0) + 1
        life.finish()
    return lives


def _read_file(path: Path) -> list[Life]:
    lives: list[Life] = []
    torn_at = 0  # number of a line that could not be read and that only a crash may explain
    for number, line in _lines(path):
        if line is None:
            if torn_at:
                raise TraceError(f"{path}:{torn_at} is not a line of a trace; was the file edited or is it something else?")
            torn_at = number
            continue
        opens = line.machine == "session" and line.event == "open"
        if torn_at and not (opens and lives):
            raise TraceError(f"{path}:{torn_at} is not a line of a trace; only the last line of a life can be cut short")
        if torn_at:
            lives[-1].torn += 1
            torn_at = 0
        if opens or not lives:
            lives.append(Life(line.session, line.role, line.incarnation, line.pid, line.t_ms, line.t_ms))
        if not opens:
            lives[-1].add(line)
    if torn_at and lives:
        lives[-1].torn += 1
    elif torn_at:
        raise TraceError(f"{path}:{torn_at} is not a line of a trace, and there is no other line")
    return lives


def _lines(path: Path) -> Iterator[tuple[int, Line | None]]:
    """Each line with its number; None for one that cannot be read."""
    decoder = msgspec.json.Decoder(Line)
    for number, raw in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            yield number, decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            yield number, None
            # A life appended after a torn line begins on the same line of text.
            start = raw.rfind(b'{"')
            if start > 0:
                try:
                    yield number, decoder.decode(raw[start:])
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue


def audit(lives: Sequence[Life]) -> list[str]:
    """What is missing from or contradictory in the traces, one sentence each; empty when they are complete.

    A life without `close` may stop anywhere when a later life of the same session follows it (it was killed and restarted);
    otherwise that is a finding. In a closed life every room has a verdict, was cleared, and nobody may touch its memory any more.
    """
    last = {life.session: life.number for life in lives}
    findings: list[str] = []
    for life in lives:
        if life.clock_ran_back:
            findings.append(f"{life.title}: time runs backwards")
        if not life.closed and life.number == last[life.session]:
            findings.append(f"{life.title}: the trace ends without a close, and no later life follows")
        for room in life.rooms.values():
            findings += [f"{life.title} room {room.room}: {finding}" for finding in _audit_room(room, life.closed)]
    return findings


def _audit_room(room: RoomTrace, closed: bool) -> list[str]:
    findings = room.phase.gaps + room.lease.gaps
    first = room.phase.spans[0].state if room.phase.spans else ""
    if first != Phase.BOOTSTRAPPING.name:
        findings.append(f"its first phase is {first or 'missing'}, not {Phase.BOOTSTRAPPING.name}")
    if room.verdict == Phase.FAILED.name and not room.reason:
        findings.append("it failed without a reason")
    if closed and not room.verdict:
        findings.append(f"it never concluded; last seen in {room.phase.state}")
    if closed and room.verdict and not room.cleared:
        findings.append("it was never cleared")
    if closed and room.lease.state and room.lease.state not in FREE_LEASE_NAMES:
        findings.append(f"its lease ended in {room.lease.state}: somebody might still touch its memory")
    return findings


def timeline(paths: Iterable[str | Path], svg: str | Path | None = None, perfetto: str | Path | None = None) -> list[Life]:
    """Read traces and write what is asked for: `svg` a picture, `perfetto` a Chrome trace. Returns the lives that were read.

    Same files, same output, byte for byte. Folders of the outputs are made. Raises TraceError for a file that is no trace and
    OSError for one that cannot be read or written. May be called from any thread.
    """
    lives = read(paths)
    outputs: list[tuple[Path, bytes]] = []
    if svg is not None:
        outputs.append((Path(svg), draw(lives).encode()))
    if perfetto is not None:
        outputs.append((Path(perfetto), msgspec.json.encode(chrome_trace(lives)) + b"\n"))
    for path, content in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return lives
