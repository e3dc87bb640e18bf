"""The example engine: arithmetic against an independent one, memory, schedulers over pd-fsm, router, and the worker's process."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import attrs
import numpy as np
import pytest
import torch
import zmq
from numpy.typing import NDArray

import pd_fsm
from pd_fsm.examples.engine import messages as m
from pd_fsm.examples.engine import scheduler
from pd_fsm.examples.engine.decode import DecodeWorker
from pd_fsm.examples.engine.kv_cache import PAGE_TOKENS, Pool, pages_for
from pd_fsm.examples.engine.model import CHUNK_TOKENS, Model, ModelConfig, chunks, greedy
from pd_fsm.examples.engine.prefill import PrefillWorker
from pd_fsm.examples.engine.reference import generate
from pd_fsm.examples.engine.router import SIDES, Request, Router
from pd_fsm.examples.engine.scheduler import Scheduler
from pd_fsm.examples.engine.tokens import BOS, EOS, VOCABULARY_SIZE, cut_prompts, decode, encode, load_text
from pd_fsm.runtime.rendezvous import LocalRendezvous
from pd_fsm.runtime.transport import Factory, Host, Transport
from pd_fsm.transports.memory import DEFAULT_HUB, MemoryPlanes

PATIENCE_S = 10.0

Array: TypeAlias = NDArray[np.float64]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Model()
    torch.set_num_threads(threads)


def until(condition: Callable[[], object], turn: Callable[[], object], what: str) -> None:
    """Call `turn` until `condition` holds; fail with `what` when it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {PATIENCE_S} s: {what}"
        turn()


# --- text and tokens ---------------------------------------------------------------------------------------------------------


def test_the_text_is_real_and_prompts_are_cut_from_it() -> None:
    text = load_text()
    assert 20_000 < len(text) < 60_000
    assert "public domain" not in text, "the header line is not part of the text"
    prompts = cut_prompts(48, seed=1)
    assert prompts == cut_prompts(48, seed=1)
    assert prompts != cut_prompts(48, seed=2)
    words = " ".join(text.split())
    assert all(f" {prompt} " in f" {words} " for prompt in prompts)
    lengths = [len(encode(prompt)) for prompt in prompts]
    assert min(lengths) < CHUNK_TOKENS < max(lengths) <= 401
    assert len(set(prompts)) == 48


def test_tokens_are_bytes() -> None:
    assert encode("pd é") == [BOS, 112, 100, 32, 0xC3, 0xA9]
    assert decode([*encode("pd é"), EOS]) == "pd é"
    assert max(BOS, EOS) < VOCABULARY_SIZE


# --- the model ---------------------------------------------------------------------------------------------------------------


def brute_force_logits(model: Model, tokens: list[int]) -> Array:
    """The last token's logits, computed in double precision over the whole sequence at once, without cache, pages or chunks."""
    c = model.config
    names = attrs.fields_dict(type(model.layers[0]))
    weights = {name: [getattr(layer, name).double().numpy() for layer in model.layers] for name in names}

    def norm(x: Array) -> Array:
        normed: Array = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return normed

    def turned(vector: Array, position: int) -> Array:
        half = c.head_dim // 2
        as_complex = vector[:half] + 1j * vector[half:]
        angle = position * c.rope_base ** (-np.arange(half) / half)
        as_complex = as_complex * np.exp(1j * angle)
        return np.concatenate([as_complex.real, as_complex.imag])

    x = model.embedding.double().numpy()[tokens]
    for layer in range(c.layers):
        h = norm(x)
        heads = {name: (h @ weights[name][layer]).reshape(len(tokens), -1, c.head_dim) for name in ("query", "key", "value")}
        mixed = np.zeros((len(tokens), c.query_heads, c.head_dim))
        for head in range(c.query_heads):
            kv_head = head // (c.query_heads // c.kv_heads)
            queries = [turned(heads["query"][t, head], t) for t in range(len(tokens))]
            keys = np.stack([turned(heads["key"][t, kv_head], t) for t in range(len(tokens))])
            for t, query in enumerate(queries):
                scores = keys[: t + 1] @ query / math.sqrt(c.head_dim)
                share = np.exp(scores - scores.max())
                mixed[t, head] = share / share.sum() @ heads["value"][: t + 1, kv_head]
        x = x + mixed.reshape(len(tokens), -1) @ weights["output"][layer]
        h = norm(x)
        gate = h @ weights["gate"][layer]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weights["up"][layer])) @ weights["down"][layer]
    logits: Array = norm(x)[-1] @ model.unembedding.double().numpy()
    return logits


