"""Copies of a real session core, and what of a core can make a difference to what it does next.

`clone` makes an independent copy, `freeze` a hashable value that two cores share exactly when no event can tell them apart, but for
time: an explorer lets any armed timer run out at any moment, so when it would have been due is no part of a state. Whatever class
or field the core gets must be named here, or both raise TypeError: nothing is left out of a state by oversight.
"""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from types import FunctionType, MethodType
from typing import Any

import attrs
import msgspec

from pd_fsm.core.ledger import Lease, Link, Op, Peer, Room
from pd_fsm.core.registry import Registry, Tombstone
from pd_fsm.core.session import Identity, SessionCore
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.core.timers import Repeat, Timers

_VALUES = (type(None), bool, int, float, str, bytes)
_SHARED = (Identity, Deadlines, Limits, FunctionType, MethodType)
"""Never changed once made, so copies share them."""

_NAME: dict[type, Callable[[Any], tuple[Hashable, ...]]] = {
    Room: lambda room: ("room", room.generation),
    Link: lambda link: ("link", link.peer, link.generation),
    Peer: lambda peer: ("peer", peer.incarnation, peer.epoch),
    Op: lambda op: ("op", op.id),
}
"""What refers to each other: in a frozen core a reference is a name."""

_LEFT_OUT: dict[type, dict[str, str]] = {
    SessionCore: {
        "identity": "the same for all states of a process",
        "deadlines": "the same for all states of a process",
        "limits": "the same for all states of a process",
        "spaces": "follows from the identity",
        "space_bytes": "follows from the identity",
        "aux_rows": "follows from the identity",
        "aux_bytes": "follows from the identity",
        "now_ms": "time",
        "counts": "counters are only shown",
        "trace": "the observer",
        "_effects": "empty between steps",
        "_released": "empty between steps",
    },
    Registry: {"_limits": "the same for all states of a process", "_deadlines": "the same for all states of a process"},
    Timers: {"_heap": "time; `pending` has what it holds besides", "_sequence": "the order of equal times"},
    Repeat: {"due_ms": "time", "backoff_ms": "time"},
    Room: {"opened_ms": "time", "deadline_ms": "time"},
    Peer: {"heard_ms": "time", "since_ms": "time", "placed": "when writes ended: it only moves deadlines"},
    Tombstone: {"expires_ms": "time"},
    Link: {},
    Lease: {},
    Op: {},
}
_FIELDS = {kind: tuple(field.name for field in attrs.fields(kind)) for kind in (Repeat, Room, Peer, Tombstone, Link, Lease, Op)}


def clone(core: SessionCore) -> SessionCore:
    """An independent copy of `core`, without its trace."""
    copy: SessionCore = _clone(core, {id(core.trace): None})
    return copy


def _clone(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _VALUES or kind in _SHARED or isinstance(value, (msgspec.Struct, enum.Enum)):
        return value
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if kind is dict or kind is OrderedDict or kind is Counter:
        made = memo[id(value)] = kind()
        for key, item in value.items():
            made[key] = _clone(item, memo)
        return made
    if kind is tuple or kind is list or kind is set:
        return kind(_clone(item, memo) for item in value)  # nothing leads back to one of these
    if kind is deque:
        return deque((_clone(item, memo) for item in value), value.maxlen)
    if kind not in _LEFT_OUT:
        raise TypeError(f"{kind.__name__} is unknown to pd_fsm.testing.snapshot; say there how it is copied and frozen")
    made = memo[id(value)] = object.__new__(kind)
    for name in _FIELDS.get(kind) or vars(value):
        object.__setattr__(made, name, _clone(getattr(value, name), memo))
    return made


def freeze(core: SessionCore) -> Hashable:
    """All of `core` that can make a difference to what it does next, but for the time left on its timers."""
    named: dict[tuple[Hashable, ...], Hashable] = {}
    return _freeze_fields(core, vars(core), named), pending(core), frozenset(named.items())


def pending(core: SessionCore) -> frozenset[tuple[str, bytes, int]]:
    """Timers that no other part of the state implies: the rest of a dead writer's bytes in the network."""
    return frozenset(key for _, _, key in core.timers._heap if key[0] == "residual" and (key[1], key[2]) in core.links)  # noqa: SLF001


def _freeze(value: Any, named: dict[tuple[Hashable, ...], Hashable]) -> Hashable:
    kind = type(value)
    if kind in _VALUES or isinstance(value, enum.Enum):
        return value  # type: ignore[no-any-return]
    if isinstance(value, msgspec.Struct):
        return (kind.__name__, *(_freeze(getattr(value, name), named) for name in value.__struct_fields__))
    if kind in (dict, OrderedDict, Counter):
        return frozenset((_freeze(key, named), _freeze(item, named)) for key, item in value.items())
    if kind in (tuple, list, deque):
        return tuple(_freeze(item, named) for item in value)
    if kind is set:
        return frozenset(_freeze(item, named) for item in value)
    if kind in _NAME:
        name = _NAME[kind](value)
        if name not in named:
            named[name] = None  # before its fields, which may lead back here
            named[name] = _freeze_fields(value, _FIELDS[kind], named)
        return name
    if kind in _LEFT_OUT:
        return _freeze_fields(value, _FIELDS.get(kind) or vars(value), named)
    raise TypeError(f"{kind.__name__} is unknown to pd_fsm.testing.snapshot; say there how it is copied and frozen")


def _freeze_fields(value: Any, names: Any, named: dict[tuple[Hashable, ...], Hashable]) -> Hashable:
    left_out = _LEFT_OUT[type(value)]
    if type(value) is Registry:
        return _freeze_registry(value, named)
    return tuple(_freeze(getattr(value, name), named) for name in names if name not in left_out)


def _freeze_registry(registry: Registry, named: dict[tuple[Hashable, ...], Hashable]) -> Hashable:
    """Early offers are kept with the time at which they lapse."""
    fields = {name: value for name, value in vars(registry).items() if name not in _LEFT_OUT[Registry]}
    early = fields.pop("_early")
    offers = tuple((key, _freeze(offer, named)) for key, (offer, _) in early.items())
    return offers, tuple(_freeze(value, named) for value in fields.values())
