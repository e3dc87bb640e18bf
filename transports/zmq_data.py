"""Page bytes over ZeroMQ. The writer cuts a plan into segments, the receiver checks each against its grant, places it, and
acknowledges.

Large copies leave from the engine's own memory without a copy in Python; small ones are gathered into one frame. Every byte
lands by the receiver's own hand, after a look at the grant, so revoking is proof. Bytes on their way to one peer are bounded by
`Limits.in_flight_bytes_max`; more waits here.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from typing import Annotated, Any

import attrs
import msgspec
import numpy as np
import zmq
from msgspec import Meta
from numpy.typing import NDArray

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan
from pd_fsm.kv.landing import Landing
from pd_fsm.runtime.reactor import HANDLER_MESSAGES_MAX, Source
from pd_fsm.runtime.transport import Host
from pd_fsm.transports.zmq_dial import Dialer

logger = logging.getLogger("pd_fsm.transports.zmq")

SEGMENT_BYTES_MAX = 4 << 20
SEGMENT_COPIES_MAX = 1_024
ZERO_COPY_BYTES_MIN = 64 << 10
"""Below this ZeroMQ's own copy is cheaper than handing memory over (pyzmq's COPY_THRESHOLD)."""

Packed = Annotated[bytes, Meta(max_length=8 * SEGMENT_COPIES_MAX)]


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Header of one message; its payload frames hold the bytes of the copies, in order.

    `region` int32, `offset` and `nbytes` int64, one entry a copy; `frames` int32, how many copies each payload frame holds.
    `notice` is the control frame that goes to the receiver's session when the last segment is placed.
    """

    destination: Annotated[bytes, Meta(min_length=16, max_length=16)]
    op: Annotated[int, Meta(ge=0)]
    sequence: Annotated[int, Meta(ge=0)]
    generation: Annotated[int, Meta(ge=1)]
    region: Packed
    offset: Packed
    nbytes: Packed
    frames: Packed
    notice: Annotated[bytes, Meta(max_length=wire.FRAME_BYTES_MAX)]


