"""What the bootstrap server answers: plain functions from a request to a status and a body, without HTTP, threads or sockets.

pd-fsm's API, JSON both ways, errors as {"error": text}:

    PUT    /v1/peers          {"record": PeerRecord, "lease": secret}  -> {"lease", "lease_ms", "server"}; 409 {"retry_ms"} if taken
    POST   /v1/peers/renew    {"lease"}                                -> {"lease_ms"}; 404 if unknown: register again
    DELETE /v1/peers          {"lease"}                                -> {"removed"}
    GET    /v1/peers?dp_rank=N                                         -> {"peers", "complete", "why", "generation", "server"}
    GET    /v1/topology                                                -> sizes (null while empty), counts, "complete", "generation"
    POST   /v1/rooms          {"rooms": {room: dp_rank}}               -> {"registered"}
    POST   /v1/rooms/query    {"rooms": [room]}      -> {"rooms": {room: dp_rank}, "announcements": {room: serial}, "dp_size"}
    GET    /health                                                     -> OK

The incarnation of a record is base64. Without a "lease" in the PUT the server makes one up. `server` is new at each start, which
tells an empty restart from a lapsed lease; `generation` counts the changes of the table of peers. Each announcement of a room
has another serial: by it a room that is opened again knows the announcement of its earlier life.

SGLang's routes (`/route`, `/register_dp_rank`, `/query_dp_ranks`; interface of SGLang 0.5.23, class CommonKVBootstrapServer in
sglang/srt/disaggregation/common/conn.py) are answered as its own server does, with three differences: a rank that registers
twice is counted once, malformed input is 400 instead of 500, and tables are bounded. That protocol has no identity and no lease,
so its ranks are kept in a table of their own, where the last registration of a rank wins; rooms are shared.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

import attrs
import msgspec
from msgspec import Meta

from pd_fsm.core.events import PeerRecord
from pd_fsm.core.wire import Room
from pd_fsm.runtime.peer_table import PEERS_MAX, RANKS_MAX, PeerTable, RoomTable, Taken, check_record, why_incomplete

ROOMS_PER_REQUEST_MAX = 16_384
REASON_CHARS_MAX = 512  # of an error that may quote the request

Rank: TypeAlias = Annotated[int, Meta(ge=0, lt=RANKS_MAX)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=RANKS_MAX)]
Serial: TypeAlias = Annotated[int, Meta(ge=1, lt=1 << 53)]
Lease: TypeAlias = Annotated[str, Meta(pattern="^[0-9A-Za-z_-]{16,128}$")]
Reply: TypeAlias = "tuple[int, str | Mapping[str, Any]]"
"""Status and body; a str is answered as text, a mapping as JSON."""


class _Registration(msgspec.Struct, forbid_unknown_fields=True):
    record: PeerRecord
    lease: Lease | None = None


class _LeaseOnly(msgspec.Struct, forbid_unknown_fields=True):
    lease: Lease


class _Rooms(msgspec.Struct, forbid_unknown_fields=True):
    rooms: Annotated[dict[Room, Rank], Meta(max_length=ROOMS_PER_REQUEST_MAX)]


class _RoomQuery(msgspec.Struct, forbid_unknown_fields=True):
    rooms: Annotated[list[Room], Meta(max_length=ROOMS_PER_REQUEST_MAX)]


class _SglangRow(msgspec.Struct):
    attn_tp_size: Size
    attn_tp_rank: Rank
    attn_cp_size: Size
    attn_cp_rank: Rank
    attn_dp_size: Size
    attn_dp_rank: Rank
    pp_size: Size
    pp_rank: Rank
    system_dp_size: Size
    system_dp_rank: Rank
    rank_ip: Annotated[str, Meta(max_length=256)]
    rank_port: Annotated[int, Meta(ge=0, le=65_535)]
    page_size: int
    kv_cache_dtype: str | None
    kv_layout: str | None = None
    prefill_http_port: int | None = None
    dsv41_spec_layout: dict[str, Any] | None = None
    load_balance_method: str | None = "follow_bootstrap_room"
    enable_dsa_cache_layer_split: bool | None = False
    enable_kv_cache_sharding: bool | None = False
    decode_allocation_policy: str | None = "early"


class _SglangRoom(msgspec.Struct):
    bootstrap_room: Room
    dp_rank: Rank


class _SglangRoomQuery(msgspec.Struct):
    bootstrap_rooms: Annotated[list[Room], Meta(max_length=ROOMS_PER_REQUEST_MAX)]


class SglangTable:
    """Prefill ranks registered with SGLang's PUT /route. The first row that knows a setting decides it, as in SGLang's server."""

    def __init__(self) -> None:
        self.ranks: dict[tuple[int, int, int, int], dict[str, str | int]] = {}  # (dp, cp, tp, pp)
        self.settings: dict[str, Any] = {}

    def put(self, row: _SglangRow) -> str | None:
        """Take a row in; the answer is None, or why it does not fit."""
        if self.ranks and self.settings["dsv41_spec_layout"] != row.dsv41_spec_layout:
            return "dsv41_spec_layout differs from the registered prefill ranks"
        if self.ranks and self.settings["decode_allocation_policy"] != row.decode_allocation_policy:
            return "decode_allocation_policy differs from the registered prefill ranks"
        plain_dp = row.system_dp_size > 1
        slot = (row.system_dp_rank if plain_dp else row.attn_dp_rank, row.attn_cp_rank, row.attn_tp_rank, row.pp_rank)
        if slot not in self.ranks and len(self.ranks) >= PEERS_MAX:
            return f"{PEERS_MAX} ranks are registered, which is the limit"
        offered = {
            "attn_tp_size": row.attn_tp_size,
            "attn_cp_size": row.attn_cp_size,
            "dp_size": row.system_dp_size if plain_dp else row.attn_dp_size,
            "pp_size": row.pp_size,
            "page_size": row.page_size,
            "kv_cache_dtype": row.kv_cache_dtype,
            "follow_bootstrap_room": row.load_balance_method == "follow_bootstrap_room",
            "enable_dsa_cache_layer_split": bool(row.enable_dsa_cache_layer_split),
            "dsv41_spec_layout": row.dsv41_spec_layout,
            "kv_layout": row.kv_layout,
            "decode_allocation_policy": row.decode_allocation_policy,
            "enable_kv_cache_sharding": bool(row.enable_kv_cache_sharding),
            "prefill_http_port": row.prefill_http_port,
        }
        for name, value in offered.items():
            if self.settings.get(name) is None:
                self.settings[name] = value
        self.ranks[slot] = {"rank_ip": row.rank_ip, "rank_port": row.rank_port}
        return None

    def ready(self) -> bool:
        axes = ("dp_size", "attn_cp_size", "attn_tp_size", "pp_size")
        return bool(self.ranks) and len(self.ranks) >= math.prod(self.settings[axis] for axis in axes)

    def topology(self) -> dict[str, object]:
        """The keys of SGLang's PrefillServerInfo: the decode side computes those that are null, and two are left out if null."""
        mapping = ("target_tp_rank", "target_tp_ranks", "target_cp_ranks", "target_pp_ranks")
        needed = ("required_dst_info_num", "required_prefill_response_num")
        optional = ("dsv41_spec_layout", "kv_layout")
        known = {name: value for name, value in self.settings.items() if value is not None or name not in optional}
        return known | dict.fromkeys(mapping + needed)


