"""What the router and the workers tell each other: msgspec structs as msgpack over ZeroMQ.

The KV cache and everything about its transfer never pass here: that is pd-fsm's business between the workers themselves.
"""

from __future__ import annotations

import time
from typing import Any, Literal, TypeAlias

import msgspec

Role: TypeAlias = Literal["prefill", "decode"]
Outcome: TypeAlias = Literal["finished", "aborted", "failed"]
Hold: TypeAlias = Literal["BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS"]


class Serve(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Router to both workers of a request. `hold` stops it in a phase until Release or Abort: a hook for the demo and for tests.

    Decode honours BOOTSTRAPPING (does not open its room, so prefill's waits for it) and SUCCESS (has the first token, does not go
    on); prefill honours WAITING_FOR_INPUT (does not compute) and TRANSFERRING (stops after the first chunk).
    """

    room: int
    prompt: list[int]
    max_new_tokens: int
    prefill_dp_rank: int
    hold: Hold | None = None


class Abort(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    room: int
    reason: str


class Release(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """The hold of this room ends; the request goes on."""

    room: int


class Stop(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """Finish what runs, report and exit."""


class Hello(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A worker is there; repeated as its sign of life. A new `incarnation` under the same name is a restarted process."""

    worker: str
    role: Role
    index: int
    pid: int
    incarnation: str


class Progress(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A room was first seen in this phase at `at_ms` (CLOCK_MONOTONIC). One shorter than a turn of the loop is not seen."""

    worker: str
    room: int
    side: Role
    phase: str
    at_ms: float


class Result(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """One side is done with a request. Times are ms since `arrived_ms`, when the request reached this worker (CLOCK_MONOTONIC)."""

    worker: str
    room: int
    side: Role
    outcome: Outcome
    verdict: str  # the room's last phase: "SUCCESS" or "FAILED"; a request aborted while decoding is "aborted" with "SUCCESS"
    reason: str = ""
    cause: str = ""  # pd-fsm's Failure.cause; "worker_lost" or "router" if the router made this up for a worker that cannot
    peer: str = ""
    tokens: list[int] = []
    phase_ms: dict[str, float] = {}
    arrived_ms: float = 0.0
    finished_ms: float = 0.0
    bytes_moved: int = 0


class Report(msgspec.Struct, tag=True, frozen=True, forbid_unknown_fields=True):
    """A worker's last message: unless all pages and rows are free again, something leaked."""

    worker: str
    incarnation: str
    role: Role
    pages_free: int
    pages_total: int
    rows_free: int
    rows_total: int
    finished: int
    aborted: int
    failed: int
    bytes_moved: int
    live_rooms: int
    session: dict[str, Any]  # session.describe()


ToWorker: TypeAlias = Serve | Abort | Release | Stop
ToRouter: TypeAlias = Hello | Progress | Result | Report

_encoder = msgspec.msgpack.Encoder(enc_hook=str)
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


def encode(message: ToWorker | ToRouter) -> bytes:
    return _encoder.encode(message)


def decode_to_worker(frame: bytes) -> ToWorker | None:
    """The message, or None if it is not one: then somebody else talks to this port."""
    try:
        return _to_worker.decode(frame)
    except msgspec.MsgspecError:
        return None


def decode_to_router(frame: bytes) -> ToRouter | None:
    """The message, or None if it is not one."""
    try:
        return _to_router.decode(frame)
    except msgspec.MsgspecError:
        return None


def now_ms() -> float:
    return time.monotonic() * 1000
