"""What may happen to a session (events, past tense) and what it may ask for (effects, imperative).

All are immutable values. Events come from the local engine, from peers, from the data plane, from the rendezvous and from time;
effects are executed by the driver in the order given, and each can be repeated without harm.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from pd_fsm.core.wire import Greeting, Message, Part


class Failure(msgspec.Struct, frozen=True):
    """Why a room failed: `cause` is one of CAUSES, for counters and policy; `reason` is for people; `peer` names the other side."""

    cause: str
    reason: str
    peer: str = ""


CAUSES = (
    "abort",  # the local engine gave the room up
    "peer_abort",  # the other side's engine gave it up
    "peer_failed",  # the other side failed, with its own reason
    "peer_lost",  # the other process died, restarted or fell silent
    "peer_refused",  # the handshake does not fit
    "timeout",  # a deadline of this room ran out
    "transport",  # a write failed, or its outcome is unknown
    "protocol",  # the other side sent something that cannot be
    "overload",  # a named bound was reached
    "shutdown",  # the local session was closed
)


class PeerRecord(msgspec.Struct, frozen=True):
    """What the rendezvous knows about one prefill rank. `endpoint` is its control-plane address."""

    incarnation: bytes
    endpoint: str
    name: str = ""
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1


Copies: TypeAlias = tuple[tuple[str, bytes, bytes], ...]
"""(index space, packed source pages, packed destination pages), equally long, in pairs."""
Pages: TypeAlias = dict[str, bytes]
"""Packed page indices for each index space."""


# --- events from the local engine: these raise LocalProtocolError when they are a mistake --------------------------------


class OpenSend(msgspec.Struct, frozen=True):
    room: int
    readers: int = 1


class OpenReceive(msgspec.Struct, frozen=True):
    """`pages` None: they are reserved later, by GrantPages, when prefill is done. `tokens`: how long the whole prompt must be."""

    room: int
    pages: Pages | None
    aux_row: int = -1
    decode_prefix_len: int = 0
    address: str = ""
    dp_rank: int | None = None
    tokens: int | None = None


class GrantPages(msgspec.Struct, frozen=True):
    """The pages of a room that was opened without."""

    generation: int
    pages: Pages
    aux_row: int = -1
    decode_prefix_len: int = 0
    tokens: int | None = None


class ChunkReady(msgspec.Struct, frozen=True):
    """The engine computed tokens [start, end) of the sequence into `pages`; `aux_row` may come with the last chunk."""

    generation: int
    start: int
    end: int
    pages: Pages
    last: bool
    aux_row: int = -1


class AbortRequested(msgspec.Struct, frozen=True):
    generation: int
    reason: str


class ClearRequested(msgspec.Struct, frozen=True):
    generation: int


class CancelRequested(msgspec.Struct, frozen=True):
    """Abort a room by its number, whether it is open already or will be."""

    room: int
    reason: str


class DrainRequested(msgspec.Struct, frozen=True):
    """Take no new rooms; running ones finish."""

    reason: str


class ShutdownRequested(msgspec.Struct, frozen=True):
    reason: str


class GoodbyeRequested(msgspec.Struct, frozen=True):
    reason: str


# --- events from outside: these never raise ------------------------------------------------------------------------------


class Received(msgspec.Struct, frozen=True):
    """A message. `via` is the peer whose connection it came on, as far as the transport can tell: it speaks for no other."""

    source: bytes
    destination: bytes
    message: Message
    via: bytes = b""


class PeerUnreachable(msgspec.Struct, frozen=True):
    """A transport lost the peer. `dead` is proof that the process is gone: its port refuses connections."""

    peer: bytes
    reason: str
    dead: bool = False


class PeerOverflowed(msgspec.Struct, frozen=True):
    """The peer does not read, and its bounded outbox is full."""

    peer: bytes
    reason: str


class PeersFound(msgspec.Struct, frozen=True):
    """`announcement`: the serial of the one that led to these ranks, 0 when it is not known or they were not found by room."""

    query: int
    records: tuple[PeerRecord, ...]
    announcement: int = 0


class LookupFailed(msgspec.Struct, frozen=True):
    query: int
    reason: str


class RegistrationFailed(msgspec.Struct, frozen=True):
    """This rank is not registered at the rendezvous; an empty reason says that it is again."""

    reason: str


class WriteDone(msgspec.Struct, frozen=True):
    """All bytes of the operation are placed. `notified`: the peer's session was told so by the data plane itself."""

    op: int
    nbytes: int
    notified: bool = False


