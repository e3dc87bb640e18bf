"""The writing side of the NIXL data plane: cuts plans into transfers, posts them, and says what became of each operation.

It owns the tables of what is outstanding, has no thread and no lock, and waits for nothing. Rooms take turns, transfer by transfer.
It never decides what an outcome means for a room.

What it takes for proof that nothing more of an operation can land:
* a transfer is DONE: the library flushed it;
* a transfer was refused before it was posted;
* a connection failed, was closed after the last of its transfers had ended, and `residual_ms` have passed since: what the network
  still held has arrived.
An error alone is none, and neither is a handle that was released: over TCP, bytes of released transfers were seen to land.
"""

from __future__ import annotations

from collections import Counter, deque

import attrs
import numpy as np

from pd_fsm.core import events as ev
from pd_fsm.errors import WireError
from pd_fsm.kv import Plan
from pd_fsm.runtime.transport import Host
from pd_fsm.transports.nixl_agent import Agent, State
from pd_fsm.transports.nixl_memory import MEMS, Blocks, Memory, Route, agent_name, blocks_of, transfers_of, unpack_descriptor

TRANSFER_BYTES_MAX = 16 << 20
"""Of one transfer: a small room waits for one of these at the most, and what was not posted yet can still be cancelled."""
TRANSFER_COPIES_MAX = 4_096
NOW_BYTES_MAX = 256 << 10
NOW_COPIES_MAX = 64
"""Up to here a write is made at once by whoever submits it: some 0.2 ms at the most, less than a hand-over to a thread costs."""
NOW_ROUNDS = 16


@attrs.define(eq=False)
class Write:
    """One operation. `rest` are the transfers that are not posted yet, None until its plan is translated."""

    op: int
    lane: Lane
    generation: int
    plan: Plan
    notice: bytes
    rest: deque[Blocks] | None = None
    posted: int = 0
    error: str = ""
    unknown: bool = False  # reported as such: bytes may land although no transfer is outstanding


@attrs.define(eq=False)
class Transfer:
    """One handle of the library that was posted; `write` is None for a probe."""

    handle: int
    nbytes: int
    lane: Lane
    write: Write | None


@attrs.define(eq=False)
class Lane:
    """Everything on its way to one peer. `descriptor` is None once it was given up, `route` while its memory is not loaded."""

    peer: bytes
    name: str
    descriptor: bytes | None
    route: Route | None = None
    prepared: dict[int, int] = attrs.field(factory=dict)  # by kind of memory
    warm: bool = False  # a transfer has ended well on this connection
    failed: bool = False  # the connection broke: nothing is posted until it was made anew
    stale: bool = False  # what was loaded is not what the peer says now: the same, once its transfers have ended
    queue: dict[int, deque[Write]] = attrs.field(factory=dict)
    """What is not all posted yet, by generation: the rooms take turns, the chunks of one keep their order."""
    posted: list[Transfer] = attrs.field(factory=list)
    in_flight_bytes: int = 0
    in_doubt: list[Write] = attrs.field(factory=list)  # their connection may still deliver bytes

    @property
    def open(self) -> bool:
        """Whether transfers may be posted."""
        return self.route is not None and self.descriptor is not None and not self.failed and not self.stale

    def waiting(self) -> list[Write]:
        """Every write of which something is not posted."""
        return [write for writes in self.queue.values() for write in writes]

    @property
    def busy(self) -> bool:
        """Whether there is something to look at."""
        return bool(self.posted or self.queue) or not self.open


