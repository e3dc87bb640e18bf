"""The demo: a small disaggregated engine serves real text while requests are aborted in every phase and a worker is killed.

Every process is real: a bootstrap server, prefill and decode workers, and this one, which plays the clients, the supervisor and,
after the run, the judge. It ends with a table, the checks of `report.py`, and pictures of all rooms under `--out`. This module only
stages and observes: what happened is said by the workers, the traces and the one-process run of the same model.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import attrs
import msgspec
import torch

from pd_fsm.errors import PdError
from pd_fsm.examples.engine import report, scenario
from pd_fsm.examples.engine.display import Display, Running, make_display
from pd_fsm.examples.engine.messages import Hello, Hold, Role
from pd_fsm.examples.engine.model import Model, ModelConfig
from pd_fsm.examples.engine.processes import ChildDied, Processes
from pd_fsm.examples.engine.reference import generate
from pd_fsm.examples.engine.router import SIDES, Request, Router
from pd_fsm.examples.engine.tokens import encode
from pd_fsm.runtime.timeline import timeline

RUN_MAX_S = 90.0  # starting, serving and stopping, or it is given up
START_MAX_S = 40.0  # workers import torch, build the model and say hello
STOP_MAX_S = 25.0  # workers finish, report and exit
TURN_MS = 20  # one wait of the router
GRACE_MS = 10_000  # for a worker to learn from pd-fsm what became of its peer; after this the router tells it, and a check fails
SILENT_MS = 20_000  # the children are watched here; a machine that is merely slow must not look like a dead worker
RUNNING_MAX = 12  # requests under way at once, held ones included
PAUSE_MAX_S = 10.0  # a worker is stopped with SIGSTOP
WORKER_PAGES = 512
# Which sides are seen in a phase when a request is held there: decode holds in BOOTSTRAPPING by not opening its room, and after
# Success only decode goes on.
HELD_SIDES: dict[Hold, tuple[Role, ...]] = {
    "BOOTSTRAPPING": ("prefill",),
    "WAITING_FOR_INPUT": SIDES,
    "TRANSFERRING": SIDES,
    "SUCCESS": ("decode",),
}


class Trouble(Exception):  # noqa: N818 - reads as what it is
    """The run cannot go on; says why."""


@attrs.frozen
class Settings:
    transport: str = "zmq"
    prefill: int = 2
    decode: int = 1
    requests: int = 48
    seed: int = 0
    out: Path = Path("out/demo")


@attrs.define(eq=False)
class Job:
    """A request after it was sent."""

    number: int
    planned: scenario.Planned
    request: Request
    aborted: bool = False
    released: bool = False
    retried: bool = False

    @property
    def outcome(self) -> str:
        """Decode's word, except that a request which either side was asked to abort was aborted, not failed."""
        results = self.request.results.values()
        was_abort = self.request.outcome == "failed" and any(result.cause == "abort" for result in results)
        return "aborted" if was_abort else self.request.outcome

    @property
    def lost_worker(self) -> bool:
        return any(result.cause == report.WORKER_LOST for result in self.request.results.values())

    def served(self, expected: Sequence[int]) -> report.Served:
        request, planned = self.request, self.planned
        return report.Served(
            number=self.number,
            room=request.room,
            prompt_tokens=len(encode(request.prompt)),
            prefill=request.prefill,
            decode=request.decode,
            outcome=self.outcome,
            reason=request.reason,
            results=dict(request.results),
            tokens=tuple(request.tokens),
            expected=tuple(expected),
            was_told=request.aborted_by_router,
            aim=planned.aim,
            retry_of=planned.retry_of,
            is_probe=planned.is_probe,
            is_victim=planned.is_victim,
        )


