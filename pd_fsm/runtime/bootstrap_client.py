"""One request to a bootstrap server, with a deadline, a bounded answer and one kind of failure.

`BootstrapClient` owns an aiohttp session. It belongs to one event loop, follows no redirect (the token would go along), and repeats
nothing.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import msgspec

from pd_fsm.errors import ConfigError
from pd_fsm.runtime.bootstrap import check_token, require_aiohttp

if TYPE_CHECKING:
    import aiohttp

ANSWER_BYTES_MAX = 8 << 20
CONNECTIONS_MAX = 64

T = TypeVar("T")


class NoAnswer(Exception):  # noqa: N818 - becomes the reason of an event
    """A request that brought no usable answer. `status` is 0 when nothing came back."""

    def __init__(self, reason: str, status: int = 0, retry_ms: float = 0) -> None:
        super().__init__(reason)
        self.status = status
        self.retry_ms = retry_ms


class _Refusal(msgspec.Struct):
    error: str = ""
    retry_ms: float = 0


class BootstrapClient:
    """`async with` it inside its loop. Raises ConfigError for an unusable token or timeout, MissingDependency without aiohttp."""

    def __init__(self, token: str | None, timeout_ms: float) -> None:
        if timeout_ms <= 0:
            raise ConfigError(f"timeout_ms must be positive, not {timeout_ms}")
        self._headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if check_token(token) is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self.timeout_ms = timeout_ms
        self._aiohttp = require_aiohttp()
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> None:
        http = self._aiohttp
        # Connections are not kept: requests are few, and one to a server that was restarted would only fail its next request.
        connector = http.TCPConnector(limit=CONNECTIONS_MAX, force_close=True)
        jar = http.DummyCookieJar()
        self._session = http.ClientSession(connector=connector, headers=self._headers, cookie_jar=jar, auto_decompress=False)

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, method: str, base: str, path: str, kind: type[T], body: object = None, timeout_ms: float = math.inf) -> T:
        """One request. Raises NoAnswer, naming the server and the cause, for anything but a valid 200."""
        limit_ms = min(timeout_ms, self.timeout_ms)
        data = None if body is None else msgspec.json.encode(body)
        limits = {"timeout": self._aiohttp.ClientTimeout(total=limit_ms / 1000), "allow_redirects": False}
        try:
            async with self._session.request(method, base + path, data=data, **limits) as response:
                status, content = response.status, bytearray()
                async for piece in response.content.iter_any():
                    content += piece
                    if len(content) > ANSWER_BYTES_MAX:
                        raise NoAnswer(f"{base}: the answer is larger than {ANSWER_BYTES_MAX} bytes")
        except asyncio.TimeoutError as error:
            raise NoAnswer(f"{base}: no answer within {limit_ms:.0f} ms") from error
        except (self._aiohttp.ClientError, OSError, ValueError) as error:
            raise NoAnswer(f"{base}: {error or type(error).__name__}") from error
        try:
            if status == 200:
                return msgspec.json.decode(content, type=kind)
            refusal = msgspec.json.decode(content, type=_Refusal)
        except (ValueError, RecursionError) as error:
            raise NoAnswer(f"{base}: the answer to {method} {path} (status {status}) is not valid: {error}", status) from error
        raise NoAnswer(f"{base}: {method} {path} was refused ({status}): {refusal.error[:512]}", status, refusal.retry_ms)


def base_url(address: str) -> str:
    """`address`, host:port or a URL, as a URL without a slash at its end. Raises ConfigError."""
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None or not text.isprintable():
        raise ConfigError(f"a bootstrap address looks like http://10.0.0.1:8998 or 10.0.0.1:8998, not {address[:256]!r}")
    return text.rstrip("/")
