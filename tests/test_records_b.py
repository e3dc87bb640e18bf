"""Records B047 to B095 on the real runtime: threads, sockets, planes, ranks, where the scenarios of those numbers name a test."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Limits
from pd_fsm.runtime.agreement import Decision, RankAgreement
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.transports import memory
from pd_fsm.transports.fake import Script
from tests.live import PAGE_SIZE, Engine, World, make_engine, messages, until
from tests.pair import Pair, pages
from tests.test_records_a import in_step, tick

ENDS = (Phase.FAILED, Phase.SUCCESS)
HURRY = pd_fsm.Deadlines(heartbeat_ms=80, lost_ms=800, handshake_ms=800, repeat_min_ms=10, repeat_max_ms=100)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Sessions over memory that move only when the test drives them."""
    made = World("memory", thread=False, directory=tmp_path)
    yield made
    made.close()


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[World]:
    made = World("tcp", thread=True, directory=tmp_path)
    yield made
    made.close()


@attrs.define(eq=False)
class Held:
    """The memory transport, except that a write ends when the test says so, and that no plane vouches for a revoked grant."""

    world: World
    queue_max: int = 1 << 30
    refuse: Callable[[int, int], str] = lambda _room, _chunk: ""
    """(room, chunk) to why its write cannot be posted."""
    open: dict[int, tuple[int, Callable[[], None]]] = attrs.field(factory=dict)
    """By op: its room, and what lands it."""
    peak: int = 0
    host: Any = None

    def __call__(self, host: Host) -> Transport:
        made = memory.create(host, hub=self.world.hub)
        submit = made.data.submit

        def hold(op: int, peer: bytes, generation: int, plan: Any, notice: bytes) -> None:
            part: Any = wire.decode(notice)[2]
            why = self.refuse(part.room, part.chunk) or ("the send queue is full" if len(self.open) >= self.queue_max else "")
            if why:
                host.emit(ev.WriteFailed(op, why))
                return
            self.open[op] = part.room, lambda: submit(op, peer, generation, plan, notice)
            self.peak = max(self.peak, len(self.open))

        made.data.submit = hold  # type: ignore[method-assign]
        made.data.revoke = lambda _: False  # type: ignore[method-assign]
        self.host = host
        return made

    def end(self, op: int) -> None:
        self.open.pop(op)[1]()

    def fail(self, op: int) -> None:
        del self.open[op]
        self.host.emit(ev.WriteFailed(op, "cancelled"))

    def of(self, room: int) -> list[int]:
        return [op for op, (owner, _) in self.open.items() if owner == room]


def held_pair(world: World, held: Held, **settings: Any) -> tuple[Engine, Engine]:
    """`settings` are both sides'."""
    reader = Held(world)
    return (
        world.open("prefill", transport=held, transport_options={}, **settings),
        world.open("decode", transport=reader, transport_options={}, **settings),
    )


def whole(sender: pd_fsm.Sender, page: int) -> None:
    """The usual prompt of one page."""
    sender.send([page], (0, PAGE_SIZE), last=True)


# --- writes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_b047_nothing_is_free_while_a_write_runs(world: World, seed: int) -> None:
    """A storm of aborts from both sides over running writes: no page is free before the last write of its room has ended."""
    dice = random.Random(seed)
    held = Held(world)
    prefill, decode = held_pair(world, held)
    rooms = range(12)
    senders = [prefill.session.send(room) for room in rooms]
    receivers = [decode.session.receive(room, [3 * room, 3 * room + 1, 3 * room + 2]) for room in rooms]
    world.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    for index in range(3):
        for sender in senders:
            sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 2)
    world.until(lambda: len(held.open) == 36, "every write runs")

    def look() -> None:
        for room in rooms:
            if held.of(room):
                assert not senders[room].pages_free, f"source pages of room {room} are free while it is written"
                assert not receivers[room].pages_free, f"pages of room {room} are free while they are written"

    acts: list[Callable[[], None]] = [handle.abort for handle in (*senders, *receivers)]
    acts += [lambda op=op: (held.end if dice.random() < 0.5 else held.fail)(op) for op in held.open]  # type: ignore[misc]
    dice.shuffle(acts)
    for act in acts:
        act()
        look()
        for engine in (prefill, decode):
            engine.session.progress()
            look()
    world.conclude(*senders, *receivers)
    world.at_rest()


