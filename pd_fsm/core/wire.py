"""The one codec: every message between two sessions, whatever the transport.

A frame is a fixed header (magic, protocol version, source and destination incarnation) and a msgpack body. Any bytes give a
message or a WireError, nothing else; unknown fields are refused; every length is capped. Page indices travel as packed
little-endian int32 arrays. No address of anybody's memory travels for a request: an offer names page indices, the writer
computes addresses from what was registered at the handshake.

This module must never look at session state: whether a message makes sense now is the session's business.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from pd_fsm.errors import LocalProtocolError, WireError

PROTOCOL_VERSION = 1
MAGIC = b"PDF" + bytes([PROTOCOL_VERSION])
INCARNATION_BYTES = 16
NOBODY = bytes(INCARNATION_BYTES)
"""Destination of a Hello, which is sent before the other side's incarnation is proven."""
HEADER_BYTES = len(MAGIC) + 2 * INCARNATION_BYTES
FRAME_BYTES_MAX = 16 << 20

Room: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Generation: TypeAlias = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 31)]
ByteCount: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 62)]
Name: TypeAlias = Annotated[str, Meta(max_length=256)]
Reason: TypeAlias = Annotated[str, Meta(max_length=4_096)]
PackedPages: TypeAlias = Annotated[bytes, Meta(max_length=8 << 20)]
REASON_CHARS_MAX = 4_096


class ComponentInfo(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What both sides must agree on about one component, and how many items (pages, rows) this side has.

    `item_bytes` has one entry a region (a tensor): the bytes of one page or row in it. `dtype` names the numbers in it, empty if
    they are not known; equally many bytes can mean something else.
    """

    name: Name
    kind: Name
    space: Name
    page_size: Count
    items: Count
    item_bytes: Annotated[tuple[ByteCount, ...], Meta(max_length=65_536)]
    dtype: Name = ""


class Greeting(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Who a session is: the content of Hello and Welcome. `data` is the transport's own descriptor, opaque here."""

    name: Name
    role: Name
    transport: Name
    ranks: Annotated[tuple[Count, ...], Meta(min_length=8, max_length=8)]
    """tp_rank, tp_size, pp_rank, pp_size, cp_rank, cp_size, dp_rank, dp_size"""
    components: Annotated[tuple[ComponentInfo, ...], Meta(max_length=256)]
    data: Annotated[bytes, Meta(max_length=4 << 20)]


class Hello(Greeting, frozen=True, tag="hello", array_like=True, forbid_unknown_fields=True):
    """Decode introduces itself. Repeated until Welcome or Refuse."""


class Welcome(Greeting, frozen=True, tag="welcome", array_like=True, forbid_unknown_fields=True):
    """Prefill accepts, with the same facts about itself."""


class Refuse(msgspec.Struct, frozen=True, tag="refuse", array_like=True, forbid_unknown_fields=True):
    """The handshake does not fit; `reason` names both sides' values."""

    reason: Reason


class Stranger(msgspec.Struct, frozen=True, tag="stranger", array_like=True, forbid_unknown_fields=True):
    """Answer to a message for `addressed`: that incarnation is gone, or it has no handshake with the sender."""

    addressed: Annotated[bytes, Meta(min_length=INCARNATION_BYTES, max_length=INCARNATION_BYTES)]


class Offer(msgspec.Struct, frozen=True, tag="offer", array_like=True, forbid_unknown_fields=True):
    """Decode grants pages for a room; without any, it only says that it will (late reservation). Repeated until answered."""

    room: Room
    generation: Generation
    pages: Annotated[dict[Name, PackedPages], Meta(max_length=64)]
    """Page indices for each index space, packed int32, in the order of the sequence after the prefix."""
    aux_row: Annotated[int, Meta(ge=-1, lt=1 << 31)]
    decode_prefix_len: Count
    """Tokens at the start of the sequence that decode already has."""
    tokens: Annotated[int, Meta(ge=-1, lt=1 << 31)] = -1
    """Length of the whole sequence, if decode knows it: a shorter or longer one fails the room."""


class Accepted(msgspec.Struct, frozen=True, tag="accepted", array_like=True, forbid_unknown_fields=True):
    """Prefill's open room holds the offer."""

    room: Room
    generation: Generation


class Computed(msgspec.Struct, frozen=True, tag="computed", array_like=True, forbid_unknown_fields=True):
    """Prefill holds the whole prompt of `tokens` and waits for decode's pages. Repeated until an Offer brings them."""

    room: Room
    generation: Generation
    tokens: Count


class Part(msgspec.Struct, frozen=True, tag="part", array_like=True, forbid_unknown_fields=True):
    """All bytes of one chunk from this rank are placed. `chunks_total` is 0 until the last chunk is known."""

    room: Room
    generation: Generation
    chunk: Count
    chunks_total: Count
    aux: bool
    nbytes: ByteCount


class Verdict(msgspec.Struct, frozen=True, tag="verdict", array_like=True, forbid_unknown_fields=True):
    """How the room ended on this rank. Success confirms all its parts. Repeated until VerdictAck."""

    room: Room
    generation: Generation
    success: bool
    cause: Name
    reason: Reason
    nbytes: ByteCount


class VerdictAck(msgspec.Struct, frozen=True, tag="verdict_ack", array_like=True, forbid_unknown_fields=True):
    room: Room
    generation: Generation


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True, forbid_unknown_fields=True):
    """Decode gives the room up and asks for a Drained. Repeated until it comes."""

    room: Room
    generation: Generation
    cause: Name
    reason: Reason


