"""What only the memory transport does; what every transport must do is in the conformance kit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.core.wire import pack_pages
from pd_fsm.errors import WireError
from pd_fsm.kv import make_plan
from pd_fsm.transports.memory import Hub, MemoryPlanes
from tests.live import PAGE_SIZE, PAGES, Engine, World, make_engine, messages


@pytest.fixture(params=[True, False], ids=["thread", "progress"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    directory = tmp_path / "sockets"
    directory.mkdir()
    made = World("memory", request.param, directory)
    yield made
    made.close()


class TestMemory:
    def test_sessions_of_different_hubs_do_not_meet(self, world: World) -> None:
        world.open("prefill", rendezvous=None)
        decode = world.open(
            "decode", rendezvous=None, transport_options={"hub": Hub()}, deadlines=pd_fsm.Deadlines(bootstrap_ms=60)
        )
        receiver = decode.session.receive(1, [5])
        world.conclude(receiver)
        assert receiver.failure.cause == "timeout"

    def test_a_session_that_vanished_is_dead_at_once(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
        world.hub.leave(planes_of(prefill))
        receiver.abort("gone anyway")  # the next message finds nobody
        world.conclude(receiver)
        assert messages(decode, "failed.abort") == 1

    def test_only_what_is_exposed_can_be_written(self, world: World) -> None:
        prefill, decode = world.pair()
        planes = planes_of(decode)
        writer = prefill.session.incarnation
        planes.expose(ev.Expose(1, {"kv": pack_pages([5])}, -1, (writer,)))
        for target, generation, by in ((4, 1, writer), (6, 1, writer), (5, 2, writer), (5, 1, b"O" * 16)):
            with pytest.raises(WireError):
                land(prefill, decode, 1, target, generation, by)
        decode.check()
        land(prefill, decode, 1, 5)
        decode.expect(prefill, [(1, 5)])
        assert planes.revoke(1), "this plane vouches at once"
        with pytest.raises(WireError, match="not exposed"):
            land(prefill, decode, 2, 5)
        decode.check()

    def test_nothing_lands_in_a_session_that_was_closed(self, world: World) -> None:
        """A writer that found the other session just before it closed must not touch its memory afterwards."""
        prefill, decode = world.pair()
        planes_of(decode).expose(ev.Expose(1, {"kv": pack_pages([5])}, -1, (prefill.session.incarnation,)))
        decode.close()
        with pytest.raises(WireError, match="closed"):
            land(prefill, decode, 1, 5)
        decode.check()


def land(prefill: Engine, decode: Engine, source: int, target: int, generation: int = 1, writer: bytes | None = None) -> None:
    """Write one page, as a plane would that found the other one."""
    plan = make_plan(prefill.layout, (("kv", pack_pages([source]), pack_pages([target])),), None)
    planes_of(decode).land(writer or prefill.session.incarnation, generation, plan, planes_of(prefill)._landing)


def planes_of(engine: Engine) -> MemoryPlanes:
    transport = engine.session.driver._transport
    assert transport is not None
    assert isinstance(transport.data, MemoryPlanes)
    return transport.data


def test_a_transport_can_be_a_factory() -> None:
    from pd_fsm.transports import memory

    with pd_fsm.open_session("prefill", make_engine("prefill", 1).layout, transport=memory.create) as session:
        assert session.driver._transport.name == "memory"


def test_both_drive_the_same_session() -> None:
    """A session with a thread that several other threads drive, too: every room succeeds, nothing is done twice."""
    hub = Hub()
    prefill, decode = make_engine("prefill", 1), make_engine("decode", 2)
    stop = threading.Event()

    def drive(session: pd_fsm.Session) -> None:
        while not stop.is_set():
            session.progress()

    with (
        pd_fsm.open_session("prefill", prefill.layout, transport="memory", transport_options={"hub": hub}) as p,
        pd_fsm.open_session("decode", decode.layout, transport="memory", transport_options={"hub": hub}) as d,
    ):
        drivers = [threading.Thread(target=drive, args=(session,)) for session in (p, d, d)]
        for driver in drivers:
            driver.start()
        try:
            for room in range(25):
                with p.send(room) as sender, d.receive(room, [room % PAGES]) as receiver:
                    sender.send([1], (0, PAGE_SIZE), last=True)
                    assert receiver.wait(10) is Phase.SUCCESS
                    assert sender.wait(10) is Phase.SUCCESS
        finally:
            stop.set()
            for driver in drivers:
                driver.join(10)
        assert d.describe()["counts"]["succeeded"] == 25
        assert "driver_error" not in p.describe()["counts"] | d.describe()["counts"]
