"""The ZeroMQ transport beyond the conformance kit: bulk, broken connections, and sockets that speak nonsense."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np
import pytest
import zmq

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import wire
from pd_fsm.core.events import PeerRecord
from pd_fsm.runtime.transport import Host, Transport
from pd_fsm.testing.conformance.test_sessions import FAILED, SUCCEEDED
from pd_fsm.transports import zmq as zmq_transport
from pd_fsm.transports import zmq_data
from pd_fsm.transports.zmq_data import SEGMENT_BYTES_MAX, Ack, Segment, ZmqData
from tests.live import PAGE_SIZE, Engine, World, make_engine, messages, open_files, until
from tests.needs import lacking

MIB = 1 << 20


@pytest.fixture(
    params=[(scheme, thread) for scheme in ("tcp", "ipc") for thread in (True, False)],
    ids=lambda p: f"{p[0]}-{'thread' if p[1] else 'progress'}",
)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    yield from make_world(tmp_path, *request.param)


@pytest.fixture
def tcp(tmp_path: Path) -> Iterator[World]:
    """One of the ways is enough for what does not depend on it."""
    yield from make_world(tmp_path, "tcp", thread=True)


def make_world(tmp_path: Path, scheme: str, thread: bool) -> Iterator[World]:
    directory = tmp_path / "s"
    directory.mkdir()
    made = World(scheme, thread, directory)
    yield made
    made.close()


def plane(engine: Engine) -> ZmqData:
    transport = engine.session.driver._transport
    assert transport is not None
    assert isinstance(transport.data, ZmqData)
    return transport.data


# --- bulk --------------------------------------------------------------------------------------------------------------------


def big(role: str, seed: int, pages: int, page_bytes: int) -> Engine:
    """Noise that is cheap to make: a MiB of it, repeated with an offset so that no two pages are equal."""
    noise = np.random.default_rng(seed).integers(0, 256, MIB + 7, dtype=np.uint8)
    paged = np.resize(noise, pages * page_bytes).reshape(pages, page_bytes)
    aux = [np.zeros((8, 16), np.uint8)]
    return Engine(role, [paged, *aux], 1, pd_fsm.KVLayout([pd_fsm.paged("kv", [paged], PAGE_SIZE), pd_fsm.rows("aux", *aux)]))


def in_flight(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes on their way after each segment that leaves `engine`."""
    data = plane(engine)
    seen: list[int] = []
    send = data._send

    def spy(lane: Any, *segment: Any) -> None:
        send(lane, *segment)
        seen.append(lane.in_flight_bytes)

    monkeypatch.setattr(data, "_send", spy)
    return seen


