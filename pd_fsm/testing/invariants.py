"""The 15 invariants of a session layer, as properties of one step of one core and of the world around it.

Each is a function that returns what is wrong, or "". `STEP` ones look at a core before and after one stimulus and at what it asked
for; `WORLD` ones at that and at everything under way: frames, writes, the other processes. Four of the 15 cannot break inside a
core and are tested where they can: 10 (agreement of ranks), 11 (no call blocks), 14 (mapping and layout), and of 15 the decoder.

This module must never change what it looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Link
from pd_fsm.core.session import SessionCore
from pd_fsm.machines import ROOM, LeaseState, PeerState, Phase
from pd_fsm.machines.room import TERMINAL

_EDGES = {(row.source, row.target) for row in ROOM.rows()}
_LOCAL_OPENS = (ev.OpenSend, ev.OpenReceive)
_OWNED = (LeaseState.PRIVATE, LeaseState.QUIESCED)
_GONE = (PeerState.LOST, PeerState.REFUSED)


@attrs.frozen(eq=False)
class CoreStep:
    """One stimulus of one core. `event` is None when a timer ran out, `error` what the step raised."""

    before: SessionCore
    after: SessionCore
    event: ev.Event | None
    effects: tuple[ev.Effect, ...]
    error: BaseException | None
    unchanged: bool

    def published(self) -> Iterator[ev.Publish]:
        return (effect for effect in self.effects if isinstance(effect, ev.Publish))

    def opened(self) -> set[int]:
        return set(self.after.registry.by_generation) - set(self.before.registry.by_generation)


@attrs.frozen(eq=False)
class Surroundings:
    """What is under way while a core takes a step.

    `may_write`: (decode's incarnation, generation) of each write that may still land there. `reads_from`: ids of the core's own
    writes that have not ended. `landed`: for decode, the chunks of each writer that lie in the pages of a live generation, and
    how many the writer has, 0 while that is not known. `free`: whether decode's pages of (incarnation, generation) were given back.
    """

    may_write: frozenset[tuple[bytes, int]]
    reads_from: frozenset[int]
    landed: Callable[[int], dict[bytes, tuple[set[int], int]]]
    free: Callable[[bytes, int], bool]
    vouches: bool


def _terminal_is_absorbing_and_single(step: CoreStep) -> str:
    """1"""
    for effect in step.published():
        known = step.before.registry.by_generation.get(effect.generation)
        if known is None and not isinstance(step.event, _LOCAL_OPENS):
            return f"room {effect.room}, generation {effect.generation}, shows {Phase(effect.phase).name} though it is not open"
    for generation, room in step.after.registry.by_generation.items():
        known = step.before.registry.by_generation.get(generation)
        if known is not None and known.state in TERMINAL:
            if room.state is not known.state:
                return f"room {room.room} left {known.state.name} for {room.state.name}"
            if room.failure != known.failure:
                return f"room {room.room} changed its reason from {known.failure} to {room.failure}"
        if (room.state is Phase.FAILED) != (room.failure is not None):
            return f"room {room.room} is {room.state.name} with the reason {room.failure}"
    return ""


def _only_declared_edges(step: CoreStep) -> str:
    """1"""
    phases: dict[int, Phase] = {g: room.state for g, room in step.before.registry.by_generation.items()}
    for effect in step.published():
        before, phase = phases.get(effect.generation), Phase(effect.phase)
        if before is None and phase is not Phase.BOOTSTRAPPING:
            return f"room {effect.room} began as {phase.name}"
        if before is not None and (before, phase) not in _EDGES:
            return f"room {effect.room} went from {before.name} to {phase.name}, which is no declared edge"
        phases[effect.generation] = phase
    for generation, room in step.after.registry.by_generation.items():
        if phases.get(generation) is not room.state:
            return f"room {room.room} is {room.state.name}, but what was shown last is {phases.get(generation)}"
    return ""


def _only_the_owner_opens_and_clears(step: CoreStep) -> str:
    """2"""
    opened = step.opened()
    if opened and not isinstance(step.event, _LOCAL_OPENS):
        return f"generations {sorted(opened)} came to be by {_what(step.event)}"
    closed = set(step.before.registry.by_generation) - set(step.after.registry.by_generation)
    if closed and not isinstance(step.event, ev.ClearRequested):
        return f"generations {sorted(closed)} were cleared by {_what(step.event)}"
    for generation in closed:
        if step.before.registry.by_generation[generation].state not in TERMINAL:
            return f"generation {generation} was cleared while it was live"
    return ""


def _what_the_engine_does_wrong_changes_nothing(step: CoreStep) -> str:
    """2"""
    if step.error is not None and (not step.unchanged or step.effects):
        return f"{_what(step.event)} was refused ({step.error}), but it changed something"
    return ""


def _an_abort_fails_the_room(step: CoreStep) -> str:
    """1"""
    if isinstance(step.event, ev.AbortRequested):
        room = step.after.registry.by_generation.get(step.event.generation)
        if room is not None and room.state not in TERMINAL:
            return f"room {room.room} is {room.state.name} after its abort"
    return ""


def _generations_are_new(step: CoreStep) -> str:
    """3"""
    for generation in step.opened():
        if generation <= step.before.registry._last_generation:  # noqa: SLF001 - read only
            return f"generation {generation} was minted before"
    return ""


def _foreign_messages_change_no_room(step: CoreStep) -> str:
    """3 and 13: a message for another life, or under another generation, moves no room of ours."""
    if not isinstance(step.event, ev.Received):
        return ""
    message = step.event.message
    generation = getattr(message, "generation", 0)
    if step.event.destination not in (step.after.identity.incarnation, wire.NOBODY) and not isinstance(message, wire.Stranger):
        if step.after.registry.by_generation and any(True for _ in step.published()):
            return f"{_what(step.event)} for another life of this process moved a room"
        return ""
    if not generation:
        return ""
    for effect in step.published():
        room = step.after.registry.by_generation[effect.generation]
        link = room.links.get(step.event.source)
        if link is None or link.generation != generation:
            return f"{_what(step.event)} of generation {generation} moved room {room.room}, generation {effect.generation}"
    return ""


def _memory_comes_back_once(step: CoreStep) -> str:
    """6"""
    seen = set()
    for effect in step.effects:
        if not isinstance(effect, ev.ReleasePages):
            continue
        room = step.before.registry.by_generation.get(effect.generation) or step.before.leases.get(effect.generation)
        if effect.generation in seen or (room is None and effect.generation not in step.opened()):
            return f"the memory of room {effect.room}, generation {effect.generation}, came back twice"
        if room is not None and room.lease.state is LeaseState.QUIESCED:
            return f"the memory of room {effect.room}, generation {effect.generation}, came back again"
        seen.add(effect.generation)
        now = step.after.registry.by_generation.get(effect.generation)
        if now is not None and now.live:
            return f"the memory of room {effect.room} came back while it is {now.state.name}"
    for generation, room in step.before.leases.items():
        if generation not in step.after.leases and generation not in seen:
            return f"the lease of room {room.room}, generation {generation}, was dropped without a release"
    return ""


def _a_concluded_room_owes_or_frees(step: CoreStep) -> str:
    """4 and 6: a room that concluded has its memory back, or somebody is named who may touch it."""
    for room in {**step.after.registry.by_generation, **step.after.leases}.values():
        lease = room.lease
        if room.state in TERMINAL and lease.state in (LeaseState.PRIVATE, LeaseState.EXPOSED):
            return f"room {room.room} is {room.state.name} and its lease {lease.state.name}"
        if (lease.state in (LeaseState.REVOKING, LeaseState.QUARANTINED)) != (room.state in TERMINAL and bool(lease.holders)):
            return f"the lease of room {room.room} ({room.state.name}) is {lease.state.name} with holders {lease.holders}"
        if lease.state in _OWNED and room.generation in step.after.leases:
            return f"the lease of room {room.room} is {lease.state.name} and still counted as exposed"
    return ""


def _every_wait_has_an_end(step: CoreStep) -> str:
    """7: each live room, each lease that is being revoked, each thing that is owed has a timer."""
    core = step.after
    armed = {key for _, _, key in core.timers._heap}  # noqa: SLF001 - read only
    for room in core.registry.by_generation.values():
        if room.live and ("room", b"", room.generation) not in armed:
            return f"room {room.room} is {room.state.name} without a deadline"
    for room in core.leases.values():
        if room.lease.state is LeaseState.REVOKING and ("drain", b"", room.generation) not in armed:
            return f"the lease of room {room.room} is being revoked without a deadline"
    for key in core.timers.repeats:
        if key not in armed:
            return f"{key[0]} is repeated without a timer"
    for known in core.peers.values():
        if known.state not in _GONE and ("peer", known.incarnation, known.epoch) not in armed:
            return f"peer {known.name} is {known.state.name} without a heartbeat"
    for (peer, generation), link in core.links.items():
        if not link.room.live and not _is_owed(core, link, armed):
            return f"generation {generation} is kept for {core.peer_name(peer)}, but nothing is asked or awaited"
    return ""


def _is_owed(core: SessionCore, link: Link, armed: set[tuple[str, bytes, int]]) -> bool:
    kinds = ("verdict", "drained") if core.sends else ("abort",)
    if any((kind, link.peer, link.generation) in core.timers.repeats for kind in kinds):
        return True
    if core.sends:
        return any(op in core.ops for op in link.ops)
    peer = core.peers.get(link.peer)
    lost = peer is not None and peer.state in _GONE and not link.room.lease.owned  # waits for proof that it is dead
    return lost or ("residual", link.peer, link.generation) in armed


def _failure_reaches_the_peers(step: CoreStep) -> str:
    """8"""
    for effect in step.published():
        if effect.phase != Phase.FAILED:
            continue
        room = step.after.registry.by_generation[effect.generation]
        told = {
            (message.peer, message.message.generation)
            for message in step.effects
            if isinstance(message, ev.Send) and isinstance(message.message, wire.Verdict | wire.Abort | wire.Drained)
        }
        for link in room.links.values():
            peer = step.after.peers.get(link.peer)
            knows = isinstance(step.event, ev.Received) and step.event.source == link.peer
            bound = link.announced or step.after.sends
            if (
                peer is not None
                and peer.up
                and bound
                and not link.complete
                and not knows
                and (link.peer, link.generation) not in told
            ):
                waits = step.after.sends and link.drain_asked  # its Drained will say it
                if not waits:
                    return f"room {room.room} failed and {peer.name} is not told"
    return ""


def _an_unaddressed_room_is_left_alone(step: CoreStep) -> str:
    """12: one write's outcome, one room's timer or call, moves that room alone."""
    own = _generation_of(step)
    if own is None:
        return ""
    for effect in step.published():
        if effect.generation != own:
            return f"{_what(step.event)} moved generation {effect.generation} and not {own} alone"
    return ""


def _generation_of(step: CoreStep) -> int | None:
    event = step.event
    if isinstance(event, ev.WriteDone | ev.WriteFailed | ev.WriteUnknown | ev.WriteSettled):
        op = step.before.ops.get(event.op)
        return op.link.room.generation if op is not None else -1
    if isinstance(event, ev.AbortRequested | ev.ClearRequested | ev.ChunkReady | ev.GrantPages | ev.Revoked):
        return event.generation
    return None


def _tables_have_bounds(step: CoreStep) -> str:
    """15"""
    core, limits = step.after, step.after.limits
    sizes = (
        ("rooms_max", len(core.registry.by_room), limits.rooms_max),
        ("peers_max", len(core.peers), limits.peers_max),
        ("early_offers_max", core.registry.early_count, limits.early_offers_max),
        ("tombstones_max", len(core.registry.tombstones), limits.tombstones_max),
        *(("spent_generations_max", len(peer.spent), limits.spent_generations_max) for peer in core.peers.values()),
    )
    return next((f"{size} is more than Limits.{name} ({limit})" for name, size, limit in sizes if size > limit), "")


def _released_memory_is_not_touched(step: CoreStep, around: Surroundings) -> str:
    """4"""
    me = step.after.identity.incarnation
    for effect in step.effects:
        if isinstance(effect, ev.ReleasePages):
            if not step.after.sends and not around.vouches and (me, effect.generation) in around.may_write:
                return f"pages of room {effect.room}, generation {effect.generation}, came back, and a write may still land there"
            if step.after.sends:
                ops = _ops_of(step, effect.generation)
                if ops & around.reads_from:
                    return f"source pages of room {effect.room} came back while writes {sorted(ops & around.reads_from)} read them"
        elif isinstance(effect, ev.Submit) and around.free(effect.peer, effect.generation):
            return f"write {effect.op} goes to pages of generation {effect.generation} that were given back"
    return ""


def _ops_of(step: CoreStep, generation: int) -> set[int]:
    return {op.id for op in step.before.ops.values() if op.link.room.generation == generation}


def _drained_is_true(step: CoreStep, around: Surroundings) -> str:
    """5: who says Drained has nothing outstanding there, and nothing can follow."""
    if not step.after.sends:
        return ""
    for effect in step.effects:
        if isinstance(effect, ev.Send) and isinstance(effect.message, wire.Drained):
            generation = effect.message.generation
            link = step.after.links.get((effect.peer, generation))
            if link is not None and (link.ops or link.room.live):
                return f"says Drained of generation {generation} with {sorted(link.ops)} outstanding"
            busy = {op.id for op in step.before.ops.values() if (op.link.peer, op.link.generation) == (effect.peer, generation)}
            if busy & around.reads_from:
                return f"says Drained of generation {generation} while writes {sorted(busy & around.reads_from)} are under way"
    return ""


def _success_is_complete(step: CoreStep, around: Surroundings) -> str:
    """9"""
    if step.after.sends:
        return ""
    for effect in step.published():
        if effect.phase != Phase.SUCCESS:
            continue
        landed = around.landed(effect.generation)
        room = step.after.registry.by_generation[effect.generation]
        for writer in room.links:
            chunks, total = landed.get(writer, (set(), 0))
            if not total or chunks != set(range(total)):
                name = step.after.peer_name(writer)
                return f"room {room.room} succeeded with chunks {sorted(chunks)} of {total or '?'} from {name}"
    return ""


def _what(event: ev.Event | None) -> str:
    if event is None:
        return "a timer"
    return type(event.message if isinstance(event, ev.Received) else event).__name__


STEP: tuple[Callable[[CoreStep], str], ...] = (
    _only_the_owner_opens_and_clears,
    _terminal_is_absorbing_and_single,
    _only_declared_edges,
    _what_the_engine_does_wrong_changes_nothing,
    _an_abort_fails_the_room,
    _generations_are_new,
    _foreign_messages_change_no_room,
    _memory_comes_back_once,
    _a_concluded_room_owes_or_frees,
    _every_wait_has_an_end,
    _failure_reaches_the_peers,
    _an_unaddressed_room_is_left_alone,
    _tables_have_bounds,
)
WORLD: tuple[Callable[[CoreStep, Surroundings], str], ...] = (
    _released_memory_is_not_touched,
    _drained_is_true,
    _success_is_complete,
)


def title(check: Callable[..., str]) -> str:
    """The name of a property, as people read it."""
    return check.__name__.strip("_").replace("_", " ")


def broken_by(step: CoreStep) -> str:
    """The first property of a core that `step` breaks, with what is wrong, or ""."""
    for check in STEP:
        wrong = check(step)
        if wrong:
            return f"{title(check)}: {wrong}"
    return ""


def broken_around(step: CoreStep, around: Surroundings) -> str:
    """The first property of the world that `step` breaks, with what is wrong, or ""."""
    for check in WORLD:
        wrong = check(step, around)
        if wrong:
            return f"{title(check)}: {wrong}"
    return ""
