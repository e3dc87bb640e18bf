"""The stage of one fault: a bootstrap server, a prefill and a decode process, with rooms in every phase, and what follows.

A scene starts its processes and ends each by its own pid, whatever happens. `stage` brings rooms into all phases, a fault of
`chaos_faults.py` does its harm, `finish` lets every room come to an end and hands over probe rooms. Nothing waits without a
deadline. Owned by one thread.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import attrs

from pd_fsm.testing.chaos_child import END_S, ChaosError, Child
from pd_fsm.testing.chaos_proxy import Proxy

PATIENCE_S = 15.0  # bounds a wait that should end much sooner
POLL_S = 0.01
LEASE_MS = 600
HTTP_TIMEOUT_MS = 400
ROOMS_A_GROUP = (3, 6)
RETRIES_MAX = 4
PROBES = 2
DEADLINES = {
    "bootstrap_ms": 30_000,
    "waiting_ms": 30_000,
    "transfer_ms": 30_000,
    "handshake_ms": 2_000,
    "heartbeat_ms": 100,
    "suspect_missed": 3,
    "lost_ms": 8_000,
    "repeat_min_ms": 20,
    "repeat_max_ms": 200,
    "early_offer_ms": 2_000,
    "tombstone_ms": 30_000,
}
SIDES = ("prefill", "decode")
PROXIED = {"control": "prefill", "data": "decode"}
"""Who is dialled for it, and so advertises the proxy's address as its own."""
GROUPS = {
    "asking": "open on decode only, which looks for them: BOOTSTRAPPING",
    "early": "open on prefill only: BOOTSTRAPPING",
    "parked": "open on decode only, offered to prefill: WAITING_FOR_INPUT",
    "waiting": "open on both sides: WAITING_FOR_INPUT",
    "late": "as waiting, computed by prefill, but decode has not reserved pages",
    "moving": "the first chunk arrived: TRANSFERRING",
    "done": "SUCCESS, not cleared yet",
    "flight": "handed to the data plane at the moment of the fault",
}
BOUND = ("waiting", "late", "moving", "flight")
"""Groups whose rooms both sides hold when the fault comes."""
Rooms: TypeAlias = dict[int, tuple[str, str, bool]]
"""room -> (phase, outcome, its memory is back)"""


