"""What the three machines must and must never do, said without a look at how they are declared.

Each property is asked for every state, every event and every valuation of the facts: the rudest environment that a table can meet.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import attrs

from pd_fsm.machines import LeaseState, PeerState, Phase
from pd_fsm.machines.table import Table

_GONE = (PeerState.LOST, PeerState.REFUSED)


@attrs.frozen
class Move:
    """What a table says of one event: `after` is `before` when nothing moves."""

    event: str
    before: int
    facts: frozenset[str]
    after: int


def _room(move: Move) -> str:
    moved = move.after != move.before
    if move.before in (Phase.SUCCESS, Phase.FAILED):
        return "a terminal phase is left" if moved else ""
    if move.event == "fail":
        return "" if move.after == Phase.FAILED else "a live room does not fail"
    ways = {
        ("peer_ready", Phase.BOOTSTRAPPING, True): Phase.WAITING_FOR_INPUT,
        ("start", Phase.WAITING_FOR_INPUT, True): Phase.TRANSFERRING,
        ("part_settled", Phase.TRANSFERRING, True): Phase.SUCCESS,
    }
    needed = {"peer_ready": "all_peers_known", "part_settled": "all_confirmed"}.get(move.event)
    wanted = ways.get((move.event, Phase(move.before), needed is None or needed in move.facts), move.before)
    return "" if move.after == wanted else f"it goes to {Phase(move.after).name} and not to {Phase(wanted).name}"


def _lease(move: Move) -> str:
    moved, free = move.after != move.before, "no_holder" in move.facts
    if move.before == LeaseState.QUIESCED:
        return "memory that belongs to its owner is taken away" if moved else ""
    if move.event == "conclude" and move.before in (LeaseState.PRIVATE, LeaseState.EXPOSED):
        quiet = free or move.before == LeaseState.PRIVATE
        wanted = LeaseState.QUIESCED if quiet else LeaseState.REVOKING
    elif move.event == "settled" and move.before in (LeaseState.REVOKING, LeaseState.QUARANTINED):
        wanted = LeaseState.QUIESCED if free else LeaseState(move.before)
    elif move.event == "unknown" and move.before == LeaseState.REVOKING:
        wanted = LeaseState.QUARANTINED
    elif move.event == "expose" and move.before == LeaseState.PRIVATE:
        wanted = LeaseState.EXPOSED
    else:
        wanted = LeaseState(move.before)
    return "" if move.after == wanted else f"it goes to {LeaseState(move.after).name} and not to {wanted.name}"


def _peer(move: Move) -> str:
    if move.before in _GONE:
        return "a peer that was given up comes back" if move.after != move.before else ""
    wanted = {
        ("welcome", PeerState.CONNECTING): PeerState.READY,
        ("refuse", PeerState.CONNECTING): PeerState.REFUSED,
        ("silent", PeerState.READY): PeerState.SUSPECT,
        ("heard", PeerState.SUSPECT): PeerState.READY,
    }.get((move.event, PeerState(move.before)), PeerState(move.before))
    if move.event == "lost":
        wanted = PeerState.LOST
    return "" if move.after == wanted else f"it goes to {PeerState(move.after).name} and not to {wanted.name}"


_PROPERTIES: dict[str, Callable[[Move], str]] = {"room": _room, "lease": _lease, "peer": _peer}


def broken(table: Table) -> str:
    """The first property that `table` breaks, with the event and the state, or ""."""
    valuations = [frozenset(chosen) for count in range(len(table.fact) + 1) for chosen in itertools.combinations(table.fact, count)]
    for state, (number, event), facts in itertools.product(table.states, enumerate(table.events), valuations):
        row = table.row(state, number, sum(table.fact[fact] for fact in facts))
        where = f"{event} in {state.name} with {sorted(facts)}"
        late = table.why_late(state, number)
        if (row is None) != (late is not None):
            return f"{where}: {'neither a row nor late' if row is None else 'both a row and late'}"
        wrong = _PROPERTIES[table.name](Move(event, state, facts, state if row is None else row.target))
        if wrong:
            return f"{where}: {wrong}"
    return ""
