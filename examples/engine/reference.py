"""The same model in one process without any hand-off: the tokens that a disaggregated run must reproduce, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

from pd_fsm.examples.engine.kv_cache import pages_for
from pd_fsm.examples.engine.model import Model, chunks, greedy
from pd_fsm.examples.engine.tokens import EOS


def generate(model: Model, tokens: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of `tokens`: at most `max_new_tokens` new tokens, EOS included if it is met."""
    cache = model.new_cache(pages_for(len(tokens) + max_new_tokens), num_rows=1)
    table = cache.pages.take(cache.pages.total)
    for start, end in chunks(len(tokens)):
        logits = model.forward(tokens[start:end], start, cache, table)
    generated = [greedy(logits)[0]]
    while len(generated) < max_new_tokens and generated[-1] != EOS:
        logits = model.forward(generated[-1:], len(tokens) + len(generated) - 1, cache, table)
        generated.append(greedy(logits)[0])
    return generated
