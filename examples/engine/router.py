"""The router: gives every request a room number, sends it to one prefill and one decode worker, and collects what both say.

One object without a thread; its owner calls `step()` in a loop. It must never see KV data, and never decides what became of a
transfer: workers learn that from pd-fsm and tell it here. It only steps in where a worker cannot speak any more, so that every
request has an end: a dead worker's result is made up, and the other side gets `grace_ms` to learn it from pd-fsm before it is told.
"""

from __future__ import annotations

import random
from types import TracebackType

import attrs
import zmq

from pd_fsm.examples.engine import messages as m
from pd_fsm.examples.engine.messages import now_ms
from pd_fsm.examples.engine.model import CHUNK_TOKENS
from pd_fsm.examples.engine.tokens import encode

SIDES: tuple[m.Role, m.Role] = ("prefill", "decode")


@attrs.define
class WorkerState:
    """What the router knows about the present life of a worker."""

    name: str
    role: m.Role
    index: int
    pid: int
    incarnation: str
    address: bytes  # ZeroMQ's routing id of this life's connection
    heard_ms: float
    alive: bool = True
    lives: int = 1


@attrs.define(eq=False)
class Request:
    room: int
    prompt: str
    max_new_tokens: int
    hold: m.Hold | None
    workers: dict[m.Role, str]
    submitted_ms: float
    deadline_ms: float
    aborted_by_router: bool = False
    finished_ms: float | None = None
    phases: dict[m.Role, str] = attrs.field(factory=dict)  # the last phase that each side has reported
    results: dict[m.Role, m.Result] = attrs.field(factory=dict)

    @property
    def prefill(self) -> str:
        return self.workers["prefill"]

    @property
    def decode(self) -> str:
        return self.workers["decode"]

    @property
    def done(self) -> bool:
        return len(self.results) == len(SIDES)

    @property
    def outcome(self) -> str:
        """The word of decode, which has the tokens: "finished", "aborted" or "failed"; "" while a side has not answered."""
        return self.results["decode"].outcome if self.done else ""

    @property
    def reason(self) -> str:
        return self.results["decode"].reason if self.done else ""

    @property
    def tokens(self) -> list[int]:
        return self.results["decode"].tokens if "decode" in self.results else []


