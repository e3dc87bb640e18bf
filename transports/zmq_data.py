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
from pd_fsm.runtime.reactor import HANDLER_MESSAGES_MAX, Source, readable
from pd_fsm.runtime.transport import Host
from pd_fsm.runtime.zmq_dial import Dialer, Dropped

logger = logging.getLogger("pd_fsm.transports.zmq")

SEGMENT_BYTES_MAX = 2 << 20
"""Small enough that what just arrived is still in a cache when it is placed, large enough that a segment costs little Python."""
SEGMENT_COPIES_MAX = 1_024
SPARE_BUFFERS_MAX = 8
"""Gathering buffers that an idle session keeps; a busy one has as many as are on their way."""
ZERO_COPY_BYTES_MIN = 256 << 10
"""Below this, gathering copies into one frame is cheaper than a frame for each, which costs some 30 us of Python at both ends."""

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
class Sent:
    """A segment on its way: its bytes, trackers of the engine's memory in it, and the buffers of ours that it was gathered into."""

    nbytes: int
    trackers: list[zmq.MessageTracker] = attrs.field(factory=list)
    buffers: list[tuple[NDArray[np.uint8], zmq.MessageTracker]] = attrs.field(factory=list)


@attrs.define(eq=False)
class Write:
    """One operation on its way. `unacked` holds its segments by their sequence numbers."""

    op: int
    generation: int
    plan: Plan
    notice: bytes
    segments: Iterator[tuple[int, int]]
    sequence: int = 0
    sent_all: bool = False
    error: str = ""
    unacked: dict[int, Sent] = attrs.field(factory=dict)


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
    residual_ms = 0.0

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
        self._spare: list[NDArray[np.uint8]] = []  # used again, because fresh memory costs more than the copy into it
        self._segment_bytes_max = min(SEGMENT_BYTES_MAX, host.limits.in_flight_bytes_max)
        self._arriving: dict[bytes, tuple[int, int]] = {}  # by granted writer: its unfinished op, the sequence to come
        self._dropped = Dropped(host)
        self._router_source: Source | None = None
        if router is not None:
            self._router_source = host.reactor.add_socket(router, self._on_router)

    # --- peers -----------------------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        if self._router is not None:
            return  # decode is written to; its writers dial
        self.peer_down(peer)
        try:
            endpoint = descriptor.decode()
            dialer = Dialer(
                self._host, self._context, peer, endpoint, 0, lambda: self._on_acks(peer), lambda: self._on_broken(peer, descriptor)
            )
        except (UnicodeDecodeError, zmq.ZMQError) as error:
            self._host.emit(ev.PeerUnreachable(peer, f"its data endpoint {descriptor[:64]!r} is unusable: {error}", dead=False))
            return
        self._lanes[peer] = Lane(peer, dialer)

    def _on_broken(self, peer: bytes, descriptor: bytes) -> None:
        """A connection broke, and ZeroMQ does not tell which messages are lost: every write on its way ends, later ones go anew."""
        if self._lanes[peer].writes:
            self.peer_up(peer, descriptor)

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
        if not all(tracker.done for sent in write.unacked.values() for tracker in sent.trackers):
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
                self._dropped("a data message without a header")
                continue
            self._on_segment(sender.bytes, header.bytes, payload)
            if not readable(self._router):
                return False
        return True

    def _on_segment(self, sender: bytes, header: bytes, payload: list[zmq.Frame]) -> None:
        try:
            segment = _decode_segment(header)
        except (msgspec.DecodeError, ValueError) as error:
            self._dropped(f"a malformed data message: {error}")
            return
        error_text = ""
        try:
            self._place(sender[1:], segment, payload)
        except WireError as error:
            error_text = str(error)
        if segment.notice and not error_text:
            self._host.deliver(segment.notice, sender[1:])
        assert self._router is not None
        try:
            self._router.send_multipart([sender, _encode(Ack(segment.op, segment.sequence, error_text))], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the writer is gone, or reads nothing: its own liveness tells
            logger.info("%s: could not acknowledge to %s: %s", self._host.name, sender[1:5].hex(), error)

    def _place(self, writer: bytes, segment: Segment, payload: list[zmq.Frame]) -> None:
        """Check a whole segment, then copy it. Raises WireError with nothing copied."""
        if segment.destination != self._host.incarnation:
            raise WireError("the segment is for another incarnation of this process")
        if segment.notice and segment.notice[4:20] != writer:
            raise WireError("its notice does not come from the session that sent the segment")
        if segment.sequence and self._arriving.get(writer) != (segment.op, segment.sequence):  # a connection broke in between
            raise WireError(f"segment {segment.sequence} came without those before it")
        region, offset, nbytes, frames = (
            _unpack(segment.region, "<i4"),
            _unpack(segment.offset, "<i8"),
            _unpack(segment.nbytes, "<i8"),
            _unpack(segment.frames, "<i4"),
        )
        self._landing.check(writer, segment.generation, region, offset, nbytes)
        lengths, counts = nbytes.tolist(), frames.tolist()
        if len(counts) != len(payload) or min(counts, default=1) < 1 or sum(counts) != len(lengths):
            raise WireError(f"{len(payload)} payload frames do not hold {len(lengths)} copies")
        done = 0
        for frame, count in zip(payload, counts, strict=True):
            if len(frame) != sum(lengths[done : done + count]):
                raise WireError("payload frames are not as long as their copies")
            done += count
        copies = zip(region.tolist(), offset.tolist(), lengths, strict=True)
        for frame, count in zip(payload, counts, strict=True):
            data = np.frombuffer(frame.buffer, dtype=np.uint8)
            at = 0
            for _ in range(count):
                number, begin, length = next(copies)
                self._landing.view(number)[begin : begin + length] = data[at : at + length]
                at += length
        if segment.notice:
            self._arriving.pop(writer, None)
        else:
            self._arriving[writer] = segment.op, segment.sequence + 1

    # --- the writing side ------------------------------------------------------------------------------------------------

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            self._host.emit(ev.WriteFailed(op, "there is no data connection to the peer"))
            return
        plan = plan.cut(self._segment_bytes_max)
        write = Write(op, generation, plan, notice, _segments(plan, self._segment_bytes_max))
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
        full = self._host.limits.in_flight_bytes_max - self._segment_bytes_max  # above this a segment might not fit
        sent = False
        while lane.queue and lane.in_flight_bytes <= full:
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
        sent = Sent(int(plan.nbytes[begin:end].sum()))
        frames, counts = self._frames(plan, begin, end, sent)
        header = Segment(
            lane.peer,
            write.op,
            write.sequence,
            write.generation,
            plan.region[begin:end].astype("<i4", copy=False).tobytes(),
            plan.destination[begin:end].astype("<i8", copy=False).tobytes(),
            plan.nbytes[begin:end].astype("<i8", copy=False).tobytes(),
            np.array(counts, dtype="<i4").tobytes(),
            write.notice if last else b"",
        )
        # A little one is cheaper to copy than to hand over.
        lane.dialer.socket.send_multipart([_encode(header), *frames], zmq.NOBLOCK, copy=sent.nbytes < zmq.COPY_THRESHOLD)
        write.unacked[write.sequence] = sent
        lane.in_flight_bytes += sent.nbytes
        write.sequence += 1
        write.sent_all = last

    def _frames(self, plan: Plan, begin: int, end: int, sent: Sent) -> tuple[list[zmq.Frame | memoryview], list[int]]:
        """Payload frames of copies [begin, end) and the number of copies in each; what they hold on to is noted in `sent`."""
        frames: list[zmq.Frame | memoryview] = []
        counts: list[int] = []
        small: list[NDArray[np.uint8]] = []
        columns = (plan.region[begin:end].tolist(), plan.source[begin:end].tolist(), plan.nbytes[begin:end].tolist())
        for region, source, nbytes in zip(*columns, strict=True):
            data = self._landing.view(region)[source : source + nbytes]
            if nbytes < ZERO_COPY_BYTES_MIN:
                small.append(data)
                continue
            if small:
                frames.append(self._gather(small, sent))
                counts.append(len(small))
                small = []
            frame = zmq.Frame(data, copy=False, track=True)
            sent.trackers.append(frame.tracker)
            frames.append(frame)
            counts.append(1)
        if small:
            frames.append(self._gather(small, sent))
            counts.append(len(small))
        return frames, counts

    def _gather(self, pieces: list[NDArray[np.uint8]], sent: Sent) -> zmq.Frame | memoryview:
        """One frame with the bytes of all pieces. ZeroMQ copies a little one, and reads a large one from a buffer of ours."""
        nbytes = sum(map(len, pieces))
        if nbytes < zmq.COPY_THRESHOLD:
            return np.concatenate(pieces).data
        buffer = self._spare.pop() if self._spare else np.empty(self._segment_bytes_max, dtype=np.uint8)
        np.concatenate(pieces, out=buffer[:nbytes])
        frame = zmq.Frame(buffer[:nbytes], copy=False, track=True)
        sent.buffers.append((buffer, frame.tracker))
        return frame

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
                self._dropped(f"a malformed acknowledgement: {error}")
                continue
            self._on_ack(lane, ack)
            if self._lanes.get(peer) is lane and not readable(lane.dialer.socket):
                return False
        return True

    def _on_ack(self, lane: Lane, ack: Ack) -> None:
        write = lane.writes.get(ack.op)
        if write is None or ack.sequence not in write.unacked:
            return  # a repeated acknowledgement
        sent = write.unacked.pop(ack.sequence)
        lane.in_flight_bytes -= sent.nbytes
        self._spare += [buffer for buffer, tracker in sent.buffers if tracker.done]  # a peer's word would not prove that
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
            if not self._lane_of:
                del self._spare[SPARE_BUFFERS_MAX:]
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


def _segments(plan: Plan, bytes_max: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of each segment: bounded in bytes and copies; an empty plan is one empty segment, which carries the notice."""
    if plan.total_bytes <= bytes_max and len(plan) <= SEGMENT_COPIES_MAX:  # a short chunk
        yield 0, len(plan)
        return
    ends = np.cumsum(plan.nbytes)
    begin = 0
    while True:
        done = int(ends[begin - 1]) if begin else 0
        end = int(np.searchsorted(ends, done + bytes_max, side="right"))
        end = min(end, begin + SEGMENT_COPIES_MAX)
        yield begin, end
        begin = end
        if begin >= len(plan):
            return