def test_b048_b058_writes_that_never_end_cost_their_rooms_only(world: World) -> None:
    """Four writes stall. Their rooms fail on time, on both sides; the fifth room, before and after that, notices nothing."""
    held = Held(world)
    prefill, decode = held_pair(world, held, deadlines=pd_fsm.Deadlines(transfer_ms=400, repeat_min_ms=20))
    stalled = [(prefill.session.send(room), decode.session.receive(room, [room])) for room in range(4)]
    for sender, _ in stalled:
        whole(sender, 1)
    world.until(lambda: len(held.open) == 4, "four writes run")

    def goes_through(room: int) -> None:
        sender, receiver = prefill.session.send(room), decode.session.receive(room, [room])
        whole(sender, 2)
        world.until(lambda: bool(held.of(room)), "it was submitted")
        held.end(*held.of(room))
        assert world.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]

    goes_through(5)
    world.until(lambda: all(handle.phase is Phase.FAILED for pair in stalled for handle in pair), "the four failed", 2.0)
    for sender, receiver in stalled:
        assert sender.failure.cause == "timeout"
        assert "without progress for 400 ms: writing to decode-0" in sender.failure.reason
        assert sender.failure.reason in receiver.failure.reason
        assert not sender.pages_free
        assert not receiver.pages_free
    goes_through(6)
    for op in list(held.open):
        held.end(op)
    world.conclude(*(handle for pair in stalled for handle in pair))
    world.at_rest()


def test_b059_b076_a_write_that_raises_costs_its_room_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """The third of four writes of room 1 raises in the transport, with room 2 queued behind it."""
    raised = []

    def break_third(room: int, chunk: int) -> str:
        if (room, chunk) == (1, 2):
            raised.append(True)
            raise IndexError("list index out of range")
        return ""

    held = Held(world, refuse=break_third)
    prefill, decode = held_pair(world, held, thread=True)
    senders = [prefill.session.send(room) for room in (1, 2)]
    for sender in senders:
        for index in range(4):
            sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 3)
    handles = [(sender, decode.session.receive(sender.room, range(10 * sender.room, 10 * sender.room + 4))) for sender in senders]
    world.until(lambda: len(held.open) == 7, "all others were submitted")
    assert raised == [True]
    (sender, receiver), (good, arrived) = handles
    world.until(lambda: sender.phase is receiver.phase is Phase.FAILED, "room 1 failed at once, on both sides", 2.0)
    for handle in (sender, receiver):
        assert "list index out of range" in handle.failure.reason
    for op in list(held.open):
        held.end(op)
    assert world.conclude(good, arrived) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(page, 20 + page) for page in range(4)] + [(page, 10 + page) for page in (0, 1, 3)])
    decode.check()
    assert "list index out of range" in caplog.text
    # how far the broken write came is not known, so neither side has its pages back until somebody proves it
    assert not sender.pages_free
    assert not receiver.pages_free
    (op,) = prefill.session.driver.core.ops
    prefill.session.driver.emit(ev.WriteSettled(op))
    world.conclude(sender, receiver)
    world.at_rest()


def test_b051_no_byte_is_read_before_the_chunk_is_handed_in(tcp: World) -> None:
    """The engine fills a page, hands it in, fills the next: what decode gets was there at that moment, each time."""
    prefill, decode = tcp.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(10, 18))
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    decode.check()
    for index in range(8):
        for buffer in prefill.buffers[:-2]:
            buffer[index] = 100 + index
        sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 7)
    assert tcp.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(index, 10 + index) for index in range(8)])
    decode.check()


