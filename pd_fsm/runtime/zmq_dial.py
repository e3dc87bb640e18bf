"""A ZeroMQ DEALER to one peer, which notices when the process behind the endpoint is gone.

ZeroMQ reconnects silently for ever, so a dead peer looks like a slow one. The socket's monitor tells when the connection breaks
or an attempt fails; a bare connect to the same address then tells a refused port (nobody listens: the process is gone) from a
network that is only slow. A silence or a time-out is never taken for death.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket as stdlib_socket
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.runtime.reactor import Source
from pd_fsm.runtime.transport import Host

logger = logging.getLogger("pd_fsm.transports.zmq")

RECONNECT_MS_MIN = 50
RECONNECT_MS_MAX = 1_000
_GONE = (errno.ECONNREFUSED, errno.ENOENT)  # ENOENT: an ipc socket file that was removed


def routing_id(incarnation: bytes) -> bytes:
    """The name of a session's sockets at its peers. ZeroMQ keeps ids that begin with a zero byte to itself."""
    return b"I" + incarnation


class Dropped:
    """Messages that make no sense: counted, and told at the 1st, 2nd, 4th, 8th ..., so that garbage cannot fill the log."""

    def __init__(self, host: Host) -> None:
        self.count = 0
        self._host = host

    def __call__(self, what: str) -> None:
        self.count += 1
        if self.count & (self.count - 1) == 0:
            logger.warning("%s: dropped %s (%d dropped so far)", self._host.name, what, self.count)


class Dialer:
    """One connection. Used by whoever drives the session.

    `on_broken` is called when an established connection broke; it may close this dialer.
    """

    def __init__(
        self,
        host: Host,
        context: zmq.Context[zmq.Socket[bytes]],
        peer: bytes,
        endpoint: str,
        send_max: int,
        on_ready: Callable[[], bool],
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        self.peer = peer
        self.endpoint = endpoint
        self._host = host
        self._probe: tuple[stdlib_socket.socket, Source] | None = None
        self._closed = False
        self._on_broken = on_broken
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, send_max)
        self.socket.setsockopt(zmq.MAXMSGSIZE, wire.FRAME_BYTES_MAX)
        self.socket.setsockopt(zmq.ROUTING_ID, routing_id(host.incarnation))
        self.socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS_MIN)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        self.socket.setsockopt(zmq.IPV6, 1)
        watched = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
        self._monitor = self.socket.get_monitor_socket(watched)
        self._sources = [
            host.reactor.add_socket(self.socket, on_ready),
            host.reactor.add_socket(self._monitor, self._on_monitor),
        ]
        try:
            self.socket.connect(endpoint)
        except zmq.ZMQError:
            self.close()
            raise

    def touch(self) -> None:
        """The socket was used outside of its handler."""
        self._host.reactor.touch(self._sources[0])

    def _on_monitor(self) -> bool:
        try:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return False
        if event["event"] == zmq.EVENT_CONNECTED:
            self._end_probe()
        else:  # the connection broke, or an attempt to connect failed
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._host.emit(ev.PeerUnreachable(self.peer, f"the connection to {self.endpoint} broke"))
                self._on_broken()
            if not self._closed:
                self._begin_probe()
        return True

    def _begin_probe(self) -> None:
        self._end_probe()
        target = _target(self.endpoint)
        if target is None:
            return
        family, address = target
        probe = stdlib_socket.socket(family, stdlib_socket.SOCK_STREAM)
        probe.setblocking(False)
        code = probe.connect_ex(address)
        if code == errno.EINPROGRESS:
            # A refused connect makes the descriptor ready with an error; an accepted one with the greeting of the peer.
            self._probe = (probe, self._host.reactor.add_fd(probe.fileno(), self._on_probe))
        else:
            probe.close()
            self._judge(code)

    def _on_probe(self) -> bool:
        if self._probe is not None:
            code = self._probe[0].getsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_ERROR)
            self._end_probe()
            self._judge(code)
        return False

    def _judge(self, code: int) -> None:
        if code in _GONE:
            self._host.emit(ev.PeerUnreachable(self.peer, f"nobody listens at {self.endpoint}", dead=True))

    def _end_probe(self) -> None:
        if self._probe is not None:
            probe, source = self._probe
            self._probe = None
            self._host.reactor.remove(source)
            probe.close()

    def close(self, linger_ms: int = 0) -> None:
        if self._closed:
            return
        self._closed = True
        self._end_probe()
        for source in self._sources:
            self._host.reactor.remove(source)
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=linger_ms)


def _target(endpoint: str) -> tuple[int, tuple[str, int] | str] | None:
    """(family, address) to connect to, or None when that would need a name look-up, which may block."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        return stdlib_socket.AF_UNIX, rest
    host, _, port = rest.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        number = int(port)
    except ValueError:
        return None
    family = stdlib_socket.AF_INET6 if address.version == 6 else stdlib_socket.AF_INET
    return (family, (str(address), number)) if 0 < number < 1 << 16 else None
