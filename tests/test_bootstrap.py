"""The bootstrap server over real loopback HTTP: registration, ownership, rooms, SGLang's routes, hostile input, life and death."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pd_fsm.core.events import PeerRecord
from pd_fsm.errors import ConfigError, MissingDependency
from pd_fsm.runtime import bootstrap, peer_table
from pd_fsm.runtime.bootstrap import BootstrapServer
from pd_fsm.runtime.bootstrap_routes import ROOMS_PER_REQUEST_MAX, ROUTES
from tests.needs import lacking

LEASE = "a-lease-of-its-own"
OTHER_LEASE = "somebody-elses-one"


class Clock:
    """A clock that only the test moves, in milliseconds."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[BootstrapServer]:
    with BootstrapServer("127.0.0.1", lease_ms=3_000, clock_ms=clock) as running:
        yield running


def request(
    server: BootstrapServer, method: str, path: str, body: object = None, token: str | None = None, raw: bytes | None = None
) -> tuple[int, Any]:
    """Status and body, decoded if it is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        content = response.read()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json and content else content.decode()
    finally:
        connection.close()


def record(incarnation: int = 1, endpoint: str = "tcp://127.0.0.1:5001", **ranks: Any) -> dict[str, Any]:
    name = base64.b64encode(bytes([incarnation]) * 16).decode()
    return {"incarnation": name, "endpoint": endpoint, **ranks}


def put(server: BootstrapServer, lease: str = LEASE, **fields: Any) -> tuple[int, Any]:
    return request(server, "PUT", "/v1/peers", {"record": record(**fields), "lease": lease})


def peers(server: BootstrapServer, dp_rank: int = 0) -> dict[str, Any]:
    status, answer = request(server, "GET", f"/v1/peers?dp_rank={dp_rank}")
    assert status == 200
    return dict(answer)


# --- registration and leases -------------------------------------------------------------------------------------------------


def test_register_and_list(server: BootstrapServer) -> None:
    status, granted = put(server, name="prefill-0")
    assert (status, granted["lease"], granted["lease_ms"]) == (200, LEASE, 3_000)
    answer = peers(server)
    assert answer["complete"] is True
    assert answer["why"] == ""
    assert answer["server"] == granted["server"]
    (listed,) = answer["peers"]
    assert base64.b64decode(listed["incarnation"]) == bytes([1]) * 16
    assert (listed["endpoint"], listed["name"], listed["tp_size"]) == ("tcp://127.0.0.1:5001", "prefill-0", 1)
    assert LEASE not in json.dumps(answer)  # the secret stays with its owner


def test_server_mints_a_lease_when_none_is_given(server: BootstrapServer) -> None:
    status, granted = request(server, "PUT", "/v1/peers", {"record": record()})
    assert status == 200
    assert request(server, "POST", "/v1/peers/renew", {"lease": granted["lease"]})[0] == 200


def test_a_group_is_complete_when_each_rank_is_there_once(server: BootstrapServer) -> None:
    sizes = {"tp_size": 2, "pp_size": 2, "dp_size": 2}
    assert put(server, "lease-of-rank-0000", **sizes)[0] == 200
    for _ in range(4):  # a repeated registration must not make the group complete
        assert put(server, "lease-of-rank-0001", endpoint="tcp://127.0.0.1:5002", tp_rank=1, **sizes)[0] == 200
    assert put(server, "lease-of-rank-0002", endpoint="tcp://127.0.0.1:5003", pp_rank=1, **sizes)[0] == 200
    answer = peers(server)
    assert answer["complete"] is False
    assert answer["why"] == "1 of 4 ranks of dp_rank 0 are not registered: tp1 pp1 cp0"
    assert put(server, "lease-of-rank-0003", endpoint="tcp://127.0.0.1:5004", tp_rank=1, pp_rank=1, **sizes)[0] == 200
    answer = peers(server)
    assert answer["complete"] is True
    assert [(one["tp_rank"], one["pp_rank"]) for one in answer["peers"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert peers(server, dp_rank=1)["why"] == "no rank of dp_rank 1 is registered"
    _, topology = request(server, "GET", "/v1/topology")
    assert [topology[f"{axis}_size"] for axis in ("dp", "tp", "pp", "cp")] == [2, 2, 2, 1]
    assert (topology["registered"], topology["expected"], topology["complete"]) == (4, 8, False)


def test_empty_topology(server: BootstrapServer) -> None:
    status, topology = request(server, "GET", "/v1/topology")
    assert status == 200
    assert (topology["dp_size"], topology["registered"], topology["complete"]) == (None, 0, False)


def test_expired_records_are_not_served_and_renewal_extends(server: BootstrapServer, clock: Clock) -> None:
    put(server)
    generation = peers(server)["generation"]
    clock.now += 2_999
    assert request(server, "POST", "/v1/peers/renew", {"lease": LEASE}) == (200, {"lease_ms": 3_000})
    clock.now += 2_999
    assert peers(server)["complete"] is True
    assert peers(server)["generation"] == generation  # a renewal changes nothing that is listed
    clock.now += 1
    answer = peers(server)
    assert (answer["peers"], answer["complete"]) == ([], False)
    assert answer["generation"] == generation + 1
    status, refusal = request(server, "POST", "/v1/peers/renew", {"lease": LEASE})
    assert status == 404
    assert "register again" in refusal["error"]


def test_leases_lapse_in_order_of_renewal(server: BootstrapServer, clock: Clock) -> None:
    for rank in range(3):
        put(server, f"lease-of-rank-000{rank}", endpoint=f"tcp://127.0.0.1:500{rank}", tp_rank=rank, tp_size=3)
    clock.now += 2_000
    assert request(server, "POST", "/v1/peers/renew", {"lease": "lease-of-rank-0000"})[0] == 200
    clock.now += 1_000
    assert [one["tp_rank"] for one in peers(server)["peers"]] == [0]


def test_remove(server: BootstrapServer) -> None:
    put(server)
    assert request(server, "DELETE", "/v1/peers", {"lease": OTHER_LEASE}) == (200, {"removed": False})
    assert peers(server)["complete"] is True
    assert request(server, "DELETE", "/v1/peers", {"lease": LEASE}) == (200, {"removed": True})
    assert peers(server)["peers"] == []
    assert put(server, OTHER_LEASE, incarnation=2)[0] == 200  # the place is free at once


# --- who may replace a rank -----------------------------------------------------------------------------------------------------


def test_the_holder_of_the_lease_may_replace_its_record(server: BootstrapServer) -> None:
    put(server)
    generation = peers(server)["generation"]
    assert put(server)[0] == 200  # the answer was lost and the client asks again
    assert peers(server)["generation"] == generation
    assert put(server, incarnation=2, endpoint="tcp://127.0.0.1:6001")[0] == 200
    answer = peers(server)
    assert [one["endpoint"] for one in answer["peers"]] == ["tcp://127.0.0.1:6001"]
    assert answer["generation"] == generation + 1


@pytest.mark.parametrize("incarnation", [1, 2], ids=["same incarnation, which everybody can read", "another incarnation"])
def test_nobody_else_replaces_a_live_rank(server: BootstrapServer, clock: Clock, incarnation: int) -> None:
    put(server)
    clock.now += 1_000
    status, refusal = put(server, OTHER_LEASE, incarnation=incarnation, endpoint="tcp://127.0.0.1:6666")
    assert (status, refusal["retry_ms"]) == (409, 2_000)
    assert refusal["error"] == "rank dp0 tp0 pp0 cp0 is held by another lease, at tcp://127.0.0.1:5001"
    assert [one["endpoint"] for one in peers(server)["peers"]] == ["tcp://127.0.0.1:5001"]
    assert request(server, "POST", "/v1/peers/renew", {"lease": OTHER_LEASE})[0] == 404


def test_a_restarted_process_gets_its_place_when_the_old_lease_lapsed(server: BootstrapServer, clock: Clock) -> None:
    put(server)
    _, refusal = put(server, OTHER_LEASE, incarnation=2)
    clock.now += refusal["retry_ms"]
    assert put(server, OTHER_LEASE, incarnation=2)[0] == 200
    assert request(server, "POST", "/v1/peers/renew", {"lease": LEASE})[0] == 404  # the old one, if it wakes up, has lost its place
    assert request(server, "DELETE", "/v1/peers", {"lease": LEASE}) == (200, {"removed": False})
    assert put(server)[0] == 409
    assert peers(server)["peers"][0]["incarnation"] == record(incarnation=2)["incarnation"]


def test_other_sizes_than_the_live_ranks_are_refused(server: BootstrapServer, clock: Clock) -> None:
    put(server, tp_size=2)
    status, refusal = put(server, OTHER_LEASE, tp_rank=1, tp_size=4)
    assert status == 409
    assert "sizes (1, 4, 1, 1) do not fit: rank dp0 tp0 pp0 cp0" in refusal["error"]
    assert put(server, tp_size=4)[0] == 200  # alone, the deployment may change
    clock.now += 3_000
    assert put(server, OTHER_LEASE, tp_rank=1, tp_size=2)[0] == 200


def test_one_lease_holds_one_rank(server: BootstrapServer) -> None:
    put(server, tp_size=2)
    status, refusal = put(server, tp_rank=1, tp_size=2)
    assert status == 409
    assert "already holds rank dp0 tp0 pp0 cp0" in refusal["error"]


def test_ranks_are_bounded(server: BootstrapServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_table, "PEERS_MAX", 1)
    put(server, tp_size=2)
    status, refusal = put(server, OTHER_LEASE, tp_rank=1, tp_size=2)
    assert status == 409
    assert "1 ranks are registered, which is the limit" in refusal["error"]
    assert put(server, tp_size=2)[0] == 200


# --- rooms ---------------------------------------------------------------------------------------------------------------------


def test_rooms_are_registered_and_asked_in_batches(server: BootstrapServer) -> None:
    put(server, dp_size=4)
    largest = (1 << 63) - 1
    assert request(server, "POST", "/v1/rooms", {"rooms": {"1": 0, "2": 3, str(largest): 2}}) == (200, {"registered": 3})
    status, answer = request(server, "POST", "/v1/rooms/query", {"rooms": [2, 7, largest]})
    serials = answer.pop("announcements")
    assert (status, answer) == (200, {"rooms": {"2": 3, str(largest): 2}, "dp_size": 4})
    assert set(serials) == {"2", str(largest)}
    assert 0 < serials["2"] != serials[str(largest)] > 0
    request(server, "POST", "/v1/rooms", {"rooms": {"2": 1}})  # retracted, and dispatched to another rank
    assert request(server, "POST", "/v1/rooms/query", {"rooms": [2]})[1]["rooms"] == {"2": 1}


def test_each_announcement_has_another_serial(server: BootstrapServer) -> None:
    def announced(at: BootstrapServer) -> int:
        request(at, "POST", "/v1/rooms", {"rooms": {"7": 1}})
        first, again = (request(at, "POST", "/v1/rooms/query", {"rooms": [7]})[1]["announcements"]["7"] for _ in range(2))
        assert first == again  # it counts announcements, not questions
        return int(first)

    serials = [announced(server), announced(server)]  # the same rank, too: it opened the room again
    with BootstrapServer("127.0.0.1") as restarted:
        serials += [announced(restarted), announced(restarted)]
    assert len(set(serials)) == 4
    assert all(0 < serial < 1 << 53 for serial in serials)


def test_rooms_grow_old(server: BootstrapServer, clock: Clock) -> None:
    request(server, "POST", "/v1/rooms", {"rooms": {"1": 0, "2": 0}})
    clock.now += peer_table.ROOM_AGE_MS_MAX
    request(server, "POST", "/v1/rooms", {"rooms": {"2": 1, "3": 0}})
    assert request(server, "POST", "/v1/rooms/query", {"rooms": [1]})[1]["rooms"] == {"1": 0}
    clock.now += 1
    answer = request(server, "POST", "/v1/rooms/query", {"rooms": [1, 2, 3]})[1]
    assert (answer["rooms"], answer["dp_size"], set(answer["announcements"])) == ({"2": 1, "3": 0}, None, {"2", "3"})
    assert request(server, "GET", "/v1/topology")[1]["rooms"] == 2


def test_rooms_are_bounded_and_the_oldest_goes_first(server: BootstrapServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_table, "ROOMS_MAX", 3)
    for room in (1, 2, 3, 1, 4):
        request(server, "POST", "/v1/rooms", {"rooms": {room: 0}})
    assert request(server, "POST", "/v1/rooms/query", {"rooms": [1, 2, 3, 4]})[1]["rooms"] == {"1": 0, "3": 0, "4": 0}


# --- SGLang's routes -----------------------------------------------------------------------------------------------------------


def sglang_row(**fields: Any) -> dict[str, Any]:
    """What a prefill rank of SGLang 0.5.23 puts."""
    row = {
        "attn_tp_size": 1,
        "attn_tp_rank": 0,
        "attn_cp_size": 1,
        "attn_cp_rank": 0,
        "attn_dp_size": 1,
        "attn_dp_rank": 0,
        "pp_size": 1,
        "pp_rank": 0,
        "system_dp_size": 1,
        "system_dp_rank": 0,
        "rank_ip": "10.0.0.1",
        "rank_port": 7001,
        "page_size": 16,
        "kv_cache_dtype": "auto",
        "kv_layout": None,
        "dsv41_spec_layout": None,
        "load_balance_method": "round_robin",
        "enable_dsa_cache_layer_split": False,
        "enable_kv_cache_sharding": False,
        "prefill_http_port": 30_000,
        "decode_allocation_policy": "early",
    }
    return row | fields


def sglang_route(dp: object = -1, cp: object = -1, tp: object = -1, pp: object = -1) -> str:
    return f"/route?prefill_dp_rank={dp}&prefill_cp_rank={cp}&target_tp_rank={tp}&target_pp_rank={pp}"


def test_sglang_put_route_and_topology(server: BootstrapServer) -> None:
    assert request(server, "GET", sglang_route())[0] == 503
    assert request(server, "PUT", "/route", sglang_row(attn_tp_size=2)) == (200, "OK")
    assert request(server, "PUT", "/route", sglang_row(attn_tp_size=2)) == (200, "OK")  # counted once
    status, text = request(server, "GET", sglang_route())
    assert (status, text) == (503, "not all prefill ranks are registered yet, 1 are")
    assert request(server, "GET", sglang_route(0, 0, 0, 0))[0] == 503
    assert request(server, "PUT", "/route", sglang_row(attn_tp_size=2, attn_tp_rank=1, rank_port="7002")) == (200, "OK")
    status, topology = request(server, "GET", sglang_route())
    assert status == 200
    assert topology == {
        "attn_tp_size": 2,
        "attn_cp_size": 1,
        "dp_size": 1,
        "pp_size": 1,
        "page_size": 16,
        "kv_cache_dtype": "auto",
        "follow_bootstrap_room": False,
        "enable_dsa_cache_layer_split": False,
        "decode_allocation_policy": "early",
        "enable_kv_cache_sharding": False,
        "prefill_http_port": 30_000,
        "target_tp_rank": None,
        "target_tp_ranks": None,
        "target_cp_ranks": None,
        "target_pp_ranks": None,
        "required_dst_info_num": None,
        "required_prefill_response_num": None,
    }
    assert request(server, "GET", sglang_route(0, 0, 1, 0)) == (200, {"rank_ip": "10.0.0.1", "rank_port": 7002})
    status, text = request(server, "GET", sglang_route(0, 0, 2, 0))
    assert (status, text) == (404, "no such rank: prefill_dp_rank=0 prefill_cp_rank=0 target_tp_rank=2 target_pp_rank=0")


def test_sglang_put_route_again_after_a_restart(server: BootstrapServer) -> None:
    request(server, "PUT", "/route", sglang_row())
    request(server, "PUT", "/route", sglang_row(rank_ip="10.0.0.2", rank_port=7100))
    assert request(server, "GET", sglang_route(0, 0, 0, 0)) == (200, {"rank_ip": "10.0.0.2", "rank_port": 7100})


def test_sglang_dp_rank_is_the_attention_rank_or_the_system_rank(server: BootstrapServer) -> None:
    for rank in range(2):
        row = sglang_row(system_dp_size=2, system_dp_rank=rank, attn_dp_rank=0, rank_port=7000 + rank)
        assert request(server, "PUT", "/route", row) == (200, "OK")
    assert request(server, "GET", sglang_route())[1]["dp_size"] == 2
    assert request(server, "GET", sglang_route(1, 0, 0, 0))[1]["rank_port"] == 7001
    with BootstrapServer("127.0.0.1") as attention:
        for rank in range(2):
            row = sglang_row(attn_dp_size=2, attn_dp_rank=rank, rank_port=7000 + rank)
            assert request(attention, "PUT", "/route", row) == (200, "OK")
        assert request(attention, "GET", sglang_route())[1]["dp_size"] == 2
        assert request(attention, "GET", sglang_route(1, 0, 0, 0))[1]["rank_port"] == 7001


def test_sglang_layouts_are_shown_if_set_and_must_agree(server: BootstrapServer) -> None:
    layout = {"layers": [1, 2]}
    assert request(server, "PUT", "/route", sglang_row(dsv41_spec_layout=layout, kv_layout="HND"))[0] == 200
    _, topology = request(server, "GET", sglang_route())
    assert (topology["dsv41_spec_layout"], topology["kv_layout"]) == (layout, "HND")
    assert request(server, "PUT", "/route", sglang_row()) == (400, "dsv41_spec_layout differs from the registered prefill ranks")
    row = sglang_row(dsv41_spec_layout=layout, decode_allocation_policy="late")
    assert request(server, "PUT", "/route", row) == (400, "decode_allocation_policy differs from the registered prefill ranks")


def test_sglang_defaults_of_absent_keys(server: BootstrapServer) -> None:
    row = sglang_row()
    for name in ("kv_layout", "dsv41_spec_layout", "load_balance_method", "prefill_http_port", "decode_allocation_policy"):
        del row[name]
    assert request(server, "PUT", "/route", row) == (200, "OK")
    _, topology = request(server, "GET", sglang_route())
    assert (topology["follow_bootstrap_room"], topology["decode_allocation_policy"]) == (True, "early")
    assert topology["prefill_http_port"] is None


@pytest.mark.parametrize(
    "path", ["/route", "/route?prefill_dp_rank=0", sglang_route("", 0, 0, 0), sglang_route("x", 0, 0, 0), sglang_route(-2, 0, 0, 0)]
)
def test_sglang_get_route_without_usable_parameters(server: BootstrapServer, path: str) -> None:
    assert request(server, "GET", path)[0] == 400


def test_sglang_route_has_no_other_method(server: BootstrapServer) -> None:
    assert request(server, "POST", "/route", sglang_row())[0] == 405


def test_sglang_register_and_query_dp_ranks(server: BootstrapServer) -> None:
    assert request(server, "POST", "/register_dp_rank", {"bootstrap_room": 77, "dp_rank": 3}) == (200, "OK")
    assert request(server, "POST", "/register_dp_rank", {"bootstrap_room": "78", "dp_rank": "1"}) == (200, "OK")
    assert request(server, "POST", "/query_dp_ranks", {"bootstrap_rooms": [77, "78", 79]}) == (200, {"77": 3, "78": 1})
    assert request(server, "POST", "/v1/rooms/query", {"rooms": [77]})[1]["rooms"] == {"77": 3}


def test_sglang_health(server: BootstrapServer) -> None:
    assert request(server, "GET", "/health") == (200, "OK")


def test_sglang_ranks_are_bounded(server: BootstrapServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pd_fsm.runtime.bootstrap_routes.PEERS_MAX", 1)
    assert request(server, "PUT", "/route", sglang_row(attn_tp_size=2))[0] == 200
    assert request(server, "PUT", "/route", sglang_row(attn_tp_size=2, attn_tp_rank=1)) == (
        400,
        "1 ranks are registered, which is the limit",
    )


# --- hostile input -------------------------------------------------------------------------------------------------------------

BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"7",
    b"\xff\xfe",
    b'{"record": 1}',
    b'{"rooms": {"x": 0}}',
    b'{"rooms": {"-1": 0}}',
    b'{"rooms": [-1]}',
    b'{"rooms": {"9223372036854775808": 0}}',
    b'{"rooms": [1e400]}',
    b'{"lease": "short"}',
    b'{"lease": 5}',
    b'{"lease": "\\ud800aaaaaaaaaaaaaaaaaa"}',
    b'{"bootstrap_room": null, "dp_rank": 0}',
    b'{"bootstrap_rooms": "7"}',
    b"[" * 100_000,
    b'{"rooms":' * 100_000,
]
WITH_BODY = [(path, method) for path, methods in ROUTES.items() for method in methods if method not in ("GET", "HEAD")]


@pytest.mark.parametrize(("path", "method"), WITH_BODY)
def test_malformed_bodies_are_answered_400(server: BootstrapServer, path: str, method: str) -> None:
    for body in BODIES:
        status, refusal = request(server, method, path, raw=body)
        assert status == 400, body[:64]
        assert refusal["error"].startswith("malformed request: ")
    assert request(server, "GET", "/v1/topology")[1]["registered"] == 0
    assert request(server, "GET", "/health") == (200, "OK")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"incarnation": "AAAA"}, "incarnation must be 16 bytes, not 3"),
        ({"incarnation": "no base64"}, "base64"),
        ({"endpoint": ""}, "endpoint must say where"),
        ({"endpoint": "tcp://0.0.0.0:5000"}, "is where a socket listens"),
        ({"endpoint": "tcp://[::]:5000"}, "is where a socket listens"),
        ({"endpoint": "tcp://*:5000"}, "is where a socket listens"),
        ({"endpoint": "tcp://[::1:5000"}, "Invalid IPv6"),
        ({"endpoint": "tcp://a\nb"}, "printable"),
        ({"endpoint": "tcp://" + "a" * 300}, "at most 256"),
        ({"name": "x" * 300}, "at most 256"),
        ({"tp_size": 0}, "tp_size must be in 1.."),
        ({"tp_size": 10**30}, "tp_size must be in 1.."),
        ({"tp_rank": 1}, "tp_rank must be in 0..0 for tp_size=1, not 1"),
        ({"dp_rank": -1}, "dp_rank must be in 0..0"),
        ({"cp_rank": True}, "Expected `int`"),
    ],
)
def test_bad_records_are_answered_with_what_was_wrong(server: BootstrapServer, change: dict[str, Any], why: str) -> None:
    status, refusal = request(server, "PUT", "/v1/peers", {"record": record() | change, "lease": LEASE})
    assert status == 400
    assert why in refusal["error"]
    assert peers(server)["peers"] == []


def test_a_loopback_endpoint_is_refused_from_another_host() -> None:
    local = PeerRecord(b"i" * 16, "tcp://127.0.0.1:5000")
    with pytest.raises(ValueError, match="cannot be reached from other hosts"):
        peer_table.check_record(local, remote="10.1.2.3")
    peer_table.check_record(local, remote="127.0.0.1")
    peer_table.check_record(PeerRecord(b"i" * 16, "tcp://10.1.2.3:5000"), remote="10.1.2.3")


@pytest.mark.parametrize("number", [None, "", "-1", "x", "9" * 5_000, "%00", "%C2%B2"])
def test_bad_queries(server: BootstrapServer, number: str | None) -> None:
    status, refusal = request(server, "GET", "/v1/peers" if number is None else f"/v1/peers?dp_rank={number}")
    assert status == 400
    assert "dp_rank" in refusal["error"]


def test_unknown_fields_paths_and_methods(server: BootstrapServer) -> None:
    status, refusal = request(server, "POST", "/v1/peers/renew", {"lease": LEASE, "leese": 1})
    assert (status, "leese" in refusal["error"]) == (400, True)
    assert request(server, "GET", "/v2/peers")[0] == 404
    assert request(server, "PATCH", "/v1/peers", {})[0] == 405


def test_errors_do_not_echo_without_bound(server: BootstrapServer) -> None:
    _, refusal = request(server, "POST", "/v1/peers/renew", {"lease": LEASE, "x" * 100_000: 1})
    assert len(refusal["error"]) < 1_000
    _, refusal = request(server, "GET", "/" + "y" * 4_000)
    assert len(refusal["error"]) < 1_000


@pytest.mark.parametrize(
    "path", [b"/\xff", b"/%ff", b"/v1/peers?dp_rank=\xff", b"/v1/peers?dp_rank=%ff", b"/%ED%A0%80", b"*", b"//v1/peers"]
)
def test_odd_paths_are_answered(server: BootstrapServer, path: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stream:
        stream.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert stream.recv(4_096).split(b" ", 2)[1] in (b"400", b"404")


def test_a_compressed_body_is_not_expanded(server: BootstrapServer) -> None:
    body = gzip.compress(b'{"rooms": {"1": 0}}' + b" " * 50_000_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stream:
        head = f"POST /v1/rooms HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        stream.sendall(head.encode() + body)
        assert stream.recv(4_096).startswith(b"HTTP/1.1 400 ")
    assert request(server, "GET", "/v1/topology")[1]["rooms"] == 0


def test_bodies_are_capped(server: BootstrapServer) -> None:
    status, refusal = request(server, "POST", "/v1/rooms", raw=b" " * (bootstrap.BODY_BYTES_MAX + 1))
    assert (status, refusal["error"]) == (413, f"the request is larger than {bootstrap.BODY_BYTES_MAX} bytes")
    rooms = {"rooms": list(range(ROOMS_PER_REQUEST_MAX + 1))}
    assert request(server, "POST", "/v1/rooms/query", rooms)[0] == 400


def test_a_request_that_never_ends_is_let_go(server: BootstrapServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "BODY_TIMEOUT_S", 0.1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stream:
        stream.sendall(b"POST /v1/rooms HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert stream.recv(4_096).startswith(b"HTTP/1.1 408 ")


def test_broken_http_does_not_stop_the_server(server: BootstrapServer) -> None:
    for data in (b"\x00" * 100, b"GET", b"PUT /v1/peers HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as stream:
            stream.sendall(data)
    assert put(server)[0] == 200


# --- the token -----------------------------------------------------------------------------------------------------------------


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error(
    server: BootstrapServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A killed engine does that; it must not put a traceback into the operator's log."""
    for reset in (True, False):
        with socket.create_connection(("127.0.0.1", server.port), 5.0) as client:
            client.sendall(b"PUT /v1/peers HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert request(server, "GET", "/health")[0] == 200  # by now it reads the body
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", int(reset), 0))
        assert request(server, "GET", "/health")[0] == 200  # by now it knows
    assert not caplog.records


def test_a_token_guards_everything_but_health() -> None:
    with BootstrapServer("127.0.0.1", token="s3cret") as guarded:
        for path, methods in ROUTES.items():
            for method in methods:
                if path == "/health":
                    continue
                for wrong in (None, "", "s3cre", "s3cret2", "S3CRET"):
                    status, refusal = request(guarded, method, path, {}, token=wrong)
                    assert status == 401
                    assert "Bearer" in refusal["error"]
        assert request(guarded, "GET", "/no-such-path")[0] == 401
        assert request(guarded, "GET", "/health") == (200, "OK")
        assert request(guarded, "PUT", "/v1/peers", {"record": record()}, token="s3cret")[0] == 200
        assert request(guarded, "GET", "/v1/topology", token="s3cret")[1]["registered"] == 1


def test_a_token_that_is_not_ascii_is_answered() -> None:
    with BootstrapServer("127.0.0.1", token="s3cret") as guarded, socket.create_connection(("127.0.0.1", guarded.port)) as stream:
        stream.settimeout(10)
        stream.sendall(b"GET /v1/topology HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xc3\xa4\r\n\r\n")
        assert stream.recv(4_096).split(b" ", 2)[1] in (b"400", b"401")


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ä"])
def test_tokens_that_no_header_can_carry_are_refused(token: str) -> None:
    with pytest.raises(ConfigError, match="token must be printable ASCII"):
        BootstrapServer("127.0.0.1", token=token)


def test_no_token_on_a_public_address_must_be_said() -> None:
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0'.*insecure=True"):
        BootstrapServer("0.0.0.0")
    assert BootstrapServer("0.0.0.0", insecure=True).url == "http://127.0.0.1:0"
    assert BootstrapServer("0.0.0.0", token="s3cret").host == "0.0.0.0"


# --- life and death ------------------------------------------------------------------------------------------------------------


def test_close_leaves_no_thread_and_no_socket() -> None:
    before = set(threading.enumerate())
    server = BootstrapServer("127.0.0.1").start()
    assert request(server, "GET", "/health") == (200, "OK")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as idle:  # a client that says nothing holds nobody up
        server.close()
        assert set(threading.enumerate()) == before
        assert idle.recv(1) == b""
    server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
    with pytest.raises(ConfigError, match="already started"):
        server.start()


def test_a_port_in_use_is_an_error_that_names_the_address() -> None:
    before = set(threading.enumerate())
    with BootstrapServer("127.0.0.1") as first:
        second = BootstrapServer("127.0.0.1", port=first.port)
        with pytest.raises(ConfigError, match=rf"cannot listen on 127\.0\.0\.1:{first.port}: Address already in use"):
            second.start()
        second.close()
    assert set(threading.enumerate()) == before


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        BootstrapServer("192.0.2.1", insecure=True).start()


@pytest.mark.parametrize("settings", [{"port": 70_000}, {"lease_ms": 0}])
def test_settings_that_cannot_work(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        BootstrapServer("127.0.0.1", **settings)


def test_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        lacking("this host has no IPv6 loopback")
    with BootstrapServer("::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        connection = http.client.HTTPConnection("::1", server.port, timeout=10)
        connection.request("GET", "/health")
        assert connection.getresponse().read() == b"OK"
        connection.close()


def test_aiohttp_is_needed_only_by_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependency, match=r"pip install pd-fsm\[http\]"):
        BootstrapServer("127.0.0.1")
    code = "import sys, pd_fsm.runtime.bootstrap, pd_fsm.runtime.rendezvous; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


RUN = "import sys; from pd_fsm.runtime.bootstrap import run; sys.exit(run('127.0.0.1', int(sys.argv[1])))"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_serves_until_it_is_told_to_stop(number: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("pd-fsm bootstrap: listening on 127.0.0.1:"), line + process.communicate(timeout=20)[1]
            url = line.split()[-1]
            host, _, port = url.removeprefix("http://").partition(":")
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b"OK"
            connection.close()
            os.kill(process.pid, number)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def test_run_says_why_it_cannot_start() -> None:
    with BootstrapServer("127.0.0.1") as server:
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(server.port)], check=False, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"cannot listen on 127.0.0.1:{server.port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
