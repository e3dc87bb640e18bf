"""Page bytes by Mooncake's transfer engine, control over ZeroMQ.

The writer's engine places bytes in the memory that the reader's registered: over TCP, RDMA or what else Mooncake was built for.
Peers find each other by the library's own handshake, without a metadata server. See docs/transports.md for what is promised.
"""

from __future__ import annotations

from pd_fsm.errors import ConfigError
from pd_fsm.kv.registration import AddressTable, blocks_to_register
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.runtime.zmq_control import check_tcp, tcp_control
from pd_fsm.transports.mooncake_data import MooncakeData
from pd_fsm.transports.mooncake_engine import Engine
from pd_fsm.transports.mooncake_peer import pack
from pd_fsm.transports.mooncake_writer import Writer

RESIDUAL_MS = 1_000.0
STALL_MS = 30_000.0
WORKERS = 4


def create(
    host: Host,
    protocol: str = "tcp",
    devices: str = "",
    engine_name: str = "",
    residual_ms: float = RESIDUAL_MS,
    stall_ms: float = STALL_MS,
    workers: int = WORKERS,
    control_port: int = 0,
) -> Transport:
    """The Mooncake transport.

    `protocol` is one that the installed build has ("tcp", "rdma", "ascend" ...), the same on both sides; `devices` names network
    devices to Mooncake, separated by commas. `engine_name` replaces the session's host as the engine's name, for protocols that
    want more in it (ascend: "ip:port:npu_0"). `residual_ms` bounds how long bytes on the way may still land after their connection
    was closed. A write that does not end for `stall_ms` is reported as unknown. `workers` threads work for all writes.

    Raises ConfigError for what cannot work and MissingDependency without the library.
    """
    check_tcp(host, control_port)
    if residual_ms < 0:
        raise ConfigError(f"residual_ms must not be negative, got {residual_ms}")
    if stall_ms <= 0:
        raise ConfigError(f"stall_ms must be positive, got {stall_ms}")
    if workers < 2:
        raise ConfigError(f"workers must be at least 2, not {workers}: one may be waiting for a peer that does not answer")
    blocks = blocks_to_register(host.layout)

    def make_engine() -> Engine:
        return Engine(engine_name or host.address, protocol, devices, blocks)

    writer, engine, descriptor = None, None, b""
    if host.role == "prefill":
        writer = Writer(host, protocol, make_engine, residual_ms=residual_ms, stall_ms=stall_ms, workers=workers)
    else:
        engine = make_engine()
        descriptor = pack(protocol, host.address, engine.port, AddressTable.of(host.layout))
    data = MooncakeData(host, writer, engine, descriptor, residual_ms=residual_ms, workers=workers)
    try:
        control, close_control = tcp_control(host, control_port)
    except BaseException:
        data.close()
        raise

    def close(linger_ms: int) -> None:
        data.close()
        close_control(linger_ms)

    return Transport("mooncake", control, data, close, figures=data.figures)
