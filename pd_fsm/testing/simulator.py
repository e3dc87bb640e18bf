"""Deterministic simulation of a whole fleet: real sessions and drivers, real bytes, a virtual clock, and an adversary.

One seed gives a world (`sim_options.py`), what is done to it (`sim_schedule.py`), and every fate of every frame and write. A run
has two phases. In the first, faults strike, and what must never happen is looked for after every step. Then everything is healed:
partitions end, dead processes are restarted, nothing is lost any more; and within a bounded time every room has concluded, every
page is back, every table is empty, and new rooms succeed between all pairs.

What is real: `Session`, `Driver`, `SessionCore`, the wire codec, `KVLayout` and plans, `LocalRendezvous`. What is simulated: time,
the network, the data plane (`sim_network.py`, `sim_fabric.py`), processes, engines. Threads are not: each session is driven by
`progress()`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NoReturn

import attrs
import msgspec

from pd_fsm.core import events as ev
from pd_fsm.machines import Phase
from pd_fsm.testing import sim_schedule as sched
from pd_fsm.testing.sim_agenda import Agenda
from pd_fsm.testing.sim_fabric import Fabric
from pd_fsm.testing.sim_network import Network
from pd_fsm.testing.sim_options import DEADLINES
from pd_fsm.testing.sim_process import Process
from pd_fsm.testing.sim_rendezvous import SlowRendezvous
from pd_fsm.testing.sim_schedule import Fate, Fates, Schedule, Serve, draw_schedule
from pd_fsm.testing.world import Violation

logger = logging.getLogger("pd_fsm")

STEPS_MAX = 400_000
"""Actions of one phase of a run: more means that it never comes to rest."""
DRAIN_MS = 6_000
_ALL = DEADLINES.bootstrap_ms + DEADLINES.waiting_ms + DEADLINES.transfer_ms + DEADLINES.drain_ms + DEADLINES.lost_ms
CONCLUDE_MS = 2 * _ALL
"""Within which every room of a healed world has concluded and every page is back: each deadline once, and time to spare."""
FORGET_MS = 2 * (DEADLINES.tombstone_ms + DEADLINES.early_offer_ms + DEADLINES.lost_ms)
"""Within which every table is empty then."""
PROBE_MS = DEADLINES.bootstrap_ms
PROBE_ROOM = 1 << 40
LOOK_EVERY_MS = 250
NETWORK_MS = 100
OPENS_MS = 500  # within which the last requests, too, are open on all sides
CALM_RENDEZVOUS_MS_MAX = 50


@attrs.define
class Result:
    """One run. `failure` is "" when it held; `kind` is what it begins with, which tells failures apart."""

    seed: int
    digest: str
    failure: str
    events: int
    virtual_ms: float
    rooms: int
    coverage: Counter[str]
    counts: Counter[str]
    outcomes: Counter[str]
    fates: dict[str, Fate]
    story: list[str]

    @property
    def kind(self) -> str:
        return self.failure.partition(":")[0]


class Simulation:
    """One run of one schedule. Not thread-safe, and one at a time in a process: it listens to the package's log."""

    def __init__(self, schedule: Schedule, *, story: bool = False, trace_path: str | os.PathLike[str] | None = None) -> None:
        self.schedule = schedule
        self.options = schedule.options
        self.trace_path = trace_path
        self.agenda = Agenda(story=story)
        self.fates = Fates(schedule)
        self.rendezvous = SlowRendezvous(self)
        self.network = Network(self)
        self.fabric = Fabric(self)
        self.coverage: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.starved = False
        self.breached = ""
        self._attempts = 0
        self._processes: dict[bytes, Process] = {}
        self._up: dict[str, Process] = {}  # by node
        self._listening: dict[str, Process] = {}  # by address
        self._lives: Counter[str] = Counter()
        self._healed = False
        self._log: list[str] = []

    # --- who there is ----------------------------------------------------------------------------------------------------

    def process(self, incarnation: bytes) -> Process:
        return self._processes[incarnation]

    def listening(self, address: str) -> Process | None:
        """The process at an address."""
        return self._listening.get(address)

    def running(self) -> list[Process]:
        return list(self._up.values())

    def next_attempt(self) -> int:
        self._attempts += 1
        return self._attempts

    def start(self, node: str) -> None:
        if node in self._up:
            return
        self._lives[node] += 1
        address = self._address(node)
        process = Process(self, node, self._lives[node], address)
        self.agenda.note(f"{process.name} starts at {address}")
        self._processes[process.incarnation] = self._up[node] = self._listening[address] = process
        process.wake()

    def _address(self, node: str) -> str:
        """Where the next life of a node listens: where nodes of that name do, or at any free place of its kind."""
        prefills, decodes = sched.names(self.options)
        own = prefills if node in prefills else decodes
        free = [address for address in (*own, *(f"{name}b" for name in own)) if address not in self._listening]
        moves = self._lives[node] > 1 and self.fates.one("moves", node) < self.options.moves
        if moves or node not in free:
            return free[int(self.fates.one("address", node) * len(free))]
        return node

    def went_down(self, process: Process) -> None:
        """It ended, by itself or not: it is started again."""
        del self._up[process.node], self._listening[process.address]
        self.counts.update(process.core.counts)
        if not self._healed or process.restart_ms:
            delay_ms = 0.0 if self._healed else process.restart_ms
            self.agenda.after(delay_ms, lambda: self.start(process.node))

    def breach(self, what: str) -> NoReturn:
        """Something that must never happen was seen inside of a driver's call of its transport. The driver goes on whatever that
        raises, so it is kept, and the run ends with it."""
        self.breached = self.breached or what
        raise Violation(what)

    def logged(self) -> str:
        return "; ".join(self._log)

    # --- the run ---------------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        failure = ""
        with self._listening_to_the_log():
            try:
                self._safety()
                self._heal()
                self._liveness()
            except Violation as violation:
                failure = str(violation)
            except Exception as error:  # noqa: BLE001 - whatever a session raises into its engine, or an assertion of its core, is a finding
                where = traceback.extract_tb(error.__traceback__)[-1]
                failure = f"{type(error).__name__} in {where.name}: {error}"
            finally:
                self._end()
        if failure:
            self.agenda.note(f"VIOLATION {failure}")
        return Result(
            self.schedule.seed,
            self.agenda.digest(),
            failure,
            self.agenda.events,
            self.agenda.now_ms,
            self._attempts,
            self.coverage,
            self.counts,
            self.outcomes,
            self.fates.taken,
            self.agenda.story or [],
        )

    def _safety(self) -> None:
        for nodes in sched.names(self.options):
            for node in nodes:
                self.start(node)
        for act in self.schedule.acts:
            self._plan(act)
        self.agenda.run(self.options.horizon_ms, STEPS_MAX)

    def _heal(self) -> None:
        for process in self.running():
            msgspec.json.encode(process.session.describe())  # whatever state it is in, an operator can look at it
        self.agenda.note("everything is healed")
        self._healed = self.fates.healed = True
        self.rendezvous.down_until_ms = 0.0
        for process in self.running():
            process.thaw()
            if process.misfit:
                process.kill()
        for nodes in sched.names(self.options):
            for node in nodes:
                self.start(node)
        self.fabric.heal()
        self.network.heal()

    def _liveness(self) -> None:
        self.agenda.run(self.agenda.now_ms + OPENS_MS, STEPS_MAX)
        self._until(self._unsettled, CONCLUDE_MS, "not concluded")
        self._check_ends()
        self.agenda.run(
            self.options.horizon_ms + 2 * self.options.delay_ms_max + NETWORK_MS, STEPS_MAX
        )  # the last late frame has come
        self._until(lambda: [text for process in self.running() for text in process.leftovers()], FORGET_MS, "not forgotten")
        for process in self.running():
            process.pool.check_idle(process.name)
        self._probe()

    def _unsettled(self) -> list[str]:
        """Rooms that have not concluded, pages that are not back, processes that are about to end or to begin."""
        up = self.running()
        found = [text for process in up for text in process.engine.unfinished()]
        found += [f"{process.name} is still about to end" for process in up if process.ending]
        found += [f"{process.name} is not registered" for process in up if not process.rendezvous.registered]
        missing = {node for nodes in sched.names(self.options) for node in nodes} - {process.node for process in up}
        return found + [f"{node} has not been started again" for node in sorted(missing)]

    def _check_ends(self) -> None:
        """Where nothing happened that a room could fail of, none failed; and where messages and writes took no harm, whoever waited
        for a side that had failed was told, and did not wait until its deadline."""
        acts, options = self.schedule.acts, self.options
        rooms = [act.room for act in acts if isinstance(act, Serve)]
        ordinary = all(
            isinstance(fate, sched.FrameFate) and not fate.lost and not fate.delay_ms for fate in self.fates.taken.values()
        )
        roomy = (
            not options.small_limits
            and not options.misfits
            and not self.starved
            and options.rendezvous_ms <= CALM_RENDEZVOUS_MS_MAX
        )
        harmless = all(isinstance(act, (Serve, sched.Garbage, sched.Abort, sched.Cancel)) for act in acts)
        if not ordinary or not roomy or not harmless or len(set(rooms)) != len(rooms):
            return
        wrong = any(isinstance(act, (sched.Abort, sched.Cancel)) or (isinstance(act, Serve) and act.tokens_off) for act in acts)
        attempts = [attempt for process in self.running() for attempt in process.engine.attempts()]
        for attempt in attempts:
            others = [other for other in attempts if other.handle.room == attempt.handle.room and other.sends != attempt.sends]
            if not wrong and not attempt.succeeded:
                raise Violation(f"failed without a cause: {attempt}, and nothing had happened to it: {attempt.failure}")
            met = len(others) == 1 and len(attempt.serve.decodes) == 1 and others[0].left != Phase.BOOTSTRAPPING
            if attempt.sends:  # one that is opened after decode has given up is not told: decode may try again
                met = met and others[0].ended_ms > attempt.opened_ms
            if met and attempt.failure is not None and attempt.failure.cause == "timeout":
                raise Violation(f"told nobody: {others[0]} ended ({others[0].failure}), and {attempt} waited: {attempt.failure}")

    def _probe(self) -> None:
        """After all that, every prefill still serves every decode."""
        prefills, decodes = sched.names(self.options)
        for index, (prefill, decode) in enumerate((p, d) for p in prefills for d in decodes):
            serve = Serve(
                at_ms=self.agenda.now_ms,
                room=PROBE_ROOM + index,
                prefill=prefill,
                decodes=(decode,),
                chunks=(1, 1),
                prefill_ms=0.0,
                decode_ms=(0.0,),
                compute_ms=1.0,
            )
            self._plan(serve)
        self.agenda.run(self.agenda.now_ms + PROBE_MS, STEPS_MAX)
        for process in self.running():
            for attempt in process.engine.attempts():
                if attempt.handle.room >= PROBE_ROOM and not attempt.succeeded:
                    pair = f"{attempt.serve.prefill} does not serve {attempt.serve.decodes[0]} any more"
                    raise Violation(f"probe failed: {pair}, as {process.name} sees it: {attempt.failure}")

    def _until(self, left: Callable[[], list[str]], within_ms: float, what: str) -> None:
        by_ms = self.agenda.now_ms + within_ms
        while found := left():
            if self.agenda.now_ms >= by_ms:
                raise Violation(f"{what}: {within_ms:.0f} ms after everything was healed, {'; '.join(found[:4])}")
            self.agenda.run(min(by_ms, self.agenda.now_ms + LOOK_EVERY_MS), STEPS_MAX)

    def _end(self) -> None:
        self._healed = True
        for process in self.running():
            process.restart_ms = 0.0
            process.kill()

    # --- what is done ----------------------------------------------------------------------------------------------------

    def _plan(self, act: sched.Act) -> None:
        if isinstance(act, Serve):
            self._on(act.prefill, act.at_ms + act.prefill_ms, lambda process: process.engine.open_send(act))
            for node, delay_ms in zip(act.decodes, act.decode_ms, strict=True):
                self._on(node, act.at_ms + delay_ms, lambda process: process.engine.open_receive(act))
        elif isinstance(act, (sched.Cut, sched.Outage, sched.Reset, sched.Overflow)):
            self.agenda.at(act.at_ms, lambda: self._strike(act))
        elif act.at_ms <= self.options.horizon_ms:
            self._on(
                act.node, act.at_ms, lambda process: self._do(process, act), at_once=isinstance(act, (sched.Crash, sched.Garbage))
            )

    def _on(self, node: str, at_ms: float, action: Callable[[Process], None], *, at_once: bool = False) -> None:
        """Whoever lives at `node` then does it; a stopped process when it is woken, unless it is done to it (`at_once`)."""

        def arrive() -> None:
            process = self._up.get(node)
            if process is not None:
                if at_once:
                    action(process)
                else:
                    process.do(lambda: action(process))

        self.agenda.at(at_ms, arrive)

    def _do(self, process: Process, act: sched.Act) -> None:
        agenda = self.agenda
        agenda.note(f"{process.name}: {act}")
        if isinstance(act, sched.Abort):
            process.engine.abort(act.room)
        elif isinstance(act, sched.Cancel):
            process.engine.cancel(act.room)
        elif isinstance(act, sched.Crash):
            process.restart_ms = act.for_ms
            process.kill()
        elif isinstance(act, sched.Freeze):
            process.freeze()
            agenda.after(act.for_ms, process.thaw)
        elif isinstance(act, sched.Drain):
            process.begin_drain(DRAIN_MS, act.for_ms)
        elif isinstance(act, sched.Close):
            process.begin_close(act.for_ms)
        elif isinstance(act, sched.Garbage):
            self.network.garbage(process, act.salt)

    def _strike(self, act: sched.Act) -> None:
        if self._healed:
            return
        self.agenda.note(str(act))
        if isinstance(act, sched.Cut):
            self.network.cut(act.source, act.target, act.for_ms)
        elif isinstance(act, sched.Outage):
            self.rendezvous.down_until_ms = max(self.rendezvous.down_until_ms, self.agenda.now_ms + act.for_ms)
        elif isinstance(act, (sched.Reset, sched.Overflow)):
            source = self._up.get(act.source)
            for peer in list(source.core.peers) if source is not None else []:
                if source is not None and self.process(peer).node == act.target:
                    broke = ev.PeerUnreachable(peer, "the connection was reset")
                    full = ev.PeerOverflowed(peer, "it does not read (Limits.outbox_messages_max)")
                    source.emit(broke if isinstance(act, sched.Reset) else full)

    @contextlib.contextmanager
    def _listening_to_the_log(self) -> Iterator[None]:
        """What a driver swallows, so that one bug does not end it, is a finding here; and the log stays silent."""

        class Keep(logging.Handler):
            def __init__(self, lines: list[str]) -> None:
                super().__init__(logging.ERROR)
                self.lines = lines

            def emit(self, record: logging.LogRecord) -> None:
                error = record.exc_info[1] if record.exc_info else None
                frames = traceback.extract_tb(error.__traceback__) if error is not None else []
                where = f" in {frames[-1].name}" if frames else ""
                self.lines.append(f"{type(error).__name__}{where}: {error}" if error is not None else record.getMessage())

        handler, propagated = Keep(self._log), logger.propagate
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagated


def simulate(seed: int, *, story: bool = False, trace_path: str | os.PathLike[str] | None = None) -> Result:
    """Run one seed. With `trace_path`, every step of every session is appended to that file as NDJSON, for `pd-fsm timeline`."""
    return Simulation(draw_schedule(seed), story=story, trace_path=trace_path).run()


def replay(schedule: Schedule, *, story: bool = False) -> Result:
    """Run a schedule as it is."""
    return Simulation(schedule, story=story).run()
