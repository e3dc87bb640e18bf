"""Agreement of the ranks of one engine: tensor-, pipeline-, context- or data-parallel groups that must act on a room alike.

Each tick every rank hands in what changed on it since the last tick, in one block of fixed size, and one all-gather shows all
blocks to all ranks. Every rank then applies the same blocks in the same order to the same table, so the tables are equal: the
ranks cannot diverge, because nothing but the gathered bytes decides. A room's agreed phase is the lowest that any rank has
reported (ready is the intersection); FAILED on one rank is FAILED on all (failed is the union), with the reason of the lowest
rank that said so. A decision is returned once, by the tick that made it; nobody polls again in between.

Every rank takes every request of the group, in any order between rooms and at any time: it watches the room, or it refuses it. A
room that failed elsewhere before is settled by that call, so the lives of a room number stay in step on all ranks.

This module must never read a phase between the gather and the decision, never lets the number of rooms change the shape of the
collective (what does not fit waits for the next tick, oldest first), and never lets an error of one room keep its rank from a
collective: it is a failure of that room on all ranks.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.core.events import CAUSES, Failure
from pd_fsm.errors import ConfigError, LocalProtocolError
from pd_fsm.machines import Phase

if TYPE_CHECKING:
    from pd_fsm.runtime.session import Handle, Session

logger = logging.getLogger("pd_fsm")

Gather: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""The collective: uint8 [n] of this rank to uint8 [ranks, n] of all, in rank order, the same on every rank."""

REASON_BYTES_MAX = 96
_ROW = struct.Struct(f"<qbb{REASON_BYTES_MAX}s")  # room, phase (-1: no row, and none after it), cause, reason
_EMPTY = _ROW.pack(-1, -1, 0, b"")
OWED_MAX = 65_536


@attrs.frozen
class Decision:
    """What all ranks do about one room, in this tick; the same on every rank.

    `failure` is set when `phase` is FAILED, and `rank` is then the rank that it came from. A room that made progress on all ranks
    within one tick skips phases.
    """

    room: int
    phase: Phase
    failure: Failure | None = None
    rank: int = -1


@attrs.define(eq=False)
class _Watched:
    handle: Handle
    said: int = Phase.BOOTSTRAPPING
    """What this rank reported last; the first phase goes without saying."""


@attrs.define(eq=False)
class _Entry:
    """What the ranks have said about a room. Equal on all ranks, always."""

    reported: list[int]
    agreed: Phase = Phase.BOOTSTRAPPING