class Demo:
    """One run: start, serve, stop. Raises Trouble, ChildDied or an error of the engine; the caller cleans up."""

    def __init__(self, settings: Settings, router: Router, processes: Processes, display: Display) -> None:
        self.settings = settings
        self.router = router
        self.processes = processes
        self.display = display
        self.give_up_s = time.monotonic() + RUN_MAX_S
        self.bootstrap_url = ""
        self.jobs: list[Job] = []
        self.waiting = deque(scenario.plan(settings.requests, settings.seed))
        self.traces: list[Path] = []
        self.killed_pid = 0

    # --- start -----------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        return [f"{role}-{index}" for role, count in self._counts().items() for index in range(count)]

    def _counts(self) -> dict[str, int]:
        return {"prefill": self.settings.prefill, "decode": self.settings.decode}

    def start(self) -> None:
        bootstrap = self.processes.start("bootstrap", ["-m", "pd_fsm.cli", "bootstrap", "--port", "0"])
        start_by_s = time.monotonic() + START_MAX_S
        while not (found := re.search(r"http://\S+", bootstrap.log.read_text(errors="replace"))):
            self._turn(start_by_s, "the bootstrap server to print its URL")
        self.bootstrap_url = found.group()
        for name in self.names:
            self._start_worker(name, life=1)
        while len(self.router.workers) < len(self.names):
            missing = sorted(set(self.names) - set(self.router.workers))
            self._turn(start_by_s, f"{', '.join(missing)} to say hello")
        self.display.note(f"serving on {', '.join(self.names)} over {self.settings.transport}, bootstrap at {self.bootstrap_url}")

    def _start_worker(self, name: str, life: int) -> None:
        role, index = name.split("-")
        trace = self.settings.out / "traces" / f"{name}.{life}.ndjson"
        self.traces.append(trace)
        options = {
            "role": role,
            "index": index,
            "dp-size": self._counts()[role],
            "router": self.router.endpoint,
            "bootstrap": self.bootstrap_url,
            "transport": self.settings.transport,
            "trace": trace,
            "seed": self.settings.seed,
            "pages": WORKER_PAGES,
        }
        arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
        self.processes.start(name, ["-m", "pd_fsm.examples.engine.worker", *arguments, "--with-parent"])

    # --- serve -----------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if not job.request.done]

    def serve(self) -> None:
        serve_by_s = self.give_up_s - STOP_MAX_S
        self._abort_before_contact()
        while self.waiting or self.running or not self._is_reborn():
            self._send_next()
            for job in self.running:
                self._abort_if_due(job)
            self._kill_if_due()
            self._retry_lost()
            self._turn(serve_by_s, f"requests {[job.number for job in self.running]} and {len(self.waiting)} not yet sent")

    def _turn(self, by_s: float, what: str, *, stopping: bool = False) -> None:
        """Let the router work for a moment, look after the children, and show how it goes. Raises when it takes too long."""
        for message in self.router.step(TURN_MS):
            if isinstance(message, Hello) and self.router.workers[message.worker].lives > 1:
                self._welcome_back(message)
        if not stopping:
            self.processes.check()
        running = [Running(job.number, job.request, job.planned.words) for job in self.running]
        outcomes = [job.outcome for job in self.jobs if job.request.done]
        self.display.update(self.router, running, outcomes, len(self.jobs) + len(self.waiting))
        if time.monotonic() > min(by_s, self.give_up_s):
            raise Trouble(f"it took too long; still waiting for {what}")

    def _send_next(self) -> None:
        alive = {worker.name: worker.role for worker in self.router.workers.values() if worker.alive}
        while self.waiting and len(self.running) < RUNNING_MAX and set(SIDES) <= set(alive.values()):
            planned = self.waiting.popleft()
            request = self.router.submit(planned.prompt, planned.max_new_tokens, hold=planned.hold, prefill=planned.prefill)
            self.jobs.append(Job(len(self.jobs) + 1, planned, request))

    def _abort_before_contact(self) -> None:
        """Abort on decode in BOOTSTRAPPING: it lasts only until the first handshake with a prefill worker, so that one is stopped.

        Prefill has not heard of the room then, and decode knows nobody to tell: whoever sent the request tells both.
        """
        planned = self.waiting.popleft()
        paused, decode = f"prefill-{self.settings.prefill - 1}", "decode-0"
        with self.processes.paused(paused):
            request = self.router.submit(planned.prompt, planned.max_new_tokens, prefill=paused, decode=decode)
            self.jobs.append(Job(len(self.jobs) + 1, planned, request, aborted=True))
            by_s = time.monotonic() + PAUSE_MAX_S
            while request.phases.get("decode") != "BOOTSTRAPPING":
                self._turn(by_s, f"{decode} to open a room towards {paused}, which is stopped")
            self.router.abort(request.room, "the client left before the first contact")
            while "decode" not in request.results:
                self._turn(by_s, f"{decode} to give up a room towards {paused}, which is stopped")

    def _abort_if_due(self, job: Job) -> None:
        """Abort as soon as the phase that is aimed at was seen on every side that can be in it; no timing is involved."""
        if job.planned.aim is None:
            return
        (phase, side), request = job.planned.aim, job.request
        if not job.aborted and all(request.phases.get(each) == phase for each in HELD_SIDES[phase]):
            job.aborted = True
            self.router.abort(request.room, f"the client left, {side} aborts in {phase}", side)
        # Two holds outlive the abort: decode must open the room to learn that prefill gave it up, and a late abort changes nothing.
        must_learn = phase == "BOOTSTRAPPING" and side in request.results
        if job.aborted and not job.released and (must_learn or job.planned.aim == report.LATE_AIM):
            job.released = True
            self.router.release(request.room)

    # --- kill and restart ------------------------------------------------------------------------------------------------

    def _is_reborn(self) -> bool:
        return bool(self.killed_pid) and self.router.workers[scenario.KILLED].lives > 1

    def _kill_if_due(self) -> None:
        """Kill the worker once the rooms that are held on it are in flight, and no abort is under way that it would disturb."""
        victims = [job for job in self.jobs if job.planned.is_victim]
        if self.killed_pid or len(victims) < len(scenario.VICTIM_HOLDS):
            return
        for victim in victims:
            if victim.request.results:
                reasons = "; ".join(result.reason for result in victim.request.results.values())
                raise Trouble(
                    f"request {victim.number} should be in flight when {scenario.KILLED} is killed, but it ended: {reasons}"
                )
        in_flight = all(victim.request.phases.get(side) == victim.planned.hold for victim in victims for side in SIDES)
        aborting = any(job.planned.aim is not None and job.request.prefill == scenario.KILLED for job in self.running)
        if not in_flight or aborting:
            return
        self.killed_pid = self.processes.children[scenario.KILLED].pid
        rooms = sum(job.request.prefill == scenario.KILLED and "prefill" not in job.request.results for job in self.running)
        self.display.note(f"kill -9 {self.killed_pid} ({scenario.KILLED}) with {rooms} rooms in flight on it")
        self.processes.kill(scenario.KILLED, timeout_s=5.0)
        self.router.mark_dead(scenario.KILLED, "killed with SIGKILL")
        self._start_worker(scenario.KILLED, life=2)

    def _welcome_back(self, hello: Hello) -> None:
        probes = scenario.probes(self.settings.seed)
        self.display.note(f"{hello.worker} is back as pid {hello.pid}; {len(probes)} probes go to it")
        self.waiting.extendleft(probes)

    def _retry_lost(self) -> None:
        """What the kill cost is tried again as a new request in a new room; the failed one stays in the table."""
        lost: dict[str, list[Job]] = {}
        for job in self.jobs:
            if not job.retried and job.outcome == "failed" and job.lost_worker:
                job.retried = True
                lost.setdefault(job.request.reason, []).append(job)
        for reason, jobs in lost.items():
            self.waiting.extend(
                scenario.Planned(job.planned.prompt, job.planned.max_new_tokens, retry_of=job.number) for job in jobs
            )
            numbers = ", ".join(str(job.number) for job in jobs)
            self.display.note(f"failed and tried again in a new room: request {numbers} ({reason})")

    # --- stop ------------------------------------------------------------------------------------------------------------

    def stop(self) -> dict[str, int | None]:
        """Let the workers finish and report. Returns their exit codes."""
        self.router.stop()
        stop_by_s = time.monotonic() + STOP_MAX_S
        alive = [worker for worker in self.router.workers.values() if worker.alive]
        while not all((worker.name, worker.incarnation) in self.router.reports for worker in alive):
            missing = [worker.name for worker in alive if (worker.name, worker.incarnation) not in self.router.reports]
            self._turn(stop_by_s, f"the final report of {', '.join(missing)}", stopping=True)
        return {name: self.processes.exit_code(name, max(0.1, stop_by_s - time.monotonic())) for name in self.names}

    # --- judge -----------------------------------------------------------------------------------------------------------

    def evidence(self, exit_codes: dict[str, int | None]) -> report.Evidence:
        """Compute the reference, read the traces, draw the pictures."""
        torch.set_num_threads(1)
        model = Model(ModelConfig(seed=self.settings.seed))
        served = []
        for job in self.jobs:
            finished = job.outcome == "finished"
            expected = generate(model, encode(job.request.prompt), job.planned.max_new_tokens) if finished else []
            served.append(job.served(expected))
        out = self.settings.out
        lives = timeline(self.traces, svg=out / "timeline.svg", perfetto=out / "trace.perfetto.json")
        reports = {
            name: self.router.reports[name, worker.incarnation]
            for name, worker in self.router.workers.items()
            if (name, worker.incarnation) in self.router.reports
        }
        return report.Evidence(
            asked=self.settings.requests,
            served=served,
            killed=scenario.KILLED,
            killed_pid=self.killed_pid,
            workers=self.names,
            reports=reports,
            exit_codes=exit_codes,
            lives=lives,
        )


