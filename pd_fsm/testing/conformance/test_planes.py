"""The planes alone, without a session: each sentence of the contract in docs/transports.md, on a bare host.

What these tests can see of a write is judged in `rig.py`, at each outcome and once more at the end of each test.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pd_fsm
from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.kv import Plan, make_plan
from pd_fsm.testing.conformance.rig import PAGES, Rig, Side, Write
from pd_fsm.testing.conformance.target import Capabilities, Target, free_port

pytestmark = pytest.mark.pd_fsm_needs("peer")
MANY_PEERS = 6
BULK: dict[str, Any] = {"pages": 64, "page_bytes": (64 << 10,)}
"""Enough that a write is still on its way when the next call comes: 4 MiB of pages."""
NONSENSE = ("", "nonsense", "tcp://", "tcp://127.0.0.1:99999", "udp://127.0.0.1:9", "ipc://" + "x" * 200, "\x00\xff")


@pytest.fixture
def rig(target: Target, capabilities: Capabilities, directory: Path) -> Iterator[Rig]:
    made = Rig(target, directory, capabilities.vouches)
    yield made
    made.close()


def numbered(n: int) -> wire.Message:
    return wire.Accepted(n, n + 1)


def heard(side: Side, speaker: Side) -> list[int]:
    """The numbers of what came from `speaker`, in the order in which it came."""
    messages = [wire.decode(frame)[2] for frame, _ in list(side.frames) if frame[4:20] == speaker.incarnation]
    return [message.room for message in messages if isinstance(message, wire.Accepted)]


def bulk(rig: Rig, prefill: Side, decode: Side, writes: int = 8) -> list[Write]:
    """All pages of BULK sides in that many writes, one after the other, with nobody driving."""
    each: int = BULK["pages"] // writes
    ranges = [range(n * each, (n + 1) * each) for n in range(writes)]
    return [rig.write(prefill, decode, pages, pages[::-1]) for pages in ranges]


class TestControl:
    """Frames between sessions."""

    def test_frames_arrive_whole_and_in_order_in_both_directions(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            sent = list(range(300))
            for n in sent:
                rig.say(speaker, hearer, numbered(n))
            rig.say_until_heard(speaker, hearer, numbered(999))
            rig.run(0.05)  # for those that others overtook
            came = [n for n in heard(hearer, speaker) if n != 999]
            assert came == sorted(set(came)), "frames overtook each other, or came twice"
            assert set(came) <= set(sent)
        rig.finish()

    def test_a_frame_of_the_largest_size_arrives(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        header = len(wire.MAGIC) + 2 * wire.INCARNATION_BYTES
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            frame = (
                wire.MAGIC + speaker.incarnation + hearer.incarnation + random.Random(1).randbytes(wire.FRAME_BYTES_MAX - header)
            )
            rig.call(speaker, "send", hearer.incarnation, frame)
            rig.until(lambda hearer=hearer, frame=frame: any(f == frame for f, _ in hearer.frames), "it is there")  # type: ignore[misc]
        rig.finish()

    def test_a_frame_comes_on_the_connection_of_its_sender_or_nobodys(self, rig: Rig) -> None:
        """A transport that cannot tell says b""; a wrong name would let one peer speak for another."""
        prefill = rig.side("prefill")
        decodes = [rig.side("decode") for _ in range(3)]
        for decode in decodes:
            rig.meet(prefill, decode)
        for side in rig.sides:
            for frame, via in side.frames:
                assert via in (b"", frame[4:20]), f"{side.name} got a frame of {frame[4:8].hex()} via {via[:4].hex()}"
        rig.finish()

    def test_connecting_again_and_disconnecting_twice_is_harmless(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        rig.call(decode, "connect", prefill.incarnation, prefill.transport.control.endpoint)
        rig.say_until_heard(decode, prefill, numbered(1))
        for side, peer in ((decode, prefill), (prefill, decode)):
            for _ in range(2):
                rig.call(side, "disconnect", peer.incarnation)
            rig.call(side, "disconnect", b"never seen before"[:16])
        rig.run(0.05)
        rig.call(decode, "connect", prefill.incarnation, prefill.transport.control.endpoint)
        rig.say_until_heard(decode, prefill, numbered(2))
        rig.say_until_heard(prefill, decode, numbered(3))
        rig.finish()

    def test_a_frame_for_nobody_costs_nothing(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        for side in (prefill, decode):
            frame = wire.encode(side.incarnation, b"U" * 16, wire.Ping())
            rig.call(side, "send", b"U" * 16, frame)
        rig.run(0.05)
        rig.say_until_heard(decode, prefill, numbered(1))
        rig.say_until_heard(prefill, decode, numbered(2))
        rig.finish()

    def test_an_endpoint_that_makes_no_sense_costs_only_its_peer(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        for n, endpoint in enumerate(NONSENSE):
            peer = bytes([n]) * 16
            rig.call(decode, "connect", peer, endpoint)
            rig.call(decode, "send", peer, wire.encode(decode.incarnation, peer, wire.Ping()))
        rig.run(0.2)
        told = {event.peer for event in decode.of(ev.PeerUnreachable)}
        assert prefill.incarnation not in told
        rig.say_until_heard(decode, prefill, numbered(1))
        for n in range(len(NONSENSE)):
            rig.call(decode, "disconnect", bytes([n]) * 16)
        rig.finish()

    def test_garbage_frames_do_not_harm_the_connection(self, rig: Rig) -> None:
        """What a session would never send. It may be dropped or handed over, but not altered."""
        prefill, decode = rig.pair()
        dice = random.Random(3)
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            sent = {dice.randbytes(dice.choice([0, 1, 35, 36, 37, 5_000])) for _ in range(100)}
            before = len(hearer.frames)
            for frame in sent:
                rig.call(speaker, "send", hearer.incarnation, frame)
            rig.say_until_heard(speaker, hearer, numbered(1))
            came = {frame for frame, _ in hearer.frames[before:] if frame[:4] != wire.MAGIC}
            assert came <= sent | {b""}
        rig.finish()

    def test_a_peer_that_reads_nothing_blocks_nobody_and_is_not_called_dead(self, rig: Rig) -> None:
        """Either its outbox is full, which is said, or everything arrives once it reads again: nothing is lost without end."""
        limits = pd_fsm.Limits(outbox_messages_max=64)
        prefill, decode = rig.pair(limits=limits)
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            frames = [
                wire.encode(speaker.incarnation, hearer.incarnation, wire.Goodbye("x" * 400, drained=False)) for _ in range(2)
            ]
            for n in range(20_000):
                rig.call(speaker, "send", hearer.incarnation, frames[n % 2])
            rig.run(0.1, speaker)
            told = [event.peer for event in speaker.of(ev.PeerOverflowed) + speaker.of(ev.PeerUnreachable)]
            assert set(told) <= {hearer.incarnation}
            if not told:
                rig.until(lambda hearer=hearer: len(hearer.frames) >= 20_000, "everything arrived, as no overflow was said")  # type: ignore[misc]
            rig.say_until_heard(speaker, hearer, numbered(1))
        rig.finish()

    def test_a_silent_peer_is_not_called_dead(self, rig: Rig) -> None:
        """`dead` is a proof that its process is gone, never a time-out."""
        prefill, decode = rig.pair()
        for speaker, hearer in ((decode, prefill), (prefill, decode)):
            rig.say(speaker, hearer, wire.Ping())
            rig.run(0.5, speaker)
        rig.finish()

    def test_a_peer_that_closed_costs_no_other(self, rig: Rig) -> None:
        prefill, gone, decode = rig.side("prefill"), rig.side("decode"), rig.side("decode")
        for each in (gone, decode):
            rig.meet(prefill, each)
        rig.end(gone)
        for _ in range(3):
            rig.say(prefill, gone, wire.Ping())
            rig.run(0.02)
        rig.say_until_heard(prefill, decode, numbered(1))
        rig.say_until_heard(decode, prefill, numbered(2))
        assert {event.peer for event in prefill.of(ev.PeerUnreachable)} <= {gone.incarnation}
        rig.finish()


class TestData:
    """Page bytes, and what is said of them."""

    def test_scattered_pages_arrive_and_nothing_else_changes(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        dice = random.Random(1)
        write = rig.write(prefill, decode, dice.sample(range(PAGES), 20), dice.sample(range(PAGES), 20))
        rig.until_answered(write)
        assert write.outcome == "done", prefill.events
        rig.finish()

    @pytest.mark.parametrize("blocks", [16_384])
    def test_a_plan_of_many_blocks(self, rig: Rig, blocks: int) -> None:
        """Every other page, in two regions, in another order: no two blocks can become one."""
        count = blocks // 2
        prefill, decode = rig.pair(pages=2 * count, page_bytes=(256, 64))
        shuffle = np.random.default_rng(3)
        sources, targets = (2 * shuffle.permutation(count) for _ in range(2))
        write = rig.write(prefill, decode, sources.tolist(), targets.tolist())
        rig.until_answered(write)
        assert write.outcome == "done", prefill.events
        rig.finish()

    def test_one_long_run_of_bytes(self, rig: Rig) -> None:
        """Larger than any piece that a transport may cut it into, as one copy."""
        prefill, decode = rig.pair(pages=20, page_bytes=(1 << 20,))
        write = rig.write(prefill, decode, range(1, 20), range(19))
        rig.until_answered(write)
        assert write.outcome == "done", prefill.events
        rig.finish()

    def test_parts_of_no_length_do_no_harm(self, rig: Rig) -> None:
        """A session makes no such plan. It may be refused; it may not be half done, hang, or be called done without its bytes."""
        prefill, decode = rig.pair()
        pages = (("kv", wire.pack_pages([1, 5]), wire.pack_pages([2, 9])),)
        whole = make_plan(prefill.host.layout, pages, None)
        mixed = Plan(
            np.insert(whole.region, 1, 0),
            np.insert(whole.source, 1, 0),
            np.insert(whole.destination, 1, 0),
            np.insert(whole.nbytes, 1, 0),
            whole.total_bytes,
        )
        writes = [rig.write(prefill, decode, [1, 5], [2, 9], plan=mixed)]
        none = np.array([], dtype=np.int64)
        writes.append(rig.write(prefill, decode, [], [], plan=Plan(np.array([], dtype=np.int32), none, none, none, 0)))
        rig.until_answered(*writes)
        after = rig.write(prefill, decode, [20], [21])
        rig.until_answered(after)
        assert after.outcome == "done"
        rig.finish()

    def test_many_writes_at_once_end_once_each(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        writes = [rig.write(prefill, decode, [page], [PAGES - 1 - page]) for page in range(PAGES)]
        rig.until_answered()
        assert {write.outcome for write in writes} == {"done"}, prefill.events
        rig.finish()

    def test_both_sides_of_many_peers(self, rig: Rig) -> None:
        """Each decode is written to by each prefill; numbers of operations and generations mean nothing across peers."""
        prefills = [rig.side("prefill") for _ in range(2)]
        decodes = [rig.side("decode") for _ in range(MANY_PEERS)]
        for prefill, decode in itertools.product(prefills, decodes):
            rig.meet(prefill, decode)
        for turn in range(4):
            for p, d in itertools.product(range(2), range(MANY_PEERS)):
                source = turn * MANY_PEERS + d
                rig.write(prefills[p], decodes[d], [source, source + 30], [8 * p + turn, 8 * p + turn + 20])
        rig.until_answered()
        assert {write.outcome for write in rig.writes} == {"done"}
        rig.finish()

    def test_a_reader_that_does_not_move_blocks_nobody(self, rig: Rig) -> None:
        """Submitting and cancelling return at once, however much is on its way; every write ends when the reader goes on."""
        prefill, decode = rig.pair(**BULK, limits=pd_fsm.Limits(in_flight_bytes_max=1 << 20))
        writes = bulk(rig, prefill, decode)
        rig.run(0.1, prefill)
        rig.call(prefill, "cancel", writes[-1].op)
        rig.until_answered()
        assert {write.outcome for write in writes[:-1]} == {"done"}
        rig.finish()

    @pytest.mark.parametrize("pages", [1, 4, 16])
    def test_a_write_that_is_cancelled_as_it_begins(self, rig: Rig, pages: int) -> None:
        """The call comes right after submit(), while another thread may just take the write up."""
        prefill, decode = rig.pair(**BULK)
        for begin in range(0, BULK["pages"], pages):
            write = rig.write(prefill, decode, range(begin, begin + pages), range(begin, begin + pages))
            rig.call(prefill, "cancel", write.op)
        rig.until_answered()
        rig.finish()

    @pytest.mark.parametrize("when", ["at once", "on its way", "afterwards"])
    def test_a_cancelled_write_has_its_outcome_once(self, rig: Rig, when: str) -> None:
        prefill, decode = rig.pair(**BULK)
        writes = bulk(rig, prefill, decode)
        if when == "on its way":
            rig.drive(prefill)
            rig.drive(decode)
        elif when == "afterwards":
            rig.until_answered()
        for write in writes[::2]:
            for _ in range(2):
                rig.call(prefill, "cancel", write.op)
        rig.until_answered()
        assert {write.outcome for write in writes[1::2]} == {"done"}, "a write that nobody cancelled"
        rig.finish()

    def test_what_is_not_outstanding_can_be_cancelled(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        write = rig.write(prefill, decode, [1], [2])
        rig.until_answered()
        for op in (write.op, 12345):
            rig.call(prefill, "cancel", op)
        rig.run(0.05)
        rig.finish()

    @pytest.mark.parametrize("moved", [0, 1, 8])
    def test_every_write_of_a_lost_peer_has_its_outcome(self, rig: Rig, moved: int) -> None:
        """After `moved` rounds of both sides. What is called failed never lands afterwards, though the reader goes on reading."""
        prefill, decode = rig.pair(**BULK, limits=pd_fsm.Limits(in_flight_bytes_max=1 << 20))
        bulk(rig, prefill, decode)
        for _ in range(moved):
            rig.drive()
        for _ in range(2):
            rig.call(prefill, "peer_down", decode.incarnation)
        rig.until_answered()
        free = [write for write in rig.writes if write.over]
        if free:  # pages that the library may still read cannot be written from
            rig.until_answered(rig.write(prefill, decode, free[0].sources.tolist(), free[0].targets.tolist()))
        rig.run(0.2)
        rig.finish()

    def test_a_lost_peer_that_comes_back_is_written_to_again(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        for n in range(3):
            rig.call(prefill, "peer_down", decode.incarnation)
            rig.call(decode, "peer_down", prefill.incarnation)
            rig.run(0.02)
            rig.call(prefill, "peer_up", decode.incarnation, decode.transport.data.descriptor)
            rig.call(decode, "peer_up", prefill.incarnation, prefill.transport.data.descriptor)
            write = rig.write(prefill, decode, [n], [n + 10])
            rig.until_answered()
            assert write.outcome == "done"
        rig.finish()

    def test_a_lost_peer_costs_no_other(self, rig: Rig) -> None:
        prefill, gone, decode = rig.side("prefill", **BULK), rig.side("decode", **BULK), rig.side("decode", **BULK)
        for each in (gone, decode):
            rig.meet(prefill, each)
        lost = [rig.write(prefill, gone, range(n, n + 8), range(n, n + 8)) for n in (0, 8)]
        kept = [rig.write(prefill, decode, range(n, n + 8), range(n, n + 8)) for n in (16, 24)]
        rig.call(prefill, "peer_down", gone.incarnation)
        rig.until_answered(*lost, *kept)
        assert {write.outcome for write in kept} == {"done"}
        rig.finish()

    def test_a_write_to_nobody_fails(self, rig: Rig) -> None:
        prefill, decode = rig.side("prefill"), rig.side("decode")
        generation = rig.grant(decode, [2], prefill)
        rig.end(decode)
        write = rig.write(prefill, decode, [1], [2], generation=generation, granted=False)
        rig.until_answered()
        assert write.outcome != "done"
        rig.finish()

    @pytest.mark.pd_fsm_needs("descriptor")
    def test_a_descriptor_that_makes_no_sense_costs_only_its_peer(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        peer, rig.watch_dead = rig.side("decode"), False  # an address that was bent may be that of nobody, and be proven so
        good = peer.transport.data.descriptor
        dice = random.Random(5)
        bent = [b"\xff" * 16, dice.randbytes(40), dice.randbytes(5_000), good[: len(good) // 2], good + b"\x00", b""]
        for n, descriptor in enumerate(bent):
            rig.call(prefill, "peer_up", peer.incarnation, descriptor)
            write = rig.write(prefill, peer, [n], [n])
            rig.run(0.05)
            if n < 3:
                rig.until(lambda: bool(prefill.of(ev.PeerUnreachable)), f"{descriptor[:8]!r}... is told to be unreachable")
            rig.call(prefill, "peer_down", peer.incarnation)
            rig.until_answered(write)
        assert {event.peer for event in prefill.of(ev.PeerUnreachable)} == {peer.incarnation}
        healthy = rig.write(prefill, decode, [30], [31])
        rig.until_answered(healthy)
        assert healthy.outcome == "done"
        rig.finish()


class TestGrants:
    """Who may write where, and until when."""

    def test_revoking_is_idempotent_and_knows_strangers(self, rig: Rig) -> None:
        prefill, decode = rig.pair()
        write = rig.write(prefill, decode, [1], [2])
        rig.until_answered()
        for generation in (write.generation, write.generation, 999):
            assert isinstance(rig.call(decode, "revoke", generation), bool)
        rig.finish()

    @pytest.mark.pd_fsm_needs("vouches")
    @pytest.mark.parametrize("after_ms", [0, 2, 50])
    def test_nothing_lands_after_a_revocation_that_vouches(self, rig: Rig, after_ms: int) -> None:
        """While the writer writes. The next owner's bytes are put into the pages in the very moment that revoke() returns."""
        prefill, decode = rig.pair(**BULK)
        writes = bulk(rig, prefill, decode)
        rig.run(after_ms / 1e3, prefill)
        if after_ms:
            rig.drive(decode)
        for write in writes:
            if not write.over:
                assert rig.call(decode, "revoke", write.generation) is True
        rig.abandon(decode)
        rig.until_answered()
        rig.finish()

    @pytest.mark.pd_fsm_needs("vouches")
    def test_only_what_is_granted_can_be_written(self, rig: Rig) -> None:
        """By its writers, to its pages, under its generation: whatever a writer asks for."""
        prefill, decode = rig.pair()
        stranger = rig.side("prefill")
        rig.meet(stranger, decode)
        granted = rig.grant(decode, [4, 5, 6], prefill)
        bad = [
            rig.write(prefill, decode, [10], [7], generation=granted, granted=False),
            rig.write(prefill, decode, [11], [3], generation=granted, granted=False),
            rig.write(prefill, decode, [12, 13], [50, 7], generation=granted, granted=False),
            rig.write(prefill, decode, [14], [30], generation=granted + 1, granted=False),
            rig.write(stranger, decode, [15], [40], generation=granted, granted=False),
        ]
        rig.until_answered(*bad)
        good = rig.write(prefill, decode, [20, 21], [4, 6], generation=granted)
        rig.until_answered(good)
        assert good.outcome == "done"
        assert rig.grant(decode, [30], prefill) == granted + 1, "what was refused before comes too late for it"
        rig.finish()


