"""Every message that a peer could send, whether or not it makes sense: what a rude environment throws at a core in each state."""

from __future__ import annotations

from collections.abc import Iterator

from pd_fsm.core import wire
from pd_fsm.core.session import SessionCore
from pd_fsm.testing.world import COMPONENTS, pages

_RANKS = (0, 1) * 4
STRANGER = b"somebody else".ljust(wire.INCARNATION_BYTES, b"_")


def messages(room: int, generation: int, peers: tuple[bytes, ...]) -> Iterator[wire.Message]:
    """Every type of message, more than once where its meaning depends on what it says."""
    for role in ("prefill", "decode"):
        yield wire.Hello("h", role, "world", _RANKS, COMPONENTS, b"")
        yield wire.Welcome("w", role, "world", _RANKS, COMPONENTS, b"")
    yield wire.Hello("h", "decode", "another", _RANKS, COMPONENTS[:1], b"")
    yield wire.Refuse("no")
    for peer in peers:
        yield wire.Stranger(peer)
    yield wire.Offer(room, generation, pages([900]), -1, 0)
    yield wire.Offer(room, generation, pages([900, 900]), 1 << 20, 7)
    yield wire.Offer(room, generation, {"elsewhere": b"\0"}, -1, 0, 16)
    yield wire.Offer(room, generation, {}, -1, 0)
    yield wire.Accepted(room, generation)
    yield wire.Computed(room, generation, 16)
    for chunk, total in ((0, 0), (0, 1), (1, 1), (5, 0), (5, 9)):
        yield wire.Part(room, generation, chunk, total, False, 1)
    yield wire.Verdict(room, generation, True, "", "", 1)
    yield wire.Verdict(room, generation, False, "abort", "no", 0)
    yield wire.Verdict(room, generation, False, "of its own making", "", 0)
    yield wire.VerdictAck(room, generation)
    yield wire.Abort(room, generation, "abort", "no")
    yield wire.Drained(room, generation)
    yield wire.DrainedAck(room, generation)
    yield from (wire.Ping(), wire.Pong(), wire.Draining("soon"), wire.Goodbye("no", False), wire.Goodbye("no", True))


def frames(core: SessionCore, room: int) -> Iterator[tuple[bytes, bytes, wire.Message]]:
    """(source, destination, message): from each peer that `core` knows and from a stranger; for lives of the room that were, are
    and will be, and for another room; to this process and to one that is gone."""
    me = core.identity.incarnation
    last = core.registry._last_generation  # noqa: SLF001 - read only
    known = {generation for _, generation in core.links} | set(range(1, last + 2))
    for source in (*core.peers, STRANGER):
        for generation in sorted(known):
            for message in messages(room, generation, (*core.peers, me, STRANGER)):
                yield source, me, message
        for message in messages(room + 1, 1, ()):
            yield source, me, message
    for peer in core.peers:
        for message in messages(room, max(last, 1), ()):
            yield peer, STRANGER, message