def prefill_all(model: Model, tokens: list[int], ranges: list[tuple[int, int]]) -> torch.Tensor:
    cache = model.new_cache(pages_for(len(tokens)), 1)
    table = cache.pages.take(cache.pages.total)
    for start, end in ranges:
        logits = model.forward(tokens[start:end], start, cache, table)
    return logits


def test_paged_chunked_forward_equals_brute_force(model: Model) -> None:
    tokens = encode(cut_prompts(1, seed=5, shortest=120, longest=140)[0])
    expected = brute_force_logits(model, tokens)
    for ranges in (chunks(len(tokens)), [(0, len(tokens))], [(t, t + 1) for t in range(len(tokens))]):
        logits = prefill_all(model, tokens, ranges).numpy()
        assert np.abs(logits - expected).max() < 1e-3
        assert logits.argmax() == expected.argmax()


def test_chunked_prefill_gives_the_tokens_of_whole_prefill(model: Model) -> None:
    for prompt in cut_prompts(6, seed=6, shortest=100, longest=300):
        tokens = encode(prompt)
        assert len(chunks(len(tokens))) > 1
        whole, chunked = prefill_all(model, tokens, [(0, len(tokens))]), prefill_all(model, tokens, chunks(len(tokens)))
        assert greedy(chunked)[0] == greedy(whole)[0]


def test_chunks_cover_a_prompt_and_fill_their_pages() -> None:
    for count in (1, 15, 16, 63, 64, 65, 128, 400):
        ranges = chunks(count)
        assert [t for start, end in ranges for t in range(start, end)] == list(range(count))
        assert all(start % PAGE_TOKENS == 0 for start, _ in ranges)


def test_same_seed_same_weights_other_seed_others() -> None:
    small = ModelConfig(layers=1, d_model=32, d_hidden=32)
    one, same, other = Model(small), Model(small), Model(attrs.evolve(small, seed=1))
    assert torch.equal(one.layers[0].down, same.layers[0].down)
    assert torch.equal(one.unembedding, same.unembedding)
    assert not torch.equal(one.unembedding, other.unembedding)


