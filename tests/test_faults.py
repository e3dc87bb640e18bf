"""Real processes that are killed, stopped and started again, over ZeroMQ on loopback and a bootstrap server.

The process that suffers is a child; the one that must notice runs in the test.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.runtime.bootstrap import BootstrapServer
from tests.engine_process import DEADLINES, PAGE_BYTES, PAGE_SIZE, PAGES, EngineProcess, make_buffer, open_engine
from tests.live import until

LEASE_MS = 400
NOTICED_S = 2.0  # a death is seen by the connection, not by a deadline: DEADLINES.lost_ms alone would allow less, too
CANARY = 0xA5


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with BootstrapServer(lease_ms=LEASE_MS) as made:
        yield made


@attrs.define(eq=False)
class Local:
    """The engine in the test's own process."""

    session: pd_fsm.Session
    buffer: Any

    def drive(self, done: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
        until(done, what, [self.session], timeout_s)

    def freed(self, *handles: pd_fsm.Handle, within_s: float = NOTICED_S) -> None:
        """All failed and own their memory alone; from now on nothing may change it."""
        self.drive(lambda: all(handle.poll() == 0 and handle.pages_free for handle in handles), "they failed", within_s)
        self.buffer[:] = CANARY

    def untouched(self, but: tuple[int, ...] = ()) -> None:
        for page in range(PAGES):
            assert page in but or (self.buffer[page] == CANARY).all(), f"page {page} was written after it was free"


@pytest.fixture
def decode(server: BootstrapServer, request: pytest.FixtureRequest) -> Iterator[Local]:
    yield from local("decode", server, **getattr(request, "param", {}))


@pytest.fixture
def prefill(server: BootstrapServer, request: pytest.FixtureRequest) -> Iterator[Local]:
    yield from local("prefill", server, **getattr(request, "param", {}))


def local(role: str, server: BootstrapServer, **settings: Any) -> Iterator[Local]:
    buffer = make_buffer(1)
    with open_engine(role, f"{role}-0", server.url, buffer, **settings) as session:
        yield Local(session, buffer)


def chunk(process: EngineProcess, room: int, pages: range, *, last: bool) -> None:
    process.do("chunk", room=room, pages=list(pages), tokens=[pages.start * PAGE_SIZE, pages.stop * PAGE_SIZE], last=last)


def succeeds(decode: Local, process: EngineProcess, room: int, seed: int) -> None:
    """A usual room with the prefill process, with the right bytes."""
    process.do("open", room=room)
    chunk(process, room, range(4), last=True)
    with decode.session.receive(room, [10, 11, 12, 13]) as receiver:
        decode.drive(lambda: receiver.poll() in (0, 4), f"room {room} concluded")
        receiver.raise_for_failure()
        assert (decode.buffer[10:14] == make_buffer(seed)[:4]).all()


# --- kill -9 -----------------------------------------------------------------------------------------------------------------


def test_a_killed_prefill_fails_its_rooms_at_once_and_its_successor_serves_new_ones(server: BootstrapServer, decode: Local) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2) as process:
        for room in (1, 2):
            process.do("open", room=room)
        waiting, moving = decode.session.receive(1, range(8)), decode.session.receive(2, range(8, 16))
        chunk(process, 2, range(4), last=False)
        decode.drive(lambda: waiting.phase is Phase.WAITING_FOR_INPUT and moving.phase is Phase.TRANSFERRING, "both are under way")
        process.kill()
        began = time.monotonic()
        decode.freed(waiting, moving)
        assert time.monotonic() - began < NOTICED_S
        for receiver in (waiting, moving):
            assert receiver.failure.cause == "peer_lost"
            assert receiver.failure.peer == "prefill-0"
            assert "prefill-0 is lost" in receiver.failure.reason
            receiver.clear()
    early = decode.session.receive(3, [20])  # the bootstrap server still lists the dead one, or nobody
    with EngineProcess("prefill", "prefill-0", server.url, seed=3) as successor:
        succeeds(decode, successor, room=1, seed=3)
        successor.do("open", room=3)
        chunk(successor, 3, range(1), last=True)
        decode.drive(lambda: early.poll() in (0, 4), "the room opened in between concluded")
        early.raise_for_failure()
        decode.untouched(but=(10, 11, 12, 13, 20))
        assert successor.end() == (0, "")


