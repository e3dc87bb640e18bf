"""What becomes of each write, over an agent whose transfers end when the test says so: a stand-in of `nixl_agent.Agent`.

The statuses that it gives, and when, are those that the library was seen to give; tests/test_nixl.py runs the same code over it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.core import events as ev
from pd_fsm.core.wire import pack_pages
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan, make_plan
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.transport import Host
from pd_fsm.transports import nixl_data, nixl_writer
from pd_fsm.transports.nixl_agent import Agent, State, Telemetry
from pd_fsm.transports.nixl_data import NixlData
from pd_fsm.transports.nixl_memory import agent_name, local_memory, pack_descriptor
from pd_fsm.transports.nixl_writer import Writer
from tests.live import until

PEER, OTHER, SELF = b"D" * 16, b"E" * 16, b"P" * 16
PROBE = 4096
RESIDUAL_MS = 500.0
LOST = (State.DISCONNECTED, "NIXL lost the connection")


@attrs.define(eq=False, slots=False)
class ScriptedAgent:
    """Handles are numbers in the order of `make_*`; `posts` and `ends` say how each post and check ends, POSTED unless set."""

    posts: dict[int, tuple[State, str]] = attrs.field(factory=dict)
    ends: dict[int, tuple[State, str]] = attrs.field(factory=dict)
    calls: list[tuple[Any, ...]] = attrs.field(factory=list)
    peers: set[str] = attrs.field(factory=set)
    releases: bool = True
    refuses: str = ""
    handles: int = 0
    lists: int = 0
    probe: tuple[State, str] = (State.DONE, "")
    probes: int = 0

    def prepare(self, peer: str, mem: str, rows: NDArray[np.uint64]) -> int:
        self.lists += 1
        return self.lists

    def forget(self, prepared: int) -> None:
        self.calls.append(("forget", prepared))

    def add_peer(self, name: str, metadata: bytes) -> None:
        assert name not in self.peers, "the library refuses a name that it knows"
        if self.refuses:
            raise WireError(self.refuses)
        self.peers.add(name)

    def connected(self, name: str) -> None:
        assert name in self.peers

    def remove_peer(self, name: str) -> None:
        self.calls.append(("remove", name))
        self.peers.discard(name)

    def make_prepared(self, local: int, local_items: Any, remote: int, remote_items: Any) -> int:
        if self.refuses:
            raise WireError(self.refuses)
        self.handles += 1
        self.calls.append(("make", self.handles, len(local_items)))
        return self.handles

    def make_plain(self, peer: str, local_mem: str, local: Any, remote_mem: str, remote: Any) -> int:
        assert local.shape == remote.shape
        assert (local[:, 1] == remote[:, 1]).all()
        return self.make_prepared(0, local, 0, remote)

    def make_probe(self, peer: str, address: int) -> int:
        assert address == PROBE
        self.probes += 1
        return -self.probes

    def post(self, handle: int, notice: bytes) -> tuple[State, str]:
        if handle < 0:
            return self.probe
        self.calls.append(("post", handle, notice))
        return self.posts.get(handle, (State.POSTED, ""))

    def check(self, handle: int) -> tuple[State, str]:
        return self.ends.get(handle, (State.POSTED, ""))

    def release(self, handle: int) -> bool:
        if handle > 0:
            self.calls.append(("release", handle))
        return self.releases

    def telemetry(self, handle: int) -> Telemetry | None:
        return None

    def progress(self) -> dict[str, list[bytes]]:
        return {}

    def close(self) -> None:
        self.calls.append(("close",))

    def end(self, *handles: int, how: tuple[State, str] = (State.DONE, "")) -> None:
        self.ends |= dict.fromkeys(handles, how)


@attrs.define(eq=False)
class Bench:
    """A writer, its agent, what it said, and the clock."""

    layout: pd_fsm.KVLayout
    agent: ScriptedAgent
    writer: Writer
    said: list[ev.Event]
    clock: list[float]

    def rounds(self, count: int = 12) -> None:
        for _ in range(count):
            self.writer.round()

    def plan(self, pages: int, aux: bool = False) -> Plan:
        numbers = pack_pages(range(pages))
        scattered = pack_pages(range(0, 2 * pages, 2))
        return make_plan(self.layout, (("kv", scattered, numbers),), (0, 1) if aux else None)

    def write(self, op: int, pages: int = 1, peer: bytes = PEER, notice: bytes = b"", generation: int | None = None) -> None:
        """In a room of its own, unless `generation` says otherwise."""
        self.writer.begin_write(op, peer, op if generation is None else generation, self.plan(pages), notice)

    def up(self, peer: bytes = PEER, seal: bytes | None = None) -> None:
        name = agent_name(peer).encode()
        metadata = b"nixlSerDes|Agent" + len(name).to_bytes(8, "little") + name + b"|"
        self.writer.begin_lane(peer, pack_descriptor(seal or peer, metadata, PROBE, local_memory(self.layout), b""))

    def posted(self) -> list[int]:
        return [call[1] for call in self.agent.calls if call[0] == "post"]


def make_bench(page_bytes: int = 4096, pages: int = 64, **limits: int) -> Bench:
    layout = pd_fsm.KVLayout(
        [pd_fsm.paged("kv", [np.zeros((pages, page_bytes), np.uint8)], 4), pd_fsm.rows("aux", np.zeros((4, 8)))]
    )
    said: list[ev.Event] = []
    clock = [100.0]
    host = Host(
        SELF,
        "prefill",
        "p",
        "127.0.0.1",
        layout,
        pd_fsm.Limits(**limits),
        Reactor(),
        said.append,
        lambda *_: None,
        lambda: 1e3 * clock[0],
    )
    agent = ScriptedAgent()
    writer = Writer(host, cast("Agent", agent), local_memory(layout), secret=b"", residual_ms=RESIDUAL_MS)
    return Bench(layout, agent, writer, said, clock)


@pytest.fixture
def bench() -> Bench:
    made = make_bench()
    made.up()
    return made


# --- ends that are proven ----------------------------------------------------------------------------------------------------


def test_a_write_is_done_when_its_transfer_is(bench: Bench) -> None:
    bench.write(7, pages=3)
    bench.rounds()
    assert bench.said == []
    bench.agent.end(1)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 3 * 4096)]
    assert ("release", 1) in bench.agent.calls
    assert bench.writer.idle()


def test_a_write_of_nothing_is_done(bench: Bench) -> None:
    bench.write(7, pages=0)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 0)]
    assert bench.posted() == []


def test_a_large_write_is_done_when_all_of_its_transfers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4 * 4096)
    bench = make_bench()
    bench.up()
    bench.write(7, pages=10)
    bench.rounds()
    assert bench.posted() == [1, 2, 3]
    for handle in (2, 1):
        bench.agent.end(handle)
        bench.rounds()
        assert bench.said == []
    bench.agent.end(3)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 10 * 4096)]


def test_a_transfer_that_was_refused_before_it_began_is_a_failure(bench: Bench) -> None:
    bench.agent.refuses = "NIXL refused the transfer: no such memory"
    bench.write(7)
    bench.rounds()
    assert bench.said == [ev.WriteFailed(7, "NIXL refused the transfer: no such memory")]


def test_a_plan_beyond_the_peers_memory_is_never_made(bench: Bench) -> None:
    plan = bench.plan(2)
    far = attrs.evolve(plan, destination=plan.destination + 63 * 4096)
    bench.writer.begin_write(7, PEER, 7, far, b"")
    bench.rounds()
    (failed,) = bench.said
    assert isinstance(failed, ev.WriteFailed)
    assert "beyond the end of region 0 of the peer" in failed.reason
    assert bench.agent.handles == 0


def test_a_write_to_a_peer_that_is_not_up_fails(bench: Bench) -> None:
    bench.write(7, peer=OTHER)
    bench.rounds()
    assert bench.said == [ev.WriteFailed(7, "there is no connection to the peer")]


# --- ends that are not ---------------------------------------------------------------------------------------------------------


def test_an_error_is_unknown_and_settles_when_the_connection_is_closed_and_the_network_is_empty(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.agent.end(1, how=LOST)
    bench.rounds()
    assert bench.said == [ev.WriteUnknown(7, "NIXL lost the connection")]
    closed = [("forget", 2), ("remove", agent_name(PEER))]
    assert [call for call in bench.agent.calls if call in closed] == closed, "its list is released, the connection is closed"
    assert bench.writer.settles_in_s() == pytest.approx(RESIDUAL_MS / 1e3)
    bench.clock[0] += RESIDUAL_MS / 1e3 - 0.01
    bench.rounds()
    assert len(bench.said) == 1, "what the network holds may still land"
    bench.clock[0] += 0.02
    bench.rounds()
    assert bench.said[1:] == [ev.WriteSettled(7)]
    assert bench.writer.settles_in_s() is None


def test_the_connection_is_closed_only_when_none_of_its_transfers_is_outstanding(bench: Bench) -> None:
    """Closing under a transfer makes the library call it failed, while its bytes go on landing."""
    bench.write(7)
    bench.write(8)
    bench.rounds()
    bench.agent.end(1, how=LOST)
    bench.rounds()
    assert ("remove", agent_name(PEER)) not in bench.agent.calls
    bench.clock[0] += 100
    bench.rounds()
    assert bench.said == [ev.WriteUnknown(7, "NIXL lost the connection")], "nothing is proven while one is outstanding"
    bench.agent.end(2, how=LOST)
    bench.rounds()
    bench.clock[0] += 1
    bench.rounds()
    assert ("remove", agent_name(PEER)) in bench.agent.calls
    assert bench.said[1:] == [ev.WriteUnknown(8, "NIXL lost the connection"), ev.WriteSettled(7), ev.WriteSettled(8)]


def test_an_error_that_left_the_connection_alive_proves_nothing_ever(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.agent.end(1, how=(State.FAILED, "NIXL failed (no resources)"))
    bench.rounds()
    bench.clock[0] += 1e6
    bench.rounds()
    bench.writer.end_lane(PEER)
    bench.rounds()
    bench.clock[0] += 1e6
    bench.rounds()
    assert bench.said == [ev.WriteUnknown(7, "NIXL failed (no resources)")]
    assert not bench.agent.peers


def test_a_post_that_failed_may_have_begun(bench: Bench) -> None:
    bench.agent.posts[1] = LOST
    bench.write(7)
    bench.rounds()
    assert bench.said == [ev.WriteUnknown(7, "NIXL lost the connection")]


def test_what_was_not_posted_when_another_transfer_failed_never_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench(in_flight_bytes_max=2 * 4096)
    bench.up()
    bench.write(7, pages=10)
    bench.rounds()
    assert bench.posted() == [1, 2]
    bench.agent.end(1, how=LOST)
    bench.agent.end(2)
    bench.rounds()
    assert bench.posted() == [1, 2]
    bench.clock[0] += 1
    bench.rounds()
    assert bench.said == [ev.WriteUnknown(7, "NIXL lost the connection"), ev.WriteSettled(7)]


def test_after_a_lost_connection_the_next_write_goes_over_a_new_one(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.agent.end(1, how=LOST)
    bench.rounds()
    bench.write(8)
    bench.rounds()
    assert bench.posted() == [1, 2]
    bench.agent.end(2)
    bench.rounds()
    assert ev.WriteDone(8, 4096) in bench.said
    assert bench.writer.counts["reconnects"] == 1


def test_a_handle_that_the_library_does_not_release_changes_no_outcome(bench: Bench) -> None:
    bench.agent.releases = False
    bench.write(7)
    bench.write(8)
    bench.rounds()
    bench.agent.end(1)
    bench.agent.end(2, how=LOST)
    bench.rounds()
    assert len(bench.said) == 2
    assert ev.WriteDone(7, 4096) in bench.said
    assert ev.WriteUnknown(8, "NIXL lost the connection") in bench.said


# --- cancel, and peers that go -----------------------------------------------------------------------------------------------


def test_cancel_ends_what_was_not_posted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(in_flight_bytes_max=4096)
    bench.up()
    bench.write(7)
    bench.write(8)
    bench.rounds()
    bench.writer.cancel(8)
    assert bench.said == [ev.WriteFailed(8, "cancelled")]
    bench.writer.cancel(8)
    bench.writer.cancel(99)
    assert bench.posted() == [1]


def test_cancel_waits_for_what_was_posted_and_releases_nothing_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle that is released while it is outstanding says nothing any more, and its bytes may go on landing."""
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench(in_flight_bytes_max=2 * 4096)
    bench.up()
    bench.write(7, pages=5)
    bench.rounds()
    bench.writer.cancel(7)
    bench.rounds()
    assert bench.said == []
    assert not [call for call in bench.agent.calls if call[0] == "release"]
    bench.agent.end(1, 2)
    bench.rounds()
    assert bench.said == [ev.WriteFailed(7, "cancelled")]
    assert bench.posted() == [1, 2]


