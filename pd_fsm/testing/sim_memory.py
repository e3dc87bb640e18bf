"""The KV memory of a simulated engine: pages in two regions and aux rows in a third one, with marks in all that is free.

It must never forget whose a page is: what was given back last is taken first, so that a late write meets its next owner at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pd_fsm.kv import KVLayout, paged, rows
from pd_fsm.testing.sim_options import PAGE_TOKENS
from pd_fsm.testing.world import Violation

PAGES, ROWS = 96, 48
WORDS = 2  # uint64 of one page in one region
ROW_BYTES = 8
FREE, STALE = 0xF4EE_0000_0000_0000, 0x57A1_0000_0000_0000


class Pool:
    """The memory of one process. uint64: `kv` two arrays [PAGES, WORDS], `aux` [ROWS, 1]."""

    def __init__(self, words: int = WORDS) -> None:
        self.kv = [np.full((PAGES, words), FREE, np.uint64) for _ in range(2)]
        self.page_bytes = 2 * 8 * words  # over both regions
        self.aux: NDArray[np.uint64] = np.full((ROWS, 1), FREE, np.uint64)
        self.layout = KVLayout([paged("kv", self.kv, PAGE_TOKENS), rows("aux", self.aux)])
        self.views = [region.bytes_view() for region in self.layout.regions]
        self._free_pages = list(range(PAGES))
        self._free_rows = list(range(ROWS))

    def take(self, pages: int, row: bool, where: str) -> tuple[list[int], int | None] | None:
        """(pages, aux row), or None if there are not enough. Raises Violation if somebody wrote to them while they were free."""
        if pages > len(self._free_pages) or (row and not self._free_rows):
            return None
        taken = [self._free_pages.pop() for _ in range(pages)]
        self._check_marks(taken, where)
        return taken, self._free_rows.pop() if row else None

    def _check_marks(self, pages: list[int], where: str) -> None:
        for buffer in self.kv:
            if not (buffer[pages] == FREE).all():
                raise Violation(f"free pages changed: somebody wrote to free pages among {pages} of {where}")

    def give(self, pages: list[int], row: int | None) -> None:
        for buffer in self.kv:
            buffer[pages] = FREE
        self._free_pages += pages
        if row is not None:
            self.aux[row] = FREE
            self._free_rows.append(row)

    def check_idle(self, where: str) -> None:
        """Everything is back, and as it was left."""
        if len(self._free_pages) != PAGES or len(self._free_rows) != ROWS:
            lost = PAGES - len(self._free_pages), ROWS - len(self._free_rows)
            raise Violation(f"pages leaked: {lost[0]} pages and {lost[1]} aux rows of {where} did not come back")
        self._check_marks(self._free_pages, where)
        if not (self.aux == FREE).all():
            raise Violation(f"free pages changed: somebody wrote to free aux rows of {where}")
