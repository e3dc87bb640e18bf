"""Bare planes: transports on hosts without a session, whose every event and every byte is judged.

A `Side` is a host with memory full of noise and a mirror of what that memory should hold. The `Rig` submits writes and judges each
outcome at the moment it is emitted, on whatever thread: Done means that the bytes are there now; after Done, Failed or Settled both
ends of the write get new noise at once, as an engine's next request would bring, so a byte that is read or lands later is seen.
`finish` compares all memory. Nothing here knows what is inside a transport.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.wire import pack_pages
from pd_fsm.kv import Plan, make_plan
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.testing.conformance.target import Target

PAGES = 64
PAGE_BYTES = (96, 24)
PATIENCE_S = 10.0
CALL_S_MAX = 2.0
"""A call that takes longer has waited for something. Far above what any call should take, so that a busy machine does not count."""
CLOSE_S_MAX = 10.0
"""What closing may take on top of its linger: libraries may end their threads."""
AFTERMATH_S = 0.1
"""How long memory is watched after the last outcome, for bytes that land too late."""


@attrs.define(eq=False)
class Write:
    """One submitted operation: pages `sources` of the sender to `targets` of the receiver."""

    op: int
    sender: Side
    receiver: Side
    generation: int
    sources: NDArray[np.intp]
    targets: NDArray[np.intp]
    nbytes: int
    notice: bytes
    granted: bool
    """Whether it may write there at all."""
    outcome: str = "outstanding"
    """Or "unknown", "done", "failed", "settled"."""
    abandoned: bool = False
    """Its receiver was promised that nothing lands any more, and gave its pages on."""
    placed_in_time: bool = False
    """It was placed before that."""

    @property
    def over(self) -> bool:
        """Whether it has its final outcome."""
        return self.outcome in ("done", "failed", "settled")

    @property
    def answered(self) -> bool:
        """Whether it has an outcome, an unknown one included."""
        return self.outcome != "outstanding"


@attrs.define(eq=False)
class Side:
    """A host, the transport on it, its memory, and what the transport said."""

    role: str
    name: str
    host: Host
    buffers: list[NDArray[np.uint8]]
    """Region by region [pages, bytes]."""
    expected: list[NDArray[np.uint8]]
    transport: Transport = attrs.field(init=False)
    events: list[ev.Event] = attrs.field(factory=list)
    frames: list[tuple[bytes, bytes]] = attrs.field(factory=list)
    closed: bool = False

    @property
    def incarnation(self) -> bytes:
        return self.host.incarnation

    def of(self, kind: type) -> list[Any]:
        """The events of one type."""
        return [event for event in list(self.events) if isinstance(event, kind)]

    def fill(self, pages: NDArray[np.intp], noise: np.random.Generator) -> None:
        """These pages belong to somebody else now."""
        for buffer, mirror in zip(self.buffers, self.expected, strict=True):
            mirror[pages] = noise.integers(0, 256, (len(pages), buffer.shape[1]), dtype=np.uint8)
            buffer[pages] = mirror[pages]


class Rig:
    """Sides that can meet, driven by the test. `problems` may be added to by any thread."""

    def __init__(self, target: Target, directory: Path, vouches: bool) -> None:
        self.target = target
        self.vouches = vouches
        self.directory = directory
        self.sides: list[Side] = []
        self.writes: list[Write] = []
        self.problems: list[str] = []
        self.watch_dead = True
        """Whether a proof of death for a side that lives is a problem."""
        self._to_revoke: list[Write] = []
        self._by_op: dict[tuple[bytes, int], Write] = {}
        self._lock = threading.Lock()
        self._noise = np.random.default_rng(7)
        self._generation = 0

    # --- sides -----------------------------------------------------------------------------------------------------------

    def side(
        self,
        role: str,
        *,
        pages: int = PAGES,
        page_bytes: Sequence[int] = PAGE_BYTES,
        limits: pd_fsm.Limits | None = None,
        port: int = 0,
    ) -> Side:
        """A host of its own, with the transport under test on it."""
        buffers = [self._noise.integers(0, 256, (pages, nbytes), dtype=np.uint8) for nbytes in page_bytes]
        layout = pd_fsm.KVLayout([pd_fsm.paged("kv", buffers, 1)])
        incarnation = secrets.token_bytes(16)
        name = f"{role}-{sum(side.role == role for side in self.sides)}"
        made: list[Side] = []
        host = Host(
            incarnation,
            role,
            name,
            "127.0.0.1",
            layout,
            limits or pd_fsm.Limits(),
            Reactor(),
            emit=lambda event: self._emitted(made[0], event),
            deliver=lambda frame, via: made[0].frames.append((frame, via)),
        )
        made.append(Side(role, name, host, buffers, [buffer.copy() for buffer in buffers]))
        made[0].transport = self.target.make(host, self.directory, port)
        self.sides.append(made[0])
        return made[0]

    def pair(self, **settings: Any) -> tuple[Side, Side]:
        """A prefill and a decode side that have met."""
        prefill, decode = self.side("prefill", **settings), self.side("decode", **settings)
        self.meet(prefill, decode)
        return prefill, decode

    def meet(self, prefill: Side, decode: Side) -> None:
        """What a handshake does: a message each way, then both data planes learn of each other."""
        self.call(decode, "connect", prefill.incarnation, prefill.transport.control.endpoint)
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            self.say_until_heard(speaker, hearer, wire.Ping())
        self.call(prefill, "peer_up", decode.incarnation, decode.transport.data.descriptor)
        self.call(decode, "peer_up", prefill.incarnation, prefill.transport.data.descriptor)

    def close(self) -> None:
        """Close what is open. For the end of a test, whatever became of it."""
        for side in self.sides:
            if not side.closed:
                self.end(side)
            side.host.reactor.close()

    def end(self, side: Side, linger_ms: int = 100) -> None:
        """Close one transport. Its memory is watched further."""
        began = time.monotonic()
        side.closed = True
        side.transport.close(linger_ms)
        took = time.monotonic() - began
        if took > linger_ms / 1e3 + CLOSE_S_MAX:
            self.problems.append(f"close({linger_ms}) of {side.name} took {took:.1f} s")

    # --- calls -----------------------------------------------------------------------------------------------------------

    def call(self, side: Side, method: str, *arguments: Any) -> Any:
        """A method of a plane, timed: none may block."""
        plane = side.transport.control if method in ("connect", "send", "disconnect") else side.transport.data
        began = time.monotonic()
        result = getattr(plane, method)(*arguments)
        took = time.monotonic() - began
        if took > CALL_S_MAX:
            self.problems.append(f"{method}() of {side.name} took {took:.1f} s: it blocks whoever drives the session")
        return result

    def say(self, speaker: Side, hearer: Side, message: wire.Message) -> bytes:
        """Send one message; its frame."""
        frame = wire.encode(speaker.incarnation, hearer.incarnation, message)
        self.call(speaker, "send", hearer.incarnation, frame)
        return frame

    def say_until_heard(self, speaker: Side, hearer: Side, message: wire.Message) -> None:
        """As the session does it: repeat a message until it is there."""
        frame = wire.encode(speaker.incarnation, hearer.incarnation, message)
        repeat_at = 0.0

        def heard() -> bool:
            nonlocal repeat_at
            if time.monotonic() > repeat_at:
                repeat_at = time.monotonic() + 0.1
                self.call(speaker, "send", hearer.incarnation, frame)
            return any(each == frame for each, _ in hearer.frames)

        self.until(heard, f"{hearer.name} heard {type(message).__name__} of {speaker.name}, which was repeated")

    def grant(self, receiver: Side, targets: Sequence[int], *writers: Side) -> int:
        """Expose pages to writers; the generation."""
        self._generation += 1
        pages = {"kv": pack_pages(targets)}
        self.call(receiver, "expose", ev.Expose(self._generation, pages, -1, tuple(writer.incarnation for writer in writers)))
        return self._generation

    def write(
        self,
        sender: Side,
        receiver: Side,
        sources: Sequence[int],
        targets: Sequence[int],
        *,
        generation: int | None = None,
        granted: bool = True,
        plan: Plan | None = None,
    ) -> Write:
        """Grant pages, unless a generation is given, and submit a write to them. `granted` False: it must not come through."""
        if generation is None:
            generation = self.grant(receiver, targets, sender)
        copies = (("kv", pack_pages(sources), pack_pages(targets)),)
        plan = plan or make_plan(sender.host.layout, copies, None)
        op = len(self.writes) + 1
        notice = wire.encode(sender.incarnation, receiver.incarnation, wire.Part(op, generation, 0, 1, False, plan.total_bytes))
        from_pages, to_pages = np.array(sources, dtype=np.intp), np.array(targets, dtype=np.intp)
        write = Write(op, sender, receiver, generation, from_pages, to_pages, plan.total_bytes, notice, granted)
        self.writes.append(write)
        self._by_op[sender.incarnation, op] = write
        self.call(sender, "submit", op, receiver.incarnation, generation, plan, notice)
        return write

    # --- driving ---------------------------------------------------------------------------------------------------------

    def drive(self, *sides: Side) -> bool:
        """One round of these sides, or of all that are open."""
        self._revoke_failed()
        worked = [side.host.reactor.dispatch() for side in sides or self.sides if not side.closed]
        return any(worked)

    def until(self, done: Callable[[], bool], what: str, *sides: Side) -> None:
        """Drive these sides, or all, until `done()`. Fails after PATIENCE_S."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s until {what}; problems so far: {self.problems}"
            if not self.drive(*sides):
                time.sleep(0.0005)

    def run(self, seconds: float, *sides: Side) -> None:
        """Drive these sides, or all, for a while."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not self.drive(*sides):
                time.sleep(0.0005)

    def until_answered(self, *writes: Write) -> None:
        """Each of these, or of all writes, has an outcome."""
        chosen = writes or tuple(self.writes)
        missing = partial(lambda: [write.op for write in chosen if not write.answered])
        try:
            self.until(lambda: not missing(), "every operation has an outcome")
        except AssertionError as error:
            raise AssertionError(f"operations {missing()} have no outcome after {PATIENCE_S:g} s") from error

    # --- judging ---------------------------------------------------------------------------------------------------------

    def _emitted(self, side: Side, event: ev.Event) -> None:
        side.events.append(event)
        if isinstance(event, ev.WriteDone | ev.WriteFailed | ev.WriteUnknown | ev.WriteSettled):
            with self._lock:
                self._outcome(side, event)
        elif isinstance(event, ev.PeerUnreachable) and event.dead and self.watch_dead:
            alive = [other.name for other in self.sides if other.incarnation == event.peer and not other.closed]
            if alive:
                self.problems.append(f"{side.name} was told that {alive[0]} is dead, which lives: {event.reason}")

    def _outcome(self, side: Side, event: ev.WriteDone | ev.WriteFailed | ev.WriteUnknown | ev.WriteSettled) -> None:
        write = self._by_op.get((side.incarnation, event.op))
        told = type(event).__name__
        if write is None:
            self.problems.append(f"{told} of operation {event.op}, which was never submitted")
            return
        state = {"WriteDone": "done", "WriteFailed": "failed", "WriteUnknown": "unknown", "WriteSettled": "settled"}[told]
        if write.over or (write.outcome == "unknown") != (state == "settled"):
            self.problems.append(f"operation {write.op} is {write.outcome}, and {told} came")
            return
        if write.sender.closed:  # its memory is the test's
            write.outcome = state
            return
        if isinstance(event, ev.WriteDone):
            self._judge_done(write, event)
        write.outcome = state
        if state != "unknown":
            write.sender.fill(write.sources, self._noise)
            if state == "done" or not self.vouches:
                self._give_on(write)
            else:
                self._to_revoke.append(write)

    def _give_on(self, write: Write) -> None:
        if write.granted and not write.abandoned:
            write.abandoned = True
            write.receiver.fill(write.targets, self._noise)

    def _revoke_failed(self) -> None:
        """Where the reading side vouches, what failed may still be on its way until that side revokes, as a session then does."""
        while self._to_revoke:
            write = self._to_revoke.pop()
            if not write.receiver.closed and not write.abandoned and write.granted:
                self.call(write.receiver, "revoke", write.generation)
            with self._lock:
                self._give_on(write)

    def _judge_done(self, write: Write, event: ev.WriteDone) -> None:
        where = f"operation {write.op} is reported done"
        if not write.granted:
            self.problems.append(f"{where}, and nobody had granted it these pages")
        elif write.abandoned:
            if not write.placed_in_time:
                self.problems.append(f"{where}, and its bytes were not there when its grant ended")
        elif not placed(write):
            self.problems.append(f"{where}, and not all of its bytes are there")
        if event.nbytes != write.nbytes:
            self.problems.append(f"{where} with {event.nbytes} bytes; it has {write.nbytes}")
        if event.notified and all(frame != write.notice for frame, _ in write.receiver.frames):
            self.problems.append(f"{where} and notified, and its notice has not been handed over")

    def abandon(self, receiver: Side) -> None:
        """From this moment nothing may land in the memory of `receiver`: the engine's next request gets what was granted."""
        with self._lock:
            for write in self.writes:
                if write.receiver is receiver and not write.over and write.granted:
                    write.abandoned, write.placed_in_time = True, placed(write)
                    receiver.fill(write.targets, self._noise)

    def finish(self) -> None:
        """Watch a little longer, then compare all memory with its mirror. Fails for whatever was found in the whole test."""
        self.run(AFTERMATH_S)
        with self._lock:
            assert not self.problems, "; ".join(self.problems)
            for side in self.sides:
                on_their_way = [w for w in self.writes if w.granted and not w.abandoned]
                open_pages = [write.targets for write in on_their_way if write.receiver is side]
                for number, (buffer, mirror) in enumerate(zip(side.buffers, side.expected, strict=True)):
                    wrong = set(np.flatnonzero((buffer != mirror).any(axis=1)).tolist())
                    wrong -= {page for pages in open_pages for page in pages.tolist()}
                    assert not wrong, (
                        f"pages {sorted(wrong)[:8]} of region {number} of {side.name} changed, and nothing may touch them"
                        f"{self._history(side, wrong)}"
                    )

    def _history(self, side: Side, pages: set[int]) -> str:
        """Which operations had these pages."""
        told = [f"operation {w.op} ({w.outcome})" for w in self.writes if w.receiver is side and pages & set(w.targets.tolist())]
        return f"; they had been written to by {', '.join(told[:4])}" if told else "; no operation had them"


def placed(write: Write) -> bool:
    """Whether all bytes of a write are there."""
    mine, theirs = write.sender.expected, write.receiver.buffers
    return all(bool((theirs[n][write.targets] == mine[n][write.sources]).all()) for n in range(len(mine)))
