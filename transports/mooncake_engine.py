"""One Mooncake TransferEngine: the calls that the data plane needs, and what each of them really promises.

It owns the engine. It never decides what an outcome means, and has no thread and no lock. All calls but the constructor and `close`
release the interpreter lock; `submit` may wait for the peer, see there.

Statements about Mooncake were checked against the installed 0.3.13.post1 and its source (github.com/kvcache-ai/Mooncake).
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import os
import socket
import struct
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs

from pd_fsm.errors import ConfigError, MissingDependency
from pd_fsm.kv.registration import Block

PACKAGES = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine-npu")
INSTALL = (
    "pip install mooncake-transfer-engine (CUDA; without an accelerator mooncake-transfer-engine-non-cuda, on Ascend "
    "mooncake-transfer-engine-npu), and what every build loads (Debian: apt install libibverbs1 libnuma1 libcurl4)"
)
OLDEST = (0, 3, 13)
"""Over tcp, this and later ones call a write complete when the reader has placed it; earlier ones when it left the writer."""
ACCELERATORS = ("SUPPORT_CUDA", "SUPPORT_HIP", "SUPPORT_MUSA")
WAIT_S = 600
"""After so long the library's own waits say -1 even of a batch that is complete: nothing here is waited for that long."""
ACCEPT_S = 0.02
ANSWER_S = 1.0

DONE, FAILED, TIMED_OUT = 1, -1, -2
"""What `check` returns of a submission that ended. 0: on its way. TIMED_OUT: on its way, too, for longer than MC_SLICE_TIMEOUT."""


@attrs.frozen
class Ticket:
    """A submission: the library's numbers of the batch of all copies but the last, 0 if there is none, and of the last copy."""

    batch: int
    last: int


def load_library(protocol: str) -> Any:
    """Mooncake's bindings, with a calm log. Raises MissingDependency with what to install, ConfigError for one that is too old.

    Variables of the environment that are set already are left alone; the library reads them once, when it is loaded.
    """
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # the default tells of every connection
    os.environ.setdefault("MC_TRANSFER_TIMEOUT", str(WAIT_S))
    if protocol == "tcp":
        os.environ.setdefault("MC_FORCE_TCP", "1")  # else it takes whatever hardware it finds
        if os.environ.get("MC_TCP_PROTO") == "1":
            raise ConfigError("MC_TCP_PROTO=1 makes Mooncake call writes complete that have only left the writer; unset it")
    try:
        library = importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise MissingDependency(
            f"transport 'mooncake' needs the Mooncake transfer engine ({error}); install it: {INSTALL}"
        ) from error
    found = installed_version()
    if found and tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < OLDEST:
        raise ConfigError(
            f"Mooncake {found} is too old; transport 'mooncake' needs {'.'.join(map(str, OLDEST))} or later: {INSTALL}"
        )
    return library


def installed_version() -> str:
    """Of whichever build is installed; "" for one that was not installed as a package."""
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return ""


class Engine:
    """A started engine with its memory registered. Calls other than `close` may be made from several threads at once.

    Raises ConfigError when the library refuses its configuration or the memory, MissingDependency without the library.
    """

    def __init__(self, name: str, protocol: str, devices: str, blocks: Sequence[Block]) -> None:
        library = load_library(protocol)
        if not all(block.host for block in blocks) and not any(getattr(library, flag, False) for flag in ACCELERATORS):
            raise ConfigError(
                "this build of Mooncake takes host memory alone, and some buffers of the layout are on a device; install the build "
                f"of that accelerator ({INSTALL}), or stage the pages in pinned host memory and give the session those buffers"
            )
        self._engine = library.TransferEngine()
        status = self._engine.initialize(name, "P2PHANDSHAKE", protocol, devices)
        if status != 0:
            raise ConfigError(
                f"Mooncake could not start as {name!r} with protocol {protocol!r} and devices {devices!r} (it returned {status}); "
                "is the protocol built in, and the hardware there? MC_LOG_LEVEL=INFO makes it say more"
            )
        self.port = int(self._engine.get_rpc_port())
        _end_quickly(self.port)
        status = self._engine.batch_register_memory([block.address for block in blocks], [block.nbytes for block in blocks])
        if status != 0:
            total = sum(block.nbytes for block in blocks)
            self.close()
            raise ConfigError(
                f"Mooncake could not register {len(blocks)} blocks of {total} bytes for {protocol!r} (it returned {status}); "
                "for RDMA the limit of locked memory must allow that much (ulimit -l), and device memory needs peer access"
            )

    def submit(self, target: str, source: list[int], destination: list[int], nbytes: list[int]) -> Ticket | None:
        """Begin to write at least one copy. None: the library refused; whether something began depends on its protocol.

        The batch is all but the last copy. That one is a submission of its own, because the library can tell of it without
        waiting: of a batch, it can only be waited for, in a loop that takes a whole core.

        The first one for a target asks the peer for its memory, for up to 60 s, and all others wait meanwhile: make sure that it
        `answers` first.
        """
        batch = 0
        if len(nbytes) > 1:
            batch = int(self._engine.batch_transfer_async_write(target, source[:-1], destination[:-1], nbytes[:-1]))
            if batch == 0:
                return None
        last = int(self._engine.transfer_submit_write(target, source[-1], destination[-1], nbytes[-1]))
        return Ticket(batch, last) if batch or last else None

    def check(self, ticket: Ticket) -> int:
        """How the last copy stands. DONE is after the reader placed it. Once it is DONE or FAILED, never ask again."""
        return int(self._engine.transfer_check_status(ticket.last)) if ticket.last else FAILED

    def finish(self, ticket: Ticket) -> bool:
        """Wait for the rest of the batch, once its last copy has ended: copies begin in order, so then little is left.

        True: all are placed. False: one of them failed, and then the others may still be on their way; never ask again.
        """
        return ticket.batch == 0 or self._engine.get_batch_transfer_status([ticket.batch]) == 0

    def close(self) -> None:
        """Destroy the engine: its threads have ended and its connections are closed when this returns, after about ACCEPT_S.

        Nobody may be in another call. Unregistering would not be enough: what a reader had begun to receive lands all the same.
        """
        self._engine = None


class Answer(enum.Enum):
    """What the engine of a peer has to say. GONE, nobody listens there any more, is a proof that it has ended; SILENT is none."""

    ALIVE = "alive"
    GONE = "gone"
    SILENT = "silent"


def answers(address: str, port: int) -> Answer:
    """Ask an engine for nothing: it closes the connection when it gets to it. Waits for at most twice ANSWER_S.

    The library's own `send_probe` waits for up to 60 s.
    """
    try:
        with socket.create_connection((address, port), timeout=ANSWER_S) as connection:
            connection.shutdown(socket.SHUT_WR)
            return Answer.ALIVE if connection.recv(1) == b"" else Answer.SILENT
    except ConnectionRefusedError:
        return Answer.GONE
    except ConnectionResetError:
        return Answer.ALIVE
    except OSError:
        return Answer.SILENT


def _end_quickly(port: int) -> None:
    """The thread that answers peers looks whether it should end only once a second, and destroying the engine waits for it with the
    interpreter lock held. Its listening socket gets a shorter time-out, and one connection makes it notice."""
    timeval = struct.pack("ll", 0, round(ACCEPT_S * 1e6))
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            fd = os.dup(int(entry.name))
            try:
                found = socket.socket(fileno=fd)
            except OSError:  # no socket
                os.close(fd)
                continue
            with found:
                listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if listens and found.family in (socket.AF_INET, socket.AF_INET6) and found.getsockname()[1] == port:
                    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), timeout=ANSWER_S).close()
