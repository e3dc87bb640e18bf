"""What the demo sends: prompts cut from the text, which of them are aborted where, and which are in flight when a worker is killed.

Only data, drawn from a seed: the same for every run with the same settings. Sending it is `demo.py`'s business.
"""

from __future__ import annotations

import random

import attrs

from pd_fsm.examples.engine.messages import Hold
from pd_fsm.examples.engine.report import AIMS, FIRST_CONTACT_AIM, Aim, plan_words
from pd_fsm.examples.engine.tokens import cut_prompts

KILLED = "prefill-0"
VICTIM_HOLDS: tuple[Hold, ...] = ("WAITING_FOR_INPUT", "TRANSFERRING", "TRANSFERRING")  # rooms in flight when it is killed
PROBES = 2  # requests for the worker when it is back
REQUESTS_MIN = len(AIMS) + len(VICTIM_HOLDS) + 1
PROMPT_CHARS = (40, 700)  # of all prompts; chunks are 64 tokens
HELD_PROMPT_CHARS = 150  # at least, for a prompt that is held between two chunks
NEW_TOKENS = (12, 48)


@attrs.frozen
class Planned:
    """A request before it is sent."""

    prompt: str
    max_new_tokens: int
    aim: Aim | None = None
    hold: Hold | None = None
    prefill: str | None = None  # a worker's name, or whichever comes next
    retry_of: int | None = None
    is_probe: bool = False
    is_victim: bool = False

    @property
    def words(self) -> str:
        return plan_words(self.aim, self.retry_of, self.is_probe, self.is_victim)


def plan(requests: int, seed: int) -> list[Planned]:
    """Which requests are sent, in this order.

    First one that is aborted before the first contact, in the middle those held for the kill. The others are mixed: most just
    run, some are held in a phase and aborted there.
    """
    rng = random.Random(seed)
    short, long = PROMPT_CHARS
    any_prompts = iter(cut_prompts(requests, seed, short, long))
    long_prompts = iter(cut_prompts(requests, seed + 1, HELD_PROMPT_CHARS, long))
    aims = [aim for aim in AIMS if aim != FIRST_CONTACT_AIM] * max(1, requests // 48)
    planned = [Planned(next(long_prompts), rng.randint(*NEW_TOKENS), aim=aim, hold=aim[0]) for aim in aims]
    while len(planned) < requests - 1 - len(VICTIM_HOLDS):
        planned.append(Planned(next(any_prompts), rng.randint(*NEW_TOKENS)))
    rng.shuffle(planned)
    middle = requests // 2
    planned[middle:middle] = [
        Planned(next(long_prompts), rng.randint(*NEW_TOKENS), hold=hold, prefill=KILLED, is_victim=True) for hold in VICTIM_HOLDS
    ]
    return [Planned(next(any_prompts), rng.randint(*NEW_TOKENS), aim=FIRST_CONTACT_AIM), *planned]


def probes(seed: int) -> list[Planned]:
    """For the killed worker in its second life."""
    rng = random.Random(seed + 2)
    prompts = cut_prompts(PROBES, seed + 2, *PROMPT_CHARS)
    return [Planned(prompt, rng.randint(*NEW_TOKENS), prefill=KILLED, is_probe=True) for prompt in prompts]
