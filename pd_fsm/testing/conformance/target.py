"""The transport under test: how it is named, made, and what it declares. Owns no socket; a probe is closed before it returns."""

from __future__ import annotations

import importlib
import json
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np

from pd_fsm.core import events as ev
from pd_fsm.core.settings import Limits
from pd_fsm.core.wire import pack_pages
from pd_fsm.errors import ConfigError
from pd_fsm.kv import KVLayout, paged
from pd_fsm.runtime.reactor import Reactor
from pd_fsm.runtime.transport import Factory, Host, Transport, make_transport

Options: TypeAlias = Mapping[str, Any]
DIRECTORY, PORT = "{directory}", "{port}"
"""Option values that stand for an empty folder, and for one free TCP port that a restarted session gets again."""


@attrs.frozen
class Capabilities:
    """What the transport declares, or answers when it is asked once: which tests apply to it."""

    reach: str
    notifies: bool
    residual_ms: float
    vouches: bool
    """Whether `revoke` returned True for a grant that nobody had written to."""
    described: bool
    """Whether the side that is written to tells its writers anything in its descriptor."""
    fixed_port: bool
    """Whether its options name a port, so that a restarted session is found at the same address."""


def resolve(named: str) -> str | Factory:
    """`module:factory`, or the name of an installed transport, as `open_session` takes it. Raises ConfigError."""
    module, colon, attribute = named.partition(":")
    if not colon:
        return named
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{named!r} cannot be found: {error}; give module:factory, with the module importable from here"
        ) from error
    if not callable(found):
        raise ConfigError(f"{named!r} is a {type(found).__name__}, not a factory that takes a Host")
    factory: Factory = found
    return factory


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port: int = reserved.getsockname()[1]
    return port


@attrs.frozen(eq=False)
class Target:
    """`transport` is a name or a factory. In `options`, DIRECTORY and PORT are replaced; a PORT is for prefill sessions alone."""

    transport: str | Factory
    options: Options = attrs.field(factory=dict)

    def options_for(self, role: str, directory: Path, port: int = 0) -> dict[str, Any]:
        """The options of one session. With `port` 0, an option of PORT is left out, or, on the decode side, always."""
        made: dict[str, Any] = {}
        for name, value in self.options.items():
            if value == PORT:
                if port and role == "prefill":
                    made[name] = port
            else:
                made[name] = value.replace(DIRECTORY, str(directory)) if isinstance(value, str) else value
        return made

    def make(self, host: Host, directory: Path, port: int = 0) -> Transport:
        """Raises what the factory does."""
        return make_transport(self.transport, host, self.options_for(host.role, directory, port))

    def probe(self, directory: Path) -> Capabilities:
        """Make and close one transport of each role. Raises what the factory does."""
        buffer = np.zeros((2, 64), np.uint8)
        layout = KVLayout([paged("kv", [buffer], 1)])
        found = {}
        for role in ("prefill", "decode"):
            reactor = Reactor()
            incarnation = secrets.token_bytes(16)
            host = Host(
                incarnation, role, "probe", "127.0.0.1", layout, Limits(), reactor, lambda _: None, lambda _frame, _via: None
            )
            made = self.make(host, directory)
            try:
                made.data.expose(ev.Expose(1, {"kv": pack_pages([0])}, -1, (b"w" * 16,)))
                found[role] = made, made.data.revoke(1) is True
            finally:
                made.close(0)
                reactor.close()
        made, vouches = found["decode"]
        data = made.data
        fixed = PORT in self.options.values()
        return Capabilities(made.reach, data.notifies, data.residual_ms, vouches, bool(data.descriptor), fixed)


def parse_options(text: str) -> Options:
    """A JSON object. Raises ConfigError."""
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--pd-fsm-transport-options is no JSON: {error}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--pd-fsm-transport-options must be a JSON object, not {text}")
    return options
