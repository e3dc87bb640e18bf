"""The simulated way to a real rendezvous: slow, or down for a while. The tables behind it are those of `LocalRendezvous`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pd_fsm.core.events import LookupFailed, PeerRecord, RegistrationFailed
from pd_fsm.runtime.rendezvous import Emit, LocalRendezvous

if TYPE_CHECKING:
    from pd_fsm.testing.sim_process import Process
    from pd_fsm.testing.simulator import Simulation

ADDRESS = "sim"
RETRY_MS = 100
LEAVE_S = 10.0


class SlowRendezvous:
    """One rendezvous. `down_until_ms`: it answers nobody before."""

    def __init__(self, world: Simulation) -> None:
        self.world = world
        self.down_until_ms = 0.0
        self.tables = LocalRendezvous(lambda: world.agenda.now_ms)

    @property
    def down(self) -> bool:
        return self.world.agenda.now_ms < self.down_until_ms


class Client:
    """One process' client (`pd_fsm.runtime.rendezvous.Rendezvous`). A killed process stays registered until its successor comes."""

    def __init__(self, server: SlowRendezvous, process: Process) -> None:
        self._server = server
        self._world = server.world
        self._process = process
        self._record: PeerRecord | None = None
        self.registered = process.role == "decode"  # which has nothing to register
        self._left = threading.Event()

    def start(self, emit: Emit) -> None:
        """Its answers come through the process, which may be stopped or dead by then."""

    def register(self, record: PeerRecord) -> None:
        self._record = record
        if self._server.down:
            self._process.emit(RegistrationFailed("the rendezvous does not answer"))
        self._try_register(self._server.down)

    def _try_register(self, failed: bool) -> None:
        if self._process.dead or self._left.is_set():
            return
        if self._server.down:
            self._world.agenda.after(RETRY_MS, lambda: self._try_register(True))
            return
        assert self._record is not None
        self._server.tables.register(ADDRESS, self._record)
        self.registered = True
        if failed:
            self._process.emit(RegistrationFailed(""))

    def announce(self, room: int, dp_rank: int) -> None:
        def arrive() -> None:
            if self._server.down:
                self._world.agenda.after(RETRY_MS, arrive)
            else:
                self._server.tables.announce(ADDRESS, room, dp_rank)

        self._world.agenda.after(self._delay_ms(), arrive)

    def lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:  # noqa: ARG002 - there is one server
        def arrive() -> None:
            if self._server.down:
                self._process.emit(LookupFailed(query, "the rendezvous does not answer"))
                return
            answer = self._server.tables.find(query, ADDRESS, room, dp_rank)
            self._world.agenda.after(self._delay_ms(), lambda: self._process.emit(answer))

        self._world.agenda.after(self._delay_ms(), arrive)

    def close(self, timeout_s: float = 1.0) -> None:  # noqa: ARG002 - the protocol's
        """Called by the session's own helper thread, too: what follows from it happens in `leave`, in the simulation's time."""
        self._left.set()

    def wait_left(self) -> None:
        """The session asked, on a thread of its own, to be taken out."""
        assert self._left.wait(LEAVE_S), "begin_drain() did not leave the rendezvous"
        self.leave()

    def leave(self) -> None:
        if self._record is not None and not self._server.down:  # nobody asks a second time: then it stays listed
            self._server.tables.remove(ADDRESS, self._record)
        self._record = None

    def _delay_ms(self) -> float:
        return self._world.options.rendezvous_ms * self._world.fates.one("rendezvous", self._process.node)
