"""The poll board: every open room's phase in one byte, so that polling is one read and a pass over thousands is one gather.

Written by the session under its lock, read by the engine without one: a byte is never torn. The first five slots hold the phases
themselves for good; a cleared handle points at the slot of its last phase, so it cannot read the next owner of its old one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pd_fsm.machines import Phase

CONSTANT_SLOTS = len(Phase)


class PollBoard:
    """One int8 for each open room. `phases[slot]` is a plain read from any thread; the other methods need the session's lock."""

    def __init__(self, rooms_max: int) -> None:
        self.phases = bytearray(CONSTANT_SLOTS + rooms_max)
        self.phases[:CONSTANT_SLOTS] = bytes(Phase)
        self.array: NDArray[np.int8] = np.frombuffer(self.phases, dtype=np.int8)
        """The same memory as numpy int8 [slots]."""
        self._free: list[int] = []
        self._fresh = CONSTANT_SLOTS
        self._slots: dict[int, int] = {}

    def publish(self, generation: int, phase: int) -> None:
        slot = self._slots.get(generation)
        if slot is None:
            slot = self._slots[generation] = self._free.pop() if self._free else self._next_fresh()
        self.phases[slot] = phase

    def slot(self, generation: int) -> int:
        return self._slots[generation]

    def remove(self, generation: int) -> None:
        self._free.append(self._slots.pop(generation))

    def _next_fresh(self) -> int:
        assert self._fresh < len(self.phases), "the core admits no more than rooms_max rooms"
        self._fresh += 1
        return self._fresh - 1