class Ack(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One segment was placed, or refused for `error`."""

    op: Annotated[int, Meta(ge=0)]
    sequence: Annotated[int, Meta(ge=0)]
    error: Annotated[str, Meta(max_length=wire.REASON_CHARS_MAX)]


_encode = msgspec.msgpack.Encoder().encode
_decode_segment = msgspec.msgpack.Decoder(Segment).decode
_decode_ack = msgspec.msgpack.Decoder(Ack).decode


@attrs.define(eq=False)
class Write:
    """One operation on its way. `unacked` maps a segment's sequence number to its bytes."""

    op: int
    generation: int
    plan: Plan
    notice: bytes
    segments: Iterator[tuple[int, int]]
    sequence: int = 0
    sent_all: bool = False
    error: str = ""
    unacked: dict[int, int] = attrs.field(factory=dict)
    trackers: list[zmq.MessageTracker] = attrs.field(factory=list)


@attrs.define(eq=False)
class Lane:
    """Everything on its way to one peer."""

    peer: bytes
    dialer: Dialer
    in_flight_bytes: int = 0
    queue: deque[Write] = attrs.field(factory=deque)
    writes: dict[int, Write] = attrs.field(factory=dict)


class ZmqData:
    """The data plane. Used by whoever drives the session."""

    notifies = True

    def __init__(
        self, host: Host, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes] | None, endpoint: str
    ) -> None:
        self.descriptor = endpoint.encode()
        self._host = host
        self._context = context
        self._router = router
        self._landing = Landing(host.layout)
        self._lanes: dict[bytes, Lane] = {}
        self._lane_of: dict[int, Lane] = {}  # by op
        self._router_source: Source | None = None
        if router is not None:
            self._router_source = host.reactor.add_socket(router, self._on_router)

    # --- peers -----------------------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        if self._router is not None:
            return  # decode is written to; its writers dial
        try:
            endpoint = descriptor.decode()
            dialer = Dialer(self._host, self._context, peer, endpoint, 0, lambda: self._on_acks(peer))
        except (UnicodeDecodeError, zmq.ZMQError) as error:
            self._host.emit(ev.PeerUnreachable(peer, f"its data endpoint {descriptor[:64]!r} is unusable: {error}", dead=False))
            return
        self.peer_down(peer)
        self._lanes[peer] = Lane(peer, dialer)

    def peer_down(self, peer: bytes) -> None:
        lane = self._lanes.pop(peer, None)
        if lane is None:
            return
        lane.dialer.close()  # what ZeroMQ had not sent yet is dropped
        for write in lane.writes.values():
            del self._lane_of[write.op]
            self._host.reactor.add_check(lambda write=write: self._let_go(write))  # type: ignore[misc]

    def _let_go(self, write: Write) -> bool:
        """Report a write of a lost peer once ZeroMQ holds none of its memory; what has left is refused or placed by the peer."""
        if not all(tracker.done for tracker in write.trackers):
            return False
        self._host.emit(ev.WriteFailed(write.op, write.error or "the connection was given up"))
        return True

    # --- the receiving side ----------------------------------------------------------------------------------------------

    def expose(self, grant: ev.Expose) -> None:
        self._landing.expose(grant)

    def revoke(self, generation: int) -> bool:
        self._landing.revoke(generation)
        return True  # every byte lands by `_place`, which looks first

    def _on_router(self) -> bool:
        assert self._router is not None
        for _ in range(HANDLER_MESSAGES_MAX):
            try:
                sender, header, *payload = self._router.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            except ValueError:
                logger.warning("%s: dropped a data message without a header", self._host.name)
                continue
            self._on_segment(sender.bytes, header.bytes, payload)
        return True

    def _on_segment(self, sender: bytes, header: bytes, payload: list[zmq.Frame]) -> None:
        try:
            segment = _decode_segment(header)
        except (msgspec.DecodeError, ValueError) as error:
            logger.warning("%s: dropped a malformed data message: %s", self._host.name, error)
            return
        error_text = ""
        try:
            self._place(sender[1:], segment, payload)
        except WireError as error:
            error_text = str(error)
        if segment.notice and not error_text:
            self._host.deliver(segment.notice)
        assert self._router is not None
        try:
            self._router.send_multipart([sender, _encode(Ack(segment.op, segment.sequence, error_text))], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the writer is gone, or reads nothing: its own liveness tells
            logger.info("%s: could not acknowledge to %s: %s", self._host.name, sender[1:5].hex(), error)

    def _place(self, writer: bytes, segment: Segment, payload: list[zmq.Frame]) -> None:
        """Check a whole segment, then copy it. Raises WireError with nothing copied."""
        if segment.destination != self._host.incarnation:
            raise WireError("the segment is for another incarnation of this process")
        region, offset, nbytes, frames = (
            _unpack(segment.region, "<i4"),
            _unpack(segment.offset, "<i8"),
            _unpack(segment.nbytes, "<i8"),
            _unpack(segment.frames, "<i4"),
        )
        self._landing.check(writer, segment.generation, region, offset, nbytes)
        if len(frames) != len(payload) or (len(frames) and frames.min() < 1) or frames.sum() != len(region):
            raise WireError(f"{len(payload)} payload frames do not hold {len(region)} copies")
        bounds = np.append(0, np.cumsum(nbytes))
        ends = np.cumsum(frames)
        expected = bounds[ends] - bounds[ends - frames]
        if any(len(frame) != want for frame, want in zip(payload, expected.tolist(), strict=True)):
            raise WireError("payload frames are not as long as their copies")
        copies = zip(region.tolist(), offset.tolist(), nbytes.tolist(), strict=True)
        for frame, count in zip(payload, frames.tolist(), strict=True):
            data = np.frombuffer(frame.buffer, dtype=np.uint8)
            at = 0
            for _ in range(count):
                number, begin, length = next(copies)
                self._landing.view(number)[begin : begin + length] = data[at : at + length]
                at += length

    # --- the writing side ------------------------------------------------------------------------------------------------

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            self._host.emit(ev.WriteFailed(op, "there is no data connection to the peer"))
            return
        plan = _cut(plan)
        write = Write(op, generation, plan, notice, _segments(plan))
        lane.writes[op] = write
        lane.queue.append(write)
        self._lane_of[op] = lane
        self._pump(lane)

    def cancel(self, op: int) -> None:
        lane = self._lane_of.get(op)
        if lane is not None:
            write = lane.writes[op]
            write.error = write.error or "cancelled"
            self._stop(lane, write)

    def _stop(self, lane: Lane, write: Write) -> None:
        """Send no further segment. The outcome comes when those that left are acknowledged."""
        if not write.sent_all:
            write.sent_all = True
            lane.queue.remove(write)
        self._finish_if_done(lane, write)

    def _pump(self, lane: Lane) -> None:
        limit = self._host.limits.in_flight_bytes_max
        sent = False
        while lane.queue and lane.in_flight_bytes < limit:
            write = lane.queue[0]
            begin, end = next(write.segments)
            self._send(lane, write, begin, end)
            sent = True
            if write.sent_all:
                lane.queue.popleft()
        if sent:
            lane.dialer.touch()

    def _send(self, lane: Lane, write: Write, begin: int, end: int) -> None:
        plan = write.plan
        last = end == len(plan)
        frames, counts, tracker = self._frames(plan, begin, end)
        header = Segment(
            lane.peer,
            write.op,
            write.sequence,
            write.generation,
            plan.region[begin:end].astype("<i4").tobytes(),
            plan.destination[begin:end].astype("<i8").tobytes(),
            plan.nbytes[begin:end].astype("<i8").tobytes(),
            np.array(counts, dtype="<i4").tobytes(),
            write.notice if last else b"",
        )
        nbytes = int(plan.nbytes[begin:end].sum())
        lane.dialer.socket.send_multipart([_encode(header), *frames], zmq.NOBLOCK, copy=False)
        write.unacked[write.sequence] = nbytes
        lane.in_flight_bytes += nbytes
        write.sequence += 1
        write.sent_all = last
        if tracker is not None:
            write.trackers.append(tracker)

    def _frames(self, plan: Plan, begin: int, end: int) -> tuple[list[zmq.Frame | bytes], list[int], zmq.MessageTracker | None]:
        """Payload frames of copies [begin, end), the number of copies in each, and a tracker of the last that shares our memory."""
        frames: list[zmq.Frame | bytes] = []
        counts: list[int] = []
        small: list[NDArray[np.uint8]] = []
        tracker = None
        columns = (plan.region[begin:end].tolist(), plan.source[begin:end].tolist(), plan.nbytes[begin:end].tolist())
        for region, source, nbytes in zip(*columns, strict=True):
            data = self._landing.view(region)[source : source + nbytes]
            if nbytes < ZERO_COPY_BYTES_MIN:
                small.append(data)
                continue
            if small:
                frames.append(np.concatenate(small).tobytes())
                counts.append(len(small))
                small = []
            frame = zmq.Frame(data, copy=False, track=True)
            tracker = frame.tracker
            frames.append(frame)
            counts.append(1)
        if small:
            frames.append(np.concatenate(small).tobytes())
            counts.append(len(small))
        return frames, counts, tracker

    def _on_acks(self, peer: bytes) -> bool:
        lane = self._lanes.get(peer)
        for _ in range(HANDLER_MESSAGES_MAX):
            if lane is None or self._lanes.get(peer) is not lane:
                return False
            try:
                frames = lane.dialer.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            try:
                ack = _decode_ack(frames[0])
            except (msgspec.DecodeError, ValueError) as error:
                logger.warning("%s: dropped a malformed acknowledgement: %s", self._host.name, error)
                continue
            self._on_ack(lane, ack)
        return True

    def _on_ack(self, lane: Lane, ack: Ack) -> None:
        write = lane.writes.get(ack.op)
        if write is None or ack.sequence not in write.unacked:
            return  # a repeated acknowledgement
        lane.in_flight_bytes -= write.unacked.pop(ack.sequence)
        if ack.error and not write.error:
            write.error = f"refused by the receiver: {ack.error}"
        if write.error:
            self._stop(lane, write)
        else:
            self._finish_if_done(lane, write)
        self._pump(lane)

    def _finish_if_done(self, lane: Lane, write: Write) -> None:
        if write.sent_all and not write.unacked and lane.writes.pop(write.op, None) is not None:
            del self._lane_of[write.op]
            if write.error:
                self._host.emit(ev.WriteFailed(write.op, write.error))
            else:
                self._host.emit(ev.WriteDone(write.op, write.plan.total_bytes, notified=True))

    # --- the end ---------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for peer in list(self._lanes):
            self.peer_down(peer)
        if self._router is not None:
            assert self._router_source is not None
            self._host.reactor.remove(self._router_source)
            self._router.close(linger=0)
            self._router = None


def _unpack(packed: bytes, dtype: str) -> NDArray[Any]:
    try:
        return np.frombuffer(packed, dtype=dtype)
    except ValueError as error:
        raise WireError(f"packed array of {len(packed)} bytes: {error}") from None


def _cut(plan: Plan) -> Plan:
    """The same plan with no copy longer than a segment."""
    if not len(plan) or plan.nbytes.max() <= SEGMENT_BYTES_MAX:
        return plan
    pieces = -(-plan.nbytes // SEGMENT_BYTES_MAX)
    owner = np.repeat(np.arange(len(plan)), pieces)
    step = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * SEGMENT_BYTES_MAX
    return Plan(
        plan.region[owner],
        plan.source[owner] + step,
        plan.destination[owner] + step,
        np.minimum(plan.nbytes[owner] - step, SEGMENT_BYTES_MAX),
        plan.total_bytes,
    )


def _segments(plan: Plan) -> Iterator[tuple[int, int]]:
    """[begin, end) of each segment: bounded in bytes and copies; an empty plan is one empty segment, which carries the notice."""
    ends = np.cumsum(plan.nbytes)
    begin = 0
    while True:
        done = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, done + SEGMENT_BYTES_MAX, side="right"))
        end = min(end, begin + SEGMENT_COPIES_MAX)
        yield begin, end
        begin = end
        if begin >= len(plan):
            return