def test_b061_an_abort_returns_its_share_of_the_window(tcp: World) -> None:
    """Room 2 fills the window of bytes on their way while decode reads nothing; it is aborted, and room 3 gets through."""
    big = {"page_bytes": (64 << 10, 8)}
    prefill = tcp.open("prefill", make_engine("prefill", 1, **big), limits=Limits(in_flight_bytes_max=256 << 10))  # type: ignore[arg-type]
    decode = tcp.open("decode", make_engine("decode", 2, **big), thread=False)  # type: ignore[arg-type]
    sender, receiver = prefill.session.send(2), decode.session.receive(2, range(40))
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    sender.send(range(40), (0, 40 * PAGE_SIZE), last=True)
    data: Any = prefill.session.driver._transport.data
    lane = data._lanes[decode.session.incarnation]
    full = (256 << 10) - (64 << 10)  # no further segment fits
    until(lambda: lane.in_flight_bytes >= full, "the window is full")  # decode stands still
    sender.abort("client left")
    again = prefill.session.send(3), decode.session.receive(3, [45])
    whole(again[0], 44)
    assert tcp.conclude(sender, receiver, *again) == [Phase.FAILED, Phase.FAILED, Phase.SUCCESS, Phase.SUCCESS]
    assert lane.in_flight_bytes == 0
    tcp.at_rest()


def test_b079_512_rooms_with_a_shallow_queue_and_failing_posts(world: World) -> None:
    """A queue of 128 and 5% of posts that fail: every room ends, with the verdict of its own writes, and every table is empty."""
    rooms = range(512)
    dice = random.Random(79)
    doomed = {(room, chunk) for room in rooms for chunk in range(2) if dice.random() < 0.05}
    held = Held(world, queue_max=128, refuse=lambda room, chunk: "no work request left" if (room, chunk) in doomed else "")
    prefill = world.open("prefill", make_engine("prefill", 1, page_bytes=(8, 8)), transport=held, transport_options={})
    decode = world.open(
        "decode", make_engine("decode", 2, pages=1_024, page_bytes=(8, 8)), transport=Held(world), transport_options={}
    )
    receivers = [decode.session.receive(room, [2 * room, 2 * room + 1]) for room in rooms]
    senders = [prefill.session.send(room) for room in rooms]
    world.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    full = set()
    for sender in senders:
        sender.send([1], (0, PAGE_SIZE))
        sender.send([2], (PAGE_SIZE, 2 * PAGE_SIZE), last=True)
        prefill.session.progress()
        if sender.failure is not None and "queue is full" in sender.failure.reason:
            full.add(sender.room)
        if len(held.open) >= 126:  # the queue drains, in any order
            for op in dice.sample(sorted(held.open), 64):
                held.end(op)
    for op in list(held.open):
        held.end(op)
    phases = world.conclude(*senders, *receivers)
    failed = {room for room, phase in zip(rooms, phases[:512], strict=True) if phase is Phase.FAILED}
    assert failed == {room for room, _ in doomed} | full
    assert 20 < len(failed) < 80
    assert 64 < held.peak <= 128
    for room, phase in zip(rooms, phases[512:], strict=True):
        assert phase is (Phase.FAILED if room in failed else Phase.SUCCESS)
    for handle in (*senders, *receivers):
        handle.clear()
    world.at_rest()
    for engine in (prefill, decode):
        described = engine.session.describe()
        assert (described["rooms"], described["early_offers"]) == ([], 0)
        assert messages(engine, "driver_error") == 0


# --- messages ----------------------------------------------------------------------------------------------------------------


def test_b053_a_storm_of_aborts_frees_every_room_at_once(tcp: World) -> None:
    rooms = range(100)
    prefill = tcp.open("prefill")
    decode = tcp.open("decode", make_engine("decode", 2, pages=100), limits=Limits(rooms_max=100))
    senders = [prefill.session.send(room) for room in rooms]
    receivers = [decode.session.receive(room, [room]) for room in rooms]
    tcp.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    with pytest.raises(pd_fsm.LocalProtocolError, match="rooms_max"):
        decode.session.receive(100, [0])
    for sender in senders:
        sender.abort("the engine sheds load")
    tcp.until(lambda: all(r.phase is Phase.FAILED and r.pages_free for r in receivers), "decode has its slots back", 2.0)
    assert {r.failure for r in receivers} == {pd_fsm.Failure("peer_abort", "prefill-0 aborted: the engine sheds load", "prefill-0")}
    for receiver in receivers:
        receiver.clear()
    again = prefill.session.send(100), decode.session.receive(100, [0])
    whole(again[0], 1)
    assert tcp.conclude(*again) == [Phase.SUCCESS, Phase.SUCCESS]


