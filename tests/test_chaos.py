"""The chaos run itself: a short one goes well, its proxy does what it says, and its checks see what they are for."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest

import pd_fsm
from pd_fsm.testing import chaos
from pd_fsm.testing.chaos_child import ChaosError
from pd_fsm.testing.chaos_faults import FAULTS, Fault
from pd_fsm.testing.chaos_proxy import Proxy
from pd_fsm.testing.chaos_scene import GROUPS, SIDES, Scene
from pd_fsm.testing.chaos_worker import Engine, Life, Pool, aux_pattern, pages_of, pattern
from tests.live import until

QUICK_S = 100.0  # it should take less than 30; the machine may be busy
ROOMS = range(100, 112)
FAULT = Fault("none", lambda scene: None)


def running(mark: str) -> list[str]:
    """Processes whose command line contains `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


# --- the run -----------------------------------------------------------------------------------------------------------------


def test_a_quick_run_goes_well_and_leaves_no_process_behind(tmp_path: Path) -> None:
    path = tmp_path / "chaos.json"
    command = [sys.executable, "-m", "pd_fsm.testing.chaos", "--quick", "--seed", "5", "--report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=QUICK_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    quick = [fault.name for fault in FAULTS if fault.quick]
    assert report["faults"] == len(quick) >= 5
    assert [result["fault"] for result in report["results"]] == quick
    assert (report["lost_without_reason"], report["pages_leaked"], report["late_writes"], report["violations"]) == (0, 0, 0, 0)
    assert report["probe_ok"] is True
    assert report["seed"] == 5
    assert report["rooms"] == sum(result["rooms"] for result in report["results"]) >= len(quick) * 3 * len(GROUPS)
    outcomes = {result["fault"]: result["outcomes"] for result in report["results"]}
    assert outcomes["kill-prefill"]["killed"] >= 3 * 5
    assert outcomes["kill-prefill"]["peer_lost"] >= 3 * 4
    assert outcomes["reset-data"]["transport"] == outcomes["reset-data"]["peer_failed"] >= 3
    assert outcomes["bootstrap-garbage"].keys() == {"SUCCESS"}
    assert not running(str(tmp_path))


def test_a_fault_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert chaos.main(["--only", "no-such-fault"]) == 2
    assert "kill-prefill" in capsys.readouterr().err


def test_every_expectation_names_a_side_and_a_group() -> None:
    for fault in FAULTS:
        for name in fault.expect:
            side, _, group = name.partition(".")
            assert side in SIDES
            assert group in GROUPS


def test_a_scene_ends_its_processes_whatever_happens(tmp_path: Path) -> None:
    def fail_on_stage() -> None:
        with Scene(tmp_path, "1", {}) as scene:
            assert len(running(str(tmp_path))) == 3
            scene.stop("decode")
            scene.until(lambda: False, "pigs fly", timeout_s=0.1)

    with pytest.raises(ChaosError, match="pigs fly"):
        fail_on_stage()
    assert not running(str(tmp_path))


def test_processes_end_also_stopped_ones_when_the_run_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from pd_fsm.testing.chaos_scene import Scene
with Scene(Path({str(tmp_path)!r}), "1", {{}}) as scene:
    scene.stop("decode")
    print("there", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "there\n"
        assert len(running(str(tmp_path))) == 4
        run.kill()
    until(lambda: not running(str(tmp_path)), "they ended")


def test_a_fault_that_does_not_go_as_planned_is_reported_with_what_was_seen(tmp_path: Path) -> None:
    def inject(scene: Scene) -> None:
        scene.stop("decode")
        raise ChaosError("it came otherwise")

    result = chaos.run_fault(Fault("odd", inject), 1, tmp_path)
    assert "it came otherwise" in result.violations
    assert not result.probe_ok
    assert result.outcomes["SUCCESS"] >= 2 * 3, "those that were done before"
    assert result.lost_without_reason == result.outcomes["none"] >= 3 * 5
    assert not result.ok
    assert not running(str(tmp_path))


# --- the checks --------------------------------------------------------------------------------------------------------------


class LateWriter(Engine):
    """Writes one byte to a page that it has given back, as an adapter would that does not look at the grant."""

    def release(self, life: Life) -> None:
        super().release(life)
        if life.room == ROOMS[3]:
            self.kv[1][life.pages[-1], 5] ^= 1


class EarlyReleaser(Engine):
    """Gives pages back while their writer may still write to them."""

    def tick(self) -> None:
        for life in self.lives:
            if not life.free and life.pages:
                self.release(life)
                life.outcome = "abort: nobody waits for it"
        super().tick()


class Forgetter(Engine):
    """Loses a room."""

    def report(self) -> dict[str, Any]:
        report = super().report()
        del report["lives"][0]
        return report


class Silencer(Engine):
    """Does not say why rooms fail."""

    def concluded(self, life: Life) -> None:
        super().concluded(life)
        life.outcome = "peer_lost: "


class Keeper(Engine):
    """Never takes a page back."""

    def release(self, life: Life) -> None:
        life.free = True


class Scrambler(Engine):
    """Computes one wrong byte."""

    def send(self, rooms: Sequence[int], *, half: bool = False) -> None:
        self.kv[0][self.of_room[rooms[0]].pages[0], 0] ^= 1
        super().send(rooms, half=half)


class Hoarder(Engine):
    """Does not clear its rooms."""

    def clear(self) -> None:
        return

    def concluded(self, life: Life) -> None:
        life.clear_at_once = False
        super().concluded(life)


@attrs.define(eq=False)
class Pair:
    """A prefill and a decode engine of this process, over ZeroMQ on loopback."""

    prefill: Engine
    decode: Engine

    def hand_over(self, rooms: Sequence[int]) -> None:
        for engine in (self.prefill, self.decode):
            engine.open(rooms)
        self.prefill.send(rooms)
        self.tick_until(lambda: all(life.free for engine in (self.prefill, self.decode) for life in engine.lives))
        for engine in (self.prefill, self.decode):
            engine.clear()
        self.tick_until(lambda: not self.prefill.session.describe()["links"])

    def tick_until(self, done: Callable[[], bool]) -> None:
        def turn() -> bool:
            self.prefill.tick()
            self.decode.tick()
            return done()

        until(turn, "the rooms are over")

    def judge(self, tmp_path: Path, rooms: Sequence[int]) -> chaos.Result:
        """What the run's own judgement says of these two."""
        scene = Scene(tmp_path, "1", {})
        scene.groups = {"probe": list(rooms)}
        scene.opened = {"prefill": list(rooms), "decode": list(rooms)}
        scene.meet("prefill", self.prefill.session.incarnation.hex())
        scene.meet("decode", self.decode.session.incarnation.hex())
        result = chaos.Result("none", "1", probe_ok=True)
        chaos.judge(FAULT, scene, [self.prefill.report(), self.decode.report()], result)
        return result


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """`request.param`: the classes of the two engines."""
    registry = pd_fsm.LocalRendezvous()
    with contextlib.ExitStack() as sessions:
        engines = []
        for role, kind in zip(SIDES, getattr(request, "param", (Engine, Engine)), strict=True):
            engine = kind(role, role)
            engine.session = sessions.enter_context(
                pd_fsm.open_session(role, engine.layout, rendezvous=registry.client(), name=f"{role}-0")
            )
            engines.append(engine)
        yield Pair(*engines)


def test_engines_that_do_all_right_are_found_right(pair: Pair, tmp_path: Path) -> None:
    pair.hand_over(ROOMS)
    result = pair.judge(tmp_path, ROOMS)
    assert result.ok, result.violations
    assert result.outcomes == {"SUCCESS": 2 * len(ROOMS)}
    assert chaos.passed(chaos.summary([result], 1))


@pytest.mark.parametrize(
    ("pair", "found"),
    [
        ((Engine, LateWriter), {"late_writes": 1}),
        ((Engine, Forgetter), {"lost_without_reason": 1}),
        ((Forgetter, Engine), {"lost_without_reason": 1}),
        ((Engine, Silencer), {"lost_without_reason": len(ROOMS)}),
        ((Engine, Keeper), {"pages_leaked": sum(pages_of(room) + 1 for room in ROOMS)}),
        ((Keeper, Engine), {"pages_leaked": sum(pages_of(room) + 1 for room in ROOMS)}),
        ((Scrambler, Engine), {}),
        ((Engine, Hoarder), {}),
    ],
    indirect=["pair"],
    ids=["late-write", "lost-by-decode", "lost-by-prefill", "no-reason", "leak-decode", "leak-prefill", "bytes", "not-cleared"],
)
def test_a_doctored_engine_is_found(pair: Pair, found: dict[str, int], tmp_path: Path) -> None:
    pair.hand_over(ROOMS)
    result = pair.judge(tmp_path, ROOMS)
    assert {name: getattr(result, name) for name in found} == found
    assert not result.ok
    assert not chaos.passed(chaos.summary([result], 1))


@pytest.mark.parametrize("pair", [(Scrambler, Engine)], indirect=True)
def test_wrong_bytes_are_told_by_room(pair: Pair, tmp_path: Path) -> None:
    pair.hand_over(ROOMS)
    assert pair.judge(tmp_path, ROOMS).violations == [f"room {ROOMS[0]} succeeded with wrong bytes"]


@pytest.mark.parametrize("pair", [(Engine, EarlyReleaser)], indirect=True)
def test_pages_that_are_released_too_early_are_found_by_what_lands_in_them(pair: Pair) -> None:
    """No doctored byte here: prefill's own write lands in pages that decode believes to be free."""
    pair.prefill.open(ROOMS)
    pair.decode.open(ROOMS)
    pair.decode.tick()
    pair.prefill.send(ROOMS)
    until(lambda: all(life.handle.phase is pd_fsm.Phase.SUCCESS for life in pair.decode.lives), "the bytes landed")
    assert pair.decode.report()["late_writes"] == sum(pages_of(room) + 1 for room in ROOMS)


def test_a_written_free_item_is_counted_once_and_when_it_is_taken_again() -> None:
    memory = [np.zeros((8, 16), dtype=np.uint8), np.zeros((8, 32), dtype=np.uint8)]
    pool = Pool(memory, Engine("decode", "1").pages._choose)
    taken = pool.take(8)
    for buffer in memory:
        buffer[taken] = 0  # whoever owns them may write
    pool.give_back(taken)
    memory[1][3, 31] ^= 128
    pool.take(8)
    assert pool.late_writes == 1
    pool.give_back(range(8))
    pool.inspect()
    assert pool.late_writes == 1
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back([3])


def test_patterns_tell_rooms_layers_and_tokens_apart() -> None:
    seen = {pattern(room, layer)[page].tobytes() for room in (3, 4, 10) for layer in (0, 1) for page in range(2)}
    assert len(seen) == 3 * 2 * 2
    tokens = pattern(3, 0).reshape(-1, 256)
    assert len({token.tobytes() for token in tokens}) == len(tokens)
    assert (aux_pattern(3) != aux_pattern(4)).any()


def report(**changes: Any) -> dict[str, Any]:
    """Of a decode process that is at rest."""
    described = dict.fromkeys(chaos.TABLES, 0) | {"rooms": [], "leases": [], "counts": {}}
    described["peers"] = [{"state": "READY", "incarnation": "aa"}]
    life = {"room": 1, "generation": 7, "outcome": "SUCCESS", "bytes_ok": True, "held": 0}
    return {"role": "decode", "lives": [life], "items": 20, "items_free": 20, "late_writes": 0, "describe": described} | changes


def test_quarantined_pages_are_no_leak_as_long_as_they_are_shown() -> None:
    life = {"room": 1, "generation": 7, "outcome": "peer_lost: silent", "bytes_ok": None, "held": 6}
    shown = {"room": 1, "generation": 7, "state": "QUARANTINED", "holders": ["prefill-0"]}
    hidden = report(lives=[life], items_free=14)
    assert chaos.leaked_pages(hidden) == 6
    visible = report(lives=[life], items_free=14, describe={"leases": [shown]})
    assert (chaos.leaked_pages(visible), chaos.quarantined_pages(visible)) == (0, 6)
    for change in ({"state": "REVOKING"}, {"holders": []}, {"generation": 8}):
        assert chaos.leaked_pages(report(lives=[life], items_free=14, describe={"leases": [shown | change]})) == 6


@pytest.mark.parametrize("outcome", ["", "peer_lost", "peer_lost: ", "because: of the weather", "success"])
def test_a_room_without_a_cause_and_a_reason_is_lost(outcome: str) -> None:
    lives = [{"room": 1, "generation": 7, "outcome": outcome, "bytes_ok": None, "held": 0}]
    assert len(chaos.lost_rooms([1], report(lives=lives))) == 1
    assert chaos.lost_rooms([1], report()) == []
    assert len(chaos.lost_rooms([1, 1], report())) == 1, "opened twice, known once"


@pytest.mark.parametrize("table", chaos.TABLES)
def test_what_is_left_in_a_table_is_found(table: str) -> None:
    clean = report()
    assert chaos.left_over(clean, "aa") == []
    assert len(chaos.left_over(report(describe=clean["describe"] | {table: 1}), "aa")) == 1


@pytest.mark.parametrize("state", ["SUSPECT", "LOST", "CONNECTING"])
def test_a_peer_that_is_not_as_expected_is_found(state: str) -> None:
    described = report()["describe"]
    assert len(chaos.left_over(report(describe=described | {"peers": [{"state": state, "incarnation": "aa"}]}), "aa")) == 1
    assert len(chaos.left_over(report(), "bb")) == 1, "another life of it"
    assert len(chaos.left_over(report(describe=described | {"peers": []}), "aa")) == 1
    assert len(chaos.left_over(report(describe=described | {"counts": {"driver_error": 1}}), "aa")) == 1


def test_an_outcome_that_a_fault_does_not_explain_is_found() -> None:
    fault = Fault("none", lambda scene: None, {"decode.moving": "peer_lost: prefill-0 is lost"})
    life = {"room": 1, "generation": 7, "outcome": "peer_lost: prefill-0 is lost: dead", "bytes_ok": None, "held": 0}
    seen = report(lives=[life])
    assert chaos.unexpected(fault, {"moving": [1]}, [], seen) == []
    assert len(chaos.unexpected(fault, {"moving": [1]}, [1], seen)) == 1, "it was tried again, and should have succeeded"
    assert len(chaos.unexpected(fault, {"waiting": [1]}, [], seen)) == 1
    assert len(chaos.unexpected(fault, {"moving": [1]}, [], report())) == 1, "it should not have succeeded"


@pytest.mark.parametrize("change", [{"pages_leaked": 1}, {"late_writes": 1}, {"lost_without_reason": 1}, {"probe_ok": False}])
def test_the_run_passes_only_when_all_is_well(change: dict[str, Any]) -> None:
    good = chaos.Result("a", "1", rooms=3, probe_ok=True)
    assert chaos.passed(chaos.summary([good], 1))
    assert not chaos.passed(chaos.summary([good, attrs.evolve(good, **change)], 1))
    assert not chaos.passed(chaos.summary([attrs.evolve(good, violations=["odd"])], 1))
    assert not chaos.passed(chaos.summary([], 1))


# --- the proxy ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def line() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """A proxy with one connection through it: its near and its far end."""
    with Proxy() as proxy, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5.0)
        proxy.target(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        with socket.create_connection(("127.0.0.1", proxy.port), 5.0) as near:
            far, _ = server.accept()
            far.settimeout(5.0)
            with far:
                near.sendall(b"!")
                assert far.recv(9) == b"!"  # now both halves stand
                yield proxy, near, far


def silent(end: socket.socket) -> bool:
    """Nothing arrives for a moment."""
    end.settimeout(0.1)
    try:
        return end.recv(1, socket.MSG_PEEK) is None
    except TimeoutError:
        return True
    finally:
        end.settimeout(5.0)


def test_bytes_pass_both_ways(line: tuple[Proxy, socket.socket, socket.socket]) -> None:
    _, near, far = line
    near.sendall(b"up")
    assert far.recv(9) == b"up"
    far.sendall(b"down")
    assert near.recv(9) == b"down"
    far.close()
    assert near.recv(9) == b""


def test_a_reset_reaches_both_ends(line: tuple[Proxy, socket.socket, socket.socket]) -> None:
    proxy, near, far = line
    proxy.reset()
    for end in (near, far):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


@pytest.mark.parametrize("stalled", ["up", "down"])
def test_one_direction_stalls_and_resumes(line: tuple[Proxy, socket.socket, socket.socket], stalled: str) -> None:
    proxy, near, far = line
    sender, receiver = (near, far) if stalled == "up" else (far, near)
    proxy.stall(stalled)
    sender.sendall(b"held")
    receiver.sendall(b"passes")
    assert sender.recv(9) == b"passes"
    assert silent(receiver)
    proxy.resume()
    assert receiver.recv(9) == b"held"


def test_answers_are_delayed(line: tuple[Proxy, socket.socket, socket.socket]) -> None:
    proxy, near, far = line
    proxy.delay(0.2)
    began = time.monotonic()
    far.sendall(b"slow")
    assert near.recv(9) == b"slow"
    assert time.monotonic() - began >= 0.2


def test_lies_are_told_in_turn_to_new_connections() -> None:
    with Proxy() as proxy:
        proxy.lie([b"one", b"two"])
        for expected in (b"one", b"two", b"one"):
            with socket.create_connection(("127.0.0.1", proxy.port), 5.0) as client:
                client.sendall(b"GET")
                assert client.recv(9) == expected


def test_a_proxy_ends_with_connections_in_all_states() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as clients:
        with Proxy() as proxy:
            early = clients.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 5.0))  # there is no target yet
            early.sendall(b"x")
            proxy.target(f"127.0.0.1:{server.getsockname()[1]}")
            proxy.stall()
            clients.enter_context(socket.create_connection(("127.0.0.1", proxy.port), 5.0)).sendall(b"x")
        assert "chaos-proxy" not in {thread.name for thread in threading.enumerate()}
        for _ in range(2):  # whichever of them came so far
            server.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()
