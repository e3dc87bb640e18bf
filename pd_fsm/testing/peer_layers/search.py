"""Breadth-first search over short schedules of calls and outside events of any session layer, for what must never happen.

It knows no bug of anybody: it tries every order, shortest first, and asks the properties after each step. A schedule that breaks
one is reported once, with the shortest order of events that does it, and is not followed further.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

import attrs

from pd_fsm.testing.peer_layers.adapter import FAILED, SUCCESS, WAITING_FOR_INPUT, Action, Layer, Past

STATES_MAX = 20_000
LIVES_MAX = 2

NO_CALL_RAISES = "no call or late message raises"
ABSORBING = "Failed is absorbing"
NO_RETURN = {
    FAILED: "a cleared room does not come back as Failed",
    SUCCESS: "a cleared room does not come back as Success",
    WAITING_FOR_INPUT: "a cleared room does not come back to life",
}
EVIDENCE = "Success only with evidence of this life"
ABORT_FAILS = "an aborted room is Failed"
CLEAR_IS_COMPLETE = "clear leaves nothing of the room"
RAISE_IS_COMPLETE = "failure_exception raises and leaves nothing of the room"
REFUSED_STAYS = "a bootstrap failure is not overwritten"
PROPERTIES = (
    NO_CALL_RAISES,
    ABSORBING,
    *NO_RETURN.values(),
    EVIDENCE,
    ABORT_FAILS,
    CLEAR_IS_COMPLETE,
    RAISE_IS_COMPLETE,
    REFUSED_STAYS,
)


@attrs.frozen
class Finding:
    """A property that a layer breaks, and the shortest schedule that does it."""

    property: str
    what: str
    schedule: tuple[str, ...]


@attrs.frozen
class Result:
    """What a search did: how many different states it saw, to what depth, and what it found, by property."""

    layer: str
    states: int
    depth: int
    findings: tuple[Finding, ...]


@attrs.frozen
class _Step:
    action: Action
    life: int

    def __str__(self) -> str:
        return f"{self.action.name} (life {self.life})" if self.action.per_life else self.action.name


def search(layer: Layer, depth_max: int = 14, properties: tuple[str, ...] = PROPERTIES) -> Result:
    """Try every schedule of up to `depth_max` steps. Deterministic: equal layers give equal results."""
    found: dict[str, Finding] = {}
    seen: set[Hashable] = set()
    waiting: deque[tuple[_Step, ...]] = deque([()])
    depth = 0
    while waiting and len(seen) < STATES_MAX and len(found) < len(properties):
        schedule = waiting.popleft()
        depth = len(schedule)
        if depth >= depth_max:
            continue
        past = _replay(layer, schedule)
        steps = [_Step(action, life) for action in layer.actions() for life in _lives(action, past) if action.may(past, life)]
        for step in steps:
            past = _replay(layer, schedule)
            broken = _take(layer, past, step)
            if broken is not None:
                name, what = broken
                if name in properties and name not in found:
                    found[name] = Finding(name, what, tuple(map(str, (*schedule, step))))
                continue
            state = (layer.fingerprint(), _key(past))
            if state not in seen:
                seen.add(state)
                waiting.append((*schedule, step))
    return Result(layer.name, len(seen), depth, tuple(found[name] for name in properties if name in found))


def _lives(action: Action, past: Past) -> range | tuple[int]:
    return range(1, past.life + 1) if action.per_life else (past.life,)


def _key(past: Past) -> Hashable:
    values = attrs.asdict(past)
    return tuple(
        tuple(sorted(v.items())) if isinstance(v, dict) else tuple(sorted(v)) if isinstance(v, set) else v for v in values.values()
    )


def _replay(layer: Layer, schedule: tuple[_Step, ...]) -> Past:
    layer.reset()
    past = Past()
    for step in schedule:
        broken = _take(layer, past, step)
        assert broken is None, f"{layer.name} is not deterministic: {step} broke {broken} only when it was replayed"
    return past


def _take(layer: Layer, past: Past, step: _Step) -> tuple[str, str] | None:
    """One step. Returns the property that it breaks and how, or None."""
    kind = step.action.kind
    raised: Exception | None = None
    value: Any = None
    before = layer.status()
    try:
        value = step.action.do(step.life)
    except Exception as error:  # noqa: BLE001 - whatever the layer raises is what is looked at
        raised = error
    if kind == "raise":
        if raised is None:
            return RAISE_IS_COMPLETE, "failure_exception returned"
        if isinstance(raised, (AttributeError, TypeError, NotImplementedError, KeyError)):
            return RAISE_IS_COMPLETE, f"{type(raised).__name__}: {raised}"
    elif raised is not None:
        return NO_CALL_RAISES, f"{step}: {type(raised).__name__}: {raised}"
    late = kind == "abort" and before == SUCCESS  # an abort of what has ended
    if kind in _NOTE and not late:
        _NOTE[kind](past, step.life, value)
    return _judge(layer, past, kind)


def _judge(layer: Layer, past: Past, kind: str) -> tuple[str, str] | None:
    status = layer.status()
    if not past.open:
        if status is not None:
            return NO_RETURN.get(status, NO_RETURN[WAITING_FOR_INPUT]), f"the table has it with status {status}"
        if kind in ("clear", "raise"):
            remains = layer.remains()
            if remains:
                where = ", ".join(f"{name}: {what}" for name, what in sorted(remains.items()))
                return (CLEAR_IS_COMPLETE if kind == "clear" else RAISE_IS_COMPLETE), where
        return None
    if past.refused and ((kind == "poll" and past.polled != FAILED) or status not in (None, FAILED)):
        return REFUSED_STAYS, f"poll says {past.polled}, the table {status}"
    if past.aborted and kind == "poll" and past.polled != FAILED:
        return ABORT_FAILS, f"poll says {past.polled}"
    if past.failed and status not in (None, FAILED):
        return ABSORBING, f"the table says {status} after it said {FAILED}"
    if past.shown_failed and kind == "poll" and past.polled != FAILED:
        return ABSORBING, f"poll says {past.polled} after it said {FAILED}"
    done = past.life in past.sent or bool(past.registered) if layer.plays_peer else past.ended.get(past.life) == "done"
    if kind == "poll" and past.polled == SUCCESS and not done:
        return EVIDENCE, "nothing of this life was done"
    past.failed = past.failed or status == FAILED
    past.shown_failed = past.shown_failed or past.polled == FAILED
    return None


def _created(past: Past, _: int, __: Any) -> None:
    past.life += 1
    past.open, past.initialised, past.aborted, past.refused = True, False, False, False
    past.polled, past.failed, past.shown_failed = None, False, False


def _closed(past: Past, _: int, __: Any) -> None:
    past.open = False


def _set(name: str) -> Callable[[Past, int, Any], None]:
    return lambda past, _, __: setattr(past, name, True)


_NOTE: dict[str, Callable[[Past, int, Any], None]] = {
    "create": _created,
    "init": _set("initialised"),
    "init-refused": _set("refused"),
    "send": lambda past, _, __: past.sent.add(past.life),
    "poll": lambda past, _, value: setattr(past, "polled", int(value)),
    "abort": _set("aborted"),
    "clear": _closed,
    "raise": _closed,
    "registered": lambda past, life, _: past.registered.add(life),
    "done": lambda past, life, _: past.ended.__setitem__(life, "done"),
    "failed": lambda past, life, _: past.ended.__setitem__(life, "failed"),
}