class RankAgreement:
    """One rank's part in its group. Not thread-safe: used by the scheduler's thread, once a tick, on every rank.

    `gather` is the collective (`torch_gather` makes one from a process group), `ranks` how many take part and `rank` which one this
    is. `rows_max` rooms can change a tick; all ranks must use the same value. Raises ConfigError for sizes that cannot be.
    """

    def __init__(self, session: Session, gather: Gather, rank: int, ranks: int, *, rows_max: int = 128) -> None:
        if not 0 <= rank < ranks or rows_max < 1:
            raise ConfigError(f"rank {rank} of {ranks} with rows_max={rows_max} is no group")
        self._session = session
        self._gather = gather
        self._rank = rank
        self._ranks = ranks
        self._rows_max = rows_max
        self._watched: dict[int, _Watched] = {}  # by room, oldest first
        self._refused: dict[int, Failure] = {}  # rooms that this rank will not open, until the group has decided so
        self._table: dict[int, _Entry] = {}
        self._owed: dict[int, deque[tuple[int, Failure]]] = {}  # lives that failed elsewhere before they began here
        self._owed_count = 0

    def watch(self, handle: Handle) -> Decision | None:
        """Take a room in, when it is opened. Returns the decision if it failed on another rank before: then it is aborted here.

        Raises LocalProtocolError for a room whose previous life is not decided yet.
        """
        owed = self._take_owed(handle.room)
        if owed is None:
            self._watched[handle.room] = _Watched(handle)
            return None
        handle.abort(_why(owed))
        return owed

    def refuse(self, room: int, reason: str) -> Decision | None:
        """This rank will not open a room that the group was given: its open raised, or its request left the queue before.

        It fails on all ranks by the next tick. Returns the decision if it failed on another rank before. Raises LocalProtocolError
        for a room that is watched: abort its handle.
        """
        owed = self._take_owed(room)
        if owed is None:
            self._refused[room] = Failure("abort", reason)
        return owed

    def _take_owed(self, room: int) -> Decision | None:
        if room in self._watched or room in self._refused:
            raise LocalProtocolError(f"room {room} is taken already; it leaves when its end is decided")
        lives = self._owed.get(room)
        if lives is None:
            return None
        rank, failure = lives.popleft()
        self._owed_count -= 1
        if not lives:
            del self._owed[room]
        return Decision(room, Phase.FAILED, failure, rank)

    def tick(self) -> list[Decision]:
        """One collective. Returns what was decided, in an order that is the same on all ranks.

        A FAILED decision has been applied: the room is aborted here if it was still live. Decided ends leave the group.
        """
        return self.apply(self._gather(self.block()))

    def apply(self, gathered: NDArray[np.uint8]) -> list[Decision]:
        """The second half of `tick`, for an engine that gathers the blocks of all ranks in a collective of its own."""
        shape = (self._ranks, self._rows_max * _ROW.size)
        if gathered.shape != shape or gathered.dtype != np.uint8:
            got = f"{gathered.dtype} {gathered.shape}"
            raise ConfigError(f"the collective returned {got}, not uint8 {shape}: do all ranks have the same rows_max?")
        touched: dict[int, tuple[int, Failure] | None] = {}  # room -> who failed it, in the order in which it is decided
        for rank in range(self._ranks):
            for room, phase, cause, reason in _ROW.iter_unpack(gathered[rank].tobytes()):
                if phase < 0:
                    break
                self._table.setdefault(room, _Entry([Phase.BOOTSTRAPPING] * self._ranks)).reported[rank] = phase
                failed = touched.get(room)
                if phase == Phase.FAILED and failed is None:
                    failed = rank, Failure(CAUSES[cause], reason.rstrip(b"\0").decode(errors="ignore"))
                touched[room] = failed
        decisions = [made for room, failed in touched.items() if (made := self._decide(room, failed)) is not None]
        for decision in decisions:
            if decision.phase in (Phase.FAILED, Phase.SUCCESS):
                self._end(decision)
        return decisions

    # --- what this rank says ---------------------------------------------------------------------------------------------

    def block(self) -> NDArray[np.uint8]:
        """The first half of `tick`: this rank's changes, oldest room first, padded to the fixed size. What it says is not said
        again, so each block goes into one collective."""
        rows = [self._row(room, Phase.FAILED, failure) for room, failure in list(self._refused.items())[: self._rows_max]]
        for watched, phase, failure in self._changes():
            if len(rows) == self._rows_max:
                break
            watched.said = phase
            rows.append(self._row(watched.handle.room, phase, failure))
        return np.frombuffer(b"".join(rows) + _EMPTY * (self._rows_max - len(rows)), dtype=np.uint8)

    def _changes(self) -> Iterator[tuple[_Watched, int, Failure | None]]:
        everybody = list(self._watched.values())
        if not everybody:
            return
        try:
            phases = self._session.poll_many([watched.handle for watched in everybody]).tolist()
        except Exception:
            logger.exception("rank %d: the rooms cannot be polled together; each is asked by itself", self._rank)
            phases = [None] * len(everybody)
        for watched, polled in zip(everybody, phases, strict=True):
            failure = None
            try:
                phase = watched.handle.poll() if polled is None else polled
                if phase == Phase.FAILED:
                    failure = watched.handle.failure
            except Exception as error:
                logger.exception("rank %d: room %d cannot be polled", self._rank, watched.handle.room)
                phase, failure = Phase.FAILED, Failure("abort", f"rank {self._rank} cannot poll it: {error!r}")
            if phase != watched.said:
                yield watched, phase, failure

    @staticmethod
    def _row(room: int, phase: int, failure: Failure | None) -> bytes:
        cause = CAUSES.index(failure.cause) if failure else 0
        reason = failure.reason.encode(errors="replace")[:REASON_BYTES_MAX] if failure else b""
        return _ROW.pack(room, phase, cause, reason)

    # --- what all ranks do -----------------------------------------------------------------------------------------------

    def _decide(self, room: int, failed: tuple[int, Failure] | None) -> Decision | None:
        entry = self._table[room]
        if failed is not None:
            return Decision(room, Phase.FAILED, failed[1], failed[0])
        phase = Phase(min(entry.reported))
        if phase == entry.agreed:
            return None
        entry.agreed = phase
        return Decision(room, phase)

    def _end(self, decision: Decision) -> None:
        room = decision.room
        del self._table[room]
        watched = self._watched.pop(room, None)
        refused = self._refused.pop(room, None)
        if decision.failure is None:
            return
        if watched is not None:
            try:
                watched.handle.abort(_why(decision))
            except Exception:  # this rank's own trouble must not part it from the group
                logger.exception("rank %d: room %d cannot be aborted", self._rank, room)
        elif refused is None:  # the request has not reached this rank yet
            self._owed.setdefault(room, deque()).append((decision.rank, decision.failure))
            self._owed_count += 1
            if self._owed_count > OWED_MAX:
                self._take_owed(next(iter(self._owed)))


def _why(decision: Decision) -> str:
    assert decision.failure is not None
    return f"rank {decision.rank} failed ({decision.failure.cause}): {decision.failure.reason}"


def torch_gather(group: Any = None) -> Gather:
    """The collective over a `torch.distributed` process group on the CPU, default the world. Waits for all ranks, as every
    collective does, and for the group's own time-out at the most."""
    import torch  # noqa: PLC0415 - importing pd_fsm must not import torch
    import torch.distributed as dist  # noqa: PLC0415

    ranks = dist.get_world_size(group)

    def gather(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
        mine = torch.from_numpy(block.copy())
        everybody = torch.empty((ranks, len(block)), dtype=torch.uint8)
        dist.all_gather(list(everybody.unbind(0)), mine, group=group)  # gloo's gather into one tensor differs between versions
        result: NDArray[np.uint8] = everybody.numpy()
        return result

    return gather
