"""The runtime around the core: the driver, the reactor, opening and closing, and what a transport's bug costs."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import numpy as np
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.core.session import Identity, Step
from pd_fsm.runtime.reactor import CHECK_MS, Reactor
from pd_fsm.runtime.trace import TraceWriter
from pd_fsm.runtime.transport import Host, Transport, available, make_transport
from pd_fsm.transports import memory
from tests.live import PAGE_SIZE, PAGES, World, make_engine, messages, open_files, threads, until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Sessions that move only when the test drives them, unless it says otherwise."""
    made = World("memory", thread=False, directory=tmp_path)
    yield made
    made.close()


# --- the driver --------------------------------------------------------------------------------------------------------------


def test_a_trace_loses_no_line_that_is_recorded_while_it_is_written(tmp_path: Path) -> None:
    """The engine's thread records while the driver's writes: here it writes between any two instructions of recording."""
    path = tmp_path / "trace.ndjson"
    identity = Identity(b"T" * 16, "traced", "prefill", "none", pd_fsm.Topology(), ())
    writer = TraceWriter(path, identity)

    step = Step("room", "open", "open", "", "BOOTSTRAPPING", None, None)
    left = 0

    def interrupt(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code is TraceWriter._line.__code__:
            frame.f_trace_opcodes = True
            left -= event == "opcode"
            if left == 0:
                writer.flush()
        return interrupt

    for instruction in range(1, 100):
        writer.record(step)  # something to write
        left = instruction
        sys.settrace(interrupt)
        try:
            writer.record(step)
        finally:
            sys.settrace(None)
    assert left > 0, "recording has more instructions than were interrupted"
    writer.close()
    assert path.read_text().count('"machine":"room"') == 2 * 99


def test_a_stream_of_events_does_not_stop_the_clock(tmp_path: Path) -> None:
    """Completions come before timeouts, but a peer that never stops talking must not keep every deadline from firing."""
    world = World("memory", thread=False, directory=tmp_path, deadlines=pd_fsm.Deadlines(bootstrap_ms=40))
    engine = world.open("prefill")
    driver = engine.session.driver
    take = driver._take

    def take_and_talk_on(item: Any) -> None:
        take(item)
        driver.emit(ev.RegistrationFailed(""))  # there is always something in the inbox

    driver._take = take_and_talk_on  # type: ignore[method-assign]
    driver.emit(ev.RegistrationFailed(""))
    sender = engine.session.send(1)
    deadline = time.monotonic() + 5
    while sender.phase is not Phase.FAILED:
        assert time.monotonic() < deadline, "the deadline of the room never fired"
        engine.session.progress()
    assert sender.failure is not None
    assert sender.failure.cause == "timeout"
    world.close()


def test_the_core_is_touched_under_the_lock_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """`deadline` walks tables that another thread's call may be changing; without the lock that ends the driver's thread."""
    prefill, decode = world.pair()
    unlocked: list[str] = []
    for engine in (prefill, decode):
        driver = engine.session.driver
        for name in ("step", "expire", "deadline", "describe"):
            real = getattr(driver.core, name)

            def spied(*given: Any, real: Any = real, name: str = name, driver: Any = driver) -> Any:
                if not driver.lock.locked():
                    unlocked.append(name)
                return real(*given)

            monkeypatch.setattr(driver.core, name, spied)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    sender.send([1], (0, PAGE_SIZE), last=True)
    world.conclude(sender, receiver)
    prefill.session.wait(1)
    prefill.session.describe()
    receiver.clear()
    world.close()
    assert unlocked == []


def test_many_threads_use_a_session_that_has_its_own(tmp_path: Path) -> None:
    """Opens, chunks, aborts, clears and descriptions from four threads, with deadlines and tombstones that lapse all the time."""
    world = World(
        "memory", thread=True, directory=tmp_path, deadlines=pd_fsm.Deadlines(tombstone_ms=1, early_offer_ms=2, bootstrap_ms=200)
    )
    prefill, decode = world.pair()
    errors: list[BaseException] = []

    def hammer(number: int) -> None:
        dice = random.Random(number)
        try:
            for turn in range(120):
                room = number * 1_000 + turn
                with prefill.session.send(room) as sender:
                    if dice.random() < 0.7:
                        with decode.session.receive(room, [dice.randrange(PAGES)]) as receiver:
                            sender.send([1], (0, PAGE_SIZE), last=dice.random() < 0.8)
                            if dice.random() < 0.5:
                                dice.choice([sender, receiver]).abort("dice")
                            receiver.poll()
                    if dice.random() < 0.2:
                        json.dumps(prefill.session.describe())
                        json.dumps(decode.session.describe())
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    hammering = [threading.Thread(target=hammer, args=(number,)) for number in range(4)]
    for thread in hammering:
        thread.start()
    for thread in hammering:
        thread.join(30)
    assert errors == []
    for engine in (prefill, decode):
        assert engine.session.driver._thread.is_alive()
        assert messages(engine, "driver_error") == 0
    world.at_rest()
    world.close()


def test_wait_returns_what_it_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room is moved before its phase is on the board; a waiter that looked at the room would read the old phase."""
    world = World("memory", thread=True, directory=tmp_path)
    prefill = world.open("prefill")
    handle = prefill.session.send(1)
    publish, go = prefill.session._board.publish, threading.Event()

    def publish_late(generation: int, phase: int) -> None:
        go.wait(5)
        publish(generation, phase)

    monkeypatch.setattr(prefill.session._board, "publish", publish_late)
    aborting = threading.Thread(target=handle.abort)
    aborting.start()
    until(lambda: not handle._room.live, "the room was moved")
    phases: list[Phase] = []
    waiting = threading.Thread(target=lambda: phases.append(handle.wait(5)))
    waiting.start()
    waiting.join(0.1)
    assert phases == [], "the phase is not there yet"
    go.set()
    waiting.join(5)
    aborting.join(5)
    assert phases == [Phase.FAILED]
    world.close()


def test_a_sleeping_session_wakes_for_a_call_and_for_its_deadline(world: World) -> None:
    decode = world.open("decode", deadlines=pd_fsm.Deadlines(bootstrap_ms=150, repeat_min_ms=10_000, repeat_max_ms=10_000))
    session = decode.session
    while session.progress():
        pass
    began = time.monotonic()
    session.wait(40)
    assert 0.03 < time.monotonic() - began < 2, "nothing to do: it sleeps"
    timer = threading.Timer(0.05, lambda: session.receive(1, [1]))
    timer.start()
    began = time.monotonic()
    session.wait(10_000)
    assert time.monotonic() - began < 5, "a call wakes it"
    timer.join()
    while session.progress():
        pass
    began = time.monotonic()
    session.wait(10_000)
    assert time.monotonic() - began < 5, "a deadline wakes it"
    until(lambda: session.describe()["rooms"][0]["phase"] == "FAILED", "the deadline was applied", [session])


def test_garbage_frames_are_counted_and_the_log_stays_short(world: World, caplog: pytest.LogCaptureFixture) -> None:
    decode = world.open("decode")
    for _ in range(1_000):
        decode.session.driver.deliver(b"garbage")
    until(lambda: messages(decode, "wire_error") == 1_000, "all were counted", [decode.session])
    assert len(caplog.records) == 10, "the 1st, 2nd, 4th ... 512th"


def test_progress_is_bounded(world: World) -> None:
    """An event that causes the next one for ever does not keep the engine's loop."""
    decode = world.open("decode")
    driver = decode.session.driver
    real = driver._take

    def again(item: Any) -> None:
        real(item)
        driver.emit(ev.LookupFailed(1, "again"))

    driver._take = again  # type: ignore[method-assign]
    driver.emit(ev.LookupFailed(1, "first"))
    assert decode.session.progress()
    assert driver._inbox, "more is left for the next step"
    driver._take = real  # type: ignore[method-assign]


def test_only_one_drives_at_a_time(world: World) -> None:
    decode = world.open("decode")
    inside, leave = threading.Event(), threading.Event()
    driver = decode.session.driver
    real = driver._take

    def slow(item: Any) -> None:
        inside.set()
        leave.wait(5)
        real(item)

    driver._take = slow  # type: ignore[method-assign]
    driver.emit(ev.LookupFailed(1, "x"))
    other = threading.Thread(target=decode.session.progress)
    other.start()
    assert inside.wait(5)
    assert not decode.session.progress(), "somebody else drives; it does not wait for them"
    handle = decode.session.receive(1, [1])  # and no call of the engine waits for them either
    handle.abort()
    assert handle.phase is Phase.FAILED
    leave.set()
    other.join(5)


# --- a transport's bugs ------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Broken:
    """The memory transport with one method of a plane replaced."""

    world: World
    plane: str
    method: str
    replacement: Callable[..., Any]

    def __call__(self, host: Host) -> Transport:
        made = memory.create(host, hub=self.world.hub)
        setattr(getattr(made, self.plane), self.method, self.replacement)
        return made


def raising(*_: Any) -> Any:
    raise RuntimeError("a bug of the transport")


def test_a_transport_that_raises_in_submit_has_an_unknown_outcome(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody knows how far it came: the room fails at once, the memory does not come back by a guess."""
    prefill = world.open("prefill", transport=Broken(world, "data", "submit", raising), transport_options={})
    decode = world.open("decode")
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    sender.send([1], (0, PAGE_SIZE), last=True)
    world.until(lambda: sender.phase is receiver.phase is Phase.FAILED, "both failed")
    assert sender.failure.cause == "transport"
    assert "RuntimeError('a bug of the transport')" in sender.failure.reason
    assert "a bug of the transport" in caplog.text
    world.until(lambda: receiver.pages_free, "decode's own plane vouches for its pages")
    assert not sender.pages_free
    assert prefill.session.describe()["leases"][0]["state"] == "QUARANTINED"
    (op,) = prefill.session.driver.core.ops
    prefill.session.driver.emit(ev.WriteSettled(op))
    world.conclude(sender)


@pytest.mark.parametrize(
    ("plane", "method"), [("control", "send"), ("control", "connect"), ("data", "expose"), ("data", "peer_up"), ("data", "revoke")]
)
def test_a_transport_that_raises_elsewhere_costs_no_session(
    world: World, plane: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    prefill = world.open("prefill")
    deadlines = pd_fsm.Deadlines(
        handshake_ms=100, heartbeat_ms=20, waiting_ms=150, bootstrap_ms=150, transfer_ms=150, repeat_min_ms=20
    )
    decode = world.open("decode", transport=Broken(world, plane, method, raising), transport_options={}, deadlines=deadlines)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    sender.send([1], (0, PAGE_SIZE), last=True)
    world.until(lambda: receiver.phase in (Phase.FAILED, Phase.SUCCESS), "the room came to an end")
    until(lambda: messages(decode, "driver_error") > 0, "it was counted", [prefill.session, decode.session])
    assert "a bug of the transport" in caplog.text
    if method == "revoke":
        receiver.clear()
    assert decode.session.receive(2, [6]).phase in (Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT), "the session goes on"


def test_an_error_of_one_socket_takes_no_signal_from_another() -> None:
    reactor = Reactor()
    called: list[str] = []
    pipes = [os.pipe() for _ in range(2)]

    def handler(name: str, fail: bool) -> Callable[[], bool]:
        def run() -> bool:
            called.append(name)
            if fail and called.count(name) == 1:
                raise RuntimeError(name)
            return False

        return run

    sources = [reactor.add_fd(pipes[0][0], handler("a", fail=True)), reactor.add_fd(pipes[1][0], handler("b", fail=False))]
    with pytest.raises(RuntimeError, match="a"):
        reactor.dispatch()
    reactor.dispatch()
    assert "b" in called
    for source in sources:
        reactor.remove(source)
    reactor.close()
    for ends in pipes:
        for end in ends:
            os.close(end)


# --- the reactor -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_a_new_source_is_looked_at_once_whatever_came_before(reactor: Reactor, pipe: tuple[int, int]) -> None:
    called: list[int] = []
    reactor.add_fd(pipe[0], lambda: bool(called.append(1)))
    assert reactor.dispatch()
    assert not reactor.dispatch(), "and then only when it is ready"
    os.write(pipe[1], b"x")
    assert reactor.dispatch()
    assert called == [1, 1]


def test_a_source_may_be_replaced_by_its_own_handler(reactor: Reactor, pipe: tuple[int, int]) -> None:
    """A closed socket's number goes to the next one: its first look must not be lost."""
    called: list[str] = []

    def replace() -> bool:
        reactor.remove(first)
        reactor.add_fd(pipe[0], lambda: bool(called.append("second")))
        return True

    first = reactor.add_fd(pipe[0], replace)
    reactor.dispatch()
    reactor.dispatch()
    assert called == ["second"]
    reactor.remove(first)  # once more, and without harm to its successor
    os.write(pipe[1], b"x")
    assert reactor.dispatch()
    assert called == ["second", "second"]


def test_a_source_that_was_removed_by_another_handler_is_not_called(reactor: Reactor) -> None:
    pipes = [os.pipe() for _ in range(2)]
    called: list[int] = []
    sources: list[Any] = []

    def handler(number: int) -> Callable[[], bool]:
        def run() -> bool:
            called.append(number)
            reactor.remove(sources[1 - number])
            return False

        return run

    sources += [reactor.add_fd(pipes[number][0], handler(number)) for number in range(2)]
    reactor.dispatch()
    assert len(called) == 1
    for ends in pipes:
        for end in ends:
            os.close(end)


def test_waiting_ends_when_woken_and_not_before_its_time(reactor: Reactor) -> None:
    began = time.monotonic()
    reactor.wait(30, lambda: False)
    assert time.monotonic() - began >= 0.025
    waking = threading.Timer(0.05, reactor.wake)
    waking.start()
    began = time.monotonic()
    reactor.wait(20_000, lambda: False)
    assert time.monotonic() - began < 10
    waking.join()
    began = time.monotonic()
    reactor.wait(20_000, lambda: True)
    reactor.wait(-5, lambda: False)
    assert time.monotonic() - began < 10
    for _ in range(100_000):  # more than a pipe holds: waking never blocks
        reactor._waiting = True
        reactor.wake()
    reactor._waiting = False
    reactor.dispatch()
    began = time.monotonic()
    reactor.wait(30, lambda: False)
    assert time.monotonic() - began >= 0.025, "all wake-ups were taken"


def test_what_has_no_descriptor_is_looked_at_regularly(reactor: Reactor) -> None:
    answers = iter([False, False, True])
    reactor.add_check(lambda: next(answers))
    began = time.monotonic()
    while reactor._checks:
        reactor.wait(20_000, lambda: False)
        reactor.dispatch()
    assert time.monotonic() - began < 100 * CHECK_MS / 1e3
    assert next(answers, None) is None


# --- opening and closing -----------------------------------------------------------------------------------------------------


def test_closing_waits_without_spinning(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is owed is waited for; a thread that ended just before must not turn that into a busy loop."""
    prefill, decode = world.open("prefill", thread=True), world.open("decode")
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
    until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met", [decode.session])
    rounds: list[float] = []
    real = prefill.session.driver.progress
    monkeypatch.setattr(prefill.session.driver, "progress", lambda *a: bool(rounds.append(time.monotonic())) or real(*a))
    began = time.monotonic()
    prefill.close(0.4)  # decode is not driven: it never acknowledges the verdict
    assert 0.3 < time.monotonic() - began < 3
    assert len(rounds) < 60
    assert world.conclude(sender, receiver) == [Phase.FAILED, Phase.FAILED]


def test_closing_twice_and_from_the_context_manager(world: World) -> None:
    with world.open("prefill").session as session:
        session.close()
        session.close()
    assert "closed" in session.describe()["closing"]


def test_a_transport_that_cannot_be_made_leaves_nothing(world: World) -> None:
    before, running = len(open_files()), threads()
    with pytest.raises(RuntimeError, match="a bug"):
        world.open("prefill", transport=raising, transport_options={})
    taken = world.registry.client()
    taken.start(lambda event: None)
    with pytest.raises(pd_fsm.LocalProtocolError, match="already started"):
        world.open("prefill", rendezvous=taken)
    assert len(open_files()) == before
    assert threads() == running
    assert world.hub._members == {}


def test_time_and_names_can_be_given(tmp_path: Path) -> None:
    """A simulation's clock: deadlines and the trace go by it, and by nothing else."""
    now_ms, path = 5_000.0, tmp_path / "trace.ndjson"
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((4, 4), np.uint8)], 16)])
    with pd_fsm.open_session(
        "prefill",
        layout,
        transport="memory",
        transport_options={"hub": memory.Hub()},
        thread=False,
        trace=str(path),
        clock_ms=lambda: now_ms,
        incarnation=b"incarnation 4711",
    ) as session:
        assert session.incarnation == b"incarnation 4711"
        sender = session.send(7)
        now_ms += 299_999.0
        session.progress()
        assert sender.phase is Phase.BOOTSTRAPPING
        now_ms += 1.0
        session.progress()
        assert sender.failure is not None
        assert sender.failure.cause == "timeout"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["t_ms"] for line in lines if line["machine"] == "room"] == [5_000.0, 305_000.0]


