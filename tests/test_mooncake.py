"""What only the Mooncake transport does, over real engines and TCP on loopback."""

from __future__ import annotations

import builtins
import importlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import msgspec
import numpy as np
import pytest

import pd_fsm
from pd_fsm import Phase, RawBuffer
from pd_fsm.core import events as ev
from pd_fsm.core.wire import pack_pages
from pd_fsm.kv import Plan, make_plan
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.transport import Host
from pd_fsm.transports import mooncake, mooncake_engine, mooncake_writer
from pd_fsm.transports.mooncake_data import MooncakeData
from pd_fsm.transports.mooncake_peer import Descriptor
from tests.live import World, make_engine, threads, until
from tests.mooncake_reader import CANARY, Reader

SUCCEEDED = [Phase.SUCCESS, Phase.SUCCESS]
RESIDUAL_MS = 100.0
PAGES, PAGE_BYTES = 96, 1 << 20

pytestmark = pytest.mark.usefixtures("mooncake_library")


@attrs.define(eq=False, slots=False)
class WritingSide:
    """The planes of a prefill session, without a session. Page n holds n + 1."""

    options: dict[str, Any]
    pages: int = PAGES
    page_bytes: int = PAGE_BYTES
    events: list[ev.Event] = attrs.field(factory=list)
    ops: int = 0

    def __attrs_post_init__(self) -> None:
        self.buffer = np.repeat(np.arange(1, self.pages + 1, dtype=np.uint8), self.page_bytes).reshape(self.pages, self.page_bytes)
        self.layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [self.buffer], 1)])
        self.reactor = Reactor()
        host = Host(
            b"P" * 16, "prefill", "prefill-0", "127.0.0.1", self.layout, pd_fsm.Limits(), self.reactor, self.events.append,
            lambda _frame, _via: None,
        )  # fmt: skip
        self.transport = mooncake.create(host, **({"residual_ms": RESIDUAL_MS} | self.options))
        assert isinstance(self.transport.data, MooncakeData)
        self.data = self.transport.data

    def write(self, peer: bytes, sources: list[int], targets: list[int], plan: Plan | None = None) -> int:
        self.ops += 1
        copies = (("kv", pack_pages(sources), pack_pages(targets)),)
        self.data.submit(self.ops, peer, self.ops, plan or make_plan(self.layout, copies, None), b"")
        return self.ops

    def outcomes(self, op: int) -> list[type]:
        return [type(event) for event in list(self.events) if getattr(event, "op", 0) == op]

    def ends(self, *ops: int, timeout_s: float = 15.0) -> list[list[type]]:
        """What became of them, once no memory of them is in doubt."""
        last = {ev.WriteDone, ev.WriteFailed, ev.WriteSettled}
        until(lambda: all(last & set(self.outcomes(op)) for op in ops), f"the writes {ops} ended", timeout_s=timeout_s)
        return [self.outcomes(op) for op in ops]

    def close(self) -> None:
        self.transport.close(0)
        self.reactor.close()


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Iterator[WritingSide]:
    made = WritingSide(getattr(request, "param", {}))
    yield made
    made.close()
    assert not [name for name in threads() if "mooncake" in name]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World("mooncake", True, tmp_path)
    yield made
    made.close()


# --- bytes -------------------------------------------------------------------------------------------------------------------


def test_five_thousand_scattered_blocks_are_exact_over_sessions(world: World) -> None:
    """Every other page in another order, in chunks: not a byte of the pages in between changes."""
    kwargs = {"pages": 5_000, "page_bytes": (1_000, 24)}
    prefill, decode = (
        world.open("prefill", make_engine("prefill", 1, **kwargs)),
        world.open("decode", make_engine("decode", 2, **kwargs)),
    )
    dice = np.random.default_rng(3)
    sources, targets = (2 * dice.permutation(2_500) for _ in range(2))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, targets, aux=1)
    sender.send(sources[:900], (0, 3_600))
    sender.send(sources[900:], (3_600, 10_000), last=True, aux=0)
    assert [handle.wait(30) for handle in (sender, receiver)] == SUCCEEDED
    clean = make_engine("decode", 2, **kwargs)
    for n in range(2):
        assert (decode.buffers[n][targets] == prefill.buffers[n][sources]).all()
        assert (decode.buffers[n][1::2] == clean.buffers[n][1::2]).all()


