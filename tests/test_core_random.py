"""Random schedules against three real cores: safety after every step, then a healed network in which everything must end.

To repeat a failing one, run `World(seed).run()`: it depends on nothing but its seed.
"""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.ledger import Room
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.machines import Phase
from tests.pair import ADDRESS, Pair, Side, pages

SEEDS, BLOCKS, EVENTS = 300, 10, 300
ROOMS = 4  # few, so that numbers are used again while the last life is still in the air
TERMINAL = (Phase.SUCCESS, Phase.FAILED)
DEADLINES = Deadlines(
    bootstrap_ms=20_000,
    waiting_ms=15_000,
    transfer_ms=10_000,
    handshake_ms=4_000,
    lost_ms=6_000,
    early_offer_ms=5_000,
    tombstone_ms=8_000,
)
Transfer = tuple[bytes, int]  # decode's incarnation and generation, which names a transfer


class World(Pair):
    """One prefill rank (which may be replaced) and two decode ranks, a hostile network, and a data plane that takes its time."""

    def __init__(self, seed: int) -> None:
        super().__init__(DEADLINES, Limits(spent_generations_max=6, early_offers_max=6))
        self.random = random.Random(seed)
        self.decodes = [self.d, self.side("decode", b"E" * 16, "decode-1")]
        self.vouches = self.random.random() < 0.3  # whether decode's data plane can close a grant by itself
        self.notifies = self.random.random() < 0.5
        self.old_frames: list[tuple[Side, bytes, bytes]] = []
        self.lookups: list[tuple[Side, int]] = []
        self.doubtful: dict[int, ev.Submit] = {}  # of unknown outcome: may still land
        self.writer: dict[int, Side] = {}
        self.landed: defaultdict[Transfer, set[int]] = defaultdict(set)
        self.total: dict[Transfer, int] = {}
        self.closed: set[Transfer] = set()  # the data plane lets nothing more land
        self.seen = {side.incarnation: 0 for side in self.sides}
        self.ended: dict[Transfer, Phase] = {}
        self.free: set[Transfer] = set()
        self.revokes: list[tuple[Side, int]] = []

    # --- what must always hold -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look at everything that the sides asked for since the last check."""
        for side in self.sides:
            first, self.seen[side.incarnation] = self.seen[side.incarnation], len(side.effects)
            for effect in side.effects[first:]:
                match effect:
                    case ev.Publish(_, generation, phase):
                        self.check_phase(side, generation, Phase(phase))
                    case ev.ReleasePages(_, generation):
                        self.check_release(side, generation)
                    case ev.Submit(op, peer, generation):
                        reader = next(s for s in self.decodes if s.incarnation == peer)
                        free = (reader.incarnation, generation) in self.free and (peer, generation) not in self.closed
                        assert not free, f"op {op} writes to pages that were given back"
                        self.writer[op] = side
                        if effect.notice.chunks_total:
                            self.total[peer, generation] = effect.notice.chunks_total
                    case ev.Lookup(query):
                        self.lookups.append((side, query))
                    case ev.Revoke(generation) if self.vouches:
                        self.revokes.append((side, generation))
                    case _:
                        pass

    def check_phase(self, side: Side, generation: int, phase: Phase) -> None:
        key = side.incarnation, generation
        assert key not in self.ended, f"generation {generation} left {self.ended[key].name} for {phase.name}"
        if phase in TERMINAL:
            self.ended[key] = phase
        if phase is Phase.SUCCESS and not side.core.sends:
            transfer = side.incarnation, generation
            assert transfer in self.total, "success before the last chunk was known"
            assert self.landed[transfer] == set(range(self.total[transfer])), "success without every chunk"

    def check_release(self, side: Side, generation: int) -> None:
        key = side.incarnation, generation
        assert key in self.ended, "memory came back before the verdict"
        assert key not in self.free, f"generation {generation} was released twice"
        self.free.add(key)
        transfer = side.incarnation, generation
        for op, write in {**self.writes, **self.doubtful}.items():
            if side.core.sends:
                own = self.writer.get(op) is side and side.core.ops[op].link.room.generation == generation
                assert not own, f"op {op} still reads from pages that were given back"
            elif transfer not in self.closed:
                assert (write.peer, write.generation) != transfer, f"op {op} may still write to pages that were given back"

    # --- what may happen -------------------------------------------------------------------------------------------------

    def rooms(self, side: Side) -> list[Room]:
        return list(side.core.registry.by_room.values())

    def some_side(self) -> Side:
        return self.random.choice(self.sides)

    def open_send(self) -> None:
        room = self.random.randrange(ROOMS)
        if room not in self.p.core.registry.by_room:
            self.p.step(ev.OpenSend(room, self.random.choice((1, 1, 1, 2))))

    def open_receive(self) -> None:
        side, room = self.random.choice(self.decodes), self.random.randrange(ROOMS)
        if room not in side.core.registry.by_room:
            late = self.random.random() < 0.2
            side.step(ev.OpenReceive(room, None if late else pages(1, 2, 3), -1, 0, ADDRESS))

    def grant(self) -> None:
        side = self.random.choice(self.decodes)
        for room in self.rooms(side):
            if room.live and room.request is not None and room.request.pages is None:
                side.step(ev.GrantPages(room.generation, pages(1, 2, 3)))

    def answer_lookup(self) -> None:
        if self.lookups:
            side, query = self.lookups.pop(self.random.randrange(len(self.lookups)))
            if self.random.random() < 0.9:
                side.step(ev.PeersFound(query, (self.record(),)))
            else:
                side.step(ev.LookupFailed(query, "try again"))

    def hand_in(self) -> None:
        for room in self.rooms(self.p):
            if room.live and not room.closed:
                index = len(room.chunks)
                last = index == 2 or self.random.random() < 0.4
                self.p.step(ev.ChunkReady(room.generation, 16 * index, 16 * index + 16, pages(index), last))
                return

    def abort_one(self) -> None:
        side = self.some_side()
        if rooms := self.rooms(side):
            side.abort(self.random.choice(rooms))

    def cancel_one(self) -> None:
        self.some_side().step(ev.CancelRequested(self.random.randrange(ROOMS), "client left"))

    def clear_one(self) -> None:
        side = self.some_side()
        if rooms := [room for room in self.rooms(side) if not room.live]:
            side.clear(self.random.choice(rooms))

    def carry(self) -> None:
        """One message arrives, whichever; or is lost; or arrives and stays in the network to arrive again."""
        if not self.wire:
            return
        self.wire.rotate(-self.random.choice((0, 0, 0, 1, self.random.randrange(len(self.wire)))))
        frame = self.wire.popleft()
        self.old_frames.append(frame)
        if self.random.random() < 0.9:
            self.arrive(*frame)

    def carry_old(self) -> None:
        """A copy of some earlier message, however old."""
        if self.old_frames:
            recent = self.old_frames[-20:] if self.random.random() < 0.7 else self.old_frames
            self.arrive(*self.random.choice(recent))

    def arrive(self, sender: Side, peer: bytes, frame: bytes) -> None:
        source, destination, message = wire.decode(frame)
        receiver = next((side for side in self.sides if side.incarnation == peer), None)
        (receiver or self.other(sender)).step(ev.Received(source, destination, message))

    def write_ends(self) -> None:
        if self.writes:
            op = self.random.choice(list(self.writes))
            kind = self.random.random()
            if kind < 0.7:
                self.land(op)
            elif kind < 0.85:
                del self.writes[op]
                self.p.step(ev.WriteFailed(op, "no route"))
            else:
                self.doubtful[op] = self.writes.pop(op)
                self.p.step(ev.WriteUnknown(op, "timed out"))

    def doubt_ends(self) -> None:
        if self.doubtful:
            op = self.random.choice(list(self.doubtful))
            write = self.doubtful.pop(op)
            if self.random.random() < 0.5:
                self.land(op, write)
            else:
                self.p.step(ev.WriteSettled(op))

    def land(self, op: int, write: ev.Submit | None = None) -> None:
        write = write or self.writes.pop(op)
        transfer = write.peer, write.generation
        reader = next(side for side in self.decodes if side.incarnation == write.peer)
        if transfer in self.closed:
            self.p.step(ev.WriteFailed(op, "the grant is closed"))
            return
        assert (reader.incarnation, write.generation) not in self.free, f"op {op} landed in pages that were given back"
        self.landed[transfer].add(write.notice.chunk)
        if self.notifies:
            reader.tell(write.notice, self.p)
        self.p.step(ev.WriteDone(op, write.notice.nbytes, self.notifies))

    def vouch(self) -> None:
        if self.revokes:
            side, generation = self.revokes.pop(0)
            self.closed.add((side.incarnation, generation))
            side.step(ev.Revoked(generation))

    def pass_time(self, ms: float | None = None) -> None:
        self.now_ms += ms or self.random.choice((1, 30, 60, 300, 1_000, 1_000, 3_000))
        for side in self.sides:
            side.expire()

    def shake(self) -> None:
        """A connection breaks, or a peer's outbox overflows."""
        side = self.some_side()
        if side.core.peers:
            peer = self.random.choice(list(side.core.peers))
            event = ev.PeerUnreachable(peer, "reset") if self.random.random() < 0.8 else ev.PeerOverflowed(peer, "full")
            side.step(event)

    def replace_prefill(self) -> None:
        """The prefill process dies; another one starts at its address. What it had submitted is over with it."""
        old = self.p
        self.sides.remove(old)
        self.writes.clear()
        self.doubtful.clear()
        self.p = self.side("prefill", self.random.randbytes(16), "prefill-0")
        self.seen[self.p.incarnation] = 0
        if self.random.random() < 0.5:
            for side in self.decodes:
                side.step(ev.PeerUnreachable(old.incarnation, "connection refused", dead=True))

    # --- the run ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        actions = {
            self.open_send: 6,
            self.open_receive: 6,
            self.answer_lookup: 6,
            self.grant: 3,
            self.hand_in: 10,
            self.abort_one: 2,
            self.cancel_one: 0.5,
            self.clear_one: 6,
            self.carry: 40,
            self.carry_old: 4,
            self.write_ends: 8,
            self.doubt_ends: 2,
            self.vouch: 2,
            self.pass_time: 6,
            self.shake: 0.3,
            self.replace_prefill: 0.15,
        }
        for action in self.random.choices(list(actions), list(actions.values()), k=EVENTS):
            action()
            self.check()
        self.heal()

    def heal(self) -> None:
        """The network loses nothing any more and every write ends: then all rooms conclude and nothing is left."""
        for _ in range(60):
            for op in list(self.writes):
                self.land(op)
            for op, write in list(self.doubtful.items()):
                self.land(op, write)
            self.doubtful.clear()
            while self.lookups:
                side, query = self.lookups.pop()
                side.step(ev.PeersFound(query, (self.record(),)))
            while self.revokes:
                self.vouch()
            self.deliver()
            self.check()
            self.advance(1_000)
            self.check()
        for side in self.sides:
            for room in self.rooms(side):
                assert not room.live, f"{side.core.identity.name}: room {room.room} is still {room.state.name}"
                side.clear(room)
                held = f"{side.core.identity.name}: room {room.room} holds its memory"
                assert (side.incarnation, room.generation) in self.free, held
        self.advance(10_000)
        self.idle()
        for side in self.sides:
            registry = side.core.registry
            left = registry.by_room, registry.by_generation, registry.tombstones, registry.early_count
            assert not any(left), left


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_schedules(block: int) -> None:
    for seed in range(block, SEEDS, BLOCKS):
        world = World(seed)
        try:
            world.run()
        except Exception as error:
            raise AssertionError(f"World({seed}).run(): {error}") from error


def test_the_schedules_reach_what_they_are_for() -> None:
    """A run in which nothing happens would prove nothing."""
    counts: defaultdict[str, int] = defaultdict(int)
    for seed in range(40):
        world = World(seed)
        world.run()
        for side in world.sides:
            for name, count in side.core.counts.items():
                counts[name] += count
            for step in side.steps:
                counts[step.row] += 1
    reached = [
        "succeeded",
        "failed.abort",
        "failed.peer_abort",
        "failed.peer_failed",
        "failed.peer_lost",
        "failed.timeout",
        "failed.transport",
        "late.verdict",
        "late.part",
        "late.drained",
        "misdirected",
        "repeated.abort",
        "repeated.drained",
        "repeated.verdict",
        "lease.unknown:REVOKING",
        "lease.settled:QUARANTINED[no_holder]",
        "peer.heard:SUSPECT",
    ]
    assert {name: counts[name] for name in reached if counts[name] < 3} == {}
