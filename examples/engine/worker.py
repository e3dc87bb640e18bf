"""One worker process: `python -m pd_fsm.examples.engine.worker --role decode --index 0 --router tcp://... --bootstrap http://...`.

It owns the process: model, memory, session, the socket to the router, signals, and the loop. The session has a thread of its own,
so handshakes and writes go on while the loop computes; the loop itself waits nowhere but on the router's socket, and for no longer
than a few milliseconds while rooms are live.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType

import torch
import zmq

import pd_fsm
from pd_fsm.examples.engine import messages as m
from pd_fsm.examples.engine.decode import DecodeWorker
from pd_fsm.examples.engine.model import Model, ModelConfig
from pd_fsm.examples.engine.prefill import PrefillWorker
from pd_fsm.examples.engine.scheduler import Scheduler

HELLO_EVERY_MS = 500
IDLE_WAIT_MS = 100  # nothing runs: the router's socket is all there is to wait for
LIVE_WAIT_MS = 2  # rooms are live but there is nothing to compute: look at their phases again soon

# Short enough for a demo of a minute; a deployment would start from the defaults.
DEADLINES = pd_fsm.Deadlines(bootstrap_ms=30_000, waiting_ms=30_000, transfer_ms=15_000, heartbeat_ms=500, lost_ms=6_000)


class RouterLink:
    """The socket to the router. Never blocks but in `receive`, and there only as long as it is told."""

    def __init__(self, endpoint: str, hello: m.Hello) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._hello = hello
        self._hello_due_ms = 0.0

    def receive(self, timeout_ms: int) -> Iterator[m.ToWorker]:
        """Wait for a message, then yield all that are there."""
        while self._socket.poll(timeout_ms):
            timeout_ms = 0
            message = m.decode_to_worker(self._socket.recv())
            if message is not None:
                yield message

    def send(self, message: m.ToRouter) -> None:
        try:
            self._socket.send(m.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            print(f"{self._hello.worker}: the router does not read; dropped {message}", file=sys.stderr)

    def say_hello(self) -> None:
        """At the start, and then as the sign of life."""
        if m.now_ms() >= self._hello_due_ms:
            self._hello_due_ms = m.now_ms() + HELLO_EVERY_MS
            self.send(self._hello)

    def __enter__(self) -> RouterLink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close(linger=1000)
        self._context.term()


class Loop:
    """The worker's main loop, from the first Hello to the final report."""

    def __init__(self, link: RouterLink, scheduler: Scheduler, drain_ms: float, parent: int | None) -> None:
        self._link = link
        self._scheduler = scheduler
        self._drain_ms = drain_ms
        self._parent = parent
        self._stop_by_ms: float | None = None

    def stop(self, _signal: int = 0, _frame: FrameType | None = None) -> None:
        """Take nothing new, finish what runs. Safe as a signal handler."""
        if self._stop_by_ms is None:
            self._stop_by_ms = m.now_ms() + self._drain_ms

    def run(self) -> None:
        worked = False
        while not self._finished():
            self._link.say_hello()
            for message in self._link.receive(0 if worked else IDLE_WAIT_MS if self._scheduler.idle else LIVE_WAIT_MS):
                self._handle(message)
            worked = self._scheduler.step()
            while self._scheduler.outbox:
                self._link.send(self._scheduler.outbox.popleft())
            if self._parent is not None and os.getppid() != self._parent:
                self.stop()

    def _handle(self, message: m.ToWorker) -> None:
        match message:
            case m.Serve(room=room):
                self._scheduler.serve(message)
                if self._stop_by_ms is not None:
                    self._scheduler.abort(room, f"{self._scheduler.name} is stopping")
            case m.Abort(room=room, reason=reason):
                self._scheduler.abort(room, reason)
            case m.Release(room=room):
                self._scheduler.release(room)
            case m.Stop():
                self.stop()

    def _finished(self) -> bool:
        """Drained, or out of patience: after one drain time the rest is aborted, after two its memory is reported missing."""
        if self._stop_by_ms is None:
            return False
        late_ms = m.now_ms() - self._stop_by_ms
        if late_ms > 0:
            for room in list(self._scheduler.requests):
                self._scheduler.abort(room, f"{self._scheduler.name} stopped before the request was finished")
        return self._scheduler.idle or late_ms > self._drain_ms


def run(args: argparse.Namespace) -> None:
    name = f"{args.role}-{args.index}"
    torch.set_num_threads(1)
    model = Model(ModelConfig(seed=args.seed))
    cache = model.new_cache(args.pages, args.rows)
    session = pd_fsm.open_session(
        role=args.role,
        kv=cache.layout(),
        transport=args.transport,
        rendezvous=args.bootstrap,
        topology=pd_fsm.Topology(dp_rank=args.index, dp_size=args.dp_size),
        name=name,
        deadlines=DEADLINES,
        trace=args.trace,
        thread=True,
    )
    hello = m.Hello(name, args.role, args.index, os.getpid(), session.incarnation.hex())
    with session, RouterLink(args.router, hello) as link:
        worker = PrefillWorker if args.role == "prefill" else DecodeWorker
        scheduler = worker(name, model, cache, session)
        loop = Loop(link, scheduler, args.drain_s * 1000, os.getppid() if args.with_parent else None)
        for number in (signal.SIGTERM, signal.SIGINT):  # Ctrl-C reaches every process of a terminal: the same orderly end
            signal.signal(number, loop.stop)
        loop.run()
        link.send(scheduler.report(hello.incarnation))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.examples.engine.worker", description="A worker of the example engine.")
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--index", type=int, default=0, help="data-parallel rank of this worker in its role")
    parser.add_argument("--dp-size", type=int, default=1, help="number of workers of this role")
    parser.add_argument("--router", required=True, help="the router's endpoint, as tcp://HOST:PORT")
    parser.add_argument("--bootstrap", required=True, help="the bootstrap server, as http://HOST:PORT")
    parser.add_argument("--transport", default="zmq")
    parser.add_argument("--trace", default=None, help="write the session's trace to this NDJSON file")
    parser.add_argument("--seed", type=int, default=0, help="the model's weights; the same for all workers")
    parser.add_argument("--pages", type=int, default=256, help="pages of the KV cache")
    parser.add_argument("--rows", type=int, default=32, help="aux rows: the most requests that hold memory at once")
    parser.add_argument("--drain-s", type=float, default=10.0, help="how long running requests may take after Stop or SIGTERM")
    parser.add_argument("--with-parent", action="store_true", help="stop when the process that started this one is gone")
    args = parser.parse_args(argv)
    try:
        run(args)
    except (pd_fsm.PdError, zmq.ZMQError, ValueError, OSError) as error:
        print(f"{args.role}-{args.index}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
