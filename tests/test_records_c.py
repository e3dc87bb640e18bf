"""Records whose story needs sockets, files or large numbers, on the real runtime. The scenario files name these tests."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import pickle
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.events import PeerRecord
from pd_fsm.core.session import Identity, SessionCore
from pd_fsm.core.settings import Limits, Topology
from pd_fsm.errors import LocalProtocolError
from pd_fsm.runtime import timeline, zmq_dial
from pd_fsm.runtime.agreement import Decision, RankAgreement
from pd_fsm.runtime.bootstrap import BootstrapServer
from pd_fsm.testing import world as scripted
from pd_fsm.transports.fake import Script
from tests.live import PAGE_SIZE, Engine, World, make_engine, messages, open_files, until
from tests.needs import lacking

PAGES_FREE_S = 5.0
TICK_S = 0.25  # how long a call that must not block may take on a machine that is busy with something else
SCRIPT = "with open({path!r}, 'w') as f: f.write('ran')"


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[World]:
    yield from make_world("tcp", tmp_path)


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[World]:
    yield from make_world("memory", tmp_path)


def make_world(transport: str, directory: Path) -> Iterator[World]:
    made = World(transport, False, directory, deadlines=pd_fsm.Deadlines(repeat_min_ms=20))
    yield made
    made.close()


def register(world: World, record: PeerRecord) -> None:
    client = world.registry.client()
    client.start(lambda event: None)
    client.register(record)


def hand_over(world: World, prefill: Engine, decode: Engine, room: int, page: int = 40, **receive: Any) -> None:
    """A usual room, with the right bytes."""
    with prefill.session.send(room) as sender, decode.session.receive(room, [page], **receive) as receiver:
        sender.send([41], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == [Phase.SUCCESS] * 2
    decode.expect(prefill, [(41, page)])
    decode.check()


class Stopwatch:
    """The longest that any of the calls took."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    def __call__(self, call: Callable[[], Any]) -> Any:
        began = time.monotonic()
        result = call()
        self.worst_s = max(self.worst_s, time.monotonic() - began)
        return result


