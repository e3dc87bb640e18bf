"""Real sessions in one process, over the transport under test: engines with patterned memory, and waits with a deadline.

Every engine's memory is filled with noise and mirrored: `Engine.expect` says which bytes a hand-off should have changed, and
`Engine.check` compares all of it, so a byte outside of the granted pages that changed is found, too.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.testing.conformance.target import Target

PAGE_SIZE = 4
PAGES = 48
ROWS = 8
PATIENCE_S = 10.0  # bounds a wait that should end much sooner


def until(done: Callable[[], bool], what: str, sessions: Sequence[pd_fsm.Session] = (), timeout_s: float = PATIENCE_S) -> None:
    """Wait until `done()`, driving those of `sessions` that have no thread. Fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    driven = [session for session in sessions if not session.driver.threaded]
    while not done():
        assert time.monotonic() < deadline, f"waited {timeout_s} s until {what}"
        worked = [session.progress() for session in driven]
        if driven and not any(worked):
            driven[0].wait(1.0)
        elif not driven:
            time.sleep(0.0005)


def open_files() -> dict[str, str]:
    """What this process has open, by descriptor."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own descriptor
            found[entry.name] = str(entry.readlink())
    return found


def threads() -> set[str]:
    """Names of the threads that run, pyzmq's own collector for shared memory aside: it lives as long as the process."""
    return {thread.name for thread in threading.enumerate() if "garbage" not in type(thread).__name__.lower()}


@attrs.define(eq=False)
class Engine:
    """One side: its buffers, what they should contain, and its session."""

    role: str
    buffers: list[NDArray[np.uint8]]
    """Region by region [items, item_bytes]; those of "aux" come last."""
    aux_regions: int
    layout: pd_fsm.KVLayout
    session: pd_fsm.Session = attrs.field(init=False)
    expected: list[NDArray[np.uint8]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.expected = [buffer.copy() for buffer in self.buffers]

    def expect(self, source: Engine, pairs: Sequence[tuple[int, int]], aux: tuple[int, int] | None = None) -> None:
        """These (source page, own page) pairs and that (source row, own row) should have been copied from `source`."""
        paged = len(self.buffers) - self.aux_regions
        for number, (mine, theirs) in enumerate(zip(self.expected, source.buffers, strict=True)):
            moved = pairs if number < paged else [aux] if aux else []
            for from_item, to_item in moved:
                mine[to_item] = theirs[from_item]

    def check(self) -> None:
        for number, (buffer, expected) in enumerate(zip(self.buffers, self.expected, strict=True)):
            wrong = np.flatnonzero((buffer != expected).any(axis=1))
            assert not len(wrong), f"{self.role}: items {wrong.tolist()[:10]} of region {number} are not as they should be"

    def close(self, timeout_s: float = 2.0) -> None:
        self.session.close(timeout_s)


def make_engine(
    role: str, seed: int, *, pages: int = PAGES, page_bytes: Sequence[int] = (96, 64, 8), page_size: int = PAGE_SIZE
) -> Engine:
    """An engine without a session: two components that share an index space, and aux data in two buffers."""
    noise = np.random.default_rng(seed)
    paged = [noise.integers(0, 256, (pages, nbytes), dtype=np.uint8) for nbytes in page_bytes]
    aux = [noise.integers(0, 256, (ROWS, nbytes), dtype=np.uint8) for nbytes in (16, 3)]
    layout = pd_fsm.KVLayout(
        [pd_fsm.paged("kv", paged[:-1], page_size), pd_fsm.paged("index", paged[-1:], page_size), pd_fsm.rows("aux", *aux)]
    )
    return Engine(role, paged + aux, len(aux), layout)


class World:
    """Engines that can meet, over one transport, with or without threads of their own. Owned by the test's thread.

    `directory` is for the transport's own files.
    """

    def __init__(self, target: Target, thread: bool, directory: Path, deadlines: pd_fsm.Deadlines | None = None) -> None:
        self.target = target
        self.thread = thread
        self.directory = directory
        self.deadlines = deadlines or pd_fsm.Deadlines(repeat_min_ms=20)
        self.registry = pd_fsm.LocalRendezvous()
        self.engines: list[Engine] = []
        self.opened = 0

    def options(self) -> dict[str, Any]:
        """Of the transport."""
        return self.target.options_for("", self.directory)

    def open(self, role: str, engine: Engine | None = None, **settings: Any) -> Engine:
        """An engine with an open session, closed with the world. `settings` are those of `open_session`."""
        self.opened += 1
        engine = engine or make_engine(role, seed=self.opened)
        given = {
            "transport": self.target.transport,
            "rendezvous": self.registry.client(),
            "name": f"{role}-{sum(known.role == role for known in self.engines)}",
            "deadlines": self.deadlines,
            "thread": self.thread,
            "transport_options": self.options(),
        }
        engine.session = pd_fsm.open_session(role, engine.layout, **(given | settings))
        self.engines.append(engine)
        return engine

    def pair(self, **settings: Any) -> tuple[Engine, Engine]:
        """A prefill and a decode engine."""
        return self.open("prefill", **settings), self.open("decode", **settings)

    def until(self, done: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until `done()`, driving every session that has no thread."""
        until(done, what, [engine.session for engine in self.engines], timeout_s)

    def conclude(self, *handles: pd_fsm.Handle, timeout_s: float = PATIENCE_S) -> list[pd_fsm.Phase]:
        """Wait until all of these concluded and their memory is free; the phases."""
        done = lambda: all(handle.poll() in (0, 4) and handle.pages_free for handle in handles)  # noqa: E731
        self.until(done, f"{handles} concluded", timeout_s)
        return [handle.phase for handle in handles]

    def at_rest(self) -> None:
        """Wait until no engine owes anything to another."""
        for engine in self.engines:
            self.until(lambda engine=engine: not owed(engine), f"{engine.role} came to rest")  # type: ignore[misc]

    def close(self) -> None:
        """Every session ends; those without a thread together, so that their goodbyes find each other."""
        for engine in self.engines:
            engine.close(0.5)
        self.engines.clear()


def owed(engine: Engine) -> dict[str, Any]:
    """What this session still owes, or is owed: empty at rest."""
    described = engine.session.describe()
    return {table: described[table] for table in ("ops", "links", "leases", "repeats") if described[table]}


def why(handle: pd_fsm.Handle) -> pd_fsm.Failure:
    """The failure of a room that must have failed."""
    assert handle.failure is not None, f"{handle} did not fail"
    return handle.failure


def messages(engine: Engine, name: str) -> int:
    """A counter of the session."""
    count: int = engine.session.describe()["counts"].get(name, 0)
    return count