@pytest.mark.parametrize("page_bytes", [16 * MIB, 256 << 10, 64 << 10, 48 << 10])
def test_64_mib_arrive_as_they_were(world: World, page_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous, above and below what is sent without a copy, and scattered."""
    pages = 64 * MIB // page_bytes
    prefill, decode = (
        world.open("prefill", big("prefill", 1, pages, page_bytes)),
        world.open("decode", big("decode", 2, pages, page_bytes)),
    )
    scattered = page_bytes < MIB
    order = random.Random(1).sample(range(pages), pages) if scattered else list(range(pages))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, order, aux=0)
    world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    seen = in_flight(prefill, monkeypatch)
    sender.send(range(pages), (0, pages * PAGE_SIZE), last=True, aux=0)
    assert world.conclude(sender, receiver) == SUCCEEDED
    assert (decode.buffers[0][order] == prefill.buffers[0]).all()
    assert sender.bytes_moved == receiver.bytes_moved == pages * page_bytes + 16
    assert max(seen) <= 64 * MIB, "Limits.in_flight_bytes_max"
    assert plane(prefill)._lane_of == {}


@pytest.mark.parametrize("window", [1, 1_000, MIB, 5 * MIB])
def test_no_more_than_the_window_is_on_its_way(tcp: World, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes, pages = (300_000, 40) if window > 1_000 else (700, 6)
    prefill = tcp.open("prefill", big("prefill", 1, pages, page_bytes), limits=pd_fsm.Limits(in_flight_bytes_max=window))
    decode = tcp.open("decode", big("decode", 2, pages, page_bytes))
    decode.buffers[0][:] = 0
    senders = [prefill.session.send(room) for room in range(2)]
    half = pages // 2
    receivers = [decode.session.receive(room, range(room * half, (room + 1) * half), aux=room) for room in range(2)]
    tcp.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
    seen = in_flight(prefill, monkeypatch)
    for room, sender in enumerate(senders):
        sender.send(range(room * half, (room + 1) * half), (0, half * PAGE_SIZE), last=True, aux=0)
    assert set(tcp.conclude(*senders, *receivers)) == {Phase.SUCCESS}
    assert (decode.buffers[0] == prefill.buffers[0]).all()
    assert 0 < max(seen) <= window
    assert len(seen) >= pages * page_bytes / window


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_in_the_middle_of_a_transfer(tcp: World, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was not sent yet is not sent any more, and what is on its way does not land once the pages are free."""
    prefill = tcp.open("prefill", big("prefill", 1, 64, MIB), limits=pd_fsm.Limits(in_flight_bytes_max=2 * MIB))
    decode = tcp.open("decode", big("decode", 2, 64, MIB), thread=False)  # it reads when the test says so
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(64))
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    sender.send(range(64), (0, 64 * PAGE_SIZE), last=True)
    # A step of the driver at a time, until some of it arrived.
    until(
        lambda: bool(decode.session.driver.progress(rounds_max=1)) and (decode.buffers[0][0] == prefill.buffers[0][0]).all(),
        "a segment landed",
    )
    assert sender.phase is Phase.TRANSFERRING
    (sender if side == "prefill" else receiver).abort("enough")
    seen = in_flight(prefill, monkeypatch)
    if side == "prefill":
        # Decode does not move meanwhile, so it is not its refusal that ends the write.
        until(lambda: not any(lane.queue for lane in plane(prefill)._lanes.values()), "the rest was taken back")
        seen.clear()
    assert tcp.conclude(sender, receiver) == FAILED
    assert side == "decode" or not seen, "nothing more left after the abort"
    decode.buffers[0][:] = 0xA5
    prefill.buffers[0][:] = 0x5A
    tcp.at_rest()
    again = prefill.session.send(2), decode.session.receive(2, [3])
    again[0].send([0], (0, PAGE_SIZE), last=True)
    assert tcp.conclude(*again) == SUCCEEDED
    assert (decode.buffers[0][3] == 0x5A).all()
    assert (np.delete(decode.buffers[0], 3, axis=0) == 0xA5).all(), "something landed after pages_free"


def test_segments_that_arrive_after_the_revocation_do_not_land(tcp: World) -> None:
    """All of them wait in decode's socket when decode gives the room up."""
    prefill = tcp.open("prefill", big("prefill", 1, 16, MIB))
    decode = tcp.open("decode", big("decode", 2, 16, MIB), thread=False)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(16))
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    sender.send(range(16), (0, 16 * PAGE_SIZE), last=True)
    data = plane(decode)
    assert data._router is not None
    assert data._router.poll(5_000), "segments wait in the socket"
    data._host.reactor.touch(data._router_source)  # the look has taken the signal away
    receiver.abort("enough")
    tcp.conclude(receiver)  # the plane vouches, whatever the writer still has on its way
    decode.buffers[0][:] = 0xA5
    assert tcp.conclude(sender) == [Phase.FAILED]
    assert sender.failure.cause in ("peer_abort", "transport"), "the abort and a refused segment race on two connections"
    tcp.at_rest()
    assert (decode.buffers[0] == 0xA5).all()


# --- connections that break --------------------------------------------------------------------------------------------------