class TestEnds:
    """Sides that close, and those that come after them."""

    def test_a_reader_that_comes_after_another_gets_only_its_own(self, rig: Rig) -> None:
        prefill, old = rig.pair(**BULK)
        writes = bulk(rig, prefill, old)
        rig.drive()
        rig.call(prefill, "peer_down", old.incarnation)
        rig.until_answered(*writes)
        rig.end(old)
        new = rig.side("decode", **BULK)
        rig.meet(prefill, new)
        # Pages of unknown writes stay untouched: their bytes may still be read.
        free = [page for write in writes if write.over for page in write.sources.tolist()][:8] or [0]
        if any(write.over for write in writes):
            again = rig.write(prefill, new, free, free)
            rig.until_answered(again)
            assert again.outcome == "done"
        rig.finish()

    @pytest.mark.pd_fsm_needs("fixed_port")
    def test_a_writer_that_restarts_at_the_same_address_is_another_one(self, rig: Rig) -> None:
        port = free_port()
        old, decode = rig.side("prefill", port=port), rig.side("decode")
        rig.meet(old, decode)
        rig.until_answered(rig.write(old, decode, [1], [2]))
        endpoint = old.transport.control.endpoint
        rig.end(old)
        new = rig.side("prefill", port=port)
        assert new.transport.control.endpoint == endpoint, "the options say that it is the same"
        rig.say(decode, old, numbered(7))
        rig.run(0.2)
        rig.call(decode, "disconnect", old.incarnation)
        rig.call(decode, "peer_down", old.incarnation)
        rig.meet(new, decode)
        write = rig.write(new, decode, [3], [4])
        rig.until_answered(write)
        assert write.outcome == "done"
        rig.finish()

    @pytest.mark.pd_fsm_needs("vouches")
    def test_nothing_lands_in_a_side_that_closed(self, rig: Rig) -> None:
        prefill, decode = rig.pair(**BULK)
        bulk(rig, prefill, decode)
        rig.drive()
        rig.end(decode, linger_ms=0)
        rig.abandon(decode)
        rig.run(0.2, prefill)
        rig.call(prefill, "peer_down", decode.incarnation)
        rig.until_answered()
        rig.finish()

    def test_a_writer_that_closed_reads_its_memory_no_more(self, rig: Rig) -> None:
        """What lands afterwards left before: the old bytes, never those that its engine puts there next."""
        prefill, decode = rig.pair(**BULK)
        bulk(rig, prefill, decode)
        rig.drive()
        rig.end(prefill, linger_ms=0)
        before = [buffer.copy() for buffer in decode.buffers]
        for buffer, mirror in zip(prefill.buffers, prefill.expected, strict=True):
            buffer[:] = mirror[:] = 0xEE
        rig.run(0.3)
        for buffer, old in zip(decode.buffers, before, strict=True):
            assert not ((buffer == 0xEE).all(axis=1) & (old != 0xEE).any(axis=1)).any(), "memory was read after close()"
        rig.finish()

    def test_closing_is_bounded_with_a_peer_that_reads_nothing(self, rig: Rig) -> None:
        prefill, decode = rig.pair(**BULK)
        bulk(rig, prefill, decode)
        for n in range(1_000):
            rig.say(prefill, decode, numbered(n))
            rig.say(decode, prefill, numbered(n))
        began = time.monotonic()
        rig.end(decode, linger_ms=200)
        rig.end(prefill, linger_ms=200)
        assert time.monotonic() - began < 20
        rig.finish()