@attrs.define
class State:
    """What the handlers answer from. Touched by the server's thread only."""

    peers: PeerTable
    rooms: RoomTable
    sglang: SglangTable = attrs.Factory(SglangTable)
    server: str = attrs.Factory(lambda: secrets.token_hex(8))


@attrs.frozen
class Call:
    query: Mapping[str, str]
    body: bytes
    remote: str


T = TypeVar("T")


def _decode(call: Call, kind: type[T], strict: bool = True) -> T:
    return msgspec.json.decode(call.body, type=kind, strict=strict)


def _put_peer(state: State, call: Call) -> Reply:
    registration = _decode(call, _Registration)
    check_record(registration.record, call.remote)
    lease = registration.lease or secrets.token_hex(16)
    try:
        state.peers.register(registration.record, lease)
    except Taken as taken:
        return 409, {"error": str(taken), "retry_ms": math.ceil(taken.retry_ms)}
    return 200, {"lease": lease, "lease_ms": state.peers.lease_ms, "server": state.server}


def _renew_peer(state: State, call: Call) -> Reply:
    if not state.peers.renew(_decode(call, _LeaseOnly).lease):
        return 404, {"error": "this lease is unknown or lapsed; register again"}
    return 200, {"lease_ms": state.peers.lease_ms}


def _delete_peer(state: State, call: Call) -> Reply:
    return 200, {"removed": state.peers.remove(_decode(call, _LeaseOnly).lease)}