class WriteFailed(msgspec.Struct, frozen=True):
    """The operation failed, and nothing more of it can land; where the reader's plane vouches for `revoke`, from then on."""

    op: int
    reason: str


class WriteUnknown(msgspec.Struct, frozen=True):
    """The operation failed or timed out, and bytes may still land. WriteSettled may follow."""

    op: int
    reason: str


class WriteSettled(msgspec.Struct, frozen=True):
    """Nothing more of an operation of unknown outcome can land."""

    op: int


class Revoked(msgspec.Struct, frozen=True):
    """The data plane vouches that nothing can land in this generation's pages any more."""

    generation: int


Event: TypeAlias = (
    OpenSend
    | OpenReceive
    | GrantPages
    | ChunkReady
    | AbortRequested
    | CancelRequested
    | ClearRequested
    | DrainRequested
    | ShutdownRequested
    | GoodbyeRequested
    | Received
    | PeerUnreachable
    | PeerOverflowed
    | PeersFound
    | LookupFailed
    | RegistrationFailed
    | WriteDone
    | WriteFailed
    | WriteUnknown
    | WriteSettled
    | Revoked
)


# --- effects -------------------------------------------------------------------------------------------------------------


class Lookup(msgspec.Struct, frozen=True):
    query: int
    address: str
    room: int
    dp_rank: int | None


class Announce(msgspec.Struct, frozen=True):
    """Tell the rendezvous that this rank serves `room`."""

    room: int


class Connect(msgspec.Struct, frozen=True):
    peer: bytes
    endpoint: str


class PeerUp(msgspec.Struct, frozen=True):
    """The handshake succeeded: the data plane may prepare for this peer."""

    peer: bytes
    greeting: Greeting


class Send(msgspec.Struct, frozen=True):
    peer: bytes
    message: Message


class PeerDown(msgspec.Struct, frozen=True):
    """The peer was given up: the data plane lets go of it and reports an outcome for everything it still had outstanding there."""

    peer: bytes


class Disconnect(msgspec.Struct, frozen=True):
    """Nothing is owed in either direction any more: close the control connection."""

    peer: bytes


class Expose(msgspec.Struct, frozen=True):
    """Pages are granted to `writers` under this generation from now on."""

    generation: int
    pages: Pages
    aux_row: int
    writers: tuple[bytes, ...]


class Revoke(msgspec.Struct, frozen=True):
    """Nothing more may land under this generation. A data plane that can vouch for it answers Revoked."""

    generation: int


class Submit(msgspec.Struct, frozen=True):
    """Write to `peer`. `notice` is delivered to its session once all bytes are placed, where the data plane can."""

    op: int
    peer: bytes
    generation: int
    copies: Copies
    aux: tuple[int, int] | None
    notice: Part


class Cancel(msgspec.Struct, frozen=True):
    op: int


class Publish(msgspec.Struct, frozen=True):
    """A room's phase changed; it is visible to `poll` from now on."""

    room: int
    generation: int
    phase: int


class ReleasePages(msgspec.Struct, frozen=True):
    """The memory of this room belongs to its owner alone again. Always the last effect of its step."""

    room: int
    generation: int


Effect: TypeAlias = (
    Lookup | Announce | Connect | PeerUp | Send | PeerDown | Disconnect | Expose | Revoke | Submit | Cancel | Publish | ReleasePages
)