def test_b055_a_prompt_of_another_length_is_never_a_success(tcp: World) -> None:
    """Prefill sends a placeholder of one token for a prompt that it rejected; the pages would hold it."""
    prefill, decode = tcp.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(8), tokens=8 * PAGE_SIZE)
    sender.send([1], (0, 1), last=True)
    late = prefill.session.send(2), decode.session.receive(2, None)
    late[0].send([1], (0, 1), last=True)
    tcp.until(lambda: late[1].tokens_computed == 1, "prefill waits for pages")
    late[1].grant([20], tokens=2)
    assert set(tcp.conclude(sender, receiver, *late)) == {Phase.FAILED}
    for handle, tokens in ((sender, 32), (receiver, 32), (late[0], 2), (late[1], 2)):
        assert handle.failure is not None
        assert f"is for a prompt of {tokens} tokens, but the engine handed in 1" in handle.failure.reason
    decode.check()
    good = prefill.session.send(3), decode.session.receive(3, [5], tokens=PAGE_SIZE - 1)
    good[0].send([1], (0, PAGE_SIZE - 1), last=True)
    assert set(tcp.conclude(*good)) == {Phase.SUCCESS}


def test_b074_decode_rejects_a_room_that_it_never_opened(tcp: World) -> None:
    prefill, decode = tcp.pair()
    with prefill.session.send(9) as met, decode.session.receive(9, [9]) as too:
        whole(met, 1)
        tcp.conclude(met, too)
    sender = prefill.session.send(1)
    whole(sender, 1)
    assert not sender.pages_free
    decode.session.cancel(1, "400: the chat template does not render")
    tcp.until(lambda: sender.phase is Phase.FAILED and sender.pages_free, "prefill has its pages back", 2.0)
    assert sender.failure == pd_fsm.Failure("peer_abort", "decode-0 aborted: 400: the chat template does not render", "decode-0")
    receiver = decode.session.receive(1, [1])
    assert receiver.phase is Phase.FAILED
    assert "400: the chat template" in receiver.failure.reason
    tcp.at_rest()


def test_b081_floods_stay_within_their_caps_and_a_step_stays_as_cheap() -> None:
    """A hostile decode sends messages for transfers that do not exist, by the hundred thousand. Others do not notice."""
    limits = Limits(early_offers_max=512, early_offers_per_peer_max=256, spent_generations_max=256, tombstones_max=256)
    pair = Pair(limits=limits)
    pair.meet()
    rude = pair.side("decode", b"R" * 16, "rude")
    core = pair.p.core
    core.step(ev.Received(rude.incarnation, pair.p.incarnation, rude.core.identity.hello()), pair.now_ms)
    dice = random.Random(81)
    seconds: list[float] = []
    for _ in range(30):
        flood: list[Any] = [wire.Offer(dice.getrandbits(62), dice.getrandbits(40) + 1, pages(1), -1, 0) for _ in range(1_000)]
        flood += [wire.Abort(dice.getrandbits(62), dice.getrandbits(40) + 1, "abort", "x") for _ in range(1_000)]
        flood += [wire.Abort(1, 1, "abort", "x") for _ in range(1_000)]
        flood += [wire.VerdictAck(1, dice.getrandbits(40) + 1) for _ in range(500)]
        events = [ev.Received(rude.incarnation, pair.p.incarnation, message) for message in flood]
        began = time.perf_counter()
        for event in events:
            core.step(event, pair.now_ms)
        seconds.append(time.perf_counter() - began)
        registry = core.registry
        assert registry.early_count <= 256
        assert len(core.peers[rude.incarnation].spent) <= 256
        assert (len(core.links), len(core.ops), len(core.leases), len(registry.by_room)) == (0, 0, 0, 0)
        assert len(core.timers.repeats) == 0
    assert min(seconds[20:]) < 4 * min(seconds[:10]), "a step costs the more the longer the flood lasts"
    # a legal early offer still has its place, and its room succeeds
    pair.receive(7)
    pair.deliver()
    assert pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    pair.send(7)
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    assert pair.d.phase(7) is pair.p.phase(7) is Phase.SUCCESS


