"""The only loop of a session: drains the inbox, steps the core, executes its effects, sleeps until the next deadline.

It runs on its own thread, or inside the engine's loop (`progress`), or both: a try-lock decides who drives. The core's lock is
held for one step at a time and never across I/O, so the engine's calls (`call`) wait for a step at the most. Adapters and their
threads only append to the inbox.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.session import SessionCore
from pd_fsm.errors import WireError
from pd_fsm.kv import KVLayout, make_plan
from pd_fsm.machines import Phase
from pd_fsm.runtime.board import PollBoard
from pd_fsm.runtime.clock import now_ms
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.rendezvous import Rendezvous
from pd_fsm.runtime.trace import TraceWriter
from pd_fsm.runtime.transport import Transport

logger = logging.getLogger("pd_fsm")

IDLE_WAIT_MS_MAX = 1_000.0
DEADLINE_LATE_MS_MAX = 20.0
"""How long deadlines give way to events that keep arriving."""
DRIVE_LOCK_WAIT_S = 0.005
"""How long the thread waits while the engine drives, before it looks again."""


class Driver:
    """Drives one core. `call`, `emit`, `deliver` and `progress` may be used from any thread."""

    def __init__(
        self,
        core: SessionCore,
        layout: KVLayout,
        board: PollBoard,
        reactor: Reactor,
        trace: TraceWriter | None,
        clock_ms: Callable[[], float] = now_ms,
    ) -> None:
        self.core = core
        self.clock_ms = clock_ms
        self.lock = threading.Lock()
        self.concluded = threading.Condition()
        self._layout = layout
        self._board = board
        self._reactor = reactor
        self._trace = trace
        self._transport: Transport  # from `attach`, before anything is driven
        self._rendezvous: Rendezvous
        self._inbox: deque[ev.Event | tuple[bytes, bytes]] = deque()
        self._effects: deque[ev.Effect] = deque()
        self._drive_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wire_errors = 0
        self._deadlines_seen_ms = 0.0

    def attach(self, transport: Transport, rendezvous: Rendezvous) -> None:
        self._transport = transport
        self._rendezvous = rendezvous

    # --- from any thread -------------------------------------------------------------------------------------------------

    def call(self, event: ev.Event) -> None:
        """One local event, now. Raises LocalProtocolError. No I/O: its effects are executed by whoever drives."""
        with self.lock:
            self.apply(self.core.step(event, self.clock_ms()))
        self._reactor.wake()

    def emit(self, event: ev.Event) -> None:
        self._inbox.append(event)
        self._reactor.wake()

    def deliver(self, frame: bytes, via: bytes = b"") -> None:
        self._inbox.append((frame, via))
        self._reactor.wake()

    def transport_figures(self) -> dict[str, int]:
        """What the transport counts."""
        return dict(self._transport.figures())

    # --- driving ---------------------------------------------------------------------------------------------------------

    def start_thread(self) -> None:
        name = f"pd-fsm-{self.core.identity.name or self.core.identity.role}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def threaded(self) -> bool:
        return self._thread is not None

    def progress(self, rounds_max: int = 16) -> bool:
        """Do what there is to do, bounded and without blocking. False when there was nothing, or somebody else drives."""
        if not self._drive_lock.acquire(blocking=False):
            return False
        try:
            worked = False
            for _ in range(rounds_max):
                if not self._safe_round():
                    break
                worked = True
            return worked
        finally:
            self._drive_lock.release()

    def wait(self, timeout_ms: float) -> None:
        """Sleep until there is something to drive, at most `timeout_ms`."""
        with self.lock:
            deadline = self.core.deadline()
        if deadline is not None:
            timeout_ms = min(timeout_ms, deadline - self.clock_ms())
        self._reactor.wait(timeout_ms, self._has_work)

    def stop_thread(self, timeout_s: float) -> bool:
        """End the thread. False when it did not within the time (a transport blocks, which none may)."""
        self._stopping = True
        thread, self._thread = self._thread, None
        if thread is None or thread is threading.current_thread():
            return True
        while thread.is_alive() and timeout_s > 0:
            self._reactor.wake()
            thread.join(min(timeout_s, 0.05))
            timeout_s -= 0.05
        self._stopping = thread.is_alive()  # from now on only a thread that did not end has to be told, and `wait` sleeps again
        return not self._stopping

    def retire(self, timeout_s: float) -> None:
        """Nobody drives from now on: whoever tries finds that somebody else does. The planes can be closed."""
        self._drive_lock.acquire(timeout=timeout_s)

    def _has_work(self) -> bool:
        return bool(self._inbox or self._effects or self._stopping)

    def _run(self) -> None:
        while not self._stopping:
            self.wait(IDLE_WAIT_MS_MAX)
            if not self._drive_lock.acquire(timeout=DRIVE_LOCK_WAIT_S):
                continue  # the engine drives
            try:
                while self._safe_round() and not self._stopping:
                    pass
            finally:
                self._drive_lock.release()

    def _safe_round(self) -> bool:
        """A round that no bug of ours or of a transport can turn into the end of the driver: it is told loudly, the event or
        effect that met it is lost, and the rooms that hang on it meet their deadlines."""
        try:
            return self._round()
        except Exception:
            logger.exception("%s: the driver met an unexpected error and goes on", self.core.identity.name)
            with self.lock:
                self.core.counts["driver_error"] += 1
            return True

    def _round(self) -> bool:
        """Everything that is there now, once: sockets, inbox, effects, deadlines; completions before timeouts."""
        worked = self._reactor.dispatch()
        inbox = self._inbox
        for _ in range(len(inbox)):
            worked = True
            self._take(inbox.popleft())
        now = self.clock_ms()
        # What has arrived comes before what ran out, but a stream that never ends must not stop the clock.
        if not worked or now >= self._deadlines_seen_ms + DEADLINE_LATE_MS_MAX:
            self._deadlines_seen_ms = now
            with self.lock:
                deadline = self.core.deadline()
                if deadline is not None and deadline <= now:
                    self.apply(self.core.expire(now))
        effects = self._effects
        while effects:
            worked = True
            self._execute(effects.popleft())
        if self._trace is not None:
            self._trace.flush()
        return worked

    def _take(self, item: ev.Event | tuple[bytes, bytes]) -> None:
        if isinstance(item, tuple):
            frame, via = item
            try:
                source, destination, message = wire.decode(frame)
            except WireError as error:
                self._wire_error(error)
                return
            item = ev.Received(source, destination, message, via)
        with self.lock:
            self.apply(self.core.step(item, self.clock_ms()))

    def _wire_error(self, error: WireError) -> None:
        self._wire_errors += 1
        count = self._wire_errors
        with self.lock:
            self.core.counts["wire_error"] = count
        if count & (count - 1) == 0:  # a peer that sends only garbage must not fill the log
            logger.warning("%s: dropped a malformed frame (%d so far): %s", self.core.identity.name, count, error)

    def apply(self, effects: list[ev.Effect]) -> None:
        """Under the lock: show phases at once, queue the rest in order."""
        ended = False
        for effect in effects:
            if type(effect) is ev.Publish:
                self._board.publish(effect.generation, effect.phase)
                ended = ended or effect.phase in (Phase.SUCCESS, Phase.FAILED)
            else:
                self._effects.append(effect)
        if ended:
            with self.concluded:
                self.concluded.notify_all()

    def _execute(self, effect: ev.Effect) -> None:
        _EXECUTE[type(effect)](self, effect)

    def _send(self, effect: ev.Send) -> None:
        self._transport.control.send(effect.peer, wire.encode(self.core.identity.incarnation, effect.peer, effect.message))

    def _submit(self, effect: ev.Submit) -> None:
        plan = make_plan(self._layout, effect.copies, effect.aux)
        notice = wire.encode(self.core.identity.incarnation, effect.peer, effect.notice)
        try:
            self._transport.data.submit(effect.op, effect.peer, effect.generation, plan, notice)
        except Exception as error:  # the transport's bug: how far it came is not known, so neither is the outcome
            logger.exception("%s: transport %s failed in submit", self.core.identity.name, self._transport.name)
            self.emit(ev.WriteUnknown(effect.op, f"transport {self._transport.name} raised {error!r}"))

    def _cancel(self, effect: ev.Cancel) -> None:
        self._transport.data.cancel(effect.op)

    def _expose(self, effect: ev.Expose) -> None:
        self._transport.data.expose(effect)

    def _revoke(self, effect: ev.Revoke) -> None:
        if self._transport.data.revoke(effect.generation):
            self.emit(ev.Revoked(effect.generation))

    def _connect(self, effect: ev.Connect) -> None:
        self._transport.control.connect(effect.peer, effect.endpoint)

    def _disconnect(self, effect: ev.Disconnect) -> None:
        self._transport.control.disconnect(effect.peer)

    def _peer_up(self, effect: ev.PeerUp) -> None:
        self._transport.data.peer_up(effect.peer, effect.greeting.data)

    def _peer_down(self, effect: ev.PeerDown) -> None:
        self._transport.data.peer_down(effect.peer)

    def _lookup(self, effect: ev.Lookup) -> None:
        self._rendezvous.lookup(effect.query, effect.address, effect.room, effect.dp_rank)

    def _announce(self, effect: ev.Announce) -> None:
        self._rendezvous.announce(effect.room, self.core.identity.topology.dp_rank)

    def _release(self, effect: ev.ReleasePages) -> None:
        """Nothing to do: the lease that the engine's handle reads says so already."""


_EXECUTE: dict[type, Callable[[Driver, Any], None]] = {
    ev.Send: Driver._send,  # noqa: SLF001 - the class's own table
    ev.Submit: Driver._submit,  # noqa: SLF001
    ev.Cancel: Driver._cancel,  # noqa: SLF001
    ev.Expose: Driver._expose,  # noqa: SLF001
    ev.Revoke: Driver._revoke,  # noqa: SLF001
    ev.Connect: Driver._connect,  # noqa: SLF001
    ev.Disconnect: Driver._disconnect,  # noqa: SLF001
    ev.PeerUp: Driver._peer_up,  # noqa: SLF001
    ev.PeerDown: Driver._peer_down,  # noqa: SLF001
    ev.Lookup: Driver._lookup,  # noqa: SLF001
    ev.Announce: Driver._announce,  # noqa: SLF001
    ev.ReleasePages: Driver._release,  # noqa: SLF001
}
