"""The prefill side's rules: offers, chunks, writes, drains.

A sending room waits until `readers` decode ranks have offered pages, then submits every chunk to each of them. When it ends
without success it cancels what is outstanding and owes each reader that asks a Drained, once nothing of the transfer is
outstanding any more. That debt outlives the room: it hangs on the link, not on the room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Link, Op, Peer, Room, aux_rows, spaces
from pd_fsm.errors import LocalProtocolError, WireError
from pd_fsm.machines import ROOM, Phase

if TYPE_CHECKING:
    from pd_fsm.core.session import SessionCore

_ALL_KNOWN = ROOM.fact["all_peers_known"]
_ALL_CONFIRMED = ROOM.fact["all_confirmed"]
_WAITING_FOR_INPUT = Phase.WAITING_FOR_INPUT
_TAKES_CHUNKS = (Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING)


# --- the local engine --------------------------------------------------------------------------------------------------------


def on_open(session: SessionCore, event: ev.OpenSend) -> None:
    if not session.sends:
        raise LocalProtocolError(f"a {session.identity.role} session cannot send room {event.room}; open it with receive()")
    if event.readers < 0:
        raise LocalProtocolError(f"room {event.room}: readers must be 0 (a rank with nothing to send) or more, not {event.readers}")
    session.check_open(event.room)
    registry = session.registry
    cancelled = registry.cancelled(event.room)
    room = Room(event.room, registry.mint(), sends=True, opened_ms=session.now_ms, readers=event.readers)
    session.open(room, session.deadlines.bootstrap_ms)
    if cancelled is not None:
        session.fail(room, cancelled)
        return
    session.emit(ev.Announce(room.room))
    if room.readers == 0:
        session.room_move(room, "peer_ready", _ALL_KNOWN)
        return
    for incarnation, offer in registry.unpark(room.room):
        peer = session.peers.get(incarnation)
        if peer is not None and peer.up:
            on_offer(session, peer, offer, waited=True)


def on_chunk(session: SessionCore, event: ev.ChunkReady) -> None:
    room = session.registry.by_generation.get(event.generation)
    if room is None or not room.live:
        session.counts["late.chunk"] += 1
        return
    _check_chunk(session, room, event)
    room.chunks.append(event)
    room.closed = event.last
    session.progressed(room)
    pump(session, room)


def _check_chunk(session: SessionCore, room: Room, chunk: ev.ChunkReady) -> None:
    """Refuse a chunk that does not continue the sequence. Raises LocalProtocolError; nothing is trimmed silently."""
    where = f"room {room.room}, tokens [{chunk.start}, {chunk.end})"
    expected = room.chunks[-1].end if room.chunks else 0
    if room.closed:
        raise LocalProtocolError(f"{where}: the last chunk was already handed in")
    if chunk.start != expected or chunk.end < chunk.start:
        raise LocalProtocolError(f"{where}: the next chunk must start at token {expected} and not end before it starts")
    if len(room.chunks) >= session.limits.chunks_max:
        raise LocalProtocolError(f"{where}: more than {session.limits.chunks_max} chunks (Limits.chunks_max)")
    if chunk.aux_row >= 0 and not chunk.last:
        raise LocalProtocolError(f"{where}: an aux row goes with the last chunk")
    if chunk.aux_row >= session.aux_rows:
        raise LocalProtocolError(f"{where}: aux row {chunk.aux_row} is not one of this layout's {session.aux_rows}")
    if set(chunk.pages) != set(session.spaces):
        raise LocalProtocolError(f"{where}: pages are needed for {sorted(session.spaces)}, got {sorted(chunk.pages)}")
    for space, (page_size, items) in session.spaces.items():
        if chunk.start % page_size or (chunk.end % page_size and not chunk.last):
            raise LocalProtocolError(f"{where}: only the end of the last chunk may lie inside a page of {page_size} tokens")
        pages = wire.own_pages(where, chunk.pages[space])
        needed = _page_count(chunk, page_size)
        if len(pages) != needed:
            raise LocalProtocolError(f"{where}: {needed} pages of {page_size} tokens needed for {space!r}, got {len(pages)}")
        if pages and (min(pages) < 0 or max(pages) >= items):
            raise LocalProtocolError(
                f"{where}: page indices of {space!r} must be in 0..{items - 1}, got {min(pages)}..{max(pages)}"
            )


def _page_count(chunk: ev.ChunkReady, page_size: int) -> int:
    return -(-chunk.end // page_size) - chunk.start // page_size


# --- offers ------------------------------------------------------------------------------------------------------------------


def on_offer(session: SessionCore, peer: Peer, offer: wire.Offer, *, waited: bool = False) -> None:
    """A decode rank grants pages. Repeated offers are answered again; one that comes too early waits for the room (`waited`)."""
    link = session.links.get((peer.incarnation, offer.generation))
    if link is not None:
        if link.room.room == offer.room and link.room.live:
            _offer_again(session, peer, offer, link)
        return  # a concluded room's verdict is being repeated already
    waited = waited or session.registry.parked(peer.incarnation, offer)  # then it has not concluded, however old it is
    if offer.generation in peer.spent or (offer.generation <= peer.spent_floor and not waited):
        stale = ev.Failure("protocol", f"generation {offer.generation} of room {offer.room} has already concluded here")
        _refuse(session, peer, offer, peer.spent.get(offer.generation) or stale)
        return
    room = session.registry.by_room.get(offer.room)
    if room is not None:
        _offer_for_open_room(session, peer, offer, room)
        return
    tombstone = session.registry.tombstones.get(offer.room)
    if tombstone is not None and tombstone.failure is not None and tombstone.unmet > 0:
        tombstone.unmet -= 1
        _refuse(session, peer, offer, tombstone.failure)
    elif session.closing or session.draining:
        _refuse(session, peer, offer, ev.Failure("shutdown", session.closing or session.draining))
    elif limit := session.registry.park(peer.incarnation, offer, session.now_ms):
        full = f"{getattr(session.limits, limit)} offers wait for rooms that are not open (Limits.{limit})"
        _refuse(session, peer, offer, ev.Failure("overload", full))


def _offer_again(session: SessionCore, peer: Peer, offer: wire.Offer, link: Link) -> None:
    """A repeated offer, or the pages that decode had not reserved when it offered first."""
    assert link.offer is not None, "a sender's link exists by its offer"
    if offer.pages and not link.offer.pages:
        session.answered("computed", peer.incarnation, offer.generation)
        link.offer = offer
        if _fits(session, peer, link):
            session.progressed(link.room)
            pump(session, link.room)
            _accept(session, link)
    else:
        session.emit(ev.Send(peer.incarnation, wire.Accepted(offer.room, offer.generation)))


def _offer_for_open_room(session: SessionCore, peer: Peer, offer: wire.Offer, room: Room) -> None:
    if room.failure is not None:
        room.refused += 1
        _refuse(session, peer, offer, room.failure)
    elif not room.live:
        ended = f"room {room.room} has already ended here ({room.state.name}) and is not cleared yet"
        _refuse(session, peer, offer, ev.Failure("protocol", ended))
    elif peer.incarnation in room.links or len(room.links) >= room.readers:
        taken = f"room {room.room} is open with other readers ({room.readers} of {room.readers})"
        _refuse(session, peer, offer, ev.Failure("protocol", taken))
    else:
        _bind(session, peer, offer, room)


def _bind(session: SessionCore, peer: Peer, offer: wire.Offer, room: Room) -> None:
    link = Link(room, peer.incarnation, offer.generation, offer)
    room.links[peer.incarnation] = link
    session.links[peer.incarnation, offer.generation] = link
    peer.links.add(link)
    if _fits(session, peer, link):
        session.room_move(room, "peer_ready", _ALL_KNOWN if len(room.links) == room.readers else 0)
        pump(session, room)
        _accept(session, link)


def _accept(session: SessionCore, link: Link) -> None:
    """Say that the offer is held, unless bytes are on their way already: they say so as well, and each message costs a round of
    both sides' loops. Should they take long, the repeated offer is answered."""
    if link.room.live and not link.ops:
        session.emit(ev.Send(link.peer, wire.Accepted(link.room.room, link.generation)))


