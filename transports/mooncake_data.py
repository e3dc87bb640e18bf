"""The Mooncake data plane of one session: what its driver calls, and the few threads that work for its writes.

The driver only queues; no call of it waits for the library. The threads are started with the first write, and sleep while nothing
is outstanding.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from pd_fsm.core import events as ev
from pd_fsm.kv import Plan
from pd_fsm.runtime.transport import Host
from pd_fsm.transports.mooncake_engine import Engine
from pd_fsm.transports.mooncake_writer import Writer

logger = logging.getLogger("pd_fsm.transports.mooncake")

CLOSE_S = 2.0
"""How long what is on its way may take to end when the session closes."""


class MooncakeData:
    """Methods are called by whoever drives the session. Exactly one of `writer` (prefill) and `engine` (decode) is given."""

    notifies = False  # the library can send a notice with a batch only in a call that spins until it is over

    def __init__(
        self, host: Host, writer: Writer | None, engine: Engine | None, descriptor: bytes, *, residual_ms: float, workers: int
    ) -> None:
        self.descriptor = descriptor
        self.residual_ms = residual_ms
        self._host = host
        self._writer = writer
        self._engine = engine
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._closed = False

    # --- the side that is written to -------------------------------------------------------------------------------------

    def expose(self, grant: ev.Expose) -> None:
        """The memory is registered for as long as the session lives."""

    def revoke(self, generation: int) -> bool:  # noqa: ARG002
        """Bytes land without this side's doing."""
        return False

    # --- the side that writes --------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        if self._writer is not None:
            self._writer.begin_lane(peer, descriptor)

    def peer_down(self, peer: bytes) -> None:
        if self._writer is not None:
            self._writer.end_lane(peer)

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:  # noqa: ARG002
        assert self._writer is not None, "only prefill writes"
        while len(self._threads) < self._workers:
            name = f"pd-fsm-mooncake-{self._host.name}-{len(self._threads)}"
            self._threads.append(threading.Thread(target=self._run, args=(self._writer,), name=name, daemon=True))
            self._threads[-1].start()
        self._writer.begin_write(op, peer, generation, plan)

    def cancel(self, op: int) -> None:
        assert self._writer is not None, "only prefill writes"
        self._writer.cancel(op)

    def _run(self, writer: Writer) -> None:
        job: Callable[[], None] | None
        while (job := writer.take()) is not None:
            try:
                job()
            except Exception:  # a bug: it is told loudly, and the rooms that hang on it meet their deadlines
                logger.exception("%s: a Mooncake worker met an unexpected error and goes on", self._host.name)

    # --- both ------------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, int]:
        """Counters since the session began, for people and metrics."""
        return {} if self._writer is None else self._writer.figures()

    def close(self) -> None:
        """Submit nothing more, let what is on its way end for at most CLOSE_S, then destroy the engine. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.close()
        if self._writer is None:
            return
        if self._writer.halt(CLOSE_S):
            self._writer.close()
        else:
            logger.error("%s: Mooncake did not return within %s s; its engine is left behind", self._host.name, 2 * CLOSE_S)
        for thread in self._threads:
            thread.join(CLOSE_S)