class Relay:
    """A TCP relay in front of one listener, which loses connections on demand."""

    def __init__(self, endpoint: str) -> None:
        self._target = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None  # cut all connections once this many bytes went to the listener
        self.forwarded = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._sockets |= {near, far}
            for source, target, counts in ((near, far, True), (far, near, False)):
                self._threads.append(threading.Thread(target=self._pump, args=(source, target, counts), daemon=True))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(64 << 10):
                if counts:
                    self.forwarded += len(data)
                    if self.cut_after is not None and self.forwarded >= self.cut_after:
                        self.cut_after = None
                        self.cut()
                        return
                target.sendall(data)
        self._drop({source, target})

    def cut(self) -> None:
        """Both ends see the connection break; new ones are let through."""
        self._drop(set(self._sockets))

    def _drop(self, sockets: set[socket.socket]) -> None:
        with self._lock:
            dropped = sockets & self._sockets
            self._sockets -= dropped
        for each in dropped:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)


@attrs.define(eq=False)
class Relayed:
    """A factory of the zmq transport whose peers are told the address of a relay."""

    relays: list[Relay] = attrs.field(factory=list)

    def __call__(self, host: Host) -> Transport:
        made = zmq_transport.create(host)
        own = made.data if host.role == "decode" else made.control
        name = "descriptor" if host.role == "decode" else "endpoint"
        told = getattr(own, name)
        self.relays.append(Relay(told.decode() if isinstance(told, bytes) else told))
        setattr(own, name, self.relays[-1].endpoint.encode() if isinstance(told, bytes) else self.relays[-1].endpoint)
        return made


@pytest.fixture
def relayed() -> Iterator[Relayed]:
    made = Relayed()
    yield made
    for relay in made.relays:
        relay.close()


CUTS = [1, 100_000, MIB, 3 * MIB + 5, 5 * MIB, 8 * MIB + 100, 15 * MIB, 16 * MIB - 1]


@pytest.mark.parametrize("cut_after", CUTS)
def test_a_data_connection_that_breaks_fails_the_room_or_nothing(tcp: World, relayed: Relayed, cut_after: int) -> None:
    """Never a success with missing bytes, never memory that stays owed; the next room goes over a new connection."""
    prefill = tcp.open("prefill", big("prefill", 1, 64, 256 << 10))
    decode = tcp.open("decode", big("decode", 2, 64, 256 << 10), transport=relayed, transport_options={})
    (relay,) = relayed.relays
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(63, -1, -1))
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    relay.cut_after = relay.forwarded + cut_after
    sender.send(range(64), (0, 64 * PAGE_SIZE), last=True)
    phases = tcp.conclude(sender, receiver)
    assert phases in (SUCCEEDED, FAILED)
    if phases == SUCCEEDED:
        assert (decode.buffers[0][::-1] == prefill.buffers[0]).all(), "success with bytes that never came"
    else:
        assert sender.failure.cause == "transport"
        assert sender.failure.peer == "decode-0"
        assert sender.failure.reason in receiver.failure.reason
    tcp.at_rest()
    decode.buffers[0][:] = 0
    again = prefill.session.send(2), decode.session.receive(2, range(64))
    again[0].send(range(64), (0, 64 * PAGE_SIZE), last=True)
    assert tcp.conclude(*again) == SUCCEEDED
    assert (decode.buffers[0] == prefill.buffers[0]).all()


def test_a_control_connection_that_breaks_loses_no_room(tcp: World, relayed: Relayed) -> None:
    """What was lost with the connection is repeated over the next one."""
    prefill = tcp.open("prefill", transport=relayed, transport_options={})
    decode = tcp.open("decode")
    (relay,) = relayed.relays
    for turn in range(4):
        sender, receiver = prefill.session.send(turn), decode.session.receive(turn, [turn])
        if turn % 2:
            tcp.until(lambda sender=sender: sender.phase is Phase.WAITING_FOR_INPUT, "they met")  # type: ignore[misc]
        relay.cut()
        sender.send([10 + turn], (0, PAGE_SIZE), last=True)
        assert tcp.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(10 + turn, turn)])
    decode.check()
    tcp.at_rest()


