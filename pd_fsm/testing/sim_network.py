"""The simulated control plane: connections between processes, and a network that loses, copies, delays, reorders and cuts.

A connection is dialled to an address. Whoever listens there now answers on it, also a successor of the process that was meant; what
a killed process had handed over still arrives. It must never decide anything: frames go in, frames and broken connections come
out.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.testing.sim_agenda import Action, Agenda
from pd_fsm.testing.sim_schedule import BASE_MS, Fates

if TYPE_CHECKING:
    from pd_fsm.testing.sim_process import Process
    from pd_fsm.testing.simulator import Simulation

PROBE_MS = 300  # between two attempts to connect anew
NOTICE_MS = 100  # within which a broken connection is noticed
OLD_FRAMES_MAX = 200


@attrs.define(eq=False)
class Connection:
    """`dialer` connected to `address`, where it expects `peer`."""

    dialer: Process
    peer: bytes
    address: str


class Network:
    """All connections. `cuts` is until when nothing passes from an address to another one."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self._agenda: Agenda = world.agenda
        self._fates: Fates = world.fates
        self.cuts: dict[tuple[str, str], float] = {}
        self._old: dict[str, deque[tuple[bytes, bytes]]] = {}

    # --- cuts ------------------------------------------------------------------------------------------------------------

    def cut(self, source: str, target: str, for_ms: float) -> None:
        self.cuts[source, target] = max(self.cut_until(source, target), self._agenda.now_ms + for_ms)

    def cut_until(self, source: str, target: str) -> float:
        """When the way is open again; in the past if it is."""
        return self.cuts.get((source, target), 0.0)

    # --- frames ----------------------------------------------------------------------------------------------------------

    def send(self, process: Process, peer: bytes, frame: bytes) -> None:
        """A frame of `process` to `peer`: on the connection that it dialled, or on the one that the peer did."""
        _, destination, message = wire.decode(frame)
        kind, room = type(message).__name__, getattr(message, "room", 0)
        self._world.fabric.check_claim(process, destination, message)
        dialled, accepted = process.dialled.get(peer), process.accepted.get(peer)
        if dialled is not None:
            self._carry(process.address, dialled.address, kind, room, lambda: self._to_listener(dialled, frame))
        elif accepted is not None:
            self._carry(process.address, accepted.dialer.address, kind, room, lambda: self._to_dialer(accepted, frame))
        else:
            process.emit(ev.PeerUnreachable(peer, "there is no connection"))

    def _carry(self, source: str, target: str, kind: str, room: int, arrive: Action) -> None:
        fate = self._fates.frame(source, target, kind, room)
        what = f"{source} -> {target} {kind}" + (f" of room {room}" if room or kind in _OF_ROOMS else "")

        def come() -> None:
            until = self.cut_until(source, target)
            if until <= self._agenda.now_ms:
                self._agenda.note(what)
                arrive()
            elif self._world.options.cut_holds:
                self._agenda.at(until + BASE_MS, come)
            else:
                self._agenda.note(f"{what}: lost in the partition")

        if fate.lost:
            self._agenda.note(f"{what}: lost")
        else:
            self._agenda.after(BASE_MS + fate.delay_ms, come)
        if fate.copy_ms >= 0:
            self._agenda.after(BASE_MS + fate.delay_ms + fate.copy_ms, come)

    def _to_listener(self, connection: Connection, frame: bytes) -> None:
        listener, via = self._world.listening(connection.address), connection.dialer.incarnation
        self._old.setdefault(connection.address, deque(maxlen=OLD_FRAMES_MAX)).append((frame, via))
        if listener is not None:
            if not connection.dialer.dead:
                listener.accepted[via] = connection
            listener.deliver(frame, via)

    def _to_dialer(self, connection: Connection, frame: bytes) -> None:
        dialer = connection.dialer
        self._old.setdefault(dialer.address, deque(maxlen=OLD_FRAMES_MAX)).append((frame, connection.peer))
        if dialer.dialled.get(connection.peer) is connection:
            dialer.deliver(frame, connection.peer)

    def garbage(self, process: Process, salt: int) -> None:
        """Bytes that no session sends now: noise, a broken frame, or one of long ago."""
        old = self._old.get(process.address)
        kind, which = salt % 8, salt // 8
        if kind == 0 or not old:
            process.deliver(which.to_bytes(8, "little") * (which % 9), b"")
            return
        frame, via = old[which % len(old)]
        process.deliver(frame[: which % len(frame)] if kind == 1 else frame, via)

    # --- connections -----------------------------------------------------------------------------------------------------

    def dial(self, process: Process, peer: bytes, address: str) -> None:
        connection = process.dialled[peer] = Connection(process, peer, address)
        if self._world.listening(address) is None:
            self._notice(connection, established=False)

    def went_down(self, process: Process) -> None:
        """The process at an address is gone: its connections break."""
        for other in self._world.running():
            other.accepted.pop(process.incarnation, None)
            for connection in list(other.dialled.values()):
                if connection.address == process.address:
                    self._notice(connection, established=True)

    def heal(self) -> None:
        """No way is cut any more, and who looks finds out who is not there."""
        self.cuts.clear()
        for process in self._world.running():
            for connection in process.dialled.values():
                if self._world.listening(connection.address) is None:
                    self._notice(connection, established=False)

    def _notice(self, connection: Connection, *, established: bool) -> None:
        if self._world.options.notices_death or self._fates.healed:
            delay_ms = NOTICE_MS * self._fates.one("notice", connection.dialer.address, connection.address)
            self._agenda.after(delay_ms, lambda: self._probe(connection, established))

    def _probe(self, connection: Connection, established: bool) -> None:
        """What a dialer finds out when it looks: broken, refused, or somebody listens (again)."""
        dialer = connection.dialer
        if dialer.dead or dialer.dialled.get(connection.peer) is not connection:
            return
        there, here = connection.address, dialer.address
        open_at_ms = max(self.cut_until(here, there), self.cut_until(there, here))
        if open_at_ms > self._agenda.now_ms:
            self._agenda.at(open_at_ms + BASE_MS, lambda: self._probe(connection, established))
            return
        if established:
            dialer.emit(ev.PeerUnreachable(connection.peer, f"the connection to {there} broke"))
        if self._world.listening(connection.address) is None:
            self._agenda.note(f"{dialer.node} finds that nobody listens at {there}")
            dialer.emit(ev.PeerUnreachable(connection.peer, f"nobody listens at {there}", dead=True))
            self._agenda.after(PROBE_MS, lambda: self._probe(connection, False))


_OF_ROOMS = ("Offer", "Accepted", "Computed", "Part", "Verdict", "VerdictAck", "Abort", "Drained", "DrainedAck")
