"""Many rooms at once between two real sessions, each room with its own script, under faults. What it saw is checked at the end.

The engines are those of the chaos run: their free pages hold canaries, and what arrives is compared with what prefill computed.
Everything is drawn from one seed; real sockets and threads still make each run another one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

import pd_fsm
from pd_fsm import Phase
from pd_fsm.testing.chaos_worker import Engine
from pd_fsm.testing.conformance.faults import Faults, Faulty
from pd_fsm.testing.conformance.target import Target

ROOMS = 16
PATIENCE_S = 15.0
DEADLINES = pd_fsm.Deadlines(repeat_min_ms=10, repeat_max_ms=100)
CONCLUDED = (Phase.SUCCESS, Phase.FAILED)


@attrs.define(eq=False)
class Storm:
    """Two engines whose sessions the test drives, with faults in between. Use as a context manager."""

    target: Target
    directory: Path
    faults: Faults
    seed: str
    faulty: Faulty = attrs.field(init=False)
    prefill: Engine = attrs.field(init=False)
    decode: Engine = attrs.field(init=False)
    dice: random.Random = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.dice = random.Random(self.seed)
        self.faulty = Faulty(self.target.transport, self.faults, self.seed)
        meet = pd_fsm.LocalRendezvous()
        for role in ("prefill", "decode"):
            engine = Engine(role, self.seed)
            engine.session = pd_fsm.open_session(
                role,
                engine.layout,
                transport=self.faulty,
                rendezvous=meet.client(),
                name=f"{role}-0",
                deadlines=DEADLINES,
                thread=False,
                transport_options=self.target.options_for(role, self.directory),
            )
            setattr(self, role, engine)

    def __enter__(self) -> Storm:
        return self

    def __exit__(self, *_: object) -> None:
        for engine in (self.prefill, self.decode):
            engine.session.close(0.5)

    # --- driving -------------------------------------------------------------------------------------------------------------

    def step(self, *engines: Engine) -> bool:
        """One round of each session, or of those of `engines`, and one turn of each engine's loop."""
        worked = False
        for engine in engines or (self.prefill, self.decode):
            worked = engine.session.driver.progress(rounds_max=1) or worked
            engine.tick()
        self.route()
        return worked

    def route(self) -> None:
        """What a router does: what decode gave up before its offer arrived is ended at prefill, too, which nobody else tells."""
        for room, life in self.prefill.of_room.items():
            other = self.decode.of_room.get(room)
            if life.handle.poll() == Phase.BOOTSTRAPPING and other is not None and other.outcome.startswith("abort"):
                self.abort(self.prefill, room)

    def until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            assert time.monotonic() < deadline, f"waited {PATIENCE_S:g} s until {what}: {self.waiting()}"
            if not self.step():
                time.sleep(0.0005)

    def waiting(self) -> list[str]:
        """What has not ended, and why."""
        rooms = [
            f"{engine.role} room {room['room']}: {room['phase']}, {room['waits_for']}"
            for engine in (self.prefill, self.decode)
            for room in engine.session.describe()["rooms"]
        ]
        leases = [
            f"{engine.role} {lease}" for engine in (self.prefill, self.decode) for lease in engine.session.describe()["leases"]
        ]
        return (rooms + leases)[:6]

    # --- rooms ---------------------------------------------------------------------------------------------------------------

    def abort(self, engine: Engine, room: int) -> None:
        engine.of_room[room].handle.abort("as scripted")

    def script(self, room: int) -> list[Callable[[], None]]:
        """The steps of one room: opened on both sides in some order, sent in chunks, its pages early or late, aborted or not."""
        late = self.dice.random() < 0.3
        opens = [lambda: self.prefill.open([room]), lambda: self.decode.open([room], late=late)]
        self.dice.shuffle(opens)
        steps = [*opens, lambda: self.prefill.send([room], half=True), lambda: self.prefill.send([room])]
        if late:
            steps.insert(self.dice.randint(2, len(steps)), lambda: self.decode.grant([room]))
        if self.dice.random() < 0.5:
            engine = self.dice.choice((self.prefill, self.decode))
            steps.insert(self.dice.randint(2, len(steps)), lambda: self.abort(engine, room))
        return steps

    def run(self, rooms: int = ROOMS) -> None:
        """Run all scripts at once, wait until all concluded and all memory is back, and heal."""
        left = [self.script(room) for room in range(rooms)]
        while left:
            script = self.dice.choice(left)
            script.pop(0)()
            left = [each for each in left if each]
            for _ in range(self.dice.randint(0, 3)):
                self.step()
        self.until(lambda: all(life.free for life in self.lives()), "every room concluded and its memory is back")
        self.faulty.heal()

    def lives(self) -> list[Any]:
        return self.prefill.lives + self.decode.lives

    def finish(self) -> None:
        """A last room must succeed, nothing be owed, and no byte have changed that nobody may touch."""
        probe = 1_000_000
        self.prefill.open([probe])
        self.decode.open([probe])
        self.prefill.send([probe])
        self.until(lambda: all(life.free for life in self.lives()), "the last room ended")
        for engine in (self.prefill, self.decode):
            assert engine.of_room[probe].outcome == "SUCCESS", engine.of_room[probe].outcome
            engine.clear()
        tables = ("rooms", "ops", "links", "leases", "repeats", "early_offers")
        engines = (self.prefill, self.decode)
        self.until(
            lambda: not any(engine.session.describe()[table] for engine in engines for table in tables), "nobody owes anything"
        )
        for engine in engines:
            report = engine.report()
            wrong = [life["room"] for life in report["lives"] if life["outcome"] == "SUCCESS" and life["bytes_ok"] is False]
            assert not wrong, f"rooms {wrong} succeeded with bytes that prefill never computed"
            assert report["late_writes"] == 0, f"{report['late_writes']} free pages of {engine.role} were written to"
            assert report["items"] == report["items_free"], f"{engine.role} did not get all of its memory back"
            assert report["describe"]["counts"].get("driver_error", 0) == 0, (
                f"the driver of {engine.role} met an error; see its log"
            )
