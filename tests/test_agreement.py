"""Ranks that must act alike: the same decisions in the same order on all of them, whatever each one sees and when.

Rooms are stand-ins with a phase that the test sets, so that a schedule is exact; `test_real_processes_over_gloo` has real sessions,
in processes that meet over `torch.distributed` (this file, run as a module, is one of them).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from numpy.typing import NDArray

import pd_fsm
from pd_fsm import Failure, Phase
from pd_fsm.errors import ConfigError, LocalProtocolError
from pd_fsm.runtime import agreement
from pd_fsm.runtime.agreement import Decision, RankAgreement, torch_gather
from pd_fsm.transports.fake import Script

ROOT = Path(__file__).parent.parent
ENDS = (Phase.SUCCESS, Phase.FAILED)
B, W, T, S, F = Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING, Phase.SUCCESS, Phase.FAILED


@attrs.define(eq=False, slots=False)
class Room:
    """A handle, as far as an agreement looks at it."""

    room: int
    phase: Phase = B
    failure: Failure | None = None
    aborts: list[str] = attrs.field(factory=list)

    def poll(self) -> int:
        return self.phase

    def fail(self, cause: str, reason: str) -> None:
        if self.phase not in ENDS:
            self.phase, self.failure = F, Failure(cause, reason)

    def abort(self, reason: str) -> None:
        self.aborts.append(reason)
        self.fail("abort", reason)


class Poller:
    def poll_many(self, handles: Sequence[Room]) -> NDArray[np.int8]:
        return np.array([handle.poll() for handle in handles], dtype=np.int8)


@attrs.define(eq=False)
class Group:
    """Several ranks and a collective that is a plain function."""

    ranks: list[RankAgreement]
    blocks: list[NDArray[np.uint8]] = attrs.field(factory=list)

    @classmethod
    def of(cls, ranks: int, rows_max: int = 128) -> Group:
        return cls([make_rank(rank, ranks, rows_max=rows_max) for rank in range(ranks)])

    def watch(self, room: int, phase: Phase = B, but: Sequence[int] = ()) -> list[Room]:
        rooms = [Room(room, phase) for _ in self.ranks]
        for rank, handle in enumerate(rooms):
            if rank not in but:
                assert self.ranks[rank].watch(handle) is None  # type: ignore[arg-type]
        return rooms

    def tick(self) -> list[Decision]:
        """All ranks decide from the same bytes; the decisions, which are the same."""
        self.blocks = [rank.block() for rank in self.ranks]
        decided = [rank.apply(np.stack(self.blocks)) for rank in self.ranks]
        assert all(other == decided[0] for other in decided)
        return decided[0]

    def phases(self) -> list[tuple[int, Phase]]:
        return [(made.room, made.phase) for made in self.tick()]

    def empty(self) -> None:
        for rank in self.ranks:
            assert [rank._watched, rank._refused, rank._table, rank._owed, rank._owed_count] == [{}, {}, {}, {}, 0]


def make_rank(rank: int, ranks: int, gather: Any = None, **settings: Any) -> RankAgreement:
    session: Any = Poller()
    return RankAgreement(session, gather, rank, ranks, **settings)


# --- what is decided ---------------------------------------------------------------------------------------------------------


def test_ready_is_the_intersection() -> None:
    group = Group.of(3)
    rooms = group.watch(7)
    for rank, room in enumerate(rooms):
        assert group.phases() == [], f"{rank} of 3 ranks are ready"
        room.phase = W
    assert group.phases() == [(7, W)]
    assert group.phases() == [], "a decision is made once"
    rooms[0].phase = rooms[1].phase = S
    rooms[2].phase = T
    assert group.phases() == [(7, T)]
    rooms[2].phase = S
    assert group.phases() == [(7, S)]
    assert not any(room.aborts for room in rooms)
    group.empty()


def test_failed_is_the_union_with_the_reason_of_the_lowest_rank() -> None:
    group = Group.of(3)
    rooms = group.watch(7, T)
    rooms[2].fail("timeout", "too late")
    rooms[1].fail("peer_lost", "P is lost: it was silent for 10000 ms")
    failure = Failure("peer_lost", "P is lost: it was silent for 10000 ms")
    assert group.tick() == [Decision(7, F, failure, rank=1)]
    assert rooms[0].failure == Failure("abort", "rank 1 failed (peer_lost): P is lost: it was silent for 10000 ms")
    assert rooms[2].failure == Failure("timeout", "too late"), "its own first failure stands"
    assert group.phases() == []
    group.empty()


def test_a_rank_that_has_succeeded_fails_with_the_others() -> None:
    group = Group.of(2)
    rooms = group.watch(7, T)
    rooms[0].phase = S
    assert group.phases() == [(7, T)]
    rooms[1].fail("transport", "broke")
    assert group.phases() == [(7, F)]
    assert rooms[0].phase is S, "its room keeps its verdict; what is done about the request is the decision"
    group.empty()


def test_rooms_that_moved_far_within_a_turn_skip_phases() -> None:
    group = Group.of(2)
    group.watch(1, S)
    assert group.phases() == [(1, S)]
    group.empty()


def test_an_abort_between_decision_and_application_waits_for_the_next_round() -> None:
    """Each stage admits what was decided, not what it sees when it comes to it."""
    group = Group.of(2)
    rooms = group.watch(1, W)
    admitted: list[list[int]] = [[], []]
    failed: list[list[int]] = [[], []]
    for turn in range(2):
        gathered = np.stack([rank.block() for rank in group.ranks])
        for stage, rank in enumerate(group.ranks):
            for decision in rank.apply(gathered):
                (admitted if decision.phase is W else failed)[stage].append(turn)
            if turn == 0 and stage == 0:  # the first stage has applied, the second one not yet
                for room in rooms:
                    room.abort("client left")
    assert admitted == [[0], [0]]
    assert failed == [[1], [1]]
    group.empty()


def test_two_watched_rooms_are_two() -> None:
    group = Group.of(2)
    rooms = [group.watch(number, W) for number in (5, 3)]
    assert group.phases() == [(5, W), (3, W)], "in the order in which the first rank has them"
    rooms[0][1].fail("timeout", "x")
    assert group.phases() == [(5, F)]
    rooms[1][0].phase = rooms[1][1].phase = S
    assert group.phases() == [(3, S)]
    group.empty()


# --- ranks that see the request at different times ---------------------------------------------------------------------------


def test_a_rank_that_opens_later_is_waited_for() -> None:
    group = Group.of(3)
    rooms = group.watch(7, W, but=[1])
    assert group.phases() == []
    assert group.ranks[1].watch(rooms[1]) is None  # type: ignore[arg-type]
    assert group.phases() == [(7, W)]


def test_a_room_that_failed_before_it_was_opened_here_fails_when_it_is() -> None:
    group = Group.of(3)
    rooms = group.watch(7, W, but=[1])
    rooms[0].fail("timeout", "too late")
    assert group.phases() == [(7, F)]
    assert rooms[2].aborts == ["rank 0 failed (timeout): too late"]
    late = Room(7)
    assert group.ranks[1].watch(late) == Decision(7, F, Failure("timeout", "too late"), rank=0)  # type: ignore[arg-type]
    assert late.aborts == ["rank 0 failed (timeout): too late"]
    group.empty()
    group.watch(7, W)
    assert group.phases() == [(7, W)], "the next life of the number is whole again"


def test_a_rank_that_is_two_lives_behind_settles_both() -> None:
    group = Group.of(2)
    for life in ("first", "second"):
        room = Room(7)
        assert group.ranks[0].watch(room) is None  # type: ignore[arg-type]
        room.fail("timeout", life)
        assert group.phases() == [(7, F)]
    learned = [group.ranks[1].watch(Room(7)) for _ in range(2)]  # type: ignore[arg-type]
    assert [decision and decision.failure and decision.failure.reason for decision in learned] == ["first", "second"]
    group.watch(7, W)
    assert group.phases() == [(7, W)]


def test_a_rank_that_refuses_fails_the_room_on_all() -> None:
    group = Group.of(3)
    rooms = group.watch(7, T, but=[1])
    assert group.ranks[1].refuse(7, "rooms_max is reached") is None
    assert group.tick() == [Decision(7, F, Failure("abort", "rooms_max is reached"), rank=1)]
    assert rooms[0].aborts == rooms[2].aborts == ["rank 1 failed (abort): rooms_max is reached"]
    group.empty()
    # all of them refuse, at different times: one decision, and nobody is owed anything in the end
    group.ranks[0].refuse(7, "left the queue")
    assert [made.rank for made in group.tick()] == [0]
    for rank in (2, 1):
        learned = group.ranks[rank].refuse(7, "left the queue")
        assert learned is not None
        assert learned.rank == 0
    group.empty()


def test_a_request_that_comes_twice_is_refused_and_the_first_is_unharmed() -> None:
    group = Group.of(2)
    rooms = group.watch(7, W)
    for rank in group.ranks:
        with pytest.raises(LocalProtocolError, match="room 7 is taken already"):
            rank.watch(Room(7))  # type: ignore[arg-type]
        with pytest.raises(LocalProtocolError, match="room 7 is taken already"):
            rank.refuse(7, "twice")
    assert group.phases() == [(7, W)]
    rooms[0].phase = rooms[1].phase = S
    assert group.phases() == [(7, S)]
    group.ranks[0].refuse(8, "no")
    with pytest.raises(LocalProtocolError, match="room 8 is taken already"):
        group.ranks[0].watch(Room(8))  # type: ignore[arg-type]


def test_what_is_owed_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "OWED_MAX", 3)
    group = Group.of(2)
    for number in range(5):
        group.ranks[0].refuse(number, f"room {number}")
    assert len(group.tick()) == 5
    assert sorted(group.ranks[1]._owed) == [2, 3, 4], "the oldest go first"
    assert group.ranks[1]._owed_count == 3
    assert not group.ranks[0]._owed


# --- the shape of the collective ---------------------------------------------------------------------------------------------


def test_every_block_has_the_same_shape() -> None:
    group = Group.of(3, rows_max=4)
    sizes = set()
    for turn in range(20):
        for rank in range(3):
            for number in range(turn % (rank + 2)):
                room = Room(100 * turn + 10 * rank + number, W)
                assert group.ranks[rank].watch(room) is None  # type: ignore[arg-type]
        group.tick()
        sizes |= {(block.shape, block.dtype.name) for block in group.blocks}
    assert sizes == {((4 * agreement._ROW.size,), "uint8")}


def test_more_changes_than_rows_wait_and_none_is_lost() -> None:
    group = Group.of(3, rows_max=4)
    rooms = [group.watch(number, W) for number in range(30)]
    decided = [group.phases() for _ in range(8)]
    assert decided == [[(number, W) for number in range(first, min(first + 4, 30))] for first in range(0, 32, 4)], "oldest first"
    assert group.phases() == []
    for number, ranks in enumerate(rooms):
        if number % 3 == 0:
            ranks[number % 2].fail("timeout", str(number))
        else:
            for room in ranks:
                room.phase = S
    ends: Counter[tuple[int, Phase]] = Counter()
    for _ in range(20):
        ends.update(group.phases())
    assert ends == {(number, F if number % 3 == 0 else S): 1 for number in range(30)}
    group.empty()


def test_refusals_are_bounded_by_the_rows_as_well() -> None:
    group = Group.of(2, rows_max=4)
    for number in range(10):
        group.ranks[1].refuse(number, "no")
    watched = [Room(number) for number in range(10)]
    for room in watched:
        assert group.ranks[0].watch(room) is None  # type: ignore[arg-type]
    assert [len(group.tick()) for _ in range(4)] == [4, 4, 2, 0]
    assert all(room.phase is F for room in watched)
    group.empty()


def test_a_collective_of_another_shape_is_refused() -> None:
    rank = make_rank(0, 2, lambda block: np.stack([block]), rows_max=4)
    with pytest.raises(ConfigError, match=r"do all ranks have the same rows_max"):
        rank.tick()
    for rank_number, ranks, rows_max in ((2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ConfigError, match="is no group"):
            make_rank(rank_number, ranks, rows_max=rows_max)


def test_reasons_travel_cut_and_never_break_a_row() -> None:
    group = Group.of(2)
    rooms = {number: group.watch(number) for number in range(4)}
    reasons = ["x" * 500, "\u00e9" * 100, "a\udc80b", "nul\0inside"]
    for number, reason in enumerate(reasons):
        rooms[number][0].fail("transport", reason)
    said = [made.failure.reason for made in group.tick() if made.failure]
    assert said == ["x" * 96, "\u00e9" * 48, "a?b", "nul\0inside"]


# --- errors are data ---------------------------------------------------------------------------------------------------------


def test_a_rank_that_cannot_poll_fails_the_room_on_all(caplog: pytest.LogCaptureFixture) -> None:
    group = Group.of(3)
    doomed, other = group.watch(1, W), group.watch(2, W)

    def raising() -> int:
        raise RuntimeError("no such slot")

    doomed[2].poll = raising  # type: ignore[method-assign]
    failure = Failure("abort", "rank 2 cannot poll it: RuntimeError('no such slot')")
    assert group.tick() == [Decision(1, F, failure, rank=2), Decision(2, W)]
    assert [room.phase for room in doomed[:2]] == [F, F]
    for room in other:
        room.phase = S
    assert group.phases() == [(2, S)], "no rank has left the round"
    assert "no such slot" in caplog.text
    group.empty()


def test_a_rank_that_cannot_abort_stays_in_step(caplog: pytest.LogCaptureFixture) -> None:
    group = Group.of(2)
    doomed, other = group.watch(1, W), group.watch(2, T)

    def raising(_: str) -> None:
        raise RuntimeError("the session is gone")

    doomed[0].abort = raising  # type: ignore[assignment, method-assign]
    doomed[1].fail("timeout", "x")
    other[1].fail("timeout", "y")
    assert group.phases() == [(1, F), (2, F)]
    assert other[0].phase is F
    assert "the session is gone" in caplog.text
    group.empty()


# --- random schedules --------------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Request:
    """One life of a room number, as every rank gets it."""

    number: int
    life: int
    verdict: Decision | None = None


@attrs.define(eq=False)
class Side:
    """One rank's engine: what it has not taken yet, and what it has open."""

    queue: list[Request]
    open: dict[int, tuple[Request, Room]] = attrs.field(factory=dict)
    refused: dict[int, Request] = attrs.field(factory=dict)
    settled: Counter[int] = attrs.field(factory=Counter)  # lives of a number that are over here
    verdicts: dict[tuple[int, int], Decision] = attrs.field(factory=dict)


