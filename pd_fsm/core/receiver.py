"""The decode side's rules: finding the writers, offering pages, confirming parts, taking pages back.

A receiving room resolves its prefill ranks, offers its pages to each, and succeeds when every part of every rank was confirmed.
When it ends without success the pages stay exposed until each writer has said Drained, the data plane vouches that nothing can
land, or the writer is proven dead. The abort that asks for it is repeated, also after the room was cleared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from pd_fsm.core import events as ev
from pd_fsm.core import handshake, wire
from pd_fsm.core.ledger import Link, Peer, Room
from pd_fsm.core.sender import peer_failure
from pd_fsm.errors import LocalProtocolError, WireError
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
    if event.pages is not None:
        check_grant(session, event.room, event.pages, event.aux_row, event.decode_prefix_len)
    _check_tokens(event.room, event.tokens)
    registry = session.registry
    outdated = registry.outdated(event.room)
    cancelled = registry.cancelled(event.room)
    room = Room(event.room, registry.mint(), sends=False, opened_ms=session.now_ms, request=event, outdated=outdated)
    session.open(room, session.deadlines.bootstrap_ms)
    if cancelled is not None:
        session.fail(room, cancelled)
        return
    writers = session.directory.get((event.address, event.dp_rank))
    if writers is not None:
        _bind(session, room, writers)
    else:
        session.repeat("lookup", b"", room.generation, None)
        look_up(session, room.generation)


def on_grant(session: SessionCore, event: ev.GrantPages) -> None:
    """The pages of a room that was opened without any."""
    room = session.registry.by_generation.get(event.generation)
    if room is None or not room.live:
        session.counts["late.grant"] += 1
        return
    request = room.request
    if request is None or request.pages is not None:
        raise LocalProtocolError(f"room {room.room} has its pages; grant() is for rooms that were opened with pages=None")
    check_grant(session, room.room, event.pages, event.aux_row, event.decode_prefix_len)
    _check_tokens(room.room, event.tokens)
    room.request = msgspec.structs.replace(
        request,
        pages=event.pages,
        aux_row=event.aux_row,
        decode_prefix_len=event.decode_prefix_len,
        tokens=request.tokens if event.tokens is None else event.tokens,
    )
    if room.state is Phase.WAITING_FOR_INPUT:
        _offer(session, room)


def _check_tokens(room: int, tokens: int | None) -> None:
    if tokens is not None and not 0 <= tokens < 1 << 31:
        raise LocalProtocolError(f"room {room}: tokens must be the length of the prompt, not {tokens}")


def check_grant(session: SessionCore, room: int, pages: ev.Pages, aux_row: int, decode_prefix_len: int) -> None:
    """Refuse pages that are not ours to grant. Raises LocalProtocolError."""
    where = f"room {room}"
    if set(pages) != set(session.spaces):
        raise LocalProtocolError(f"{where}: pages are needed for {sorted(session.spaces)}, got {sorted(pages)}")
    if not -1 <= aux_row < max(session.aux_rows, 0):
        raise LocalProtocolError(f"{where}: aux row {aux_row} is not one of this layout's {session.aux_rows}")
    for space, (page_size, items) in session.spaces.items():
        try:
            numbers = wire.unpack_pages(pages[space])
        except WireError as error:
            raise LocalProtocolError(f"{where}: {error}") from None
        if numbers and (min(numbers) < 0 or max(numbers) >= items):
            seen = f"{min(numbers)}..{max(numbers)}"
            raise LocalProtocolError(f"{where}: page indices of {space!r} must be in 0..{items - 1}, got {seen}")
        if len(set(numbers)) != len(numbers):
            raise LocalProtocolError(f"{where}: a page of {space!r} is granted twice")
        if decode_prefix_len < 0 or (decode_prefix_len and decode_prefix_len % page_size):
            raise LocalProtocolError(
                f"{where}: decode_prefix_len must be a multiple of {space!r}'s page size {page_size}, not {decode_prefix_len}"
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
    if event.announcement and event.announcement == room.outdated:  # whoever serves the next attempt will announce it
        names = ", ".join(record.name for record in event.records)
        room.lookup_reason = f"the rendezvous still names the rank of the attempt that failed: {names}"
        return
    gone = [record for record in event.records if session.absent.get(record.incarnation) == record.endpoint]
    if gone:  # the rendezvous still lists a process that is gone; its successor will register
        room.lookup_reason = f"the rendezvous still lists {gone[0].name}, which is gone"
        return
    draining = [r for r in event.records if r.incarnation in session.peers and session.peers[r.incarnation].draining]
    if draining:
        room.lookup_reason = f"{draining[0].name} takes no new rooms: it is being drained"
        return
    session.answered("lookup", b"", room.generation)
    room.announcement = event.announcement
    try:
        writers = handshake.writers_for(session, event.records)
    except ValueError as error:
        session.fail(room, ev.Failure("peer_refused", str(error)))
        return
    request = room.request
    assert request is not None
    if request.dp_rank is not None or writers[0].dp_size == 1:  # otherwise another room may be served elsewhere
        session.directory[request.address, request.dp_rank] = writers
    _bind(session, room, writers)


def on_lookup_failed(session: SessionCore, event: ev.LookupFailed) -> None:
    room = session.registry.by_generation.get(event.query)
    if room is not None:
        room.lookup_reason = event.reason


def _bind(session: SessionCore, room: Room, writers: tuple[ev.PeerRecord, ...]) -> None:
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
    peer_ready(session, room)


def peer_ready(session: SessionCore, room: Room) -> None:
    """A peer of `room` is up: once all are, offer them the pages."""
    known = all(session.peers[incarnation].up for incarnation in room.links)
    if session.room_move(room, "peer_ready", _ALL_KNOWN if known else 0) and room.state is Phase.WAITING_FOR_INPUT:
        _offer(session, room)


def _offer(session: SessionCore, room: Room) -> None:
    """Offer the pages to every writer; without pages, only say that this rank will want the room."""
    request = room.request
    assert request is not None
    pages = request.pages
    for link in room.links.values():
        link.announced = True
        if pages is not None:
            session.expose(room, link.peer)
            link.exposed = True
    if pages is not None:
        session.emit(ev.Expose(room.generation, pages, request.aux_row, tuple(room.links)))
    for link in room.links.values():
        session.answered("offer", link.peer, room.generation)  # an announcement, if there was one
        _repeat_offer(session, link)


def _repeat_offer(session: SessionCore, link: Link) -> None:
    room, request = link.room, link.room.request
    assert request is not None
    writes_aux = link.exposed and link is next(iter(room.links.values()))  # every rank has the same row; the first one writes it
    aux_row = request.aux_row if writes_aux else -1
    tokens = -1 if request.tokens is None else request.tokens
    offer = wire.Offer(room.room, room.generation, request.pages or {}, aux_row, request.decode_prefix_len, tokens)
    session.repeat("offer", link.peer, room.generation, offer)


# --- messages ----------------------------------------------------------------------------------------------------------------


def on_accepted(session: SessionCore, peer: Peer, message: wire.Accepted) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is not None and link.room.room == message.room:
        session.answered("offer", peer.incarnation, message.generation)
        _opened(session, link)


def _opened(session: SessionCore, link: Link) -> None:
    """Prefill has the room open, too. When all ranks have, the wait for their parts begins."""
    room = link.room
    if not link.opened:
        link.opened = True
        if room.state is Phase.WAITING_FOR_INPUT and not unopened(room):
            session.rearm(room, session.deadlines.waiting_ms)


def unopened(room: Room) -> list[bytes]:
    """The writers of a waiting room that nobody has opened there yet."""
    waiting = not room.sends and room.state is Phase.WAITING_FOR_INPUT
    return [link.peer for link in room.links.values() if not link.opened] if waiting else []


def on_computed(session: SessionCore, peer: Peer, message: wire.Computed) -> None:
    """Prefill is done and waits for pages: the engine may reserve them now."""
    link = session.links.get((peer.incarnation, message.generation))
    if link is None or link.room.room != message.room or not link.room.live or not link.announced or link.complete:
        session.counts["late.computed"] += 1
        if link is None and ("abort", peer.incarnation, message.generation) not in session.timers.repeats:
            _tell_over(session, peer, message)
        return
    _opened(session, link)
    link.room.tokens_computed = message.tokens
    if link.exposed:  # it has not got the pages: what it accepted was the announcement
        _repeat_offer(session, link)
    else:
        session.answered("offer", peer.incarnation, message.generation)


def _tell_over(session: SessionCore, peer: Peer, message: wire.Computed) -> None:
    """Prefill waits for pages of a room that is over here. It was lost when the room failed and has been met anew before it spoke,
    so it never learned of that; nothing else would end its wait, for we are heard."""
    room, tombstone = session.registry.by_room.get(message.room), session.registry.tombstones.get(message.room)
    ended = room if room is not None and room.generation == message.generation else tombstone
    forgotten = ev.Failure("protocol", f"{session.identity.name} knows no such room any more")
    failure = ended.failure if ended is not None else forgotten
    if failure is None:
        return  # it succeeded: a late copy
    session.emit(ev.Send(peer.incarnation, wire.Abort(message.room, message.generation, failure.cause, wire.clip(failure.reason))))


def on_part(session: SessionCore, peer: Peer, message: wire.Part) -> None:
    link = session.links.get((peer.incarnation, message.generation))
    if link is None or link.room.room != message.room or not link.room.live or not link.exposed:
        session.counts["late.part"] += 1
        return
    room = link.room
    session.answered("offer", peer.incarnation, message.generation)
    known, limit = link.chunks_total, session.limits.chunks_max
    total = message.chunks_total or known
    highest = max({message.chunk, *link.chunks_confirmed}) if total and not known else message.chunk
    if (known and total != known) or total > limit or highest >= (total or limit):
        said = f"{peer.name} confirmed chunk {highest} of {total or limit}, after it had announced {known or 'no number of'} chunks"
        session.fail(room, ev.Failure("protocol", said, peer.name))
        return
    if message.chunk in link.chunks_confirmed:
        session.counts["duplicate.part"] += 1
        return
    link.chunks_confirmed.add(message.chunk)
    link.chunks_total = total
    room.bytes_moved += message.nbytes
    link.bytes_moved += message.nbytes
    _confirmed(session, link, complete=len(link.chunks_confirmed) == link.chunks_total)


def on_verdict(session: SessionCore, peer: Peer, message: wire.Verdict) -> None:
    session.emit(ev.Send(peer.incarnation, wire.VerdictAck(message.room, message.generation)))
    link = session.links.get((peer.incarnation, message.generation))
    if link is None or link.room.room != message.room or not link.room.live or not link.announced or link.complete:
        session.counts["late.verdict"] += 1
        return
    session.answered("offer", peer.incarnation, message.generation)
    if message.success and not link.exposed:
        said = f"{peer.name} says success of a room that it has no pages of"
        session.fail(link.room, ev.Failure("protocol", said, peer.name))
    elif message.success:
        missed = max(0, message.nbytes - link.bytes_moved)  # of parts that were lost
        link.bytes_moved += missed
        link.room.bytes_moved += missed
        _confirmed(session, link, complete=True)
    else:
        session.fail(link.room, peer_failure(message.cause, message.reason, peer.name))


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
        if not link.announced or link.complete:
            _forget(session, link)
        elif session.peers[link.peer].dead:
            writer_dead(session, link)
        else:
            abort = wire.Abort(room.room, room.generation, room.failure.cause, wire.clip(room.failure.reason))
            session.repeat("abort", link.peer, room.generation, abort)


def reject(session: SessionCore, room: int, failure: ev.Failure) -> None:
    """The engine will never open `room`. Which prefill holds it is not known here, so all that are known are told, in the words
    that every prefill understands: an announcement without pages, and its abort. If nobody is known, prefill's deadline ends it."""
    generation = session.registry.mint()
    abort = wire.Abort(room, generation, failure.cause, wire.clip(failure.reason))
    for peer in session.peers.values():
        if peer.up:
            session.emit(ev.Send(peer.incarnation, wire.Offer(room, generation, {}, -1, 0)))
            session.repeat("abort", peer.incarnation, generation, abort)


