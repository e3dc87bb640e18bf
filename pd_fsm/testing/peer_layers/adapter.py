"""What a session layer must offer to be searched for races: one room number, its calls, and what may happen to it from outside.

Write one for your own layer: a class with these methods. The search replays schedules from the beginning, so `reset` must bring
everything back; it must not start threads or wait. Only what the real environment can do may be an action: `why` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol

import attrs

FAILED, BOOTSTRAPPING, WAITING_FOR_INPUT, TRANSFERRING, SUCCESS = range(5)


@attrs.define(eq=False)
class Past:
    """What happened so far in a schedule. `life` counts how often the room was created; the rest is about the current life,
    but for `sent` and `ended`, which are lives by number: work of an earlier one may end in a later one."""

    life: int = 0
    open: bool = False
    initialised: bool = False
    aborted: bool = False
    polled: int | None = None
    failed: bool = False
    shown_failed: bool = False
    refused: bool = False
    sent: set[int] = attrs.field(factory=set)
    registered: set[int] = attrs.field(factory=set)
    ended: dict[int, str] = attrs.field(factory=dict)


@attrs.frozen
class Action:
    """`may(past)` says when it can come, `do(life)` does it and may return what `poll` returned. `kind` is what it means for the
    properties: create, init, init-refused, send, poll, abort, raise, clear, registered, done, failed."""

    name: str
    kind: str
    why: str
    may: Callable[[Past, int], bool]
    do: Callable[[int], Any]
    per_life: bool = False


def engine_actions(
    create: Callable[[int], Any], handle: Callable[[], Any], clear: Callable[[], Any], failure: Callable[[], Any]
) -> list[Action]:
    """What a scheduler does to a room of any layer of this shape. `handle` gives the handle that is open; `failure` raises the
    room's failure, after which it is not used any more."""
    return [
        Action("create", "create", "the scheduler takes a request", lambda p, _: not p.open and p.life < 2, create),
        Action("poll", "poll", "the scheduler's loop", lambda p, _: p.open, lambda _: handle().poll()),
        Action(
            "abort",
            "abort",
            "the client left",
            lambda p, _: p.open and not p.aborted and p.polled not in (FAILED, SUCCESS),
            lambda _: handle().abort(),
        ),
        Action("failure_exception", "raise", "poll said Failed", lambda p, _: p.open and p.polled == FAILED, lambda _: failure()),
        Action("clear", "clear", "poll said Success", lambda p, _: p.open and p.polled == SUCCESS, lambda _: clear()),
    ]


class Layer(Protocol):
    """A session layer with one room."""

    name: str
    plays_peer: bool
    """Whether the other side is played behind the actions, so that what was sent or registered may have arrived by itself."""

    def reset(self) -> None:
        """Forget everything."""

    def actions(self) -> list[Action]:
        """All that the engine and the environment can do."""

    def status(self) -> int | None:
        """The room's status in the layer's own table; None when the table has no such room."""

    def remains(self) -> Mapping[str, str]:
        """Per-room state that the layer still holds: where, what."""

    def fingerprint(self) -> Hashable:
        """All state, so that equal ones are searched once."""
