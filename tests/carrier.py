"""A small transport between sessions of one process, right or wrong on request: what the conformance kit is tested with.

Its own thread moves the bytes, piece by piece, so that everything can happen in between. `landing` True: the reader's grants are
checked at each piece, and `revoke` vouches; False: bytes land one-sided, as with RDMA. `fault` names one sentence of the contract
that it then breaks; the empty one breaks none.
"""

from __future__ import annotations

import queue
import threading
import time

import attrs
import numpy as np

from pd_fsm.core import events as ev
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan
from pd_fsm.kv.landing import Landing
from pd_fsm.runtime.transport import Host, Transport

PIECE_BYTES = 64 << 10
PAUSE_S = 0.0003
"""After each PIECE_BYTES, so that a write takes a while."""
BLOCK_S = 0.4
SILENCE_S = 0.3
MEMBERS: dict[bytes, Carrier] = {}


@attrs.define(eq=False)
class Write:
    op: int
    peer: bytes
    generation: int
    plan: Plan
    notice: bytes
    stopped: str = ""
    over: bool = False


class Carrier:
    """Both planes of one session."""

    residual_ms = 0.0
    descriptor = b"carrier"

    def __init__(self, host: Host, landing: bool, fault: str) -> None:
        self.host = host
        self.endpoint = f"carrier:{host.incarnation.hex()}"
        self.notifies = True
        self.fault = fault
        self.vouches = landing or fault == "vouches falsely"
        self.checks = landing
        self.lock = threading.Lock()  # of this side's memory
        self.landing = Landing(host.layout)
        self.closed = False
        self.heard = time.monotonic()
        self.peers: set[bytes] = set()
        self.writes: dict[int, Write] = {}
        self.work: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, name=f"carrier-{host.name}", daemon=True)
        self.thread.start()
        MEMBERS[host.incarnation] = self

    # --- control ---------------------------------------------------------------------------------------------------------

    def connect(self, peer: bytes, endpoint: str) -> None:
        if self.fault == "raises for an endpoint" and not endpoint.startswith("carrier:"):
            raise ValueError(endpoint)
        if peer not in MEMBERS:
            self.host.emit(ev.PeerUnreachable(peer, f"nobody is at {endpoint[:64]!r}"))

    def send(self, peer: bytes, frame: bytes) -> None:
        other = MEMBERS.get(peer)
        if other is None:
            self.host.emit(ev.PeerUnreachable(peer, "its session ended", dead=True))
            return
        other.heard = time.monotonic()
        if self.fault == "cuts large frames":
            frame = frame[: 1 << 20]
        via = b"?" * 16 if self.fault == "names the wrong connection" else self.host.incarnation
        if self.fault == "lets frames overtake" and frame[-1] % 3 == 0:
            threading.Timer(0.01, lambda: other.host.deliver(frame, via)).start()
        else:
            other.host.deliver(frame, via)
        if self.fault == "calls silence death" and time.monotonic() - self.heard >= 0:
            threading.Timer(SILENCE_S, self.presume, [peer]).start()

    def presume(self, peer: bytes) -> None:
        if not self.closed and time.monotonic() - self.heard > SILENCE_S:
            self.host.emit(ev.PeerUnreachable(peer, "it is silent", dead=True))

    def disconnect(self, peer: bytes) -> None:
        if self.fault == "cannot disconnect twice":
            self.peers.remove(peer)

    # --- data ------------------------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        if descriptor != self.descriptor:
            if self.fault != "takes any descriptor":
                self.host.emit(ev.PeerUnreachable(peer, f"its descriptor is {descriptor[:16]!r}"))
        else:
            self.peers.add(peer)

    def peer_down(self, peer: bytes) -> None:
        self.peers.discard(peer)
        for write in list(self.writes.values()):
            if write.peer == peer:
                if self.fault == "forgets a lost peer's writes":
                    write.over = True
                write.stopped = write.stopped or "the peer was given up"

    def expose(self, grant: ev.Expose) -> None:
        with self.lock:
            self.landing.expose(grant)

    def revoke(self, generation: int) -> bool:
        with self.lock:
            self.landing.revoke(generation)
        return self.vouches

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        if self.fault == "blocks in submit":
            time.sleep(BLOCK_S)
        write = Write(op, peer, generation, plan, notice)
        if peer not in self.peers or peer not in MEMBERS:
            if self.fault == "raises for a lost peer":
                raise KeyError(peer)
            self.host.emit(ev.WriteFailed(op, "there is no such peer"))
            return
        self.writes[op] = write
        self.work.put(write)

    def cancel(self, op: int) -> None:
        if self.fault == "answers each cancel":
            self.host.emit(ev.WriteFailed(op, "cancelled"))
        write = self.writes.get(op)
        if write is None:
            return
        if self.fault == "forgets what is cancelled":
            write.over = True
        if self.fault == "fails what still lands":
            self.end(write, ev.WriteFailed(op, "cancelled"))
        else:
            write.stopped = write.stopped or "cancelled"

    # --- the thread ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while (write := self.work.get()) is not None:
            if self.closed and self.fault != "reads after close":
                continue
            self.move(write)

    def move(self, write: Write) -> None:
        other = MEMBERS.get(write.peer)
        done = ev.WriteDone(write.op, write.plan.total_bytes + (self.fault == "counts a byte too many"), notified=True)
        if other is None:
            self.end(write, ev.WriteFailed(write.op, "its session ended"))
            return
        if self.fault == "hangs on an empty plan" and not write.plan.total_bytes:
            return
        if self.fault == "is done too early":
            self.end(write, done)
        try:
            self.place(write, other)
        except WireError as error:
            self.end(write, ev.WriteFailed(write.op, str(error)))
            if self.fault == "retries by itself" and not self.closed:
                threading.Timer(0.02, self.work.put, [write]).start()
            return
        if self.fault == "settles what it knew":
            self.host.emit(ev.WriteSettled(write.op))
        if self.fault != "notifies too late":
            other.host.deliver(write.notice, self.host.incarnation)
        self.end(write, done)
        if self.fault == "notifies too late":
            other.host.deliver(write.notice, self.host.incarnation)
        if self.fault == "is done twice":
            self.host.emit(done)

    def place(self, write: Write, other: Carrier) -> None:
        plan = write.plan
        copies = list(zip(plan.region.tolist(), plan.source.tolist(), plan.destination.tolist(), plan.nbytes.tolist(), strict=True))
        if self.fault == "loses the end of a long plan":
            copies = copies[:10_000]
        moved = 0
        for region, source, destination, nbytes in copies:
            for at in range(0, nbytes, PIECE_BYTES):
                if write.stopped and self.fault != "fails what still lands":
                    raise WireError(write.stopped)
                if self.closed and self.fault != "reads after close":
                    raise WireError("it was closed")
                count = min(PIECE_BYTES, nbytes - at)
                self.piece(write, other, region, source + at, destination + at, count)
                moved += count
                if moved >= PIECE_BYTES:
                    moved = 0
                    time.sleep(PAUSE_S)

    def piece(self, write: Write, other: Carrier, region: int, source: int, destination: int, nbytes: int) -> None:
        with other.lock:
            if other.closed and self.fault != "lands after close":
                raise WireError("its session was closed")
            if self.checks and self.fault not in ("ignores grants", "vouches falsely", "lands after close"):
                place = np.array([region], np.int32), np.array([destination], np.int64), np.array([nbytes], np.int64)
                other.landing.check(self.host.incarnation, write.generation, *place)
            if self.fault == "writes a byte too many":
                nbytes += 1
            target = other.landing.view(region)
            target[destination : destination + nbytes] = self.landing.view(region)[source : source + nbytes][
                : len(target) - destination
            ]

    def end(self, write: Write, event: ev.Event) -> None:
        if not write.over:
            write.over = True
            self.writes.pop(write.op, None)
            self.host.emit(event)

    def close(self, linger_ms: int) -> None:
        with self.lock:
            self.closed = True
        self.work.put(None)
        if self.fault != "reads after close":
            self.thread.join(5)
        if self.fault != "lands after close":
            MEMBERS.pop(self.host.incarnation, None)


def create(host: Host, landing: bool = True, fault: str = "") -> Transport:
    """`fault`: see the module."""
    planes = Carrier(host, landing, fault)
    return Transport("carrier", planes, planes, planes.close, reach="process")
