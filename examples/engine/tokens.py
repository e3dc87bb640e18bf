"""Byte-level tokens and prompts cut from the text that ships with the example.

This module owns the vocabulary. It must never depend on the model: any other byte-level model could use it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from importlib import resources

BOS = 256
EOS = 257
VOCABULARY_SIZE = 258


def encode(text: str) -> list[int]:
    """BOS followed by the UTF-8 bytes of `text`."""
    return [BOS, *text.encode()]


def decode(tokens: Iterable[int]) -> str:
    """The text of `tokens`; BOS and EOS are left out and broken UTF-8 is replaced (the model's weights are random)."""
    return bytes(token for token in tokens if token < BOS).decode(errors="replace")


def load_text() -> str:
    """The shipped public-domain text without its header line, which names the source."""
    text = resources.files(__package__).joinpath("text.txt").read_text(encoding="utf-8")
    return text.partition("\n")[2].strip()


def cut_prompts(count: int, seed: int, shortest: int = 20, longest: int = 400) -> list[str]:
    """`count` slices of the text, each `shortest` to `longest` characters, cut at word boundaries; the same for the same seed."""
    text = " ".join(load_text().split())
    if not 0 < shortest <= longest < len(text) // 4:
        raise ValueError(f"prompts of {shortest} to {longest} characters cannot be cut from a text of {len(text)}")
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        start = text.index(" ", rng.randrange(len(text) - 2 * longest)) + 1
        end = text.rindex(" ", start, start + longest + 1)
        length = rng.randint(shortest, longest)
        prompts.append(text[start : min(end, text.index(" ", start + length - 1))])
    return prompts