def _fits(session: SessionCore, peer: Peer, link: Link) -> bool:
    """Check a link's offer. A grant that cannot be fails the room."""
    assert link.offer is not None, "a sender's link exists by its offer"
    try:
        _check_offer(peer, link.offer)
    except WireError as error:
        session.fail(link.room, ev.Failure("protocol", f"offer of {peer.name}: {error}", peer.name))
        return False
    return True


def _check_offer(peer: Peer, offer: wire.Offer) -> None:
    """Check a grant against what the peer registered. Raises WireError that names the value."""
    assert peer.greeting is not None, "only a peer that is up offers"
    theirs = spaces(peer.greeting.components)
    if not offer.pages:
        return  # decode reserves its pages when prefill is done
    if set(offer.pages) != set(theirs):
        raise WireError(f"grants pages of {sorted(offer.pages)}, its layout has {sorted(theirs)}")
    for space, (page_size, items) in theirs.items():
        pages = wire.unpack_pages(offer.pages[space])
        if pages and (min(pages) < 0 or max(pages) >= items):
            raise WireError(f"page indices of {space!r} must be in 0..{items - 1}, got {min(pages)}..{max(pages)}")
        if len(set(pages)) != len(pages):
            raise WireError(f"grants a page of {space!r} twice")
        if offer.decode_prefix_len % page_size:
            raise WireError(f"decode_prefix_len {offer.decode_prefix_len} is no multiple of the page size {page_size} of {space!r}")
    rows = aux_rows(peer.greeting.components)
    if offer.aux_row >= rows:
        raise WireError(f"aux row {offer.aux_row} is not one of its {rows}")


