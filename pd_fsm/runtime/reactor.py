"""Readiness of sockets, for one driver at a time. Owns the epoll set; knows nothing about messages.

ZeroMQ signals through an edge-triggered descriptor: the edge may be consumed by any call on the socket, so a socket that was
used is looked at again (`touch`) before anybody sleeps. Waiting uses descriptors only, so a thread may wait here while another
one drives.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

import attrs
import zmq

HANDLER_MESSAGES_MAX = 64
"""How much one handler should do before it lets the others run."""
CHECK_MS = 10.0
_POLLIN = int(zmq.POLLIN)  # the enum's `&` costs more than the look at the socket


def readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message waits. Asking costs less than the exception of a receive that finds nothing."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _POLLIN)


@attrs.define(eq=False)
class Source:
    """A registered socket or descriptor. `on_ready` returns True while there is more to do."""

    fd: int
    socket: zmq.Socket[bytes] | None
    on_ready: Callable[[], bool]


class Reactor:
    """`wake` may be called from any thread, `wait` from one; the rest only by whoever drives."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._sources: dict[int, Source] = {}
        self._checks: list[Callable[[], bool]] = []
        self._hot: dict[int, Source] = {}  # to be looked at in the next dispatch, whatever epoll says
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waiting = False
        self._closed = False
        self._epoll.register(self._wake_read, select.EPOLLIN)

    def add_socket(self, socket: zmq.Socket[bytes], on_ready: Callable[[], bool]) -> Source:
        return self._add(Source(int(socket.getsockopt(zmq.FD)), socket, on_ready))

    def add_fd(self, fd: int, on_ready: Callable[[], bool]) -> Source:
        return self._add(Source(fd, None, on_ready))

    def _add(self, source: Source) -> Source:
        self._sources[source.fd] = source
        self._epoll.register(source.fd, select.EPOLLIN)
        self._hot[source.fd] = source  # whatever happened before the registration
        return source

    def remove(self, source: Source) -> None:
        """Forget a source; call it before the descriptor is closed. Idempotent."""
        if self._sources.get(source.fd) is source:
            del self._sources[source.fd]
            self._hot.pop(source.fd, None)
            self._epoll.unregister(source.fd)

    def touch(self, source: Source) -> None:
        """The socket was used: its edge may be gone, so look at it again."""
        self._hot[source.fd] = source

    def add_check(self, done: Callable[[], bool]) -> None:
        """Call `done` at each dispatch, at least every CHECK_MS, until it returns True: for what has no descriptor."""
        self._checks.append(done)

    def wake(self) -> None:
        """End a `wait` that is going on; costs nothing when nobody waits."""
        if self._waiting:
            try:
                os.write(self._wake_write, b"w")
            except (BlockingIOError, OSError):  # full: the waiter wakes anyway; closed: nobody waits
                return

    def wait(self, timeout_ms: float, has_work: Callable[[], bool]) -> None:
        """Sleep until a descriptor is readable, `wake` is called, or the time is over. Not at all when `has_work()`."""
        if self._hot:
            return
        if self._closed:  # nothing will come any more
            time.sleep(max(timeout_ms, 0) / 1e3)
            return
        self._waiting = True
        try:
            # Whoever appends work looks at `_waiting` afterwards, so either it is seen here or the pipe is written.
            if not has_work():
                self._epoll.poll(max(min(timeout_ms, CHECK_MS) if self._checks else timeout_ms, 0) / 1e3, 1)
        finally:
            self._waiting = False

    def dispatch(self) -> bool:
        """Run the handlers of everything that is ready, once. True when something was."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake_read:
                self._drain_wakes()
            else:
                source = self._sources.get(fd)
                if source is not None:
                    self._hot[fd] = source
        if self._checks:
            self._checks = [done for done in self._checks if not done()]
        if not self._hot:
            return False
        hot, self._hot = self._hot, {}
        try:
            return self._run(hot)
        except BaseException:
            self._hot = hot | self._hot  # nobody's signal is lost because of somebody else's error
            raise

    def _run(self, hot: dict[int, Source]) -> bool:
        worked = False
        for source in hot.values():
            if self._sources.get(source.fd) is not source:
                continue  # removed by another handler
            if source.socket is None or readable(source.socket):
                worked = True
                more = source.on_ready() or source.socket is not None  # until a look finds nothing
                if more and self._sources.get(source.fd) is source:  # not removed, nor its number taken by another, meanwhile
                    self._hot[source.fd] = source
        return worked

    def _drain_wakes(self) -> None:
        try:
            while len(os.read(self._wake_read, 512)) == 512:
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._epoll.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