@pytest.mark.parametrize("wrong", [b"short", bytes(16)])
def test_an_incarnation_that_cannot_be(wrong: bytes) -> None:
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((4, 4), np.uint8)], 16)])
    with pytest.raises(pd_fsm.ConfigError, match="incarnation must be 16 bytes"):
        pd_fsm.open_session("prefill", layout, transport="memory", incarnation=wrong)


def test_transports_are_found_by_entry_point() -> None:
    assert {"memory", "zmq", "fake"} <= set(available())
    with pytest.raises(pd_fsm.ConfigError, match=r"no transport 'pigeon'; installed are .*memory.*zmq"):
        make_transport("pigeon", None, {})  # type: ignore[arg-type]


def test_options_that_a_transport_does_not_take_are_named() -> None:
    with pytest.raises(pd_fsm.ConfigError, match=r"transport 'memory' does not take the options \['wings'\]"):
        pd_fsm.open_session("prefill", make_engine("prefill", 1).layout, transport="memory", transport_options={"wings": 2})


def test_a_handle_says_what_it_is(world: World) -> None:
    prefill = world.open("prefill")
    sender = prefill.session.send(7)
    assert repr(sender) == "<Sender room=7 generation=1 BOOTSTRAPPING>"
    sender.raise_for_failure()
    assert sender.failure is None
    assert not sender.pages_free
    with pytest.raises(pd_fsm.WaitTimeout, match="the pages of room 7"):
        sender.wait_pages_free(0.01)
    with pytest.raises(pd_fsm.LocalProtocolError, match="cannot receive"):
        prefill.session.receive(1, [1])
    with pytest.raises(pd_fsm.LocalProtocolError, match="already open"):
        prefill.session.send(7)
    json.dumps(prefill.session.describe())


