"""The records of a session: rooms, their links to peers, operations, leases, peers. Data and the facts derived from it.

Outstanding work is always a set of identities, never a counter, so a duplicate cannot make it wrong. Nothing here changes a
machine's state: `session.Session.move` does.
"""

from __future__ import annotations

from collections import deque

import attrs

from pd_fsm.core.events import ChunkReady, Failure, OpenReceive
from pd_fsm.core.wire import ComponentInfo, Greeting, Offer
from pd_fsm.machines import LeaseState, PeerState, Phase
from pd_fsm.machines.room import TERMINAL

_OWNED = (LeaseState.PRIVATE, LeaseState.QUIESCED)
_UP = (PeerState.READY, PeerState.SUSPECT)
PLACED_MAX = 64  # writes remembered for each peer; one that so many later ones overtook is not queued, it stalls


@attrs.define(eq=False)
class Lease:
    """Who may touch the memory of one room on this side: operation ids on the sender, peers on the receiver."""

    state: LeaseState = LeaseState.PRIVATE
    holders: set[int | bytes] = attrs.field(factory=set)

    @property
    def owned(self) -> bool:
        """Whether nobody but the owner can touch the memory."""
        return self.state in _OWNED


@attrs.define(eq=False)
class Link:
    """One peer's part in one room. `generation` is decode's, on both sides: it names the transfer on the wire."""

    room: Room
    peer: bytes
    generation: int
    offer: Offer | None = None  # sender: what decode granted
    ops: set[int] = attrs.field(factory=set)  # sender: operations that may still touch decode's pages
    chunks_confirmed: set[int] = attrs.field(factory=set)
    chunks_total: int = 0  # receiver: 0 until the sender said which chunk is the last
    complete: bool = False  # receiver: every part of this peer was confirmed
    announced: bool = False  # receiver: an offer went out, so the writer must be told how the room ends
    opened: bool = False  # receiver: the writer has the room open, too
    exposed: bool = False  # receiver: the offer granted pages
    bytes_moved: int = 0
    told: bool = True  # sender: the data plane itself told decode of every part
    verdict_acked: bool = False  # sender: decode knows the verdict
    drain_asked: bool = False  # sender: decode waits for a Drained
    drain_acked: bool = False


@attrs.define(eq=False)
class Room:
    """One request's hand-off as this rank sees it."""

    room: int
    generation: int
    sends: bool
    opened_ms: float
    state: Phase = Phase.BOOTSTRAPPING
    failure: Failure | None = None
    deadline_ms: float = 0.0
    readers: int = 0  # sender: how many decode ranks must offer
    refused: int = 0  # sender: how many of them offered after it had failed, and were told so
    cancelled: Failure | None = None  # cancelled by its number after it had been aborted: it must not be tried again
    request: OpenReceive | None = None  # receiver: what the engine granted
    links: dict[bytes, Link] = attrs.field(factory=dict)
    chunks: list[ChunkReady] = attrs.field(factory=list)
    chunks_submitted: int = 0
    closed: bool = False  # sender: the last chunk was handed in
    bytes_moved: int = 0
    lease: Lease = attrs.field(factory=Lease)
    tokens_computed: int | None = None  # receiver: prefill holds the whole prompt and waits for pages
    lookup_reason: str = ""  # receiver: why the last lookup failed
    announcement: int = 0  # receiver: by which prefill rank's announcement of the room it was bound, 0 if by none
    outdated: int = 0  # receiver: the announcement of an earlier attempt, whose room at prefill is over

    @property
    def live(self) -> bool:
        return self.state not in TERMINAL

    def all_confirmed(self) -> bool:
        """Whether every expected part was confirmed, each once, under its full key (peer, chunk)."""
        if self.sends:
            total = len(self.chunks)
            return self.closed and all(len(link.chunks_confirmed) == total for link in self.links.values())
        return bool(self.links) and all(link.complete for link in self.links.values())

    def outdated_announcement(self) -> int:
        """Receiver: the announcement by which a next attempt must not be bound, 0 if there is none. Prefill's room ended with ours
        if it was told of ours; before that, the announcement is still good."""
        told = self.failure is not None and any(link.announced for link in self.links.values())
        return self.announcement if told and self.announcement else self.outdated

    def decode_prefix_len(self) -> int | None:
        """Tokens that every reader already has; None until all have offered."""
        if len(self.links) < self.readers:
            return None
        return min((link.offer.decode_prefix_len for link in self.links.values() if link.offer), default=0)


@attrs.frozen(eq=False)
class Op:
    """One submitted write: a chunk to one peer."""

    id: int
    link: Link
    chunk: int


@attrs.define(eq=False)
class Peer:
    """One remote incarnation."""

    incarnation: bytes
    name: str
    endpoint: str  # where we look for it; empty when the peer connected to us
    heard_ms: float
    since_ms: float
    state: PeerState = PeerState.CONNECTING
    greeting: Greeting | None = None
    reason: str = ""  # why it was lost or refused
    dead: bool = False  # proven: its process is gone
    home: str = ""  # the endpoint at which it has answered
    draining: bool = False  # it takes no new rooms
    epoch: int = 0  # tells this acquaintance from an earlier one with the same process
    links: set[Link] = attrs.field(factory=set)
    spent: dict[int, Failure | None] = attrs.field(factory=dict)  # concluded generations, oldest first
    spent_floor: int = 0  # every unknown generation up to here counts as spent
    placed: deque[tuple[int, float]] = attrs.field(factory=lambda: deque(maxlen=PLACED_MAX))  # sender: (op, when), both rising

    @property
    def up(self) -> bool:
        return self.state in _UP

    def ordered_links(self) -> list[Link]:
        return sorted(self.links, key=lambda link: link.generation)

    def note_placed(self, op: int, now_ms: float) -> None:
        """A write to this peer ended well. Kept so that for any later op the last one before it is found."""
        while self.placed and self.placed[-1][0] > op:
            self.placed.pop()
        self.placed.append((op, now_ms))

    def spend(self, generation: int, failure: Failure | None, spent_max: int) -> None:
        """Remember that a transfer concluded, so that a repeated offer cannot open it again."""
        self.spent[generation] = failure
        if len(self.spent) > spent_max:
            oldest = next(iter(self.spent))
            del self.spent[oldest]
            self.spent_floor = max(self.spent_floor, oldest)


def spaces(components: tuple[ComponentInfo, ...]) -> dict[str, tuple[int, int]]:
    """(page size in tokens, pages) of each index space. Components that share a space share its indices."""
    found: dict[str, tuple[int, int]] = {}
    for component in components:
        if component.kind == "paged":
            pages = min(component.items, found.get(component.space, (0, component.items))[1])
            found[component.space] = (component.page_size, pages)
    return found


def space_bytes(components: tuple[ComponentInfo, ...], space: str) -> int:
    """Bytes of one page of `space`, over all regions of all components that share it."""
    return sum(sum(c.item_bytes) for c in components if c.kind == "paged" and c.space == space)


def aux_bytes(components: tuple[ComponentInfo, ...]) -> int:
    """Bytes of one aux row, over all components of that kind."""
    return sum(sum(c.item_bytes) for c in components if c.kind == "rows")


def aux_rows(components: tuple[ComponentInfo, ...]) -> int:
    """Number of aux rows, 0 when the layout has no aux component."""
    return min((component.items for component in components if component.kind == "rows"), default=0)