class Drained(msgspec.Struct, frozen=True, tag="drained", array_like=True, forbid_unknown_fields=True):
    """Nothing of this room and generation is outstanding on this rank, and nothing more can be submitted."""

    room: Room
    generation: Generation


class DrainedAck(msgspec.Struct, frozen=True, tag="drained_ack", array_like=True, forbid_unknown_fields=True):
    room: Room
    generation: Generation


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True, forbid_unknown_fields=True):
    """Sent to a peer that was silent for a heartbeat."""


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True, forbid_unknown_fields=True):
    pass


class Draining(msgspec.Struct, frozen=True, tag="draining", array_like=True, forbid_unknown_fields=True):
    """The session takes no new rooms; running ones finish."""

    reason: Reason


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye", array_like=True, forbid_unknown_fields=True):
    """The session closes. `drained` says that it can touch nobody's memory any more."""

    reason: Reason
    drained: bool


Message: TypeAlias = (
    Hello
    | Welcome
    | Refuse
    | Stranger
    | Offer
    | Accepted
    | Computed
    | Part
    | Verdict
    | VerdictAck
    | Abort
    | Drained
    | DrainedAck
    | Ping
    | Pong
    | Draining
    | Goodbye
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(source: bytes, destination: bytes, message: Message) -> bytes:
    """The frame of `message`. Raises ValueError when it would exceed FRAME_BYTES_MAX (a local mistake)."""
    frame = b"".join((MAGIC, source, destination, _encoder.encode(message)))
    if len(frame) > FRAME_BYTES_MAX:
        raise ValueError(f"{type(message).__name__} of {len(frame)} bytes exceeds the frame limit of {FRAME_BYTES_MAX}")
    return frame


def decode(frame: bytes) -> tuple[bytes, bytes, Message]:
    """(source incarnation, destination incarnation, message) of a frame, or WireError that says what is wrong."""
    if len(frame) > FRAME_BYTES_MAX:
        raise WireError(f"frame of {len(frame)} bytes exceeds the limit of {FRAME_BYTES_MAX}")
    if len(frame) < HEADER_BYTES:
        raise WireError(f"frame of {len(frame)} bytes is shorter than the {HEADER_BYTES} byte header")
    if frame[:4] != MAGIC:
        if frame[:3] == MAGIC[:3]:
            raise WireError(f"peer speaks protocol version {frame[3]}, this session version {PROTOCOL_VERSION}")
        raise WireError(f"frame does not start with {MAGIC!r} but with {frame[:4]!r}")
    source, destination = frame[4:20], frame[20:36]
    if source == NOBODY:
        raise WireError("frame has no source incarnation")
    try:
        return source, destination, _decoder.decode(memoryview(frame)[HEADER_BYTES:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValidationError is a DecodeError
        raise WireError(f"body is no message: {error}") from None


def clip(reason: str) -> str:
    """`reason` as a frame can hold it: not too long, and without what UTF-8 cannot express."""
    return reason[:REASON_CHARS_MAX].encode("utf-8", "replace").decode()


def pack_pages(pages: Iterable[int]) -> bytes:
    """Page indices as packed little-endian int32. Raises OverflowError or TypeError for what is no such index."""
    packed = array("i", pages)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_pages(packed: bytes) -> array[int]:
    """Page indices of `packed`. Raises WireError when the length is no multiple of 4."""
    if len(packed) % 4:
        raise WireError(f"packed page indices of {len(packed)} bytes are no multiple of 4")
    pages = array("i")
    pages.frombytes(packed)
    if sys.byteorder == "big":
        pages.byteswap()
    return pages


def own_pages(where: str, packed: bytes) -> array[int]:
    """Page indices that the local engine packed. Raises LocalProtocolError, beginning with `where`, for what is malformed."""
    try:
        return unpack_pages(packed)
    except WireError as error:
        raise LocalProtocolError(f"{where}: {error}") from None
