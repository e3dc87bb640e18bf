"""A transport without a peer: it plays the other side of every room, bootstrap included, and moves no byte.

For warm-up and health requests, for engine tests, and for measuring the session layer alone. Each room follows a `Script`: how
long each answer takes, and whether the room succeeds, is failed, is aborted, or meets silence, and in which phase. The session
under it is the real one: everything the script does arrives as the messages and outcomes that a real peer would cause.
"""

from __future__ import annotations

import heapq
import secrets
from collections.abc import Callable
from typing import Any

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import spaces
from pd_fsm.errors import ConfigError, WireError
from pd_fsm.kv import Plan
from pd_fsm.machines import Phase
from pd_fsm.runtime.rendezvous import Emit
from pd_fsm.runtime.transport import Host, Transport

ENDS = ("success", "fail", "abort", "silence")


@attrs.frozen(kw_only=True)
class Script:
    """What the other side does with one room.

    Every answer takes `delay_ms`. `end` is "success", or what happens in phase `at` instead: "fail" (the other side fails, in
    BOOTSTRAPPING it is gone), "abort" (its engine gives the room up) or "silence" (nothing more comes; the deadlines decide).
    """

    delay_ms: float = 0.0
    end: str = attrs.field(default="success", validator=attrs.validators.in_(ENDS))
    at: Phase = attrs.field(default=Phase.TRANSFERRING, converter=Phase)
    reason: str = "as scripted"

    def ends_in(self, phase: Phase) -> str:
        """How the room ends in `phase`, "" when it goes on."""
        return self.end if self.end != "success" and self.at == phase else ""


