"""A control plane over ZeroMQ: frames between sessions, for every transport that brings none of its own.

The prefill side binds a ROUTER, each decode rank dials it. Every socket is used by whoever drives the session, and by nobody else.
A broken or refused connection is reported; a lost frame is not, the session repeats what matters.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable

import zmq

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.errors import ConfigError
from pd_fsm.runtime.reactor import HANDLER_MESSAGES_MAX, Source, readable
from pd_fsm.runtime.transport import Host
from pd_fsm.runtime.zmq_dial import Dialer, Dropped, routing_id

logger = logging.getLogger("pd_fsm.transports.zmq")

HANDSHAKE_MS = 5_000
SOCKETS_PER_PEER = 3  # the dialer, its monitor, and the other end of that
FILES_PER_PEER = 4  # a descriptor for each of them, and the connection


class ZmqControl:
    """Frames over one ROUTER (prefill) or one DEALER a peer (decode)."""

    def __init__(
        self, host: Host, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes] | None, endpoint: str
    ) -> None:
        self.endpoint = endpoint
        self._host = host
        self._context = context
        self._router = router
        self._router_source: Source | None = None
        self._dialers: dict[bytes, Dialer] = {}
        self._dropped = Dropped(host)
        if router is not None:
            self._router_source = host.reactor.add_socket(router, self._on_router)

    def connect(self, peer: bytes, endpoint: str) -> None:
        known = self._dialers.get(peer)
        if known is not None and known.endpoint == endpoint:
            return
        self.disconnect(peer)
        try:
            self._dialers[peer] = Dialer(
                self._host, self._context, peer, endpoint, self._host.limits.outbox_messages_max, lambda: self._on_dialer(peer)
            )
        except zmq.ZMQError as error:
            self._host.emit(ev.PeerUnreachable(peer, f"cannot connect to {endpoint!r}: {error}", dead=False))

    def send(self, peer: bytes, frame: bytes) -> None:
        dialer = self._dialers.get(peer)
        try:
            if dialer is not None:
                dialer.socket.send(frame, zmq.NOBLOCK)
                dialer.touch()
            elif self._router is not None:
                self._router.send_multipart([routing_id(peer), frame], zmq.NOBLOCK)
                assert self._router_source is not None
                self._host.reactor.touch(self._router_source)
        except zmq.Again:
            limit = self._host.limits.outbox_messages_max
            self._host.emit(ev.PeerOverflowed(peer, f"it does not read: {limit} messages are queued (Limits.outbox_messages_max)"))
        except zmq.ZMQError as error:
            self._host.emit(ev.PeerUnreachable(peer, f"no connection: {error}"))

    def disconnect(self, peer: bytes) -> None:
        dialer = self._dialers.pop(peer, None)
        if dialer is not None:
            dialer.close()

    def close(self, linger_ms: int) -> None:
        for dialer in self._dialers.values():
            dialer.close(linger_ms)
        self._dialers.clear()
        if self._router is not None:
            assert self._router_source is not None
            self._host.reactor.remove(self._router_source)
            self._router.close(linger=linger_ms)
            self._router = None

    def _on_router(self) -> bool:
        assert self._router is not None
        for _ in range(HANDLER_MESSAGES_MAX):
            try:
                sender, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            # A connection speaks for the session that it was opened by, and for no other.
            if len(frames) == 1 and frames[0][4:20] == sender[1:]:
                self._host.deliver(frames[0], sender[1:])
            else:
                self._dropped("a message that does not come from the session it names")
            if not readable(self._router):
                return False
        return True

    def _on_dialer(self, peer: bytes) -> bool:
        for _ in range(HANDLER_MESSAGES_MAX):
            dialer = self._dialers.get(peer)
            if dialer is None:
                return False
            try:
                frames = dialer.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._host.deliver(frames[0] if len(frames) == 1 else b"", peer)
            if not readable(dialer.socket):
                return False
        return True


def check_tcp(host: Host, control_port: int) -> None:
    """Raises ConfigError for an address that cannot be advertised, or a port that is none."""
    if host.address in ("", "*", "0.0.0.0", "::"):  # noqa: S104 - refused, because it is advertised, too
        raise ConfigError(f"host {host.address!r} is no address that a peer could connect to; give one of this machine's own")
    if control_port not in range(1 << 16):  # ZeroMQ would take it modulo 65536
        raise ConfigError(f"control_port must be in 0..65535, not {control_port!r}")


def tcp_control(host: Host, control_port: int = 0) -> tuple[ZmqControl, Callable[[int], None]]:
    """A control plane over tcp with a context of its own, and what closes both with that many milliseconds of linger.

    `control_port` 0 takes a free one. Raises ConfigError for an address that cannot be bound or advertised.
    """
    check_tcp(host, control_port)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    make_room(host, context)
    router, endpoint = None, ""
    if host.role == "prefill":
        try:
            router, endpoint = bind_router(host, context, "control", control_port, message_bytes_max=wire.FRAME_BYTES_MAX)
        except ConfigError:
            context.term()
            raise
    control = ZmqControl(host, context, router, endpoint)

    def close(linger_ms: int) -> None:
        control.close(linger_ms)
        context.term()  # returns once what lingers has left or its time is over

    return control, close


def bind_router(
    host: Host, context: zmq.Context[zmq.Socket[bytes]], what: str, port: int, *, message_bytes_max: int, directory: str = ""
) -> tuple[zmq.Socket[bytes], str]:
    """A bound ROUTER and the endpoint to advertise: tcp on the session's host, or ipc with a socket file in `directory`.

    `what` names it in errors. Raises ConfigError naming the address.
    """
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    router.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects takes its place over from its broken connection
    router.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    router.setsockopt(zmq.MAXMSGSIZE, message_bytes_max)
    router.setsockopt(zmq.SNDHWM, host.limits.outbox_messages_max)
    if directory:
        address = f"ipc://{directory}/{host.incarnation.hex()}.{what}"
    else:
        literal = f"[{host.address}]" if ":" in host.address else host.address
        router.setsockopt(zmq.IPV6, int(":" in host.address))
        address = f"tcp://{literal}:{port or '*'}"
    try:
        router.bind(address)
    except zmq.ZMQError as error:
        router.close()
        raise ConfigError(
            f"cannot bind the {what} socket of {host.name} at {address}: {error}; choose another host or port"
        ) from None
    return router, router.getsockopt_string(zmq.LAST_ENDPOINT)


def make_room(host: Host, context: zmq.Context[zmq.Socket[bytes]]) -> None:
    """Let the context have a socket for every peer that the session admits, and say now if the process cannot have that many."""
    context.set(zmq.MAX_SOCKETS, min(SOCKETS_PER_PEER * host.limits.peers_max + 8, context.get(zmq.SOCKET_LIMIT)))
    needed, allowed = FILES_PER_PEER * host.limits.peers_max, resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= allowed < needed:  # no limit at all is -1
        logger.warning(
            "%s: %d peers (Limits.peers_max) need about %d open files, this process may have %d; raise ulimit -n",
            host.name,
            host.limits.peers_max,
            needed,
            allowed,
        )