def test_b082_only_the_room_and_decodes_generation_travel(world: World) -> None:
    """Every frame of a hand-off between two engines that count differently is looked at."""
    frames: list[bytes] = []

    def overheard(host: Host) -> Transport:
        made = memory.create(host, hub=world.hub)
        send, submit = made.control.send, made.data.submit

        def listen(peer: bytes, frame: bytes) -> None:
            frames.append(frame)
            send(peer, frame)

        def listen_too(op: int, peer: bytes, generation: int, plan: Any, notice: bytes) -> None:
            frames.append(notice)
            submit(op, peer, generation, plan, notice)

        made.control.send, made.data.submit = listen, listen_too  # type: ignore[method-assign]
        return made

    prefill = world.open("prefill", transport=overheard, transport_options={})
    decodes = [world.open("decode", transport=overheard, transport_options={}) for _ in range(2)]
    for room in range(5):  # prefill has counted on, one decode a little
        prefill.session.send(room, readers=0).abort()
    decodes[1].session.receive(3, []).abort()
    sender = prefill.session.send(77, readers=2)
    receivers = [decode.session.receive(77, [5]) for decode in decodes]
    whole(sender, 1)
    assert set(world.conclude(sender, *receivers)) == {Phase.SUCCESS}
    world.at_rest()
    generations = {decode.session.incarnation: r.generation for decode, r in zip(decodes, receivers, strict=True)}
    assert len({sender.generation, *generations.values()}) == 3, "otherwise nothing could be mixed up"
    seen = set()
    for frame in frames:
        source, destination, message = wire.decode(frame)
        if hasattr(message, "room") and message.room != 3:
            reader = destination if source == prefill.session.incarnation else source
            assert (message.room, message.generation) == (77, generations[reader]), message
            seen.add(type(message).__name__)
    assert {"Offer", "Accepted", "Part"} <= seen


