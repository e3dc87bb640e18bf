"""What only the NIXL transport does, over real agents and loopback: CMA, which UCX takes within a machine, and TCP."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import prometheus_client
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.runtime.metrics import SessionCollector
from pd_fsm.transports import nixl_agent
from pd_fsm.transports.nixl_data import NixlData
from pd_fsm.transports.nixl_memory import agent_name, local_memory, pack_descriptor
from pd_fsm.transports.nixl_writer import TRANSFER_BYTES_MAX
from tests.live import Engine, World, make_engine

SUCCEEDED = [Phase.SUCCESS, Phase.SUCCESS]
TCP = {"backend_options": {"engine_config": "TLS=tcp"}}


pytestmark = pytest.mark.usefixtures("nixl_library")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World("nixl", True, tmp_path)
    yield made
    made.close()


def plane(engine: Engine) -> NixlData:
    data = engine.session.driver._transport.data
    assert isinstance(data, NixlData)
    return data


# --- bytes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, TCP], ids=["cma", "tcp"])
@pytest.mark.parametrize("page_bytes", [(256,), (96, 64, 8), (1_000, 24)])
def test_sixteen_thousand_scattered_blocks_are_exact(world: World, options: dict[str, Any], page_bytes: tuple[int, ...]) -> None:
    """Every other page in another order: not a byte of the pages in between changes."""
    count = 16_384 // len(page_bytes)
    kwargs = {"pages": 2 * count, "page_bytes": (*page_bytes, 8)}
    prefill = world.open("prefill", make_engine("prefill", 1, **kwargs), transport_options=options)
    decode = world.open("decode", make_engine("decode", 2, **kwargs), transport_options=options)
    dice = np.random.default_rng(3)
    sources, targets = (2 * dice.permutation(count) for _ in range(2))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, targets, aux=1)
    sender.send(sources, (0, count * 4), last=True, aux=0)
    assert world.conclude(sender, receiver) == SUCCEEDED
    decode.expect(prefill, list(zip(sources, targets, strict=True)), aux=(0, 1))
    decode.check()
    prefill.check()
    assert plane(prefill).figures()["bytes"] == sender.bytes_moved


@pytest.mark.parametrize("options", [{}, TCP], ids=["cma", "tcp"])
def test_many_chunks_of_many_rooms_at_once(world: World, options: dict[str, Any]) -> None:
    prefill, decode = world.pair(transport_options=options)
    rooms, per_room = 6, 8
    handles = []
    for room in range(rooms):
        pages = range(room * per_room, (room + 1) * per_room)
        sender, receiver = prefill.session.send(room), decode.session.receive(room, pages)
        for index, page in enumerate(pages):
            sender.send([47 - page], (index * 4, index * 4 + 4), last=index == per_room - 1)
        handles += [sender, receiver]
    assert set(world.conclude(*handles)) == {Phase.SUCCESS}
    decode.expect(prefill, [(47 - page, page) for page in range(rooms * per_room)])
    decode.check()


def test_long_runs_of_pages_go_in_several_transfers(world: World) -> None:
    """More bytes than one transfer has, in one copy that is not cut by pages."""
    kwargs: dict[str, Any] = {"pages": 1_100, "page_bytes": (64 << 10, 8)}
    prefill, decode = (world.open(role, make_engine(role, 1, **kwargs)) for role in ("prefill", "decode"))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(1_000))
    sender.send(range(1, 1_001), (0, 4_000), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    decode.expect(prefill, [(page + 1, page) for page in range(1_000)])
    decode.check()
    seen = plane(prefill).figures()
    assert seen["transfers"] == -(-sender.bytes_moved // TRANSFER_BYTES_MAX)
    assert seen.get("prepared", 0) == 0


def test_the_connection_is_made_before_the_first_write(world: World) -> None:
    """So that the first room does not wait for it, some tens of milliseconds."""
    prefill, decode = world.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [3])
    lanes = plane(prefill)._writer._lanes  # type: ignore[union-attr]
    world.until(lambda: any(lane.warm for lane in lanes.values()), "the peer was probed")
    sender.send([2], (0, 4), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    assert plane(prefill).figures()["now"] == 1


# --- options -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thread", [True, False], ids=["thread", "progress"])
def test_a_notice_tells_decode_that_its_bytes_are_there(world: World, monkeypatch: pytest.MonkeyPatch, thread: bool) -> None:
    """With everything lost that prefill says over the control plane after its Accepted."""
    world.thread = thread
    prefill, decode = world.pair(transport_options={"notifications": True})
    control = prefill.session.driver._transport.control
    send = control.send

    def lossy(peer: bytes, frame: bytes) -> None:
        if not isinstance(wire.decode(frame)[2], wire.Part | wire.Verdict):
            send(peer, frame)

    monkeypatch.setattr(control, "send", lossy)
    for room, pages in enumerate((range(3), range(10, 20))):
        sender, receiver = prefill.session.send(room), decode.session.receive(room, pages, aux=room)
        sender.send(pages, (0, 4 * len(pages)), last=True, aux=room)
        world.until(lambda receiver=receiver: receiver.poll() == 4, "decode succeeded")  # type: ignore[misc]
        decode.expect(prefill, [(page, page) for page in pages], aux=(room, room))
    decode.check()
    assert plane(decode).figures()["notices"] == 2


def test_telemetry_is_the_librarys(world: World) -> None:
    prefill, decode = world.pair(transport_options={"telemetry": True})
    sender, receiver = prefill.session.send(1), decode.session.receive(1, range(10))
    sender.send(range(10), (0, 40), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    seen = prefill.session.describe()["transport"]
    assert seen["descriptors"] == 3, "ten neighbours in each of three regions are one copy each"
    assert seen["bytes"] == sender.bytes_moved
    assert seen["transfer_us"] >= seen["post_us"] > 0
    registry = prometheus_client.CollectorRegistry()
    registry.register(SessionCollector(prefill.session))
    labels = {"session": prefill.session.name, "role": "prefill", "figure": "bytes"}
    assert registry.get_sample_value("pd_fsm_transport", labels) == sender.bytes_moved


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"backend": "CARRIER_PIGEON"}, "NIXL has no back end 'CARRIER_PIGEON' here; it has .*UCX"),
        ({"backend_options": {"engine_config": "TLS=nothing"}}, "could not create its back end 'UCX' with .*TLS=nothing"),
        ({"residual_ms": -1}, "residual_ms must not be negative"),
        ({"progress_ms": 0.5}, "progress_ms must be at least 1"),
        ({"wings": 2}, "does not take the options"),
    ],
)
def test_options_that_cannot_work_are_named(world: World, options: dict[str, Any], why: str) -> None:
    with pytest.raises(pd_fsm.ConfigError, match=why):
        world.open("decode", transport_options=options)


def test_a_missing_library_is_named_with_what_to_install(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(pd_fsm.MissingDependency, match="pip install --no-deps nixl nixl-cu12"):
        world.open("prefill")


# --- peers -------------------------------------------------------------------------------------------------------------------


def test_an_agent_is_destroyed_after_others_of_its_process_have_connected_to_it(world: World) -> None:
    """Otherwise UCX was seen to abort the process."""
    for _ in range(4):
        prefill, decode = world.pair()
        writer = plane(prefill)._writer
        assert writer is not None
        descriptor = plane(decode).descriptor
        plane(prefill)._tell(lambda writer, to=(decode.session.incarnation, descriptor): writer.begin_lane(*to))
        world.until(lambda writer=writer: bool(writer._lanes), "it begins to connect")  # type: ignore[misc]
        plane(decode)._agent.close()
        assert all(lane.warm for lane in writer._lanes.values())
        world.close()


def test_only_sessions_with_the_same_secret_write(world: World) -> None:
    prefill = world.open("prefill", transport_options={"secret": "ours"})
    decode = world.open("decode", transport_options={"secret": "theirs"})
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [1])
    sender.send([1], (0, 4), last=True)
    assert world.conclude(sender, receiver) == [Phase.FAILED, Phase.FAILED]
    decode.check()
    friend = world.open("decode", transport_options={"secret": "ours"})
    sender, receiver = prefill.session.send(2), friend.session.receive(2, [1])
    sender.send([1], (0, 4), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED


def test_metadata_that_the_real_library_refuses_costs_that_peer_alone(world: World) -> None:
    """Sealed as it should be, and naming the right agent, but cut off."""
    prefill, decode = world.pair()
    data, said = plane(prefill), []
    writer = data._writer
    assert writer is not None
    stranger = b"S" * 16
    good = msgspec.msgpack.decode(plane(decode).descriptor)[1]
    name = agent_name(decode.session.incarnation).encode()
    theirs = good.replace(name, agent_name(stranger).encode())
    with data._busy:
        host = writer._host
        object.__setattr__(host, "emit", said.append)
        for length in (len(name) + 30, len(good) // 2, len(good) - 3):
            writer.begin_lane(stranger, pack_descriptor(stranger, theirs[:length], 0, local_memory(decode.layout), b""))
            writer.round()
        object.__setattr__(host, "emit", prefill.session.driver.emit)
    assert [type(event) for event in said] == [ev.PeerUnreachable] * 3
    assert all("NIXL cannot use its metadata" in event.reason for event in said)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [1])
    sender.send([1], (0, 4), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED


# --- time --------------------------------------------------------------------------------------------------------------------


def test_idle_sessions_cost_next_to_nothing(world: World) -> None:
    """NIXL's own progress thread, as its Python class starts it, burns a whole core."""
    prefill, decode = world.pair()
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [1])
    sender.send([1], (0, 4), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    world.at_rest()
    began = time.process_time()
    time.sleep(0.5)  # what is measured is what happens while nothing is done
    assert time.process_time() - began < 0.1


def test_submitting_sixteen_thousand_blocks_takes_less_than_10_ms(world: World) -> None:
    kwargs: dict[str, Any] = {"pages": 16_384, "page_bytes": (64, 8)}
    prefill, decode = (world.open(role, make_engine(role, 1, **kwargs)) for role in ("prefill", "decode"))
    taken = []
    data = plane(prefill)
    submit = data.submit

    def timed(*arguments: Any) -> None:
        began = time.thread_time()
        submit(*arguments)
        taken.append(time.thread_time() - began)

    data.submit = timed  # type: ignore[method-assign]
    order = np.random.default_rng(1).permutation(16_384)
    sender, receiver = prefill.session.send(1), decode.session.receive(1, order)
    sender.send(np.arange(16_384), (0, 4 * 16_384), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    assert len(taken) == 1
    assert taken[0] < 0.010


SCRIPT = """
import numpy as np, pd_fsm
def session(role, registry):
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((8, 64), np.uint8)], 4)])
    return pd_fsm.open_session(role, layout, transport="nixl", rendezvous=registry.client())
registry = pd_fsm.LocalRendezvous()
prefill, decode = session("prefill", registry), session("decode", registry)
sender, receiver = prefill.send(1), decode.receive(1, [2])
sender.send([1], (0, 4), last=True)
assert receiver.wait(20) == sender.wait(20) == pd_fsm.Phase.SUCCESS
"""


@pytest.mark.parametrize("end", ["prefill.close(); decode.close()", "raise SystemExit(3)"], ids=["closed", "left open"])
def test_a_process_that_used_it_ends_in_time_with_its_own_status(end: str) -> None:
    """The wheel's libraries crash a process at its very end where the system's libibverbs is installed, too; not ours."""
    done = subprocess.run([sys.executable, "-c", SCRIPT + end], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == (3 if "SystemExit" in end else 0), done.stderr


# --- what is held against the library ------------------------------------------------------------------------------------------


def test_the_librarys_exceptions_are_all_known() -> None:
    """A new kind of error must be looked at: it may prove something, or nothing."""
    library = nixl_agent.load_library()
    assert {key for key in dir(library) if key.startswith("nixl") and key.endswith("Error")} == {
        "nixlBackendError",
        "nixlCancelledError",
        "nixlInvalidParamError",
        "nixlMismatchError",
        "nixlNoTelemetryError",
        "nixlNotAllowedError",
        "nixlNotFoundError",
        "nixlNotPostedError",
        "nixlNotSupportedError",
        "nixlRemoteDisconnectError",
        "nixlRepostActiveError",
        "nixlUnknownError",
    }
