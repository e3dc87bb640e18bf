"""A decoder-only transformer over the paged KV cache: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU.

Its weights are random but drawn from a seed, so that every process that names the seed has the same model. This module owns the
arithmetic. It must never know about requests, rooms or workers.

Tokens must be bit-identical however a request was served: alone in one process, or prefilled by one worker and decoded by another
in a batch that changes with every step. A matrix product rounds differently for another number of rows (the library picks another
kernel), which is enough to flip an argmax. So `forward` computes one sequence at a time, over K and V gathered in the order of the
tokens, and every prompt is cut into the same chunks: each product has the same shape and the same operands everywhere, whatever
else the worker serves and whichever pages the sequence got. A large engine would use batch-invariant kernels instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch.nn.functional import silu

from pd_fsm.examples.engine.kv_cache import PagedKVCache
from pd_fsm.examples.engine.tokens import VOCABULARY_SIZE

# Tokens of a prompt that are computed at once: a multiple of the page size, so that every chunk but the last fills its pages.
CHUNK_TOKENS = 64


def chunks(tokens: int) -> list[tuple[int, int]]:
    """The ranges [start, end) that a prompt of `tokens` tokens is computed in; part of the model's definition (see above)."""
    return [(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]


@attrs.frozen
class ModelConfig:
    layers: int = 8
    d_model: int = 256
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32
    d_hidden: int = 640
    rope_base: float = 10_000.0
    seed: int = 0


@attrs.frozen(eq=False)
class Layer:
    """Weights as [in, out], so that a layer is `x @ weight`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Model:
    """Not thread-safe by itself, but stateless: all state of a sequence is in the cache and its page table."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        self.config = config = config or ModelConfig()
        generator = torch.Generator().manual_seed(config.seed)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return torch.randn((rows, columns), generator=generator) / math.sqrt(rows)

        queries, keys = config.query_heads * config.head_dim, config.kv_heads * config.head_dim
        self.embedding = torch.randn((VOCABULARY_SIZE, config.d_model), generator=generator)
        self.layers = [
            Layer(
                query=2
                * weight(config.d_model, queries),  # twice the usual scale: random attention is too even to show a wrong page
                key=2 * weight(config.d_model, keys),
                value=weight(config.d_model, keys),
                output=weight(queries, config.d_model),
                gate=weight(config.d_model, config.d_hidden),
                up=weight(config.d_model, config.d_hidden),
                down=weight(config.d_hidden, config.d_model),
            )
            for _ in range(config.layers)
        ]
        self.unembedding = weight(config.d_model, VOCABULARY_SIZE)
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        self.frequencies = config.rope_base**-exponents

    def new_cache(self, num_pages: int, num_rows: int) -> PagedKVCache:
        return PagedKVCache(self.config.layers, self.config.kv_heads, self.config.head_dim, num_pages, num_rows)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], start: int, cache: PagedKVCache, table: Sequence[int]) -> torch.Tensor:
        """Compute `tokens`, which stand at positions `start`, `start + 1`, ... of one sequence, and return the last one's logits.

        K and V of the tokens before `start` must be in the cache; those of `tokens` are added to it. A chunk of a prompt and a
        single decoded token are the same call. `table` may hold more pages than are needed yet.
        """
        positions = torch.arange(start, start + len(tokens))
        x = self.embedding[torch.tensor(tokens)]
        for index, layer in enumerate(self.layers):
            x = x + self._attention(index, layer, rms_norm(x), positions, cache, table)
            x = x + self._mlp(layer, rms_norm(x))
        logits: torch.Tensor = rms_norm(x[-1:]) @ self.unembedding
        return logits[0]

    def _attention(
        self, index: int, layer: Layer, x: torch.Tensor, positions: torch.Tensor, cache: PagedKVCache, table: Sequence[int]
    ) -> torch.Tensor:
        c, count = self.config, len(positions)
        start, total = int(positions[0]), int(positions[0]) + count
        query = rotate((x @ layer.query).view(count, c.query_heads, c.head_dim), positions, self.frequencies)
        key = rotate((x @ layer.key).view(count, c.kv_heads, c.head_dim), positions, self.frequencies)
        cache.write(index, table, start, key, (x @ layer.value).view(count, c.kv_heads, c.head_dim))
        keys, values = cache.read(index, table, total)
        # Each KV head serves a group of neighbouring query heads: [kv_heads, group, tokens, head_dim].
        query = query.view(count, c.kv_heads, -1, c.head_dim).permute(1, 2, 0, 3)
        scores = query @ keys.permute(1, 2, 0).unsqueeze(1) / math.sqrt(c.head_dim)
        future = torch.arange(total) > positions.unsqueeze(1)  # within a chunk a token sees itself and what is before it
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        mixed = weights @ values.permute(1, 0, 2).unsqueeze(1)
        return mixed.permute(2, 0, 1, 3).reshape(count, -1) @ layer.output

    @staticmethod
    def _mlp(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        return (silu(x @ layer.gate) * (x @ layer.up)) @ layer.down


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square normalisation without a learned gain: random weights would make it a constant."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [tokens, heads, head_dim]: the pair (i, i + head_dim / 2) turns by position * frequency."""
    angles = (positions.unsqueeze(1) * frequencies).unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def greedy(logits: torch.Tensor) -> tuple[int, float]:
    """The most likely token and its logit."""
    token = int(logits.argmax())
    return token, float(logits[token])
