"""Records B001 to B046 on the real runtime: threads, sockets and planes, where the scenarios of those numbers name a test."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.runtime.agreement import Decision, RankAgreement
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.testing.scenario import Scenario
from pd_fsm.transports import memory
from tests.live import PAGE_SIZE, Engine, World, make_engine, messages
from tests.test_fake import layout

TABLES = ("rooms", "ops", "links", "leases", "repeats", "early_offers")
ENDS = (Phase.FAILED, Phase.SUCCESS)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Sessions that move only when the test drives them."""
    made = World("memory", thread=False, directory=tmp_path)
    yield made
    made.close()


@attrs.define(eq=False)
class Slow:
    """The memory transport with a queue in front: a write begins when the test says so, and may be refused or break before that."""

    world: World
    breaks_at: int = -1  # the submission, counted from 0, that raises
    submitted: int = 0
    queued: dict[int, Callable[[], None]] = attrs.field(factory=dict)
    begun: set[int] = attrs.field(factory=set)
    host: Any = None

    def __call__(self, host: Host) -> Transport:
        made = memory.create(host, hub=self.world.hub)
        submit = made.data.submit

        def queue(op: int, *rest: Any) -> None:
            self.submitted += 1
            if self.submitted == self.breaks_at + 1:
                raise OSError("no more work requests")
            self.queued[op] = lambda: submit(op, *rest)

        def cancel(op: int) -> None:
            if op in self.queued and op not in self.begun:
                self.fail(op, "cancelled before it began")

        made.data.submit, made.data.cancel = queue, cancel  # type: ignore[method-assign]
        self.host = host
        return made

    def begin(self, *ops: int) -> None:
        """From now on these cannot be cancelled."""
        self.begun |= set(ops)

    def end(self, op: int) -> None:
        self.queued.pop(op)()

    def fail(self, op: int, reason: str) -> None:
        del self.queued[op]
        self.host.emit(ev.WriteFailed(op, reason))


def slow_pair(world: World, breaks_at: int = -1) -> tuple[Slow, Engine, Engine]:
    slow = Slow(world, breaks_at)
    return slow, world.open("prefill", transport=slow, transport_options={}), world.open("decode")


def four_chunks(world: World, prefill: Engine, decode: Engine) -> tuple[pd_fsm.Sender, pd_fsm.Receiver]:
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [10, 11, 12, 13])
    world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    for index in range(4):
        sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 3)
    return sender, receiver


def test_b002_every_view_of_a_room_is_the_same_fact(world: World) -> None:
    """The verdict is there for everybody when abort() returns, before anything was driven, and nothing is written after it."""
    slow, prefill, decode = slow_pair(world)
    session = prefill.session
    sender, receiver = session.send(1), decode.session.receive(1, [5, 6])
    group = session.group([sender])
    sender.send([1], (0, PAGE_SIZE))
    world.until(lambda: slow.submitted == 1, "the first chunk was submitted")
    assert sender.phase is Phase.TRANSFERRING
    sender.abort("client left")
    views = (
        sender.poll(),
        sender.phase,
        session.poll_many([sender])[0],
        group.poll()[0],
        session.driver.core.registry.by_room[1].state,
    )
    assert set(views) == {Phase.FAILED}
    described = session.describe()["rooms"][0]
    assert (described["phase"], described["failure"]["reason"]) == ("FAILED", "client left")
    sender.send([2], (PAGE_SIZE, 2 * PAGE_SIZE), last=True)
    assert world.conclude(sender, receiver) == [Phase.FAILED, Phase.FAILED]
    assert slow.submitted == 1
    assert messages(prefill, "late.chunk") == 1
    assert (sender.failure.reason, receiver.failure.cause) == ("client left", "peer_abort")