def _get_peers(state: State, call: Call) -> Reply:
    dp_rank = _number(call, "dp_rank")
    records = state.peers.group(dp_rank)
    why = why_incomplete(records, dp_rank)
    known = {"peers": records, "complete": why is None, "why": why or ""}
    return 200, known | {"generation": state.peers.generation, "server": state.server}


def _get_topology(state: State, _: Call) -> Reply:
    records = state.peers.records()
    first = records[0] if records else None
    sizes = {f"{axis}_size": getattr(first, f"{axis}_size", None) for axis in ("dp", "tp", "pp", "cp")}
    expected = math.prod(size or 0 for size in sizes.values())
    counts = {"registered": len(records), "expected": expected, "complete": 0 < expected == len(records)}
    return 200, sizes | counts | {"rooms": len(state.rooms), "generation": state.peers.generation, "server": state.server}


def _post_rooms(state: State, call: Call) -> Reply:
    rooms = _decode(call, _Rooms).rooms
    state.rooms.announce(rooms)
    return 200, {"registered": len(rooms)}


def _query_rooms(state: State, call: Call) -> Reply:
    rooms = _decode(call, _RoomQuery).rooms
    found, serials = state.rooms.find(rooms), state.rooms.serials(rooms)
    return 200, {"rooms": found, "announcements": serials, "dp_size": state.peers.dp_size()}


def _health(_state: State, _: Call) -> Reply:
    return 200, "OK"


def _sglang_put_route(state: State, call: Call) -> Reply:
    why_not = state.sglang.put(_decode(call, _SglangRow, strict=False))
    return (200, "OK") if why_not is None else (400, why_not)


def _sglang_get_route(state: State, call: Call) -> Reply:
    names = ("prefill_dp_rank", "prefill_cp_rank", "target_tp_rank", "target_pp_rank")
    dp_rank, cp_rank, tp_rank, pp_rank = (_number(call, name, least=-1) for name in names)
    slot = (dp_rank, cp_rank, tp_rank, pp_rank)
    if not state.sglang.ready():
        return 503, f"not all prefill ranks are registered yet, {len(state.sglang.ranks)} are"
    if slot == (-1, -1, -1, -1):
        return 200, state.sglang.topology()
    rank = state.sglang.ranks.get(slot)
    if rank is None:
        return 404, "no such rank: " + " ".join(f"{name}={number}" for name, number in zip(names, slot, strict=True))
    return 200, rank


def _sglang_register_room(state: State, call: Call) -> Reply:
    row = _decode(call, _SglangRoom, strict=False)
    state.rooms.announce({row.bootstrap_room: row.dp_rank})
    return 200, "OK"


def _sglang_query_rooms(state: State, call: Call) -> Reply:
    found = state.rooms.find(_decode(call, _SglangRoomQuery, strict=False).bootstrap_rooms)
    return 200, {str(room): dp_rank for room, dp_rank in found.items()}


def _number(call: Call, name: str, least: int = 0) -> int:
    text = call.query.get(name, "")
    if not text:
        raise ValueError(f"query parameter {name} is missing")
    if not (text.removeprefix("-").isdecimal() and len(text) <= 9 and int(text) >= least):
        raise ValueError(f"query parameter {name} must be an integer from {least}, not {text[:32]!r}")
    return int(text)


ROUTES: Mapping[str, Mapping[str, Callable[[State, Call], Reply]]] = {
    "/v1/peers": {"PUT": _put_peer, "GET": _get_peers, "DELETE": _delete_peer},
    "/v1/peers/renew": {"POST": _renew_peer},
    "/v1/topology": {"GET": _get_topology},
    "/v1/rooms": {"POST": _post_rooms},
    "/v1/rooms/query": {"POST": _query_rooms},
    "/health": {"GET": _health, "HEAD": _health},
    "/route": {"PUT": _sglang_put_route, "GET": _sglang_get_route},
    "/register_dp_rank": {"POST": _sglang_register_room},
    "/query_dp_ranks": {"POST": _sglang_query_rooms},
}


def answer(state: State, method: str, path: str, call: Call) -> Reply:
    """The answer to one request. Never raises for what a client sent: malformed input is 400 with what was wrong."""
    methods = ROUTES.get(path)
    if methods is None:
        return 404, {"error": f"no such path: {path[:128]!r}"}
    handler = methods.get(method)
    if handler is None:
        return 405, {"error": f"{path} answers {', '.join(methods)} only"}
    try:
        return handler(state, call)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors; nesting without end is a RecursionError
        return 400, {"error": f"malformed request: {str(error)[:REASON_CHARS_MAX]}"}
