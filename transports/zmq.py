"""The embedded default: control and data over ZeroMQ, tcp or ipc.

The prefill side binds a ROUTER for control and dials each decode rank's data ROUTER; the decode side the other way round. So
each pair of ranks has one connection for messages and one for pages, and a bulk transfer never delays a message. Every socket
is used by whoever drives the session, and by nobody else.
"""

from __future__ import annotations

from pathlib import Path

import zmq

from pd_fsm.core import wire
from pd_fsm.errors import ConfigError
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.runtime.zmq_control import ZmqControl, bind_router, check_tcp, make_room
from pd_fsm.transports.zmq_data import SEGMENT_BYTES_MAX, ZmqData


def create(host: Host, scheme: str = "tcp", directory: str = "", control_port: int = 0, io_threads: int = 1) -> Transport:
    """The ZeroMQ transport.

    `scheme` is "tcp", on the session's host, or "ipc", with socket files in `directory`. `control_port` 0 takes a free one. Raises
    ConfigError for an address that cannot be bound or advertised, an ipc directory that does not exist, or device memory.
    """
    if scheme not in ("tcp", "ipc"):
        raise ConfigError(f"scheme must be 'tcp' or 'ipc', not {scheme!r}")
    if scheme == "ipc" and not (directory and Path(directory).is_dir()):
        raise ConfigError(f"scheme 'ipc' needs an existing directory for its sockets, not {directory!r}")
    if scheme == "tcp":
        check_tcp(host, control_port)
    if io_threads < 1:
        raise ConfigError(f"io_threads must be at least 1, not {io_threads}")
    if not all(region.host for region in host.layout.regions):
        raise ConfigError("transport 'zmq' needs host memory; some buffers of the layout are on a device")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads)
    make_room(host, context)
    try:
        what, port = ("control", control_port) if host.role == "prefill" else ("data", 0)
        most = wire.FRAME_BYTES_MAX if what == "control" else SEGMENT_BYTES_MAX
        folder = directory if scheme == "ipc" else ""
        router, endpoint = bind_router(host, context, what, port, message_bytes_max=most, directory=folder)
    except ConfigError:
        context.term()
        raise
    control_router, data_router = (router, None) if what == "control" else (None, router)
    control = ZmqControl(host, context, control_router, endpoint if what == "control" else "")
    data = ZmqData(host, context, data_router, endpoint if what == "data" else "")

    def close(linger_ms: int) -> None:
        control.close(linger_ms)
        data.close()
        context.term()  # returns once what lingers has left or its time is over
        if scheme == "ipc":  # ZeroMQ leaves the file of a socket that was bound by name
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    return Transport("zmq", control, data, close, reach="hosts" if scheme == "tcp" else "host")
