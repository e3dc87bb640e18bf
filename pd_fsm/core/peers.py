"""Peers by incarnation: handshake, liveness, loss. The same rules for both roles and every transport.

Everything known about a peer hangs on its incarnation. A peer that is lost is told so when it speaks again (Stranger) and must be
met anew by a handshake. Silence makes a peer lost, never dead: only a refused connection, another incarnation at its address or
its own goodbye proves that it can touch nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pd_fsm.core import events as ev
from pd_fsm.core import handshake, receiver, sender, wire
from pd_fsm.core.ledger import Peer
from pd_fsm.machines import PEER, PeerState

if TYPE_CHECKING:
    from pd_fsm.core.session import SessionCore

_WELCOME, _REFUSE, _HEARD, _SILENT, _LOST = (PEER.event[e] for e in ("welcome", "refuse", "heard", "silent", "lost"))
_ABSENT_MAX = 1_024  # incarnations remembered as gone from their address, so that a stale registration is recognised


# --- handshake ---------------------------------------------------------------------------------------------------------------


def _on_hello(session: SessionCore, source: bytes, message: wire.Hello) -> None:
    peer = session.peers.get(source)
    if peer is None or peer.state in (PeerState.LOST, PeerState.REFUSED):
        misfit = handshake.misfit(session, message) or session.closing
        if misfit:
            session.counts["refused.hello"] += 1
            session.emit(ev.Send(source, wire.Refuse(wire.clip(misfit))))
            return
        peer = handshake.acquaint(session, source, message.name, "")
        if peer is None:
            full = f"{session.identity.name} knows {session.limits.peers_max} peers (Limits.peers_max)"
            session.emit(ev.Send(source, wire.Refuse(full)))
            return
        peer.greeting = message
        session.move(PEER, peer, _WELCOME)
        session.emit(ev.PeerUp(source, message))
    session.emit(ev.Send(source, session.identity.welcome()))


def _on_welcome(session: SessionCore, peer: Peer, message: wire.Welcome) -> None:
    session.answered("hello", peer.incarnation, 0)
    if peer.state is not PeerState.CONNECTING:
        session.counts["late.peer.welcome"] += 1
        return
    misfit = handshake.misfit(session, message)
    if misfit:
        _give_up(session, peer, _REFUSE, "peer_refused", misfit)
        return
    peer.greeting = message
    peer.home = peer.endpoint
    peer.name = message.name or peer.name
    session.move(PEER, peer, _WELCOME)
    session.emit(ev.PeerUp(peer.incarnation, message))
    for link in peer.ordered_links():
        if link.room.live:
            receiver.peer_ready(session, link.room)


def _on_refuse(session: SessionCore, peer: Peer, message: wire.Refuse) -> None:
    session.answered("hello", peer.incarnation, 0)
    _give_up(session, peer, _REFUSE, "peer_refused", message.reason)


# --- messages ----------------------------------------------------------------------------------------------------------------


def _is_forged(event: ev.Received) -> bool:
    """Whether a connection speaks for somebody else. Who answers at a peer's address may say that the peer is gone; nobody else
    may, and nobody may speak as another."""
    message = event.message
    return bool(event.via) and event.via != (message.addressed if isinstance(message, wire.Stranger) else event.source)


def on_received(session: SessionCore, event: ev.Received) -> None:
    """One message from a peer. Whatever it is, it costs at most that peer's rooms."""
    source, message = event.source, event.message
    if _is_forged(event):
        session.counts["forged"] += 1
    elif isinstance(message, wire.Stranger):
        _on_stranger(session, source, message)
    elif event.destination != session.identity.incarnation:
        session.counts["misdirected"] += 1
        session.emit(ev.Send(source, wire.Stranger(event.destination)))
    else:
        peer = session.peers.get(source)
        if peer is not None:
            peer.heard_ms = session.now_ms
            if peer.state is PeerState.SUSPECT:
                session.move(PEER, peer, _HEARD)
        _dispatch(session, source, peer, message)


def _dispatch(session: SessionCore, source: bytes, peer: Peer | None, message: Any) -> None:
    kind = type(message)
    if kind is wire.Hello:
        _on_hello(session, source, message)
    elif kind is wire.Abort and session.sends:
        sender.on_abort(session, source, message)
    elif kind is wire.Drained and not session.sends:
        receiver.on_drained(session, source, message)
    elif kind is wire.Goodbye:  # also of a lost peer: when it has drained, that is the proof that was missing
        if peer is not None:
            _on_goodbye(session, peer, message)
    elif peer is None or (peer.state is not PeerState.CONNECTING and not peer.up):
        session.counts["stranger"] += 1
        session.emit(ev.Send(source, wire.Stranger(session.identity.incarnation)))
    else:
        handler = (_SENDER_MESSAGES if session.sends else _RECEIVER_MESSAGES).get(kind)
        if handler is None or (peer.state is PeerState.CONNECTING and kind not in _HANDSHAKE):
            session.counts[f"unexpected.{kind.__name__}"] += 1
            return
        handler(session, peer, message)


def _on_ping(session: SessionCore, peer: Peer, _: wire.Ping) -> None:
    session.emit(ev.Send(peer.incarnation, wire.Pong()))


def _on_pong(session: SessionCore, peer: Peer, message: wire.Pong) -> None:
    """Hearing it was the point."""


def _on_draining(session: SessionCore, peer: Peer, _: wire.Draining) -> None:
    """The peer takes no new rooms. Rooms that are looked up from now on go elsewhere."""
    peer.draining = True
    forget_directory(session, peer)
    session.counts["peer_draining"] += 1


def forget_directory(session: SessionCore, peer: Peer) -> None:
    """What was cached from the rendezvous about this process is not used again."""
    for key, records in list(session.directory.items()):
        if any(record.incarnation == peer.incarnation for record in records):
            del session.directory[key]


