"""The NIXL transport while processes are killed, stopped, closed and started again: over CMA and over TCP, on loopback.

The process that suffers is a child; the one that must notice runs in the test. Over TCP a stopped reader keeps a write on its way
for certain; CMA places all bytes while it is posted, whatever the reader does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.runtime.bootstrap import BootstrapServer
from tests.engine_process import PAGE_BYTES, PAGE_SIZE, PAGES, EngineProcess, make_buffer
from tests.live import threads, until
from tests.test_faults import CANARY, Local, chunk, local

OPTIONS: dict[str, Any] = {"residual_ms": 200.0}
CMA: dict[str, Any] = {"transport": "nixl", "transport_options": OPTIONS}
TCP: dict[str, Any] = {"transport": "nixl", "transport_options": OPTIONS | {"backend_options": {"engine_config": "TLS=tcp"}}}


pytestmark = pytest.mark.usefixtures("nixl_library")


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with BootstrapServer(lease_ms=400) as made:
        yield made


@pytest.fixture(params=[CMA, TCP], ids=["cma", "tcp"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.fixture
def decode(server: BootstrapServer, settings: dict[str, Any]) -> Iterator[Local]:
    yield from local("decode", server, **settings)


@pytest.fixture
def prefill(server: BootstrapServer, settings: dict[str, Any]) -> Iterator[Local]:
    yield from local("prefill", server, **settings)


def first_chunk(prefill: Local, process: EngineProcess) -> pd_fsm.Sender:
    """A room of all pages, of which four are placed: the connection exists."""
    sender = prefill.session.send(1)
    process.do("open", room=1, pages=list(range(PAGES)))
    sender.send(range(4), (0, 4 * PAGE_SIZE))
    prefill.drive(lambda: sender.bytes_moved == 4 * PAGE_BYTES, "the first chunk is placed")
    return sender


def rest(sender: pd_fsm.Sender) -> None:
    """All but the last page, so that the room cannot succeed."""
    sender.send(range(4, PAGES - 1), (4 * PAGE_SIZE, (PAGES - 1) * PAGE_SIZE))


def on_its_way(prefill: Local) -> None:
    until(lambda: prefill.session.driver._transport.data.figures()["outstanding"] == 1, "the second chunk is on its way")


def test_a_prefill_killed_while_bytes_land(server: BootstrapServer, decode: Local, settings: dict[str, Any]) -> None:
    with EngineProcess("prefill", "prefill-0", server.url, seed=2, **settings) as process:
        process.do("open", room=1)
        receiver = decode.session.receive(1, range(PAGES))
        decode.drive(lambda: receiver.phase is Phase.WAITING_FOR_INPUT, "they met")
        decode.buffer[:] = CANARY
        chunk(process, 1, range(PAGES - 1), last=False)
        decode.drive(lambda: bool((decode.buffer[0] != CANARY).any()), "the first bytes landed")
        process.kill()
        decode.freed(receiver, within_s=4.0)
        assert receiver.failure.cause == "peer_lost"
    with EngineProcess("prefill", "prefill-0", server.url, seed=3, **settings) as successor:
        successor.do("open", room=2)
        chunk(successor, 2, range(4), last=True)
        second = decode.session.receive(2, [10, 11, 12, 13])
        decode.drive(lambda: second.poll() in (0, 4), "the successor's room concluded")
        second.raise_for_failure()
        assert (decode.buffer[10:14] == make_buffer(3)[:4]).all()
        decode.untouched(but=(10, 11, 12, 13))
        assert successor.end() == (0, "")


def test_a_decode_killed_while_it_is_written_to(server: BootstrapServer, prefill: Local, settings: dict[str, Any]) -> None:
    """Stopped first, so that over TCP the write is certain to be under way."""
    with EngineProcess("decode", "decode-0", server.url, seed=2, **settings) as process:
        sender = first_chunk(prefill, process)
        process.stop()
        rest(sender)
        if settings is TCP:
            on_its_way(prefill)
        process.resume()
        process.kill()
        prefill.drive(lambda: sender.poll() == 0 and sender.pages_free, "the room failed and its memory is free", 6.0)
    with EngineProcess("decode", "decode-0", server.url, seed=3, **settings) as successor:
        second = prefill.session.send(2)
        successor.do("open", room=2, pages=[5])
        second.send([7], (0, PAGE_SIZE), last=True)
        prefill.drive(lambda: second.poll() in (0, 4), "the successor's room concluded")
        second.raise_for_failure()
        assert successor.do("page", room=2, page=5)["first"] == prefill.buffer[7][:16].tolist()
        assert successor.end() == (0, "")


def test_memory_that_is_deregistered_and_closed_while_it_is_written_to(
    server: BootstrapServer, prefill: Local, settings: dict[str, Any]
) -> None:
    """The session of the other side closes in the middle: the room fails, and the source memory becomes free."""
    with EngineProcess("decode", "decode-0", server.url, seed=2, **settings) as process:
        sender = first_chunk(prefill, process)
        rest(sender)
        assert process.end()[0] == 0
        prefill.drive(lambda: sender.poll() == 0 and sender.pages_free, "the room failed and its memory is free", 6.0)
        assert sender.failure is not None


def test_a_session_that_closes_over_a_stopped_peer_ends_in_time(
    server: BootstrapServer, prefill: Local, settings: dict[str, Any]
) -> None:
    with EngineProcess("decode", "decode-0", server.url, seed=2, **settings) as process:
        sender = first_chunk(prefill, process)
        process.stop()
        rest(sender)
        if settings is TCP:
            on_its_way(prefill)
        began = time.monotonic()
        prefill.session.close(0.2)
        assert time.monotonic() - began < 5.0
        assert not [name for name in threads() if "nixl" in name]
        process.resume()
