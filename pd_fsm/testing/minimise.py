"""Make a failing schedule small enough to read: fewer actions, fewer fates, fewer features, the same kind of failure.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", TSE 2002) over the list of what was
done and of what was not ordinary in the network and the data plane; then the options that remain are set to nothing, one by one.
Every candidate is a whole run, so nothing is ever believed that was not seen to fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from pd_fsm.testing.sim_options import Options
from pd_fsm.testing.sim_schedule import Act, Fate, Schedule, Serve
from pd_fsm.testing.simulator import Result, replay

Item: TypeAlias = "tuple[str, Act | Fate]"
"""An action under the key "", or a fate under its own."""
RUNS_MAX = 600
SECONDS_MAX = 60.0
_KEEP = ("prefills", "decodes", "rooms", "room_numbers", "horizon_ms", "notifies", "vouches", "residual_ms", "cancels")
"""Options that are no faults, or that have no value which is nothing."""


class _Search:
    """Runs candidates, within bounds, and keeps the smallest schedule that still fails in the same way."""

    def __init__(self, schedule: Schedule, kind: str) -> None:
        self.best = schedule
        self.kind = kind
        self.runs = 0
        self._until_s = time.monotonic() + SECONDS_MAX

    @property
    def over(self) -> bool:
        return self.runs >= RUNS_MAX or time.monotonic() >= self._until_s

    def fails(self, schedule: Schedule) -> bool:
        if self.over:
            return False
        self.runs += 1
        if replay(schedule).kind != self.kind:
            return False
        self.best = schedule
        return True


def minimise(schedule: Schedule, failed: Result) -> tuple[Schedule, int]:
    """A smaller schedule that fails like `failed`, which came of `schedule`, and how many runs it took. Bounded by RUNS_MAX and
    SECONDS_MAX; what was found until then is what it returns. Raises ValueError if the run did not fail, or fails differently when
    it is replayed with its fates written out."""
    if not failed.failure:
        raise ValueError(f"seed {failed.seed} did not fail: there is nothing to minimise")
    search = _Search(schedule, failed.kind)
    explicit = Schedule(schedule.seed, schedule.options, schedule.acts, dict(failed.fates))
    if not search.fails(explicit):
        raise ValueError(f"seed {failed.seed} does not fail with {failed.kind!r} when it is replayed: it is not deterministic")
    _fewer(search)
    _plainer_options(search)
    _shorter_requests(search)
    _fewer(search)
    return search.best, search.runs


def _items(schedule: Schedule) -> list[Item]:
    return [("", act) for act in schedule.acts] + list((schedule.fates or {}).items())


def _with_items(schedule: Schedule, items: Sequence[Item]) -> Schedule:
    acts = tuple(item for key, item in items if not key)
    fates = {key: item for key, item in items if key}
    return Schedule(schedule.seed, schedule.options, acts, fates)  # type: ignore[arg-type]  # told apart by their keys


def _fewer(search: _Search) -> None:
    """ddmin: drop ever smaller parts for as long as one can be dropped."""
    items, parts = _items(search.best), 2
    while items and not search.over:
        size = -(-len(items) // parts)
        for begin in range(0, len(items), size):
            rest = items[:begin] + items[begin + size :]
            if search.fails(_with_items(search.best, rest)):
                items, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                return
            parts = min(len(items), parts * 2)


def _plainer_options(search: _Search) -> None:
    nothing = Options()
    for name in Options.__struct_fields__:
        value = getattr(nothing, name)
        options = search.best.options
        if name not in _KEEP and getattr(options, name) != value:
            search.fails(msgspec.structs.replace(search.best, options=msgspec.structs.replace(options, **{name: value})))


def _shorter_requests(search: _Search) -> None:
    """One chunk of one page, no prefix, no aux row, no waiting: whatever of that is not needed goes."""
    plain: tuple[Callable[[Serve], Serve], ...] = (
        lambda serve: msgspec.structs.replace(serve, chunks=(1,), prefix_pages=0),
        lambda serve: msgspec.structs.replace(serve, chunks=serve.chunks[:1], prefix_pages=0),
        lambda serve: msgspec.structs.replace(serve, aux=False, short_tokens=0, tokens_off=None),
        lambda serve: msgspec.structs.replace(serve, grant_ms=None, unasked=False),
        lambda serve: msgspec.structs.replace(serve, compute_ms=0.0, clear_ms=0.0, hold_ms=0.0),
        lambda serve: msgspec.structs.replace(serve, prefill_ms=0.0, decode_ms=(0.0,) * len(serve.decodes)),
    )
    for index in range(len(search.best.acts)):
        for change in plain:
            acts = search.best.acts
            act = acts[index]
            if isinstance(act, Serve) and change(act) != act:
                search.fails(msgspec.structs.replace(search.best, acts=(*acts[:index], change(act), *acts[index + 1 :])))
