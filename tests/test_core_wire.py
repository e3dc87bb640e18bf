"""The wire: any bytes give a message or a WireError, every message has one pinned form, and none of them can hurt a session."""

from __future__ import annotations

from typing import get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.core.settings import Limits
from pd_fsm.core.wire import ComponentInfo, pack_pages, unpack_pages
from pd_fsm.errors import WireError
from pd_fsm.machines import Phase
from tests.pair import Pair, pages

SOURCE, DESTINATION = bytes(range(1, 17)), bytes(range(17, 33))
KINDS = get_args(wire.Message)
RANKS = (1, 2, 0, 1, 0, 1, 3, 4)
ONE = (ComponentInfo("kv", "paged", "kv", 16, 300, (4_096,)),)

# One message of each type and the body of its frame. A difference here is a change of the protocol: old and new sessions will
# not understand each other, so PROTOCOL_VERSION must change with it.
GOLDEN: dict[str, tuple[wire.Message, str]] = {}


def golden(message: wire.Message, body: str) -> None:
    GOLDEN[type(message).__name__] = message, body


golden(
    wire.Hello("d0", "decode", "zmq", RANKS, ONE, b"\x01\x02"),
    "97a568656c6c6fa26430a66465636f6465a37a6d719801020001000103049197a26b76a57061676564a26b7610cd012c91cd1000a0c4020102",
)
golden(
    wire.Welcome("p0", "prefill", "zmq", RANKS, ONE, b""),
    "97a777656c636f6d65a27030a770726566696c6ca37a6d719801020001000103049197a26b76a57061676564a26b7610cd012c91cd1000a0c400",
)
golden(wire.Refuse("no"), "92a6726566757365a26e6f")
golden(wire.Stranger(SOURCE), "92a8737472616e676572c4100102030405060708090a0b0c0d0e0f10")
golden(wire.Offer(7, 5, pages(1, 258), 3, 32), "97a56f66666572070581a26b76c40801000000020100000320ff")
golden(wire.Accepted(7, 5), "93a861636365707465640705")
golden(wire.Computed(7, 5, 48), "94a8636f6d7075746564070530")
golden(wire.Part(2**63 - 1, 2**63 - 1, 2, 3, True, 8_320), "97a470617274cf7fffffffffffffffcf7fffffffffffffff0203c3cd2080")
golden(wire.Verdict(7, 5, False, "abort", "left", 0), "97a7766572646963740705c2a561626f7274a46c65667400")
golden(wire.VerdictAck(7, 5), "93ab766572646963745f61636b0705")
golden(wire.Abort(7, 5, "abort", "left"), "95a561626f72740705a561626f7274a46c656674")
golden(wire.Drained(7, 5), "93a7647261696e65640705")
golden(wire.DrainedAck(7, 5), "93ab647261696e65645f61636b0705")
golden(wire.Ping(), "91a470696e67")
golden(wire.Pong(), "91a4706f6e67")
golden(wire.Draining("soon"), "92a8647261696e696e67a4736f6f6e")
golden(wire.Goodbye("closed", True), "93a7676f6f64627965a6636c6f736564c3")


def test_every_type_is_pinned() -> None:
    assert set(GOLDEN) == {kind.__name__ for kind in KINDS}


@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
def test_the_form_of_each_message_is_pinned(name: str) -> None:
    message, body = GOLDEN[name]
    frame = wire.encode(SOURCE, DESTINATION, message)
    assert frame[:36] == b"PDF\x01" + SOURCE + DESTINATION
    assert frame[36:].hex() == body
    assert wire.decode(frame) == (SOURCE, DESTINATION, message)


def test_page_indices_are_little_endian_int32() -> None:
    assert pack_pages([1, 258, 2**31 - 1]).hex() == "0100000002010000ffffff7f"
    assert list(unpack_pages(bytes.fromhex("0100000002010000ffffff7f"))) == [1, 258, 2**31 - 1]
    with pytest.raises(OverflowError):
        pack_pages([2**31])
    with pytest.raises(TypeError):
        pack_pages(["1"])  # type: ignore[list-item]


# --- any bytes give a message or a WireError ---------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
counts = st.integers(0, 2**31 - 1)
BY_TYPE = {
    wire.ComponentInfo: st.builds(wire.ComponentInfo, names, names, names, counts, counts, st.tuples(st.integers(0, 2**62 - 1))),
}


