"""The conformance kit's engines and world, over the transports of this project by their short names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pd_fsm
from pd_fsm.testing.conformance import engines
from pd_fsm.testing.conformance.engines import PAGE_SIZE, PAGES, Engine, make_engine, messages, open_files, threads, until
from pd_fsm.testing.conformance.target import Target
from pd_fsm.transports.memory import Hub

__all__ = ["PAGES", "PAGE_SIZE", "Engine", "World", "make_engine", "messages", "open_files", "threads", "until"]


class World(engines.World):
    """`transport` is "memory", "nixl", "mooncake", or "tcp" or "ipc" of ZeroMQ. A memory world has a hub of its own."""

    def __init__(self, transport: str, thread: bool, directory: Path, deadlines: pd_fsm.Deadlines | None = None) -> None:
        self.hub = Hub()
        options: dict[str, Any] = {
            "memory": {"hub": self.hub},
            "nixl": {},
            "mooncake": {},
            "tcp": {},
            "ipc": {"scheme": "ipc", "directory": str(directory)},
        }[transport]
        name = transport if transport in ("memory", "nixl", "mooncake") else "zmq"
        super().__init__(Target(name, options), thread, directory, deadlines)
