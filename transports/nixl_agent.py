"""One NIXL agent: the calls of the library that the data plane needs, and what each of them really promises.

It owns the agent and every handle into it. It never decides what an outcome means, and it has no thread and no lock: its user
makes one call at a time. All calls into the library release the interpreter lock, and a `post` may take as long as the copy: UCX
moves bytes between processes of one machine (CMA) inside of it.

Statements about NIXL were checked against the installed 1.5.1 and its source (github.com/ai-dynamo/nixl).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.errors import ConfigError, MissingDependency, WireError

logger = logging.getLogger("pd_fsm.transports.nixl")

INSTALL = "pip install --no-deps nixl nixl-cu12 (or nixl-cu13, nixl-rocm: the one of your accelerator; each runs on a CPU, too)"


CONNECT_S = 1.0
_connecting: set[str] = set()
"""Agents to which another one of this process is being connected. Destroying one of them then makes UCX abort the process (seen
with both ends in one process only, as in tests); so it is put off until they are connected, for CONNECT_S at the most."""


class State(enum.IntEnum):
    """Of a transfer. FAILED: the library returned an error, so how much of it was placed is not known. DISCONNECTED: the same, and
    its endpoint to the peer has failed, which ends every transfer there."""

    DONE = 0
    POSTED = 1
    FAILED = 2
    DISCONNECTED = 3


@attrs.frozen
class Telemetry:
    """What NIXL measured of one transfer. Times in microseconds; `descriptors` after the library merged neighbours."""

    post_us: int
    transfer_us: int
    nbytes: int
    descriptors: int


def load_library() -> Any:
    """NIXL's bindings. Raises MissingDependency with what to install.

    The public `nixl_agent` class starts the library's progress thread with a delay of 0, which polls for ever: a full core for each
    agent (measured). Only the bindings under it let the thread sleep until there is something to do.
    """
    # The wheels bundle libnl. Where the system's libibverbs is installed, UCX loads that, too, and its libnl binds to the bundled
    # one: the process crashes when it exits. Loaded first, on its own, the system's libraries bind to each other.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libibverbs.so.1")
    try:
        importlib.import_module("nixl")
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise MissingDependency(f"transport 'nixl' needs the NIXL library ({error}); install it with: {INSTALL}") from error


class Agent:
    """A registered agent with one back end. Not thread-safe. Raises ConfigError when the library refuses its configuration.

    `progress_ms` 0 means no progress thread: then transfers advance only in `check` and `progress`. With one, it sleeps on the back
    end's descriptors and looks around at least that often.
    """

    def __init__(self, name: str, backend: str, options: Mapping[str, str], progress_ms: float, telemetry: bool) -> None:
        self._nixl = nixl = load_library()
        self.name = name
        self.backend = backend
        self._mems = {"DRAM": nixl.DRAM_SEG, "VRAM": nixl.VRAM_SEG}
        own = [getattr(nixl, key) for key in dir(nixl) if key.startswith("nixl") and key.endswith("Error")]
        self._errors: tuple[type[Exception], ...] = (*own, RuntimeError, ValueError)  # and what C++ throws besides
        config = nixl.nixlAgentConfig()
        config.useProgThread = progress_ms > 0
        config.pthrDelay = round(progress_ms * 1e3)
        config.useListenThread = False
        config.syncMode = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT  # calls come from several threads, one at a time
        config.captureTelemetry = telemetry
        self._telemetry = telemetry
        self._registered: list[Any] = []
        self._prepared: list[int] = []
        self._refused: list[int] = []  # handles that the library would not release
        try:
            self._agent = nixl.nixlAgent(name, config)
            plugins = self._agent.getAvailPlugins()
            if backend not in plugins:
                raise ConfigError(f"NIXL has no back end {backend!r} here; it has {', '.join(sorted(plugins))}")
            handle = self._agent.createBackend(backend, {key: str(value) for key, value in options.items()})
            self.mems = [str(mem).removesuffix("_SEG") for mem in self._agent.getBackendParams(handle)[1]]
        except self._errors as error:
            raise ConfigError(f"NIXL could not create its back end {backend!r} with {dict(options)}: {error}") from error
        self._scratch = np.zeros(64, dtype=np.uint8)
        self.probe_address = int(self._scratch.ctypes.data) if "DRAM" in self.mems else 0
        """A byte that peers may read to make a connection; 0 when there is none."""
        if self.probe_address:
            self.register("DRAM", np.array([[self.probe_address, len(self._scratch), 0]], dtype=np.uint64))

    def register(self, mem: str, blocks: NDArray[np.uint64]) -> None:
        """Let the back end use memory. `blocks`: uint64 [n, 3] of address, bytes, device. Raises ConfigError.

        Registration does not confine anybody: UCX was seen to place bytes by CMA and by TCP in memory that had been deregistered.
        """
        descriptors = self._nixl.nixlRegDList(self._mems[mem], blocks)
        try:
            self._agent.registerMem(descriptors)
        except self._errors as error:
            raise ConfigError(
                f"NIXL's back end {self.backend!r} could not register {len(blocks)} blocks of {mem} memory: {error}; "
                "for device memory it must be built for that accelerator, and the driver must allow peer access"
            ) from error
        self._registered.append(descriptors)

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and its registered memory."""
        found: bytes = self._agent.getLocalMD()
        return found

    # --- peers -----------------------------------------------------------------------------------------------------------

    def add_peer(self, name: str, metadata: bytes) -> None:
        """Load a peer's metadata. Raises WireError; nothing is left behind.

        A load that failed half-way leaves the name unusable in the library, so the caller must have made sure whose name it is.
        """
        _connecting.add(name)
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except self._errors as error:
            self.remove_peer(name)
            raise WireError(f"NIXL cannot use its metadata: {error}") from error
        if bytes(loaded) != name.encode():
            raise WireError(f"its metadata is for agent {bytes(loaded)[:80]!r}, not {name!r}")

    def remove_peer(self, name: str) -> None:
        """Forget a peer and close the connection to it. Only once no transfer to it is outstanding: of one that is, the library
        then says at once that it failed, while its bytes go on landing (measured over TCP)."""
        with contextlib.suppress(*self._errors):
            self._agent.invalidateRemoteMD(name)
        _connecting.discard(name)

    def connected(self, name: str) -> None:
        """A first transfer to a peer has ended well."""
        _connecting.discard(name)

    # --- transfers -------------------------------------------------------------------------------------------------------

    def prepare(self, peer: str, mem: str, rows: NDArray[np.uint64]) -> int:
        """A prepared descriptor list for `peer`, or for this side when "". Raises WireError when it is not in registered memory.

        `rows`: uint64 [n, 5] of address, item bytes, device, stride, items; the items of all rows are numbered through.
        """
        try:
            handle = int(self._agent.prepXferDlist(peer or self._nixl.NIXL_INIT_AGENT, self._mems[mem], rows))
        except self._errors as error:
            raise WireError(f"its memory is not what it registered: {error}") from error
        self._prepared.append(handle)
        return handle

    def forget(self, prepared: int) -> None:
        """Release a prepared list."""
        self._prepared.remove(prepared)
        with contextlib.suppress(*self._errors):
            self._agent.releasedDlistH(prepared)

    def make_prepared(self, local: int, local_items: NDArray[Any], remote: int, remote_items: NDArray[Any]) -> int:
        """A transfer between items (int32 [n]) of prepared lists; the library merges neighbours. Raises WireError: none began."""
        try:
            return int(self._agent.makeXferReq(self._nixl.NIXL_WRITE, local, local_items, remote, remote_items))
        except self._errors as error:
            raise WireError(f"NIXL refused the transfer: {error}") from error

    def make_plain(self, peer: str, local_mem: str, local: NDArray[np.uint64], remote_mem: str, remote: NDArray[np.uint64]) -> int:
        """A transfer between blocks, uint64 [n, 3] of address, bytes, device on each side. Raises WireError: nothing began."""
        nixl = self._nixl
        try:
            source = nixl.nixlXferDList(self._mems[local_mem], local)
            return int(self._agent.createXferReq(nixl.NIXL_WRITE, source, nixl.nixlXferDList(self._mems[remote_mem], remote), peer))
        except self._errors as error:
            raise WireError(f"NIXL refused the transfer: {error}") from error

    def make_probe(self, peer: str, address: int) -> int:
        """A transfer that reads the byte which a peer offers for that. Raises WireError: nothing began."""
        nixl, dram = self._nixl, self._mems["DRAM"]
        sides = [nixl.nixlXferDList(dram, np.array([[at, 1, 0]], dtype=np.uint64)) for at in (self.probe_address, address)]
        try:
            return int(self._agent.createXferReq(nixl.NIXL_READ, *sides, peer))
        except self._errors as error:
            raise WireError(f"NIXL refused the probe: {error}") from error

    def post(self, handle: int, notice: bytes) -> tuple[State, str]:
        """Begin a transfer; `notice`, if any, is sent to the peer's agent after its bytes are placed."""
        return self._state(self._agent.postXferReq, handle, notice) if notice else self._state(self._agent.postXferReq, handle)

    def check(self, handle: int) -> tuple[State, str]:
        """How a posted transfer stands; advances it. DONE is after a flush: all bytes are placed at the peer."""
        return self._state(self._agent.getXferStatus, handle)

    def _state(self, call: Any, *arguments: Any) -> tuple[State, str]:
        try:
            status = call(*arguments)
        except self._nixl.nixlRemoteDisconnectError as error:
            return State.DISCONNECTED, f"NIXL lost the connection ({error})"
        except self._errors as error:
            return State.FAILED, f"NIXL failed ({error})"
        if status == self._nixl.NIXL_SUCCESS:
            return State.DONE, ""
        return (State.POSTED, "") if status == self._nixl.NIXL_IN_PROG else (State.FAILED, f"NIXL returned {status}")

    def release(self, handle: int) -> bool:
        """Free a transfer. False when the library refuses; then it is kept, and tried again at the end.

        True proves nothing about a transfer that had not ended: over TCP, bytes of one that was released landed afterwards.
        """
        try:
            self._agent.releaseXferReq(handle)
        except self._errors as error:
            logger.warning("%s: NIXL does not release a transfer: %s", self.name, error)
            self._refused.append(handle)
            return False
        return True

    def telemetry(self, handle: int) -> Telemetry | None:
        """What the library measured of a transfer that is DONE; None when it measures nothing."""
        if not self._telemetry:
            return None
        try:
            seen = self._agent.getXferTelemetry(handle)
        except self._errors:
            return None
        return Telemetry(seen.postDuration, seen.xferDuration, seen.totalBytes, seen.descCount)

    def progress(self) -> dict[str, list[bytes]]:
        """Let the library work, and take the notices that came, by the name of the agent that sent them."""
        try:
            found: dict[str, list[bytes]] = self._agent.getNotifs({})
        except self._errors:  # also a name that is no text: whose it is cannot be told
            return {}
        return found

    def close(self) -> None:
        """Release what is left and destroy the agent: from then on this process starts no copy, neither out of its memory nor, by
        its own hand, into it. Idempotent."""
        if self._agent is None:
            return
        patience = time.monotonic() + CONNECT_S
        while self.name in _connecting and time.monotonic() < patience:
            time.sleep(0.001)
        for handle in self._refused:
            with contextlib.suppress(*self._errors):
                self._agent.releaseXferReq(handle)
        self._refused.clear()
        for prepared in list(self._prepared):
            self.forget(prepared)
        for descriptors in self._registered:
            with contextlib.suppress(*self._errors):
                self._agent.deregisterMem(descriptors)
        self._registered.clear()
        self._agent = None  # its destructor stops the threads and closes the connections
