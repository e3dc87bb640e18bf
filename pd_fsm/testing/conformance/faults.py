"""Faults between a session and the transport under test: frames that are lost, doubled, late and out of order; outcomes that are
late, doubled, contradicted or unknown at first.

`Faulty` is a factory around the factory under test. What it does to frames is what a network may do. Of outcomes it first passes on
the truth, later, or as an unknown one that is settled later; on top it repeats and contradicts what is over, which a session must
ignore. It never says that something is over before the transport did.
"""

from __future__ import annotations

import heapq
import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import attrs

from pd_fsm.core import events as ev
from pd_fsm.runtime.transport import ControlPlane, Factory, Host, Transport, make_transport

OUTCOMES = (ev.WriteDone, ev.WriteFailed)
GENERATIONS_OF_OPS = 1 << 40  # an operation that no session ever submits


@attrs.frozen(kw_only=True)
class Faults:
    """How often each happens, 0 to 1, and how late what is late comes."""

    lose: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    """Of frames. What is delayed is overtaken by others."""
    late_outcome: float = 0.0
    unknown_outcome: float = 0.0
    """A Done or Failed is told as Unknown, then Settled."""
    echo_outcome: float = 0.0
    """What is over is told again, as it was or otherwise, and so is what never was."""
    late_ms: float = 15.0


class Later:
    """Actions that are due later; run by whoever drives. `put` may be called from any thread."""

    def __init__(self, host: Host) -> None:
        self._clock_ms = host.clock_ms
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False
        host.reactor.add_check(self._run)

    def put(self, delay_ms: float, action: Callable[[], None]) -> None:
        with self._lock:
            heapq.heappush(self._heap, (self._clock_ms() + delay_ms, next(self._numbers), action))

    def _run(self) -> bool:
        while not self._closed:
            with self._lock:
                if not self._heap or self._heap[0][0] > self._clock_ms():
                    break
                action = heapq.heappop(self._heap)[2]
            action()
        return self._closed

    def close(self) -> None:
        self._closed = True


class FaultyControl:
    """A control plane that harms what is sent."""

    def __init__(self, plane: ControlPlane, later: Later, faults: Faulty) -> None:
        self.endpoint = plane.endpoint
        self.connect = plane.connect
        self.disconnect = plane.disconnect
        self._plane = plane
        self._later = later
        self._faults = faults

    def send(self, peer: bytes, frame: bytes) -> None:
        faults = self._faults
        if faults.happens("lose"):
            return
        for _ in range(2 if faults.happens("duplicate") else 1):
            if faults.happens("delay"):
                self._later.put(faults.late_ms(), lambda: self._plane.send(peer, frame))
            else:
                self._plane.send(peer, frame)


class Faulty:
    """A factory of the transport `named`, with faults. `heal` ends them, for all sessions that were made by it."""

    def __init__(self, named: str | Factory, faults: Faults, seed: str) -> None:
        self._named = named
        self._faults: Faults = faults
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self.injected = 0

    def heal(self) -> None:
        self._faults = Faults()

    def happens(self, what: str) -> bool:
        chance: float = getattr(self._faults, what)
        if not chance:
            return False
        with self._lock:
            happens = self._dice.random() < chance
            self.injected += happens
        return happens

    def late_ms(self) -> float:
        with self._lock:
            return self._dice.uniform(0, self._faults.late_ms)

    def __call__(self, host: Host, **options: Any) -> Transport:
        later = Later(host)

        def emit(event: ev.Event) -> None:
            if isinstance(event, OUTCOMES):
                self._outcome(event, host, later)
            else:
                host.emit(event)

        def deliver(frame: bytes, via: bytes) -> None:
            host.deliver(frame, via)
            if self.happens("duplicate"):
                later.put(self.late_ms(), lambda: host.deliver(frame, via))

        made = make_transport(self._named, attrs.evolve(host, emit=emit, deliver=deliver), options)

        def close(linger_ms: int) -> None:
            later.close()
            made.close(linger_ms)

        return attrs.evolve(made, control=FaultyControl(made.control, later, self), close=close)

    def _outcome(self, event: ev.WriteDone | ev.WriteFailed, host: Host, later: Later) -> None:
        if self.happens("unknown_outcome"):
            host.emit(ev.WriteUnknown(event.op, "as injected"))
            later.put(self.late_ms(), lambda: host.emit(ev.WriteSettled(event.op)))
        elif self.happens("late_outcome"):
            later.put(self.late_ms(), lambda: host.emit(event))
        else:
            host.emit(event)
        if self.happens("echo_outcome"):
            echoes: list[ev.Event] = [
                event,
                ev.WriteDone(event.op, 1),
                ev.WriteFailed(event.op, "an echo"),
                ev.WriteUnknown(event.op, "an echo"),
                ev.WriteSettled(event.op),
                ev.WriteFailed(GENERATIONS_OF_OPS, "never submitted"),
            ]
            with self._lock:
                chosen = self._dice.choice(echoes)
            later.put(2 * self._faults.late_ms + 1, lambda: host.emit(chosen))  # after whatever was told of it