def refuse_early(session: SessionCore, failure: ev.Failure, room: int | None = None) -> None:
    """Answer the offers that wait for rooms which will not be opened: those of one, or all."""
    for number in [room] if room is not None else session.registry.early_rooms():
        for incarnation, offer in session.registry.unpark(number):
            peer = session.peers.get(incarnation)
            if peer is not None and peer.up:
                _refuse(session, peer, offer, failure)


def _refuse(session: SessionCore, peer: Peer, offer: wire.Offer, failure: ev.Failure) -> None:
    """Answer an offer that can never be served. It is answered the same way whenever it is repeated."""
    session.registry.drop_early(peer.incarnation, offer.room, offer.generation)
    peer.spend(offer.generation, failure, session.limits.spent_generations_max)
    session.emit(ev.Send(peer.incarnation, _failed_verdict(offer.room, offer.generation, failure, 0)))


# --- writes ------------------------------------------------------------------------------------------------------------------


def pump(session: SessionCore, room: Room) -> None:
    """Submit every chunk that was handed in, once all readers are known."""
    if room.chunks_submitted == len(room.chunks) or room.state not in _TAKES_CHUNKS:
        return
    ungranted = [link for link in room.links.values() if link.offer is not None and not link.offer.pages]
    if ungranted:
        if room.closed:  # decode may reserve now
            for link in ungranted:
                computed = wire.Computed(room.room, link.generation, room.chunks[-1].end)
                session.repeat("computed", link.peer, link.generation, computed)
        return
    if room.state is _WAITING_FOR_INPUT:
        session.room_move(room, "start")
    while room.chunks_submitted < len(room.chunks):
        index = room.chunks_submitted
        for link in room.links.values():
            if not _submit(session, link, index):
                return
        room.chunks_submitted += 1
    if room.all_confirmed():  # nothing had to move: no reader, or all of them have these tokens already
        session.room_move(room, "part_settled", _ALL_CONFIRMED)


def waits_for_grant(session: SessionCore, room: Room) -> bool:
    """Whether all that `room` lacks are pages of readers that are alive. A deadline would measure their queue, not their silence:
    their own one ends the room if they never reserve, and they are lost if they fall silent."""
    ungranted = [link for link in room.links.values() if link.offer is not None and not link.offer.pages]
    if room.state is not Phase.WAITING_FOR_INPUT or not room.closed or not ungranted:
        return False
    return all((peer := session.peers.get(link.peer)) is not None and peer.up for link in ungranted)