# --- peers -------------------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Watched:
    """A transport whose planes are watched: two calls at once, or a peer that is used after it was let go, are noted."""

    make: Callable[[Host], Transport]
    wrong: list[str] = attrs.field(factory=list)
    calls: int = 0
    inside: threading.Lock = attrs.field(factory=threading.Lock)
    who: int = 0
    """The thread that is in a call."""
    connected: set[bytes] = attrs.field(factory=set)

    def __call__(self, host: Host) -> Transport:
        made = self.make(host)
        for plane, names in (
            (made.control, ("connect", "disconnect", "send")),
            (made.data, ("peer_up", "peer_down", "expose", "revoke")),
        ):
            for name in names:
                setattr(plane, name, self.watch(name, getattr(plane, name)))
        return made

    def watch(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.calls += 1
            if self.who == threading.get_ident():  # one method of a plane uses another
                return method(*args)
            if not self.inside.acquire(blocking=False):
                self.wrong.append(f"{name} while another thread is in a call")
                return method(*args)
            self.who = threading.get_ident()
            try:
                if name == "connect":
                    self.connected.add(args[0])
                elif name == "disconnect":
                    self.connected.discard(args[0])
                elif name in ("peer_up", "peer_down") and args[0] not in self.connected:
                    self.wrong.append(f"{name} of a peer that was let go")
                return method(*args)
            finally:
                self.who = 0
                self.inside.release()

        return call


@pytest.mark.parametrize(("transport", "rounds"), [("memory", 150), ("tcp", 12)])
def test_b050_teardown_and_connect_never_overlap(tmp_path: Path, transport: str, rounds: int) -> None:
    """In each round one thread reports the death of a prefill while another opens a room at its successor."""
    world = World(transport, thread=True, directory=tmp_path, deadlines=HURRY)
    options = world.options()
    name = "memory" if transport == "memory" else "zmq"
    from pd_fsm.transports import zmq as zmq_transport

    factory = {"memory": memory.create, "zmq": zmq_transport.create}[name]
    watched = Watched(lambda host: factory(host, **options))
    decode = world.open("decode", transport=watched, transport_options={})
    old = world.open("prefill")
    ends = {"success": 0, "failed": 0}
    for number in range(rounds):
        new = world.open("prefill")  # the last registration counts
        sender = new.session.send(number)
        whole(sender, 1)
        gate = threading.Barrier(2)
        opened: list[pd_fsm.Receiver] = []

        def bury(old: Engine = old, gate: threading.Barrier = gate) -> None:
            gate.wait(5)
            decode.session.driver.emit(ev.PeerUnreachable(old.session.incarnation, "its port refuses connections", dead=True))
            old.close(0.2)

        def meet(number: int = number, gate: threading.Barrier = gate, opened: list[pd_fsm.Receiver] = opened) -> None:
            gate.wait(5)
            opened.append(decode.session.receive(number, [number % 40]))

        threads = [threading.Thread(target=bury), threading.Thread(target=meet)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        (receiver,) = opened
        world.until(lambda receiver=receiver: receiver.phase in ENDS and receiver.pages_free, "the room came to an end")  # type: ignore[misc]
        if receiver.phase is Phase.FAILED:
            assert receiver.failure.cause == "peer_lost", receiver.failure
            ends["failed"] += 1
        else:
            ends["success"] += 1
        receiver.clear()
        world.engines.remove(old)
        old = new
    assert watched.wrong == []
    assert ends["success"] > 0, ends
    assert messages(decode, "driver_error") == 0
    world.close()
    assert watched.calls > 4 * rounds


def vanish(engine: Engine) -> None:
    """End a session as a crash does: its peers are not told."""
    engine.session.driver._transport.control.send = lambda *_: None  # type: ignore[method-assign,union-attr]
    engine.close(0.0)


@pytest.mark.parametrize("transport", ["memory", "tcp", "ipc"])
def test_b092_a_restarted_prefill_is_found_again_with_every_transport(tmp_path: Path, transport: str) -> None:
    directory = tmp_path / "s"
    directory.mkdir()
    world = World(transport, thread=True, directory=directory, deadlines=HURRY)
    decode = world.open("decode")
    for life in range(3):
        prefill = world.open("prefill")
        sender, receiver = prefill.session.send(10 + life), decode.session.receive(10 + life, [life])
        whole(sender, 1)
        assert world.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]
        decode.expect(prefill, [(1, life)])
        pending = prefill.session.send(20 + life), decode.session.receive(20 + life, [20 + life])
        world.until(lambda pending=pending: pending[0].phase is Phase.WAITING_FOR_INPUT, "they met again")  # type: ignore[misc]
        vanish(prefill)
        world.until(lambda pending=pending: pending[1].phase is Phase.FAILED and pending[1].pages_free, "decode noticed", 3.0)  # type: ignore[misc]
        assert pending[1].failure.cause == "peer_lost"
        receiver.clear()
        pending[1].clear()
    decode.check()
    world.close()


def test_b092_the_fake_transport_loses_and_finds_its_peer_like_any_other() -> None:
    """Named by the same record: its scripted peers may be gone, and the next room meets another one."""
    script = lambda room: Script(end="fail", at=Phase.BOOTSTRAPPING) if room == 1 else Script()  # noqa: E731
    engine = make_engine("decode", 1)
    with pd_fsm.open_session("decode", engine.layout, transport="fake", transport_options={"script": script}) as session:
        gone, next_one = session.receive(1, [1]), session.receive(2, [2])
        assert gone.wait(5) is Phase.FAILED
        assert gone.failure.cause == "peer_lost"
        assert next_one.wait(5) is Phase.SUCCESS
        again = session.receive(3, [3])
        assert again.wait(5) is Phase.SUCCESS
        gone.wait_pages_free(5)


def test_b093_a_dead_prefill_costs_its_own_rooms_only(tmp_path: Path) -> None:
    """Decode is driven by the test, so that how long a tick takes is seen, too."""
    world = World("tcp", thread=True, directory=tmp_path, deadlines=HURRY)
    prefills = [world.open("prefill", rendezvous=world.registry.client(f"p{n}")) for n in range(2)]
    decode = world.open("decode", thread=False)
    senders = [prefills[room // 2].session.send(room) for room in range(4)]
    receivers = [decode.session.receive(room, [room], prefill=f"p{room // 2}") for room in range(4)]
    world.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    vanish(prefills[0])
    world.engines.remove(prefills[0])
    slowest_s = 0.0
    deadline = time.monotonic() + 3
    while not all(r.phase is Phase.FAILED for r in receivers[:2]):
        assert time.monotonic() < deadline, "its rooms did not fail"
        began = time.perf_counter()
        decode.session.progress()
        slowest_s = max(slowest_s, time.perf_counter() - began)
        decode.session.wait(5.0)
    assert slowest_s < 1.0, f"one tick of decode took {slowest_s} s"
    assert {r.failure.cause for r in receivers[:2]} == {"peer_lost"}
    for sender in senders[2:]:
        whole(sender, 1)
    assert world.conclude(*senders[2:], *receivers[2:]) == [Phase.SUCCESS] * 4
    world.until(lambda: all(r.pages_free for r in receivers), "and the pages of the dead one's rooms are free")
    world.close()


# --- the engine's loop -------------------------------------------------------------------------------------------------------


def test_b086_success_and_its_pages_are_there_until_the_room_is_cleared(world: World) -> None:
    """Twenty other rooms come and go while the scheduler has no place for this one."""
    prefill, decode = world.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5, 6], aux=3)
    sender.send([1, 2], (0, 2 * PAGE_SIZE), last=True, aux=4)
    assert world.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(1, 5), (2, 6)], aux=(4, 3))
    group = decode.session.group([receiver])
    sender.clear()
    for room in range(2, 22):
        with prefill.session.send(room) as other, decode.session.receive(room, [10 + room]) as read:
            whole(other, room)
            world.conclude(other, read)
        decode.expect(prefill, [(room, 10 + room)])
        assert receiver.phase is Phase.SUCCESS
        assert group.poll().tolist() == [Phase.SUCCESS]
        assert receiver.pages_free
        with pytest.raises(pd_fsm.LocalProtocolError, match="already open"):
            decode.session.receive(1, [7])
    decode.check()
    receiver.clear()
    assert receiver.phase is Phase.SUCCESS
    assert decode.session.receive(1, [7]).phase in (Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT)


