"""The core's ordinary life of a room: chunks, prefixes, aux rows, readers, and the engine's own mistakes."""

from __future__ import annotations

import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.wire import ComponentInfo, pack_pages, unpack_pages
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import Phase
from tests.pair import ADDRESS, Pair, Side

PAGE_BYTES = 2 * 4_096
AUX_BYTES = 128


@pytest.fixture
def pair() -> Pair:
    return Pair()


def copies(write: ev.Submit) -> tuple[list[int], list[int]]:
    """Source and destination pages of a write in the only index space."""
    ((space, source, destination),) = write.copies
    assert space == "kv"
    return list(unpack_pages(source)), list(unpack_pages(destination))


def succeeded(side: Side, room: int) -> None:
    assert side.phase(room) is Phase.SUCCESS, side.room(room).failure
    generation = side.room(room).generation
    assert side.released.count((room, generation)) == 1
    phases = [phase for _, g, phase in side.published if g == generation]
    assert phases == [Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING, Phase.SUCCESS]


# --- the happy path ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notified", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_chunks_arrive_and_both_sides_succeed(pair: Pair, chunks: int, notified: bool) -> None:
    pair.send(7)
    pair.receive(7, tuple(range(20, 20 + chunks)))
    pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.WAITING_FOR_INPUT
    for index in range(chunks):
        last = index == chunks - 1
        pair.chunk(7, 16 * index, 16 * index + 16, (index,), last=last, aux_row=9 if last else -1)
        (write,) = pair.writes.values()
        assert copies(write) == ([index], [20 + index])
        assert write.aux == ((9, 3) if last else None)
        nbytes = PAGE_BYTES + (AUX_BYTES if last else 0)
        assert write.notice == wire.Part(7, pair.d.room(7).generation, index, index + 1 if last else 0, last, nbytes)
        pair.finish(notified=notified)
        pair.deliver()
        assert pair.d.phase(7) is (Phase.SUCCESS if last else Phase.TRANSFERRING)
    for side in (pair.p, pair.d):
        succeeded(side, 7)
        assert side.room(7).bytes_moved == chunks * PAGE_BYTES + AUX_BYTES
        assert side.core.counts["succeeded"] == 1
        side.clear(side.room(7))
    assert bool(pair.p.sent(wire.Verdict)) is not notified  # the data plane told it all: no verdict is needed
    pair.idle()


def test_writes_that_finish_out_of_order_succeed(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (20, 21, 22))
    pair.deliver()
    for index in range(3):
        pair.chunk(7, 16 * index, 16 * index + 16, (index,), last=index == 2, aux_row=0 if index == 2 else -1)
    for op in sorted(pair.writes, reverse=True):
        assert pair.p.phase(7) is pair.d.phase(7) or pair.d.phase(7) is Phase.WAITING_FOR_INPUT
        pair.finish(op)
        pair.deliver()
    succeeded(pair.p, 7)
    succeeded(pair.d, 7)
    pair.idle()


def test_chunks_handed_in_before_the_reader_is_known_are_kept(pair: Pair) -> None:
    pair.send(7)
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.chunk(7, 16, 20, (2,), last=True, aux_row=0)
    assert not pair.writes
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    pair.receive(7)
    pair.deliver()
    assert [copies(w) for w in pair.writes.values()] == [([1], [10]), ([2], [11])]
    pair.finish()
    pair.deliver()
    succeeded(pair.p, 7)
    succeeded(pair.d, 7)