def test_a_peer_that_was_given_up_settles_when_its_transfers_end(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.write(8)
    bench.writer.end_lane(PEER)
    assert bench.said == [
        ev.WriteFailed(8, "the peer was given up"),
        ev.WriteUnknown(7, "the peer was given up while it was on its way"),
    ]
    bench.rounds()
    assert bench.agent.peers, "the connection stays as long as something of it is outstanding"
    bench.agent.end(1)
    bench.rounds()
    assert bench.said[2:] == [ev.WriteSettled(7)]
    assert not bench.agent.peers
    assert bench.writer.figures()["peers"] == 0


def test_a_peer_that_comes_back_before_its_transfers_ended_gets_a_new_connection(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.writer.end_lane(PEER)
    bench.up()
    bench.write(8)
    bench.rounds()
    assert bench.posted() == [1]
    bench.agent.end(1)
    bench.rounds()
    assert bench.posted() == [1, 2]
    bench.agent.end(2)
    bench.rounds()
    assert [type(event) for event in bench.said] == [ev.WriteUnknown, ev.WriteSettled, ev.WriteDone]


def test_halt_posts_nothing_more_and_abandon_lets_go(bench: Bench) -> None:
    bench.write(7)
    bench.rounds()
    bench.write(8)
    bench.writer.halt()
    bench.rounds()
    assert bench.posted() == [1]
    assert not bench.writer.idle()
    bench.writer.abandon()
    assert ("release", 1) in bench.agent.calls


# --- probes ------------------------------------------------------------------------------------------------------------------


def test_a_peer_is_probed_once_so_that_its_first_small_write_is_made_at_once(bench: Bench) -> None:
    assert bench.agent.probes == 1
    bench.agent.posts[1] = (State.DONE, "")
    assert bench.writer.write_now(7, PEER, 7, bench.plan(1), b"")
    bench.agent.posts[2] = LOST
    bench.write(8)
    bench.rounds()
    assert bench.writer.counts["reconnects"] == 1
    assert bench.agent.probes == 1, "a peer that is gone is not asked again and again"


def test_a_probe_under_way_keeps_no_write_waiting() -> None:
    bench = make_bench()
    bench.agent.probe = (State.POSTED, "")
    bench.up()
    assert not bench.writer.idle()
    bench.write(7)
    bench.rounds()
    assert bench.posted() == [1]
    bench.agent.end(1, -1)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 4096)]
    assert bench.writer.idle()


