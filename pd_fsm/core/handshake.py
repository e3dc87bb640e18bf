"""Who may talk to whom: the mapping of ranks and the checks of a handshake. All rules about what fits, in one place.

What cannot work is refused here, early, with a reason that names both sides' values. Nothing is inferred twice: what a greeting
says is what both sides use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Peer
from pd_fsm.machines import PeerState

if TYPE_CHECKING:
    from pd_fsm.core.session import SessionCore


def writers_for(session: SessionCore, records: tuple[ev.PeerRecord, ...]) -> tuple[ev.PeerRecord, ...]:
    """The prefill ranks that write to this decode rank. Raises ValueError that names both sides' values."""
    mine = session.identity.topology
    for record in records:
        for axis in ("tp", "pp", "cp"):
            theirs, ours = getattr(record, f"{axis}_size"), getattr(mine, f"{axis}_size")
            if theirs != ours:
                raise ValueError(
                    f"{record.name} has {axis}_size={theirs} and {session.identity.name} has {axis}_size={ours}; "
                    "this version needs equal parallel sizes on both sides"
                )
    same = [r for r in records if (r.tp_rank, r.pp_rank, r.cp_rank) == (mine.tp_rank, mine.pp_rank, mine.cp_rank)]
    if not same:
        raise ValueError(f"no prefill rank matches tp_rank={mine.tp_rank}, pp_rank={mine.pp_rank}, cp_rank={mine.cp_rank}")
    return tuple({record.incarnation: record for record in same}.values())  # a rank that is listed twice is one writer


def meet(session: SessionCore, record: ev.PeerRecord) -> Peer | None:
    """The peer of a registration; a new or given-up one is greeted. None when the table is full."""
    known = session.peers.get(record.incarnation)
    if known is not None and known.state not in (PeerState.LOST, PeerState.REFUSED):
        return known
    peer = acquaint(session, record.incarnation, record.name, record.endpoint)
    if peer is not None:
        session.emit(ev.Connect(peer.incarnation, peer.endpoint))
        session.repeat("hello", peer.incarnation, 0, session.identity.hello())
    return peer


def acquaint(session: SessionCore, incarnation: bytes, name: str, endpoint: str) -> Peer | None:
    """A new acquaintance with a process, in CONNECTING. None when the table is full."""
    known = session.peers.get(incarnation)
    if known is None and len(session.peers) >= session.limits.peers_max:
        return None
    peer = Peer(incarnation, name, endpoint, heard_ms=session.now_ms, since_ms=session.now_ms)
    if known is not None:  # met anew: what is owed to it, and what it must not open again, stays
        peer.links, peer.spent, peer.spent_floor, peer.home = known.links, known.spent, known.spent_floor, known.home
    else:
        session.recall_spent(peer)
    peer.epoch = session.next_epoch()
    session.timers.arm(session.now_ms + session.deadlines.heartbeat_ms, ("peer", incarnation, peer.epoch))
    session.peers[incarnation] = peer
    return peer


def misfit(session: SessionCore, theirs: wire.Greeting) -> str:
    """Why a greeting does not fit, naming both sides' values; empty when it does."""
    mine = session.identity
    if theirs.role == mine.role or theirs.role not in ("prefill", "decode"):
        return f"{mine.name} and {theirs.name} have the roles {mine.role} and {theirs.role}; a hand-off needs prefill and decode"
    if theirs.transport != mine.transport:
        return f"{mine.name} uses transport {mine.transport!r} and {theirs.name} {theirs.transport!r}"
    ours_by_name = {c.name: c for c in mine.components}
    theirs_by_name = {c.name: c for c in theirs.components}
    if len(theirs_by_name) != len(theirs.components):
        return f"{theirs.name} names a component twice: {sorted(c.name for c in theirs.components)}"
    if set(ours_by_name) != set(theirs_by_name):
        return f"{mine.name} has the components {sorted(ours_by_name)} and {theirs.name} {sorted(theirs_by_name)}"
    if list(ours_by_name) != list(theirs_by_name):  # regions are numbered in this order, on both sides
        return f"{mine.name} has its components in the order {list(ours_by_name)} and {theirs.name} {list(theirs_by_name)}"
    for name, ours in ours_by_name.items():
        other = theirs_by_name[name]
        for field in ("kind", "space", "page_size", "item_bytes"):
            a, b = getattr(ours, field), getattr(other, field)
            if a != b:
                if field == "item_bytes":
                    a, b = _short(a), _short(b)
                return f"component {name!r}: {field} is {a} at {mine.name} and {b} at {theirs.name}"
        if ours.dtype and other.dtype and ours.dtype != other.dtype:
            return f"component {name!r}: dtype is {ours.dtype} at {mine.name} and {other.dtype} at {theirs.name}"
    return ""


def _short(item_bytes: tuple[int, ...]) -> str:
    """`64 regions of 4096 bytes an item` instead of a list of 64 equal numbers."""
    kinds = sorted(set(item_bytes))
    return f"{len(item_bytes)} regions of {'/'.join(map(str, kinds[:4]))} bytes an item"