def test_not_success_until_the_last_chunk_was_handed_in(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.finish()
    pair.deliver()
    assert pair.p.phase(7) is pair.d.phase(7) is Phase.TRANSFERRING


def test_not_success_while_a_part_is_missing(pair: Pair) -> None:
    """The last chunk arrives twice, the first one never: two confirmations, but not of two parts."""
    pair.transferring(7)
    generation = pair.d.room(7).generation
    for _ in range(2):
        pair.d.tell(wire.Part(7, generation, 1, 2, True, 10))
    assert pair.d.phase(7) is Phase.TRANSFERRING
    assert pair.d.core.counts["duplicate.part"] == 1
    assert pair.d.room(7).bytes_moved == 10
    pair.d.tell(wire.Part(7, generation, 0, 0, False, 10))
    assert pair.d.phase(7) is Phase.SUCCESS


def test_verdict_of_success_confirms_parts_that_were_lost(pair: Pair) -> None:
    pair.transferring(7)
    pair.finish()
    pair.deliver(lose=(wire.Part,))
    succeeded(pair.d, 7)
    assert pair.d.room(7).bytes_moved == pair.p.room(7).bytes_moved == 2 * PAGE_BYTES + AUX_BYTES
    pair.idle()


def test_verdict_adds_only_the_bytes_of_parts_that_were_lost(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.finish()
    pair.deliver()
    assert pair.d.room(7).bytes_moved == PAGE_BYTES
    pair.chunk(7, 16, 32, (2,), last=True, aux_row=0)
    pair.finish()
    pair.deliver(lose=(wire.Part,))
    succeeded(pair.d, 7)
    assert pair.d.room(7).bytes_moved == 2 * PAGE_BYTES + AUX_BYTES


def test_no_aux_row_when_decode_wants_none(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, aux_row=-1)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=5)
    (write,) = pair.writes.values()
    assert write.aux is None
    assert write.notice.aux is False
    pair.finish()
    (part,) = pair.pending(wire.Part)
    assert part == write.notice
    pair.deliver()
    assert pair.d.room(7).bytes_moved == 2 * PAGE_BYTES


def test_an_aux_row_that_decode_waits_for_must_come(pair: Pair) -> None:
    """Success is complete: without the aux row that was granted it is none."""
    pair.send(7)
    pair.receive(7, aux_row=3)
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.chunk(7, 16, 32, (2,), last=True)
    pair.deliver()
    for side in (pair.p, pair.d):
        assert side.phase(7) is Phase.FAILED
        failure = side.room(7).failure
        assert failure is not None
        assert "aux row 3" in failure.reason
    assert pair.p.room(7).failure.cause == "protocol"  # type: ignore[union-attr]


# --- the prefix that decode already has --------------------------------------------------------------------------------------


def test_the_prefix_skips_its_pages(pair: Pair) -> None:
    sending = pair.send(7)
    assert sending.decode_prefix_len() is None
    pair.receive(7, (20, 21), prefix=16)
    pair.deliver()
    assert sending.decode_prefix_len() == 16
    pair.chunk(7, 0, 48, (1, 2, 3), last=True, aux_row=0)
    (write,) = pair.writes.values()
    assert copies(write) == ([2, 3], [20, 21])
    assert write.notice.nbytes == 2 * PAGE_BYTES + AUX_BYTES


def test_a_prefix_beyond_the_first_chunks(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (20, 21), prefix=48)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=False)
    pair.chunk(7, 32, 64, (3, 4), last=False)
    pair.chunk(7, 64, 70, (5,), last=True, aux_row=0)
    assert [copies(w) for w in pair.writes.values()] == [([4], [20]), ([5], [21])]  # of the first chunk decode has everything
    pair.finish()
    pair.deliver()
    succeeded(pair.p, 7)
    succeeded(pair.d, 7)


def test_a_full_prefix_hit_moves_only_the_aux_row(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (), prefix=32)
    pair.deliver()
    pair.chunk(7, 0, 30, (1, 2), last=True, aux_row=4)
    (write,) = pair.writes.values()
    assert copies(write) == ([], [])
    assert write.aux == (4, 3)
    pair.finish()
    pair.deliver()
    succeeded(pair.d, 7)
    assert pair.d.room(7).bytes_moved == AUX_BYTES


@pytest.mark.parametrize("early", [False, True])
def test_a_full_prefix_hit_without_an_aux_row_needs_no_write(pair: Pair, early: bool) -> None:
    pair.send(7)
    if early:
        pair.chunk(7, 0, 30, (1, 2), last=True)
    pair.receive(7, (), aux_row=-1, prefix=32)
    pair.deliver()
    if not early:
        pair.chunk(7, 0, 30, (1, 2), last=True)
    assert not pair.writes
    pair.deliver()
    succeeded(pair.p, 7)
    succeeded(pair.d, 7)
    pair.idle()


def test_an_empty_last_chunk_closes_the_sequence(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (20,))
    pair.deliver()
    pair.chunk(7, 0, 16, (1,), last=False)
    pair.chunk(7, 16, 16, (), last=True, aux_row=0)
    pair.finish()
    pair.deliver()
    succeeded(pair.p, 7)
    succeeded(pair.d, 7)


def test_a_grant_that_is_too_small_fails_both_sides(pair: Pair) -> None:
    pair.send(7)
    pair.receive(7, (20,), prefix=16)
    pair.deliver()
    pair.chunk(7, 0, 48, (1, 2, 3), last=True, aux_row=0)
    assert not pair.writes
    pair.deliver()
    for side in (pair.p, pair.d):
        assert side.phase(7) is Phase.FAILED
        assert "1 pages of 'kv' after a prefix of 16 tokens do not hold tokens [0, 48); 2 are needed" in str(side.room(7).failure)
        assert side.released == [(7, side.room(7).generation)]
    pair.idle()


