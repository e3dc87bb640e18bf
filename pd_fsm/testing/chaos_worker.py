"""One engine process of the chaos run, told what to do by lines of JSON: `python -m pd_fsm.testing.chaos_worker SETTINGS`.

It owns a small KV cache whose free pages are full of canaries: whatever is written to a page after it came back is seen when the
page is taken again, or at the end. Bytes that arrive are compared with the pattern that prefill makes from (room, layer, token).
It judges nothing else: what it saw goes to `chaos.py` in `report()`.
"""

from __future__ import annotations

import ctypes
import json
import queue
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

import pd_fsm
from pd_fsm import Phase
from pd_fsm.runtime.bootstrap import run as run_bootstrap
from pd_fsm.runtime.transport import Factory, Host, Transport, make_transport

PAGES = 768
PAGE_SIZE = 4
TOKEN_BYTES = 256
LAYERS = 2
ROWS = 128
ROW_BYTES = 64
TICK_S = 0.002  # how soon free pages get their canaries
CLOSE_S = 2.0
_PR_SET_PDEATHSIG = 1
_WORD = 8
_MASK = (1 << 64) - 1
_ODD = (0x9E3779B97F4A7C15, 0xD1342543DE82EF95, 0xBF58476D1CE4E5B9)


def noise(key: int, rows: Iterable[int], nbytes: int) -> NDArray[np.uint8]:
    """uint8 [rows, nbytes], a function of the key and each row's number, the same in every process."""
    numbers = np.fromiter(rows, dtype=np.uint64)
    columns = np.arange(nbytes // _WORD, dtype=np.uint64)
    words: NDArray[np.uint64] = numbers[:, None] * np.uint64(_ODD[0]) + columns + np.uint64(key * _ODD[1] & _MASK)
    words ^= words >> np.uint64(29)
    words *= np.uint64(_ODD[2])
    words ^= words >> np.uint64(32)
    return words.view(np.uint8)


def pages_of(room: int) -> int:
    """How many pages a room has, on both sides; they are handed over in two chunks."""
    return 2 + room % 7


def first_chunk(room: int) -> int:
    """Pages of a room's first chunk."""
    return max(1, pages_of(room) // 2)


def pattern(room: int, layer: int) -> NDArray[np.uint8]:
    """uint8 [pages, page bytes]: what prefill computes for a room in one layer, token by token."""
    tokens = noise(room * (LAYERS + 1) + layer, range(pages_of(room) * PAGE_SIZE), TOKEN_BYTES)
    return tokens.reshape(pages_of(room), PAGE_SIZE * TOKEN_BYTES)


def aux_pattern(room: int) -> NDArray[np.uint8]:
    """uint8 [1, ROW_BYTES]: a room's aux row."""
    return noise(room * (LAYERS + 1) + LAYERS, [0], ROW_BYTES)


class Pool:
    """Items (pages or rows) of some buffers that share their numbers. A free item holds a canary that no other time of it had."""

    def __init__(self, buffers: Sequence[NDArray[np.uint8]], choose: random.Random) -> None:
        self.buffers = buffers
        self.free: set[int] = set()
        self.late_writes = 0
        self._choose = choose
        self._refills = [0] * len(buffers[0])
        self.give_back(range(len(buffers[0])))

    @property
    def total(self) -> int:
        return len(self._refills)

    def take(self, count: int) -> list[int]:
        """Any free items, after a look at their canaries."""
        taken = self._choose.sample(sorted(self.free), count)
        self._inspect(taken)
        self.free.difference_update(taken)
        return taken

    def give_back(self, items: Iterable[int]) -> None:
        """These belong to nobody from now on."""
        for item in items:
            assert item not in self.free, f"item {item} was given back twice"
            self._refill(item)
            self.free.add(item)

    def inspect(self) -> None:
        """Count every free item that changed while it was free."""
        self._inspect(sorted(self.free))

    def _inspect(self, items: Iterable[int]) -> None:
        for item in items:
            canary = self._canary(item)
            if any((buffer[item] != line).any() for buffer, line in zip(self.buffers, canary, strict=True)):
                self.late_writes += 1
                self._refill(item)  # so that it is counted once

    def _refill(self, item: int) -> None:
        self._refills[item] += 1
        for buffer, line in zip(self.buffers, self._canary(item), strict=True):
            buffer[item] = line

    def _canary(self, item: int) -> list[NDArray[np.uint8]]:
        key = 1 << 48 | self._refills[item] << 20 | item
        return [noise(key, [number], buffer.shape[1])[0] for number, buffer in enumerate(self.buffers)]


@attrs.define(eq=False)
class Life:
    """One opening of a room by this engine. `outcome` is "SUCCESS" or "cause: reason"."""

    room: int
    handle: pd_fsm.Handle
    pages: list[int]
    rows: list[int]
    clear_at_once: bool
    pages_sent: int = 0
    outcome: str = ""
    bytes_ok: bool | None = None
    free: bool = False
    """Its memory is back in the pool."""


class Engine:
    """One side's memory and rooms. `session` is set by whoever opens it with `layout`. Owned by one thread."""

    session: pd_fsm.Session

    def __init__(self, role: str, seed: str) -> None:
        choose = random.Random(seed)
        self.role = role
        self.kv = [np.zeros((PAGES, PAGE_SIZE * TOKEN_BYTES), dtype=np.uint8) for _ in range(LAYERS)]
        self.aux = np.zeros((ROWS, ROW_BYTES), dtype=np.uint8)
        self.pages = Pool(self.kv, choose)
        self.rows = Pool([self.aux], choose)
        self.layout = pd_fsm.KVLayout([pd_fsm.paged("kv", self.kv, PAGE_SIZE), pd_fsm.rows("aux", self.aux)])
        self.lives: list[Life] = []
        self.of_room: dict[int, Life] = {}
        self._choose = choose

    # --- what the engine is told ---------------------------------------------------------------------------------------------

    def open(self, rooms: Sequence[int], *, late: bool = False, dp_rank: int | None = None) -> None:
        """Open rooms. On the decode side, `late` ones get their pages by `grant`."""
        for room in rooms:
            pages, rows = ([], []) if late else (self.pages.take(pages_of(room)), self.rows.take(1))
            if self.role == "prefill":
                for layer, buffer in enumerate(self.kv):
                    buffer[pages] = pattern(room, layer)
                self.aux[rows] = aux_pattern(room)
                handle: pd_fsm.Handle = self.session.send(room)
            else:
                handle = self.session.receive(room, pages or None, aux=rows[0] if rows else None, prefill_dp_rank=dp_rank)
            life = Life(room, handle, pages, rows, clear_at_once=self._choose.random() < 0.5)
            self.lives.append(life)
            self.of_room[room] = life

    def send(self, rooms: Sequence[int], *, half: bool = False) -> None:
        """Hand in the first chunk of these rooms, or all that is left of them."""
        for room in rooms:
            life = self.of_room[room]
            assert isinstance(life.handle, pd_fsm.Sender)
            for end in (first_chunk(room),) if half else (first_chunk(room), pages_of(room)):
                begin = life.pages_sent
                if begin < end and life.handle.poll() not in (Phase.FAILED, Phase.SUCCESS):
                    last = end == pages_of(room)
                    tokens = (begin * PAGE_SIZE, end * PAGE_SIZE)
                    life.handle.send(life.pages[begin:end], tokens, last=last, aux=life.rows[0] if last else None)
                    life.pages_sent = end

    def grant(self, rooms: Sequence[int]) -> None:
        """Give rooms that were opened late their pages."""
        for room in rooms:
            life = self.of_room[room]
            assert isinstance(life.handle, pd_fsm.Receiver)
            if not life.pages and life.handle.poll() not in (Phase.FAILED, Phase.SUCCESS):
                life.pages, life.rows = self.pages.take(pages_of(room)), self.rows.take(1)
                life.handle.grant(life.pages, aux=life.rows[0])

    def clear(self) -> None:
        for life in self.lives:
            if life.outcome:
                life.handle.clear()

    # --- what it does by itself ----------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """One turn of the engine's loop: see which rooms concluded, and take back what is free."""
        for life in self.lives:
            if life.free:
                continue
            if not life.outcome and life.handle.poll() in (Phase.FAILED, Phase.SUCCESS):
                self.concluded(life)
            if life.outcome and life.handle.pages_free:
                self.release(life)

    def concluded(self, life: Life) -> None:
        failure = life.handle.failure
        life.outcome = "SUCCESS" if failure is None else f"{failure.cause}: {failure.reason}"
        if failure is None and self.role == "decode":
            right = [bool((buffer[life.pages] == pattern(life.room, layer)).all()) for layer, buffer in enumerate(self.kv)]
            life.bytes_ok = all(right) and bool((self.aux[life.rows] == aux_pattern(life.room)).all())
        if life.clear_at_once:
            life.handle.clear()

    def release(self, life: Life) -> None:
        self.pages.give_back(life.pages)
        self.rows.give_back(life.rows)
        life.free = True

    # --- what it saw ---------------------------------------------------------------------------------------------------------

    def rooms(self) -> dict[str, Any]:
        """By room: [phase, outcome, memory is back] of its latest life; without the work of a report."""
        return {str(room): [life.handle.phase.name, life.outcome, life.free] for room, life in self.of_room.items()}

    def report(self) -> dict[str, Any]:
        """Everything that `chaos.py` judges, after a look at all canaries."""
        self.pages.inspect()
        self.rows.inspect()
        return {
            "role": self.role,
            "lives": [
                {
                    "room": life.room,
                    "generation": life.handle.generation,
                    "outcome": life.outcome,
                    "bytes_ok": life.bytes_ok,
                    "held": 0 if life.free else len(life.pages) + len(life.rows),
                }
                for life in self.lives
            ],
            "items": self.pages.total + self.rows.total,
            "items_free": len(self.pages.free) + len(self.rows.free),
            "late_writes": self.pages.late_writes + self.rows.late_writes,
            "describe": self.session.describe(),
        }


def through(advertised: str, true: list[str]) -> Factory:
    """The ZeroMQ transport, advertising another address than its own, which is put into `true`: a proxy stands in between."""

    def create(host: Host, **options: Any) -> Transport:
        made = make_transport("zmq", host, options)
        if host.role == "prefill":
            true.append(made.control.endpoint)
            made.control.endpoint = advertised or made.control.endpoint
        else:
            true.append(made.data.descriptor.decode())
            made.data.descriptor = advertised.encode() or made.data.descriptor
        return made

    return create


def obey(engine: Engine, do: str, arguments: dict[str, Any]) -> Any:
    """Carry out a command of the run; its answer."""
    if do == "rooms":
        return engine.rooms()
    if do == "report":
        return engine.report()
    if do == "describe":
        return engine.session.describe()
    commands = {"open": engine.open, "send": engine.send, "grant": engine.grant, "clear": engine.clear}
    commands[do](**arguments)  # type: ignore[operator]  # each has its own arguments
    return {}


def _read(lines: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put("")


def say(answer: Any) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def serve(engine: Engine, carry_out: Callable[[Engine, str, dict[str, Any]], Any] = obey) -> None:
    """Obey until standard input ends."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines,), daemon=True).start()
    while True:
        engine.tick()
        try:
            line = lines.get(timeout=TICK_S)
        except queue.Empty:
            continue
        if not line:
            return
        command = json.loads(line)
        try:
            answer = carry_out(engine, command.pop("do"), command)
        except Exception as error:  # noqa: BLE001 - whoever gave the command sees it
            answer = {"error": repr(error)}
        say(answer)


def end_with_parent() -> None:
    """Be killed when the run itself is, stopped or not."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(text: str) -> int:
    """`text` is JSON: role, name, url, seed, deadlines, in_flight_bytes_max, trace, advertise,
    http_timeout_ms; or role "bootstrap", port, lease_ms."""
    end_with_parent()
    settings = json.loads(text)
    if settings["role"] == "bootstrap":
        return run_bootstrap("127.0.0.1", settings["port"], settings["lease_ms"])
    engine = Engine(settings["role"], settings["seed"])
    true: list[str] = []
    engine.session = pd_fsm.open_session(
        settings["role"],
        engine.layout,
        transport=through(settings["advertise"], true),
        rendezvous=pd_fsm.HttpRendezvous(settings["url"], timeout_ms=settings["http_timeout_ms"]),
        # Of two data-parallel ranks, so that every room is looked up by its number, and waits until prefill has opened it.
        topology=pd_fsm.Topology(dp_size=2) if settings["role"] == "prefill" else None,
        name=settings["name"],
        deadlines=pd_fsm.Deadlines(**settings["deadlines"]),
        limits=pd_fsm.Limits(in_flight_bytes_max=settings["in_flight_bytes_max"]),
        trace=settings["trace"],
    )
    try:
        say({"endpoint": true[0], "incarnation": engine.session.incarnation.hex()})
        serve(engine)
    finally:
        engine.session.close(CLOSE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
