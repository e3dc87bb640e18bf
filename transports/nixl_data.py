"""The NIXL data plane of one session: what its driver calls, and the thread that lets the library work.

A post may take as long as its copy, so the writing side has a thread. Whoever holds `_busy` uses the agent and the writer. The
driver only tries to take it, for small writes while nothing else is going on, and never waits for it; everything else reaches the
thread as a command. With nothing outstanding the thread sleeps; with something it looks often, then less often.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from pd_fsm.core import events as ev
from pd_fsm.kv import Plan
from pd_fsm.runtime.transport import Host
from pd_fsm.transports.nixl_agent import Agent
from pd_fsm.transports.nixl_memory import agent_incarnation
from pd_fsm.transports.nixl_writer import Writer

logger = logging.getLogger("pd_fsm.transports.nixl")

SPINS = 64
"""Looks at what is outstanding before the thread sleeps between them, longer each time up to POLL_S_MAX."""
POLL_S_STEP = 20e-6
POLL_S_MAX = 20e-3
CLOSE_S = 2.0
"""How long what is posted may take to end when the session closes."""


class NixlData:
    """Methods are called by whoever drives the session; none waits. `writer` is None on the side that is written to."""

    notifies = False  # that a notice has reached the peer's session is never known here, so the control plane always says it, too

    def __init__(
        self, host: Host, agent: Agent, writer: Writer | None, descriptor: bytes, *, residual_ms: float, notifications: bool
    ) -> None:
        self.descriptor = descriptor
        self.residual_ms = residual_ms
        self._host = host
        self._agent = agent
        self._writer = writer
        self._notifications = notifications
        self._exposed: set[int] = set()
        self._notices = 0
        self._busy = threading.Lock()
        self._wake = threading.Event()
        self._commands: deque[Callable[[Writer], None]] = deque()
        self._thread: threading.Thread | None = None
        self._close_at = 0.0

    # --- the side that is written to -------------------------------------------------------------------------------------

    def expose(self, grant: ev.Expose) -> None:
        if self._notifications:
            if not self._exposed:
                self._host.reactor.add_check(self._take_notices)
            self._exposed.add(grant.generation)

    def revoke(self, generation: int) -> bool:
        self._exposed.discard(generation)
        return False  # bytes land without this side's doing; not even deregistration keeps them out

    def _take_notices(self) -> bool:
        """While anything is exposed: hand the writers' notices to the session. True when it is over."""
        for name, notices in self._agent.progress().items():
            for notice in notices:
                self._notices += 1
                self._host.deliver(notice, agent_incarnation(name))
        return not self._exposed

    # --- the side that writes --------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        if self._writer is not None:
            self._tell(lambda writer: writer.begin_lane(peer, descriptor))

    def peer_down(self, peer: bytes) -> None:
        if self._writer is not None:
            self._tell(lambda writer: writer.end_lane(peer))

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        assert self._writer is not None, "only prefill writes"
        notice = notice if self._notifications else b""
        if not self._commands and self._busy.acquire(blocking=False):
            try:
                done = self._writer.write_now(op, peer, generation, plan, notice)
                idle = self._writer.idle()
            finally:
                self._busy.release()
            if done:
                if not idle:
                    self._wake_thread()
                return
        self._tell(lambda writer: writer.begin_write(op, peer, generation, plan, notice))

    def cancel(self, op: int) -> None:
        assert self._writer is not None, "only prefill writes"
        self._tell(lambda writer: writer.cancel(op))

    def _tell(self, command: Callable[[Writer], None]) -> None:
        self._commands.append(command)
        self._wake_thread()

    def _wake_thread(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"pd-fsm-nixl-{self._host.name}", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        assert self._writer is not None
        idle_looks = 0
        while True:
            self._wake.clear()
            with self._busy:
                if self._close_at:
                    self._writer.halt()
                worked = self._safe_round(self._writer)
                idle, timeout_s = self._writer.idle(), self._writer.settles_in_s()
                if self._close_at and (idle or time.monotonic() >= self._close_at):
                    self._writer.abandon()
                    self._agent.close()
                    return
            idle_looks = 0 if worked else idle_looks + 1
            if worked:
                continue
            if idle:
                self._wake.wait(timeout_s)
            elif idle_looks < SPINS:
                time.sleep(0)
            else:
                self._wake.wait(min(POLL_S_STEP * (idle_looks - SPINS + 1), POLL_S_MAX))

    def _safe_round(self, writer: Writer) -> bool:
        """A round that no bug can turn into the end of the thread: it is told loudly, and its rooms meet their deadlines."""
        try:
            worked = False
            while self._commands:
                worked = True
                self._commands.popleft()(writer)
            return writer.round() or worked
        except Exception:
            logger.exception("%s: the NIXL writer met an unexpected error and goes on", self._host.name)
            return False

    # --- both ------------------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, int]:
        """Counters since the session began, for people and metrics."""
        return {"notices": self._notices} if self._writer is None else self._writer.figures()

    def close(self) -> None:
        """Post nothing more, let what is posted end for at most CLOSE_S, then destroy the agent. Idempotent."""
        if self._close_at:
            return
        self._close_at = time.monotonic() + CLOSE_S
        self._exposed.clear()
        if self._thread is None:
            self._agent.close()
            return
        self._wake.set()
        self._thread.join(2 * CLOSE_S)
        if self._thread.is_alive():
            logger.error("%s: NIXL did not return within %s s; its thread is left behind", self._host.name, 2 * CLOSE_S)