def run(settings: Settings, display: Display) -> bool:
    """The whole demo; True if every check is ok. Leaves no process behind, whatever happens."""
    started_s = time.monotonic()
    logs = settings.out / "logs"
    for folder, pattern in ((settings.out / "traces", "*.ndjson"), (logs, "*.log")):
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(pattern):  # of an earlier run: its lives must not be mixed up with this one's
            stale.unlink()
    with Processes(logs) as processes, Router(seed=settings.seed, grace_ms=GRACE_MS, silent_ms=SILENT_MS) as router:
        demo = Demo(settings, router, processes, display)
        with display:
            display.note(f"starting {', '.join(demo.names)}")
            demo.start()
            demo.serve()
            display.note(f"all {len(demo.jobs)} requests are answered; stopping the workers")
            exit_codes = demo.stop()
            display.note("computing the same requests in one process, to compare")
            evidence = demo.evidence(exit_codes)
    checks = report.judge(evidence)
    elapsed_s = round(time.monotonic() - started_s, 1)
    own: dict[str, Any] = {
        "transport": settings.transport,
        "prefill": settings.prefill,
        "decode": settings.decode,
        "seed": settings.seed,
        "elapsed_s": elapsed_s,
    }
    content = report.as_json(evidence, checks, own)
    (settings.out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    display.table(report.table(evidence))
    display.checks(checks)
    display.note(f"wrote timeline.svg, trace.perfetto.json and report.json to {settings.out}")
    return all(check.ok for check in checks)


def parse(argv: Sequence[str] | None) -> Settings:
    def at_least(minimum: int) -> Callable[[str], int]:
        def number(text: str) -> int:
            if not text.isdecimal() or int(text) < minimum:
                raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {minimum}")
            return int(text)

        return number

    default = Settings()
    parser = argparse.ArgumentParser(
        prog="pd-fsm demo", description="Serve real text on a small disaggregated engine, aborts and a kill -9 included."
    )
    parser.add_argument("--transport", default=default.transport, help="data transport of the workers (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=at_least(1), default=default.prefill, metavar="N", help="prefill workers (default: %(default)s)"
    )
    parser.add_argument(
        "--decode", type=at_least(1), default=default.decode, metavar="N", help="decode workers (default: %(default)s)"
    )
    parser.add_argument(
        "--requests",
        type=at_least(scenario.REQUESTS_MIN),
        default=default.requests,
        metavar="N",
        help=f"at least {scenario.REQUESTS_MIN} (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=at_least(0), default=default.seed, metavar="N", help="of weights, prompts and rooms (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=default.out, metavar="DIR", help="for pictures, report, traces and logs (default: %(default)s)"
    )
    return Settings(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 all checks hold, 1 one does not or the run broke off, 130 interrupted. SIGTERM is treated like Ctrl-C."""
    settings = parse(argv)

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return 0 if run(settings, make_display(sys.stdout)) else 1
    except KeyboardInterrupt:
        print("demo: interrupted; all workers were ended", file=sys.stderr)
        return 130
    except (Trouble, ChildDied, PdError, RuntimeError, OSError) as error:
        print(f"demo: {error}\ndemo: all workers were ended; their logs are in {settings.out / 'logs'}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    raise SystemExit(main())
