"""The paged KV cache of one worker and the pools that hand out its pages and aux rows.

This module owns memory. It must never decide when memory is free: the schedulers give it back, once pd-fsm says that nobody else
can touch it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

import pd_fsm

PAGE_TOKENS = 16
AUX = struct.Struct("<QIIf")  # room, prompt tokens, first token, its logit: what decode needs besides the KV cache


def pages_for(tokens: int) -> int:
    """How many pages hold `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


class Pool:
    """A free list of the integers 0..total-1: page indices, or aux rows."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = total
        self._free = list(range(total))
        self._taken: set[int] = set()

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= self.free, f"{count} {self.what} asked of {self.free} free ones: look at .free before"
        taken = [self._free.pop() for _ in range(count)]
        self._taken.update(taken)
        return taken

    def give_back(self, items: Sequence[int]) -> None:
        for item in items:
            assert item in self._taken, f"{self.what} {item} is given back, but it is not taken: a double free"
            self._taken.remove(item)
            self._free.append(item)


class PagedKVCache:
    """K and V of every layer as [pages, PAGE_TOKENS, kv_heads, head_dim], and one aux row a request.

    A sequence's page table is a list of page indices; token t lives in page `table[t // PAGE_TOKENS]`.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, num_pages: int, num_rows: int) -> None:
        shape = (num_pages, PAGE_TOKENS, kv_heads, head_dim)
        self.keys = [torch.full(shape, torch.nan) for _ in range(layers)]
        self.values = [torch.full(shape, torch.nan) for _ in range(layers)]
        self.aux = torch.zeros((num_rows, AUX.size), dtype=torch.uint8)
        self.pages = Pool("page", num_pages)
        self.rows = Pool("aux row", num_rows)

    def layout(self) -> pd_fsm.KVLayout:
        """This memory as pd-fsm sees it: pages that move chunk by chunk, and a row that moves with the last chunk."""
        pages = [tensor for layer in zip(self.keys, self.values, strict=True) for tensor in layer]
        return pd_fsm.KVLayout([pd_fsm.paged("kv", pages, page_size=PAGE_TOKENS), pd_fsm.rows("aux", self.aux)])

    def write(self, layer: int, table: Sequence[int], start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store K and V ([tokens, kv_heads, head_dim]) of the tokens from position `start` on."""
        positions = range(start, start + len(keys))
        slots = torch.tensor([table[t // PAGE_TOKENS] * PAGE_TOKENS + t % PAGE_TOKENS for t in positions])
        self.keys[layer].flatten(0, 1)[slots] = keys
        self.values[layer].flatten(0, 1)[slots] = values

    def read(self, layer: int, table: Sequence[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the first `tokens` tokens, gathered into one piece of memory each: [tokens, kv_heads, head_dim]."""
        pages = torch.tensor(table[: pages_for(tokens)])
        return self.keys[layer][pages].flatten(0, 1)[:tokens], self.values[layer][pages].flatten(0, 1)[:tokens]

    def write_aux(self, row: int, room: int, prompt_tokens: int, token: int, logit: float) -> None:
        self.aux[row] = torch.frombuffer(bytearray(AUX.pack(room, prompt_tokens, token, logit)), dtype=torch.uint8)

    def read_aux(self, row: int) -> tuple[int, int, int, float]:
        """(room, prompt tokens, first token, its logit) as the prefill side wrote them."""
        room, prompt_tokens, token, logit = AUX.unpack(bytes(self.aux[row].tolist()))
        return room, prompt_tokens, token, logit

    def free(self, pages: Sequence[int], row: int | None) -> None:
        """Give memory back. It is overwritten first, so that whoever still used it would get other tokens, not good luck."""
        if pages:
            index = torch.tensor(pages)
            for tensor in (*self.keys, *self.values):
                tensor[index] = torch.nan
        self.pages.give_back(pages)
        if row is not None:
            self.aux[row] = 0
            self.rows.give_back([row])