@contextlib.contextmanager
def silent_listeners(count: int) -> Iterator[list[str]]:
    """Addresses where somebody accepts connections and never says a word."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]


@contextlib.contextmanager
def raw_socket(kind: int, identity: bytes | None = None, **options: int) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    for name, value in options.items():
        made.setsockopt(getattr(zmq, name), value)
    if identity is not None:
        made.setsockopt(zmq.ROUTING_ID, identity)
    try:
        yield made
    finally:
        made.close()
        context.term()


def control_endpoint(engine: Engine) -> str:
    transport = engine.session.driver._transport
    assert transport is not None
    return transport.control.endpoint


# --- nobody waits for a silent one -------------------------------------------------------------------------------------------


def test_b099_silent_bootstrap_servers_cost_only_their_own_rooms(tcp: World) -> None:
    timed = Stopwatch()
    deadlines = pd_fsm.Deadlines(bootstrap_ms=600, repeat_min_ms=20)
    with BootstrapServer() as server, silent_listeners(3) as silent:
        prefill = tcp.open("prefill", rendezvous=server.url)
        decode = tcp.open("decode", rendezvous=server.url, deadlines=deadlines)
        session = decode.session
        stuck = [timed(lambda a=a, n=n: session.receive(100 + n, [n], prefill=a)) for n, a in enumerate(silent)]
        senders = [prefill.session.send(room) for room in range(10)]
        receivers = [timed(lambda room=room: session.receive(room, [10 + room])) for room in range(10)]
        for sender in senders:
            sender.send([1], (0, PAGE_SIZE), last=True)

        def done(handles: Sequence[pd_fsm.Handle]) -> bool:
            timed(session.progress)
            return all(timed(handle.poll) in (0, 4) for handle in handles)

        tcp.until(lambda: done([*senders, *receivers]), "the healthy rooms concluded")
        assert {handle.phase for handle in receivers} == {Phase.SUCCESS}
        tcp.until(lambda: done(stuck), "the others met their deadline")
        for handle in stuck:
            assert handle.failure.cause == "timeout"
            assert "no prefill rank was found" in handle.failure.reason
            assert handle.pages_free
        stuck.append(timed(lambda: session.receive(200, [30], prefill=silent[0])))
        timed(lambda: stuck[-1].abort("client left"))
        timed(stuck[-1].clear)
        assert timed.worst_s < TICK_S, "a look-up takes as long as it takes; no call waits for it"
        tcp.close()


def test_b100_a_peer_that_reads_nothing_never_blocks_a_tick(tcp: World) -> None:
    """It keeps its connection open and takes nothing; the rooms of another prefill do not notice."""
    timed = Stopwatch()
    with silent_listeners(1) as (deaf,):
        register(tcp, PeerRecord(b"D" * 16, f"tcp://{deaf}", "deaf", dp_rank=1, dp_size=2))
        prefill = tcp.open("prefill", topology=Topology(dp_rank=0, dp_size=2))
        limits = Limits(outbox_messages_max=20)
        decode = tcp.open("decode", limits=limits, deadlines=pd_fsm.Deadlines(repeat_min_ms=1, repeat_max_ms=1))
        session = decode.session
        rooms = [timed(lambda room=room: session.receive(room, [room], prefill_dp_rank=1)) for room in range(30)]

        def given_up() -> bool:
            timed(session.progress)
            return all(timed(room.poll) == 0 for room in rooms)

        tcp.until(given_up, "its rooms failed")
        assert {room.failure.cause for room in rooms} == {"peer_lost"}
        assert "does not read" in rooms[0].failure.reason
        assert all(room.pages_free for room in rooms)
        transport = session.driver._transport
        tcp.until(lambda: not transport.control._dialers, "its connection was closed")  # type: ignore[union-attr]
        for room in (100, 101):
            hand_over(tcp, prefill, decode, room, prefill_dp_rank=0)
        assert timed.worst_s < TICK_S
        assert session.describe()["links"] == 0


# --- descriptors and sockets -------------------------------------------------------------------------------------------------


def test_b102_short_lived_peers_leave_no_descriptors(tcp: World) -> None:
    """More decode processes than the prefill knows at a time come and go; the one that stays keeps its connection."""
    prefill = tcp.open("prefill", limits=Limits(peers_max=8), thread=True)
    steady = tcp.open("decode", thread=True)
    hand_over(tcp, prefill, steady, 1)
    before = len(open_files())
    most = 0
    for turn in range(40):
        guest = tcp.open("decode", make_engine("decode", 5), name=f"guest-{turn}")
        hand_over(tcp, prefill, guest, 2)
        most = max(most, len(open_files()))
        tcp.engines.remove(guest)
        guest.close(0.2)
        tcp.until(lambda: len(prefill.session.describe()["peers"]) == 1, "the guest is forgotten")
    tcp.until(lambda: len(open_files()) <= before + 2, "everything of the guests was closed")
    assert most < before + 60
    hand_over(tcp, prefill, steady, 3)
    assert messages(prefill, "driver_error") == 0


def test_b102_more_sockets_than_zeromq_allows_by_default(tcp: World, caplog: pytest.LogCaptureFixture) -> None:
    """A context has 1023 sockets unless told otherwise; that is a third as many peers, and far below the bound that we name."""
    peers = 500
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 8 * peers:
        lacking("this process may not have that many open files")
    prefill = tcp.open("prefill", limits=Limits(peers_max=peers))
    data: Any = prefill.session.driver._transport.data  # type: ignore[union-attr]
    with silent_listeners(1) as (somewhere,):
        for number in range(peers):
            data.peer_up(number.to_bytes(16, "big"), f"tcp://{somewhere}".encode())
        assert len(data._lanes) == peers
        assert not prefill.session.driver._inbox, "nothing was unusable"
        for number in range(peers):
            data.peer_down(number.to_bytes(16, "big"))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    tcp.open("prefill", limits=Limits(peers_max=soft))
    assert "Limits.peers_max" in caplog.text, "what this process cannot have is said at the start"
    assert f"may have {soft}" in caplog.text


# --- addresses ---------------------------------------------------------------------------------------------------------------


def test_b103_many_ranks_of_both_roles_bind_on_one_host(tcp: World) -> None:
    ranks = 16
    with BootstrapServer() as server:
        topologies = [Topology(tp_rank=rank, tp_size=ranks) for rank in range(ranks)]
        prefills = [tcp.open("prefill", topology=topology, rendezvous=server.url) for topology in topologies]
        decodes = [tcp.open("decode", topology=topology, rendezvous=server.url) for topology in topologies]
        bound = [control_endpoint(engine) for engine in prefills]
        data = [engine.session.driver._transport.data.descriptor.decode() for engine in decodes]  # type: ignore[union-attr]
        assert len({*bound, *data}) == 2 * ranks
        tcp.until(lambda: ask(server, "GET", "/v1/peers?dp_rank=0")[1]["complete"], "all are registered")
        listed = ask(server, "GET", "/v1/peers?dp_rank=0")[1]["peers"]
        assert [record["endpoint"] for record in listed] == bound
        for rank in (0, 7, 15):
            hand_over(tcp, prefills[rank], decodes[rank], rank)
        tcp.close()


def test_b104_another_instance_at_the_address_is_recognised(tcp: World) -> None:
    prefill, other = tcp.open("prefill", topology=Topology(dp_size=2)), tcp.open("prefill", topology=Topology(dp_rank=1, dp_size=2))
    decode = tcp.open("decode")
    meant = prefill.session.incarnation
    register(tcp, PeerRecord(meant, control_endpoint(other), "prefill-0", dp_size=2))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [1], prefill_dp_rank=0)
    tcp.until(lambda: receiver.poll() == 0, "it noticed")
    assert receiver.failure.cause == "peer_lost"
    assert f"another process answers at {control_endpoint(other)}" in receiver.failure.reason
    assert receiver.pages_free
    assert not decode.session.describe()["peers"]
    assert sender.phase is Phase.BOOTSTRAPPING
    receiver.clear()
    # nothing of it is remembered: with the right address the same process is found
    register(tcp, PeerRecord(meant, control_endpoint(prefill), "prefill-0", dp_size=2))
    sender.abort("enough")
    sender.clear()
    hand_over(tcp, prefill, decode, 2, prefill_dp_rank=0)
    hand_over(tcp, other, decode, 3, prefill_dp_rank=1)


@pytest.mark.parametrize(
    ("endpoint", "target"),
    [
        ("tcp://127.0.0.1:5001", (socket.AF_INET, ("127.0.0.1", 5001))),
        ("tcp://[::1]:5001", (socket.AF_INET6, ("::1", 5001))),
        ("tcp://[fe80::1]:65535", (socket.AF_INET6, ("fe80::1", 65535))),
        ("tcp://2001:db8::7:5001", (socket.AF_INET6, ("2001:db8::7", 5001))),
        ("tcp://localhost:5001", None),  # a name: asking for it may block
        ("tcp://127.0.0.1:0", None),
        ("tcp://127.0.0.1:65536", None),
        ("tcp://127.0.0.1:x", None),
        ("tcp://127.0.0.1", None),
        ("tcp://", None),
        ("ipc:///run/x", (socket.AF_UNIX, "/run/x")),
    ],
)
def test_b104_addresses_are_taken_apart(endpoint: str, target: object) -> None:
    assert zmq_dial._target(endpoint) == target


# --- what is no room ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [None, "7", "None", 7.0, True, -1, 1 << 63, b"7", (7,)])
def test_b108_what_is_no_room_number_is_refused(memory: World, room: Any) -> None:
    prefill, decode = memory.pair()
    for attempt in (
        lambda: prefill.session.send(room),
        lambda: decode.session.receive(room, [1]),
        lambda: prefill.session.cancel(room),
    ):
        with pytest.raises(LocalProtocolError, match="room must be"):
            attempt()
    number: Any = np.int64(7)  # what a router's library may hand on
    hand_over(memory, prefill, decode, number)


FIELDS: list[tuple[str, Any]] = [
    *[("pages", value) for value in (5, "ab", [1.5], [None], {"x": [1]}, {}, [-1], [1 << 31], [48], [1, 1], [[1]])],
    ("pages", np.array([1.0])),
    *[("aux", value) for value in ("1", 1.0, -2, 8, 1 << 40, True)],
    *[("decode_prefix_len", value) for value in ("x", None, -4, 3, 1 << 40, 4.0)],
    *[("tokens", value) for value in ("x", -5, 1 << 40, 1.5)],
    *[("prefill", value) for value in (5, b"x", ["http://127.0.0.1"])],
    *[("prefill_dp_rank", value) for value in ("a", -1, 1 << 40, 0.0)],
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=[f"{field}={value!r}" for field, value in FIELDS])
def test_b144_every_field_of_a_request_is_checked_at_the_border(memory: World, field: str, value: Any) -> None:
    noise = np.zeros((48, 16), np.uint8)
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [noise], 4), pd_fsm.rows("aux", np.zeros((8, 4), np.uint8))])
    with pd_fsm.open_session("decode", layout, transport="memory", transport_options={"hub": memory.hub}, thread=False) as session:
        with pytest.raises(LocalProtocolError):
            session.receive(1, **({"pages": [1]} | {field: value}))
        seen = session.describe()
        assert [seen[table] for table in ("rooms", "leases", "links", "repeats")] == [[], [], 0, 0]
        assert session.receive(1, [1]).phase is Phase.BOOTSTRAPPING, "the number was not taken"


# --- ranks and parts ---------------------------------------------------------------------------------------------------------


def test_b111_one_writer_of_the_aux_row_in_every_order() -> None:
    """Four source ranks end in each of the 24 orders; the row is used again at the earliest legal moment."""
    for order in itertools.permutations(range(4)):
        world = scripted.World()
        names = ["P", "P2", "P3", "P4"]
        actors = [world.add(name) for name in names]
        decode = world.add("D")
        for room in (1, 2):
            for actor in actors:
                world.apply(actor, actor.alive.step(ev.OpenSend(room), world.now_ms))
            world.apply(decode, decode.alive.step(ev.OpenReceive(room, scripted.pages([10]), 3), world.now_ms))
            world.settle()
            for actor in actors:
                opened = actor.room(room)
                assert opened is not None
                chunk = ev.ChunkReady(opened.generation, 0, 16, scripted.pages([room]), True, room)
                world.apply(actor, actor.alive.step(chunk, world.now_ms))
            world.settle()
            writers = [write.actor for write in world.writes.values() if write.submit.aux is not None]
            assert writers == ["P"]
            for done, index in enumerate(order):
                receiving = decode.room(room)
                assert receiving is not None
                assert receiving.live, f"{done} of 4 ranks are done"
                (name,) = [known for known, write in world.writes.items() if write.actor == names[index]]
                world.end_write(name, "done")
                world.settle()
            assert receiving.state is Phase.SUCCESS
            assert receiving.generation in decode.released
            world.apply(decode, decode.alive.step(ev.ClearRequested(receiving.generation), world.now_ms))
        assert world.idle_problems() == []


def test_b112_ranks_finish_together(memory: World) -> None:
    """Two ranks, each with a prefill of its own; the aux row of one comes late."""
    topologies = [Topology(tp_rank=rank, tp_size=2) for rank in range(2)]
    prefills = [memory.open("prefill", topology=topology) for topology in topologies]
    decodes = [memory.open("decode", topology=topology) for topology in topologies]
    ranks = [RankAgreement(engine.session, lambda block: block, rank, 2) for rank, engine in enumerate(decodes)]
    senders = [engine.session.send(1) for engine in prefills]
    receivers = [engine.session.receive(1, [5], aux=2) for engine in decodes]
    for rank, receiver in zip(ranks, receivers, strict=True):
        assert rank.watch(receiver) is None

    def tick() -> list[Decision]:
        blocks = np.stack([rank.block() for rank in ranks])
        decided = [rank.apply(blocks) for rank in ranks]
        assert decided[0] == decided[1]
        return decided[0]

    for sender in senders:
        sender.send([1], (0, PAGE_SIZE))
    memory.until(lambda: all(receiver.phase is Phase.TRANSFERRING for receiver in receivers), "the pages are there")
    assert [made.phase for made in tick()] == [Phase.TRANSFERRING]
    senders[0].send([], (PAGE_SIZE, PAGE_SIZE), last=True, aux=1)
    memory.until(lambda: receivers[0].phase is Phase.SUCCESS, "one rank has its aux row")
    assert tick() == []
    assert receivers[1].phase is Phase.TRANSFERRING
    senders[1].send([], (PAGE_SIZE, PAGE_SIZE), last=True, aux=1)
    memory.until(lambda: receivers[1].phase is Phase.SUCCESS, "the other one has it, too")
    assert [made.phase for made in tick()] == [Phase.SUCCESS]
    assert memory.conclude(*senders, *receivers) == [Phase.SUCCESS] * 4


def test_b125_many_scattered_pages_stay_inside_the_window(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rooms, pages, page_bytes, window = 32, 250, 96, 16_384
    order = np.random.default_rng(1).permutation(rooms * pages)
    noise = np.random.default_rng(2)
    buffers = [noise.integers(0, 256, (rooms * pages, page_bytes), dtype=np.uint8) for _ in range(2)]
    layouts = [pd_fsm.KVLayout([pd_fsm.paged("kv", [buffer], PAGE_SIZE)]) for buffer in buffers]
    prefill = tcp.open("prefill", Engine("prefill", [buffers[0]], 0, layouts[0]), limits=Limits(in_flight_bytes_max=window))
    decode = tcp.open("decode", Engine("decode", [buffers[1]], 0, layouts[1]))
    plane: Any = prefill.session.driver._transport.data  # type: ignore[union-attr]
    most, send = 0, plane._send

    def spy(lane: Any, *segment: Any) -> None:
        nonlocal most
        send(lane, *segment)
        most = max(most, lane.in_flight_bytes)

    monkeypatch.setattr(plane, "_send", spy)
    slices = [order[room * pages : (room + 1) * pages] for room in range(rooms)]
    receivers = [decode.session.receive(room, slices[room]) for room in range(rooms)]
    senders = [prefill.session.send(room) for room in range(rooms)]
    tcp.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    ended: list[int] = []

    def done() -> bool:
        ended.extend(room for room in range(rooms) if room not in ended and receivers[room].poll() in (0, 4))
        return len(ended) == rooms

    for room, sender in enumerate(senders):
        sender.send(slices[rooms - 1 - room], (0, pages * PAGE_SIZE), last=True)
    tcp.until(done, "all rooms concluded")
    assert tcp.conclude(*senders, *receivers) == [Phase.SUCCESS] * (2 * rooms)
    assert 0 < most <= window
    assert ended == sorted(ended), "in the order in which they were handed in: none is overtaken"
    for room in range(rooms):
        assert (buffers[1][slices[room]] == buffers[0][slices[rooms - 1 - room]]).all()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_b133_a_fake_room_that_is_never_sent_ends(role: str) -> None:
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((8, 16), np.uint8)], 4)])
    silent = Script(end="silence", at=Phase.WAITING_FOR_INPUT)
    deadlines = pd_fsm.Deadlines(waiting_ms=80)
    options = {"script": silent}
    with pd_fsm.open_session(role, layout, transport="fake", transport_options=options, deadlines=deadlines) as session:
        handle: pd_fsm.Handle = session.send(1) if role == "prefill" else session.receive(1, [1])
        assert handle.wait(PAGES_FREE_S) is Phase.FAILED
        assert handle.failure is not None
        assert handle.failure.cause == "timeout"
        handle.wait_pages_free(PAGES_FREE_S)
        handle.clear()
        until(lambda: not session.describe()["links"], "nothing is owed", [session])
        seen = session.describe()
        assert [seen[table] for table in ("rooms", "leases", "ops")] == [[], [], 0]


# --- floods and strangers ----------------------------------------------------------------------------------------------------


def test_b134_a_flood_of_offers_for_unknown_rooms_is_bounded() -> None:
    limits = Limits(early_offers_max=1_000, spent_generations_max=500, tombstones_max=100)
    components = scripted.COMPONENTS
    me, peer = b"P" * 16, b"D" * 16
    core = SessionCore(Identity(me, "prefill-0", "prefill", "world", Topology(), components), limits=limits)
    greeting = Identity(peer, "decode-0", "decode", "world", Topology(), components).hello()
    core.step(ev.Received(peer, me, greeting), 0.0)
    grant = scripted.pages([1])
    answers: Counter[str] = Counter()
    for number in range(60_000):
        offer = wire.Offer(1_000_000 + number, 1 + number, grant, -1, 0)
        for effect in core.step(ev.Received(peer, me, offer), number / 100):
            assert isinstance(effect, ev.Send)
            answers[type(effect.message).__name__] += 1
    record = core.peers[peer]
    assert core.registry.early_count == 1_000
    assert len(record.spent) <= 500
    tables = [core.registry.by_room, core.links, core.leases, core.ops, core.timers.repeats, core.registry.tombstones]
    assert [len(table) for table in tables] == [0] * len(tables)
    assert answers == {"Verdict": 59_000}
    core.step(ev.OpenSend(1_000_005), 700.0)  # one of those that were early is legal after all
    assert core.registry.by_room[1_000_005].state is Phase.WAITING_FOR_INPUT
    assert core.registry.early_count == 999
    core.expire(700.0 + core.deadlines.early_offer_ms)
    assert core.registry.early_count == 0


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (SCRIPT.format(path=str(self.path)),)


def test_b138_a_pickle_on_every_socket_is_dropped(tcp: World, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.read_text() == "ran", "it is a working one"
    mark.unlink()
    with BootstrapServer() as server:
        prefill, decode = tcp.open("prefill", rendezvous=server.url), tcp.open("decode", rendezvous=server.url)
        hand_over(tcp, prefill, decode, 1)
        stranger = b"H" * 16
        data = decode.session.driver._transport.data.descriptor.decode()  # type: ignore[union-attr]
        for endpoint in (control_endpoint(prefill), data):
            with raw_socket(zmq.DEALER, b"I" + stranger) as hostile:
                hostile.setsockopt(zmq.LINGER, 1_000)
                hostile.connect(endpoint)
                hostile.send(bomb)
                hostile.send_multipart([bomb, bomb])
                hostile.send(wire.MAGIC + stranger + prefill.session.incarnation + bomb)
                hostile.send_multipart([msgspec.msgpack.encode([decode.session.incarnation, bomb]), bomb])
        tcp.until(lambda: messages(prefill, "wire_error") == 1, "the one with a right header is counted")
        landing = decode.session.driver._transport.data  # type: ignore[union-attr]
        tcp.until(lambda: landing._dropped.count >= 3, "those on the data socket are, too")  # type: ignore[attr-defined]
        for method, path in (("PUT", "/v1/peers"), ("POST", "/v1/rooms"), ("PUT", "/route"), ("POST", "/register_dp_rank")):
            assert ask(server, method, path, raw=bomb)[0] == 400
        hand_over(tcp, prefill, decode, 2)
        tcp.close()
    assert not mark.exists()


def test_b139_every_listening_socket_is_on_the_configured_address(tcp: World) -> None:
    before = listening()
    with BootstrapServer("127.0.0.1") as server:
        prefill = tcp.open("prefill", rendezvous=server.url, host="127.0.0.1")
        decode = tcp.open("decode", rendezvous=server.url, host="127.0.0.1")
        hand_over(tcp, prefill, decode, 1)
        mine = {inode: where for inode, where in listening().items() if inode not in before}
        assert len(mine) == 3, "the rendezvous, a control socket and a data socket"
        assert {address for address, _ in mine.values()} == {"127.0.0.1"}
        ports = {port for _, port in mine.values()}
        assert {server.port, int(control_endpoint(prefill).rpartition(":")[2])} <= ports
        tcp.close()


def listening() -> dict[str, tuple[str, int]]:
    """(address, port) of this process's listening TCP sockets, by inode."""
    mine = {target.split("[")[1].rstrip("]") for target in open_files().values() if target.startswith("socket:[")}
    found = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{os.getpid()}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in mine:
                packed, port = fields[1].split(":")
                words = np.frombuffer(bytes.fromhex(packed), dtype=">u4").astype("<u4").tobytes()
                found[fields[9]] = socket.inet_ntop(family, words), int(port, 16)
    return found