def test_each_index_space_has_its_own_pages_and_prefix() -> None:
    components = (
        ComponentInfo("kv", "paged", "kv", 16, 100, (100,)),
        ComponentInfo("window", "paged", "swa", 64, 10, (1_000, 1_000)),
    )
    pair = Pair()
    pair.sides.clear()
    pair.p, pair.d = pair.side("prefill", b"P" * 16, "p", components), pair.side("decode", b"D" * 16, "d", components)
    pair.send(7)
    grant = {"kv": pack_pages(range(50, 58)), "swa": pack_pages([3, 4])}
    pair.d.step(ev.OpenReceive(7, grant, -1, 64, ADDRESS))
    pair.d.step(ev.PeersFound(pair.d.room(7).generation, (pair.record(),)))
    pair.deliver()
    source = {"kv": pack_pages(range(12)), "swa": pack_pages([7, 8, 9])}
    pair.p.step(ev.ChunkReady(pair.p.room(7).generation, 0, 180, source, True))
    (write,) = pair.writes.values()
    found = {space: (list(unpack_pages(a)), list(unpack_pages(b))) for space, a, b in write.copies}
    assert found == {"kv": ([4, 5, 6, 7, 8, 9, 10, 11], list(range(50, 58))), "swa": ([8, 9], [3, 4])}
    assert write.notice.nbytes == 8 * 100 + 2 * 2_000
    with pytest.raises(LocalProtocolError, match="page size 64, not 16"):
        pair.d.step(ev.OpenReceive(8, grant, -1, 16, ADDRESS))


# --- several readers ---------------------------------------------------------------------------------------------------------


def test_two_readers_get_every_chunk(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    sending = pair.send(7, readers=2)
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.receive(7, (20,), prefix=16)
    pair.deliver()
    assert pair.p.phase(7) is Phase.BOOTSTRAPPING
    assert sending.decode_prefix_len() is None
    assert not pair.writes
    pair.receive(7, (30, 31), by=other)
    pair.deliver()
    assert sending.decode_prefix_len() == 0
    assert {w.peer: copies(w) for w in pair.writes.values()} == {b"D" * 16: ([2], [20]), b"E" * 16: ([1, 2], [30, 31])}
    first, second = pair.writes
    pair.finish(first)
    pair.deliver()
    succeeded(pair.d, 7)
    assert pair.p.phase(7) is Phase.TRANSFERRING
    assert other.phase(7) is Phase.WAITING_FOR_INPUT
    pair.finish(second)
    pair.deliver()
    succeeded(pair.p, 7)
    succeeded(other, 7)
    assert pair.p.room(7).bytes_moved == 3 * PAGE_BYTES + 2 * AUX_BYTES
    assert pair.d.room(7).bytes_moved == PAGE_BYTES + AUX_BYTES
    assert other.room(7).bytes_moved == 2 * PAGE_BYTES + AUX_BYTES  # its own, not what went to both
    pair.idle()


def test_verdict_counts_only_the_bytes_of_its_reader(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    pair.send(7, readers=2)
    for side in (pair.d, other):
        pair.receive(7, by=side)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    pair.finish()
    pair.deliver(lose=(wire.Part,))
    for side in (pair.d, other):
        succeeded(side, 7)
        assert side.room(7).bytes_moved == 2 * PAGE_BYTES + AUX_BYTES


def test_a_grant_that_is_too_small_fails_the_other_readers_as_well(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    pair.send(7, readers=2)
    pair.receive(7, (20,))
    pair.receive(7, (30, 31), by=other)
    pair.deliver()
    pair.chunk(7, 0, 32, (1, 2), last=True, aux_row=0)
    assert not pair.writes
    pair.deliver()
    for side in (pair.p, pair.d, other):
        assert "2 are needed" in str(side.room(7).failure)
        assert len(side.released) == 1
    pair.idle()


def test_one_reader_too_many_is_refused(pair: Pair) -> None:
    other = pair.side("decode", b"E" * 16, "decode-1")
    pair.transferring(7)
    pair.receive(7, by=other)
    pair.deliver()
    failure = other.room(7).failure
    assert failure is not None
    assert failure.cause == "peer_failed"
    assert "other readers (1 of 1)" in failure.reason
    pair.finish()
    pair.deliver()
    succeeded(pair.d, 7)
    pair.idle()
