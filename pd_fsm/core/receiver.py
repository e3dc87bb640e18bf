"""The decode side's rules: finding the writers, offering pages, confirming parts, taking pages back.

A receiving room resolves its prefill ranks, offers its pages to each, and succeeds when every part of every rank was confirmed.
When it ends without success the pages stay exposed until each writer has said Drained, the data plane vouches that nothing can
land, or the writer is proven dead. The abort that asks for it is repeated, also after the room was cleared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_fsm.core import events as ev
from pd_fsm.core import handshake, wire
from pd_fsm.core.ledger import Link, Peer, Room
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import ROOM, Phase

if TYPE_CHECKING:
    from pd_fsm.core.session import SessionCore

_ALL_KNOWN = ROOM.fact["all_peers_known"]
_ALL_CONFIRMED = ROOM.fact["all_confirmed"]


# --- the local engine --------------------------------------------------------------------------------------------------------


def on_open(session: SessionCore, event: ev.OpenReceive) -> None:
    if session.sends:
        raise LocalProtocolError(f"a prefill session cannot receive room {event.room}; open it with send()")
    session.check_open(event.room)
    _check_request(session, event)
    registry = session.registry
    room = Room(event.room, registry.mint(), sends=False, opened_ms=session.now_ms, request=event)
    session.open(room, session.deadlines.bootstrap_ms)
    known = session.directory.get((event.address, event.dp_rank))
    if known is not None:
        _bind(session, room, known)
    else:
        session.repeat("lookup", b"", room.generation, None)
        look_up(session, room.generation)


def _check_request(session: SessionCore, event: ev.OpenReceive) -> None:
    """Refuse pages that are not ours to grant. Raises LocalProtocolError."""
    where = f"room {event.room}"
    if set(event.pages) != set(session.spaces):
        raise LocalProtocolError(f"{where}: pages are needed for {sorted(session.spaces)}, got {sorted(event.pages)}")
    if not -1 <= event.aux_row < max(session.aux_rows, 0):
        raise LocalProtocolError(f"{where}: aux row {event.aux_row} is not one of this layout's {session.aux_rows}")
    for space, (page_size, items) in session.spaces.items():
        pages = wire.own_pages(where, event.pages[space])
        if pages and (min(pages) < 0 or max(pages) >= items):
            raise LocalProtocolError(
                f"{where}: page indices of {space!r} must be in 0..{items - 1}, got {min(pages)}..{max(pages)}"
            )
        if len(set(pages)) != len(pages):
            raise LocalProtocolError(f"{where}: a page of {space!r} is granted twice")
        if event.decode_prefix_len < 0 or event.decode_prefix_len % page_size:
            raise LocalProtocolError(
                f"{where}: decode_prefix_len must be a multiple of {space!r}'s page size {page_size}, not {event.decode_prefix_len}"
            )


# --- finding the writers -----------------------------------------------------------------------------------------------------


def look_up(session: SessionCore, generation: int) -> None:
    room = session.registry.by_generation.get(generation)
    if room is None or room.state is not Phase.BOOTSTRAPPING or room.links:
        session.answered("lookup", b"", generation)
        return
    assert room.request is not None
    session.emit(ev.Lookup(generation, room.request.address, room.room, room.request.dp_rank))


def on_peers_found(session: SessionCore, event: ev.PeersFound) -> None:
    room = session.registry.by_generation.get(event.query)
    if room is None or room.sends or room.state is not Phase.BOOTSTRAPPING or room.links:
        session.counts["late.peers_found"] += 1
        return
    dead = [record for record in event.records if record.incarnation in session.dead]
    if dead:  # the rendezvous still lists a process that is gone; its successor will register
        room.lookup_reason = f"the rendezvous still lists {dead[0].name}, which is gone"
        return
    session.answered("lookup", b"", room.generation)
    _bind(session, room, event.records)


def on_lookup_failed(session: SessionCore, event: ev.LookupFailed) -> None:
    room = session.registry.by_generation.get(event.query)
    if room is not None:
        room.lookup_reason = event.reason


def _bind(session: SessionCore, room: Room, records: tuple[ev.PeerRecord, ...]) -> None:
    try:
        writers = handshake.writers_for(session, records)
    except ValueError as error:
        session.fail(room, ev.Failure("peer_refused", str(error)))
        return
    assert room.request is not None
    for record in writers:
        peer = handshake.meet(session, record)
        if peer is None:
            full = f"{session.limits.peers_max} peers are known (Limits.peers_max)"
            session.fail(room, ev.Failure("overload", full))
            return
        link = Link(room, peer.incarnation, room.generation)
        room.links[peer.incarnation] = link
        session.links[peer.incarnation, room.generation] = link
        peer.links.add(link)
    if room.request.dp_rank is not None or records[0].dp_size == 1:  # otherwise another room may be served elsewhere
        session.directory[room.request.address, room.request.dp_rank] = records
    peer_ready(session, room)


def peer_ready(session: SessionCore, room: Room) -> None:
    """A peer of `room` is up: once all are, offer them the pages."""
    known = all(session.peers[incarnation].up for incarnation in room.links)
    if session.room_move(room, "peer_ready", _ALL_KNOWN if known else 0) and room.state is Phase.WAITING_FOR_INPUT:
        _offer(session, room)


def _offer(session: SessionCore, room: Room) -> None:
    request = room.request
    assert request is not None
    for link in room.links.values():
        session.expose(room, link.peer)
        link.exposed = True
    session.emit(ev.Expose(room.generation, request.pages, request.aux_row, tuple(room.links)))
    aux_row = request.aux_row
    for link in room.links.values():
        offer = wire.Offer(room.room, room.generation, request.pages, aux_row, request.decode_prefix_len)
        session.repeat("offer", link.peer, room.generation, offer)
        aux_row = -1  # every rank has the same aux row; the first one writes it


# --- messages ----------------------------------------------------------------------------------------------------------------


def on_accepted(session: SessionCore, peer: Peer, message: wire.Accepted) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is not None and link.room.room == message.room:
        session.answered("offer", peer.incarnation, message.generation)


def on_part(session: SessionCore, peer: Peer, message: wire.Part) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is None or link.room.room != message.room or not link.room.live or not link.exposed:
        session.counts["late.part"] += 1
        return
    room = link.room
    session.answered("offer", peer.incarnation, message.generation)
    known = link.chunks_total
    total = message.chunks_total
    if (total and known and total != known) or message.chunk >= (total or known or session.limits.chunks_max):
        said = f"{peer.name} confirmed chunk {message.chunk} of {total or known}, after it had announced {known} chunks"
        session.fail(room, ev.Failure("protocol", said, peer.name))
        return
    if message.chunk in link.chunks_confirmed:
        session.counts["duplicate.part"] += 1
        return
    link.chunks_confirmed.add(message.chunk)
    link.chunks_total = total or known
    room.bytes_moved += message.nbytes
    link.bytes_moved += message.nbytes
    _confirmed(session, link, complete=len(link.chunks_confirmed) == link.chunks_total)


def on_verdict(session: SessionCore, peer: Peer, message: wire.Verdict) -> None:
    session.emit(ev.Send(peer.incarnation, wire.VerdictAck(message.room, message.generation)))
    link = session.links.get((peer.incarnation, message.generation))
    if link is None or link.room.room != message.room or not link.room.live or not link.exposed:
        session.counts["late.verdict"] += 1
        return
    session.answered("offer", peer.incarnation, message.generation)
    if message.success:
        missed = max(0, message.nbytes - link.bytes_moved)  # of parts that were lost
        link.bytes_moved += missed
        link.room.bytes_moved += missed
        _confirmed(session, link, complete=True)
    else:
        reason = f"{peer.name} failed ({message.cause}): {message.reason}"
        session.fail(link.room, ev.Failure("peer_failed", reason, peer.name))


def _confirmed(session: SessionCore, link: Link, *, complete: bool) -> None:
    room = link.room
    if room.state is Phase.WAITING_FOR_INPUT:
        session.room_move(room, "start")
    session.progressed(room)
    if complete and not link.complete:
        link.complete = True
        session.settle(room, link.peer)  # its rank confirmed every part: it writes no more
    session.room_move(room, "part_settled", _ALL_CONFIRMED if room.all_confirmed() else 0)


# --- the end of a room -------------------------------------------------------------------------------------------------------


def succeeded(session: SessionCore, room: Room) -> None:
    session.emit(ev.Revoke(room.generation))
    for link in list(room.links.values()):
        _forget(session, link)


def failed(session: SessionCore, room: Room) -> None:
    """Ask every writer that may hold the grant to stop, and wait for its proof."""
    assert room.failure is not None
    session.answered("lookup", b"", room.generation)
    if any(link.exposed for link in room.links.values()):
        session.emit(ev.Revoke(room.generation))
    for link in list(room.links.values()):
        session.answered("offer", link.peer, room.generation)
        if not link.exposed or link.complete:
            _forget(session, link)
        elif session.peers[link.peer].dead:
            writer_gone(session, link)
        else:
            abort = wire.Abort(room.room, room.generation, room.failure.reason[: wire.REASON_CHARS_MAX])
            session.repeat("abort", link.peer, room.generation, abort)


def on_drained(session: SessionCore, source: bytes, message: wire.Drained) -> None:
    session.emit(ev.Send(source, wire.DrainedAck(message.room, message.generation)))
    link = session.links.get((source, message.generation))
    if link is None or link.room.room != message.room:
        session.counts["late.drained"] += 1
        return
    name = session.peer_name(source)
    session.fail(link.room, ev.Failure("peer_failed", f"{name} gave the room up", name))
    writer_gone(session, link)


def writer_gone(session: SessionCore, link: Link) -> None:
    """Proof that this writer can touch the pages no more."""
    assert not link.room.live
    session.settle(link.room, link.peer)
    _forget(session, link)


def on_revoked(session: SessionCore, event: ev.Revoked) -> None:
    """The data plane vouches for the whole generation. The abort goes on, so that the writers learn of it."""
    room = session.leases.get(event.generation)
    if room is None or room.live:
        return
    for holder in list(room.lease.holders):
        session.settle(room, holder)


def _forget(session: SessionCore, link: Link) -> None:
    if session.links.pop((link.peer, link.generation), None) is None:
        return
    for kind in ("offer", "abort"):
        session.answered(kind, link.peer, link.generation)
    peer = session.peers.get(link.peer)
    if peer is not None:
        peer.links.discard(link)
        session.forget_if_done(peer)


def awaits(session: SessionCore, room: Room) -> str:
    if room.links:
        waiting = [peer for peer in map(session.peers.__getitem__, room.links) if not peer.up]
        return "no handshake with " + ", ".join(f"{peer.name or '?'} at {peer.endpoint}" for peer in waiting)
    return f"no prefill rank was found: {room.lookup_reason or 'the rendezvous has not answered'}"