def test_b003_two_threads_race_for_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 rooms, each failed by one thread and completed by another, in both orders: one verdict each, the first one."""
    published: defaultdict[int, list[int]] = defaultdict(list)
    with pd_fsm.open_session("prefill", layout(), transport="fake", thread=False) as session:
        publish = session.driver._board.publish

        def spy(generation: int, phase: int) -> None:
            published[generation].append(phase)
            publish(generation, phase)

        monkeypatch.setattr(session.driver._board, "publish", spy)
        for _ in range(20):
            _race(session, [session.send(room) for room in range(500)])
        counts = session.describe()["counts"]
    assert len(published) == 10_000
    ends = [[phase for phase in phases if phase in ENDS] for phases in published.values()]
    assert all(len(end) == 1 for end in ends), "two verdicts for one room"
    assert all(phases[-1] in ENDS for phases in published.values()), "something was published after the verdict"
    assert ends.count([Phase.FAILED]) == counts["failed.abort"] >= 20
    assert ends.count([Phase.SUCCESS]) == counts["succeeded"] >= 20


def _race(session: pd_fsm.Session, senders: list[pd_fsm.Sender]) -> None:
    session.progress()
    first, last = senders[0], senders[-1]
    first.send([1], (0, 16), last=True, aux=0)
    while first.poll() not in ENDS:
        session.progress()
    last.abort("aborted first")
    for sender in senders[1:-1]:
        sender.send([1], (0, 16), last=True, aux=0)
    gate = threading.Barrier(2)

    def abort() -> None:
        gate.wait(5)
        for sender in reversed(senders):
            sender.abort("client left")

    aborting = threading.Thread(target=abort)
    aborting.start()
    gate.wait(5)
    while any(sender.poll() not in ENDS for sender in senders) or aborting.is_alive():
        session.progress()
    aborting.join(5)
    assert (first.phase, last.phase) == (Phase.SUCCESS, Phase.FAILED)
    assert last.failure.reason == "aborted first"
    for sender in senders:
        assert (sender.phase is Phase.FAILED) == (sender.failure is not None)
        assert sender.phase is session.driver.core.registry.by_room[sender.room].state
        sender.clear()


def test_b008_a_reported_failure_leaves_empty_tables(world: World) -> None:
    slow, prefill, decode = slow_pair(world)
    sender, receiver = four_chunks(world, prefill, decode)
    world.until(lambda: len(slow.queued) == 4, "all chunks were submitted")
    slow.fail(1, "the link is down")
    assert world.conclude(sender, receiver) == [Phase.FAILED, Phase.FAILED]
    for handle in (sender, receiver):
        with pytest.raises(pd_fsm.RoomFailed, match="the link is down"):
            handle.raise_for_failure()
        handle.clear()
    world.at_rest()
    for engine in (prefill, decode):
        described = engine.session.describe()
        assert {table: described[table] for table in TABLES if described[table]} == {}
        assert sum(count for name, count in described["counts"].items() if name.startswith("failed.")) == 1
    assert slow.queued == {}
    decode.check()


def test_b030_source_pages_stay_until_every_write_ended(world: World) -> None:
    """Of four writes one fails; the pages of the other three are still read, and none may be given away."""
    slow, prefill, decode = slow_pair(world)
    sender, receiver = four_chunks(world, prefill, decode)
    world.until(lambda: len(slow.queued) == 4, "all chunks were submitted")
    slow.begin(1, 2, 4)
    slow.fail(3, "the link is down")
    world.until(lambda: sender.phase is receiver.phase is Phase.FAILED, "both failed")
    assert "chunk 2" in sender.failure.reason
    sender.clear()
    for op in (4, 1, 2):
        world.until(lambda: not any(engine.session.progress() for engine in world.engines), "nothing is left to do")
        assert not sender.pages_free, f"write {op} still reads"
        assert not messages(prefill, "driver_error")
        slow.end(op)
    world.conclude(sender, receiver)
    world.at_rest()
    decode.check()  # decode's plane had closed the grant: what came later did not land


def test_b039_128_rooms_admitted_4_at_a_time() -> None:
    """Prefill gives a room 30 s; decode, which lives, needs 160 s for its queue. Virtual time, real cores."""
    play = Scenario()
    play.execute("world P D P.waiting_ms=30000")
    for room in range(128):
        play.execute(f"D open {room}")
        play.execute(f"P open {room}")
        play.execute(f"P chunk {room} 0..16 pages={room} last")
    for first in range(0, 128, 4):
        play.execute("wait 5s")
        for room in range(first, first + 4):
            play.execute(f"D grant {room} pages={room}")
            (write,) = play.world.writes
            play.execute(f"{write} done")
    for room in range(128):
        play.execute(f"expect D {room} SUCCESS")
        play.execute(f"expect P {room} SUCCESS")
    play.execute("expect idle")
    assert play.world.now_ms == 160_000


@pytest.mark.parametrize("seed", range(3))
def test_b042_two_hundred_cancelled_rooms_and_a_probe(tmp_path: Path, seed: int) -> None:
    """Over sockets, with few bytes on their way at a time, so that writes of all ages meet their cancel."""
    dice = random.Random(seed)
    world = World("tcp", thread=False, directory=tmp_path)
    limits = pd_fsm.Limits(in_flight_bytes_max=2_000)
    prefill = world.open("prefill", make_engine("prefill", 1, pages=400), limits=limits)
    decode = world.open("decode", make_engine("decode", 2, pages=400))
    senders = [prefill.session.send(room) for room in range(200)]
    receivers = [decode.session.receive(room, [2 * room, 2 * room + 1]) for room in range(200)]
    world.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    for sender in senders:
        sender.send([2 * sender.room, 2 * sender.room + 1], (0, 2 * PAGE_SIZE))
    assert all(sender.phase is Phase.TRANSFERRING for sender in senders)
    world.until(lambda: sum(sender.bytes_moved > 0 for sender in senders) >= 20, "some chunks have arrived")
    for room in dice.sample(range(200), 200):
        how = dice.randrange(4)
        if how < 2:
            (senders, receivers)[how][room].abort("client left")
        else:
            (prefill, decode)[how - 2].session.cancel(room, "client left")
        if dice.random() < 0.3:
            dice.choice([prefill, decode]).session.progress()
    assert set(world.conclude(*senders, *receivers)) == {Phase.FAILED}
    for handle in (*senders, *receivers):
        handle.clear()
    for buffer, expected in zip(decode.buffers, decode.expected, strict=True):
        buffer[:] = expected[:] = 0xA5
    world.at_rest()
    with prefill.session.send(1_000) as sender, decode.session.receive(1_000, [7]) as receiver:
        sender.send([8], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(8, 7)])
    decode.check()
    world.at_rest()
    for engine in (prefill, decode):
        described = engine.session.describe()
        assert {table: described[table] for table in TABLES if described[table]} == {}
        assert messages(engine, "driver_error") == 0
    world.close()


def in_step(ranks: int) -> list[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]]:
    """The collective of `ranks` threads of this process."""
    blocks: dict[int, NDArray[np.uint8]] = {}
    gate = threading.Barrier(ranks)

    def collective(rank: int) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]]:
        def gather(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
            blocks[rank] = block
            gate.wait(5)
            gathered = np.stack([blocks[other] for other in range(ranks)])
            gate.wait(5)
            return gathered

        return gather

    return [collective(rank) for rank in range(ranks)]


def tick(groups: list[RankAgreement]) -> list[list[Decision]]:
    """One tick of all ranks, each on its own thread."""
    decided: dict[int, list[Decision]] = {}
    ticking = [threading.Thread(target=lambda n=n, g=g: decided.update({n: g.tick()})) for n, g in enumerate(groups)]  # type: ignore[misc]
    for thread in ticking:
        thread.start()
    for thread in ticking:
        thread.join(10)
    return [decided[rank] for rank in range(len(groups))]


def test_b042_ranks_cancel_alike_and_free_each_for_itself(world: World) -> None:
    """Two ranks of one prefill engine: cancels that reach one of them only are applied by both in the same tick and order; the
    memory of each comes back when its own writes have ended."""
    slows, prefills, decodes = [], [], []
    for rank in range(2):
        slows.append(Slow(world))
        topology = pd_fsm.Topology(tp_rank=rank, tp_size=2)
        prefills.append(world.open("prefill", transport=slows[rank], transport_options={}, topology=topology))
        decodes.append(world.open("decode", topology=topology))
    groups = [
        RankAgreement(prefill.session, gather, rank, 2)
        for rank, (prefill, gather) in enumerate(zip(prefills, in_step(2), strict=True))
    ]
    rooms = range(6)
    senders = [[prefill.session.send(room) for room in rooms] for prefill in prefills]
    receivers = [[decode.session.receive(room, [room]) for room in rooms] for decode in decodes]
    for group, mine in zip(groups, senders, strict=True):
        for sender in mine:
            assert group.watch(sender) is None
            sender.send([sender.room], (0, PAGE_SIZE))
    world.until(lambda: all(len(slow.queued) == 6 for slow in slows), "every rank writes every room")
    for slow in slows:
        slow.begin(*slow.queued)
    tick(groups)
    for rank, room in ((0, 5), (1, 0), (0, 2), (1, 4), (0, 0)):
        senders[rank][room].abort(f"cancelled on rank {rank}")
    here, there = tick(groups)
    assert here == there
    assert [decision.room for decision in here if decision.phase is Phase.FAILED] == [0, 2, 5, 4]
    assert tick(groups) == [[], []], "each was decided once"
    for mine in senders:
        assert [sender.room for sender in mine if sender.phase is Phase.FAILED] == [0, 2, 4, 5]
        assert not any(sender.pages_free for sender in mine)
    for rank in (1, 0):
        for op in list(slows[rank].queued):
            slows[rank].end(op)
        gone = [senders[rank][room] for room in (0, 2, 4, 5)]
        world.until(lambda gone=gone: all(sender.pages_free for sender in gone), f"rank {rank} has its memory back")  # type: ignore[misc]
        if rank == 1:
            assert not any(sender.pages_free for sender in senders[0]), "the other rank's writes go on"
    for mine, theirs in zip(senders, receivers, strict=True):
        for room in (1, 3):
            mine[room].send([], (PAGE_SIZE, PAGE_SIZE), last=True)
            assert world.conclude(mine[room], theirs[room]) == [Phase.SUCCESS, Phase.SUCCESS]


def test_b046_a_submission_that_breaks_in_the_middle(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The third of four submissions raises: those that run are awaited, the last one never begins, and what nobody knows about is
    held until somebody does."""
    slow, prefill, decode = slow_pair(world, breaks_at=2)
    slow.begin(1, 2)
    sender, receiver = four_chunks(world, prefill, decode)
    world.until(lambda: sender.phase is receiver.phase is Phase.FAILED, "both failed")
    assert sender.failure.cause == "transport"
    assert "outcome of chunk 2" in sender.failure.reason
    assert "no more work requests" in receiver.failure.reason
    assert "no more work requests" in caplog.text
    world.until(lambda: set(slow.queued) == {1, 2}, "the last one was taken back")
    for op in (1, 2):
        slow.end(op)
    world.until(lambda: prefill.session.describe()["ops"] == 1, "those that ran have ended")
    assert not sender.pages_free
    assert prefill.session.describe()["leases"][0]["state"] == "QUARANTINED"
    slow.host.emit(ev.WriteSettled(3))
    assert world.conclude(sender, receiver) == [Phase.FAILED, Phase.FAILED]
    sender.clear()
    receiver.clear()
    world.at_rest()
    with prefill.session.send(2) as again, decode.session.receive(2, [10]) as received:
        again.send([5], (0, PAGE_SIZE), last=True)
        world.until(lambda: bool(slow.queued), "it was submitted")
        slow.end(5)
        assert world.conclude(again, received) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(5, 10)])
    decode.check()