def test_b140_a_stranger_that_never_reads_disturbs_nobody(tcp: World) -> None:
    """It shakes hands again and again and takes no answer; what waits for it is bounded, and the session lets go of it."""
    limits = Limits(outbox_messages_max=10)
    kv = [pd_fsm.paged(f"layer-{number:03}-{'x' * 200}", [np.zeros((48, 8), np.uint8)], PAGE_SIZE) for number in range(100)]
    prefill = tcp.open("prefill", Engine("prefill", [np.zeros((48, 8), np.uint8)], 0, pd_fsm.KVLayout(kv)), limits=limits)
    buffers = [np.ones((48, 8), np.uint8) for _ in range(100)]
    same = [pd_fsm.paged(part.name, [buffer], PAGE_SIZE) for part, buffer in zip(kv, buffers, strict=True)]
    decode = tcp.open("decode", Engine("decode", buffers, 0, pd_fsm.KVLayout(same)))
    timed = Stopwatch()
    stranger = b"H" * 16
    met: list[Any] = []
    prefill.session.driver.core.trace = lambda step: met.append(step.peer) if step.after == "LOST" else None

    def room(number: int) -> None:
        with prefill.session.send(number) as sender, decode.session.receive(number, [number]) as receiver:
            sender.send([1], (0, PAGE_SIZE), last=True)
            assert tcp.conclude(sender, receiver) == [Phase.SUCCESS] * 2

    with silent_listeners(1) as (data,), raw_socket(zmq.DEALER, b"I" + stranger, RCVHWM=1, RCVBUF=4_096, SNDHWM=0) as deaf:
        greeting = decode.session.driver.core.identity.hello()
        hello = msgspec.structs.replace(greeting, name="deaf", data=f"tcp://{data}".encode())
        frame = wire.encode(stranger, prefill.session.incarnation, hello)
        deaf.connect(control_endpoint(prefill))
        turn = 1
        while not met:  # what the kernel holds for a connection comes on top of what we do
            assert turn < 46, "it was given up"
            for _ in range(50):
                deaf.send(frame, zmq.NOBLOCK)
            for _ in range(5):
                timed(prefill.session.progress)
            room(turn)
            turn += 1
        room(46)
        assert "deaf is lost: it does not read: 10 messages are queued (Limits.outbox_messages_max)" in met[0].reason
        assert timed.worst_s < TICK_S
        assert "deaf" not in json.dumps(decode.session.describe()), "and nobody else heard of it"
    room(47)
    assert messages(prefill, "driver_error") == 0