def of(kind: type) -> st.SearchStrategy[wire.Message]:
    """Any message of a type, within the limits that its fields declare."""
    fields = {
        "room": st.integers(0, 2**63 - 1),
        "generation": st.integers(1, 2**63 - 1),
        "ranks": st.lists(counts, min_size=8, max_size=8).map(tuple),
        "components": st.lists(BY_TYPE[wire.ComponentInfo], max_size=3).map(tuple),
        "data": st.binary(max_size=40),
        "addressed": st.binary(min_size=16, max_size=16),
        "pages": st.dictionaries(names, st.binary(max_size=40), max_size=3),
        "aux_row": st.integers(-1, 2**31 - 1),
        "nbytes": st.integers(0, 2**62 - 1),
        **dict.fromkeys(("aux", "success", "drained"), st.booleans()),
        **dict.fromkeys(("name", "role", "transport", "cause", "reason"), names),
    }
    return st.builds(kind, *(fields.get(field.name, counts) for field in msgspec.structs.fields(kind)))


@given(st.sampled_from(KINDS).flatmap(of))
def test_round_trip(message: wire.Message) -> None:
    assert wire.decode(wire.encode(SOURCE, DESTINATION, message)) == (SOURCE, DESTINATION, message)


def decodes_or_refuses(frame: bytes) -> None:
    try:
        source, destination, message = wire.decode(frame)
    except WireError:
        return
    assert isinstance(message, KINDS)
    assert (len(source), len(destination)) == (16, 16)


@given(st.binary(max_size=200))
def test_any_bytes(frame: bytes) -> None:
    decodes_or_refuses(frame)


@given(st.binary(max_size=200))
def test_any_body(body: bytes) -> None:
    decodes_or_refuses(b"PDF\x01" + SOURCE + DESTINATION + body)


@settings(max_examples=300)
@given(st.sampled_from(KINDS).flatmap(of), st.data())
def test_damaged_frames(message: wire.Message, data: st.DataObject) -> None:
    frame = bytearray(wire.encode(SOURCE, DESTINATION, message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decodes_or_refuses(bytes(frame[: data.draw(st.integers(0, len(frame)))]))
    decodes_or_refuses(bytes(frame))


def body_of(*fields: object) -> bytes:
    return b"PDF\x01" + SOURCE + DESTINATION + msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (b"", "shorter than the 36 byte header"),
        (b"PDF\x02" + bytes(40), "peer speaks protocol version 2, this session version 1"),
        (b"HTTP/1.1 400 Bad Request and so on....", "does not start with"),
        (b"PDF\x01" + bytes(16) + DESTINATION + b"\x91\xa4ping", "no source incarnation"),
        (bytes(wire.FRAME_BYTES_MAX + 1), "exceeds the limit"),
        (body_of("nonsense"), "nonsense"),
        (body_of("ping", 1), "length"),
        (body_of("accepted", 1), "length"),
        (body_of("accepted", -1, 1), ">= 0"),
        (body_of("accepted", 1 << 63, 1), "<= 9223372036854775807"),
        (body_of("accepted", 1, 0), ">= 1"),
        (body_of("accepted", 1.5, 1), "float"),
        (body_of("abort", 1, 1, "abort", "x" * 4_097), "length <= 4096"),
        (body_of("part", 1, 1, 1 << 31, 0, False, 0), "<= 2147483647"),
        (body_of("part", 1, 1, 0, 0, False, 1 << 62), "<= 4611686018427387903"),
        (body_of("offer", 1, 1, {str(n): b"" for n in range(65)}, -1, 0), "length <= 64"),
        (body_of("offer", 1, 1, {}, -2, 0), ">= -1"),
        (body_of("stranger", b"short"), "16"),
        (body_of("verdict", 1, 1, 1, "", "", 0), "bool"),
        (b"PDF\x01" + SOURCE + DESTINATION + b"\x91" * 5_000, "no message"),
        (b"PDF\x01" + SOURCE + DESTINATION + b"\x91\xa4ping\x00", "no message"),
    ],
)
def test_what_is_no_message_says_why(frame: bytes, said: str) -> None:
    with pytest.raises(WireError) as error:
        wire.decode(frame)
    assert said in str(error.value)