class FakePeer:
    """Control plane, data plane and rendezvous of one session, and the peer that it believes to talk to."""

    notifies = True
    residual_ms = 0.0
    descriptor = b""
    endpoint = "fake://"

    def __init__(self, host: Host, script: Callable[[int], Script]) -> None:
        self._host = host
        self._script = script
        self._self = b"F" + secrets.token_bytes(15)
        self._greeted = False
        self._generation = 0
        self._rooms: dict[int, tuple[bytes, int]] = {}  # by generation on the wire: the peer that plays it, and the room
        self._doomed: set[bytes] = set()  # peers that are gone when they are connected to
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._checking = False
        self._emit: Emit = host.emit
        everything = spaces(host.layout.infos())
        self._all_pages = {space: wire.pack_pages(range(pages)) for space, (_, pages) in everything.items()}
        self._has_aux = bool(host.layout.aux_spaces())

    # --- time ------------------------------------------------------------------------------------------------------------

    def _after(self, delay_ms: float, action: Callable[[], None]) -> None:
        if delay_ms <= 0:
            action()
            return
        self._sequence += 1
        heapq.heappush(self._later, (self._host.clock_ms() + delay_ms, self._sequence, action))
        if not self._checking:
            self._checking = True
            self._host.reactor.add_check(self._run_due)

    def _run_due(self) -> bool:
        while self._later and self._later[0][0] <= self._host.clock_ms():
            heapq.heappop(self._later)[2]()
        self._checking = bool(self._later)
        return not self._checking

    def _say(self, peer: bytes, message: wire.Message) -> None:
        self._host.deliver(wire.encode(peer, self._host.incarnation, message), peer)

    # --- rendezvous ------------------------------------------------------------------------------------------------------

    def start(self, emit: Emit) -> None:
        self._emit = emit

    def register(self, record: ev.PeerRecord) -> None:
        """Nobody else looks."""

    def lookup(self, query: int, address: str, room: int, dp_rank: int | None) -> None:  # noqa: ARG002 - always the same peer
        script = self._script(room)
        ending = script.ends_in(Phase.BOOTSTRAPPING)
        if ending == "silence":
            return
        peer = self._self
        if ending:  # a peer of its own, so that its end costs no other room
            peer = b"G" + secrets.token_bytes(15)
            self._doomed.add(peer)
        record = ev.PeerRecord(peer, self.endpoint, "fake prefill", dp_size=2)  # several, so that every room is looked up
        self._after(script.delay_ms, lambda: self._emit(ev.PeersFound(query, (record,))))

    def announce(self, room: int, dp_rank: int) -> None:  # noqa: ARG002
        """The session opened a room to send: offer it pages."""
        script = self._script(room)
        ending = script.ends_in(Phase.BOOTSTRAPPING)
        if ending == "silence":
            return
        if not self._greeted:
            self._greeted = True
            self._say(self._self, self._greeting(wire.Hello, "decode"))
        self._generation += 1
        generation = self._generation
        self._rooms[generation] = (self._self, room)
        pages = {"fake": b""} if ending else self._all_pages  # pages of a space that does not exist fail the room
        offer = wire.Offer(room, generation, pages, 0 if self._has_aux else -1, 0)
        self._after(script.delay_ms, lambda: self._say(self._self, offer))

    # --- control ---------------------------------------------------------------------------------------------------------

    def connect(self, peer: bytes, endpoint: str) -> None:
        if peer in self._doomed:
            self._host.emit(ev.PeerUnreachable(peer, f"nobody listens at {endpoint}: as scripted", dead=True))

    def disconnect(self, peer: bytes) -> None:
        self._doomed.discard(peer)

    def send(self, peer: bytes, frame: bytes) -> None:
        try:
            message = wire.decode(frame)[2]
        except WireError:
            return
        answer = _ANSWERS.get(type(message))
        if answer is not None:
            answer(self, peer, message)

    def _on_hello(self, peer: bytes, _: wire.Hello) -> None:
        if peer not in self._doomed:
            self._say(peer, self._greeting(wire.Welcome, "prefill"))

    def _on_offer(self, peer: bytes, offer: wire.Offer) -> None:
        if offer.generation in self._rooms:
            return
        self._rooms[offer.generation] = (peer, offer.room)
        self._say(peer, wire.Accepted(offer.room, offer.generation))
        script = self._script(offer.room)
        ending = script.ends_in(Phase.WAITING_FOR_INPUT)
        if ending in ("fail", "abort"):
            verdict = _failed(offer, script, "abort" if ending == "abort" else "transport")
            self._after(script.delay_ms, lambda: self._say(peer, verdict))
        elif not ending:
            self._after(script.delay_ms, lambda: self._send_parts(peer, offer, script))

    def _send_parts(self, peer: bytes, offer: wire.Offer, script: Script) -> None:
        ending = script.ends_in(Phase.TRANSFERRING)
        if not ending:
            self._say(peer, wire.Part(offer.room, offer.generation, 0, 1, offer.aux_row >= 0, 0))
            return
        self._say(peer, wire.Part(offer.room, offer.generation, 0, 0, False, 0))
        if ending != "silence":
            verdict = _failed(offer, script, "abort" if ending == "abort" else "transport")
            self._after(script.delay_ms, lambda: self._say(peer, verdict))

    def _on_accepted(self, peer: bytes, message: wire.Accepted) -> None:
        """The sending session holds our offer."""
        script = self._script(message.room)
        if script.ends_in(Phase.WAITING_FOR_INPUT) in ("fail", "abort"):
            abort = wire.Abort(message.room, message.generation, "abort", script.reason)
            self._after(script.delay_ms, lambda: self._say(peer, abort))

    def _on_abort(self, peer: bytes, message: wire.Abort) -> None:
        self._rooms.pop(message.generation, None)
        self._say(peer, wire.Drained(message.room, message.generation))

    def _on_verdict(self, peer: bytes, message: wire.Verdict) -> None:
        self._rooms.pop(message.generation, None)
        self._say(peer, wire.VerdictAck(message.room, message.generation))

    def _on_drained(self, peer: bytes, message: wire.Drained) -> None:
        self._rooms.pop(message.generation, None)
        self._say(peer, wire.DrainedAck(message.room, message.generation))

    def _on_ping(self, peer: bytes, _: wire.Ping) -> None:
        self._say(peer, wire.Pong())

    def _greeting(self, kind: type[Any], role: str) -> Any:
        return kind(f"fake {role}", role, "fake", (0, 1) * 4, self._host.layout.infos(), b"")

    # --- data ------------------------------------------------------------------------------------------------------------

    def peer_up(self, peer: bytes, descriptor: bytes) -> None:
        """Nothing to prepare."""

    def peer_down(self, peer: bytes) -> None:
        """Nothing is ever on its way."""

    def expose(self, grant: ev.Expose) -> None:
        """Nobody will write."""

    def revoke(self, generation: int) -> bool:
        self._rooms.pop(generation, None)
        return True

    def submit(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:  # noqa: ARG002
        room = self._rooms.get(generation, (peer, -1))[1]
        script = self._script(room)
        ending = script.ends_in(Phase.TRANSFERRING)
        if ending == "abort":
            self._after(script.delay_ms, lambda: self._say(peer, wire.Abort(room, generation, "abort", script.reason)))
        outcome: ev.Event = ev.WriteDone(op, plan.total_bytes, notified=True)
        if ending:
            outcome = ev.WriteFailed(op, script.reason)
        if ending != "silence":
            self._after(script.delay_ms, lambda: self._host.emit(outcome))

    def cancel(self, op: int) -> None:
        """A write of a script that ends in silence ends by being cancelled; of any other it is late, and ignored."""
        self._host.emit(ev.WriteFailed(op, "cancelled"))

    def close(self, timeout_s: float = 0.0) -> None:  # noqa: ARG002
        self._later.clear()


def _failed(offer: wire.Offer, script: Script, cause: str) -> wire.Verdict:
    return wire.Verdict(offer.room, offer.generation, False, cause, script.reason, 0)


_ANSWERS: dict[type, Callable[[FakePeer, bytes, Any], None]] = {
    wire.Hello: FakePeer._on_hello,  # noqa: SLF001 - the class's own table
    wire.Offer: FakePeer._on_offer,  # noqa: SLF001
    wire.Accepted: FakePeer._on_accepted,  # noqa: SLF001
    wire.Abort: FakePeer._on_abort,  # noqa: SLF001
    wire.Verdict: FakePeer._on_verdict,  # noqa: SLF001
    wire.Drained: FakePeer._on_drained,  # noqa: SLF001
    wire.Ping: FakePeer._on_ping,  # noqa: SLF001
}


def create(host: Host, script: Script | Callable[[int], Script] | None = None) -> Transport:
    """The fake transport. `script` is one for all rooms, or a function of the room number; default: every room succeeds at once."""
    chosen = script if callable(script) else None
    if chosen is None:
        fixed = script if isinstance(script, Script) else Script()
        if script is not None and not isinstance(script, Script):
            raise ConfigError(f"script must be a Script or a function from room number to Script, not {script!r}")
        peer = FakePeer(host, lambda _: fixed)
    else:
        peer = FakePeer(host, chosen)
    return Transport("fake", peer, peer, lambda _: peer.close(), peer, reach="itself")