@pytest.mark.parametrize("decode", [{"thread": False}], indirect=True)
def test_a_prefill_killed_while_bytes_are_on_their_way(server: BootstrapServer, decode: Local) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2) as process:
        process.do("open", room=1)
        receiver = decode.session.receive(1, range(PAGES))
        decode.drive(lambda: receiver.phase is Phase.WAITING_FOR_INPUT, "they met")
        chunk(process, 1, range(PAGES), last=True)
        source = make_buffer(2)
        driver = decode.session.driver
        # One step at a time, and no more of them than it takes until the first bytes are there.
        until(lambda: driver.progress(rounds_max=1) and (decode.buffer[0] == source[0]).all(), "a segment landed")
        process.kill()
        assert (decode.buffer[-1] != source[-1]).any(), "more was to come"
        decode.freed(receiver)
    assert receiver.failure.cause == "peer_lost"
    assert receiver.failure.peer == "prefill-0"
    decode.drive(lambda: not decode.session.describe()["links"], "nothing is owed")
    decode.untouched()


def test_a_killed_decode_fails_its_rooms_and_frees_the_source_pages(server: BootstrapServer, prefill: Local) -> None:
    with EngineProcess("decode", "decode-0", server.url, seed=2) as process:
        senders = [prefill.session.send(room) for room in range(3)]
        for room in range(3):
            process.do("open", room=room, pages=list(range(room * 100, room * 100 + 100)))
        prefill.drive(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "they met")
        senders[1].send(range(2), (0, 2 * PAGE_SIZE))
        prefill.drive(lambda: senders[1].bytes_moved == 2 * PAGE_BYTES, "a chunk arrived")
        process.stop()  # so that what is sent now stays on its way
        senders[2].send(range(100), (0, 100 * PAGE_SIZE))
        process.kill()
        prefill.freed(*senders)
    for sender in senders:
        assert sender.failure.peer == "decode-0"
        assert "decode-0" in sender.failure.reason
    assert {sender.failure.cause for sender in senders} <= {"peer_lost", "transport"}
    prefill.drive(lambda: not prefill.session.describe()["ops"], "no write is outstanding")
    with EngineProcess("decode", "decode-0", server.url, seed=3) as successor:
        sender = prefill.session.send(9)
        sender.send([0], (0, PAGE_SIZE), last=True)
        successor.do("open", room=9, pages=[5])
        assert successor.do("wait", room=9, timeout_s=10)["phase"] == "SUCCESS"
        assert successor.do("page", page=5)["first"] == [CANARY] * 16
        prefill.drive(lambda: sender.phase is Phase.SUCCESS, "it succeeded")
        assert successor.end() == (0, "")


def test_a_prefill_that_closes_in_an_orderly_way_says_so(server: BootstrapServer, decode: Local) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2) as process:
        process.do("open", room=1)
        receiver = decode.session.receive(1, range(8))
        decode.drive(lambda: receiver.phase is Phase.WAITING_FOR_INPUT, "they met")
        assert process.end() == (0, "")
    decode.freed(receiver)
    assert "prefill-0 was closed" in receiver.failure.reason


# --- a process that stands still ---------------------------------------------------------------------------------------------


def test_a_stopped_prefill_is_lost_and_may_come_back(server: BootstrapServer, decode: Local) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2) as process:
        process.do("open", room=1)
        process.do("open", room=2)
        moving, waiting = decode.session.receive(1, range(64)), decode.session.receive(2, range(64, 128))
        chunk(process, 1, range(4), last=False)
        decode.drive(
            lambda: moving.bytes_moved == 4 * PAGE_BYTES and waiting.phase is Phase.WAITING_FOR_INPUT, "both are under way"
        )
        process.stop()
        # Silence proves nothing about the process; this plane, which places every byte itself, can vouch for the pages anyway.
        decode.freed(moving, waiting, within_s=DEADLINES.lost_ms / 1e3 + NOTICED_S)
        for receiver in (moving, waiting):
            assert receiver.failure.cause == "peer_lost"
            assert "prefill-0 is lost: it was silent for" in receiver.failure.reason
            receiver.clear()
        process.resume()
        process.do("wait", room=1, timeout_s=5)  # it learns that it was given up
        assert process.do("poll", room=1)["phase"] == "FAILED"
        succeeds(decode, process, room=5, seed=2)
        decode.untouched(but=(10, 11, 12, 13))


