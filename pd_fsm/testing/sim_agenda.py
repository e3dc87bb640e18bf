"""Virtual time of a simulation: what happens next, when, and the hash of all that happened.

One heap of (time, order, action). Nothing sleeps: the clock jumps to the next action. Everything that happens is noted; the notes'
hash tells two runs apart, and the notes are the story of a run when one is asked for.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from typing import TypeAlias

from pd_fsm.testing.world import Violation

Action: TypeAlias = Callable[[], None]
STEPS_AT_ONE_TIME_MAX = 20_000
"""More actions without a moment passing between them are a livelock."""


class Agenda:
    """Not thread-safe. `now_ms` is the true time; processes have clocks of their own that go by it."""

    def __init__(self, *, story: bool = False) -> None:
        self.now_ms = 0.0
        self.events = 0
        self.story: list[str] | None = [] if story else None
        self._heap: list[tuple[float, int, Action]] = []
        self._order = 0
        self._digest = hashlib.blake2b(digest_size=16)

    def after(self, delay_ms: float, action: Action) -> None:
        self.at(self.now_ms + delay_ms, action)

    def at(self, when_ms: float, action: Action) -> None:
        self._order += 1
        heapq.heappush(self._heap, (max(when_ms, self.now_ms), self._order, action))

    def note(self, text: str) -> None:
        """One event: it goes into the hash, and into the story if there is one."""
        self.events += 1
        line = f"{self.now_ms:10.2f} {text}"
        self._digest.update(line.encode())
        if self.story is not None:
            self.story.append(line)

    def digest(self) -> str:
        return self._digest.hexdigest()

    def run(self, until_ms: float, steps_max: int) -> None:
        """Let everything happen until then. Raises Violation when that takes more than `steps_max` actions, a livelock."""
        steps = at_once = 0
        while self._heap and self._heap[0][0] <= until_ms:
            when_ms, _, action = heapq.heappop(self._heap)
            at_once = at_once + 1 if when_ms <= self.now_ms else 0
            steps += 1
            if steps > steps_max or at_once > STEPS_AT_ONE_TIME_MAX:
                raise Violation(f"livelock: {steps} actions, {at_once} of them at {when_ms:.2f} ms, and it does not come to rest")
            self.now_ms = when_ms
            action()
        self.now_ms = max(self.now_ms, until_ms)
