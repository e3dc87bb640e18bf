"""Rooms by number and by generation, tombstones of cleared ones, and offers that came too early.

Only the local open creates a room; no message, callback or timer can. Cleared is absence, plus a tombstone that is bounded in
number and age and answers those who register late. Early offers are kept within a cap and an age; their sender repeats them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

import attrs

from pd_fsm.core.events import Failure
from pd_fsm.core.ledger import Room
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.core.wire import Offer


@attrs.define(eq=False)
class Tombstone:
    """The verdict of a cleared room. `unmet` readers of a sending one have not offered, so they do not know it yet.

    `cancelled`: the room was given up by its number before it was opened here, and its next open fails at once. `outdated`: the
    rendezvous' announcement of the room at prefill that failed with a receiving one; its next open waits for another.
    """

    room: int
    failure: Failure | None
    unmet: int
    expires_ms: float
    cancelled: bool = False
    outdated: int = 0


class Registry:
    """The tables of one session. Not thread-safe: the session's lock guards it."""

    def __init__(self, limits: Limits, deadlines: Deadlines) -> None:
        self._limits = limits
        self._deadlines = deadlines
        self.by_room: dict[int, Room] = {}
        self.by_generation: dict[int, Room] = {}
        self.tombstones: OrderedDict[int, Tombstone] = OrderedDict()
        self._early: OrderedDict[tuple[int, bytes, int], tuple[Offer, float]] = OrderedDict()
        self._early_rooms: dict[int, dict[tuple[int, bytes, int], None]] = {}
        self._early_of: Counter[bytes] = Counter()  # by peer
        self._last_generation = 0

    def mint(self) -> int:
        self._last_generation += 1
        return self._last_generation

    def add(self, room: Room) -> None:
        assert room.room not in self.by_room, f"room {room.room} is already open"
        self.by_room[room.room] = room
        self.by_generation[room.generation] = room

    def remove(self, room: Room) -> None:
        assert not room.live, f"room {room.room} is still {room.state.name}"
        assert self.by_room.get(room.room) is room
        del self.by_room[room.room]
        del self.by_generation[room.generation]

    def bury(self, room: Room, now_ms: float) -> None:
        """Leave a tombstone: it answers readers that register late, and tells a late cancel from an early one."""
        unmet = room.readers - len(room.links) - room.refused
        expires_ms = now_ms + self._deadlines.tombstone_ms
        self._entomb(Tombstone(room.room, room.failure, unmet, expires_ms, outdated=room.outdated_announcement()))

    def cancel(self, room: int, failure: Failure, now_ms: float) -> None:
        """Remember that a room that is not open here was given up."""
        self._entomb(Tombstone(room, failure, 1 << 31, now_ms + self._deadlines.tombstone_ms, cancelled=True))

    def over(self, room: int) -> bool:
        """Whether a room was cleared not long ago, and no peer waits for another life of it."""
        tombstone = self.tombstones.get(room)
        return tombstone is not None and not tombstone.cancelled and room not in self._early_rooms

    def outdated(self, room: int) -> int:
        """The announcement by which the next life of a room that was cleared not long ago must not be bound, 0 if there is none."""
        tombstone = self.tombstones.get(room)
        return tombstone.outdated if tombstone is not None else 0

    def cancelled(self, room: int) -> Failure | None:
        """Take a room's tombstone away because it is opened; its failure if it had been cancelled before."""
        tombstone = self.tombstones.pop(room, None)
        return tombstone.failure if tombstone is not None and tombstone.cancelled else None

    def _entomb(self, tombstone: Tombstone) -> None:
        self.tombstones.pop(tombstone.room, None)
        self.tombstones[tombstone.room] = tombstone
        if len(self.tombstones) > self._limits.tombstones_max:
            self.tombstones.popitem(last=False)

    def park(self, peer: bytes, offer: Offer, now_ms: float) -> str:
        """Keep an offer for a room that is not open yet. Returns which limit forbids it, or "". Repeating it renews its age."""
        key = (offer.room, peer, offer.generation)
        if key in self._early:
            del self._early[key]
        elif len(self._early) >= self._limits.early_offers_max:
            return "early_offers_max"
        elif self._early_of[peer] >= self._limits.early_offers_per_peer_max:
            return "early_offers_per_peer_max"
        else:
            self._early_of[peer] += 1
        self._early[key] = (offer, now_ms + self._deadlines.early_offer_ms)
        self._early_rooms.setdefault(offer.room, {})[key] = None
        return ""

    def parked(self, peer: bytes, offer: Offer) -> bool:
        return (offer.room, peer, offer.generation) in self._early

    def unpark(self, room: int) -> list[tuple[bytes, Offer]]:
        """Take all early offers for `room`, oldest first."""
        return [(key[1], self._take_early(key)) for key in self._early_rooms.pop(room, {})]

    def _take_early(self, key: tuple[int, bytes, int]) -> Offer:
        peer = key[1]
        self._early_of[peer] -= 1
        if not self._early_of[peer]:
            del self._early_of[peer]
        return self._early.pop(key)[0]

    def early_rooms(self) -> list[int]:
        return list(self._early_rooms)

    def drop_early(self, peer: bytes, room: int | None = None, generation: int = 0) -> list[int]:
        """Forget the early offers of `peer`: one of them, or all when `room` is None. Returns their generations."""
        keys = [k for k in self._early if k[1] == peer] if room is None else [(room, peer, generation)]
        dropped = []
        for key in keys:
            if key in self._early:
                self._take_early(key)
                dropped.append(key[2])
                rest = self._early_rooms[key[0]]
                del rest[key]
                if not rest:
                    del self._early_rooms[key[0]]
        return dropped

    def expire(self, now_ms: float) -> None:
        """Drop what is too old. Both tables are in order of age, so this costs only what it drops."""
        while self.tombstones:
            oldest = next(iter(self.tombstones.values()))
            if oldest.expires_ms > now_ms:
                break
            del self.tombstones[oldest.room]
        while self._early:
            key, (_, expires_ms) = next(iter(self._early.items()))
            if expires_ms > now_ms:
                break
            self.drop_early(key[1], key[0], key[2])

    def next_expiry(self) -> float | None:
        """When the oldest tombstone or early offer lapses, or None."""
        times = []
        if self.tombstones:
            times.append(next(iter(self.tombstones.values())).expires_ms)
        if self._early:
            times.append(next(iter(self._early.values()))[1])
        return min(times, default=None)

    @property
    def early_count(self) -> int:
        return len(self._early)