@pytest.mark.parametrize("how", [LOST, (State.FAILED, "NIXL failed")], ids=["lost", "failed"])
def test_a_probe_that_fails_fails_nothing_else(how: tuple[State, str]) -> None:
    bench = make_bench()
    bench.agent.probe = how
    bench.up()
    bench.agent.posts[1] = (State.DONE, "")
    bench.write(7)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 4096)]


def test_a_peer_is_given_up_while_it_is_probed() -> None:
    bench = make_bench()
    bench.agent.probe = (State.POSTED, "")
    bench.up()
    bench.writer.end_lane(PEER)
    bench.rounds()
    assert bench.agent.peers
    bench.agent.end(-1, how=LOST)
    bench.rounds()
    assert not bench.agent.peers
    assert bench.said == []
    assert bench.writer.idle()


# --- turns -------------------------------------------------------------------------------------------------------------------


def test_bytes_on_their_way_to_a_peer_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench(in_flight_bytes_max=3 * 4096)
    bench.up()
    bench.up(OTHER)
    bench.write(7, pages=8)
    bench.write(8, pages=8, peer=OTHER)
    bench.rounds(40)
    assert len(bench.posted()) == 6
    bench.agent.end(1)
    bench.rounds(40)
    assert len(bench.posted()) == 7