def test_pages_of_several_index_spaces_are_given_by_name(world: World) -> None:
    import numpy as np

    def layout() -> pd_fsm.KVLayout:
        full, window = np.zeros((8, 4), np.uint8), np.zeros((8, 2), np.uint8)
        return pd_fsm.KVLayout([pd_fsm.paged("full", [full], 4, space="full"), pd_fsm.paged("window", [window], 4, space="window")])

    options = {"transport": "memory", "transport_options": {"hub": world.hub}, "thread": False}
    with pd_fsm.open_session("prefill", layout(), **options) as p, pd_fsm.open_session("decode", layout(), **options) as d:
        with pytest.raises(pd_fsm.LocalProtocolError, match=r"for each index space \['full', 'window'\]"):
            d.receive(1, [1])
        with pytest.raises(pd_fsm.LocalProtocolError, match="pages are needed for"):
            d.receive(1, {"full": [1]})
        for number, region in enumerate(p.layout.regions):
            region.bytes_view()[:] = np.arange(1, region.nbytes + 1) + number
        sender, receiver = p.send(1), d.receive(1, {"full": [1, 2], "window": [7, 0]})
        sender.send({"full": [3, 5], "window": [0, 1]}, (0, 8), last=True)
        until(lambda: sender.phase is receiver.phase is Phase.SUCCESS, "it arrived", [p, d])
        full, window = (region.bytes_view().reshape(8, -1) for region in d.layout.regions)
        assert full[[1, 2]].tolist() == p.layout.regions[0].bytes_view().reshape(8, -1)[[3, 5]].tolist()
        assert window[[7, 0]].tolist() == p.layout.regions[1].bytes_view().reshape(8, -1)[[0, 1]].tolist()
        assert full[[0, 3, 4, 5, 6, 7]].sum() == window[1:7].sum() == 0
