"""The simulated data plane: writes that are slow, fail, lie, end twice or never, and land when nobody expects it.

Bytes are read from the source at the moment they land, as a device would. The fabric knows the truth about every write (`over`:
nothing of it can land any more) and holds the sessions to it: what they say about writes must be so, and what they call free must
be out of reach. What is reported to a session is never more than the truth allows (docs/transports.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan
from pd_fsm.testing.sim_agenda import Action
from pd_fsm.testing.sim_schedule import BASE_MS, WriteFate

if TYPE_CHECKING:
    from pd_fsm.testing.sim_attempt import Attempt
    from pd_fsm.testing.sim_process import Process
    from pd_fsm.testing.simulator import Simulation

BREAK_MS = 200  # within which a write to a dead process breaks
RESIDUAL_SHARE = 0.8  # of the declared bound; the rest is for clocks that go fast


@attrs.define(eq=False)
class Write:
    """One operation. `landed` copies of its plan are placed; `over`: no more can be; `reported`: an outcome was given."""

    source: Process
    op: int
    peer: bytes
    generation: int
    part: wire.Part
    plan: Plan
    notice: bytes
    attempt: Attempt
    fate: WriteFate
    copies: list[tuple[int, int, int, int]]
    landed: int = 0
    over: bool = False
    reported: bool = False
    cancelled: bool = False

    def __str__(self) -> str:
        return f"chunk {self.part.chunk} of room {self.part.room} from {self.source.name} (op {self.op})"

    @property
    def placed(self) -> bool:
        return self.landed == len(self.copies)


class Fabric:
    """All writes of a run."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self._agenda = world.agenda
        self._options = world.options
        self._writes: dict[tuple[bytes, int], Write] = {}
        self._of: dict[tuple[bytes, int], list[Write]] = {}  # (reader, its generation)
        self._drained: set[tuple[bytes, bytes, int]] = set()  # (writer, reader, generation)

    # --- what sessions ask for -------------------------------------------------------------------------------------------

    def submit(self, source: Process, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        part = wire.decode(notice)[2]
        assert isinstance(part, wire.Part)
        attempt = source.engine.writing(op)
        target = self._world.process(peer)
        fate = self._world.fates.write(source.node, target.node, part.room)
        rows = zip(*(column.tolist() for column in (plan.region, plan.source, plan.destination, plan.nbytes)), strict=True)
        write = Write(source, op, peer, generation, part, plan, notice, attempt, fate, list(rows))
        if (source.incarnation, peer, generation) in self._drained:
            self._world.breach(f"write after drained: {write} is submitted to {target.name} after its Drained was sent")
        self._writes[source.incarnation, op] = write
        self._of.setdefault((peer, generation), []).append(write)
        target.engine.note_source(generation, attempt)
        self._agenda.note(f"{source.node} writes {write} to {target.node}: {fate.how}")
        self._start(write)
        if target.dead:
            self._agenda.after(BREAK_MS * self._world.fates.one("break", source.node, target.node), self._breaking(write))

    def cancel(self, source: Process, op: int) -> None:
        write = self._writes[source.incarnation, op]
        if write.over or write.reported or write.cancelled:
            return
        write.cancelled = True
        how = self._options.cancels
        if how == "stops":
            self._stop(write, "it was cancelled")
        elif how == "doubts":
            self._report(write, ev.WriteUnknown(op, "it was cancelled, and may go on"))
        if write.fate.how == "hangs":
            self._agenda.after(write.fate.end_ms, lambda: self._finish(write, ev.WriteFailed(op, "it was cancelled")))

    def peer_down(self, source: Process, peer: bytes) -> None:
        """The way to a peer is torn down: what is outstanding there ends, or its end is in doubt."""
        for write in self._outstanding(source):
            if write.peer == peer and not write.reported:
                if self._options.cancels == "stops":
                    self._stop(write, "the peer was given up")
                else:
                    self._report(write, ev.WriteUnknown(write.op, "the peer was given up"))
                    if write.fate.how == "hangs":
                        self._after_settle(write, write.fate.end_ms)

    def writer_died(self, source: Process) -> None:
        """What a dead process had submitted can land for the time that the data plane declares; if it declares none, its end closes
        the way, but what waits at a receiving side that places bytes itself is still there."""
        grace_ms = RESIDUAL_SHARE * self._options.residual_ms
        if self._options.vouches:
            grace_ms = max(grace_ms, BREAK_MS)
        for write in self._outstanding(source):
            self._after_settle(write, grace_ms)

    def reader_died(self, target: Process) -> None:
        for writes in [writes for (peer, _), writes in self._of.items() if peer == target.incarnation]:
            for write in writes:
                if not write.over:
                    delay_ms = BREAK_MS * self._world.fates.one("break", write.source.node, target.node)
                    self._agenda.after(delay_ms, self._breaking(write))

    def heal(self) -> None:
        """Writes that would never end, end."""
        for write in list(self._writes.values()):
            if not write.over and write.fate.how == "hangs":
                self._finish(write, ev.WriteFailed(write.op, "the path was repaired"))

    # --- what is true ----------------------------------------------------------------------------------------------------

    def touching(self, target: Process, generation: int) -> list[Write]:
        """Writes that can still land in the pages of `generation`."""
        if self._options.vouches and generation not in target.exposed:
            return []
        return [write for write in self._of.get((target.incarnation, generation), ()) if not write.over]

    def reading(self, attempt: Attempt) -> list[Write]:
        """Writes that can still read the pages of a sending attempt."""
        return [write for write in self._outstanding(attempt.process) if write.attempt is attempt]

    def of_attempt(self, attempt: Attempt) -> list[Write]:
        return [write for write in self._writes.values() if write.attempt is attempt]

    def check_claim(self, source: Process, peer: bytes, message: wire.Message) -> None:
        """What a session says about its writes must be so."""
        if isinstance(message, wire.Drained):
            self._drained.add((source.incarnation, peer, message.generation))
            for write in self._between(source, peer, message.generation):
                if not write.over:
                    self._world.breach(f"false drained: {source.name} says Drained, but {write} can still land")
        elif isinstance(message, wire.Part) or (isinstance(message, wire.Verdict) and message.success):
            for write in self._between(source, peer, message.generation):
                said = isinstance(message, wire.Verdict) or message.chunk == write.part.chunk
                if said and not write.placed:
                    self._world.breach(
                        f"false confirmation: {source.name} says {type(message).__name__}, but {write} is not placed"
                    )
        elif isinstance(message, wire.Goodbye) and message.drained:
            for write in self._outstanding(source):
                self._world.breach(f"false goodbye: {source.name} says that it has drained, but {write} can still land")

    def _between(self, source: Process, peer: bytes, generation: int) -> Iterable[Write]:
        return [write for write in self._of.get((peer, generation), ()) if write.source is source]

    def _outstanding(self, source: Process) -> list[Write]:
        return [write for write in self._writes.values() if write.source is source and not write.over]

    # --- the course of a write -------------------------------------------------------------------------------------------

    def _start(self, write: Write) -> None:
        op, fate = write.op, write.fate

        def after(delay_ms: float, action: Action) -> None:
            self._agenda.after(self._options.write_ms + delay_ms, action)

        done = ev.WriteDone(op, write.plan.total_bytes, self._options.notifies)
        if fate.early:
            after(fate.land_ms / 2, lambda: self._place(write, int(fate.early * len(write.copies)), lambda: None))
        if fate.how in ("failed", "part_failed"):
            if fate.how == "part_failed":
                after(fate.land_ms, lambda: self._place(write, len(write.copies) // 2, lambda: None))
            after(fate.end_ms, lambda: self._finish(write, ev.WriteFailed(op, "no route")))
        elif fate.how.startswith("unknown"):
            after(fate.end_ms, lambda: self._report(write, ev.WriteUnknown(op, "timed out")))
            if fate.how == "unknown_never":
                self._after_settle(write, self._options.write_ms + fate.land_ms)
            else:
                after(fate.land_ms, lambda: self._place(write, len(write.copies), lambda: self._finish(write, done)))
        elif fate.how != "hangs":
            rest_ms = max(fate.end_ms - fate.land_ms, 0.0)

            def placed() -> None:
                write.over = True
                self._notify(write)
                self._agenda.after(rest_ms, lambda: self._finish(write, done))

            after(fate.land_ms, lambda: self._place(write, len(write.copies), placed))

    def _place(self, write: Write, upto: int, then: Action) -> None:
        """The copies up to `upto` land now, or when the way is open."""
        target = self._world.process(write.peer)
        if write.over or target.dead:
            return  # `reader_died` says how it ends
        open_at_ms = self._world.network.cut_until(write.source.address, target.address)
        if open_at_ms > self._agenda.now_ms:
            self._agenda.at(open_at_ms + BASE_MS, lambda: self._place(write, upto, then))
        elif target.frozen and self._options.vouches:  # its own hand places the bytes
            target.do(lambda: self._place(write, upto, then))
        else:
            try:
                self._land(write, target, upto)
            except WireError as error:
                self._finish(write, ev.WriteFailed(write.op, f"refused by the receiver: {error}"))
                return
            then()

    def _land(self, write: Write, target: Process, upto: int) -> None:
        """Copy bytes. Raises WireError where the receiving side refuses, Violation where nobody does and somebody should."""
        plan = write.plan
        if self._options.vouches:
            target.landing.check(write.source.incarnation, write.generation, plan.region, plan.destination, plan.nbytes)
        for region, begin, at, nbytes in write.copies[write.landed : upto]:
            target.engine.check_landing(write, region, at, nbytes)
            write.source.engine.check_reading(write)
            target.pool.views[region][at : at + nbytes] = write.source.pool.views[region][begin : begin + nbytes]
        if upto > write.landed:
            self._agenda.note(f"{upto - write.landed} copies of {write} land at {target.node}")
        write.landed = max(write.landed, upto)

    def _notify(self, write: Write) -> None:
        if self._options.notifies:
            target = self._world.process(write.peer)
            target.deliver(write.notice, write.source.incarnation)
            if write.fate.how == "twice":
                target.deliver(write.notice, write.source.incarnation)

    def _finish(self, write: Write, outcome: ev.WriteDone | ev.WriteFailed) -> None:
        """Nothing more of it can land, and its session learns so."""
        if write.over and not isinstance(outcome, ev.WriteDone):
            return
        write.over = True
        if write.reported and not (write.fate.how == "unknown_done" and isinstance(outcome, ev.WriteDone)):
            self._say(write, ev.WriteSettled(write.op))
            return
        if write.reported and self._options.notifies:
            self._notify(write)
        self._report(write, outcome)
        if write.fate.how == "twice":
            self._agenda.after(write.fate.end_ms, lambda: self._say(write, outcome))
        elif write.fate.how == "late_error":
            self._agenda.after(write.fate.end_ms, lambda: self._say(write, ev.WriteUnknown(write.op, "timed out, it seemed")))

    def _stop(self, write: Write, why: str) -> None:
        write.over = True
        self._agenda.after(BASE_MS, lambda: self._report(write, ev.WriteFailed(write.op, why)))

    def _breaking(self, write: Write) -> Action:
        return lambda: self._finish(write, ev.WriteFailed(write.op, "the connection was reset"))

    def _after_settle(self, write: Write, delay_ms: float) -> None:
        def settle() -> None:
            if not write.over:
                write.over = True
                if write.reported:
                    self._say(write, ev.WriteSettled(write.op))
                else:
                    self._report(write, ev.WriteFailed(write.op, "it came to nothing"))

        self._agenda.after(delay_ms, settle)

    def _report(self, write: Write, outcome: ev.WriteDone | ev.WriteFailed | ev.WriteUnknown) -> None:
        if isinstance(outcome, ev.WriteUnknown) and (write.over or write.reported):
            return
        write.reported = True
        self._say(write, outcome)

    def _say(self, write: Write, event: ev.Event) -> None:
        self._agenda.note(f"{write.source.node} hears {type(event).__name__} of {write}")
        write.source.emit(event)