def test_a_peer_that_takes_nothing_is_given_up(tcp: World) -> None:
    """It accepts the connection and never reads: the outbox is bounded."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        register(tcp, PeerRecord(b"D" * 16, f"tcp://127.0.0.1:{deaf.getsockname()[1]}", "deaf"))
        deadlines = pd_fsm.Deadlines(repeat_min_ms=1, repeat_max_ms=1)
        decode = tcp.open("decode", limits=pd_fsm.Limits(outbox_messages_max=5), deadlines=deadlines)
        receiver = decode.session.receive(1, [1])
        tcp.conclude(receiver)
    assert receiver.failure.cause == "peer_lost"
    for part in ("deaf", "does not read", "5 messages", "Limits.outbox_messages_max"):
        assert part in receiver.failure.reason


def test_a_port_where_nobody_listens_is_a_dead_peer(tcp: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        endpoint = f"tcp://127.0.0.1:{gone.getsockname()[1]}"
    register(tcp, PeerRecord(b"D" * 16, endpoint, "gone"))
    decode = tcp.open("decode")
    receiver = decode.session.receive(1, [1])
    began = time.monotonic()
    tcp.conclude(receiver)
    assert time.monotonic() - began < 2
    assert receiver.failure.cause == "peer_lost"
    assert f"gone is lost: nobody listens at {endpoint}" in receiver.failure.reason


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://127.0.0.1:9", "ipc://" + "x" * 200]
)
def test_a_registered_endpoint_that_makes_no_sense_costs_only_its_rooms(tcp: World, endpoint: str) -> None:
    register(tcp, PeerRecord(b"D" * 16, endpoint, "odd"))
    decode = tcp.open("decode", deadlines=pd_fsm.Deadlines(handshake_ms=200, heartbeat_ms=50))
    receiver = decode.session.receive(1, [1])
    tcp.conclude(receiver)
    assert receiver.failure.cause == "peer_lost"
    assert messages(decode, "driver_error") == 0


def register(world: World, record: PeerRecord) -> None:
    client = world.registry.client()
    client.start(lambda event: None)
    client.register(record)


# --- settings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scheme": "pigeon"}, "scheme must be 'tcp' or 'ipc', not 'pigeon'"),
        ({"scheme": "ipc"}, "existing directory for its sockets, not ''"),
        ({"scheme": "ipc", "directory": "/no/such/place"}, "/no/such/place"),
        ({"control_port": 70_000}, "control_port must be in 0..65535, not 70000"),
        ({"control_port": "http"}, "control_port must be in 0..65535, not 'http'"),
        ({"io_threads": 0}, "io_threads must be at least 1, not 0"),
        ({"nonsense": 1}, r"does not take the options \['nonsense'\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(tcp: World, options: dict[str, Any], complaint: str) -> None:
    before = len(open_files())
    with pytest.raises(pd_fsm.ConfigError, match=complaint):
        tcp.open("prefill", transport_options=options)
    assert len(open_files()) == before


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_is_not_ours_is_refused(tcp: World, host: str) -> None:
    for role in ("prefill", "decode"):
        with pytest.raises(pd_fsm.ConfigError, match=rf"cannot bind the \w+ socket of {role}-0 at tcp://{host}"):
            tcp.open(role, host=host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*", ""])
def test_a_host_that_nobody_can_dial_is_refused(tcp: World, host: str) -> None:
    with pytest.raises(pd_fsm.ConfigError, match="no address that a peer could connect to"):
        tcp.open("prefill", host=host)


def test_a_port_in_use_is_named(tcp: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(pd_fsm.ConfigError, match=rf"cannot bind .* of prefill-0 at tcp://127.0.0.1:{port}: .*in use"):
            tcp.open("prefill", transport_options={"control_port": port})


def test_a_fixed_control_port_is_used_and_free_again(tcp: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    for _ in range(2):
        prefill = tcp.open("prefill", transport_options={"control_port": port})
        assert prefill.session.driver._transport.control.endpoint == f"tcp://127.0.0.1:{port}"
        prefill.close()


def test_a_session_without_a_rendezvous_is_refused() -> None:
    with pytest.raises(pd_fsm.ConfigError, match="needs a rendezvous"):
        pd_fsm.open_session("prefill", make_engine("prefill", 1).layout)


def test_a_greeting_that_no_peer_would_read_is_refused(tcp: World) -> None:
    with pytest.raises(pd_fsm.ConfigError, match="greeting"):
        tcp.open("decode", name="n" * 257)


def test_loopback_over_ipv6(tcp: World) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        lacking("this machine has no ::1")
    prefill, decode = tcp.pair(host="::1")
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    sender.send([1], (0, PAGE_SIZE), last=True)
    assert tcp.conclude(sender, receiver) == SUCCEEDED


# --- sockets that speak nonsense ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def raw_socket(kind: int, identity: bytes | None = None, connect: str | None = None) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, 2_000)
    if identity is not None:
        made.setsockopt(zmq.ROUTING_ID, identity)
    try:
        if connect is not None:
            made.connect(connect)
        yield made
    finally:
        made.close()
        context.term()


def healthy(world: World, prefill: Engine, decode: Engine, room: int = 1_000) -> None:
    """A usual room still works, and nothing met a surprise."""
    with prefill.session.send(room) as sender, decode.session.receive(room, [40]) as receiver:
        sender.send([41], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
    decode.expect(prefill, [(41, 40)])
    decode.check()
    assert messages(prefill, "driver_error") == messages(decode, "driver_error") == 0


def garbage(dice: random.Random) -> Iterator[list[bytes]]:
    """Messages of all kinds that mean nothing."""
    for _ in range(200):
        yield [dice.randbytes(dice.choice([0, 1, 35, 36, 37, 100, 5_000])) for _ in range(dice.choice([1, 1, 2, 3, 7]))]
    frame = wire.encode(b"X" * 16, b"Y" * 16, wire.Ping())
    yield [frame, frame]
    yield [frame[:-1]]
    yield [frame + b"x"]
    yield [b"PDF\x09" + frame[4:]]
    yield [b""] * 500


def test_garbage_on_the_control_socket_is_dropped_and_counted(tcp: World, caplog: pytest.LogCaptureFixture) -> None:
    prefill, decode = tcp.pair()
    healthy(tcp, prefill, decode, 1)
    mine = b"H" * 16
    endpoint = prefill.session.driver._transport.control.endpoint
    dropped = prefill.session.driver._transport.control._dropped
    with raw_socket(zmq.DEALER, b"I" + mine, endpoint) as hostile, raw_socket(zmq.DEALER, None, endpoint) as nameless:
        for message in garbage(random.Random(1)):
            hostile.send_multipart(message)
            nameless.send_multipart(message)
        for body in (b"", b"\xc1", b"\x91\xa5hello", msgspec.msgpack.encode(["no such message", 1])):
            hostile.send(wire.MAGIC + mine + prefill.session.incarnation + body)
    tcp.until(lambda: messages(prefill, "wire_error") == 4, "what names its sender rightly is counted as no message")
    assert dropped.count > 400
    assert len(caplog.records) < 30, "garbage does not fill the log"
    healthy(tcp, prefill, decode, 2)


def test_nobody_speaks_for_somebody_else(tcp: World) -> None:
    """A connection is bound to the session that opened it: a forged Abort, Verdict or Goodbye is dropped."""
    prefill, decode = tcp.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    tcp.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
    victim, target = decode.session.incarnation, prefill.session.incarnation
    forged = [
        wire.encode(victim, target, wire.Abort(1, receiver.generation, "abort", "forged")),
        wire.encode(victim, target, wire.Goodbye("forged", drained=True)),
        wire.encode(victim, target, wire.Stranger(target)),
    ]
    dropped = prefill.session.driver._transport.control._dropped
    with raw_socket(zmq.DEALER, b"I" + b"H" * 16, prefill.session.driver._transport.control.endpoint) as hostile:
        for frame in forged:
            hostile.send(frame)
    tcp.until(lambda: dropped.count == len(forged), "they were dropped")
    sender.send([1], (0, PAGE_SIZE), last=True)
    assert tcp.conclude(sender, receiver) == SUCCEEDED


def test_an_oversized_control_frame_costs_its_connection_only(tcp: World) -> None:
    prefill, decode = tcp.pair()
    with raw_socket(zmq.DEALER, b"I" + b"H" * 16, prefill.session.driver._transport.control.endpoint) as hostile:
        hostile.setsockopt(zmq.LINGER, 0)
        monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        hostile.send(bytes(wire.FRAME_BYTES_MAX + 1))
        assert monitor.poll(5_000), "the connection was closed"
        hostile.disable_monitor()
        monitor.close(linger=0)
    healthy(tcp, prefill, decode)


@attrs.define(eq=False)
class ScriptedPrefill:
    """A prefill by hand: it shook hands with a decode session, got its offer, and writes whatever the test wants."""

    control: zmq.Socket[bytes]
    data: zmq.Socket[bytes]
    incarnation: bytes
    decode: Engine
    offer: wire.Offer

    def header(self, **changes: Any) -> Segment:
        """A whole, right write of 96 bytes to page 5 of region 0."""
        part = wire.encode(self.incarnation, self.decode.session.incarnation, wire.Part(1, self.offer.generation, 0, 1, False, 96))
        fields = {
            "destination": self.decode.session.incarnation,
            "op": 7,
            "sequence": 0,
            "generation": self.offer.generation,
            "region": np.array([0], "<i4").tobytes(),
            "offset": np.array([5 * 96], "<i8").tobytes(),
            "nbytes": np.array([96], "<i8").tobytes(),
            "frames": np.array([1], "<i4").tobytes(),
            "notice": part,
        }
        return Segment(**(fields | changes))

    def write(self, payload: list[bytes] | None = None, **changes: Any) -> str:
        """Send a segment; the error it was answered with."""
        self.data.send_multipart([msgspec.msgpack.encode(self.header(**changes)), *([b"w" * 96] if payload is None else payload)])
        return self.answer().error

    def answer(self) -> Ack:
        assert self.data.poll(5_000), "an acknowledgement comes"
        (frame,) = self.data.recv_multipart()
        return msgspec.msgpack.decode(frame, type=Ack)


@contextlib.contextmanager
def scripted_prefill(world: World) -> Iterator[tuple[ScriptedPrefill, pd_fsm.Receiver]]:
    incarnation = b"S" * 16
    with raw_socket(zmq.ROUTER) as control:
        port = control.bind_to_random_port("tcp://127.0.0.1")
        register(world, PeerRecord(incarnation, f"tcp://127.0.0.1:{port}", "scripted"))
        decode = world.open("decode", deadlines=pd_fsm.Deadlines(heartbeat_ms=60_000, lost_ms=60_000))
        receiver = decode.session.receive(1, [5, 6])

        def hear(kind: type) -> Any:
            while True:
                assert control.poll(5_000), f"{kind.__name__} comes"
                _, frame = control.recv_multipart()
                message = wire.decode(frame)[2]
                if isinstance(message, kind):
                    return message

        hello = hear(wire.Hello)
        welcome = wire.Welcome("scripted", "prefill", "zmq", hello.ranks, hello.components, b"")
        control.send_multipart([b"I" + decode.session.incarnation, wire.encode(incarnation, decode.session.incarnation, welcome)])
        offer = hear(wire.Offer)
        with raw_socket(zmq.DEALER, b"I" + incarnation, hello.data.decode()) as data:
            yield ScriptedPrefill(control, data, incarnation, decode, offer), receiver
        decode.close(0.2)


def i4(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def i8(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("another page", {"offset": i8(7 * 96)}, "does not grant"),
    ("one byte of the page before", {"offset": i8(5 * 96 - 1)}, "does not grant"),
    ("one byte of the page after", {"offset": i8(6 * 96 + 1)}, "does not grant"),
    ("the aux row", {"region": i4(3), "offset": i8(0), "nbytes": i8(16)}, "does not grant"),
    ("a region that is none", {"region": i4(99)}, "regions must be in 0..4, got 99..99"),
    ("a negative region", {"region": i4(-1)}, "regions must be"),
    ("a negative offset", {"offset": i8(-96)}, "out of range"),
    ("a huge offset", {"offset": i8((1 << 63) - 1)}, "out of range"),
    ("a huge length", {"nbytes": i8((1 << 63) - 1)}, "out of range"),
    ("no length", {"nbytes": i8(0)}, "out of range"),
    (
        "a length that wraps around",
        {"region": i4(0, 0), "offset": i8(480, 480), "nbytes": i8(1 << 48, 1 << 48), "frames": i4(2)},
        "does not grant",
    ),
    ("torn columns", {"offset": b"\1\2\3"}, "packed array of 3 bytes"),
    ("columns of different lengths", {"nbytes": i8(48, 48)}, "1 regions, 1 offsets and 2 lengths"),
    ("no frame for its copy", {"frames": i4()}, "1 payload frames do not hold 1 copies"),
    ("more copies than there are", {"frames": i4(2)}, "do not hold"),
    ("an empty and a full frame", {"frames": i4(0, 1)}, "do not hold"),
    ("a negative frame", {"frames": i4(-1)}, "do not hold"),
    ("more frames than came", {"frames": i4(1, 1)}, "do not hold"),
    ("bytes that did not come", {"offset": i8(5 * 96), "nbytes": i8(97 + 95)}, "not as long as their copies"),
    ("another generation", {"generation": 77}, "generation 77 is not exposed"),
    ("another process", {"destination": b"?" * 16}, "another incarnation"),
    ("the middle of a write", {"sequence": 1}, "without those before"),
    ("somebody else's notice", {"notice": wire.encode(b"O" * 16, b"?" * 16, wire.Ping())}, "notice does not come from"),
    ("a notice of nonsense", {"notice": b"x"}, "notice does not come from"),
]


def test_a_writer_can_do_nothing_but_what_was_granted(tcp: World) -> None:
    with scripted_prefill(tcp) as (prefill, receiver):
        for what, changes, error in REFUSED:
            assert error in prefill.write(**changes), what
        assert "do not hold" in prefill.write([]), "no payload"
        assert "do not hold" in prefill.write([b"w" * 96, b"w"]), "more payload"
        assert "not as long" in prefill.write([b"w" * 95]), "less payload"
        assert "not as long" in prefill.write([b"w" * 97]), "a byte too much"
        for counts in ((0, 1), (-1, 2), (2, -1)):
            assert "do not hold" in prefill.write([b"", b"w" * 96], frames=i4(*counts)), counts
        prefill.decode.check()
        assert receiver.phase is Phase.WAITING_FOR_INPUT, "no notice came through"
        assert prefill.write() == ""
        prefill.decode.expected[0][5] = ord("w")
        assert receiver.wait(5) is Phase.SUCCESS
        assert "not exposed" in prefill.write(), "the grant ended with the room"
        prefill.decode.check()
        assert messages(prefill.decode, "driver_error") == 0


def test_only_who_holds_a_grant_may_write(tcp: World) -> None:
    with scripted_prefill(tcp) as (prefill, _):
        descriptor = plane(prefill.decode).descriptor.decode()
        for identity in (b"I" + b"O" * 16, b"J" + prefill.incarnation, b"x"):
            with raw_socket(zmq.DEALER, identity, descriptor) as other:
                stranger = attrs.evolve(prefill, data=other)
                error = stranger.write(notice=b"")
                assert error == "" if identity == b"J" + prefill.incarnation else "not granted" in error
        prefill.decode.expected[0][5] = prefill.decode.buffers[0][5]
        prefill.decode.check()


def test_nonsense_on_the_data_socket_is_dropped(tcp: World, caplog: pytest.LogCaptureFixture) -> None:
    with scripted_prefill(tcp) as (prefill, receiver):
        for message in garbage(random.Random(2)):
            prefill.data.send_multipart(message)
        for changes in (
            {"op": -1},
            {"generation": 0},
            {"sequence": -1},
            {"region": bytes(8 * 1_024 + 4)},
            {"destination": b"short"},
        ):
            prefill.data.send_multipart([msgspec.msgpack.encode(prefill.header(**changes)), b"w" * 96])
        assert prefill.write() == "", "the first answer is that to the first message that makes sense"
        assert receiver.wait(5) is Phase.SUCCESS
        prefill.decode.expected[0][5] = ord("w")
        prefill.decode.check()
        assert plane(prefill.decode)._dropped.count >= 200
        assert len(caplog.records) < 30


def test_a_missing_segment_is_noticed(tcp: World) -> None:
    """The part counts as confirmed only when all of its segments were placed, in order, each once."""
    half = {"nbytes": i8(48), "notice": b""}
    rest = {"nbytes": i8(48), "offset": i8(5 * 96 + 48), "sequence": 1}
    with scripted_prefill(tcp) as (prefill, receiver):
        payload = [b"w" * 48]
        assert prefill.write(payload, **half) == ""
        assert "without those before" in prefill.write(payload, **(rest | {"sequence": 2}))
        assert "without those before" in prefill.write(payload, **(rest | {"op": 8}))
        assert "not as long" in prefill.write([b"w"], **rest)
        assert prefill.write(payload, **half, op=9) == "", "another write begins"
        assert "without those before" in prefill.write(payload, **rest)
        assert receiver.phase is Phase.WAITING_FOR_INPUT
        assert prefill.write(payload, **(rest | {"op": 9})) == ""
        assert receiver.wait(5) is Phase.SUCCESS


def test_an_oversized_data_frame_costs_its_connection_only(tcp: World) -> None:
    with scripted_prefill(tcp) as (prefill, receiver):
        monitor = prefill.data.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        prefill.data.send_multipart([msgspec.msgpack.encode(prefill.header()), bytes(SEGMENT_BYTES_MAX + 1)])
        assert monitor.poll(5_000), "the connection was closed"
        until(lambda: prefill.data.poll(0) == 0, "nothing was answered")
        prefill.data.disable_monitor()
        monitor.close(linger=0)
        with raw_socket(zmq.DEALER, b"I" + prefill.incarnation, plane(prefill.decode).descriptor.decode()) as data:
            again = attrs.evolve(prefill, data=data)
            assert again.write() == ""
            assert receiver.wait(5) is Phase.SUCCESS


@contextlib.contextmanager
def scripted_decode(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Engine, Engine, Callable[[Callable[[], None]], None]]]:
    """A real pair whose decode acknowledges nothing by itself."""
    prefill, decode = world.pair()
    monkeypatch.setattr(zmq_data.ZmqData, "_on_segment", lambda self, sender, header, payload: held.append((sender, header)))
    held: list[tuple[bytes, bytes]] = []
    data = plane(decode)

    def answer(make: Any) -> None:
        world.until(lambda: bool(held), "a segment came")
        sender, header = held[0]
        for frames in make(msgspec.msgpack.decode(header, type=Segment)):
            data._router.send_multipart([sender, *frames])  # type: ignore[union-attr]

    yield prefill, decode, answer


def test_acknowledgements_that_make_no_sense_are_dropped(tcp: World, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = msgspec.msgpack.encode
    with scripted_decode(tcp, monkeypatch) as (prefill, decode, answer):
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        sender.send([1], (0, PAGE_SIZE), last=True)
        answer(
            lambda segment: [
                [b""],
                [b"", b""],
                [b"\xc1"],
                [encode(["x", 1, ""])],
                [encode([segment.op, -1, ""])],
                [encode(Ack(segment.op + 100, 0, ""))],
                [encode(Ack(segment.op, 5, ""))],
                [encode(Ack(segment.op, 0, "no place")), b"and more"],
                [encode(Ack(segment.op, 0, ""))],
            ]
        )
        tcp.until(lambda: sender.phase is Phase.FAILED, "the write was refused")
        assert "refused by the receiver: no place" in sender.failure.reason
        assert tcp.conclude(sender, receiver) == FAILED
        assert messages(prefill, "driver_error") == 0
        assert plane(prefill)._dropped.count == 5