class Router:
    """Binds a socket at once; close it, or use it as a context manager. Owned by one thread."""

    def __init__(
        self,
        seed: int = 0,
        request_deadline_ms: float = 60_000,
        grace_ms: float = 5_000,
        silent_ms: float = 5_000,
        endpoint: str = "tcp://127.0.0.1:0",
    ) -> None:
        self._rng = random.Random(seed)
        self._request_deadline_ms = request_deadline_ms
        self._grace_ms = grace_ms
        self._silent_ms = silent_ms
        self._turn = dict.fromkeys(SIDES, 0)
        self._events: list[m.ToRouter] = []
        self.workers: dict[str, WorkerState] = {}
        self.requests: dict[int, Request] = {}
        self.reports: dict[tuple[str, str], m.Report] = {}
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a worker whose connection is gone is an error, not a lost message
        self._socket.bind(endpoint)
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    # --- requests --------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str,
        max_new_tokens: int,
        hold: m.Hold | None = None,
        prefill: str | None = None,
        decode: str | None = None,
    ) -> Request:
        """Dispatch a request to the named workers, or to the next ones alive. Raises RuntimeError if there is none."""
        tokens = encode(prompt)
        if hold == "TRANSFERRING" and len(tokens) <= CHUNK_TOKENS:
            raise ValueError(f"a prompt of {len(tokens)} tokens is one chunk, so it cannot be held between two; use a longer one")
        workers = {"prefill": self._pick("prefill", prefill), "decode": self._pick("decode", decode)}
        room = self._rng.getrandbits(63)
        while room in self.requests:
            room = self._rng.getrandbits(63)
        now = now_ms()
        names: dict[m.Role, str] = {side: workers[side].name for side in SIDES}
        request = Request(room, prompt, max_new_tokens, hold, names, now, now + self._request_deadline_ms)
        self.requests[room] = request
        for side in SIDES:
            self._send(workers[side], m.Serve(room, tokens, max_new_tokens, workers["prefill"].index, hold))
        return request

    def abort(self, room: int, reason: str, side: m.Role | None = None) -> None:
        """Ask one side, or both, to give the request up. Without effect on a side that has answered."""
        self._tell(room, m.Abort(room, reason), side)

    def release(self, room: int) -> None:
        """End the hold of a request."""
        self._tell(room, m.Release(room), None)

    def stop(self) -> None:
        """Ask all workers to finish, report and exit."""
        for worker in self.workers.values():
            self._send(worker, m.Stop())

    # --- the loop --------------------------------------------------------------------------------------------------------

    def step(self, timeout_ms: int) -> list[m.ToRouter]:
        """Wait for messages, at most `timeout_ms`, handle all that are there, then deadlines. Returns what happened, in order."""
        timeout_ms = 0 if self._events else timeout_ms
        while self._socket.poll(timeout_ms):
            address, frame = self._socket.recv_multipart()
            timeout_ms = 0
            message = m.decode_to_router(frame)
            if message is not None:
                self._handle(address, message)
        self._watch()
        events, self._events = self._events, []
        return events

    def mark_dead(self, name: str, reason: str) -> None:
        """The worker's process is gone: answer for it. Whoever supervises the processes knows this first."""
        worker = self.workers[name]
        if not worker.alive:
            return
        worker.alive = False
        for request in self.requests.values():
            for side in SIDES:
                if request.workers[side] == name:
                    self._make_up(request, side, "worker_lost", f"worker {name} (pid {worker.pid}) died: {reason}")

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- inside ----------------------------------------------------------------------------------------------------------

    def _pick(self, role: m.Role, name: str | None) -> WorkerState:
        alive = [w for w in self.workers.values() if w.alive and w.role == role and name in (None, w.name)]
        if not alive:
            raise RuntimeError(f"no {role} worker {name or ''} is alive; known are {sorted(self.workers) or 'none'}")
        worker = alive[self._turn[role] % len(alive)]
        self._turn[role] += 1
        return worker

    def _tell(self, room: int, message: m.Abort | m.Release, side: m.Role | None) -> None:
        request = self.requests[room]
        for each in SIDES if side is None else (side,):
            if each not in request.results:
                self._send(self.workers[request.workers[each]], message)

    def _send(self, worker: WorkerState, message: m.ToWorker) -> None:
        if not worker.alive:
            return
        try:
            self._socket.send_multipart((worker.address, m.encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.mark_dead(worker.name, f"its connection is gone ({error})")

    def _handle(self, address: bytes, message: m.ToRouter) -> None:
        known = self.workers.get(message.worker)
        if isinstance(message, m.Hello):
            if known is None or known.incarnation != message.incarnation:
                self._met(address, message)
                self._events.append(message)
            else:
                known.heard_ms = now_ms()
            return
        if known is None or known.address != address:
            return  # from a life that has been answered for
        known.heard_ms = now_ms()
        self._events.append(message)
        if isinstance(message, m.Report):
            self.reports[message.worker, message.incarnation] = message
            return
        request = self.requests.get(message.room)
        if request is None:
            return
        if isinstance(message, m.Progress):
            request.phases[message.side] = message.phase
        elif message.side not in request.results:
            self._answered(request, message)

    def _met(self, address: bytes, hello: m.Hello) -> None:
        """A worker's first Hello in this life."""
        known = self.workers.get(hello.worker)
        if known is not None:
            self.mark_dead(hello.worker, "it was started again")
        lives = 1 if known is None else known.lives + 1
        self.workers[hello.worker] = WorkerState(
            hello.worker, hello.role, hello.index, hello.pid, hello.incarnation, address, now_ms(), lives=lives
        )

    def _answered(self, request: Request, result: m.Result) -> None:
        request.results[result.side] = result
        if request.done:
            request.finished_ms = now_ms()
        elif result.outcome != "finished":
            request.deadline_ms = min(request.deadline_ms, now_ms() + self._grace_ms)

    def _make_up(self, request: Request, side: m.Role, cause: str, reason: str) -> None:
        """Answer in the place of a worker that cannot."""
        if side in request.results:
            return
        result = m.Result(request.workers[side], request.room, side, "failed", "FAILED", reason, cause, request.workers[side])
        self._events.append(result)
        self._answered(request, result)

    def _watch(self) -> None:
        now = now_ms()
        for worker in self.workers.values():
            if worker.alive and now - worker.heard_ms > self._silent_ms and (worker.name, worker.incarnation) not in self.reports:
                self.mark_dead(worker.name, f"silent for {self._silent_ms:.0f} ms")
        for request in self.requests.values():
            if request.done or now < request.deadline_ms:
                continue
            if not request.aborted_by_router:
                request.aborted_by_router = True
                request.deadline_ms = now + self._grace_ms
                self.abort(request.room, "the router gave the request up: " + self._what_is_missing(request))
                continue
            for side in SIDES:
                self._make_up(request, side, "router", f"{request.workers[side]} did not answer, not even to an abort")

    def _what_is_missing(self, request: Request) -> str:
        if not request.results:
            return f"it was not done after {self._request_deadline_ms:.0f} ms"
        [result] = request.results.values()
        return f"{result.worker} is done with it ({result.outcome}: {result.reason or 'no reason'})"