def test_a_transfer_larger_than_the_bound_goes_alone() -> None:
    bench = make_bench(in_flight_bytes_max=100)
    bench.up()
    bench.write(7)
    bench.write(8)
    bench.rounds()
    assert bench.posted() == [1]
    bench.agent.end(1)
    bench.rounds()
    assert bench.posted() == [1, 2]


def test_rooms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench()
    bench.up()
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    bench.write(7, pages=20)
    bench.rounds(2)
    bench.write(8, pages=1)
    bench.rounds(3)
    assert bench.said == [ev.WriteDone(8, 4096)], "the small room does not wait for the large one"


def test_chunks_of_one_room_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking turns, all of them would end late."""
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench()
    bench.up()
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    for op in (7, 8, 9):
        bench.write(op, pages=3, generation=1)
    bench.write(10, pages=3, generation=2)
    bench.rounds(7)
    assert bench.said == [ev.WriteDone(7, 3 * 4096), ev.WriteDone(10, 3 * 4096)]
    bench.rounds(6)
    assert bench.said[2:] == [ev.WriteDone(8, 3 * 4096), ev.WriteDone(9, 3 * 4096)]


def test_a_cancelled_chunk_leaves_its_rooms_others(bench: Bench) -> None:
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    for op in (7, 8, 9):
        bench.write(op, generation=1)
    bench.writer.cancel(8)
    bench.rounds()
    assert bench.said == [ev.WriteFailed(8, "cancelled"), ev.WriteDone(7, 4096), ev.WriteDone(9, 4096)]


def test_peers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench()
    bench.up()
    bench.up(OTHER)
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    bench.write(7, pages=20)
    bench.write(8, pages=2, peer=OTHER)
    bench.rounds(6)
    assert bench.said == [ev.WriteDone(8, 2 * 4096)]


def test_a_round_posts_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4 * 4096)
    bench = make_bench()
    peers = [bytes([65 + number]) * 16 for number in range(5)]
    for number, peer in enumerate(peers):
        bench.up(peer)
        bench.write(number, pages=4, peer=peer)
    for expected in range(1, 6):
        bench.rounds(1)
        assert len(bench.posted()) == expected


def test_a_notice_goes_with_the_last_transfer_once_the_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench()
    bench.up()
    bench.write(7, pages=3, notice=b"placed")
    bench.rounds()
    assert bench.posted() == [1, 2]
    bench.agent.end(2)
    bench.rounds()
    assert bench.posted() == [1, 2], "a notice speaks for all of the operation"
    bench.agent.end(1)
    bench.rounds()
    assert bench.agent.calls[-1] == ("post", 3, b"placed")
    assert [call[2] for call in bench.agent.calls if call[0] == "post"] == [b"", b"", b"placed"]


def test_an_outcome_waits_for_the_next_post_at_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_writer, "TRANSFER_BYTES_MAX", 4096)
    bench = make_bench()
    bench.up()
    bench.agent.posts[1] = (State.DONE, "")
    heard: list[int] = []
    post = bench.agent.post
    bench.agent.post = lambda handle, notice: (heard.append(len(bench.said)), post(handle, notice))[1]  # type: ignore[method-assign]
    bench.write(7, generation=1)
    bench.write(8, pages=2, generation=1)
    bench.rounds(3)
    assert heard == [0, 1, 1], "it was told before the next post began"
    bench.agent.end(2, 3)
    bench.rounds(1)
    assert bench.said == [ev.WriteDone(7, 4096), ev.WriteDone(8, 2 * 4096)]


# --- at once -----------------------------------------------------------------------------------------------------------------


def warm(bench: Bench) -> Bench:
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    bench.write(1)
    bench.rounds()
    bench.said.clear()
    return bench


def test_a_small_write_over_a_warm_connection_is_made_at_once(bench: Bench) -> None:
    warm(bench)
    assert bench.writer.write_now(7, PEER, 7, bench.plan(2), b"")
    assert bench.said == [ev.WriteDone(7, 2 * 4096)]
    assert bench.writer.idle()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda bench: bench.writer.end_lane(PEER),
        lambda bench: bench.write(8, pages=5),
        lambda bench: setattr(bench.writer._lanes[PEER], "warm", False),
        lambda bench: bench.writer._lanes.clear(),
    ],
    ids=["given up", "others wait", "not warm", "unknown"],
)
def test_otherwise_it_is_left_to_the_thread_untouched(bench: Bench, spoil: Callable[[Bench], None]) -> None:
    warm(bench)
    spoil(bench)
    bench.said.clear()
    assert not bench.writer.write_now(7, PEER, 7, bench.plan(1), b"")
    assert bench.said == []
    assert bench.writer.counts["now"] == 0


def test_a_large_write_is_never_made_at_once() -> None:
    bench = warm(met(make_bench(page_bytes=nixl_writer.NOW_BYTES_MAX)))
    assert bench.writer.write_now(7, PEER, 7, bench.plan(1), b"")
    assert not bench.writer.write_now(8, PEER, 8, bench.plan(2), b"")
    small = warm(met(make_bench(page_bytes=8, pages=256)))
    assert not small.writer.write_now(8, PEER, 8, small.plan(nixl_writer.NOW_COPIES_MAX + 1), b"")


def met(bench: Bench) -> Bench:
    bench.up()
    return bench


def test_one_that_does_not_end_at_once_is_left_outstanding(bench: Bench) -> None:
    warm(bench)
    bench.agent.posts.clear()
    assert bench.writer.write_now(7, PEER, 7, bench.plan(1), b"")
    assert bench.said == []
    assert not bench.writer.idle()
    bench.agent.end(2)
    bench.rounds()
    assert bench.said == [ev.WriteDone(7, 4096)]


def test_one_that_loses_the_connection_leaves_work_for_the_thread(bench: Bench) -> None:
    warm(bench)
    bench.agent.posts[2] = LOST
    assert bench.writer.write_now(7, PEER, 7, bench.plan(1), b"")
    assert bench.said == [ev.WriteUnknown(7, "NIXL lost the connection")]
    assert not bench.writer.idle()
    bench.rounds()
    bench.clock[0] += 1
    bench.rounds()
    assert bench.said[1:] == [ev.WriteSettled(7)]


# --- the thread --------------------------------------------------------------------------------------------------------------


def test_close_posts_nothing_more_and_destroys_the_agent(bench: Bench) -> None:
    begun, go_on = threading.Event(), threading.Event()
    bench.agent.posts = dict.fromkeys(range(1, 50), (State.DONE, ""))
    post = bench.agent.post

    def slow(handle: int, notice: bytes) -> tuple[State, str]:
        begun.set()
        assert go_on.wait(10)
        return post(handle, notice)

    bench.agent.post = slow  # type: ignore[method-assign]
    data = plane(bench)
    with data._busy:  # so that all of them are there in its first round
        for op in range(5):
            data.submit(op, PEER, op, bench.plan(1), b"")
    assert begun.wait(10)
    closing = threading.Thread(target=data.close)
    closing.start()
    until(lambda: data._close_at > 0, "it is being closed")
    go_on.set()
    closing.join(10)
    assert bench.posted() == [1]
    assert bench.agent.calls[-1] == ("close",)
    data.close()
    assert data._thread is not None
    assert not data._thread.is_alive()


def test_close_ends_although_a_transfer_never_does(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_data, "CLOSE_S", 0.1)
    data = plane(bench)
    data.submit(1, PEER, 1, bench.plan(1), b"")
    until(lambda: bench.posted() == [1], "it is posted")
    data.close()
    assert bench.agent.calls[-2:] == [("release", 1), ("close",)]
    assert data._thread is not None
    assert not data._thread.is_alive()


def test_an_error_in_the_thread_is_told_and_does_not_end_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    data = plane(bench)
    data._tell(lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    bench.agent.posts = {1: (State.DONE, "")}
    data.submit(1, PEER, 1, bench.plan(1), b"")
    until(lambda: bench.said == [ev.WriteDone(1, 4096)], "the write is done")
    assert "met an unexpected error and goes on" in caplog.text
    data.close()


def test_a_busy_thread_never_keeps_the_driver_waiting(bench: Bench) -> None:
    data = plane(bench)
    warm(bench)
    with data._busy:  # as during a long post
        data.submit(7, PEER, 7, bench.plan(1), b"")
        data.cancel(8)
        data.peer_down(OTHER)
        assert bench.said == []
    until(lambda: bench.said == [ev.WriteDone(7, 4096)], "the write is done")
    data.close()


@pytest.mark.parametrize(("notifications", "expected"), [(False, b""), (True, b"placed")])
def test_notices_are_left_out_unless_they_are_wanted(bench: Bench, notifications: bool, expected: bytes) -> None:
    data = plane(bench, notifications)
    bench.agent.posts = {1: (State.DONE, "")}
    data.submit(1, PEER, 1, bench.plan(1), b"placed")
    until(lambda: bench.said == [ev.WriteDone(1, 4096)], "the write is done")
    assert ("post", 1, expected) in bench.agent.calls
    data.close()


def plane(bench: Bench, notifications: bool = False) -> NixlData:
    return NixlData(
        bench.writer._host, cast("Agent", bench.agent), bench.writer, b"", residual_ms=RESIDUAL_MS, notifications=notifications
    )


# --- descriptors -------------------------------------------------------------------------------------------------------------


def test_a_descriptor_that_makes_no_sense_costs_that_peer_alone(bench: Bench) -> None:
    bench.writer.begin_lane(OTHER, b"garbage")
    (unreachable,) = bench.said
    assert isinstance(unreachable, ev.PeerUnreachable)
    assert unreachable.peer == OTHER
    assert not unreachable.dead
    assert "it cannot be written to: its descriptor of 7 bytes is malformed" in unreachable.reason
    bench.write(8, peer=OTHER)
    bench.rounds()
    assert isinstance(bench.said[1], ev.WriteFailed)
    bench.write(9)
    bench.rounds()
    assert bench.posted() == [1]


def test_metadata_that_the_library_refuses_costs_that_peer_alone(bench: Bench) -> None:
    bench.agent.refuses = "NIXL cannot use its metadata: mismatch"
    bench.up(OTHER)
    assert bench.said == [ev.PeerUnreachable(OTHER, "it cannot be written to: NIXL cannot use its metadata: mismatch")]
    bench.rounds()
    assert bench.writer.figures()["peers"] == 1


def test_a_descriptor_of_another_process_is_refused(bench: Bench) -> None:
    bench.up(OTHER, seal=PEER)
    (unreachable,) = bench.said
    assert isinstance(unreachable, ev.PeerUnreachable)
    assert "not its own" in unreachable.reason
