"""One open of a room by one simulated engine: what it holds, what it was promised, and what must be true of it.

Every page carries a label that says which attempt computed which page of which prompt, so wrong bytes are seen whatever caused
them. It must never change a room: it looks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from pd_fsm.core.events import CAUSES, Failure
from pd_fsm.machines import Phase
from pd_fsm.runtime.session import Receiver, Sender
from pd_fsm.testing.sim_memory import ROW_BYTES, STALE
from pd_fsm.testing.sim_schedule import Serve
from pd_fsm.testing.world import Violation

if TYPE_CHECKING:
    from pd_fsm.testing.sim_process import Process

AUX = 4_095
PROMPT_PAGES_MAX = 4_096
TERMINAL = (Phase.SUCCESS, Phase.FAILED)


@attrs.define(eq=False)
class Attempt:
    """One open of a room by one engine, and what it holds. `source`: receiver: the sending attempt that wrote to it."""

    number: int
    serve: Serve
    process: Process
    handle: Sender | Receiver
    opened_ms: float
    ended_ms: float = math.inf
    pages: list[int] = attrs.field(factory=list)
    row: int | None = None
    chunks: int = 0
    granted: bool = False
    grant_asked: bool = False
    phase: int = Phase.BOOTSTRAPPING
    failure: Failure | None = None
    left: int = Phase.BOOTSTRAPPING  # the phase that it ended in
    cancelled: bool = False  # by its number, and must fail
    concluded: bool = False
    giving: bool = False
    returned: bool = False
    source: Attempt | None = None

    @property
    def sends(self) -> bool:
        return isinstance(self.handle, Sender)

    @property
    def succeeded(self) -> bool:
        return self.phase == Phase.SUCCESS

    @property
    def live(self) -> bool:
        return self.handle.poll() not in TERMINAL

    def __str__(self) -> str:
        return f"room {self.handle.room} (generation {self.handle.generation}) of {self.process.name}"

    def label(self, position: int) -> int:
        return self.number * PROMPT_PAGES_MAX + position

    # --- what must be true -----------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Forward only, terminal is absorbing, and the reason is there from the first moment and stays."""
        phase, failure, before = self.handle.poll(), self.handle.failure, self.phase
        if before in TERMINAL and phase != before:
            raise Violation(f"terminal left: {self} was {Phase(before).name} and is {Phase(phase).name}")
        if phase < before and phase != Phase.FAILED:
            raise Violation(f"phase went back: {self} was {Phase(before).name} and is {Phase(phase).name}")
        if (phase == Phase.FAILED) != (failure is not None):
            raise Violation(f"reason and phase differ: {self} is {Phase(phase).name} with failure {failure}")
        if self.failure is not None and failure != self.failure:
            raise Violation(f"reason changed: {self} failed of {self.failure} and now of {failure}")
        if failure is not None and (failure.cause not in CAUSES or not failure.reason):
            raise Violation(f"no reason: {self} failed of {failure}")
        if phase != Phase.FAILED:
            self.left = phase
        self.phase, self.failure = phase, failure

    def check_sent(self) -> None:
        if self.chunks != len(self.serve.chunks):
            raise Violation(f"false success: {self} succeeded with {self.chunks} of {len(self.serve.chunks)} chunks")
        writes = self.process.world.fabric.of_attempt(self)
        for write in writes:
            if not write.placed:
                raise Violation(f"false success: {self} succeeded, but {write} is not placed")
        moved = sum(write.plan.total_bytes for write in writes)
        if self.handle.bytes_moved != moved:
            raise Violation(f"bytes miscounted: {self} says {self.handle.bytes_moved} bytes, {moved} were moved")

    def check_received(self) -> None:
        """Each granted page holds exactly what its sender computed for that place, and the rest is as it was."""
        source, prefix = self.source, self.serve.prefix_pages
        pages = source.serve.pages if source is not None else prefix
        for offset, page in enumerate(self.pages):
            wanted = STALE + self.number
            if source is not None and prefix + offset < pages:
                wanted = source.label(prefix + offset)
            for buffer in self.process.pool.kv:
                if not (buffer[page] == wanted).all():
                    found = [hex(word) for word in buffer[page].tolist()]
                    raise Violation(f"wrong bytes: page {offset} of {self} holds {found}, it must be {wanted:#x}")
        moved = max(0, min(pages, prefix + len(self.pages)) - prefix) * self.process.pool.page_bytes
        if self.row is not None and source is not None:
            moved += ROW_BYTES
            if self.process.pool.aux[self.row][0] != source.label(AUX):
                raise Violation(f"wrong bytes: the aux row of {self} holds {int(self.process.pool.aux[self.row][0]):#x}")
        if self.handle.bytes_moved != moved:
            raise Violation(f"bytes miscounted: {self} says {self.handle.bytes_moved} bytes, {moved} were moved")
        own = self.serve
        unique = self.process.world.options.room_numbers > self.process.world.options.rooms
        if unique and source is None and (own.pages > prefix or own.aux):
            raise Violation(f"false success: {self} succeeded, and nobody wrote to it")