def drop_rejections(session: SessionCore, peer: bytes) -> None:
    """A lost peer is not told any more which rooms will never be opened: its own deadline ends them."""
    for kind, incarnation, generation in list(session.timers.repeats):
        if kind == "abort" and incarnation == peer and (peer, generation) not in session.links:
            session.answered(kind, peer, generation)


def on_drained(session: SessionCore, source: bytes, message: wire.Drained) -> None:
    session.emit(ev.Send(source, wire.DrainedAck(message.room, message.generation)))
    link = session.links.get((source, message.generation))
    known = link is not None and link.room.room == message.room
    if _asked(session, source, message):
        session.answered("abort", source, message.generation)
    elif not known:
        session.counts["late.drained"] += 1
    if link is None or not known:
        return
    if link.room.live:
        name = session.peer_name(source)
        session.fail(link.room, ev.Failure("peer_failed", f"{name} gave the room up", name))
    writer_gone(session, link)


def _asked(session: SessionCore, source: bytes, message: wire.Drained) -> bool:
    """Whether this Drained answers an Abort: one of another room must not end its repetition."""
    repeated = session.timers.repeats.get(("abort", source, message.generation))
    return repeated is not None and isinstance(repeated.message, wire.Abort) and repeated.message.room == message.room


def writer_dead(session: SessionCore, link: Link) -> None:
    """The writer's process is proven dead. What it had handed to the network is over when the data plane's bound has passed."""
    session.answered("abort", link.peer, link.generation)
    if session.identity.residual_ms > 0 and link.peer in link.room.lease.holders:
        session.timers.arm(session.now_ms + session.identity.residual_ms, ("residual", link.peer, link.generation))
    else:
        writer_gone(session, link)


def on_residual(session: SessionCore, peer: bytes, generation: int) -> None:
    """The time in which bytes of a dead writer may arrive is over."""
    link = session.links.get((peer, generation))
    if link is not None and not link.room.live:
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
    for link in list(room.links.values()):
        forget_if_vouched(session, link)


def forget_if_vouched(session: SessionCore, link: Link) -> None:
    """Pages that are proven free need no word of a lost peer; if it comes back, it learns that it is a stranger."""
    peer = session.peers.get(link.peer)
    if peer is not None and not peer.up and link.room.lease.owned:
        _forget(session, link)


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