def _submit(session: SessionCore, link: Link, index: int) -> bool:
    room, offer = link.room, link.offer
    assert offer is not None, "a sender's link exists by its offer"
    chunk = room.chunks[index]
    try:
        if chunk.last and chunk.aux_row < 0 <= offer.aux_row:
            raise WireError(f"waits for aux row {offer.aux_row}, but the last chunk came without one")
        end = room.chunks[-1].end
        if offer.tokens >= 0 and (end > offer.tokens or (room.closed and end < offer.tokens)):
            raise WireError(f"is for a prompt of {offer.tokens} tokens, but the engine handed in {end}")
        copies = tuple(_copies(session, chunk, offer, space) for space in session.spaces)
    except WireError as error:
        name = session.peer_name(link.peer)
        session.fail(room, ev.Failure("protocol", f"grant of {name}: {error}", name))
        return False
    aux = (chunk.aux_row, offer.aux_row) if chunk.aux_row >= 0 and offer.aux_row >= 0 else None
    if aux is None and not any(source for _, source, _ in copies):
        _confirm(session, link, index, 0, notified=False)
        return True
    op = Op(session.next_op(), link, index)
    session.ops[op.id] = op
    link.ops.add(op.id)
    session.expose(room, op.id)
    total = index + 1 if chunk.last else 0
    nbytes = sum(len(source) // 4 * session.space_bytes[space] for space, source, _ in copies)
    notice = wire.Part(room.room, link.generation, index, total, aux is not None, nbytes + (session.aux_bytes if aux else 0))
    session.emit(ev.Submit(op.id, link.peer, link.generation, copies, aux, notice))
    return True


def _copies(session: SessionCore, chunk: ev.ChunkReady, offer: wire.Offer, space: str) -> tuple[str, bytes, bytes]:
    """Source and destination pages of a chunk, without those of the prefix that decode already has."""
    page_size = session.spaces[space][0]
    first, count = chunk.start // page_size, _page_count(chunk, page_size)
    prefix = offer.decode_prefix_len // page_size
    skip = min(max(prefix - first, 0), count)
    begin, end = first + skip - prefix, first + count - prefix
    granted = len(offer.pages[space]) // 4
    if end > granted:
        raise WireError(
            f"{granted} pages of {space!r} after a prefix of {offer.decode_prefix_len} tokens do not hold "
            f"tokens [{chunk.start}, {chunk.end}); {end} are needed"
        )
    return space, chunk.pages[space][4 * skip :], offer.pages[space][4 * begin : 4 * end] if count > skip else b""


def on_write_done(session: SessionCore, event: ev.WriteDone) -> None:
    op = session.ops.get(event.op)
    if op is None:
        session.counts["late.write_done"] += 1
        return
    link, room = op.link, op.link.room
    _end_op(session, op)
    peer = session.peers.get(link.peer)
    if peer is not None:
        peer.note_placed(op.id, session.now_ms)
    if not room.live:
        session.settle(room, op.id)
        quiesce(session, link)
        return
    _confirm(session, link, op.chunk, event.nbytes, notified=event.notified)
    session.settle(room, op.id)
    session.progressed(room)
    session.room_move(room, "part_settled", _ALL_CONFIRMED if room.all_confirmed() else 0)


def _confirm(session: SessionCore, link: Link, index: int, nbytes: int, *, notified: bool) -> None:
    """A chunk is in its place. Decode is told, unless the data plane did it."""
    room = link.room
    room.bytes_moved += nbytes
    link.bytes_moved += nbytes
    link.chunks_confirmed.add(index)
    if not notified:
        link.told = False
        chunk = room.chunks[index]
        total = index + 1 if chunk.last else 0
        aux = chunk.aux_row >= 0 and link.offer is not None and link.offer.aux_row >= 0
        session.emit(ev.Send(link.peer, wire.Part(room.room, link.generation, index, total, aux, nbytes)))


def turn_ms(session: SessionCore, room: Room) -> float:
    """When a write that was submitted before those of `room` last ended well. A transfer that waited for its turn until then did
    not stall; one that others overtake did. The writes in front are fixed in number, so the wait has a bound."""
    turn = 0.0
    for link in room.links.values():
        peer = session.peers.get(link.peer)
        if link.ops and peer is not None:
            oldest = min(link.ops)
            turn = max(turn, next((at for op, at in reversed(peer.placed) if op < oldest), 0.0))
    return turn


def on_write_failed(session: SessionCore, event: ev.WriteFailed) -> None:
    op = session.ops.get(event.op)
    if op is None:
        session.counts["late.write_failed"] += 1
        return
    room = op.link.room
    _end_op(session, op)
    name = session.peer_name(op.link.peer)
    session.fail(room, ev.Failure("transport", f"write of chunk {op.chunk} to {name} failed: {event.reason}", name))
    session.settle(room, op.id)
    quiesce(session, op.link)


def on_write_unknown(session: SessionCore, event: ev.WriteUnknown) -> None:
    """The room fails, the memory does not come back: the operation stays outstanding until it is proven to be over."""
    op = session.ops.get(event.op)
    if op is None:
        session.counts["late.write_unknown"] += 1
        return
    room = op.link.room
    name = session.peer_name(op.link.peer)
    session.fail(room, ev.Failure("transport", f"outcome of chunk {op.chunk} to {name} is unknown: {event.reason}", name))
    session.doubt(room)


def on_write_settled(session: SessionCore, event: ev.WriteSettled) -> None:
    op = session.ops.get(event.op)
    if op is None or op.link.room.live:  # of a live room only WriteDone and WriteFailed are outcomes
        session.counts["late.write_settled"] += 1
        return
    _end_op(session, op)
    session.settle(op.link.room, op.id)
    quiesce(session, op.link)


def _end_op(session: SessionCore, op: Op) -> None:
    del session.ops[op.id]
    op.link.ops.discard(op.id)


# --- the end of a room -------------------------------------------------------------------------------------------------------


def succeeded(session: SessionCore, room: Room) -> None:
    for link in list(room.links.values()):
        if link.told:
            link.verdict_acked = True
        quiesce(session, link)


def failed(session: SessionCore, room: Room) -> None:
    """Tell every reader at once, with the reason, and cancel what is outstanding."""
    assert room.failure is not None
    for link in list(room.links.values()):
        session.answered("computed", link.peer, link.generation)
        for op in sorted(link.ops):
            session.emit(ev.Cancel(op))
        peer = session.peers.get(link.peer)
        if not link.drain_asked and peer is not None and peer.up:
            _tell(session, link)
        quiesce(session, link)


def _tell(session: SessionCore, link: Link) -> None:
    """Repeat the verdict to one reader until it knows it."""
    room = link.room
    if room.failure is None:
        verdict = wire.Verdict(room.room, link.generation, True, "", "", link.bytes_moved)
    else:
        verdict = _failed_verdict(room.room, link.generation, room.failure, link.bytes_moved)
    session.repeat("verdict", link.peer, link.generation, verdict)


def _failed_verdict(room: int, generation: int, failure: ev.Failure, nbytes: int) -> wire.Verdict:
    return wire.Verdict(room, generation, False, failure.cause, wire.clip(failure.reason), nbytes)


def on_verdict_ack(session: SessionCore, peer: Peer, message: wire.VerdictAck) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is not None and link.room.room == message.room and not link.room.live:
        session.answered("verdict", peer.incarnation, message.generation)
        link.verdict_acked = True
        quiesce(session, link)


def on_abort(session: SessionCore, source: bytes, message: wire.Abort) -> None:
    """Decode gives the room up. It learns when nothing can touch its pages any more, even from a session that forgot it."""
    peer = session.peers.get(source)
    link = session.links.get((source, message.generation))
    if link is not None and link.room.room != message.room:  # it names a transfer that is none of it
        session.counts["unexpected.Abort"] += 1
        return
    if link is None:  # nothing of this generation is outstanding, and from now on nothing can be
        if peer is not None:
            session.registry.drop_early(source, message.room, message.generation)
            if message.generation not in peer.spent:
                failure = ev.Failure("peer_abort", message.reason, peer.name)
                peer.spend(message.generation, failure, session.limits.spent_generations_max)
        else:
            session.remember_spent(source, [message.generation])
        session.emit(ev.Send(source, wire.Drained(message.room, message.generation)))
        return
    link.drain_asked = True
    session.answered("verdict", source, message.generation)
    if link.room.live:
        name = session.peer_name(source)
        session.fail(link.room, peer_failure(message.cause, message.reason, name))
    quiesce(session, link)


def peer_failure(cause: str, reason: str, name: str) -> ev.Failure:
    """The failure of a room that the other side ended: an abort of its engine stays one, anything else is its failure."""
    if cause == "abort":
        return ev.Failure("peer_abort", f"{name} aborted: {reason}", name)
    return ev.Failure("peer_failed", f"{name} failed ({cause}): {reason}", name)


def on_drained_ack(session: SessionCore, peer: Peer, message: wire.DrainedAck) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is not None and link.room.room == message.room and link.drain_asked and not link.ops:
        session.answered("drained", peer.incarnation, message.generation)
        link.drain_acked = True
        quiesce(session, link)


def quiesce(session: SessionCore, link: Link) -> None:
    """Send the Drained that is due, and forget a link to which nothing is owed any more."""
    if link.ops or link.room.live:
        return
    peer = session.peers.get(link.peer)
    up = peer is not None and peer.up
    if up and link.drain_asked and not link.drain_acked:
        drained = wire.Drained(link.room.room, link.generation)
        session.repeat("drained", link.peer, link.generation, drained)
        return
    if up and not link.verdict_acked and not link.drain_acked:
        _tell(session, link)
        return
    if session.links.pop((link.peer, link.generation), None) is None:
        return
    session.answered("verdict", link.peer, link.generation)
    session.answered("drained", link.peer, link.generation)
    if peer is not None:
        peer.links.discard(link)
        peer.spend(link.generation, link.room.failure, session.limits.spent_generations_max)
        session.forget_if_done(peer)


def awaits(room: Room) -> str:
    return f"{len(room.links)} of {room.readers} decode ranks have offered pages"