@pytest.mark.parametrize("raises", ["before", "after"])
def test_b087_a_step_that_raises_loses_no_completion(world: World, raises: str) -> None:
    """The engine's step drives the session and computes; computing raises, in the tick in which a transfer completes."""
    held = Held(world)
    prefill, decode = held_pair(world, held)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    whole(sender, 1)
    world.until(lambda: bool(held.open), "the write runs")

    def step(*, fails: bool) -> None:
        if fails and raises == "before":
            raise RuntimeError("the forward pass raised")
        prefill.session.progress()
        if fails:
            raise RuntimeError("the forward pass raised")

    held.end(*held.of(1))
    with pytest.raises(RuntimeError, match="forward"):
        step(fails=True)
    step(fails=False)
    assert sender.phase is Phase.SUCCESS
    assert world.conclude(sender, receiver) == [Phase.SUCCESS, Phase.SUCCESS]
    decode.expect(prefill, [(1, 5)])
    decode.check()


# --- ranks -------------------------------------------------------------------------------------------------------------------


def agree(groups: list[RankAgreement], phases: tuple[Phase, ...] = ENDS, timeout_s: float = 5.0) -> list[list[Decision]]:
    """Tick all ranks until one of these phases was decided; what that tick decided, by rank."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        decided = tick(groups)
        assert all(mine == decided[0] for mine in decided), "the ranks decided differently"
        if any(decision.phase in phases for decision in decided[0]):
            return decided
    raise AssertionError(f"nothing was decided within {timeout_s} s")


def fake_ranks(scripts: list[Script], **settings: Any) -> list[pd_fsm.Session]:
    """A decode session for each rank, with a scripted prefill."""
    return [
        pd_fsm.open_session(
            "decode",
            make_engine("decode", rank).layout,
            transport="fake",
            name=f"rank-{rank}",
            transport_options={"script": script},
            **settings,
        )
        for rank, script in enumerate(scripts)
    ]


def test_b056_every_rank_reports_the_reason_of_the_one_that_knew() -> None:
    """Only rank 1 is told why; rank 0, which answers the client, reports the same."""
    too_long = "400: the prompt has 70000 tokens"
    scripts = [Script(end="silence", at=Phase.WAITING_FOR_INPUT), Script(end="abort", at=Phase.WAITING_FOR_INPUT, reason=too_long)]
    sessions = fake_ranks(scripts)
    groups = [RankAgreement(s, gather, rank, 2) for rank, (s, gather) in enumerate(zip(sessions, in_step(2), strict=True))]
    receivers = [session.receive(1, [1]) for session in sessions]
    for group, receiver in zip(groups, receivers, strict=True):
        assert group.watch(receiver) is None
    (here,), (there,) = agree(groups)
    assert here == there
    assert (here.phase, here.failure.cause) == (Phase.FAILED, "peer_abort")
    assert too_long in here.failure.reason
    for receiver in receivers:
        assert receiver.phase is Phase.FAILED
        assert too_long in receiver.failure.reason
    for session in sessions:
        session.close()


def test_b064_ranks_with_different_clocks_drop_a_room_in_the_same_tick(tmp_path: Path) -> None:
    """The deadline of one rank is over when that of the other is far away: both drop the room in one tick, prefill learns it."""
    world = World("memory", thread=True, directory=tmp_path)
    prefill = world.open("prefill")
    deadlines = [pd_fsm.Deadlines(waiting_ms=ms, repeat_min_ms=20) for ms in (80, 60_000)]
    decodes = [world.open("decode", deadlines=given) for given in deadlines]
    sender = prefill.session.send(1, readers=2)
    receivers = [decode.session.receive(1, [1]) for decode in decodes]
    groups = [RankAgreement(d.session, gather, rank, 2) for rank, (d, gather) in enumerate(zip(decodes, in_step(2), strict=True))]
    for group, receiver in zip(groups, receivers, strict=True):
        group.watch(receiver)
    (here,), (there,) = agree(groups, (Phase.FAILED,))
    assert here == there
    assert here.failure.cause in ("timeout", "peer_failed")
    assert "still WAITING_FOR_INPUT after 80 ms" in here.failure.reason
    assert tick(groups) == [[], []], "it is decided once"
    world.conclude(sender, *receivers)
    world.at_rest()
    assert messages(prefill, "failed.peer_failed") == 1
    assert sum(messages(prefill, name) for name in ("failed.peer_abort", "failed.timeout")) == 0
    world.close()


def test_b069_a_rank_that_never_completes_stops_nobody() -> None:
    """Four ranks; on rank 2 the room meets silence. No tick waits for it, and its deadline is everybody's verdict."""
    scripts = [Script(), Script(), Script(end="silence", at=Phase.TRANSFERRING), Script()]
    sessions = fake_ranks(scripts, deadlines=pd_fsm.Deadlines(transfer_ms=200))
    groups = [RankAgreement(s, gather, rank, 4) for rank, (s, gather) in enumerate(zip(sessions, in_step(4), strict=True))]
    receivers = [session.receive(1, [1]) for session in sessions]
    for group, receiver in zip(groups, receivers, strict=True):
        group.watch(receiver)
    until(lambda: all(receivers[rank].phase is Phase.SUCCESS for rank in (0, 1, 3)), "three ranks are done")
    ticks = 0
    decided: list[Decision] = []
    deadline = time.monotonic() + 5
    while not any(decision.phase in ENDS for decision in decided) and time.monotonic() < deadline:
        began = time.perf_counter()
        phases = [int(session.poll_many([r])[0]) for session, r in zip(sessions, receivers, strict=True)]
        assert time.perf_counter() - began < 1.0, "a poll waited"
        here, *others = tick(groups)
        assert all(other == here for other in others)
        decided = here
        ticks += 1
        assert all(phase in list(Phase) for phase in phases)
    assert ticks > 3, "the group went on while rank 2 was waiting"
    (decision,) = (d for d in decided if d.phase in ENDS)
    assert (decision.phase, decision.failure.cause) == (Phase.FAILED, "timeout")
    for session in sessions:
        session.close()