@attrs.define(eq=False)
class Scene:
    """`proxied` is where a proxy stands in between: "control", "data", "bootstrap", or ""."""

    folder: Path
    seed: str
    deadlines: dict[str, int]
    proxied: str = ""
    rng: random.Random = attrs.field(init=False)
    groups: dict[str, list[int]] = attrs.field(factory=dict)
    opened: dict[str, list[int]] = attrs.field(factory=lambda: {"prefill": [], "decode": []})
    """What the present life of each side was told to open, a number once for each opening."""
    killed: int = 0
    """Rooms that were open in a process that was killed, each side counted on its own."""
    retried: list[int] = attrs.field(factory=list)
    notes: list[str] = attrs.field(factory=list)
    wrong: list[str] = attrs.field(factory=list)
    """What a fault saw that must not be."""
    _children: dict[str, Child] = attrs.field(factory=dict)
    _incarnations: dict[str, str] = attrs.field(factory=dict)
    _proxy: Proxy | None = None
    _port: int = 0
    _last_room: int = 0
    _in_flight_bytes_max: int = 0
    _exits: contextlib.ExitStack = attrs.field(factory=contextlib.ExitStack)

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self._last_room = self.rng.randrange(1 << 20)
        self._in_flight_bytes_max = self.rng.choice((16 << 10, 64 << 10, 1 << 20))  # a small one makes writes wait for others

    def __enter__(self) -> Scene:
        self.folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        try:
            if self.proxied:
                self._proxy = self._exits.enter_context(Proxy())
            for name in ("bootstrap", *SIDES):
                self.begin(name)
            for name in ("bootstrap", *SIDES):
                self.greet(name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for child in self._children.values():
            self._exits.callback(child.end, kill=True)
        self._children.clear()
        self._exits.close()  # every one of them, whatever another raises

    # --- processes -----------------------------------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """Start a process; `greet` waits until it is there."""
        port = self.proxy.port if self.proxied == "bootstrap" else self._port
        settings = {
            "role": name,
            "name": f"{name}-0",
            "seed": f"{self.seed}/{name}",
            "port": self._port,
            "lease_ms": LEASE_MS,
            "url": f"http://127.0.0.1:{port}",
            "http_timeout_ms": HTTP_TIMEOUT_MS,
            "deadlines": DEADLINES | self.deadlines,
            "in_flight_bytes_max": self._in_flight_bytes_max,
            "trace": str(self.folder / f"{name}-0.ndjson"),
            "advertise": f"tcp://127.0.0.1:{self.proxy.port}" if PROXIED.get(self.proxied) == name else "",
        }
        self._children[name] = Child(name, settings, self.folder / f"{name}.log")

    def greet(self, name: str) -> None:
        said = self._children[name].line()
        if name == "bootstrap":
            if self.proxied == name:
                self.proxy.target(f"127.0.0.1:{self._port}")
            return
        greeting = json.loads(said)
        self.meet(name, greeting["incarnation"])
        if PROXIED.get(self.proxied) == name:
            self.proxy.target(greeting["endpoint"])

    def start(self, *names: str) -> None:
        """Another life of processes that were killed."""
        for name in names:
            self.begin(name)
        for name in names:
            self.greet(name)

    def kill(self, *names: str) -> None:
        """kill -9."""
        for name in names:
            self._children[name].signal(signal.SIGKILL)
        for name in names:
            self._children.pop(name).end(kill=True)
            if name in SIDES:
                self.killed += len(self.opened[name])
                self.opened[name] = []

    def stop(self, name: str) -> None:
        self._children[name].signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._children[name].signal(signal.SIGCONT)

    def calm(self) -> None:
        """After something went wrong: nobody is held up any more, so that everybody can report."""
        if self._proxy is not None:
            self._proxy.resume()
        for child in self._children.values():
            child.signal(signal.SIGCONT)

    def end(self) -> None:
        """Let every process close in an orderly way. Raises ChaosError if one does not, or if one has logged a traceback."""
        for name in reversed(list(self._children)):
            child = self._children.pop(name)
            status = child.end(kill=False)
            if status != 0:
                raise ChaosError(f"{name} was told to end, and its status is {status} after {END_S} s; its log is {child.log}")
        for log in sorted(self.folder.glob("*.log")):
            if "Traceback (most recent call last)" in log.read_text(errors="replace"):
                raise ChaosError(f"a process met an error that nobody expected; its traceback is in {log}")

    @property
    def proxy(self) -> Proxy:
        assert self._proxy is not None, "this fault needs a proxy"
        return self._proxy

    # --- what it looks at ----------------------------------------------------------------------------------------------------

    def rooms(self, side: str) -> Rooms:
        return {int(room): tuple(seen) for room, seen in self._children[side].do("rooms").items()}

    def describe(self, side: str) -> dict[str, Any]:
        described: dict[str, Any] = self._children[side].do("describe")
        return described

    def report(self, side: str) -> dict[str, Any]:
        report: dict[str, Any] = self._children[side].do("report")
        return report

    def meet(self, side: str, incarnation: str) -> None:
        """The present life of that side."""
        self._incarnations[side] = incarnation

    def incarnation(self, side: str) -> str:
        return self._incarnations[side]

    def until(self, done: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise ChaosError(f"waited {timeout_s:.0f} s until {what}")
            time.sleep(POLL_S)

    def until_in(self, side: str, phase: str, *groups: str) -> None:
        """All rooms of these groups are in `phase` on that side."""
        self.until(
            lambda: self.of(*groups) <= {room for room, seen in self.rooms(side).items() if seen[0] == phase},
            f"the rooms {groups} are {phase} on {side}",
        )

    def until_over(self, side: str, *groups: str) -> None:
        """All rooms of these groups concluded on that side."""
        self.until(
            lambda: self.of(*groups) <= {room for room, seen in self.rooms(side).items() if seen[1]},
            f"the rooms {groups} concluded on {side}",
        )

    def until_peer(self, side: str, state: str) -> None:
        self.until(lambda: [peer["state"] for peer in self.describe(side)["peers"]] == [state], f"{side} sees its peer as {state}")

    def until_waits_for(self, pattern: str) -> None:
        """Decode says of every room that still looks for its prefill what it waits for."""

        def says() -> set[int]:
            return {r["room"] for r in self.describe("decode")["rooms"] if re.search(pattern, r["waits_for"])}

        self.until(lambda: self.of("asking") <= says(), f"decode says {pattern!r} of what it looks for")

    def of(self, *groups: str) -> set[int]:
        return {room for group in groups for room in self.groups[group]}

    # --- the play ------------------------------------------------------------------------------------------------------------

    def open(self, side: str, rooms: Iterable[int], **how: Any) -> None:
        wanted = sorted(rooms)
        if wanted:
            self._children[side].do("open", rooms=wanted, **how)
            self.opened[side] += wanted

    def new_rooms(self, count: int) -> list[int]:
        self._last_room += count
        return list(range(self._last_room - count, self._last_room))

    def stage(self) -> None:
        """Rooms in all phases, on both sides."""
        self.groups = {group: self.new_rooms(self.rng.randint(*ROOMS_A_GROUP)) for group in GROUPS}
        opens: list[tuple[str, set[int], dict[str, Any]]] = [
            ("prefill", self.of("early", *BOUND, "done"), {}),
            ("decode", self.of("asking", "waiting", "moving", "flight", "done"), {}),
            ("decode", self.of("late"), {"late": True}),
            ("decode", self.of("parked"), {"dp_rank": 0}),
        ]
        for side, rooms, how in self.rng.sample(opens, len(opens)):
            self.open(side, rooms, **how)
        self.until_in("decode", "WAITING_FOR_INPUT", "parked", *BOUND, "done")
        self.until_in("prefill", "WAITING_FOR_INPUT", *BOUND, "done")
        prefill = self._children["prefill"]
        prefill.do("send", rooms=sorted(self.of("done", "late")))
        prefill.do("send", rooms=sorted(self.of("moving")), half=True)
        for side in SIDES:
            self.until_in(side, "SUCCESS", "done")
            self.until_in(side, "TRANSFERRING", "moving")
        self.until_in("decode", "BOOTSTRAPPING", "asking")
        self.until_in("prefill", "BOOTSTRAPPING", "early")
        self.groups["during"] = []

    def launch(self) -> None:
        """The rooms in flight begin to move; returns at once."""
        self._children["prefill"].post("send", rooms=sorted(self.of("flight")))

    def some_time(self) -> None:
        """So that the fault does not always meet the same moment of the flight."""
        time.sleep(self.rng.uniform(0.0, 0.01))

    def open_during(self, side: str) -> None:
        """More rooms, on the side that is alive while the fault lasts."""
        rooms = self.new_rooms(PROBES)
        self.groups["during"] = self.groups["during"] + rooms
        self.open(side, rooms)

    def finish(self) -> None:
        """The fault is over: failures reach the other side, everything that lives is handed over, failed rooms are tried again."""
        self.until(self._agreed, "what failed on one side has failed on the other, too")
        for side, other in (SIDES, SIDES[::-1]):
            alone = {room for room, seen in self.rooms(side).items() if not seen[1]} - set(self.opened[other])
            self.open(other, alone)
        self._children["decode"].do("grant", rooms=self._live("decode"))
        self._children["prefill"].do("send", rooms=self._live("prefill"))
        self._settled()
        failed = set.union(*({room for room, seen in self.rooms(side).items() if seen[1] != "SUCCESS"} for side in SIDES))
        self.retried = self.rng.sample(sorted(failed), min(len(failed), RETRIES_MAX))
        self._hand_over(self.retried)

    def probe(self) -> None:
        """New rooms between the two sides, as they are now."""
        self.groups["probe"] = self.new_rooms(PROBES)
        self._hand_over(self.groups["probe"])

    def _hand_over(self, rooms: Sequence[int]) -> None:
        for side in SIDES:
            self._children[side].do("clear")
        self.open("prefill", rooms)  # first: a room that failed here unmet would be refused
        self.open("decode", rooms)
        self._children["prefill"].do("send", rooms=list(rooms))
        self._settled()

    def _live(self, side: str) -> list[int]:
        return [room for room, seen in self.rooms(side).items() if not seen[1]]

    def _agreed(self) -> bool:
        prefill, decode = (self.rooms(side) for side in SIDES)
        both = prefill.keys() & decode.keys()
        return not any(bool(prefill[room][1]) != bool(decode[room][1]) for room in both)

    def _settled(self) -> None:
        """Every room of both sides concluded, and its memory is back."""
        self.until(
            lambda: all(seen[1] and seen[2] for side in SIDES for seen in self.rooms(side).values()),
            "every room concluded and its memory is back",
        )

    def rest(self) -> None:
        """Nobody owes anything to anybody. What is left after a while is judged by `chaos.left_over`."""
        for side in SIDES:
            self._children[side].do("clear")
        tables = ("rooms", "ops", "links", "leases", "repeats", "early_offers")
        with contextlib.suppress(ChaosError):
            self.until(
                lambda: not any(self.describe(side)[table] for side in SIDES for table in tables), "both sides are at rest", 5.0
            )