@attrs.define(eq=False)
class Schedule:
    """Everything that may happen to a group, by dice."""

    dice: random.Random
    group: Group = attrs.field(init=False)
    sides: list[Side] = attrs.field(init=False)
    decided: dict[int, list[Decision]] = attrs.field(factory=lambda: defaultdict(list))  # ends, by number
    reached: dict[tuple[int, int], dict[int, Phase]] = attrs.field(factory=lambda: defaultdict(dict))  # by life, rank
    failed: dict[tuple[int, int], set[int]] = attrs.field(factory=lambda: defaultdict(set))
    story: list[Decision] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        ranks = self.dice.choice([2, 3, 4])
        self.group = Group.of(ranks, rows_max=self.dice.choice([1, 2, 5, 64]))
        requests = [Request(number, life) for number in range(self.dice.randint(1, 6)) for life in range(self.dice.randint(1, 4))]
        self.sides = []
        for _ in range(ranks):
            mine = requests.copy()
            self.dice.shuffle(mine)  # each rank sees them in an order of its own, lives of a number in theirs
            lives: Counter[int] = Counter()
            queue: list[Request] = []
            for request in mine:
                queue.append(next(r for r in requests if (r.number, r.life) == (request.number, lives[request.number])))
                lives[request.number] += 1
            self.sides.append(Side(queue))

    def take(self, rank: int) -> None:
        """The rank's engine takes the first request whose number is not in use here."""
        side = self.sides[rank]
        request = next((known for known in side.queue if side.settled[known.number] == known.life), None)
        if request is None:
            return
        side.queue.remove(request)
        if self.dice.random() < 0.15:
            learned = self.group.ranks[rank].refuse(request.number, f"refused by {rank}")
            if learned is None:
                side.refused[request.number] = request
                self.failed[request.number, request.life].add(rank)
        else:
            room = Room(request.number)
            learned = self.group.ranks[rank].watch(room)  # type: ignore[arg-type]
            if learned is None:
                side.open[request.number] = request, room
            else:
                assert room.phase is F
            if learned is None and self.dice.random() < 0.2:  # the request comes twice
                with pytest.raises(LocalProtocolError):
                    self.group.ranks[rank].watch(Room(request.number))  # type: ignore[arg-type]
        if learned is not None:
            self.settle(side, request, learned)

    def settle(self, side: Side, request: Request, decision: Decision) -> None:
        key = request.number, request.life
        assert key not in side.verdicts, "one verdict for each life"
        side.verdicts[key] = decision
        side.settled[request.number] += 1

    def move(self, rank: int) -> None:
        for request, room in self.sides[rank].open.values():
            if room.phase in ENDS or self.dice.random() < 0.4:
                continue
            if self.dice.random() < 0.12:
                room.fail(self.dice.choice(["abort", "timeout", "peer_lost"]), f"on {rank}")
                self.failed[request.number, request.life].add(rank)
            else:
                room.phase = self.reached[request.number, request.life][rank] = Phase(room.phase + 1)

    def tick(self) -> None:
        for decision in self.group.tick():
            self.story.append(decision)
            life = len(self.decided[decision.room])
            reached = self.reached[decision.room, life]
            if decision.phase is F:
                assert decision.failure is not None
                assert decision.rank in self.failed[decision.room, life], "that rank failed"
                assert decision.failure.reason in (f"on {decision.rank}", f"refused by {decision.rank}")
            else:
                assert len(reached) == len(self.sides)
                assert min(reached.values()) >= decision.phase, "all ranks had come so far"
            if decision.phase not in ENDS:
                continue
            self.decided[decision.room].append(decision)
            for side in self.sides:
                request = side.refused.pop(decision.room, None)
                if request is None and decision.room in side.open:
                    request, room = side.open.pop(decision.room)
                    assert room.phase in ENDS
                if request is not None:
                    assert request.life == life
                    self.settle(side, request, decision)

    def run(self) -> None:
        for turn in range(400):
            for rank in range(len(self.sides)):
                if self.dice.random() < 0.7 or turn > 100:
                    self.take(rank)
                self.move(rank)
            self.tick()
            if turn > 5 and not any(side.queue or side.open or side.refused for side in self.sides):
                break
        for side in self.sides:
            assert [len(side.queue), side.open, side.refused] == [0, {}, {}], "every request has an end"
            for (number, life), verdict in side.verdicts.items():
                assert verdict == self.decided[number][life], "and the same on every rank, however it learned of it"
        self.group.empty()