def test_a_short_stop_is_only_a_delay(server: BootstrapServer, decode: Local) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2) as process:
        process.do("open", room=1)
        receiver = decode.session.receive(1, range(4))
        decode.drive(lambda: receiver.phase is Phase.WAITING_FOR_INPUT, "they met")
        process.stop()
        decode.drive(lambda: decode.session.describe()["peers"][0]["state"] == "SUSPECT", "it is suspected")
        process.resume()
        decode.drive(lambda: decode.session.describe()["peers"][0]["state"] == "READY", "it was heard again")
        chunk(process, 1, range(4), last=True)
        decode.drive(lambda: receiver.poll() in (0, 4), "the room concluded")
        receiver.raise_for_failure()


def test_a_stopped_decode_is_lost_and_may_come_back(server: BootstrapServer, prefill: Local) -> None:
    with EngineProcess("decode", "decode-0", server.url, seed=2) as process:
        sender = prefill.session.send(1)
        process.do("open", room=1, pages=list(range(PAGES)))
        prefill.drive(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
        process.stop()
        sender.send(range(PAGES), (0, PAGES * PAGE_SIZE), last=True)
        prefill.freed(sender, within_s=DEADLINES.lost_ms / 1e3 + NOTICED_S)
        assert sender.failure.cause == "peer_lost"
        assert "decode-0 is lost: it was silent for" in sender.failure.reason
        sender.clear()
        process.resume()
        again = prefill.session.send(2)
        again.send([7], (0, PAGE_SIZE), last=True)
        assert process.do("wait", room=1, timeout_s=10)["phase"] == "FAILED"
        process.do("open", room=2, pages=[3])
        assert process.do("wait", room=2, timeout_s=10)["phase"] == "SUCCESS"
        assert process.do("page", page=3)["first"] == [CANARY] * 16
        prefill.drive(lambda: again.phase is Phase.SUCCESS, "it succeeded")


# --- the bootstrap server ----------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def test_a_bootstrap_server_that_comes_late_is_waited_for() -> None:
    port = free_port()
    buffer = make_buffer(1)
    with (
        EngineProcess("prefill", "prefill-0", f"http://127.0.0.1:{port}", seed=2) as process,
        open_engine("decode", "decode-0", f"http://127.0.0.1:{port}", buffer) as session,
    ):
        decode = Local(session, buffer)
        early = session.receive(1, [1])
        decode.drive(
            lambda: "no prefill rank was found" in session.describe()["rooms"][0]["waits_for"], "it says what it waits for"
        )
        decode.drive(lambda: "127.0.0.1" in session.describe()["rooms"][0]["waits_for"], "and where it asked")
        assert early.phase is Phase.BOOTSTRAPPING
        with BootstrapServer(port=port, lease_ms=LEASE_MS):
            succeeds(decode, process, room=2, seed=2)
            process.do("open", room=1)
            chunk(process, 1, range(1), last=True)
            decode.drive(lambda: early.poll() in (0, 4), "the early room concluded")
            early.raise_for_failure()
        succeeds(decode, process, room=3, seed=2)  # who is known needs no bootstrap any more


def test_a_prefill_that_was_killed_is_found_again_after_the_server_restarted_too() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    buffer = make_buffer(1)
    with open_engine("decode", "decode-0", url, buffer) as session:
        decode = Local(session, buffer)
        with BootstrapServer(port=port, lease_ms=LEASE_MS), EngineProcess("prefill", "prefill-0", url, seed=2) as process:
            succeeds(decode, process, room=1, seed=2)
            process.kill()
            decode.drive(lambda: not session.describe()["peers"], "its death was seen", NOTICED_S)
        receiver = session.receive(2, [1])
        with BootstrapServer(port=port, lease_ms=LEASE_MS), EngineProcess("prefill", "prefill-0", url, seed=3) as process:
            process.do("open", room=2)
            chunk(process, 2, range(1), last=True)
            decode.drive(lambda: receiver.poll() in (0, 4), "the room concluded")
            receiver.raise_for_failure()
            assert (buffer[1] == make_buffer(3)[0]).all()