def _on_goodbye(session: SessionCore, peer: Peer, message: wire.Goodbye) -> None:
    lose(session, peer, f"it closed: {message.reason}", dead=message.drained)


def _on_stranger(session: SessionCore, source: bytes, message: wire.Stranger) -> None:
    """The process that we addressed is gone, or has forgotten us: either way nothing of ours is outstanding there."""
    peer = session.peers.get(message.addressed)
    if peer is None:
        session.counts["late.stranger"] += 1
        return
    if source != message.addressed:
        where = "it was replaced by another process at the same address"
        absent(session, peer, where if peer.home == peer.endpoint else f"another process answers at {peer.endpoint}")
    elif peer.state is not PeerState.CONNECTING:
        lose(session, peer, "it has given this session up", dead=False)


_HANDSHAKE = (wire.Welcome, wire.Refuse)
_COMMON: dict[type, Callable[[SessionCore, Peer, Any], None]] = {
    wire.Ping: _on_ping,
    wire.Pong: _on_pong,
    wire.Draining: _on_draining,
}
_SENDER_MESSAGES: dict[type, Callable[[SessionCore, Peer, Any], None]] = {
    **_COMMON,
    wire.Offer: sender.on_offer,
    wire.VerdictAck: sender.on_verdict_ack,
    wire.DrainedAck: sender.on_drained_ack,
}
_RECEIVER_MESSAGES: dict[type, Callable[[SessionCore, Peer, Any], None]] = {
    **_COMMON,
    wire.Welcome: _on_welcome,
    wire.Refuse: _on_refuse,
    wire.Accepted: receiver.on_accepted,
    wire.Computed: receiver.on_computed,
    wire.Part: receiver.on_part,
    wire.Verdict: receiver.on_verdict,
}


# --- liveness ----------------------------------------------------------------------------------------------------------------


def on_tick(session: SessionCore, incarnation: bytes, epoch: int) -> None:
    """One heartbeat interval of a peer has passed."""
    peer = session.peers.get(incarnation)
    if peer is None or peer.epoch != epoch:
        return
    deadlines = session.deadlines
    silent_ms = session.now_ms - peer.heard_ms
    if peer.state is PeerState.CONNECTING:
        if session.now_ms - peer.since_ms >= deadlines.handshake_ms:
            lose(
                session, peer, f"it did not answer the handshake at {peer.endpoint} within {deadlines.handshake_ms} ms", dead=False
            )
    elif peer.up:
        if silent_ms >= deadlines.lost_ms:
            lose(session, peer, f"it was silent for {silent_ms:.0f} ms", dead=False)
        else:
            if silent_ms >= deadlines.suspect_missed * deadlines.heartbeat_ms and peer.state is PeerState.READY:
                session.move(PEER, peer, _SILENT)
            if silent_ms >= deadlines.heartbeat_ms:
                session.emit(ev.Send(incarnation, wire.Ping()))
    session.timers.arm(session.now_ms + deadlines.heartbeat_ms, ("peer", incarnation, epoch))


def on_unreachable(session: SessionCore, event: ev.PeerUnreachable) -> None:
    peer = session.peers.get(event.peer)
    if peer is None:
        session.counts["late.unreachable"] += 1
    elif event.dead:
        absent(session, peer, event.reason)
    elif peer.state is PeerState.READY:
        session.move(PEER, peer, _SILENT)  # the connection broke; it may come back before the deadline


def on_overflowed(session: SessionCore, event: ev.PeerOverflowed) -> None:
    peer = session.peers.get(event.peer)
    if peer is not None:
        lose(session, peer, event.reason, dead=False)


def absent(session: SessionCore, peer: Peer, reason: str) -> None:
    """The peer is not where we looked for it. It is dead, unless it had answered elsewhere: then the address is wrong."""
    _remember_absent(session, peer)
    lose(session, peer, reason, dead=peer.home in ("", peer.endpoint))


def _remember_absent(session: SessionCore, peer: Peer) -> None:
    """So that a registration which leads there is not believed."""
    session.absent[peer.incarnation] = peer.endpoint
    if len(session.absent) > _ABSENT_MAX:
        del session.absent[next(iter(session.absent))]


def lose(session: SessionCore, peer: Peer, reason: str, *, dead: bool) -> None:
    """Give a peer up: its rooms fail. With proof that it is dead, what it held is free."""
    if dead and not peer.dead:
        peer.dead = True
        _remember_absent(session, peer)
    _give_up(session, peer, _LOST, "peer_lost", f"{peer.name or peer.endpoint} is lost: {reason}")
    if dead and not session.sends:
        for link in peer.ordered_links():
            receiver.writer_dead(session, link)
        session.forget_if_done(peer)


def _give_up(session: SessionCore, peer: Peer, event: int, cause: str, reason: str) -> None:
    if session.move(PEER, peer, event) is None:
        return
    peer.reason = reason
    session.answered("hello", peer.incarnation, 0)
    forget_directory(session, peer)
    for generation in session.registry.drop_early(peer.incarnation):  # if it comes back, it offers these rooms anew
        peer.spend(generation, None, session.limits.spent_generations_max)
    if not session.sends:
        receiver.drop_rejections(session, peer.incarnation)
    session.emit(ev.PeerDown(peer.incarnation))
    for link in peer.ordered_links():
        if link.room.live:
            session.fail(link.room, ev.Failure(cause, reason, peer.name))
        if session.sends:
            sender.quiesce(session, link)
        elif (link.peer, link.generation) in session.links:
            if link.exposed:
                session.doubt(link.room)
            receiver.forget_if_vouched(session, link)
    session.forget_if_done(peer)