# --- the rendezvous ----------------------------------------------------------------------------------------------------------


def ask(
    server: BootstrapServer, method: str, path: str, body: object = None, token: str | None = None, raw: bytes | None = None
) -> tuple[int, Any]:
    """Status and body, decoded if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, path, raw if raw is not None else json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json and content else content.decode()
    finally:
        connection.close()


def test_b141_only_the_owner_changes_a_registration() -> None:
    token = "a-token-of-the-deployment"

    def record(incarnation: int, port: int) -> dict[str, Any]:
        return {"incarnation": base64.b64encode(bytes([incarnation]) * 16).decode(), "endpoint": f"tcp://127.0.0.1:{port}"}

    owner = {"record": record(1, 5001), "lease": "the-lease-of-its-owner"}
    with BootstrapServer(token=token) as server:
        assert ask(server, "PUT", "/v1/peers", owner, token)[0] == 200
        listed = ask(server, "GET", "/v1/peers?dp_rank=0", token=token)[1]["peers"]
        rank = {
            "attn_tp_size": 1, "attn_tp_rank": 0, "attn_cp_size": 1, "attn_cp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
            "pp_size": 1, "pp_rank": 0, "system_dp_size": 1, "system_dp_rank": 0, "rank_ip": "10.6.6.6", "rank_port": 666,
            "page_size": 16, "kv_cache_dtype": "auto",
        }  # fmt: skip
        attempts = [
            ("PUT", "/v1/peers", {"record": record(2, 666), "lease": "a-lease-of-somebody"}, None, 401),
            ("PUT", "/v1/peers", {"record": record(2, 666), "lease": "a-lease-of-somebody"}, "not-the-token", 401),
            ("PUT", "/v1/peers", {"record": record(2, 666), "lease": "a-lease-of-somebody"}, token, 409),
            ("PUT", "/v1/peers", {"record": record(1, 666), "lease": "a-lease-of-somebody"}, token, 409),
            ("PUT", "/v1/peers", {"record": record(1, 666)}, token, 409),
            ("POST", "/v1/peers/renew", {"lease": "a-lease-of-somebody"}, token, 404),
            ("DELETE", "/v1/peers", owner, None, 401),
            ("PUT", "/route", rank, None, 401),
            ("PUT", "/route", rank, "not-the-token", 401),
            ("POST", "/v1/rooms", {"rooms": {"7": 3}}, None, 401),
            ("POST", "/register_dp_rank", {"bootstrap_room": 7, "dp_rank": 3}, "not-the-token", 401),
        ]
        for method, path, body, given, status in attempts:
            assert ask(server, method, path, body, given)[0] == status, (method, path, given)
        assert ask(server, "DELETE", "/v1/peers", {"lease": "a-lease-of-somebody"}, token)[1] == {"removed": False}
        # the other protocol that is served has no owners, so what is said in it is kept apart
        assert ask(server, "PUT", "/route", rank, token)[0] == 200
        assert ask(server, "GET", "/v1/peers?dp_rank=0", token=token)[1]["peers"] == listed
        assert ask(server, "POST", "/v1/rooms/query", {"rooms": [7]}, token)[1]["rooms"] == {}


# --- numbers -----------------------------------------------------------------------------------------------------------------


def test_b142_a_huge_length_allocates_nothing(tcp: World) -> None:
    """A message that announces more than a frame may hold costs its connection before its bytes are read."""
    prefill, decode = tcp.pair()
    hand_over(tcp, prefill, decode, 1)
    data = decode.session.driver._transport.data.descriptor.decode()  # type: ignore[union-attr]
    before = peak_kib()
    for endpoint in (control_endpoint(prefill), data):
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31))  # a greeting of ZMTP 3
            ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x11I" + b"H" * 16
            raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
            raw.sendall(b"\x02" + (1 << 40).to_bytes(8, "big") + b"x" * 1_000)  # a long frame of 2**40 bytes
            raw.settimeout(5)
            with contextlib.suppress(ConnectionError):
                while raw.recv(4_096):
                    continue
    assert peak_kib() - before < 64 << 10
    hand_over(tcp, prefill, decode, 2)


def peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_b145_bytes_and_times_are_those_of_the_operations(memory: World, tmp_path: Path) -> None:
    trace = tmp_path / "prefill.ndjson"
    prefill = memory.open("prefill", trace=str(trace))
    decodes = [memory.open("decode") for _ in range(2)]
    page_bytes = sum(buffer.shape[1] for buffer in prefill.buffers[: -prefill.aux_regions])
    sender = prefill.session.send(1, readers=2)
    receivers = [decode.session.receive(1, [5, 6, 7]) for decode in decodes]
    for index in range(3):
        sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 2)
    assert memory.conclude(sender, *receivers) == [Phase.SUCCESS] * 3
    assert sender.bytes_moved == 6 * page_bytes
    assert [receiver.bytes_moved for receiver in receivers] == [3 * page_bytes] * 2
    aborted = prefill.session.send(2)
    leaving = decodes[0].session.receive(2, [8, 9])
    aborted.send([1], (0, PAGE_SIZE))
    memory.until(lambda: leaving.bytes_moved == page_bytes, "one chunk came")
    leaving.abort("client left")
    memory.conclude(aborted, leaving)
    early = prefill.session.send(3)
    early.abort("client left")
    assert [aborted.bytes_moved, leaving.bytes_moved, early.bytes_moved] == [page_bytes, page_bytes, 0]
    memory.close()
    (life,) = timeline.read([trace])
    rooms = {room.room: room for room in life.rooms.values()}
    assert {number: room.bytes for number, room in rooms.items()} == {1: 6 * page_bytes, 2: page_bytes, 3: 0}
    for room in rooms.values():
        assert all(span.end_ms >= span.start_ms for span in room.phase.spans)
        assert room.opened_ms <= room.concluded_ms
    moving = [span for span in rooms[1].phase.spans if span.state == "TRANSFERRING"]
    assert len(moving) == 1
    assert moving[0].end_ms == rooms[1].concluded_ms, "until the last operation ended, and no longer"
