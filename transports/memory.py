"""The reference transport: frames and page bytes between sessions of one process; deterministic, no thread, no socket.

Frames go straight into the other session's inbox. A write is copied at submission, into pages that are exposed at that moment,
and its outcome waits in the inbox like any other event. Sessions that share a `Hub` can meet.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from pd_fsm.core import events as ev
from pd_fsm.errors import ConfigError, WireError
from pd_fsm.kv import Plan
from pd_fsm.kv.landing import Landing
from pd_fsm.runtime.rendezvous import LocalRendezvous
from pd_fsm.runtime.transport import Host, Transport


class Hub:
    """Where the sessions of one process meet. Thread-safe."""

    def __init__(self) -> None:
        self.rendezvous = LocalRendezvous()
        self._lock = threading.Lock()
        self._members: dict[bytes, MemoryPlanes] = {}

    def join(self, planes: MemoryPlanes) -> None:
        with self._lock:
            self._members[planes.host.incarnation] = planes

    def leave(self, planes: MemoryPlanes) -> None:
        with self._lock:
            self._members.pop(planes.host.incarnation, None)

    def find(self, incarnation: bytes) -> MemoryPlanes | None:
        return self._members.get(incarnation)


DEFAULT_HUB = Hub()
"""The hub of sessions that name none."""


class MemoryPlanes:
    """Control and data plane of one session."""

    notifies = True
    residual_ms = 0.0
    descriptor = b""

    def __init__(self, host: Host, hub: Hub) -> None:
        if not all(region.host for region in host.layout.regions):
            raise ConfigError("transport 'memory' needs host memory; some buffers of the layout are on a device")
        self.host = host
        self.endpoint = f"memory://{host.incarnation.hex()}"
        self._hub = hub
        self._lock = threading.Lock()  # another session's driver writes into this one's pages
        self._landing = Landing(host.layout)
        self._closed = False
        hub.join(self)

    # --- control ---------------------------------------------------------------------------------------------------------

    def connect(self, peer: bytes, endpoint: str) -> None:
        if self._hub.find(peer) is None:
            self.host.emit(ev.PeerUnreachable(peer, f"no session listens at {endpoint}", dead=True))

    def send(self, peer: bytes, frame: bytes) -> None:
        other = self._hub.find(peer)
        if other is None:
            self.host.emit(ev.PeerUnreachable(peer, "its session ended", dead=True))
        else:
            other.host.deliver(frame, self.host.incarnation)

    def disconnect(self, peer: bytes) -> None:
        """Nothing is held for a peer."""

    # --- data ------------------------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        """Nothing to prepare."""

    def peer_down(self, peer: bytes) -> None:
        """Nothing is outstanding: every write ended when it was submitted."""

    def expose(self, grant: ev.Expose) -> None:
        with self._lock:
            self._landing.expose(grant)

    def revoke(self, generation: int) -> bool:
        with self._lock:
            self._landing.revoke(generation)
        return True

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        other = self._hub.find(peer)
        if other is None:
            self.host.emit(ev.WriteFailed(op, "its session ended"))
            return
        try:
            other.land(self.host.incarnation, generation, plan, self._landing)
        except WireError as error:
            self.host.emit(ev.WriteFailed(op, f"refused by the receiver: {error}"))
            return
        other.host.deliver(notice, self.host.incarnation)
        self.host.emit(ev.WriteDone(op, plan.total_bytes, notified=True))

    def cancel(self, op: int) -> None:
        """Too late: a write ends when it is submitted."""

    def land(self, writer: bytes, generation: int, plan: Plan, source: Landing) -> None:
        """Copy into this session's pages. Raises WireError for what is not granted; then nothing was copied."""
        with self._lock:
            if self._closed:
                raise WireError("its session was closed")
            self._landing.check(writer, generation, plan.region, plan.destination, plan.nbytes)
            columns = (plan.region, plan.source, plan.destination, plan.nbytes)
            for region, begin, target, nbytes in zip(*(column.tolist() for column in columns), strict=True):
                from_bytes: NDArray[np.uint8] = source.view(region)[begin : begin + nbytes]
                self._landing.view(region)[target : target + nbytes] = from_bytes

    def close(self) -> None:
        """Leave the hub, and wait for a write that is just being placed: it is the last one."""
        self._hub.leave(self)
        with self._lock:
            self._closed = True


def create(host: Host, hub: Hub | None = None) -> Transport:
    """The memory transport; `hub` defaults to one for the whole process. Raises ConfigError for device memory."""
    hub = hub or DEFAULT_HUB
    planes = MemoryPlanes(host, hub)
    return Transport("memory", planes, planes, lambda _: planes.close(), hub.rendezvous.client(), reach="process")