def test_a_flight_never_has_more_blocks_than_the_library_queues(side: WritingSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 3,072 blocks makes the library fail all that follow."""
    sizes: list[int] = []
    submit = side.data._writer._home.engine.submit

    def counting(target: str, *columns: list[int]) -> Any:
        sizes.append(len(columns[2]))
        return submit(target, *columns)

    monkeypatch.setattr(side.data._writer._home.engine, "submit", counting)
    blocks = np.random.default_rng(1).permutation(8_000)
    plan = Plan(np.zeros(8_000, np.int32), blocks * 128, blocks * 256, np.full(8_000, 128), 8_000 * 128)
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [], [], plan)) == [[ev.WriteDone]]
    assert sum(sizes) == 8_000
    assert max(sizes) * mooncake_writer.FLIGHTS_PER_PEER <= 1_024


def test_submitting_sixteen_thousand_blocks_takes_less_than_ten_milliseconds(side: WritingSide) -> None:
    blocks = np.random.default_rng(1).permutation(16_384)
    plan = Plan(np.zeros(16_384, np.int32), blocks * 256, blocks * 512, np.full(16_384, 256), 16_384 * 256)
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            op = side.write(b"D" * 16, [], [], plan)
            took.append(time.perf_counter() - began)
            assert side.ends(op) == [[ev.WriteDone]]
        assert min(took) < 0.010


def test_rooms_take_turns(side: WritingSide) -> None:
    """A room of one page does not wait for all of a room of many."""
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        blocks = np.arange(16_384)
        plan = Plan(np.zeros(16_384, np.int32), blocks * 256, blocks * 512, np.full(16_384, 256), 16_384 * 256)
        large, small = side.write(b"D" * 16, [], [], plan), side.write(b"D" * 16, [5], [90])
        side.ends(large, small)
        order = [event.op for event in side.events if isinstance(event, ev.WriteDone)]
        assert order == [small, large]


# --- peers that suffer -------------------------------------------------------------------------------------------------------


def test_a_reader_killed_while_it_is_written_to(side: WritingSide) -> None:
    """Its writes are unknown until it is proven that it is gone; another reader's are not concerned."""
    with Reader(PAGES, PAGE_BYTES) as reader, Reader(PAGES, PAGE_BYTES) as other:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        side.data.peer_up(b"E" * 16, other.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        reader.send(signal.SIGSTOP)
        many = side.write(b"D" * 16, list(range(0, 90, 2)), list(range(0, 90, 2)))
        until(lambda: side.data.figures()["flights"] == 2, "a flight is on its way")
        reader.kill()
        assert side.ends(many) == [[ev.WriteUnknown, ev.WriteSettled]]
        assert side.ends(side.write(b"E" * 16, [7], [8])) == [[ev.WriteDone]]
        assert other.pages()[8] == 8
        assert side.ends(side.write(b"D" * 16, [1], [1]))[0][-1] in (ev.WriteFailed, ev.WriteSettled)


@pytest.mark.parametrize("side", [{"stall_ms": 300.0}], indirect=True)
def test_a_stopped_reader_settles_nothing_until_it_goes_on(side: WritingSide, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long: silence is no proof. Its engine is replaced, and everybody else is written to meanwhile."""
    monkeypatch.setattr(mooncake_engine, "ANSWER_S", 0.1)
    with Reader(PAGES, PAGE_BYTES) as reader, Reader(PAGES, PAGE_BYTES) as other:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        reader.send(signal.SIGSTOP)
        ops = [side.write(b"D" * 16, list(range(first, 90, 2)), list(range(first, 90, 2))) for first in (0, 1)]
        until(lambda: ev.WriteUnknown in side.outcomes(ops[0]), "it is called unknown")
        until(lambda: side.data.figures()["engines"] == 1, "the engine was replaced")
        side.data.peer_up(b"E" * 16, other.descriptor)
        for n in range(10):
            assert side.ends(side.write(b"E" * 16, [n], [n])) == [[ev.WriteDone]]
        side.data.cancel(ops[1])
        until(lambda: side.data._writer._home.number != 0 and side.data._writer._retired is None, "the old engine was closed")
        time.sleep(10 * RESIDUAL_MS / 1e3)  # far more than it would take if silence were an answer
        assert not any(ev.WriteSettled in side.outcomes(op) for op in ops)
        reader.send(signal.SIGCONT)
        assert side.ends(ops[0]) == [[ev.WriteUnknown, ev.WriteSettled]]
        landed = reader.pages()
        time.sleep(0.2)
        assert reader.pages() == landed, "bytes landed after it was settled"
        assert side.ends(side.write(b"D" * 16, [3], [95])) == [[ev.WriteDone]]
        assert reader.pages()[95] == 4


def test_more_stopped_readers_than_workers_stop_nobody_else(side: WritingSide) -> None:
    """Some with a connection, some that were never reached."""
    with Reader(8, PAGE_BYTES) as good:
        stopped = [Reader(8, PAGE_BYTES) for _ in range(mooncake.WORKERS + 2)]
        try:
            for n, reader in enumerate(stopped):
                side.data.peer_up(bytes([n]) * 16, reader.descriptor)
                if n % 2:
                    assert side.ends(side.write(bytes([n]) * 16, [0], [0])) == [[ev.WriteDone]]
                reader.send(signal.SIGSTOP)
            ops = [side.write(bytes([n]) * 16, list(range(8)), list(range(8))) for n in range(len(stopped))]
            side.data.peer_up(b"E" * 16, good.descriptor)
            for n in range(5):
                assert side.ends(side.write(b"E" * 16, [n], [n]), timeout_s=5.0) == [[ev.WriteDone]]
            assert not any(side.outcomes(op) for op in ops)
            for reader in stopped:
                reader.send(signal.SIGCONT)
            assert all(found == [ev.WriteDone] for found in side.ends(*ops))
        finally:
            for reader in stopped:
                reader.__exit__(None, None, None)


def test_memory_that_is_unregistered_while_it_is_written_to(side: WritingSide) -> None:
    """The reader goes on living: only a new engine and its answer prove that nothing more lands.

    The library fails a few blocks a second there, because it waits before it connects anew.
    """
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        op = side.write(b"D" * 16, list(range(0, 10, 2)), list(range(0, 10, 2)))
        assert reader.do("unregister") == "0"
        found = side.ends(op, side.write(b"D" * 16, [1], [1]))
        assert set(map(tuple, found)) <= {(ev.WriteUnknown, ev.WriteSettled), (ev.WriteDone,)}
        assert found[1] == [ev.WriteUnknown, ev.WriteSettled], "the second came after the memory was gone"
        if found[0] != [ev.WriteDone]:
            assert side.data.figures()["engines"] == 1


def test_a_batch_of_which_the_reader_refuses_one_copy_is_not_done(side: WritingSide) -> None:
    """Its last copy is placed, one in the middle was for memory that is not registered."""
    with Reader(PAGES, PAGE_BYTES) as reader:
        said = msgspec.msgpack.decode(reader.descriptor, type=Descriptor)
        more = (2 * PAGES * PAGE_BYTES).to_bytes(8, "little")
        side.data.peer_up(b"D" * 16, msgspec.msgpack.encode(msgspec.structs.replace(said, region_nbytes=more)))
        assert side.ends(side.write(b"D" * 16, [0, 2, 4], [0, PAGES + 3, 4])) == [[ev.WriteUnknown, ev.WriteSettled]]
        assert side.data.figures()["engines"] == 1
        assert reader.pages()[4] == 5
        assert side.ends(side.write(b"D" * 16, [1], [1])) == [[ev.WriteDone]]


def test_a_successor_at_the_same_address_gets_a_new_engine(side: WritingSide) -> None:
    """The library keeps for ever what it knows of an address; what it knows of the predecessor must not be used."""
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        side.data.peer_down(b"D" * 16)
        side.data.peer_up(b"E" * 16, reader.descriptor)
        assert side.ends(side.write(b"E" * 16, [1], [1])) == [[ev.WriteDone]]
        assert side.data.figures()["engines"] == 1


def test_what_is_on_its_way_when_a_peer_is_given_up_settles_when_it_ends(side: WritingSide) -> None:
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        reader.send(signal.SIGSTOP)
        on_its_way = side.write(b"D" * 16, list(range(0, 20, 2)), list(range(0, 20, 2)))
        queued = [side.write(b"D" * 16, list(range(0, 90, 2)), list(range(0, 90, 2))) for _ in range(3)]
        until(lambda: side.data.figures()["flights"] == 3, "two flights are on their way")
        side.data.peer_down(b"D" * 16)
        assert side.outcomes(on_its_way) == [ev.WriteUnknown]
        assert [side.outcomes(op) for op in queued][1:] == [[ev.WriteFailed]] * 2
        reader.send(signal.SIGCONT)
        assert side.ends(on_its_way) == [[ev.WriteUnknown, ev.WriteSettled]]
        assert reader.pages()[:20:2] == list(range(1, 21, 2))
        assert side.data.figures()["errors"] == 0


def test_closing_over_a_stopped_reader_is_bounded(side: WritingSide) -> None:
    with Reader(PAGES, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]
        reader.send(signal.SIGSTOP)
        op = side.write(b"D" * 16, list(range(0, 90, 2)), list(range(0, 90, 2)))
        until(lambda: side.data.figures()["flights"] >= 2, "a flight is on its way")
        began = time.monotonic()
        side.transport.close(0)
        assert time.monotonic() - began < 5.0
        assert side.outcomes(op) == [ev.WriteUnknown]


# --- what a peer says --------------------------------------------------------------------------------------------------------


def bent(good: bytes) -> list[bytes]:
    said = msgspec.msgpack.decode(good, type=Descriptor)
    changes: list[dict[str, Any]] = [
        {"version": 2},
        {"protocol": "rdma"},
        {"address": "no-address"},
        {"address": "127.0.0.1 "},
        {"region_address": b""},
        {"region_address": said.region_address[:-1]},
        {"region_address": bytes(8)},
        {"region_address": b"\xff" * 8},
        {"region_nbytes": bytes(8)},
        {"region_nbytes": b"\xff" * 8},
        {"region_nbytes": (1_000).to_bytes(8, "little")},
        {"region_address": said.region_address * 2, "region_nbytes": said.region_nbytes * 2},
    ]
    encode = msgspec.msgpack.encode
    return [
        *(encode(msgspec.structs.replace(said, **change)) for change in changes),
        encode(msgspec.structs.replace(said, port=7)).replace(b"\x07", b"\x00", 1),
        b"",
        b"\xc1",
        good[:-3],
        good + b"\x00",
        encode({"version": 1}),
    ]


def test_a_descriptor_that_makes_no_sense_costs_its_peer_alone(side: WritingSide) -> None:
    with Reader(PAGES, PAGE_BYTES) as reader:
        for n, descriptor in enumerate(bent(reader.descriptor)):
            peer = bytes([n + 1]) * 16
            side.data.peer_up(peer, descriptor)
            last = side.events[-1]
            assert isinstance(last, ev.PeerUnreachable), (n, descriptor)
            assert (last.peer, last.dead) == (peer, False), descriptor
            assert side.ends(side.write(peer, [0], [0])) == [[ev.WriteFailed]]
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0], [0])) == [[ev.WriteDone]]


def test_a_write_beyond_the_regions_of_a_peer_fails(side: WritingSide) -> None:
    with Reader(4, PAGE_BYTES) as reader:
        side.data.peer_up(b"D" * 16, reader.descriptor)
        assert side.ends(side.write(b"D" * 16, [0, 2], [0, 4])) == [[ev.WriteFailed]]
        assert reader.pages() == [CANARY] * 4


# --- what cannot work --------------------------------------------------------------------------------------------------------


def host_of(layout: pd_fsm.KVLayout, role: str = "prefill") -> Host:
    reactor = Reactor()
    reactor.close()
    return Host(b"P" * 16, role, "x", "127.0.0.1", layout, pd_fsm.Limits(), reactor, lambda _: None, lambda _frame, _via: None)


def small_layout() -> pd_fsm.KVLayout:
    return pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((4, 64), np.uint8)], 1)])


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: Any) -> Any:
        if name.startswith("mooncake"):
            raise ImportError("libibverbs.so.1: cannot open shared object file")
        return original(name, *arguments)

    def import_module(name: str) -> Any:
        return absent(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(pd_fsm.MissingDependency) as told:
        mooncake.create(host_of(small_layout()))
    for word in ("mooncake-transfer-engine", "non-cuda", "libibverbs1", "cannot open shared object file"):
        assert word in str(told.value)


def test_memory_of_a_device_needs_a_build_for_it() -> None:
    library = mooncake_engine.load_library("tcp")
    if any(getattr(library, flag, False) for flag in mooncake_engine.ACCELERATORS):
        return  # this build takes it
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [RawBuffer(1 << 40, 4, 64, device=0)], 1)])
    with pytest.raises(pd_fsm.ConfigError, match="stage the pages in pinned host memory"):
        mooncake.create(host_of(layout))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"residual_ms": -1}, "residual_ms"),
        ({"stall_ms": 0}, "stall_ms"),
        ({"workers": 1}, "workers must be at least 2"),
        ({"control_port": 70_000}, "control_port"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], complaint: str) -> None:
    before = threading.active_count()
    with pytest.raises(pd_fsm.ConfigError, match=complaint):
        mooncake.create(host_of(small_layout()), **options)
    assert threading.active_count() == before


def test_writes_that_only_left_the_writer_are_not_taken_for_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_TCP_PROTO", "1")
    with pytest.raises(pd_fsm.ConfigError, match="MC_TCP_PROTO"):
        mooncake.create(host_of(small_layout()))


def test_an_engine_ends_at_once() -> None:
    """With the interpreter lock held; left to itself the library takes up to a second."""
    engine = mooncake_engine.Engine("127.0.0.1", "tcp", "", ())
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 0.3
    assert mooncake_engine.answers("127.0.0.1", engine.port) is mooncake_engine.Answer.GONE
