"""A schedule of the explorer as a readable story, saved as a scenario file and replayed from it.

    # F001: success is complete: room 1 succeeded with chunks [] of ? from P
    world explored two-chunks chunks=1
    P open 1
      P room 1: BOOTSTRAPPING
    D -> P offer 1#1
    ...

The first line after the comments names a scope and what differs from it; each other line is an action in the explorer's words
(`pd_fsm/testing/words.py`). What follows an action indented is what the processes did because of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from pd_fsm.testing.model import Model
from pd_fsm.testing.scopes import SCOPES, Scope
from pd_fsm.testing.words import action_in_words, edge_in_words
from pd_fsm.testing.world import Violation


class Replay:
    """A world of the explorer that is driven by words."""

    def __init__(self, scope: Scope) -> None:
        self.model = Model(scope)
        self.state = self.model.initial

    def act(self, words: str) -> list[str]:
        """Do the action that has these words. Returns what happened. Raises ValueError when there is none, and Violation."""
        possible = {action_in_words(self.model, action): action for action in self.model.actions(self.state)}
        if words not in possible:
            near = sorted(name for name in possible if name.split(maxsplit=1)[0] == words.split(maxsplit=1)[0]) or sorted(possible)
            raise ValueError(f"{words!r} cannot happen here; what can: {', '.join(near)}")
        edge = self.model.apply(self.state, possible[words])
        self.state = edge.target
        return edge_in_words(self.model, edge)

    def at_rest(self) -> bool:
        return self.model.at_rest(self.state)


def write(name: str, wrong: str, scope: Scope, actions: Sequence[str]) -> str:
    """The text of a scenario file that tells `actions`. The last one may break a property: then the story ends there."""
    lines = [f"# {name}: {_one_line(wrong)}", f"world explored {_in_words(scope)}"]
    replay = Replay(scope)
    for action in actions:
        lines.append(action)
        try:
            lines += [f"  {line}" for line in replay.act(action)]
        except Violation as violation:
            lines.append(f"  VIOLATION {_one_line(str(violation))}")
            break
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _in_words(scope: Scope) -> str:
    """The named scope, or the first one and what differs from it."""
    for known in SCOPES:
        if known.name == scope.name and known == scope:
            return scope.name
    base = SCOPES[0]
    changed = [
        f"{field.name}={_value(getattr(scope, field.name))}"
        for field in attrs.fields(Scope)
        if field.name in SETTINGS and getattr(scope, field.name) != getattr(base, field.name)
    ]
    return " ".join([base.name, *changed])


SETTINGS = tuple(field.name for field in attrs.fields(Scope) if field.name not in ("name", "about", "states", "edges", "long"))


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def scope_of(words: Iterable[str]) -> Scope:
    """The scope that a `world explored` line or the command line names. Raises ValueError for what there is not."""
    name, *options = words
    known = {scope.name: scope for scope in SCOPES}
    if name not in known:
        raise ValueError(f"no scope {name!r}; there are {', '.join(known)}")
    scope = known[name]
    if not options:
        return scope
    changes: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in SETTINGS:
            raise ValueError(f"{option!r} is no setting of a scope; there are {', '.join(SETTINGS)}, as NAME=VALUE")
        now = getattr(scope, key)
        if isinstance(now, tuple):
            changes[key] = tuple(int(part) for part in text.split(","))
        elif isinstance(now, bool):
            changes[key] = text in ("1", "True", "true", "yes")
        else:
            changes[key] = int(text) if isinstance(now, int) else text
    return attrs.evolve(scope, name="", states=0, edges=0, **changes)
