"""The HTTP bootstrap server: where decode ranks find prefill ranks. Embedded in a prefill process, or a process of its own (`run`).

It owns one thread, that thread's event loop and one listening socket. It decides nothing: `bootstrap_routes.py` answers,
`peer_table.py` remembers. Its state is soft: a server that restarts empty is filled again by its clients within a renewal. It
never opens a connection: an address that was registered is handed out, not called.

Security: a shared token (`Authorization: Bearer`) guards every path but /health. Without one the server listens on loopback only,
unless the operator says `insecure=True`; SGLang's own clients send no token.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from pd_fsm.errors import ConfigError, MissingDependency
from pd_fsm.runtime.bootstrap_routes import Call, Reply, State, answer
from pd_fsm.runtime.clock import now_ms
from pd_fsm.runtime.peer_table import LEASE_MS, PeerTable, RoomTable, is_loopback

if TYPE_CHECKING:
    from aiohttp import web

BODY_BYTES_MAX = 1 << 20
BODY_TIMEOUT_S = 5.0  # a client that sends its request slower is let go
BACKLOG_MAX = 1_024  # connections not yet accepted: a whole deployment may start at once
SHUTDOWN_S = 0.5  # how long close() lets answers in progress finish
START_S = 10.0
ACCEPT_STEPS = 5  # turns of the loop that asyncio needs from accept() to a connection that it knows; 3 in CPython


def require_aiohttp() -> ModuleType:
    """aiohttp, imported at first use: most of pd-fsm works without it. Raises MissingDependency."""
    try:
        import aiohttp.web  # noqa: PLC0415
    except ImportError as error:
        raise MissingDependency("the HTTP rendezvous needs aiohttp; install it with: pip install pd-fsm[http]") from error
    return aiohttp


def check_token(token: str | None) -> str | None:
    """The token itself. Raises ConfigError for one that no HTTP header can carry, such as an unset variable's empty text."""
    if token is not None and not (token.isascii() and token.isprintable() and token and " " not in token):
        raise ConfigError("token must be printable ASCII characters without spaces, and not empty; None means no token")
    return token


class BootstrapServer:
    """A bootstrap server on its own thread. `start()` and `close()` may be called from any thread, not concurrently.

    `port` 0 takes a free one; `lease_ms` is how long a registration lives without renewal. Raises ConfigError for settings that
    cannot work and MissingDependency without aiohttp.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        lease_ms: float = LEASE_MS,
        token: str | None = None,
        *,
        insecure: bool = False,
        clock_ms: Callable[[], float] = now_ms,
    ) -> None:
        if lease_ms <= 0:
            raise ConfigError(f"lease_ms must be positive, not {lease_ms}")
        if not 0 <= port <= 65_535:
            raise ConfigError(f"port must be in 0..65535, not {port}")
        if check_token(token) is None and not insecure and not is_loopback(host):
            raise ConfigError(
                f"without a token anyone who reaches {host!r} could redirect KV caches; set a token, or insecure=True"
            )
        self._aiohttp = require_aiohttp()
        self.host = host
        self.port = port
        self._authorization = None if token is None else f"Bearer {token}".encode()
        self._state = State(PeerTable(lease_ms, clock_ms), RoomTable(clock_ms))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where clients of this host reach the server; `port` is the real one once it was started."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - it is replaced
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def start(self) -> BootstrapServer:
        """Listen and answer from now on. Raises ConfigError naming the address when it cannot be bound."""
        if self._thread is not None:
            raise ConfigError(f"the bootstrap server at {self.url} was already started; make a new one")
        listener = self._bind()
        self.port = listener.getsockname()[1]
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listener, ready), name="pd-fsm-bootstrap", daemon=True)
        self._thread.start()
        if not ready.wait(START_S):
            raise ConfigError(f"the bootstrap server at {self.url} did not come up within {START_S} s")
        return self

    def close(self) -> None:
        """Stop listening and end the thread, within about a second; idempotent."""
        if self._thread is None or self._loop is None or self._stop is None or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def __enter__(self) -> BootstrapServer:
        return self if self._thread is not None else self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _bind(self) -> socket.socket:
        # Bound in the caller's thread, so that a port in use is the caller's error at once.
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            return socket.create_server((self.host, self.port), family=family, backlog=BACKLOG_MAX)
        except OSError as error:
            reason = f"{error.strerror or error}; stop what uses it, or take another host or port"
            raise ConfigError(f"cannot listen on {self.host}:{self.port}: {reason}") from error

    def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        asyncio.run(self._serve(listener, ready))

    async def _serve(self, listener: socket.socket, ready: threading.Event) -> None:
        web = self._aiohttp.web
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # A compressed request could expand to any size, and needs no support: it is malformed JSON.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S, auto_decompress=False)
        try:
            await runner.setup()
            await web.SockSite(runner, listener, backlog=BACKLOG_MAX).start()
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._stop.wait()
        finally:
            # A connection that is being accepted while asyncio's server closes would leak: accept no more, and let it arrive first.
            asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(ACCEPT_STEPS):
                await asyncio.sleep(0)
            await runner.cleanup()
            listener.close()

    async def _answer(self, request: web.Request) -> web.Response:
        status, body = await self._reply(request)
        kind, data = ("text/plain", body.encode()) if isinstance(body, str) else ("application/json", msgspec.json.encode(body))
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        response: web.Response = self._aiohttp.web.Response(status=status, body=data, content_type=kind, headers=headers)
        return response

    async def _reply(self, request: web.Request) -> Reply:
        if request.path != "/health" and not self._authorized(request):
            return 401, {"error": "a token is needed: Authorization: Bearer <token>"}
        try:
            body = await asyncio.wait_for(request.read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            return 408, {"error": f"the request was not complete after {BODY_TIMEOUT_S} s"}
        except self._aiohttp.web.HTTPRequestEntityTooLarge:
            return 413, {"error": f"the request is larger than {BODY_BYTES_MAX} bytes"}
        except ConnectionError:  # the client is gone: no error of ours, and nobody reads the answer
            return 400, {"error": "the connection broke before the request was complete"}
        return answer(self._state, request.method, request.path, Call(request.query, body, request.remote or ""))

    def _authorized(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        return self._authorization is None or hmac.compare_digest(given, self._authorization)


def run(host: str, port: int, lease_ms: float = LEASE_MS, token: str | None = None, *, insecure: bool = False) -> int:
    """Serve until SIGINT or SIGTERM; to be called from the main thread. Prints the URL once it listens.

    Returns the exit status: 0, or 2 after a message on stderr when the server cannot start.
    """
    with _Signals(signal.SIGINT, signal.SIGTERM) as told_to_stop:
        try:
            with BootstrapServer(host, port, lease_ms, token, insecure=insecure) as server:
                sys.stdout.write(f"pd-fsm bootstrap: listening on {server.host}:{server.port}, {server.url}\n")
                sys.stdout.flush()
                told_to_stop.wait()
        except (ConfigError, MissingDependency) as error:
            sys.stderr.write(f"pd-fsm bootstrap: {error}\n")
            return 2
    return 0


class _Signals:
    """Signals as something to wait for. Python writes the number of a signal to its wakeup descriptor whichever thread it hits;
    blocking signals and sigwait() would miss those that hit a thread which a library had started earlier."""

    def __init__(self, *numbers: signal.Signals) -> None:
        self._numbers = numbers

    def __enter__(self) -> _Signals:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers = [signal.signal(number, lambda *_: None) for number in self._numbers]
        return self

    def wait(self) -> None:
        while os.read(self._read, 1)[0] not in self._numbers:
            pass

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._numbers, self._handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)
