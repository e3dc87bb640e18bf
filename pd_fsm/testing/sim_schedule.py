"""A run as a value: the world's options, what is done to it and when, and what the network and the data plane do to each frame and
write.

Fates are drawn by key (who sends what for which room, the how-manieth), not from one stream: a run with some of the actions or
fates left out keeps the others as they were. That is what makes schedules small enough to read (`minimise.py`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from random import Random
from typing import TypeAlias

import msgspec

from pd_fsm.testing.sim_options import PAGE_TOKENS, Options, draw_options

BASE_MS = 1.0
"""What a frame or a write needs when nothing happens to it."""


class _Act(msgspec.Struct, frozen=True, kw_only=True, tag=str.lower):
    at_ms: float


class Serve(_Act, frozen=True, kw_only=True):
    """The router dispatches a request. `chunks` are pages each; opens happen `*_ms` after `at_ms`. `tokens_off`: by how much decode
    is wrong about the prompt's length, None if it does not say. `grant_ms`: its pages are reserved that long after they are asked
    for (`unasked`: after the open), None: at the open."""

    room: int
    prefill: str
    decodes: tuple[str, ...]
    chunks: tuple[int, ...]
    prefill_ms: float
    decode_ms: tuple[float, ...]
    compute_ms: float
    short_tokens: int = 0
    prefix_pages: int = 0
    aux: bool = True
    tokens_off: int | None = None
    grant_ms: float | None = None
    unasked: bool = False
    by_room: bool = False
    clear_ms: float = 0.0
    hold_ms: float = 0.0

    @property
    def pages(self) -> int:
        return sum(self.chunks)

    @property
    def tokens(self) -> int:
        return self.pages * PAGE_TOKENS - self.short_tokens


class Abort(_Act, frozen=True, kw_only=True):
    node: str
    room: int


class Cancel(_Act, frozen=True, kw_only=True):
    node: str
    room: int


class Crash(_Act, frozen=True, kw_only=True):
    """kill -9, and a new process at the same address after `for_ms`."""

    node: str
    for_ms: float


class Freeze(_Act, frozen=True, kw_only=True):
    """SIGSTOP, and SIGCONT after `for_ms`."""

    node: str
    for_ms: float


class Cut(_Act, frozen=True, kw_only=True):
    """Nothing passes from `source` to `target` for `for_ms`; the other way is not touched."""

    source: str
    target: str
    for_ms: float


class Outage(_Act, frozen=True, kw_only=True):
    """The rendezvous answers nobody for `for_ms`."""

    for_ms: float


class Drain(_Act, frozen=True, kw_only=True):
    """The operator drains a node; when it has drained it is closed, and started again after `for_ms`."""

    node: str
    for_ms: float


class Close(_Act, frozen=True, kw_only=True):
    """The operator closes a node, however busy, and starts it again after `for_ms`."""

    node: str
    for_ms: float


class Reset(_Act, frozen=True, kw_only=True):
    """`source` sees its connection to `target` break, and it comes back."""

    source: str
    target: str


class Overflow(_Act, frozen=True, kw_only=True):
    """`source` finds its outbox to `target` full."""

    source: str
    target: str


class Garbage(_Act, frozen=True, kw_only=True):
    """Bytes arrive that no session sent."""

    node: str
    salt: int


Act: TypeAlias = Serve | Abort | Cancel | Crash | Freeze | Cut | Outage | Drain | Close | Reset | Overflow | Garbage


class FrameFate(msgspec.Struct, frozen=True, tag="frame"):
    """`copy_ms`: another copy arrives that much later than the first would, -1: none."""

    lost: bool = False
    delay_ms: float = 0.0
    copy_ms: float = -1.0


class WriteFate(msgspec.Struct, frozen=True, tag="write"):
    """How a write ends (one of WRITE_FAULTS, or "done"). Its bytes land after `land_ms`, it is reported after `end_ms`; `early` is
    the share of its copies that lands before the others."""

    how: str = "done"
    land_ms: float = BASE_MS
    end_ms: float = 2 * BASE_MS
    early: float = 0.0


Fate: TypeAlias = FrameFate | WriteFate
FRAME, WRITE = FrameFate(), WriteFate()


class Schedule(msgspec.Struct, frozen=True):
    """`fates` None: drawn from the seed as the run goes; else exactly these, by key, and nothing happens to what is not named."""

    seed: int
    options: Options
    acts: tuple[Act, ...]
    fates: Mapping[str, Fate] | None = None


class Fates:
    """What becomes of each frame and write of one run. `taken` collects all that was not ordinary."""

    def __init__(self, schedule: Schedule) -> None:
        self._options = schedule.options
        self._given = schedule.fates
        self._key = schedule.seed.to_bytes(16, "little", signed=True)
        self._seen: Counter[tuple[str, ...]] = Counter()
        self.taken: dict[str, Fate] = {}
        self.healed = False

    def draw(self, key: str) -> Iterator[float]:
        """Four numbers in [0, 1) that belong to `key`."""
        raw = hashlib.blake2b(key.encode(), digest_size=16, key=self._key).digest()
        return (int.from_bytes(raw[i : i + 4], "little") / (1 << 32) for i in range(0, 16, 4))

    def one(self, *key: str) -> float:
        """One number in [0, 1) for the next occasion of `key`."""
        return next(self.draw(self._next(key)))

    def frame(self, source: str, target: str, kind: str, room: int) -> FrameFate:
        key = self._next((source, target, kind, str(room)))
        options = self._options
        if self.healed:
            return FRAME
        if self._given is not None:
            fate = self._given.get(key, FRAME)
            assert isinstance(fate, FrameFate), key
        else:
            lost, delayed, copied, size = self.draw(key)
            fate = FrameFate(
                lost < options.lost,
                options.delay_ms_max * size * size if delayed < options.delayed else 0.0,
                options.delay_ms_max * size + BASE_MS if copied < options.copied else -1.0,
            )
        if fate != FRAME:
            self.taken[key] = fate
        return fate

    def write(self, source: str, target: str, room: int) -> WriteFate:
        key = self._next((source, target, "write", str(room)))
        options = self._options
        if self.healed:
            return WRITE
        if self._given is not None:
            fate = self._given.get(key, WRITE)
            assert isinstance(fate, WriteFate), key
        else:
            fate = _write_fate(options, *self.draw(key))
        if fate != WRITE:
            self.taken[key] = fate
        return fate

    def _next(self, key: tuple[str, ...]) -> str:
        self._seen[key] += 1
        return f"{' '.join(key)} #{self._seen[key]}"


def _write_fate(options: Options, faulty: float, which: float, size: float, early: float) -> WriteFate:
    if faulty >= options.write_faults:
        return WRITE
    how = options.write_kinds[int(which * len(options.write_kinds))]
    land_ms = BASE_MS + 3_000 * size * size
    if how in ("unknown_lands", "unknown_never", "unknown_done"):
        end_ms = land_ms * early
    elif how == "slow":
        end_ms = land_ms + 200 * early
    else:
        land_ms = BASE_MS + 100 * size
        end_ms = land_ms + 100 * early
    return WriteFate(how, round(land_ms, 2), round(end_ms, 2), round(early, 2) if size > 0.5 else 0.0)


def draw_schedule(seed: int) -> Schedule:
    """The whole run of one seed."""
    random = Random(f"pd-fsm {seed}")
    options = draw_options(random)
    return Schedule(seed, options, tuple(sorted(_draw_acts(options, random), key=lambda act: act.at_ms)))


def names(options: Options) -> tuple[list[str], list[str]]:
    """The nodes: (prefill, decode)."""
    return [f"P{i}" for i in range(options.prefills)], [f"D{i}" for i in range(options.decodes)]


def _draw_acts(options: Options, random: Random) -> Iterator[Act]:
    prefills, decodes = names(options)
    serves = [_serve(options, random, index, prefills, decodes) for index in range(options.rooms)]
    yield from serves
    yield from _engine_acts(options, random, serves)
    yield from _process_acts(options, random, serves, prefills + decodes)
    yield from _network_acts(options, random, prefills, decodes)


def _engine_acts(options: Options, random: Random, serves: list[Serve]) -> Iterator[Act]:
    for _ in range(options.aborts):
        serve = random.choice(serves)
        yield Abort(at_ms=_soon_after(random, serve), node=random.choice((serve.prefill, *serve.decodes)), room=serve.room)
    for _ in range(options.cancels_by_room):
        serve = random.choice(serves)
        at_ms = max(0.0, _soon_after(random, serve) - random.choice((0, 30, 600, 3_000)))
        yield Cancel(at_ms=round(at_ms, 1), node=random.choice((serve.prefill, *serve.decodes)), room=serve.room)


def _process_acts(options: Options, random: Random, serves: list[Serve], nodes: list[str]) -> Iterator[Act]:
    for _ in range(options.crashes):
        serve = random.choice(serves)
        busy = random.random() < 0.5  # it dies while it serves, or whenever it happens
        node = random.choice((serve.prefill, *serve.decodes)) if busy else random.choice(nodes)
        yield Crash(at_ms=_soon_after(random, serve) if busy else _when(options, random), node=node, for_ms=_a_while(random))
    for _ in range(options.freezes):
        yield Freeze(at_ms=_when(options, random), node=random.choice(nodes), for_ms=_a_while(random))
    for _ in range(options.drains):
        yield Drain(at_ms=_when(options, random), node=random.choice(nodes), for_ms=_a_while(random))
    for _ in range(options.closes):
        yield Close(at_ms=_when(options, random), node=random.choice(nodes), for_ms=_a_while(random))
    for _ in range(options.garbage):
        yield Garbage(at_ms=_when(options, random), node=random.choice(nodes), salt=random.randrange(1 << 30))


def _network_acts(options: Options, random: Random, prefills: list[str], decodes: list[str]) -> Iterator[Act]:
    def pair() -> list[str]:
        ends = [random.choice(prefills), random.choice(decodes)]
        random.shuffle(ends)
        return ends

    for _ in range(options.cuts):
        source, target = pair()
        at_ms, for_ms = _when(options, random), 50 + _a_while(random)
        yield Cut(at_ms=at_ms, source=source, target=target, for_ms=for_ms)
        if random.random() < 0.5:
            yield Cut(at_ms=at_ms, source=target, target=source, for_ms=for_ms)
    for _ in range(options.outages):
        yield Outage(at_ms=_when(options, random), for_ms=_a_while(random))
    for _ in range(options.resets):
        source, target = pair()
        yield Reset(at_ms=_when(options, random), source=source, target=target)
    for _ in range(options.overflows):
        source, target = pair()
        yield Overflow(at_ms=_when(options, random), source=source, target=target)


def _when(options: Options, random: Random) -> float:
    return round(random.uniform(0, options.horizon_ms), 1)


def _soon_after(random: Random, serve: Serve) -> float:
    return round(serve.at_ms + random.choice((5, 50, 500, 2_500)) * random.random(), 1)


def _a_while(random: Random) -> float:
    return round(random.choice((20, 300, 2_000, 5_000)) * random.uniform(0.5, 1.0), 1)


def _serve(options: Options, random: Random, index: int, prefills: list[str], decodes: list[str]) -> Serve:
    def chance(share: float) -> bool:
        return random.random() < share

    chunks = tuple(random.randint(1, 3) for _ in range(random.choice((1, 1, 2, 3))))
    readers = 2 if len(decodes) > 1 and chance(options.two_readers) else 1
    lead_ms = random.choice((0, 0, 20, 400))  # who of the two is dispatched first, and by how much
    return Serve(
        at_ms=round(random.uniform(0, options.horizon_ms * 0.9), 1),
        room=index if options.room_numbers > options.rooms else random.randrange(options.room_numbers),
        prefill=random.choice(prefills),
        decodes=tuple(random.sample(decodes, readers)),
        chunks=chunks,
        prefill_ms=round(lead_ms * random.random(), 1),
        decode_ms=tuple(round(lead_ms * random.random(), 1) for _ in range(readers)),
        compute_ms=random.choice((0, 5, 100)),
        short_tokens=random.choice((0, 0, 1, 3)),
        prefix_pages=random.randint(0, sum(chunks)) if chance(options.prefix) else 0,
        aux=random.random() < 0.7,
        tokens_off=random.choice((-1, 1)) if chance(options.wrong_tokens) else random.choice((None, 0)),
        grant_ms=random.choice((0, 50, 1_000)) if chance(options.late) else None,
        unasked=random.random() < 0.3,
        by_room=random.random() < 0.5,
        clear_ms=random.choice((0, 0, 20, 1_000)),
        hold_ms=random.choice((0, 0, 300)),
    )
