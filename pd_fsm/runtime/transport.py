"""What a transport is, and how one is found.

A transport is a control plane (frames between sessions), a data plane (page bytes between registered regions), or both. It
turns what happened into events and hands them to its host; it never decides what that means, has no retry loop of its own, and
never sees a room's phase. See docs/transports.md for how to write one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeAlias

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core.settings import Limits
from pd_fsm.errors import ConfigError, PdError
from pd_fsm.kv import KVLayout, Plan
from pd_fsm.runtime.clock import now_ms
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.rendezvous import Rendezvous

ENTRY_POINT_GROUP = "pd_fsm.transports"
REACHES = ("itself", "process", "host", "hosts")
"""A transport that plays the other side itself; between sessions of one process, of one host, and of any."""


class ControlPlane(Protocol):
    """Frames between sessions. Methods are called by whoever drives the session, one at a time; none may block."""

    endpoint: str
    """Where peers reach this session; travels in the registration."""

    def connect(self, peer: bytes, endpoint: str) -> None:
        """Begin to connect to a peer. Calling it again with the same endpoint is harmless."""

    def send(self, peer: bytes, frame: bytes) -> None:
        """Queue a frame for a peer, in order. A full queue emits PeerOverflowed, no way to the peer PeerUnreachable; a lost frame
        needs no report, the session repeats what matters."""

    def disconnect(self, peer: bytes) -> None:
        """Forget a peer; idempotent."""


class DataPlane(Protocol):
    """Page bytes. Methods are called by whoever drives the session, one at a time; none may block.

    Each submitted operation ends with exactly one of WriteDone, WriteFailed or WriteUnknown; after WriteUnknown a WriteSettled
    follows as soon as it is proven that nothing more can land. A library's error or time-out that does not prove so is
    WriteUnknown.
    """

    descriptor: bytes
    """What a peer needs to write to this side; travels in the handshake, opaque to everybody else."""

    notifies: bool
    """Whether `notice` has been handed to the peer's session before WriteDone is emitted."""

    residual_ms: float
    """How long bytes that a process handed over before it died may still land: 0 where its end closes the way, else a bound."""

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        """The handshake succeeded. A descriptor that makes no sense emits PeerUnreachable."""

    def peer_down(self, peer: bytes) -> None:
        """Let go of a peer; every operation outstanding to it gets its outcome."""

    def expose(self, grant: ev.Expose) -> None:
        """These writers may write to these pages under this generation from now on."""

    def revoke(self, generation: int) -> bool:
        """End an exposure. True only if this plane vouches that nothing lands there any more, from this moment."""

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        """Write `plan` to `peer`. The source bytes stay untouched until the outcome."""

    def cancel(self, op: int) -> None:
        """Stop an operation if possible. Its outcome is still reported."""


@attrs.frozen(eq=False)
class Host:
    """What a session gives its transport."""

    incarnation: bytes
    role: str
    name: str
    address: str
    """IP address to bind and advertise."""
    layout: KVLayout
    limits: Limits
    reactor: Reactor
    emit: Callable[[ev.Event], None]
    """Append an event to the session's inbox; any thread, never blocks."""
    deliver: Callable[[bytes, bytes], None]
    """`deliver(frame, via)`: hand over a frame, whatever its bytes are, that came on the connection of the peer `via`, as far as
    the transport can tell (else b""); any thread, never blocks."""
    clock_ms: Callable[[], float] = now_ms
    """The session's clock, in milliseconds; any thread."""


@attrs.frozen(eq=False)
class Transport:
    """What a factory returns. `rendezvous` is for transports that bring their own.

    `close(linger_ms)` ends both planes: frames that are queued get at most that long to leave, and no memory of the layout is
    touched afterwards.
    """

    name: str
    control: ControlPlane
    data: DataPlane
    close: Callable[[int], None]
    rendezvous: Rendezvous | None = None
    reach: str = attrs.field(default="hosts", validator=attrs.validators.in_(REACHES))
    """How far away the other session may be."""
    figures: Callable[[], Mapping[str, int]] = dict
    """What it counts, for people and metrics; any thread, never blocks."""


Factory: TypeAlias = Callable[..., Transport]
"""`factory(host, **options)`. Raises ConfigError for options that cannot work and MissingDependency for an absent library."""


def available() -> list[str]:
    """Names of the transports that are installed."""
    return sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)})


def make_transport(transport: str | Factory, host: Host, options: Mapping[str, Any]) -> Transport:
    """The transport of that name, found by entry point, or made by that factory. Raises ConfigError naming what is available."""
    if callable(transport):
        factory: Factory = transport
    else:
        found = [entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name == transport]
        if not found:
            raise ConfigError(f"no transport {transport!r}; installed are {', '.join(available()) or 'none'}")
        factory = found[0].load()
    try:
        return factory(host, **options)
    except PdError:
        raise
    except TypeError as error:
        raise ConfigError(f"transport {transport!r} does not take the options {sorted(options)}: {error}") from error
