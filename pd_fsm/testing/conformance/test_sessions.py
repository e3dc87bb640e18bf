"""Pairs of real sessions over the transport under test: what moves, what is given up, what does not fit, and how it ends.

What a user of pd-fsm sees. The bytes of all memory are compared, not only of the pages that were handed over.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.testing.conformance.engines import PAGE_SIZE, PAGES, World, make_engine, open_files, threads, until, why

SUCCEEDED = [Phase.SUCCESS, Phase.SUCCESS]
FAILED = [Phase.FAILED, Phase.FAILED]

pytestmark = pytest.mark.pd_fsm_needs("peer")


class TestSessions:
    """Each test is run with and without threads of the sessions' own: fixture `world`."""

    # --- what moves ------------------------------------------------------------------------------------------------------

    def test_one_chunk_moves_exactly_its_pages_and_its_aux_row(self, world: World) -> None:
        prefill, decode = world.pair()
        sender = prefill.session.send(1)
        receiver = decode.session.receive(1, [5, 6, 9], aux=3)
        sender.send([1, 2, 3], (0, 3 * PAGE_SIZE), last=True, aux=2)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(1, 5), (2, 6), (3, 9)], aux=(2, 3))
        decode.check()
        prefill.check()
        assert sender.bytes_moved == receiver.bytes_moved == 3 * (96 + 64 + 8) + 16 + 3
        assert sender.failure is None
        assert receiver.failure is None
        world.at_rest()

    @pytest.mark.parametrize("chunks", [2, 7, 40])
    def test_many_chunks_of_scattered_pages(self, world: World, chunks: int) -> None:
        prefill, decode = world.pair()
        dice = random.Random(chunks)
        sources, targets = dice.sample(range(PAGES), chunks), dice.sample(range(PAGES), chunks)
        sender = prefill.session.send(1)
        receiver = decode.session.receive(1, targets, aux=0)
        for index, page in enumerate(sources):
            last = index == chunks - 1
            end = (index + 1) * PAGE_SIZE - (1 if last else 0)  # the last page is not full
            sender.send([page], (index * PAGE_SIZE, end), last=last, aux=1 if last else None)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, list(zip(sources, targets, strict=True)), aux=(1, 0))
        decode.check()
        assert sender.bytes_moved == receiver.bytes_moved

    def test_many_rooms_interleaved(self, world: World) -> None:
        """Rooms opened in different orders on both sides, chunks handed in in turns: no byte of one room in another."""
        prefill, decode = world.pair()
        dice = random.Random(5)
        rooms = list(range(12))
        per_room = PAGES // len(rooms)
        sources, targets = dice.sample(range(PAGES), PAGES), dice.sample(range(PAGES), PAGES)
        mine = {room: slice(room * per_room, (room + 1) * per_room) for room in rooms}
        senders, receivers = {}, {}
        for room in dice.sample(rooms, len(rooms)):
            senders[room] = prefill.session.send(room)
        for room in dice.sample(rooms, len(rooms)):
            receivers[room] = decode.session.receive(room, targets[mine[room]])
        for index in range(per_room):
            for room in dice.sample(rooms, len(rooms)):
                page = sources[mine[room]][index]
                senders[room].send([page], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == per_room - 1)
        assert set(world.conclude(*senders.values(), *receivers.values())) == {Phase.SUCCESS}
        decode.expect(prefill, list(zip(sources, targets, strict=True)))
        decode.check()
        prefill.check()
        world.at_rest()

    def test_a_prefix_that_decode_has_is_not_sent(self, world: World) -> None:
        prefill, decode = world.pair()
        sender = prefill.session.send(1)
        before = sender.decode_prefix_len
        receiver = decode.session.receive(1, [20, 21], decode_prefix_len=2 * PAGE_SIZE)
        world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "the offer arrived")
        assert (before, sender.decode_prefix_len) == (None, 2 * PAGE_SIZE)
        sender.send([1], (0, PAGE_SIZE))
        sender.send([2, 3, 4], (PAGE_SIZE, 4 * PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(3, 20), (4, 21)])
        decode.check()

    def test_a_prefix_of_everything_moves_the_aux_row_only(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [], aux=7, decode_prefix_len=PAGE_SIZE)
        sender.send([1], (0, PAGE_SIZE), last=True, aux=0)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [], aux=(0, 7))
        decode.check()
        assert receiver.bytes_moved == 19

    def test_nothing_at_all_to_move(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [4])
        sender.send([], (0, 0), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.check()

    def test_chunks_handed_in_before_anybody_is_there(self, world: World) -> None:
        prefill = world.open("prefill")
        sender = prefill.session.send(9)
        sender.send([1], (0, PAGE_SIZE))
        sender.send([2], (PAGE_SIZE, 2 * PAGE_SIZE), last=True)
        decode = world.open("decode")
        receiver = decode.session.receive(9, [3, 4])
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(1, 3), (2, 4)])
        decode.check()

    def test_a_room_that_prefill_opens_late_waits(self, world: World) -> None:
        prefill, decode = world.pair()
        receiver = decode.session.receive(9, [3])
        world.until(lambda: prefill.session.describe()["early_offers"] == 1, "the offer waits at prefill")
        assert receiver.phase is Phase.WAITING_FOR_INPUT
        sender = prefill.session.send(9)
        sender.send([1], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(1, 3)])
        decode.check()

    def test_the_same_room_number_again_and_again(self, world: World) -> None:
        prefill, decode = world.pair()
        generations = set()
        for turn in range(5):
            with prefill.session.send(7) as sender, decode.session.receive(7, [turn]) as receiver:
                sender.send([10 + turn], (0, PAGE_SIZE), last=True)
                assert world.conclude(sender, receiver) == SUCCEEDED
                generations.add(receiver.generation)
            decode.expect(prefill, [(10 + turn, turn)])
        decode.check()
        assert len(generations) == 5

    def test_two_prefills_and_two_decodes(self, world: World) -> None:
        """Decode ranks of one engine pair; which prefill serves a room is told by the address."""
        prefills = [world.open("prefill", rendezvous=world.registry.client(f"p{n}")) for n in range(2)]
        decodes = [world.open("decode", rendezvous=world.registry.client()) for _ in range(2)]
        handles = []
        for p, prefill in enumerate(prefills):
            for d, decode in enumerate(decodes):
                room = 10 * p + d
                sender = prefill.session.send(room)
                receiver = decode.session.receive(room, [room], prefill=f"p{p}")
                sender.send([room + 1], (0, PAGE_SIZE), last=True)
                handles += [sender, receiver]
                decode.expect(prefill, [(room + 1, room)])
        assert set(world.conclude(*handles)) == {Phase.SUCCESS}
        for decode in decodes:
            decode.check()

    def test_pages_that_are_reserved_when_prefill_is_done(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, None)
        sender.send([1], (0, PAGE_SIZE))
        sender.send([2], (PAGE_SIZE, 2 * PAGE_SIZE), last=True, aux=0)
        world.until(lambda: receiver.tokens_computed is not None, "prefill said that it is done")
        decode.check()
        receiver.grant([7, 8], aux=4)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(1, 7), (2, 8)], aux=(0, 4))
        decode.check()
        world.at_rest()

    # --- what is given up ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    @pytest.mark.parametrize("phase", [Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING])
    def test_an_abort_fails_both_sides_and_frees_their_pages(self, world: World, side: str, phase: Phase) -> None:
        prefill, decode = world.pair()
        sender = prefill.session.send(1)
        if phase is Phase.BOOTSTRAPPING:
            (sender if side == "prefill" else decode.session.receive(1, [5, 6])).abort("client left")
            if side == "prefill":
                receiver = decode.session.receive(1, [5, 6])
                assert world.conclude(sender, receiver) == FAILED
                assert "client left" in why(receiver).reason
            world.until(lambda: not decode.session.describe()["leases"], "the pages are free")
            return
        receiver = decode.session.receive(1, [5, 6])
        if phase is Phase.TRANSFERRING:
            sender.send([1], (0, PAGE_SIZE))
        world.until(lambda: sender.phase is receiver.phase is phase, f"both are {phase.name}")
        first, second = (sender, receiver) if side == "prefill" else (receiver, sender)
        first.abort("client left")
        assert first.phase is Phase.FAILED, "the verdict is there at once"
        assert first.failure == pd_fsm.Failure("abort", "client left")
        assert world.conclude(sender, receiver) == FAILED
        assert why(second).cause == "peer_abort"
        assert "client left" in why(second).reason
        assert why(second).peer == f"{side}-0"
        if phase is Phase.TRANSFERRING:
            decode.expect(prefill, [(1, 5)])
        decode.check()
        world.at_rest()
        for handle in (sender, receiver):
            handle.clear()
        again = prefill.session.send(1), decode.session.receive(1, [5])
        again[0].send([2], (0, PAGE_SIZE), last=True)
        assert world.conclude(*again) == SUCCEEDED
        decode.expect(prefill, [(2, 5)])
        decode.check()

    def test_nothing_lands_after_an_aborted_rooms_pages_are_free(self, world: World) -> None:
        """Decode gives rooms up while chunks are on their way, and overwrites the pages as soon as it may."""
        prefill, decode = world.pair()
        for room in range(20):
            sender, receiver = prefill.session.send(room), decode.session.receive(room, list(range(40)))
            world.until(lambda sender=sender: sender.phase is Phase.WAITING_FOR_INPUT, "they met")  # type: ignore[misc]
            for index in range(40):
                prefill.session.progress()
                sender.send([index], (index * PAGE_SIZE, (index + 1) * PAGE_SIZE), last=index == 39)
                if index == 20 + room % 10:
                    receiver.abort("enough")
            world.conclude(sender, receiver)
            for buffer, expected in zip(decode.buffers, decode.expected, strict=True):
                buffer[:] = expected[:] = room
        world.at_rest()
        decode.check()

    def test_abort_after_success_changes_nothing(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        sender.send([1], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        sender.abort()
        receiver.abort()
        assert world.conclude(sender, receiver) == SUCCEEDED
        assert sender.failure is receiver.failure is None

    def test_leaving_the_context_of_a_live_room_aborts_it(self, world: World) -> None:
        prefill, decode = world.pair()
        sender = prefill.session.send(1)
        receiver = decode.session.receive(1, [5])

        def schedule() -> None:
            with receiver:
                world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
                raise RuntimeError("scheduler bug")

        with pytest.raises(RuntimeError, match="scheduler bug"):
            schedule()
        assert receiver.phase is Phase.FAILED
        assert "RuntimeError: scheduler bug" in why(receiver).reason
        assert world.conclude(sender, receiver) == FAILED
        assert decode.session.describe()["rooms"] == []

    # --- what does not fit -----------------------------------------------------------------------------------------------

    def test_layouts_that_do_not_fit_are_refused_with_both_values(self, world: World) -> None:
        prefill = world.open("prefill")
        decode = world.open("decode", make_engine("decode", 9, page_size=8))
        receiver = decode.session.receive(1, [5])
        world.conclude(receiver)
        assert why(receiver).cause == "peer_refused"
        for part in ("page_size", "8 at decode-0", f"{PAGE_SIZE} at prefill-0"):
            assert part in why(receiver).reason
        decode.check()
        prefill.check()

    def test_page_bytes_that_do_not_fit_are_refused_with_both_values(self, world: World) -> None:
        world.open("prefill")
        decode = world.open("decode", make_engine("decode", 9, page_bytes=(96, 80, 8)))
        receiver = decode.session.receive(1, [5])
        world.conclude(receiver)
        assert why(receiver).cause == "peer_refused"
        for part in ("'kv'", "item_bytes", "80/96 bytes", "64/96 bytes"):
            assert part in why(receiver).reason

    def test_different_numbers_of_pages_fit(self, world: World) -> None:
        prefill = world.open("prefill")
        decode = world.open("decode", make_engine("decode", 9, pages=3))
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [2])
        sender.send([PAGES - 1], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(PAGES - 1, 2)])
        decode.check()

    def test_too_few_granted_pages_fail_the_room_on_both_sides(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        sender.send([1, 2], (0, 2 * PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == FAILED
        assert why(sender).cause == "protocol"
        assert why(sender).reason in why(receiver).reason
        decode.check()

    @pytest.mark.parametrize(
        "pages", [[PAGES], [-1], [3, 3], [1 << 31], [0.5], np.array([0.5]), np.array([[1]]), np.array([(1 << 32) + 1]), "1"]
    )
    def test_wrong_pages_are_the_callers_error(self, world: World, pages: list[int]) -> None:
        prefill, decode = world.pair()
        with pytest.raises(pd_fsm.LocalProtocolError):
            decode.session.receive(1, pages)
        sender = prefill.session.send(1)
        with pytest.raises(pd_fsm.LocalProtocolError):
            sender.send(pages, (0, PAGE_SIZE * len(pages) - 1))
        receiver = decode.session.receive(1, np.array([5], dtype=np.uint16))  # nothing was changed by the refused calls
        sender.send(np.array([1]), (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED

    @pytest.mark.parametrize("aux", [8, -2, 1 << 40])
    def test_a_wrong_aux_row_is_the_callers_error(self, world: World, aux: int) -> None:
        decode = world.open("decode")
        with pytest.raises(pd_fsm.LocalProtocolError, match="aux row"):
            decode.session.receive(1, [1], aux=aux)

    # --- waiting and ending ----------------------------------------------------------------------------------------------

    def test_a_bounded_wait_ends_and_says_for_what(self, world: World) -> None:
        decode = world.open("decode")
        receiver = decode.session.receive(1, [5])
        began = time.monotonic()
        with pytest.raises(pd_fsm.WaitTimeout, match=r"waited 0.05 s for room 1 to conclude; .*BOOTSTRAPPING"):
            receiver.wait(0.05)
        assert 0.05 <= time.monotonic() - began < 2
        assert receiver.phase is Phase.BOOTSTRAPPING, "the room goes on"

    def test_a_deadline_fails_the_room_and_says_what_was_missing(self, world: World) -> None:
        decode = world.open("decode", deadlines=pd_fsm.Deadlines(bootstrap_ms=60))
        receiver = decode.session.receive(1, [5])
        assert receiver.wait(5) is Phase.FAILED
        assert why(receiver).cause == "timeout"
        with pytest.raises(pd_fsm.RoomFailed, match=r"room 1 failed .*timeout.* BOOTSTRAPPING after 60 ms"):
            receiver.raise_for_failure()

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_closing_one_side_fails_the_other_and_frees_its_pages(self, world: World, side: str) -> None:
        prefill, decode = world.pair(thread=True)  # a closing side waits for the other one, which has to move
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5, 6])
        sender.send([1], (0, PAGE_SIZE))
        world.until(lambda: sender.phase is receiver.phase is Phase.TRANSFERRING, "the transfer began")
        closing, staying = (prefill, receiver) if side == "prefill" else (decode, sender)
        began = time.monotonic()
        closing.close()
        assert time.monotonic() - began < 1.5, "nothing had to be waited out"
        assert world.conclude(sender, receiver) == FAILED
        assert why(staying).peer == f"{side}-0"
        assert f"{side}-0 was closed" in why(staying).reason
        with pytest.raises(pd_fsm.LocalProtocolError, match="closing"):
            (closing.session.send if side == "prefill" else lambda room: closing.session.receive(room, []))(2)

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_a_side_that_drains_finishes_what_it_has(self, world: World, side: str) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "they met")
        draining = prefill if side == "prefill" else decode
        draining.session.begin_drain("it is replaced")
        assert not draining.session.drained
        sender.send([1], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        decode.expect(prefill, [(1, 5)])
        decode.check()
        world.until(lambda: draining.session.drained, "it is drained")
        with pytest.raises(pd_fsm.LocalProtocolError, match="it is replaced"):
            (prefill.session.send if side == "prefill" else lambda room: decode.session.receive(room, []))(2)

    @pytest.mark.parametrize("side", ["prefill", "decode"])
    def test_the_next_life_of_a_side_is_served_at_once(self, world: World, side: str) -> None:
        """Three lives of one side, each ended with a room in the middle of its transfer, beside one life of the other."""
        prefill, decode = world.pair(thread=True)
        for turn in range(3):
            sender, receiver = prefill.session.send(turn), decode.session.receive(turn, [turn, 10 + turn])
            sender.send([turn], (0, PAGE_SIZE))
            world.until(lambda r=receiver: r.phase is Phase.TRANSFERRING, "the transfer began")  # type: ignore[misc]
            ending = prefill if side == "prefill" else decode
            ending.close()
            assert world.conclude(sender, receiver) == FAILED
            if side == "prefill":
                decode.expect(prefill, [(turn, turn)])
                prefill = world.open("prefill", thread=True)
            else:
                decode = world.open("decode", thread=True)
            sender, receiver = prefill.session.send(100 + turn), decode.session.receive(100 + turn, [20 + turn])
            sender.send([30 + turn], (0, PAGE_SIZE), last=True)
            assert world.conclude(sender, receiver) == SUCCEEDED
            decode.expect(prefill, [(30 + turn, 20 + turn)])
            decode.check()
            prefill.check()

    def test_everything_still_answers_after_close(self, world: World) -> None:
        prefill, decode = world.pair()
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        world.close()
        assert not prefill.session.progress()
        prefill.session.wait(1.0)
        prefill.session.close()
        assert receiver.wait(1) is Phase.FAILED
        assert why(sender).cause == "shutdown", "the side that closed first; the other one was told, or closed, too"
        sender.abort()
        sender.clear()
        sender.clear()
        assert prefill.session.describe()["closing"]
        assert prefill.session.describe()["counts"].get("driver_error", 0) == 0

    def test_close_leaves_no_thread_and_no_open_file(self, world: World) -> None:
        world.pair()
        world.close()  # whatever the libraries open once and keep is open now
        before_files, before_threads = open_files(), threads()
        for _ in range(3):
            prefill, decode = world.pair()
            sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
            sender.send([1], (0, PAGE_SIZE), last=True)
            world.conclude(sender, receiver)
            decode.session.receive(2, [6])  # left open
            world.close()
        until(lambda: threads() == before_threads, "the threads ended")
        assert len(open_files()) == len(before_files), set(open_files().items()) ^ set(before_files.items())
        assert list(world.directory.iterdir()) == []

    def test_a_session_that_cannot_open_leaves_nothing(self, world: World) -> None:
        world.pair()
        world.close()
        before_files, before_threads = open_files(), threads()
        with pytest.raises(pd_fsm.ConfigError):
            world.open("prefill", transport_options=world.options() | {"nonsense": 1})
        with pytest.raises(pd_fsm.ConfigError, match="no transport 'carrier pigeon'"):
            world.open("prefill", transport="carrier pigeon", transport_options={})
        with pytest.raises(pd_fsm.ConfigError, match="'prefill' or 'decode'"):
            world.open("both")
        with pytest.raises(pd_fsm.ConfigError, match="trace"):
            world.open("prefill", trace=str(Path(__file__) / "not a directory" / "trace.ndjson"))
        assert threads() == before_threads
        assert len(open_files()) == len(before_files)

    def test_the_trace_tells_the_whole_story(self, world: World) -> None:
        path = world.directory.parent / f"{world.directory.name}.ndjson"
        prefill, decode = world.open("prefill"), world.open("decode", trace=str(path))
        sender, receiver = prefill.session.send(1), decode.session.receive(1, [5])
        sender.send([1], (0, PAGE_SIZE), last=True)
        world.conclude(sender, receiver)
        receiver.clear()
        world.close()
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        assert (lines[0]["event"], lines[-1]["event"]) == ("open", "close")
        room = [(line["before"], line["after"]) for line in lines if line["machine"] == "room" and line["before"] != line["after"]]
        assert room == [
            ("", "BOOTSTRAPPING"),
            ("BOOTSTRAPPING", "WAITING_FOR_INPUT"),
            ("WAITING_FOR_INPUT", "TRANSFERRING"),
            ("TRANSFERRING", "SUCCESS"),
            ("SUCCESS", ""),
        ]
        times = [line["t_ms"] for line in lines]
        assert times == sorted(times)
