"""Page bytes by NIXL, control over ZeroMQ.

The writer's agent places bytes in the memory that the other side registered; which hardware does it is up to NIXL and its back end:
UCX takes RDMA, TCP or, between processes of one machine, CMA. See docs/transports.md for what is promised and what is not.
"""

from __future__ import annotations

from collections.abc import Mapping

from pd_fsm.errors import ConfigError
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.runtime.zmq_control import tcp_control
from pd_fsm.transports.nixl_agent import Agent
from pd_fsm.transports.nixl_data import NixlData
from pd_fsm.transports.nixl_memory import MEMS, agent_name, local_memory, pack_descriptor
from pd_fsm.transports.nixl_writer import Writer

PROGRESS_MS = 10.0
RESIDUAL_MS = 1_000.0


def create(
    host: Host,
    backend: str = "UCX",
    backend_options: Mapping[str, str] | None = None,
    notifications: bool = False,
    telemetry: bool = False,
    residual_ms: float = RESIDUAL_MS,
    progress_ms: float = PROGRESS_MS,
    secret: str = "",
    control_port: int = 0,
) -> Transport:
    """The NIXL transport.

    `backend` is a NIXL plug-in that can write to other agents, made with `backend_options` (UCX: `device_list`, `num_threads`,
    `engine_config`, for example "TLS=tcp"). `notifications` sends each operation's notice with its bytes, as well as over the
    control plane. `telemetry` has NIXL time each transfer. `residual_ms` bounds how long the network may still deliver what a
    process handed over before its connection ended. `progress_ms` is how often decode's agent looks around by itself when nothing
    wakes it. With a `secret`, the same on both sides, only sessions that know it can make NIXL read their metadata.

    Raises ConfigError for what cannot work and MissingDependency without the library.
    """
    if residual_ms < 0:
        raise ConfigError(f"residual_ms must not be negative, got {residual_ms}")
    if progress_ms < 1:
        raise ConfigError(f"progress_ms must be at least 1, not {progress_ms}: below, NIXL's thread never sleeps")
    memory = local_memory(host.layout)
    writes, key = host.role == "prefill", secret.encode()
    agent = Agent(agent_name(host.incarnation), backend, backend_options or {}, 0.0 if writes else progress_ms, telemetry)
    try:
        for kind, mem in enumerate(MEMS):
            if (memory.mem == kind).any():
                if mem not in agent.mems:
                    raise ConfigError(f"NIXL's back end {backend!r} takes {', '.join(agent.mems)}, and the layout has {mem} memory")
                agent.register(mem, memory.blocks(host.layout, kind))
        writer = Writer(host, agent, memory, secret=key, residual_ms=residual_ms) if writes else None
        descriptor = (
            b"" if writes else pack_descriptor(host.incarnation, agent.metadata(), agent.probe_address, memory, secret.encode())
        )
        control, close_control = tcp_control(host, control_port)
    except BaseException:
        agent.close()
        raise
    data = NixlData(host, agent, writer, descriptor, residual_ms=residual_ms, notifications=notifications)

    def close(linger_ms: int) -> None:
        data.close()
        close_control(linger_ms)

    return Transport("nixl", control, data, close, figures=data.figures)
