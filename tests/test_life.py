"""The life of an engine on the real runtime: late reservation, cancel, retraction, samples, drain, change of role, metrics."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import pd_fsm
from pd_fsm import Phase
from pd_fsm.runtime.metrics import SessionCollector
from tests.live import PAGE_SIZE, World, make_engine

SUCCEEDED = [Phase.SUCCESS, Phase.SUCCESS]


@pytest.fixture(params=["memory", "tcp"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    made = World(request.param, thread=request.param == "tcp", directory=tmp_path)
    yield made
    made.close()


def test_pages_are_reserved_when_prefill_is_done(world: World) -> None:
    prefill, decode = world.pair()
    receiver = decode.session.receive(1, None)
    sender = prefill.session.send(1)
    sender.send([1], (0, PAGE_SIZE))
    sender.send([2, 3], (PAGE_SIZE, 3 * PAGE_SIZE - 1), last=True, aux=0)
    world.until(lambda: receiver.tokens_computed is not None, "prefill said that it is done")
    assert receiver.tokens_computed == 3 * PAGE_SIZE - 1
    assert receiver.phase is Phase.WAITING_FOR_INPUT
    decode.check()
    receiver.grant([7, 8, 9], aux=4)
    assert world.conclude(sender, receiver) == SUCCEEDED
    decode.expect(prefill, [(1, 7), (2, 8), (3, 9)], aux=(0, 4))
    decode.check()
    second = decode.session.receive(2, [1])
    with pytest.raises(pd_fsm.LocalProtocolError, match="has its pages"):
        second.grant([2])
    decode.session.cancel(2)
    world.at_rest()


def test_a_grant_before_prefill_is_done_serves_as_well(world: World) -> None:
    prefill, decode = world.pair()
    receiver = decode.session.receive(1, None)
    receiver.grant([7])
    sender = prefill.session.send(1)
    sender.send([1], (0, PAGE_SIZE), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    decode.expect(prefill, [(1, 7)])
    decode.check()


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_cancel_by_number_reaches_a_room_that_is_opened_later(world: World, side: str) -> None:
    prefill, decode = world.pair()
    (prefill if side == "prefill" else decode).session.cancel(5, "the client left early")
    sender = prefill.session.send(5)
    receiver = decode.session.receive(5, [1])
    own, other = (sender, receiver) if side == "prefill" else (receiver, sender)
    world.until(lambda: own.phase is Phase.FAILED, "the cancelled side failed")
    assert own.failure == pd_fsm.Failure("abort", "the client left early")
    if side == "prefill":
        world.until(lambda: other.phase is Phase.FAILED, "the other side learned it")
        assert other.failure is not None
        assert other.failure.cause == "peer_abort"
        assert "the client left early" in other.failure.reason
    else:
        other.abort("decode never came")  # a decode that never had the room has nobody to tell; prefill's router or deadline does
    world.conclude(sender, receiver)
    world.at_rest()


def test_a_retracted_request_runs_again_under_its_number(world: World) -> None:
    prefill, decode = world.pair()
    for attempt, page in enumerate((3, 4)):
        sender = prefill.session.send(9)
        receiver = decode.session.receive(9, [page])
        assert receiver.generation > attempt
        if attempt == 0:
            world.until(lambda s=sender: s.phase is Phase.WAITING_FOR_INPUT, "both sides met")  # type: ignore[misc]
            receiver.abort("retracted: out of pages")
        else:
            sender.send([1], (0, PAGE_SIZE), last=True)
        phases = world.conclude(sender, receiver)
        sender.clear()
        receiver.clear()
    assert phases == SUCCEEDED
    decode.expect(prefill, [(1, 4)])
    decode.check()


def test_samples_of_one_request_are_rooms_over_the_same_source_pages(world: World) -> None:
    prefill, decode = world.pair()
    senders = [prefill.session.send(room) for room in (20, 21, 22)]
    receivers = [decode.session.receive(room, [room]) for room in (20, 21, 22)]
    world.until(lambda: all(sender.phase is Phase.WAITING_FOR_INPUT for sender in senders), "all samples have met")
    receivers[1].abort("this sample is not needed")
    world.until(lambda: senders[1].phase is Phase.FAILED, "prefill learned of the abort")
    for sender in senders:
        sender.send([6], (0, PAGE_SIZE), last=True)
    world.conclude(*senders, *receivers)
    assert [receiver.phase for receiver in receivers] == [Phase.SUCCESS, Phase.FAILED, Phase.SUCCESS]
    decode.expect(prefill, [(6, 20), (6, 22)])
    decode.check()


def test_drain_finishes_what_runs_and_admits_nothing(world: World) -> None:
    prefill, decode = world.pair()
    sender = prefill.session.send(1)
    receiver = decode.session.receive(1, [1])
    world.until(lambda: sender.phase is Phase.WAITING_FOR_INPUT, "the room is under way")
    prefill.session.begin_drain("rolling upgrade")
    with pytest.raises(pd_fsm.LocalProtocolError, match="rolling upgrade"):
        prefill.session.send(2)
    assert not prefill.session.drained
    waiting = decode.session.receive(3, [2])
    sender.send([4], (0, PAGE_SIZE), last=True)
    assert world.conclude(sender, receiver) == SUCCEEDED
    world.until(lambda: prefill.session.drained, "the engine is drained")
    prefill.session.close()
    world.engines.remove(prefill)
    # Its successor registers, and the room that waited is served by it.
    again = world.open("prefill")
    served = again.session.send(3)
    served.send([5], (0, PAGE_SIZE), last=True)
    if world.conclude(waiting)[0] is Phase.FAILED:  # it had been offered to the draining rank, and was told so
        assert waiting.failure is not None
        assert "rolling upgrade" in waiting.failure.reason or "was closed" in waiting.failure.reason
        waiting.clear()
        waiting = decode.session.receive(3, [2])
    assert world.conclude(served, waiting) == SUCCEEDED


def test_engines_change_roles_over_the_same_memory(world: World) -> None:
    first, second = world.pair()
    engines = {"first": first, "second": second}
    for round_number, (giver, taker) in enumerate([("first", "second"), ("second", "first")]):
        if round_number:
            for engine in engines.values():
                engine.session.begin_drain("change of role")
            world.until(lambda: all(engine.session.drained for engine in engines.values()), "both are drained")
            for engine in engines.values():
                engine.close()
                world.engines.remove(engine)
            world.open("prefill", engines[giver])
            world.open("decode", engines[taker])
        sender = engines[giver].session.send(7)
        receiver = engines[taker].session.receive(7, [11 + round_number])
        sender.send([2], (0, PAGE_SIZE), last=True)
        assert world.conclude(sender, receiver) == SUCCEEDED
        engines[taker].expect(engines[giver], [(2, 11 + round_number)])
        engines[taker].check()
        engines[giver].check()


def test_metrics_count_each_end_once(world: World) -> None:
    prefill, decode = world.pair()
    registry = CollectorRegistry()
    registry.register(SessionCollector(prefill.session, decode.session))
    sender, receiver = prefill.session.send(1), decode.session.receive(1, [1])
    sender.send([4], (0, PAGE_SIZE), last=True)
    world.conclude(sender, receiver)
    aborted = decode.session.receive(2, [2])
    aborted.abort("no")
    world.conclude(aborted)
    text = generate_latest(registry).decode()
    assert f'pd_fsm_rooms_concluded_total{{outcome="success",role="decode",session="{decode.session.name}"}} 1.0' in text
    assert f'pd_fsm_rooms_concluded_total{{outcome="abort",role="decode",session="{decode.session.name}"}} 1.0' in text
    assert 'pd_fsm_rooms{phase="SUCCESS"' in text
    assert 'pd_fsm_peers{role="decode"' in text


def test_a_rank_with_nothing_to_send_succeeds_alone(tmp_path: Path) -> None:
    world = World("memory", thread=False, directory=tmp_path)
    engine = world.open("prefill", make_engine("prefill", 1))
    sender = engine.session.send(1, readers=0)
    sender.send([1], (0, PAGE_SIZE), last=True)
    assert world.conclude(sender) == [Phase.SUCCESS]
    assert sender.bytes_moved == 0
    world.close()
