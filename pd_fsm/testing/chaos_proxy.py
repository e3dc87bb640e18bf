"""A TCP proxy on loopback that breaks the network between two processes: it resets, stalls one direction or both, delays, lies.

It owns one thread with an event loop, its listening socket and its connections. Its methods are for one other thread and return
when the change is in effect. "up" is from who connected to the target, "down" the way back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

READ_BYTES = 16 << 10
START_S = 5.0
LOOP_TURNS = 8  # more than asyncio needs from an accepted connection to its handler, or from close() to a closed socket
DIRECTIONS = ("up", "down")


class Proxy:
    """A context manager. Connections that come before `target` is set wait for it."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="chaos-proxy", daemon=True)
        self._target: tuple[str, int] | None = None
        self._known = asyncio.Event()
        self._open = {direction: asyncio.Event() for direction in DIRECTIONS}
        self._delay_s = 0.0
        self._lies: Iterator[bytes] | None = None
        self._ending = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def __enter__(self) -> Proxy:
        self._thread.start()
        self.resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)

    # --- faults --------------------------------------------------------------------------------------------------------------

    def target(self, endpoint: str) -> None:
        """Where connections lead from now on: host:port, with or without a scheme."""
        host, _, port = endpoint.rpartition("://")[2].rpartition(":")

        def change() -> None:
            self._target = host, int(port)
            self._known.set()

        self._do(change)

    def stall(self, *directions: str) -> None:
        """Bytes stop here; the connections stay open. Both directions: half-open, as behind a cable that was pulled."""

        def change() -> None:
            for direction in directions or DIRECTIONS:
                self._open[direction].clear()

        self._do(change)

    def resume(self) -> None:
        """Everything flows again, what was held back first; no more delay, no more lies."""

        def change() -> None:
            self._delay_s, self._lies = 0.0, None
            for event in self._open.values():
                event.set()

        self._do(change)

    def reset(self) -> None:
        """Every connection ends with RST at both ends; what it held is lost. New ones are served."""

        def change() -> None:
            for writer in self._writers:
                end: socket.socket = writer.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

        self._do(change)

    def delay(self, seconds: float) -> None:
        """Answers come this much later."""

        def change() -> None:
            self._delay_s = seconds

        self._do(change)

    def lie(self, answers: Sequence[bytes]) -> None:
        """New connections get these bytes in turn instead of an answer."""

        def change() -> None:
            self._lies = itertools.cycle(answers)

        self._do(change)

    # --- the thread ----------------------------------------------------------------------------------------------------------

    def _do(self, change: Callable[[], None]) -> None:
        done = threading.Event()

        def run() -> None:
            change()
            done.set()

        self._loop.call_soon_threadsafe(run)
        if not done.wait(START_S):
            raise TimeoutError(f"the proxy at port {self.port} did not react within {START_S} s")

    def _run(self) -> None:
        loop = self._loop
        server = loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket))
        try:
            loop.run_forever()
        finally:
            loop.run_until_complete(self._end(server))
            loop.close()

    async def _end(self, server: asyncio.AbstractServer) -> None:
        """Close everything, connections that are just being accepted or made too."""
        server.close()
        self._ending = True
        await self._turns()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._turns()

    async def _turns(self) -> None:
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._ending:
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ends = [writer]
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                if self._lies is not None:
                    await reader.read(READ_BYTES)
                    writer.write(next(self._lies))
                    await writer.drain()
                    return
                await self._known.wait()
                assert self._target is not None
                far_reader, far = await asyncio.open_connection(*self._target)
                ends.append(far)
                self._writers.add(far)
                pipes = [
                    asyncio.ensure_future(self._pipe(reader, far, "up")),
                    asyncio.ensure_future(self._pipe(far_reader, writer, "down")),
                ]
                try:
                    await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for pipe in pipes:
                        pipe.cancel()
                    await asyncio.gather(*pipes, return_exceptions=True)
        finally:
            self._tasks.discard(task)
            for end in ends:
                self._writers.discard(end)
                end.close()

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        """Until one end closes or breaks."""
        while data := await reader.read(READ_BYTES):
            if direction == "down" and self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._open[direction].wait()
            writer.write(data)
            await writer.drain()