class Writer:
    """All outstanding writes of one session. Not thread-safe; outcomes go to the host's inbox."""

    def __init__(
        self,
        host: Host,
        agent: Agent,
        memory: Memory,
        *,
        secret: bytes,
        residual_ms: float,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._host = host
        self._agent = agent
        self._memory = memory
        self._secret = secret
        self._residual_ms = residual_ms
        self._lanes: dict[bytes, Lane] = {}
        self._active: dict[bytes, Lane] = {}  # those where something is to do
        self._writes: dict[int, Write] = {}
        self._settling: deque[tuple[float, list[Write]]] = deque()
        self._done: list[ev.WriteDone] = []
        kinds = [kind for kind in range(len(MEMS)) if (memory.mem == kind).any()]
        self._prepared = {kind: agent.prepare("", MEMS[kind], memory.rows(kind)) for kind in kinds}

    # --- the loop --------------------------------------------------------------------------------------------------------

    def round(self) -> bool:
        """Look at everything that is outstanding, mend connections, and post up to TRANSFER_BYTES_MAX more, the peers in turns.
        False when nothing changed."""
        worked = False
        for lane in list(self._active.values()):
            worked = self._poll(lane) or worked
            self._mend(lane)
        left, more = TRANSFER_BYTES_MAX, False
        for peer, lane in list(self._active.items()):
            posted = self._post_next(lane) if left > 0 else 0
            if posted or not lane.busy:
                del self._active[peer]
            if posted and lane.busy:
                self._active[peer] = lane  # at the end of the queue
            left -= posted
            worked, more = worked or posted > 0, more or (posted > 0 and bool(lane.queue))
        if self._settling:
            self._agent.progress()  # lets the library finish closing what failed
            while self._settling and self._settling[0][0] <= self._host.clock_ms():
                for write in self._settling.popleft()[1]:
                    self._settled(write)
        if not more:
            self.tell()
        return worked

    def tell(self) -> None:
        """Hand over the good outcomes that wait. They do while there is more to post, until just before it is: whoever they wake
        then works beside the copy, instead of keeping the interpreter from beginning it."""
        done, self._done = self._done, []
        for event in done:
            self._host.emit(event)

    def idle(self) -> bool:
        """Whether no round is due before something is begun, or `settles_in_s` is over."""
        return not self._active

    def settles_in_s(self) -> float | None:
        """When a round is due although nothing is outstanding."""
        return max(self._settling[0][0] - self._host.clock_ms(), 0.0) / 1e3 if self._settling else None

    def halt(self) -> None:
        """Post nothing more to anybody."""
        for peer in list(self._lanes):
            self.end_lane(peer)

    def abandon(self) -> None:
        """Let go of what is posted, before the agent is destroyed."""
        for lane in self._lanes.values():
            for transfer in lane.posted:
                self._agent.release(transfer.handle)
            lane.posted.clear()

    def figures(self) -> dict[str, int]:
        return dict(self.counts) | {"outstanding": len(self._writes), "peers": len(self._lanes)}

    # --- peers -----------------------------------------------------------------------------------------------------------

    def begin_lane(self, peer: bytes, descriptor: bytes) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            lane = self._lanes[peer] = Lane(peer, agent_name(peer), descriptor)
        elif lane.descriptor != descriptor:
            lane.descriptor = descriptor
            lane.stale = lane.route is not None
        self._active[peer] = lane
        if lane.route is None:
            probe = self._load(lane)
            if probe:
                self._probe(lane, probe)

    def _probe(self, lane: Lane, address: int) -> None:
        """Have the library make the connection while prefill still computes: by reading a byte that the peer offers for that. In a
        first write it would cost some ten milliseconds. Whether it succeeds does not matter."""
        try:
            handle = self._agent.make_probe(lane.name, address)
        except WireError:
            return
        self._begin(Transfer(handle, 0, lane, None), b"")

    def end_lane(self, peer: bytes) -> None:
        """Everything outstanding gets its outcome now; the connection is closed once the library holds nothing of it any more."""
        lane = self._lanes.get(peer)
        if lane is None:
            return
        lane.descriptor = None
        self._active[peer] = lane
        posted = {transfer.write.op: transfer.write for transfer in lane.posted if transfer.write is not None}
        for write in [*lane.waiting(), *posted.values()]:
            self._stop(write, "the peer was given up")
            if write.posted:
                self._report_unknown(write, "the peer was given up while it was on its way")

    def _load(self, lane: Lane) -> int:
        """Make the peer's memory known to the agent, and return the address to probe or 0. A descriptor that makes no sense costs
        this peer alone."""
        assert lane.descriptor is not None
        assert lane.route is None
        try:
            metadata, probe, memory = unpack_descriptor(lane.descriptor, lane.peer, self._host.layout, self._secret)
            self._agent.add_peer(lane.name, metadata)
            lane.route = Route.between(self._memory, memory)
            for kind in range(len(MEMS)):
                if (memory.mem == kind).any():
                    lane.prepared[kind] = self._agent.prepare(lane.name, MEMS[kind], memory.rows(kind))
        except WireError as error:
            self.counts["refused"] += 1
            self._host.emit(ev.PeerUnreachable(lane.peer, f"it cannot be written to: {error}", dead=False))
            lane.descriptor = None
            for write in lane.waiting():
                self._stop(write, f"the peer cannot be written to: {error}")
            return 0
        return probe

    def _mend(self, lane: Lane) -> None:
        """Close a connection that failed or is not wanted any more, as soon as none of its transfers is outstanding."""
        if lane.posted or lane.open:
            return
        if lane.route is not None:
            for prepared in lane.prepared.values():
                self._agent.forget(prepared)
            lane.prepared.clear()
            lane.route = None
            self._agent.remove_peer(lane.name)
        if lane.failed and lane.in_doubt:
            self._settling.append((self._host.clock_ms() + self._residual_ms, lane.in_doubt))
        lane.in_doubt = []  # of a connection that did not fail, nobody can tell how long it goes on delivering
        lane.failed = lane.stale = lane.warm = False
        if lane.descriptor is None:
            self._lanes.pop(lane.peer, None)
            self._active.pop(lane.peer, None)
        else:
            self.counts["reconnects"] += 1
            self._load(lane)

    # --- writes ----------------------------------------------------------------------------------------------------------

    def begin_write(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> None:
        """Queue a write. `notice`, unless empty, goes with its last bytes."""
        lane = self._lanes.get(peer)
        if lane is None or lane.descriptor is None:
            self._host.emit(ev.WriteFailed(op, "there is no connection to the peer"))
            return
        write = self._writes[op] = Write(op, lane, generation, plan, notice)
        lane.queue.setdefault(generation, deque()).append(write)
        self._active[peer] = lane

    def write_now(self, op: int, peer: bytes, generation: int, plan: Plan, notice: bytes) -> bool:
        """Write at once where that takes next to no time. False when it would; then nothing was done."""
        lane = self._lanes.get(peer)
        if lane is None or not lane.warm or lane.queue or lane.posted or not lane.open:
            return False
        if plan.total_bytes > NOW_BYTES_MAX or len(plan) > NOW_COPIES_MAX:
            return False
        self.counts["now"] += 1
        self.begin_write(op, peer, generation, plan, notice)
        for _ in range(NOW_ROUNDS):
            self._post_next(lane)
            if op not in self._writes:
                break
            self._poll(lane)
        if not lane.busy:
            self._active.pop(peer, None)
        self.tell()
        return True

    def cancel(self, op: int) -> None:
        write = self._writes.get(op)
        if write is not None:
            self._stop(write, "cancelled")

    def _stop(self, write: Write, why: str) -> None:
        """Post nothing more of it. Its outcome comes when what is posted has ended."""
        write.error = write.error or why
        queue = write.lane.queue.get(write.generation, ())
        if write in queue:
            write.lane.queue[write.generation] = deque(other for other in queue if other is not write)
            if len(queue) == 1:
                del write.lane.queue[write.generation]
        write.rest = deque()
        self._finish_if_done(write)

    def _post_next(self, lane: Lane) -> int:
        """Post a transfer of the room whose turn it is, and return its bytes. 0 when there is none, or no room for it."""
        if not lane.open:
            return 0
        for generation in list(lane.queue):
            write = lane.queue[generation][0]
            if write.rest is None:
                self._translate(write)
            if not write.rest:
                self._stop(write, write.error)
                return 1
            last = len(write.rest) == 1
            if last and write.notice and write.posted:  # a notice speaks for all of the operation
                continue
            nbytes = int(write.rest[0].nbytes.sum())
            if lane.in_flight_bytes and lane.in_flight_bytes + nbytes > self._host.limits.in_flight_bytes_max:
                return 0
            writes = lane.queue.pop(generation)
            blocks = write.rest.popleft()
            if last:
                writes.popleft()
            if writes:
                lane.queue[generation] = writes  # behind the others
            self._post(write, blocks, nbytes, write.notice if last else b"")
            return nbytes
        return 0

    def _translate(self, write: Write) -> None:
        lane = write.lane
        assert lane.route is not None
        write.rest = deque()
        if len(write.plan) == 0:
            return
        try:
            for blocks in blocks_of(write.plan, lane.route, TRANSFER_BYTES_MAX):
                write.rest.extend(transfers_of(blocks, TRANSFER_BYTES_MAX, TRANSFER_COPIES_MAX))
        except WireError as error:
            write.error = str(error)

    def _post(self, write: Write, blocks: Blocks, nbytes: int, notice: bytes) -> None:
        lane = write.lane
        try:
            handle = self._make(lane, blocks)
        except WireError as error:  # nothing of this transfer has begun
            self._stop(write, str(error))
            return
        self.counts["transfers"] += 1
        write.posted += 1
        lane.in_flight_bytes += nbytes
        self.tell()
        self._begin(Transfer(handle, nbytes, lane, write), notice)

    def _begin(self, transfer: Transfer, notice: bytes) -> None:
        state, reason = self._agent.post(transfer.handle, notice)
        if state is State.POSTED:
            transfer.lane.posted.append(transfer)
        else:
            self._ended(transfer, state, reason)

    def _make(self, lane: Lane, blocks: Blocks) -> int:
        """A handle for one transfer. Raises WireError."""
        kinds = blocks.source_mem, blocks.destination_mem
        if blocks.prepared:
            self.counts["prepared"] += 1
            local, remote = self._prepared[kinds[0]], lane.prepared[kinds[1]]
            return self._agent.make_prepared(local, blocks.source, remote, blocks.destination)
        sides = ((blocks.source, blocks.source_device), (blocks.destination, blocks.destination_device))
        local_blocks, remote_blocks = (
            np.column_stack([address, blocks.nbytes.astype(np.uint64), device.astype(np.uint64)]) for address, device in sides
        )
        return self._agent.make_plain(lane.name, MEMS[kinds[0]], local_blocks, MEMS[kinds[1]], remote_blocks)

    def _poll(self, lane: Lane) -> bool:
        """Look at each transfer once. True when one has ended."""
        if not lane.posted:
            return False
        outstanding, lane.posted = lane.posted, []
        ended = False
        for transfer in outstanding:
            state, reason = self._agent.check(transfer.handle)
            if state is State.POSTED:
                lane.posted.append(transfer)
            else:
                ended = True
                self._ended(transfer, state, reason)
        return ended

    def _ended(self, transfer: Transfer, state: State, reason: str) -> None:
        write, lane = transfer.write, transfer.lane
        lane.in_flight_bytes -= transfer.nbytes
        if state is State.DONE:
            if not lane.warm:
                lane.warm = True
                self._agent.connected(lane.name)
            if write is not None:
                self._measure(transfer)
        else:
            self.counts["errors"] += 1
            lane.failed = lane.failed or state is State.DISCONNECTED
        self._agent.release(transfer.handle)
        if write is None:
            return
        write.posted -= 1
        if state is not State.DONE:
            if write not in lane.in_doubt:
                lane.in_doubt.append(write)
            self._report_unknown(write, reason)
            self._stop(write, reason)
        self._finish_if_done(write)

    def _measure(self, transfer: Transfer) -> None:
        self.counts["bytes"] += transfer.nbytes
        seen = self._agent.telemetry(transfer.handle)
        if seen is not None:
            self.counts["post_us"] += seen.post_us
            self.counts["transfer_us"] += seen.transfer_us
            self.counts["descriptors"] += seen.descriptors

    def _report_unknown(self, write: Write, reason: str) -> None:
        if not write.unknown:
            write.unknown = True
            self.counts["unknown"] += 1
            self._host.emit(ev.WriteUnknown(write.op, reason))

    def _settled(self, write: Write) -> None:
        self.counts["settled"] += 1
        self._host.emit(ev.WriteSettled(write.op))

    def _finish_if_done(self, write: Write) -> None:
        """Say how an operation ended, once nothing of it is outstanding and nothing more will be posted."""
        if write.posted or write.rest or write.rest is None or self._writes.pop(write.op, None) is None:
            return
        if write.unknown:
            if write not in write.lane.in_doubt:  # all that was posted of it was placed in the end
                self._settled(write)
        elif write.error:
            self._host.emit(ev.WriteFailed(write.op, write.error))
        else:
            self._done.append(ev.WriteDone(write.op, write.plan.total_bytes, notified=False))