def test_a_frame_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ValueError, match=r"Hello of .* exceeds the frame limit"):
        wire.encode(SOURCE, DESTINATION, wire.Hello("x", "decode", "zmq", RANKS, ONE, bytes(17 << 20)))
    assert wire.encode(SOURCE, DESTINATION, wire.Abort(1, 1, "abort", wire.clip("\ud800" * 5_000)))


# --- well-formed nonsense ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grant", "aux_row", "prefix", "said"),
    [
        (pages(20), -1, 0, "must be in 0..19, got 20..20"),
        (pages(-1), -1, 0, "must be in 0..19, got -1..-1"),
        (pages(3, 3), -1, 0, "grants a page of 'kv' twice"),
        ({"kv": b"12345"}, -1, 0, "5 bytes are no multiple of 4"),
        ({"swa": b""}, -1, 0, "grants pages of ['swa'], its layout has ['kv']"),
        (pages(1), 4, 0, "aux row 4 is not one of its 4"),
        (pages(1), -1, 8, "decode_prefix_len 8 is no multiple of the page size 16 of 'kv'"),
    ],
)
def test_a_grant_of_what_was_never_registered_is_refused(grant: dict[str, bytes], aux_row: int, prefix: int, said: str) -> None:
    pair = Pair()
    small = (ComponentInfo("kv", "paged", "kv", 16, 20, (4_096, 4_096)), ComponentInfo("aux", "rows", "aux", 0, 4, (128,)))
    pair.p.tell(wire.Hello("evil", "decode", "memory", RANKS, small, b""))
    sending = pair.send(7)
    pair.p.tell(wire.Offer(7, 1, grant, aux_row, prefix))
    assert sending.failure is not None
    assert (sending.failure.cause, sending.failure.peer) == ("protocol", "evil")
    assert said in sending.failure.reason
    (verdict,) = pair.pending(wire.Verdict)
    assert isinstance(verdict, wire.Verdict)
    assert said in verdict.reason
    pair.p.tell(wire.VerdictAck(7, 1))
    assert not pair.p.core.links
    assert pair.p.released == [(7, sending.generation)]


@pytest.mark.parametrize(
    "parts",
    [
        [(5, 2)],  # beyond its own total
        [(5, 0), (0, 2)],  # an earlier one lies beyond the total: two confirmed of two, but not those two
        [(0, 2), (1, 3)],  # changes its mind
        [(0, 2), (5, 0)],
        [(10, 0)],  # more than this session takes
        [(0, 11)],
    ],
)
def test_parts_that_cannot_be_fail_the_room(parts: list[tuple[int, int]]) -> None:
    pair = Pair(limits=Limits(chunks_max=10))
    pair.meet()
    receiving = pair.receive(7)
    for chunk, total in parts:
        assert receiving.live
        pair.d.tell(wire.Part(7, receiving.generation, chunk, total, False, 1))
    assert receiving.failure is not None
    assert receiving.failure.cause == "protocol"
    assert not pair.d.released
    pair.deliver()
    pair.idle()


def test_a_writer_that_confirmed_everything_cannot_take_it_back() -> None:
    """Its late refusal of a repeated offer must not fail the room that still waits for the other writer."""
    pair = Pair()
    second = pair.side("prefill", b"Q" * 16, "prefill-1")
    pair.d.step(ev.OpenReceive(7, pages(1), address="two"))
    receiving = pair.d.room(7)
    pair.d.step(ev.PeersFound(receiving.generation, (pair.record(), pair.record(second))))
    pair.deliver()
    pair.d.tell(wire.Verdict(7, receiving.generation, True, "", "", 5))
    pair.d.tell(wire.Verdict(7, receiving.generation, False, "protocol", "already concluded", 0))
    assert receiving.state is Phase.TRANSFERRING
    before = len(pair.d.effects)
    pair.advance(5_000)
    offered = {e.peer for e in pair.d.effects[before:] if isinstance(e, ev.Send) and isinstance(e.message, wire.Offer)}
    assert offered == {second.incarnation}, "the one that confirmed needs no offer any more"
    pair.d.tell(wire.Verdict(7, receiving.generation, True, "", "", 6), second)
    assert receiving.state is Phase.SUCCESS
    assert receiving.bytes_moved == 11
