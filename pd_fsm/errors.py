"""Every exception that pd-fsm raises to its caller.

    PdError
    +-- ConfigError            a setting, layout or address that cannot work; says which value and what to do
    +-- MissingDependency      an optional library is needed and absent; says what to install
    +-- LocalProtocolError     the caller did something the state machine refuses; nothing was changed
    +-- WaitTimeout            a bounded wait ran out; the room goes on
    +-- RoomFailed             raised by `raise_for_failure()`: carries the room's Failure
    +-- WireError              bytes from a peer that are no message; never leaves the runtime

What a peer, a transport or a timer does never raises into the engine: it is a phase and a Failure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pd_fsm.core.events import Failure


class PdError(Exception):
    """Base of all errors of this package."""


class ConfigError(PdError):
    """A setting, layout or address that cannot work."""


class MissingDependency(PdError):  # noqa: N818 - reads as what it is
    """An optional library is not installed."""


class LocalProtocolError(PdError):
    """The caller's own mistake: nothing was changed by the refused call."""


class WaitTimeout(PdError):  # noqa: N818 - reads as what it is
    """A bounded wait ended before the room concluded."""


class WireError(PdError):
    """Bytes that are not a message of this protocol."""


class RoomFailed(PdError):  # noqa: N818 - reads as what it is
    """The room concluded as Failed."""

    def __init__(self, room: int, failure: Failure) -> None:
        super().__init__(f"room {room} failed ({failure.cause}): {failure.reason}")
        self.room = room
        self.failure = failure
