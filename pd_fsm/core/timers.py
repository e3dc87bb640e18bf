"""Deadlines and repetitions as data. Never reads a clock: time comes in as an argument, in milliseconds.

A timer is (when, key); cancelling is lazy. A deadline that moves later is not pushed again until its old entry fires, so an
often renewed deadline costs one heap entry, not one a renewal.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TypeAlias

import attrs

from pd_fsm.core.wire import Message

Key: TypeAlias = tuple[str, bytes, int]
"""What is repeated: (message kind, peer, generation), or (table, b"", number)."""


@attrs.define(eq=False)
class Repeat:
    """A message, or a lookup when `message` is None, that is sent again until it is answered."""

    peer: bytes
    message: Message | None
    due_ms: float
    backoff_ms: float


class Timers:
    """A heap of deadlines. Not thread-safe: the session's lock guards it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._sequence = 0
        self.repeats: dict[Key, Repeat] = {}

    def arm(self, when_ms: float, key: Key) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when_ms, self._sequence, key))

    def next_ms(self) -> float | None:
        return self._heap[0][0] if self._heap else None

    def due(self, now_ms: float) -> Iterator[Key]:
        """Take every timer that is due, including those armed for now by the consumer."""
        heap = self._heap
        while heap and heap[0][0] <= now_ms:
            yield heapq.heappop(heap)[2]
