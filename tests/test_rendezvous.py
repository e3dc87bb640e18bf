"""The rendezvous clients: against the real bootstrap server, against servers that hang, lie or vanish, and within one process."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from pd_fsm.core.events import LookupFailed, PeerRecord, PeersFound, RegistrationFailed
from pd_fsm.errors import ConfigError, LocalProtocolError, MissingDependency
from pd_fsm.runtime import rendezvous_http
from pd_fsm.runtime.bootstrap import BootstrapServer
from pd_fsm.runtime.bootstrap_client import base_url
from pd_fsm.runtime.rendezvous import HttpRendezvous, LocalRendezvous, Rendezvous

PATIENCE_S = 20.0  # bounds a wait that should end much sooner
INCARNATION = "MTExMTExMTExMTExMTExMQ=="
RECORD: dict[str, Any] = {"incarnation": INCARNATION, "endpoint": "tcp://127.0.0.1:5001"}
ONE = PeerRecord(b"1" * 16, "tcp://127.0.0.1:5001", "prefill-0")


class Session:
    """What a session is to a rendezvous: it asks and takes events, here sorted into answers and reports about its registration."""

    def __init__(self, client: Rendezvous) -> None:
        self.client = client
        self.answers: queue.SimpleQueue[PeersFound | LookupFailed] = queue.SimpleQueue()
        self.reports: queue.SimpleQueue[RegistrationFailed] = queue.SimpleQueue()
        self.threads: set[threading.Thread] = set()
        client.start(self._emit)

    def _emit(self, event: PeersFound | LookupFailed | RegistrationFailed) -> None:
        self.threads.add(threading.current_thread())
        if isinstance(event, RegistrationFailed):
            self.reports.put(event)
        else:
            self.answers.put(event)

    def answer(self) -> PeersFound | LookupFailed:
        return self.answers.get(timeout=PATIENCE_S)

    def report(self) -> str:
        return self.reports.get(timeout=PATIENCE_S).reason

    def ask(self, query: int = 1, address: str = "", room: int = 7, dp_rank: int | None = 0) -> PeersFound | LookupFailed:
        self.client.lookup(query, address, room, dp_rank)
        return self.answer()

    def why_not(self, **asked: Any) -> str:
        answer = self.ask(**asked)
        assert isinstance(answer, LookupFailed)
        return answer.reason

    def ask_until_found(self, address: str = "", room: int = 7, dp_rank: int | None = 0) -> PeersFound:
        """Repeat the lookup, as the core does."""
        deadline = time.monotonic() + PATIENCE_S
        answer: object = None
        while time.monotonic() < deadline:
            answer = self.ask(1, address, room, dp_rank)
            if isinstance(answer, PeersFound):
                return answer
        raise AssertionError(f"never found; last: {answer}")


@pytest.fixture
def connect() -> Iterator[Callable[..., Session]]:
    """Make sessions with an HTTP rendezvous that are closed at the end, and leave no thread."""
    before = set(threading.enumerate())
    with contextlib.ExitStack() as stack:

        def make(url: str, **options: Any) -> Session:
            client = HttpRendezvous(url, **options)
            stack.callback(client.close)
            return Session(client)

        yield make
    assert set(threading.enumerate()) == before


@pytest.fixture
def server() -> Iterator[BootstrapServer]:
    with BootstrapServer("127.0.0.1") as running:
        yield running


def get(server: BootstrapServer, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


class Impostor:
    """A listener that answers each connection with `answer`, which may depend on the request; None accepts and says nothing."""

    def __init__(self, answer: bytes | Callable[[bytes], bytes | None] | None) -> None:
        self.requests: list[bytes] = []
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.02)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._silent: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Impostor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for stream in [*self._silent, self._listener]:
            stream.close()

    def _serve(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                stream, _ = self._listener.accept()
                stream.settimeout(5)
                self.requests.append(stream.recv(65_536))
                answer = self._answer(self.requests[-1]) if callable(self._answer) else self._answer
                if answer is None:
                    self._silent.append(stream)
                    continue
                with stream, contextlib.suppress(OSError):
                    stream.sendall(answer)


def reply(body: bytes | object, status: str = "200 OK", headers: bytes = b"") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status.encode(), len(content), headers, content)


# --- registration --------------------------------------------------------------------------------------------------------------


def test_register_find_and_remove(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    prefill, decode = connect(server.url), connect("http://127.0.0.1:9")
    prefill.client.register(ONE)
    assert decode.ask_until_found(server.url) == PeersFound(1, (ONE,))
    assert decode.ask_until_found(server.url.removeprefix("http://")) == PeersFound(1, (ONE,))  # as routers write addresses
    prefill.client.close()
    answer = decode.ask(2, server.url)
    assert answer == LookupFailed(2, f"{server.url}: no rank of dp_rank 0 is registered")
    assert prefill.reports.empty()
    assert threading.current_thread() not in decode.threads


def test_a_registration_is_renewed(connect: Callable[..., Session]) -> None:
    now, renewals = 0.0, 0
    with BootstrapServer("127.0.0.1", lease_ms=90, clock_ms=lambda: now) as server:
        original = server._state.peers.renew

        def counted(lease: str) -> bool:
            nonlocal now, renewals
            known = original(lease)
            now += 60  # less than a lease, so each renewal is needed
            renewals += 1
            return known

        server._state.peers.renew = counted  # type: ignore[method-assign]
        session = connect(server.url)
        session.client.register(ONE)
        eventually(lambda: renewals >= 5)
        topology = get(server, "/v1/topology")
        assert (topology["registered"], topology["generation"]) == (1, 1)  # it never lapsed


def test_a_lease_that_lapsed_is_registered_again(connect: Callable[..., Session]) -> None:
    now = 0.0
    with BootstrapServer("127.0.0.1", lease_ms=90, clock_ms=lambda: now) as server:
        session = connect(server.url)
        session.client.register(ONE)
        session.ask_until_found()
        now += 1_000  # the process was stopped, say
        eventually(lambda: bool(get(server, "/v1/topology")["generation"] == 3))  # came, lapsed, came back
        assert session.ask() == PeersFound(1, (ONE,))


def test_a_server_that_restarts_empty_is_filled_again(connect: Callable[..., Session]) -> None:
    with BootstrapServer("127.0.0.1", lease_ms=600) as first:
        session = connect(first.url)
        session.client.register(PeerRecord(b"1" * 16, "tcp://127.0.0.1:5001", dp_rank=1, dp_size=2))
        session.client.announce(7, 1)
        session.ask_until_found(dp_rank=None)
    assert first.url in session.report()
    with BootstrapServer("127.0.0.1", port=first.port, lease_ms=600) as second:
        eventually(lambda: get(second, "/v1/peers?dp_rank=1")["complete"] and get(second, "/v1/topology")["rooms"] == 1)
        eventually(lambda: session.report() == "")
        assert isinstance(session.ask_until_found(dp_rank=None), PeersFound)  # the room was announced again, too


def test_registration_waits_for_a_server_that_starts_later(connect: Callable[..., Session]) -> None:
    with BootstrapServer("127.0.0.1") as early:
        port, url = early.port, early.url
    session = connect(url)
    session.client.register(ONE)
    assert session.report().startswith(f"{url}: Cannot connect")
    with BootstrapServer("127.0.0.1", port=port):
        assert session.report() == ""  # and the same reason was not repeated at each retry
        assert session.ask() == PeersFound(1, (ONE,))


def test_a_restarted_process_takes_its_place_once_the_lease_lapsed(connect: Callable[..., Session]) -> None:
    now = 0.0
    with BootstrapServer("127.0.0.1", lease_ms=100, clock_ms=lambda: now) as server:
        server._state.peers.register(ONE, "of-a-process-that-was-killed")
        session = connect(server.url)
        successor = PeerRecord(b"2" * 16, ONE.endpoint, "prefill-0")
        session.client.register(successor)
        assert "is held by another lease, at tcp://127.0.0.1:5001" in session.report()
        assert session.ask() == PeersFound(1, (ONE,))
        now += 100
        assert session.report() == ""  # and the refusals in between were not repeated
        assert session.ask() == PeersFound(1, (successor,))


def test_two_processes_of_one_rank_do_not_replace_each_other(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    first, second = connect(server.url), connect(server.url)
    first.client.register(ONE)
    first.ask_until_found()
    second.client.register(PeerRecord(b"2" * 16, "tcp://127.0.0.1:5002"))
    assert "rank dp0 tp0 pp0 cp0 is held by another lease" in second.report()
    assert first.ask() == PeersFound(1, (ONE,))
    first.client.close()
    assert second.report() == ""


def test_registering_a_rank_again_replaces_its_record(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    session = connect(server.url)
    session.client.register(ONE)
    session.ask_until_found()
    moved = PeerRecord(ONE.incarnation, "tcp://127.0.0.1:5009")
    session.client.register(moved)
    eventually(lambda: session.ask_until_found().records == (moved,))


def test_a_bad_record_is_the_callers_mistake(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    session = connect(server.url)
    with pytest.raises(LocalProtocolError, match="this rank cannot be registered: incarnation must be 16 bytes, not 5"):
        session.client.register(PeerRecord(b"short", "tcp://127.0.0.1:5001"))


# --- lookups -------------------------------------------------------------------------------------------------------------------


def test_an_incomplete_group_names_the_missing_ranks(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    session = connect(server.url)
    ranks = [PeerRecord(bytes([65 + tp]) * 16, f"tcp://127.0.0.1:500{tp}", tp_rank=tp, tp_size=3) for tp in range(3)]
    session.client.register(ranks[1])
    eventually(lambda: bool(get(server, "/v1/topology")["registered"] == 1))
    assert session.ask() == LookupFailed(1, f"{server.url}: 2 of 3 ranks of dp_rank 0 are not registered: tp0 pp0 cp0, tp2 pp0 cp0")
    session.client.register(ranks[2])
    session.client.register(ranks[0])
    assert session.ask_until_found() == PeersFound(1, tuple(ranks))


def test_a_room_leads_to_the_rank_that_announced_it(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    ranks = [PeerRecord(bytes([65 + dp]) * 16, f"tcp://127.0.0.1:500{dp}", dp_rank=dp, dp_size=2) for dp in range(2)]
    prefills = [connect(server.url), connect(server.url)]
    for prefill, rank in zip(prefills, ranks, strict=True):
        prefill.client.register(rank)
    decode = connect(server.url)
    decode.ask_until_found(dp_rank=0)
    decode.ask_until_found(dp_rank=1)
    assert decode.ask(room=7, dp_rank=None) == LookupFailed(
        1, f"{server.url}: room 7 is not registered yet with any data-parallel rank"
    )
    for room in range(100):
        prefills[room % 2].client.announce(room, room % 2)
    for room in (6, 7):
        assert decode.ask_until_found(room=room, dp_rank=None).records == (ranks[room % 2],)


def test_a_room_that_is_announced_again_has_another_serial(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    prefill, decode = connect(server.url), connect(server.url)
    prefill.client.register(PeerRecord(b"1" * 16, "tcp://127.0.0.1:5001", dp_size=2))
    prefill.client.announce(7, 0)
    first = decode.ask_until_found(dp_rank=None).announcement
    assert first > 0
    assert decode.ask_until_found(dp_rank=None).announcement == first
    assert decode.ask_until_found(dp_rank=0).announcement == 0  # not asked for by its number
    prefill.client.announce(7, 0)
    eventually(lambda: decode.ask_until_found(dp_rank=None).announcement not in (0, first))


def test_a_room_that_is_announced_again_meanwhile_is_sent_again(connect: Callable[..., Session]) -> None:
    sent, answer_now = threading.Event(), threading.Event()

    def late(_: bytes) -> bytes:
        sent.set()
        assert answer_now.wait(PATIENCE_S)
        return reply({"registered": 1})

    with Impostor(late) as server:
        session = connect(server.url, timeout_ms=20_000)
        session.client.announce(7, 0)
        assert sent.wait(PATIENCE_S)
        session.client.announce(7, 0)  # it was retracted, and this rank opened it again
        answer_now.set()
        eventually(lambda: len(server.requests) == 2)
        eventually(lambda: not session.client._unsent)  # type: ignore[attr-defined]


def test_rooms_need_no_announcement_without_data_parallelism(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    session = connect(server.url)
    session.client.register(ONE)
    session.ask_until_found()
    assert session.ask(2, room=12_345, dp_rank=None) == PeersFound(2, (ONE,))
    session.client.announce(12_345, 0)
    eventually(lambda: bool(get(server, "/v1/topology")["rooms"] == 1))
    assert session.ask(3, room=12_345, dp_rank=None) == PeersFound(3, (ONE,))  # and so does not depend on which one there was


def test_concurrent_lookups_share_requests(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    session = connect(server.url)
    session.client.register(ONE)
    session.ask_until_found()
    calls: list[list[int]] = []
    original = server._state.rooms.find

    def counted(rooms: Iterable[int]) -> dict[int, int]:
        calls.append(list(rooms))
        return original(calls[-1])

    server._state.rooms.find = counted  # type: ignore[method-assign]
    asked = range(1_000)
    for query in asked:
        session.client.lookup(query, "", query, None)
    answers = {session.answer() for _ in asked}
    assert answers == {PeersFound(query, (ONE,)) for query in asked}
    assert sorted(room for rooms in calls for room in rooms) == list(asked)
    assert len(calls) < 100


def test_a_query_that_is_open_is_not_asked_twice(connect: Callable[..., Session]) -> None:
    with Impostor(None) as silent:
        session = connect(silent.url, timeout_ms=200)
        for _ in range(3):
            session.client.lookup(5, "", 7, 0)
        assert session.answer().query == 5
        session.client.lookup(6, "", 7, 0)
        assert session.answer().query == 6


def test_lookups_are_bounded(connect: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_http, "LOOKUPS_MAX", 2)
    with Impostor(None) as silent:
        session = connect(silent.url, timeout_ms=300)
        for query in (1, 2, 3):
            session.client.lookup(query, "", query, None)
        assert session.answer() == LookupFailed(3, "2 lookups are waiting, which is the limit")
        assert {session.answer().query, session.answer().query} == {1, 2}
        assert session.ask(4).query == 4  # there is room again


# --- servers that are no help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dp_rank", [0, None])
def test_a_server_that_never_answers(connect: Callable[..., Session], server: BootstrapServer, dp_rank: int | None) -> None:
    """It costs its own lookups their timeout, and nobody else anything: not the caller, not lookups elsewhere."""
    with Impostor(None) as silent:
        session = connect(server.url, timeout_ms=1_000)
        session.client.register(ONE)
        session.ask_until_found()
        began = time.monotonic()
        for query in range(10, 20):
            session.client.lookup(query, silent.url, query, dp_rank)
        session.client.lookup(20, "", 7, dp_rank)
        called = time.monotonic()
        assert session.answer() == PeersFound(20, (ONE,))
        failures = [session.answer() for _ in range(10)]
        ended = time.monotonic()
        assert called - began < 0.5
        assert 0.9 < ended - began < 5
        assert {failure.query for failure in failures} == set(range(10, 20))
        assert {failure.reason for failure in failures if isinstance(failure, LookupFailed)} == {
            f"{silent.url}: no answer within 1000 ms"
        }


def test_the_timeout_bounds_a_lookup_as_a_whole(connect: Callable[..., Session]) -> None:
    def slow(request: bytes) -> bytes | None:
        if b"/v1/rooms/query" not in request:
            return None
        time.sleep(0.9)
        return reply({"rooms": {"7": 0}, "dp_size": 2})

    with Impostor(slow) as server:
        session = connect(server.url, timeout_ms=1_200)
        began = time.monotonic()
        assert session.why_not(dp_rank=None) == f"{server.url}: no answer within 1200 ms"
        assert 1.1 < time.monotonic() - began < 1.8  # and not 0.9 s and then another 1.2


def test_a_lookup_that_gives_up_does_not_take_others_with_it(connect: Callable[..., Session]) -> None:
    release = threading.Event()

    def late(request: bytes) -> bytes:
        assert release.wait(PATIENCE_S)
        return reply({"peers": [RECORD]})

    with Impostor(late) as server:
        session = connect(server.url, timeout_ms=20_000)
        client = session.client
        assert isinstance(client, HttpRendezvous)
        assert client._loop is not None
        client.lookup(1, "", 7, 0)
        client.lookup(2, "", 8, 0)
        eventually(lambda: len(server.requests) == 1)

        def give_up() -> None:
            next(task for task in client._tasks if getattr(task.get_coro(), "__name__", "") == "_find").cancel()

        client._loop.call_soon_threadsafe(give_up)
        first = session.answer()
        assert isinstance(first, LookupFailed)
        release.set()
        second = session.answer()
        assert isinstance(second, PeersFound)
        assert {first.query, second.query} == {1, 2}
        assert len(server.requests) == 1


def test_a_server_that_is_down(connect: Callable[..., Session]) -> None:
    with BootstrapServer("127.0.0.1") as gone:
        url = gone.url
    session = connect(url)
    for dp_rank in (0, None):
        assert session.why_not(dp_rank=dp_rank).startswith(f"{url}: Cannot connect")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "Server disconnected"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", ""),
        (reply(b"<html>hello</html>"), "is not valid"),
        (reply(b"<html>not here</html>", "404 Not Found"), "(status 404) is not valid"),
        (reply({"error": "go away"}, "403 Forbidden"), "was refused (403): go away"),
        (reply({}, "302 Found", b"Location: http://127.0.0.1:9/\r\n"), "was refused (302)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "ayload"),
        (reply(b"[" * 200_000), "is not valid"),
        (reply(b" " * (9 << 20)), "larger than 8388608 bytes"),
        (reply({"peers": 1}), "Expected `array`"),
        (reply({"peers": []}), "no rank of dp_rank 0 is registered"),
        (reply({"peers": [RECORD | {"incarnation": "AAAA"}]}), "incarnation must be 16 bytes"),
        (reply({"peers": [RECORD | {"tp_size": 10**12}]}), "tp_size must be in 1.."),
        (reply({"peers": [RECORD | {"tp_size": 16_384, "pp_size": 16_384, "cp_size": 16_384}]}), "and 4398046511095 more"),
        (reply({"peers": [RECORD | {"dp_rank": 1, "dp_size": 2}]}), "does not belong there"),
        (reply({"peers": [RECORD, RECORD]}), "a rank is listed twice"),
        (reply({"peers": [RECORD | {"tp_size": 2}, RECORD | {"tp_rank": 1, "tp_size": 3}]}), "does not belong there"),
    ],
)
def test_garbage_answers(connect: Callable[..., Session], answer: bytes, why: str) -> None:
    with Impostor(answer) as liar:
        session = connect(liar.url)
        reason = session.why_not()
        assert reason.startswith(liar.url)
        assert why in reason
        assert len(reason) < 2_000
        if answer:  # one attempt, and no redirect followed; aiohttp itself repeats a GET that was cut off before any byte came
            assert len(liar.requests) == 1


@pytest.mark.parametrize("answer", [{"rooms": {"7": -1}, "dp_size": 2}, {"rooms": []}, {"rooms": {"7": 0}, "dp_size": 0}, 5])
def test_garbage_answers_about_rooms(connect: Callable[..., Session], answer: object) -> None:
    with Impostor(reply(answer)) as liar:
        assert "is not valid" in connect(liar.url).why_not(dp_rank=None)


def test_garbage_answers_to_a_registration(connect: Callable[..., Session]) -> None:
    with Impostor(reply({"lease_ms": -5, "server": "x"})) as liar:
        session = connect(liar.url)
        session.client.register(ONE)
        eventually(lambda: len(liar.requests) >= 3)  # it is asked again, at the client's own pace
        assert len(liar.requests) < 10
    with Impostor(reply(b"no")) as liar:
        session = connect(liar.url)
        session.client.register(ONE)
        assert "is not valid" in session.report()


@pytest.mark.parametrize(
    "address", ["ftp://a", "http://", "http://a:x", "http://a:99999", "http://[::1", "a b:c", "http://a/?q=1", "http://u@a"]
)
def test_unusable_addresses(connect: Callable[..., Session], server: BootstrapServer, address: str) -> None:
    with pytest.raises(ConfigError, match="a bootstrap address looks like"):
        HttpRendezvous(address)
    assert "a bootstrap address looks like" in connect(server.url).why_not(address=address)


def test_base_url() -> None:
    assert base_url("10.0.0.1:8998") == "http://10.0.0.1:8998"
    assert base_url("[::1]:8998") == "http://[::1]:8998"
    assert base_url("https://host/prefix/") == "https://host/prefix"


def test_host_names_are_resolved(server: BootstrapServer, connect: Callable[..., Session]) -> None:
    reason = connect(f"http://localhost:{server.port}").why_not()  # and the fixture sees that the resolver's threads end
    assert reason == f"http://localhost:{server.port}: no rank of dp_rank 0 is registered"


# --- the token -----------------------------------------------------------------------------------------------------------------


def test_token(connect: Callable[..., Session]) -> None:
    with BootstrapServer("127.0.0.1", token="s3cret") as guarded:
        friend, stranger = connect(guarded.url, token="s3cret"), connect(guarded.url, token="guess")
        friend.client.register(ONE)
        assert friend.ask_until_found() == PeersFound(1, (ONE,))
        assert "was refused (401)" in stranger.why_not()
        stranger.client.register(PeerRecord(b"2" * 16, "tcp://127.0.0.1:6666"))
        refusal = stranger.report()
        assert "was refused (401)" in refusal
        assert "guess" not in refusal
        assert friend.ask() == PeersFound(1, (ONE,))
    with pytest.raises(ConfigError, match="token"):
        HttpRendezvous(guarded.url, token="")


# --- announcements -------------------------------------------------------------------------------------------------------------


def test_announcements_are_repeated_until_they_are_taken(connect: Callable[..., Session]) -> None:
    with BootstrapServer("127.0.0.1") as early:
        port, url = early.port, early.url
    session = connect(url)
    for room in range(1_000):
        session.client.announce(room, room % 4)
    assert session.report().startswith("rooms are not announced: ")
    with BootstrapServer("127.0.0.1", port=port) as late:
        eventually(lambda: bool(get(late, "/v1/topology")["rooms"] == 1_000))
        assert late._state.rooms.find([6, 7]) == {6: 2, 7: 3}
        assert session.report() == ""


def test_announcements_are_bounded(connect: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous_http, "ANNOUNCED_MAX", 3)
    with BootstrapServer("127.0.0.1") as early:
        port, url = early.port, early.url
    session = connect(url)
    for room in (1, 2, 3, 4, 5):
        session.client.announce(room, 0)
    assert "the oldest were dropped" in session.report()
    with BootstrapServer("127.0.0.1", port=port) as late:
        eventually(lambda: len(late._state.rooms._rooms) > 0)
        assert late._state.rooms.find([1, 2, 3, 4, 5]) == {3: 0, 4: 0, 5: 0}


def test_an_announcement_that_no_server_takes_is_given_up(connect: Callable[..., Session]) -> None:
    with Impostor(reply({"error": "what is this?"}, "400 Bad Request")) as server:
        session = connect(server.url)
        session.client.announce(1, 0)
        assert "what is this?" in session.report()
        eventually(lambda: not session.client._unsent)  # type: ignore[attr-defined]
        assert len(server.requests) == 1


# --- life and death ------------------------------------------------------------------------------------------------------------


def test_close_is_bounded_and_answers_what_is_open() -> None:
    before = set(threading.enumerate())
    with Impostor(None) as silent:
        before_close = set(threading.enumerate())
        session = Session(HttpRendezvous(silent.url, timeout_ms=60_000))
        session.client.register(ONE)
        session.client.announce(7, 0)
        for query in range(50):
            session.client.lookup(query, "", query, None if query % 2 else 0)
        eventually(lambda: len(silent.requests) >= 3)
        began = time.monotonic()
        session.client.close(0.5)
        assert time.monotonic() - began < 2
        eventually(lambda: set(threading.enumerate()) == before_close)
        answers = [session.answer() for _ in range(50)]
        assert session.answers.empty()
        assert set(answers) == {LookupFailed(query, "the rendezvous client was closed") for query in range(50)}
    assert set(threading.enumerate()) == before


def test_a_lookup_just_before_close_is_answered(server: BootstrapServer) -> None:
    for _ in range(20):
        session = Session(HttpRendezvous(server.url))
        session.client.lookup(1, "", 7, 0)
        session.client.close()
        assert isinstance(session.answer(), LookupFailed)
        assert session.answers.empty()


def test_after_close_and_before_start(server: BootstrapServer) -> None:
    client = HttpRendezvous(server.url)
    calls: list[Callable[[], None]] = [
        lambda: client.lookup(1, "", 7, 0),
        lambda: client.register(ONE),
        lambda: client.announce(7, 0),
    ]
    for call in calls:
        with pytest.raises(LocalProtocolError, match="was not started"):
            call()
    session = Session(client)
    with pytest.raises(LocalProtocolError, match="already started"):
        client.start(print)
    client.close()
    client.close()
    client.register(ONE)
    client.announce(7, 0)
    assert session.ask() == LookupFailed(1, "the rendezvous client was closed")
    never_started = HttpRendezvous(server.url)
    never_started.close()


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="timeout_ms must be positive"):
        HttpRendezvous("http://127.0.0.1:9", timeout_ms=0)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependency, match="pip install"):
        HttpRendezvous("http://127.0.0.1:9")


# --- within one process ----------------------------------------------------------------------------------------------------------


def test_local_register_find_and_remove() -> None:
    registry = LocalRendezvous()
    prefill, decode = Session(registry.client()), Session(registry.client())
    assert decode.ask() == LookupFailed(1, "nobody registered at ''")
    ranks = [PeerRecord(bytes([65 + tp]) * 16, f"memory://{tp}", tp_rank=tp, tp_size=2) for tp in range(2)]
    prefill.client.register(ranks[0])
    assert decode.ask() == LookupFailed(1, "1 of 2 ranks of dp_rank 0 are not registered: tp1 pp0 cp0")
    prefill.client.register(ranks[1])
    assert decode.ask(2, dp_rank=None) == PeersFound(2, tuple(ranks))
    prefill.client.close()
    prefill.client.close()
    assert decode.ask() == LookupFailed(1, "no rank of dp_rank 0 is registered")
    assert prefill.ask() == LookupFailed(1, "the rendezvous client was closed")


def test_local_rooms() -> None:
    registry = LocalRendezvous()
    session = Session(registry.client())
    ranks = [PeerRecord(bytes([65 + dp]) * 16, f"memory://{dp}", dp_rank=dp, dp_size=2) for dp in range(2)]
    for rank in ranks:
        session.client.register(rank)
    assert session.ask(dp_rank=None) == LookupFailed(1, "room 7 is not registered yet with any data-parallel rank")
    session.client.announce(7, 1)
    found = session.ask(dp_rank=None)
    assert isinstance(found, PeersFound)
    assert found.records == (ranks[1],)
    assert found.announcement > 0
    assert session.ask(dp_rank=None) == found
    assert session.ask(dp_rank=1) == PeersFound(1, (ranks[1],))  # not asked for by its number
    session.client.announce(7, 1)  # opened again, by the same rank
    again = session.ask(dp_rank=None)
    assert isinstance(again, PeersFound)
    assert again.records == found.records
    assert again.announcement not in (0, found.announcement)


def test_local_addresses_are_kept_apart() -> None:
    registry = LocalRendezvous()
    first, second, decode = Session(registry.client("a:1")), Session(registry.client("b:1")), Session(registry.client())
    other = PeerRecord(b"2" * 16, "memory://2", tp_size=1, dp_size=1)
    first.client.register(ONE)
    second.client.register(other)
    assert decode.ask(address="a:1") == PeersFound(1, (ONE,))
    assert decode.ask(address="b:1") == PeersFound(1, (other,))
    assert first.ask() == PeersFound(1, (ONE,))
    assert decode.ask(address="c:1") == LookupFailed(1, "nobody registered at 'c:1'")


def test_local_successor_of_a_session_that_was_dropped() -> None:
    registry = LocalRendezvous()
    crashed, successor = Session(registry.client()), Session(registry.client())
    new = PeerRecord(b"2" * 16, ONE.endpoint)
    crashed.client.register(ONE)
    successor.client.register(new)
    assert successor.ask() == PeersFound(1, (new,))
    crashed.client.close()  # too late to take its successor out
    assert successor.ask() == PeersFound(1, (new,))


def test_local_sizes_must_agree() -> None:
    registry = LocalRendezvous()
    session = Session(registry.client())
    session.client.register(PeerRecord(b"1" * 16, "memory://1", tp_size=2))
    session.client.register(PeerRecord(b"2" * 16, "memory://2", tp_rank=1, tp_size=4))
    assert "sizes (1, 4, 1, 1) do not fit" in session.report()


def test_local_start() -> None:
    client = LocalRendezvous().client()
    with pytest.raises(LocalProtocolError, match="was not started"):
        client.lookup(1, "", 7, 0)
    client.start(print)
    with pytest.raises(LocalProtocolError, match="already started"):
        client.start(print)