def test_a_sequence_does_not_depend_on_its_batch_or_its_pages(model: Model) -> None:
    """Bitwise: logits of sequences decoded in turn, on interleaved pages of one cache, equal those of each sequence alone."""
    prompts = [encode(prompt) for prompt in cut_prompts(4, seed=7, shortest=30, longest=200)]
    cache = model.new_cache(200, 1)
    everything = cache.pages.take(200)
    tables = [everything[index::4] for index in range(4)]
    alone: list[list[torch.Tensor]] = []
    for tokens in prompts:
        own = model.new_cache(50, 1)
        table = own.pages.take(50)
        logits = [model.forward(tokens[start:end], start, own, table) for start, end in chunks(len(tokens))][-1:]
        for step in range(6):
            logits.append(model.forward([greedy(logits[-1])[0]], len(tokens) + step, own, table))
        alone.append(logits)
    together = [
        [model.forward(tokens[start:end], start, cache, table) for start, end in chunks(len(tokens))][-1:]
        for tokens, table in zip(prompts, tables, strict=True)
    ]
    for step in range(6):
        for tokens, table, logits in zip(prompts, tables, together, strict=True):
            logits.append(model.forward([greedy(logits[-1])[0]], len(tokens) + step, cache, table))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_tokens_depend_on_every_page(model: Model) -> None:
    """Otherwise equal tokens would say nothing about a hand-off: one page with another's content changes the continuation."""
    tokens = encode(cut_prompts(1, seed=8, shortest=90, longest=110)[0])

    def continued(spoil: int | None) -> list[int]:
        cache = model.new_cache(40, 1)
        table = cache.pages.take(20)
        for start, end in chunks(len(tokens)):
            logits = model.forward(tokens[start:end], start, cache, table)
        if spoil is not None:
            for tensor in (*cache.keys, *cache.values):
                tensor[table[spoil]] = tensor[table[(spoil + 1) % (len(tokens) // PAGE_TOKENS)]].clone()
        generated = [greedy(logits)[0]]
        while len(generated) < 12:
            logits = model.forward(generated[-1:], len(tokens) + len(generated) - 1, cache, table)
            generated.append(greedy(logits)[0])
        return generated

    right = continued(None)
    assert right == generate(model, tokens, 12)
    for page in range(len(tokens) // PAGE_TOKENS):
        assert continued(page) != right, f"page {page} could be wrong without anybody noticing"


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_pool_hands_each_item_to_one_owner_and_refuses_a_double_free() -> None:
    pool = Pool("page", 4)
    first, second = pool.take(3), pool.take(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.free == 0
    with pytest.raises(AssertionError, match="1 page asked of 0"):
        pool.take(1)
    pool.give_back(first)
    with pytest.raises(AssertionError, match=f"page {first[0]} is given back, but it is not taken"):
        pool.give_back(first[:1])
    with pytest.raises(AssertionError, match="page 9 is given back"):
        pool.give_back([9])
    assert pool.free == 3


def test_freed_memory_is_overwritten(model: Model) -> None:
    cache = model.new_cache(4, 2)
    table, rows = cache.pages.take(2), cache.rows.take(1)
    model.forward(encode("twenty tokens of text"), 0, cache, table)
    cache.write_aux(rows[0], room=(1 << 63) - 1, prompt_tokens=22, token=7, logit=1.5)
    assert cache.read_aux(rows[0]) == ((1 << 63) - 1, 22, 7, 1.5)
    cache.free(table, rows[0])
    assert all(bool(tensor.isnan().all()) for tensor in (*cache.keys, *cache.values))
    assert cache.read_aux(rows[0]) == (0, 0, 0, 0.0)
    assert (cache.pages.free, cache.rows.free) == (4, 2)


# --- prefill and decode over pd-fsm, in one process --------------------------------------------------------------------------


@attrs.define
class Engine:
    """One prefill and one decode worker whose sessions and loops are turned by the test, in one thread."""

    prefill: PrefillWorker
    decode: DecodeWorker
    results: list[m.Result] = attrs.field(factory=list)
    phases: dict[tuple[int, str], str] = attrs.field(factory=dict)
    served: list[tuple[Scheduler, scheduler.Request]] = attrs.field(factory=list)

    @property
    def workers(self) -> tuple[Scheduler, Scheduler]:
        return self.prefill, self.decode

    def turn(self) -> None:
        for worker in self.workers:
            worker.step()
            while worker.outbox:
                message = worker.outbox.popleft()
                if isinstance(message, m.Result):
                    self.results.append(message)
                elif isinstance(message, m.Progress):
                    self.phases[message.room, message.side] = message.phase
            self.assert_memory_is_kept(worker)

    def assert_memory_is_kept(self, worker: Scheduler) -> None:
        """Pages that somebody else may still touch are nobody's but their request's."""
        kept = [r for w, r in self.served if w is worker and r.handle is not None and not r.handle.pages_free]
        pages = [page for request in kept for page in request.table]
        assert len(pages) == len(set(pages)), "two live rooms share a page"
        assert set(pages) <= worker.cache.pages._taken, "a page was freed while it could still be touched"

    def serve(self, room: int, prompt: list[int], max_new_tokens: int = 8, hold: m.Hold | None = None) -> None:
        for worker in self.workers:
            worker.serve(m.Serve(room, prompt, max_new_tokens, prefill_dp_rank=0, hold=hold))
            self.served.append((worker, worker.requests[room]))

    def until(self, condition: Callable[[], object], what: str) -> None:
        until(condition, self.turn, f"{what}; phases {self.phases}; results {self.results}")

    def until_idle(self) -> None:
        self.until(lambda: all(worker.idle for worker in self.workers), "both workers are idle, all memory is back")

    def result(self, room: int, side: str) -> m.Result:
        [result] = [r for r in self.results if (r.room, r.side) == (room, side)]
        return result

    def assert_nothing_leaked(self) -> None:
        for worker in self.workers:
            report = worker.report("life")
            assert (report.pages_free, report.rows_free) == (report.pages_total, report.rows_total)
            assert report.live_rooms == 0


@pytest.fixture
def make_engine(model: Model, request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    sessions: list[pd_fsm.Session] = []
    registry = LocalRendezvous()

    def make(
        prefill_memory: tuple[int, int] = (96, 6), decode_memory: tuple[int, int] = (96, 6), transport: str | Factory = "memory"
    ) -> Engine:
        """Memory is given as (pages, aux rows)."""
        workers: list[Scheduler] = []
        for worker, memory in ((PrefillWorker, prefill_memory), (DecodeWorker, decode_memory)):
            cache = model.new_cache(*memory)
            session = pd_fsm.open_session(
                role=worker.side,
                kv=cache.layout(),
                transport=transport,
                rendezvous=registry.client(),
                name=f"{worker.side}-0",
                thread=False,
            )
            sessions.append(session)
            workers.append(worker(f"{worker.side}-0", model, cache, session))
        prefill, decode = workers
        assert isinstance(prefill, PrefillWorker)
        assert isinstance(decode, DecodeWorker)
        return Engine(prefill, decode)

    yield make
    for session in sessions:
        session.close(timeout_s=1)


PLENTY = (300, 20)


@pytest.mark.parametrize(
    ("prefill_memory", "decode_memory"),
    [(PLENTY, PLENTY), ((24, 20), PLENTY), ((300, 2), PLENTY), (PLENTY, (24, 20)), (PLENTY, (300, 2))],
    ids=["plenty", "few prefill pages", "few prefill rows", "few decode pages", "few decode rows"],
)
def test_disaggregated_tokens_equal_the_reference(
    model: Model, make_engine: Callable[..., Engine], prefill_memory: tuple[int, int], decode_memory: tuple[int, int]
) -> None:
    """Mixed lengths, served together, on either side waiting for memory: every token is that of the one-process run."""
    engine = make_engine(prefill_memory, decode_memory)
    prompts = [encode(prompt) for prompt in cut_prompts(6, seed=9, shortest=20, longest=250)]
    for room, prompt in enumerate(prompts):
        engine.serve(room, prompt, max_new_tokens=10)
    engine.until_idle()
    for room, prompt in enumerate(prompts):
        decoded, prefilled = engine.result(room, "decode"), engine.result(room, "prefill")
        assert (decoded.outcome, decoded.verdict, prefilled.outcome) == ("finished", "SUCCESS", "finished")
        assert decoded.tokens == generate(model, prompt, 10)
        assert decoded.bytes_moved >= len(prompt) * 8 * 2 * 2 * 32 * 4  # K and V, 8 layers, 2 heads of 32 floats
    engine.assert_nothing_leaked()


SHOWS: dict[m.Hold, m.Role] = {  # the side on which a hold is seen
    "BOOTSTRAPPING": "prefill",
    "WAITING_FOR_INPUT": "decode",
    "TRANSFERRING": "decode",
    "SUCCESS": "decode",
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("hold", ["BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING"])
def test_abort_in_a_phase(model: Model, make_engine: Callable[..., Engine], hold: m.Hold, side: m.Role) -> None:
    """One side gives a held request up; the other learns it through pd-fsm; a request beside it is not disturbed."""
    engine = make_engine()
    first, second = (encode(prompt) for prompt in cut_prompts(2, seed=10, shortest=100, longest=200))
    engine.serve(1, first, hold=hold)
    engine.until(lambda: engine.phases.get((1, SHOWS[hold])) == hold, f"{SHOWS[hold]} shows {hold}")
    engine.serve(2, second)
    aborting = engine.prefill if side == "prefill" else engine.decode
    aborting.abort(1, "client left")
    engine.until(lambda: any(r.room == 1 and r.side == side for r in engine.results), "the abort is answered")
    assert engine.result(1, side).reason == "client left"
    if (hold, side) == ("BOOTSTRAPPING", "prefill"):
        engine.decode.release(1)  # it opens a room that prefill has given up already
    elif (hold, side) == ("BOOTSTRAPPING", "decode"):
        engine.prefill.abort(1, "client left")  # decode had no room yet that could tell it; the router does
    engine.until_idle()
    other = engine.result(1, "decode" if side == "prefill" else "prefill")
    assert "client left" in other.reason
    for result in (engine.result(1, side), other):
        assert (result.outcome, result.tokens) == ("aborted", [])
    assert engine.result(2, "decode").tokens == generate(model, second, 8)
    engine.assert_nothing_leaked()


class NoVouching(MemoryPlanes):
    """A data plane that cannot prove by itself that nothing lands any more: the writer must say so."""

    def revoke(self, generation: int) -> bool:
        super().revoke(generation)
        return False


def no_vouching(host: Host) -> Transport:
    planes = NoVouching(host, DEFAULT_HUB)
    return Transport("memory", planes, planes, lambda _: DEFAULT_HUB.leave(planes), DEFAULT_HUB.rendezvous.client())


def test_a_verdict_does_not_free_pages(make_engine: Callable[..., Engine]) -> None:
    """Decode aborts while prefill is busy elsewhere: answered at once, but the pages stay until prefill cannot write any more."""
    engine = make_engine(transport=no_vouching)
    engine.serve(1, encode("x" * 2 * CHUNK_TOKENS), hold="TRANSFERRING")
    engine.until(lambda: engine.phases.get((1, "decode")) == "TRANSFERRING", "the first chunk moves")
    decode = engine.decode
    decode.abort(1, "client left")
    for _ in range(5):
        decode.step()
    assert any(isinstance(message, m.Result) for message in decode.outbox)
    assert not decode.requests
    assert not decode.idle
    assert decode.cache.pages.free == decode.cache.pages.total - pages_for(2 * CHUNK_TOKENS + 1 + 8)
    engine.until_idle()
    engine.assert_nothing_leaked()


def test_abort_while_decoding(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.serve(1, encode("When in the Course of human events"), hold="SUCCESS")
    engine.until(lambda: engine.phases.get((1, "decode")) == "SUCCESS", "decode has the first token")
    engine.decode.abort(1, "client left")
    engine.until_idle()
    result = engine.result(1, "decode")
    assert (result.outcome, result.verdict, result.reason, len(result.tokens)) == ("aborted", "SUCCESS", "client left", 1)
    assert engine.result(1, "prefill").outcome == "finished"
    engine.assert_nothing_leaked()


def test_abort_that_the_room_outran(make_engine: Callable[..., Engine]) -> None:
    """The room succeeds before the scheduler looks: the abort still ends the request."""
    engine = make_engine()
    engine.serve(1, encode("We the People"))
    engine.decode.step()
    receiver = engine.decode.requests[1].handle
    assert receiver is not None

    def all_but_the_decode_scheduler() -> None:
        engine.prefill.step()
        engine.decode.session.progress()

    until(lambda: receiver.phase is pd_fsm.Phase.SUCCESS, all_but_the_decode_scheduler, "the room succeeds")
    engine.decode.abort(1, "client left")
    engine.until_idle()
    result = engine.result(1, "decode")
    assert (result.outcome, result.verdict, result.reason, result.tokens) == ("aborted", "SUCCESS", "client left", [])
    engine.assert_nothing_leaked()


@pytest.mark.parametrize("hold", ["BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS"])
def test_a_released_request_goes_on(model: Model, make_engine: Callable[..., Engine], hold: m.Hold) -> None:
    engine = make_engine()
    prompt = encode(cut_prompts(1, seed=11, shortest=100, longest=200)[0])
    engine.serve(1, prompt, hold=hold)
    engine.until(lambda: engine.phases.get((1, SHOWS[hold])) == hold, f"{SHOWS[hold]} shows {hold}")
    for _ in range(20):
        engine.turn()
    assert engine.phases[1, SHOWS[hold]] == hold, "held means held"
    if hold == "TRANSFERRING":
        receiver = engine.decode.requests[1].handle
        assert receiver is not None
        assert receiver.bytes_moved > 0, "the first chunk moves before the second is computed"
    for worker in engine.workers:
        worker.release(1)
    engine.until_idle()
    assert engine.result(1, "decode").tokens == generate(model, prompt, 8)
    assert next(iter(engine.result(1, "decode").phase_ms)) == "QUEUED"
    engine.assert_nothing_leaked()


def test_a_short_prompt_overtakes_a_long_one(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.serve(1, encode("x" * 6 * CHUNK_TOKENS))
    engine.serve(2, encode("short"))
    engine.until_idle()
    assert [result.room for result in engine.results if result.side == "prefill"] == [2, 1]


def test_a_request_that_can_never_fit_fails_at_once(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine((4, 6), (4, 6))
    engine.serve(1, encode("x" * 100))
    engine.until_idle()
    result = engine.result(1, "decode")
    assert (result.outcome, result.cause) == ("failed", "refused")
    assert "need 7 pages and decode-0 has 4" in result.reason
    assert "needs 7 pages and prefill-0 has 4" in engine.result(1, "prefill").reason
    engine.assert_nothing_leaked()


def test_decode_refuses_an_aux_row_of_another_room(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    write_aux = engine.prefill.cache.write_aux
    engine.prefill.cache.write_aux = lambda row, room, *rest: write_aux(row, room + 1, *rest)  # type: ignore[method-assign]
    engine.serve(1, encode("Four score and seven years ago"))
    engine.until_idle()
    result = engine.result(1, "decode")
    assert (result.outcome, result.verdict, result.cause) == ("failed", "SUCCESS", "protocol")
    assert "is of room 2" in result.reason
    engine.assert_nothing_leaked()


# --- the router --------------------------------------------------------------------------------------------------------------


class FakeWorker:
    """The router's view of a worker: a socket that says what the test wants."""

    def __init__(self, router: Router, role: m.Role, incarnation: str = "a") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(router.endpoint)
        self.name, self.role, self.incarnation = f"{role}-0", role, incarnation
        self.inbox: list[m.ToWorker] = []
        self.say(m.Hello(self.name, role, 0, 100, incarnation))

    def say(self, message: m.ToRouter) -> None:
        self.socket.send(m.encode(message))

    def finish(self, room: int, outcome: m.Outcome = "finished", reason: str = "") -> None:
        verdict = "SUCCESS" if outcome == "finished" else "FAILED"
        self.say(m.Result(self.name, room, self.role, outcome, verdict, reason, tokens=[1, 2]))

    def receive(self) -> m.ToWorker:
        assert self.socket.poll(int(PATIENCE_S * 1000)), f"{self.name} got nothing from the router"
        message = m.decode_to_worker(self.socket.recv())
        assert message is not None
        return message

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def routed() -> Iterator[tuple[Router, FakeWorker, FakeWorker]]:
    with Router(seed=1, request_deadline_ms=5_000, grace_ms=50) as router:
        prefill, decode = FakeWorker(router, "prefill"), FakeWorker(router, "decode")
        until(lambda: len(router.workers) == 2, lambda: router.step(20), "both workers are known")
        yield router, prefill, decode
        prefill.close()
        decode.close()


Routed = tuple[Router, FakeWorker, FakeWorker]


def test_router_dispatches_to_both_sides_and_collects(routed: Routed) -> None:
    router, prefill, decode = routed
    request = router.submit("a prompt", 4)
    served = prefill.receive()
    assert served == decode.receive() == m.Serve(request.room, encode("a prompt"), 4, 0)
    decode.say(m.Progress(decode.name, request.room, "decode", "TRANSFERRING", 1.0))
    prefill.finish(request.room)
    until(lambda: "prefill" in request.results and request.phases, lambda: router.step(20), "the prefill side is answered")
    assert not request.done
    router.abort(request.room, "client left")
    router.stop()
    assert [decode.receive(), prefill.receive()] == [m.Abort(request.room, "client left"), m.Stop()], "prefill has nothing to abort"
    decode.finish(request.room)
    until(lambda: request.done, lambda: router.step(20), "the request is done")
    assert (request.outcome, request.tokens, request.phases) == ("finished", [1, 2], {"decode": "TRANSFERRING"})


def test_router_hands_out_unique_rooms_of_63_bits(routed: Routed) -> None:
    router, _, _ = routed
    rooms = [router.submit("x", 1).room for _ in range(200)]
    assert len(set(rooms)) == 200
    assert all(0 <= room < 1 << 63 for room in rooms)
    assert max(rooms) > 1 << 60


def test_router_aborts_one_side_only_when_asked(routed: Routed) -> None:
    router, prefill, decode = routed
    request = router.submit("a prompt", 4)
    router.abort(request.room, "client left", side="decode")
    router.release(request.room)
    assert [type(prefill.receive()), type(prefill.receive())] == [m.Serve, m.Release]
    assert [decode.receive(), decode.receive()][1] == m.Abort(request.room, "client left")


def test_router_refuses_what_cannot_be(routed: Routed) -> None:
    router, _, _ = routed
    with pytest.raises(RuntimeError, match="no prefill worker prefill-7 is alive"):
        router.submit("a prompt", 4, prefill="prefill-7")
    with pytest.raises(ValueError, match="one chunk"):
        router.submit("short", 4, hold="TRANSFERRING")
    router.mark_dead("decode-0", "killed")
    with pytest.raises(RuntimeError, match="no decode worker"):
        router.submit("a prompt", 4)


def test_router_answers_for_a_worker_that_was_started_again(routed: Routed) -> None:
    router, prefill, decode = routed
    request = router.submit("a prompt", 4)
    again = FakeWorker(router, "prefill", incarnation="b")
    try:
        until(lambda: request.results, lambda: router.step(20), "the dead life is answered for")
        made_up = request.results["prefill"]
        assert (made_up.outcome, made_up.cause, made_up.peer) == ("failed", "worker_lost", "prefill-0")
        assert "prefill-0 (pid 100) died: it was started again" in made_up.reason
        prefill.say(m.Progress(prefill.name, request.room, "prefill", "SUCCESS", 1.0))
        prefill.finish(request.room)  # the old life's last words come too late
        decode.finish(request.room, "failed", "peer prefill-0 was lost")
        until(lambda: request.done, lambda: router.step(20), "decode learned it from its session")
        assert (request.outcome, request.reason) == ("failed", "peer prefill-0 was lost")
        router.step(100)  # whatever of the old life is still on its way
        assert request.results["prefill"] is made_up
        assert not request.phases
        assert (router.workers["prefill-0"].lives, router.workers["prefill-0"].alive) == (2, True)
        assert router.submit("next", 4).prefill == "prefill-0"
        assert isinstance(again.receive(), m.Serve)
    finally:
        again.close()


def test_router_gives_every_request_an_end(routed: Routed) -> None:
    """One side failed and the other never says anything: after the grace it is aborted, after another it is answered for."""
    router, prefill, decode = routed
    request = router.submit("a prompt", 4)
    prefill.finish(request.room, "failed", "out of luck")
    until(lambda: request.done, lambda: router.step(20), "the request is done")
    assert isinstance(decode.receive(), m.Serve)
    abort = decode.receive()
    assert isinstance(abort, m.Abort)
    assert "prefill-0 is done with it (failed: out of luck)" in abort.reason
    assert request.results["decode"].cause == "router"
    assert request.outcome == "failed"


def test_router_notices_silence_and_ignores_garbage() -> None:
    with Router(silent_ms=100) as router:
        worker = FakeWorker(router, "prefill")
        try:
            until(lambda: router.workers, lambda: router.step(20), "the worker is known")
            worker.socket.send(b"\xc1 not a message")
            until(lambda: not router.workers["prefill-0"].alive, lambda: router.step(20), "the silent worker is given up")
        finally:
            worker.close()


def test_request_without_results_has_no_outcome() -> None:
    request = Request(1, "x", 1, None, {"prefill": "prefill-0", "decode": "decode-0"}, 0.0, 0.0)
    assert (request.done, request.outcome, request.reason, request.tokens) == (False, "", "", [])


# --- the process -------------------------------------------------------------------------------------------------------------


def test_a_worker_process_says_hello_reports_on_sigterm_and_exits_clean() -> None:
    with Router() as router, zmq.Context() as context, context.socket(zmq.ROUTER) as nobody:
        port = nobody.bind_to_random_port("tcp://127.0.0.1")  # a bootstrap server that never answers: the worker must not care
        command = [sys.executable, "-m", "pd_fsm.examples.engine.worker", "--role", "decode", "--router", router.endpoint]
        command += ["--bootstrap", f"http://127.0.0.1:{port}", "--pages", "8", "--with-parent"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                until(lambda: router.workers or process.poll() is not None, lambda: router.step(50), "the worker says hello")
                worker = router.workers["decode-0"]
                assert worker.pid == process.pid
                os.kill(process.pid, signal.SIGTERM)
                until(lambda: router.reports or process.poll() is not None, lambda: router.step(50), "the worker reports")
                out, err = process.communicate(timeout=PATIENCE_S)
            finally:
                process.kill()
        report = router.reports["decode-0", worker.incarnation]
        assert (report.pages_free, report.pages_total, report.live_rooms) == (8, 8, 0)
        assert (process.returncode, out, err) == (0, "", "")