@pytest.mark.parametrize("block", range(8))
def test_random_schedules(block: int) -> None:
    """Skewed, reordered and repeated requests, failures anywhere: one story for all ranks."""
    seen: Counter[str] = Counter()
    for seed in range(block * 25, block * 25 + 25):
        schedule = Schedule(random.Random(seed))
        schedule.run()
        seen.update(made.phase.name for made in schedule.story)
        seen["learned late"] += sum(
            verdict is not schedule.decided[number][life] and verdict.phase is F
            for side in schedule.sides
            for (number, life), verdict in side.verdicts.items()
        )
    assert min(seen[what] for what in ("WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS", "FAILED", "learned late")) > 5, seen


# --- collectives that wait for each other ------------------------------------------------------------------------------------


def test_ranks_on_threads_with_unequal_queues_do_not_wait_for_ever() -> None:
    """`tick` itself, with a collective at which every rank has to appear."""
    ranks = 3
    meeting = threading.Barrier(ranks, timeout=10)
    blocks: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)] * ranks
    stories: list[list[Decision]] = [[] for _ in range(ranks)]

    def run(rank: int) -> None:
        def gather(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
            blocks[rank] = block
            meeting.wait()
            everybody = np.stack(blocks)
            meeting.wait()
            return everybody

        mine = make_rank(rank, ranks, gather, rows_max=2)
        dice = random.Random(rank)
        for turn in range(60):
            for number in range(5):
                if turn == 3 * number + 4 * rank:  # each request reaches each rank in another turn
                    mine.watch(Room(number, W if number != 3 or rank != 1 else B))  # type: ignore[arg-type]
            for watched in list(mine._watched.values()):
                room: Any = watched.handle
                if room.room == 3 and rank == 1 and turn > 30:
                    room.fail("timeout", "never ready")
                elif room.phase is not B and dice.random() < 0.3:
                    room.phase = S
            stories[rank] += mine.tick()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert stories[0] == stories[1] == stories[2]
    ends = {made.room: made.phase for made in stories[0] if made.phase in ENDS}
    assert ends == {0: S, 1: S, 2: S, 3: F, 4: S}


# --- real processes ----------------------------------------------------------------------------------------------------------

RANKS = 3
GROUP_S = 60.0  # torch alone takes seconds to import on a busy machine


@pytest.mark.parametrize("scheme", ["file", "tcp"])
def test_real_processes_over_gloo(scheme: str, tmp_path: Path) -> None:
    """Real sessions, each with its own timing: room 1 succeeds, rank 1 fails room 2, the last rank hears of room 3 too late."""
    address = f"file://{tmp_path / 'meet'}"
    if scheme == "tcp":
        import socket

        # Below the range from which connections take their ports: one of those could take it before rank 0 listens there.
        for port in random.sample(range(20_000, 32_000), 100):
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                address = f"tcp://127.0.0.1:{port}"
                break
    ranks = RANKS if scheme == "file" else 2
    command = [sys.executable, "-m", "tests.test_agreement", address, str(ranks)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=GROUP_S) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    assert [process.returncode for process in processes] == [0] * ranks, [error for _, error in said]
    stories = [json.loads(output.splitlines()[-1]) for output, _ in said]
    for story in stories:
        assert story["decided"] == stories[0]["decided"]
    ends = {room: phase for room, phase, *_ in stories[0]["decided"] if phase in ("SUCCESS", "FAILED")}
    assert ends == {1: "SUCCESS", 2: "FAILED", 3: "FAILED"}
    reasons = {room: reason for room, _, _, reason in stories[0]["decided"] if reason}
    assert reasons[2] == "rank 1's peer broke"
    assert reasons[3] == "client left"
    assert [story["learned"] for story in stories] == [[] if rank < ranks - 1 else ["client left"] for rank in range(ranks)]
    for rank, story in enumerate(stories):
        assert story["phases"]["2"] == story["phases"]["3"] == "FAILED", f"rank {rank}"


def rank_process(address: str, ranks: int, rank: int) -> dict[str, Any]:
    """One rank: its sessions' rooms become ready at another time than the others'."""
    import datetime as dt

    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks, timeout=dt.timedelta(seconds=GROUP_S / 2))
    layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((8, 16), np.uint8)], 4)])
    broken = Script(delay_ms=10, end="fail", at=Phase.TRANSFERRING, reason="rank 1's peer broke")

    def script(room: int) -> Script:
        if room == 2 and rank == 1:
            return broken
        return Script(delay_ms=15.0 * (rank + 1) if room == 1 else 10_000.0)

    story: dict[str, Any] = {"decided": [], "learned": [], "phases": {}}
    with pd_fsm.open_session("decode", layout, transport="fake", transport_options={"script": script}, name=f"d{rank}") as session:
        mine = RankAgreement(session, torch_gather(), rank, ranks, rows_max=8)
        handles = {room: session.receive(room, [room]) for room in (1, 2, 3) if room != 3 or rank < ranks - 1}
        for handle in handles.values():
            assert mine.watch(handle) is None
        if rank == 0:
            handles[3].abort("client left")
        open_rooms = {1, 2, 3}
        while open_rooms:
            for made in mine.tick():
                failure = made.failure
                story["decided"].append([made.room, made.phase.name, made.rank, failure.reason.split(": ")[-1] if failure else ""])
                if made.phase in ENDS:
                    open_rooms.discard(made.room)
            if 3 not in open_rooms and 3 not in handles:  # the request reaches this rank now
                handles[3] = session.receive(3, [3])
                learned = mine.watch(handles[3])
                story["learned"] = [learned.failure.reason] if learned and learned.failure else []
            time.sleep(0.002)  # a turn of the engine
        story["phases"] = {room: handle.phase.name for room, handle in handles.items()}
    dist.destroy_process_group()
    return story


if __name__ == "__main__":
    print(json.dumps(rank_process(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))  # noqa: T201 - read by the test
