"""The engine of a simulated process: opens rooms, computes chunks, grants, aborts, clears, and gives pages back when it may.

It believes nothing that its session says about memory without asking the fabric.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import Phase
from pd_fsm.runtime.session import Receiver, Sender
from pd_fsm.testing.sim_agenda import Action
from pd_fsm.testing.sim_attempt import AUX, TERMINAL, Attempt
from pd_fsm.testing.sim_memory import STALE
from pd_fsm.testing.sim_options import DEADLINES, PAGE_TOKENS
from pd_fsm.testing.sim_schedule import Serve
from pd_fsm.testing.world import Violation

if TYPE_CHECKING:
    from pd_fsm.testing.sim_fabric import Write
    from pd_fsm.testing.sim_process import Process


class Engine:
    """The scheduler of one process."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._world = process.world
        self._session = process.session
        self._pool = process.pool
        self._by_generation: dict[int, Attempt] = {}
        self._by_room: dict[int, Attempt] = {}  # not cleared yet
        self._unfinished: dict[int, Attempt] = {}  # by generation
        self._acted = False
        self._group = process.session.group()
        self._cancelled_ms: dict[int, float] = {}  # rooms that were given up before they were opened
        self._opened_rooms: set[int] = set()

    # --- what the simulation has it do -----------------------------------------------------------------------------------

    def open_send(self, serve: Serve) -> None:
        if not self._vacate(serve.room):
            return
        try:
            handle = self._session.send(serve.room, readers=len(serve.decodes))
        except LocalProtocolError as error:
            self._refused(error)
            return
        attempt = self._opened(serve, handle)
        for index in range(len(serve.chunks)):
            self._after(serve.compute_ms * (index + 1), self._computing(attempt, index))

    def open_receive(self, serve: Serve) -> None:
        if not self._vacate(serve.room):
            return
        late = serve.grant_ms is not None
        taken = ([], None) if late else self._pool.take(serve.pages - serve.prefix_pages, serve.aux, self._process.name)
        if taken is None:
            self._world.starved = True
            return
        pages, row = taken
        try:
            handle = self._session.receive(
                serve.room,
                None if late else pages,
                aux=row,
                decode_prefix_len=0 if late else serve.prefix_pages * PAGE_TOKENS,
                tokens=self._tokens(serve),
                prefill_dp_rank=None if serve.by_room else int(serve.prefill[1:]),
            )
        except LocalProtocolError as error:
            self._pool.give(pages, row)
            self._refused(error)
            return
        attempt = self._opened(serve, handle)
        attempt.pages, attempt.row, attempt.granted = pages, row, not late
        self._mark(attempt)
        if late and serve.unasked:
            attempt.grant_asked = True
            self._after(serve.grant_ms or 0, lambda: self._grant(attempt))

    def abort(self, room: int) -> None:
        attempt = self._by_room.get(room)
        if attempt is not None:
            attempt.handle.abort("the client left")
            self._acted = True

    def cancel(self, room: int) -> None:
        attempt = self._by_room.get(room)
        if attempt is not None and attempt.live:
            attempt.cancelled = True
        elif room not in self._opened_rooms:
            self._cancelled_ms[room] = self._process.clock_ms()
        self._session.cancel(room, "the router cancelled it")
        self._acted = True

    def _opened(self, serve: Serve, handle: Sender | Receiver) -> Attempt:
        attempt = Attempt(self._world.next_attempt(), serve, self._process, handle, self._world.agenda.now_ms)
        self._by_generation[handle.generation] = self._by_room[handle.room] = self._unfinished[handle.generation] = attempt
        since_ms = self._cancelled_ms.pop(handle.room, None)
        remembered = not self._world.options.small_limits  # else newer ones may have driven it out
        if since_ms is not None and remembered:
            attempt.cancelled = self._process.clock_ms() < since_ms + DEADLINES.tombstone_ms
        self._opened_rooms.add(handle.room)
        self._group.add(handle)
        self._acted = True
        return attempt

    def _vacate(self, room: int) -> bool:
        """Make room for a new life of a number. False if the old one still lives: then a second open must be refused."""
        attempt = self._by_room.get(room)
        if attempt is None:
            return True
        if not attempt.live:
            self._clear(attempt)
            return True
        try:
            if attempt.sends:
                self._session.send(room)
            else:
                self._session.receive(room, None)
        except LocalProtocolError:
            return False
        raise Violation(f"opened twice: {attempt} is live, and a second open was not refused")

    def _refused(self, error: LocalProtocolError) -> None:
        process = self._process
        if not process.ending and not self._world.options.small_limits:
            raise Violation(f"open refused: {process.name} refuses a room without need: {error}")
        self._world.outcomes["refused"] += 1

    def _computing(self, attempt: Attempt, index: int) -> Action:
        return lambda: self._compute(attempt, index)

    def _tokens(self, serve: Serve) -> int | None:
        return None if serve.tokens_off is None else serve.tokens + serve.tokens_off

    def _mark(self, attempt: Attempt) -> None:
        for buffer in self._pool.kv:
            buffer[attempt.pages] = STALE + attempt.number

    def _compute(self, attempt: Attempt, index: int) -> None:
        """One more chunk of the prompt is in this engine's pages."""
        serve = attempt.serve
        last = index == len(serve.chunks) - 1
        taken = self._pool.take(serve.chunks[index], last and serve.aux, self._process.name)
        if taken is None:
            self._world.starved = True
            attempt.handle.abort("no pages are left")
            self._acted = True
            return
        pages, row = taken
        first = sum(serve.chunks[:index])
        if not attempt.live:  # it had been computed when the room ended: the session ignores it, and the pages are ours
            self._hand_in(attempt, index, pages, row)
            self._pool.give(pages, row)
            return
        for offset, page in enumerate(pages):
            for buffer in self._pool.kv:
                buffer[page] = attempt.label(first + offset)
        if row is not None:
            self._pool.aux[row] = attempt.label(AUX)
            attempt.row = row
        attempt.pages += pages
        attempt.chunks += 1
        self._hand_in(attempt, index, pages, row)

    def _hand_in(self, attempt: Attempt, index: int, pages: list[int], row: int | None) -> None:
        serve = attempt.serve
        begin, end = sum(serve.chunks[:index]) * PAGE_TOKENS, sum(serve.chunks[: index + 1]) * PAGE_TOKENS
        last = index == len(serve.chunks) - 1
        assert isinstance(attempt.handle, Sender)
        attempt.handle.send(pages, (begin, serve.tokens if last else end), last=last, aux=row)
        self._acted = True

    def _grant(self, attempt: Attempt) -> None:
        serve = attempt.serve
        if not attempt.live:
            return
        taken = self._pool.take(serve.pages - serve.prefix_pages, serve.aux, self._process.name)
        if taken is None:
            self._world.starved = True
            attempt.handle.abort("no pages are left")
            self._acted = True
            return
        attempt.pages, attempt.row = taken
        attempt.granted = True
        self._mark(attempt)
        assert isinstance(attempt.handle, Receiver)
        prefix = serve.prefix_pages * PAGE_TOKENS
        attempt.handle.grant(attempt.pages, aux=attempt.row, decode_prefix_len=prefix, tokens=self._tokens(serve))
        self._acted = True

    # --- what it does by itself ------------------------------------------------------------------------------------------

    def react(self) -> bool:
        """One pass of its scheduler over all rooms. True when it called its session."""
        acted, self._acted = self._acted, False
        if self._group.poll().tolist() != [handle.poll() for handle in self._group.handles]:
            raise Violation(f"group differs: {self._process.name} polls {self._group.poll()} for {self._group.handles}")
        for attempt in list(self._unfinished.values()):
            self._look(attempt)
        acted, self._acted = acted or self._acted, False
        return acted

    def _look(self, attempt: Attempt) -> None:
        handle = attempt.handle
        attempt.look()
        if not attempt.concluded:
            if attempt.phase not in TERMINAL:
                self._grant_if_asked(attempt)
                return
            self._conclude(attempt)
        if not attempt.returned and not attempt.giving and handle.pages_free:
            attempt.giving = True
            self._check_free(attempt)
            if attempt.phase == Phase.SUCCESS and not attempt.sends and attempt.serve.hold_ms:
                self._after(attempt.serve.hold_ms, lambda: self._give(attempt))
            else:
                self._give(attempt)
        if attempt.returned and handle.cleared:
            del self._unfinished[handle.generation]
            self._group.discard(handle)

    def _grant_if_asked(self, attempt: Attempt) -> None:
        handle = attempt.handle
        if attempt.granted or attempt.grant_asked or not isinstance(handle, Receiver) or handle.tokens_computed is None:
            return
        attempt.grant_asked = True
        self._after(attempt.serve.grant_ms or 0, lambda: self._grant(attempt))

    def _conclude(self, attempt: Attempt) -> None:
        attempt.concluded = True
        attempt.ended_ms = self._world.agenda.now_ms
        failure = attempt.failure
        self._world.outcomes["SUCCESS" if failure is None else failure.cause] += 1
        self._world.agenda.note(
            f"{self._process.node} sees room {attempt.handle.room} end: {failure.reason if failure else 'SUCCESS'}"
        )
        if attempt.cancelled and failure is None:
            raise Violation(f"cancel lost: {attempt} had been cancelled, and succeeded")
        if failure is None:
            if attempt.sends:
                attempt.check_sent()
            else:
                attempt.check_received()
        self._after(attempt.serve.clear_ms, lambda: self._clear(attempt))

    def _clear(self, attempt: Attempt) -> None:
        if not attempt.handle.cleared:
            attempt.handle.clear()
            del self._by_room[attempt.handle.room]
            self._acted = True

    def _give(self, attempt: Attempt) -> None:
        if attempt.phase == Phase.SUCCESS and not attempt.sends:
            attempt.check_received()  # it was read from until now
        attempt.returned = True
        self._pool.give(attempt.pages, attempt.row)

    def _after(self, delay_ms: float, action: Action) -> None:
        if delay_ms:
            self._world.agenda.after(delay_ms, lambda: self._process.do(action))
        else:
            action()

    # --- what must be true -----------------------------------------------------------------------------------------------

    def _check_free(self, attempt: Attempt) -> None:
        fabric = self._world.fabric
        generation = attempt.handle.generation
        for write in fabric.reading(attempt) if attempt.sends else fabric.touching(self._process, generation):
            raise Violation(f"freed too early: the pages of {attempt} are free, but {write} can still touch them")

    def check_landing(self, write: Write, region: int, at: int, nbytes: int) -> None:
        """Bytes land: only in pages of that generation, and only while they are not given back."""
        attempt = self._by_generation.get(write.generation)
        if attempt is None:
            raise Violation(
                f"landed outside: {write} lands under generation {write.generation}, which {self._process.name} never opened"
            )
        if attempt.handle.pages_free or attempt.returned:
            raise Violation(f"landed in free pages: {write} lands in pages of {attempt} that are free")
        item_bytes = self._pool.layout.regions[region].item_bytes
        items = range(at // item_bytes, (at + nbytes - 1) // item_bytes + 1)
        granted = attempt.pages if region < len(self._pool.kv) else [attempt.row]
        if not set(items) <= set(granted):
            raise Violation(f"landed outside: {write} lands in items {list(items)} of region {region}; {attempt} has {granted}")

    def check_reading(self, write: Write) -> None:
        """Bytes are read: only while the sending engine has not got its pages back."""
        if not self._process.dead and write.attempt.handle.pages_free:
            raise Violation(f"read from free pages: {write} reads pages of {write.attempt} that are free")

    def note_source(self, generation: int, source: Attempt) -> None:
        attempt = self._by_generation.get(generation)
        if attempt is None:
            self._world.breach(f"landed outside: generation {generation} was never opened by {self._process.name}")
        if attempt.source not in (None, source):
            self._world.breach(f"mixed sources: {attempt} is written by {attempt.source} and by {source}")
        attempt.source = source

    def writing(self, op: int) -> Attempt:
        """The sending attempt of an operation that is being submitted."""
        return self._by_generation[self._process.core.ops[op].link.room.generation]

    def open_generations(self) -> set[int]:
        return {attempt.handle.generation for attempt in self._by_room.values()}

    # --- the end ---------------------------------------------------------------------------------------------------------

    def unfinished(self) -> list[str]:
        """Rooms that have not concluded, are not cleared, or whose pages are not back."""
        found = []
        for attempt in self._unfinished.values():
            if attempt.live:
                found.append(f"{attempt} is still {attempt.handle.phase.name}")
            elif not attempt.returned:
                found.append(f"{attempt} concluded, but its pages are not free: {self._process.core.describe()['leases']}")
        return found

    def attempts(self) -> list[Attempt]:
        """Every room that this engine opened."""
        return list(self._by_generation.values())
