"""SGLang's released managers, senders and receivers as layers to search. Runs inside an environment of that release only.

The classes are the released ones. Stand-ins replace what does I/O and nothing else: the ZeroMQ socket, the HTTP registry, the
transfer engine and the threads that read from them; what such a thread does with a message is done as an action, at any moment,
since threads and networks may be that late. Malformed input is no action.
"""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import threading
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np

from pd_fsm.testing.peer_layers.adapter import FAILED, SUCCESS, WAITING_FOR_INPUT, Action, engine_actions

ROOM = 7
ADDRESS = "127.0.0.1:8998"


class _Anything(types.ModuleType):
    """Stand-in for torchvision, which these modules import and never use: the released wheel needs CUDA."""

    __path__: list[str] = []  # noqa: RUF012 - what makes it a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyType(name, (), {})


class _AnyType(type):
    """Whatever is taken from a stand-in has every attribute, too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-in for who imports it, and nothing for who only asks whether it is there."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:  # noqa: ARG002
        if fullname.partition(".")[0] != "torchvision" or _is_question():
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing in it."""


def _is_question() -> bool:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and "importlib._bootstrap" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "importlib.util"


def _stand_in_modules() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Socket:
    """Stand-in for a ZeroMQ socket: what is sent is lost, which a network may do."""

    def send_multipart(self, *_: Any, **__: Any) -> None:
        """Lost."""

    def send(self, *_: Any, **__: Any) -> None:
        """Lost."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class _Group:
    """Stand-in for a process group of one rank."""

    world_size = 1
    rank_in_group = 0
    rank = 0


class _Reply:
    """Stand-in for a registry that answers: one rank at an address."""

    status_code = 200
    text = ""

    def json(self) -> dict[str, Any]:
        return {"rank_ip": "127.0.0.1", "rank_port": 1}


class _Requests:
    """Stand-in for the HTTP registry."""

    def __init__(self) -> None:
        self.up = True

    def get(self, *_: Any, **__: Any) -> _Reply:
        if not self.up:
            raise ConnectionError("the bootstrap server does not answer")
        return _Reply()

    post = put = get

    def Session(self) -> _Requests:  # noqa: N802 - the library's name
        return self


class _Settings(types.SimpleNamespace):
    """Configuration of one rank of everything; what is not named here is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1 if name.endswith("_size") else 0 if name.endswith("_rank") else False


def _server_args(port: int) -> Any:
    """What a manager reads of the server's arguments."""
    return _Settings(
        host="127.0.0.1",
        port=30000,
        disaggregation_bootstrap_port=port,
        dist_init_addr=None,
        enable_dp_attention=False,
        dp_size=1,
        pp_size=1,
        tp_size=1,
        nnodes=1,
        load_balance_method="follow_bootstrap_room",
        disaggregation_ib_device=None,
        enable_hisparse=False,
        kv_cache_dtype="auto",
        page_size=16,
        device="cpu",
        enable_pd_role_switch=False,
        disaggregation_transfer_backend="mooncake",
        enable_nsa_prefill_context_parallel=False,
        attn_cp_size=1,
        disaggregation_mode="prefill",
        enable_prefill_cp=False,
    )


def _kv_args() -> Any:
    return _Settings(
        engine_rank=0,
        kv_data_ptrs=[1],
        kv_data_lens=[1],
        kv_item_lens=[1],
        aux_data_ptrs=[1],
        aux_data_lens=[1],
        aux_item_lens=[1],
        state_data_ptrs=[],
        state_data_lens=[],
        state_item_lens=[],
        state_types=[],
        state_type="none",
        state_dim_per_tensor=[],
        ib_device="",
        ib_traffic_class="",
        gpu_id=0,
        kv_head_num=1,
        total_kv_head_num=1,
        page_size=16,
        prefill_pp_size=1,
        pp_rank=0,
        prefill_start_layer=0,
        system_dp_rank=0,
        decode_tp_size=1,
        kv_layer_ids=[],
        kv_data_mem_kinds=["DRAM"],
        kv_cache_dtype_str="auto",
    )


def _prefill_info() -> Any:
    """What a decode rank knows of a prefill engine of one rank."""
    return _Settings(
        attn_tp_size=1,
        attn_cp_size=1,
        dp_size=1,
        pp_size=1,
        page_size=16,
        kv_cache_dtype="auto",
        follow_bootstrap_room=True,
        target_tp_rank=0,
        target_tp_ranks=[0],
        target_cp_ranks=[0],
        target_pp_ranks=[0],
        required_dst_info_num=1,
        required_prefill_response_num=1,
        enable_dcp=False,
        attn_dcp_size=1,
        enable_staging=False,
        enable_kv_checksum=False,
        system_dp_size=1,
        dcp_size=1,
    )


def _quiet(manager: type) -> type:
    """The released manager with stand-ins for its engine and its threads."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    names = (
        "init_engine",
        "register_buffer_to_engine",
        "register_to_bootstrap",
        "start_prefill_thread",
        "start_decode_thread",
        "transfer_worker",
        "_start_heartbeat_checker_thread",
        "start_decode_staging_thread",
    )
    replaced: dict[str, Any] = {name: nothing for name in names if hasattr(manager, name)}
    replaced["get_session_id"] = lambda _: "stand-in"
    return type("Quiet" + manager.__name__, (manager,), replaced)


class SglangLayer:
    """One side of SGLang's layer of one back end, with one room."""

    def __init__(self, backend: str, side: str) -> None:
        self.name = f"{backend} {side}"
        self._side = side
        self.plays_peer = backend == "fake"
        _stand_in_modules()
        os.environ.setdefault("SGLANG_HOST_IP", "127.0.0.1")
        self._publish()
        utils = importlib.import_module("sglang.srt.disaggregation.utils")
        self._mode = utils.DisaggregationMode.PREFILL if side == "sender" else utils.DisaggregationMode.DECODE
        self._requests = _Requests()
        common = importlib.import_module("sglang.srt.disaggregation.common.conn")
        conn = importlib.import_module(f"sglang.srt.disaggregation.{backend}.conn")
        self._patch(common, conn)
        prefix = {"fake": "Fake", "mooncake": "Mooncake", "nixl": "Nixl", "common": "Common"}[backend]
        manager = getattr(conn, f"{prefix}KVManager", None) or common.CommonKVManager
        self._handle_type = getattr(conn, f"{prefix}KV{side.capitalize()}")
        self._manager = _quiet(manager)(_kv_args(), self._mode, _server_args(8998), False)
        if side == "receiver" and hasattr(self._manager, "prefill_info_table"):
            self._manager.prefill_info_table[ADDRESS] = _prefill_info()
        self._containers = {
            name: copy.deepcopy(value)
            for name, value in vars(self._manager).items()
            if isinstance(value, (dict, set)) and "args" not in name
        }
        self._handle: Any = None

    def _publish(self) -> None:
        """Newer releases read their configuration from a global context, which the scheduler's process fills in this way."""
        try:
            context = importlib.import_module("sglang.srt.runtime_context")
        except ModuleNotFoundError:
            return
        arguments = importlib.import_module("sglang.srt.server_args").ServerArgs(
            model_path="dummy",
            device="cpu",
            disaggregation_mode="prefill" if self._side == "sender" else "decode",
            disaggregation_transfer_backend="mooncake",
            disaggregation_bootstrap_port=8998,
            host="127.0.0.1",
            port=30000,
            load_balance_method="follow_bootstrap_room",
        )
        context.publish(arguments, role="scheduler", ranks=context.SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        context.get_parallel().override_permanently(pp_group=_Group())

    def _patch(self, *modules: Any) -> None:
        ones = ("get_attention_tp_size", "get_attention_cp_size", "get_attention_dp_size")
        zeros = ("get_attention_tp_rank", "get_attention_cp_rank", "get_attention_dp_rank")
        stand_ins: dict[str, Any] = {
            **dict.fromkeys(ones, lambda *_, **__: 1),
            **dict.fromkeys(zeros, lambda *_, **__: 0),
            "get_pp_group": lambda *_, **__: _Group(),
            "get_local_ip_auto": lambda *_, **__: "127.0.0.1",
            "get_zmq_socket_on_host": lambda *_, **__: (1, _Socket()),
            "requests": self._requests,
        }
        for module in modules:
            for name, stand_in in stand_ins.items():
                if hasattr(module, name):
                    setattr(module, name, stand_in)
            receiver = getattr(module, "CommonKVReceiver", None)
            if receiver is not None:
                receiver._connect = classmethod(lambda *_, **__: (_Socket(), threading.Lock()))
                receiver._register_kv_args = lambda _: None

    # --- what a search asks --------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        for name, value in self._containers.items():
            current = getattr(self._manager, name)
            current.clear()
            current.update(copy.deepcopy(value))
        self._requests.up = True
        self._handle = None

    def status(self) -> int | None:
        table = getattr(self._manager, "request_status", {})
        return int(table[ROOM]) if ROOM in table else None

    def remains(self) -> Mapping[str, str]:
        found = {}
        for name in self._containers:
            held = getattr(self._manager, name)
            where = held.items() if isinstance(held, dict) else ((key, key) for key in held)
            for key, value in where:
                if key == ROOM or (isinstance(value, (set, list, dict)) and ROOM in value):
                    found[name] = repr(value)
        return found

    def fingerprint(self) -> Hashable:
        tables = tuple((name, repr(sorted(map(repr, _items(getattr(self._manager, name)))))) for name in sorted(self._containers))
        handle = vars(self._handle) if self._handle is not None else {}
        plain = tuple(
            (k, repr(v)) for k, v in sorted(handle.items()) if isinstance(v, (int, str, bool, type(None), set)) and "time" not in k
        )
        return tables, plain

    def actions(self) -> list[Action]:
        engine = engine_actions(self._create, lambda: self._handle, self._clear, self._raise)
        return engine + (self._sender_actions() if self._side == "sender" else self._receiver_actions())

    def _sender_actions(self) -> list[Action]:
        actions = [
            Action(
                "init",
                "init",
                "decode has registered",
                lambda p, _: p.open and not p.initialised and not p.aborted and p.polled == WAITING_FOR_INPUT,
                lambda _: self._handle.init(1, 0),
            ),
            Action(
                "send the last chunk",
                "send",
                "the forward pass ended, the abort may not have been seen yet",
                lambda p, _: p.open and p.initialised and p.life not in p.sent and p.polled != FAILED,
                lambda _: self._send(),
            ),
        ]
        if self.plays_peer:
            return actions
        return actions + [
            Action(
                "metadata of decode arrives",
                "registered",
                "the bootstrap thread reads it, also when prefill gave up meanwhile",
                lambda p, life: life > 0 and life not in p.registered,
                lambda _: self._update(WAITING_FOR_INPUT),
                per_life=True,
            ),
            _ends("the transfer worker is done", "done", "a worker thread may be that late", lambda: self._update(SUCCESS)),
            Action(
                "the transfer worker fails",
                "failed",
                "a worker thread may be that late; decode may have aborted",
                lambda p, life: life in p.registered and life not in p.ended,
                lambda _: self._fail(),
                per_life=True,
            ),
        ]

    def _receiver_actions(self) -> list[Action]:
        actions = [
            Action(
                "init",
                "init",
                "the prefill engine is known",
                lambda p, _: p.open and not p.initialised and not p.refused,
                lambda _: self._handle.init(0),
            ),
            Action(
                "send_metadata",
                "send",
                "pages are reserved",
                lambda p, _: p.open and p.initialised and not p.aborted and p.life not in p.sent and p.polled == WAITING_FOR_INPUT,
                lambda _: self._handle.send_metadata(np.arange(1, dtype=np.int32), 0, []),
            ),
        ]
        if self.plays_peer:
            return actions
        return actions + [
            Action(
                "init while the bootstrap server is down",
                "init-refused",
                "a server may be down",
                lambda p, _: p.open and not p.initialised and not p.refused,
                lambda _: self._init_down(),
            ),
            _ends("prefill says success", "done", "the network may be that slow", lambda: self._update(SUCCESS)),
            _ends("prefill says failed", "failed", "the network may be that slow", self._fail),
        ]

    # --- what the actions do -------------------------------------------------------------------------------------------------

    def _create(self, _: int) -> None:
        more = {"dest_tp_ranks": [0], "pp_rank": 0} if self._side == "sender" else {}
        self._handle = self._handle_type(mgr=self._manager, bootstrap_addr=ADDRESS, bootstrap_room=ROOM, **self._accepted(more))

    def _accepted(self, more: dict[str, Any]) -> dict[str, Any]:
        """Arguments that older releases need and newer ones have no more."""
        code = self._handle_type.__init__.__code__
        return {name: value for name, value in more.items() if name in code.co_varnames[: code.co_argcount]}

    def _send(self) -> None:
        self._handle.send(np.arange(1, dtype=np.int32), None)

    def _clear(self) -> None:
        if hasattr(self._handle, "clear"):
            self._handle.clear()
        self._handle = None

    def _raise(self) -> None:
        handle, self._handle = self._handle, None
        handle.failure_exception()

    def _update(self, status: int) -> None:
        self._manager.update_status(ROOM, status)

    def _fail(self) -> None:
        self._manager.record_failure(ROOM, "as the environment has it")
        self._manager.update_status(ROOM, FAILED)

    def _init_down(self) -> None:
        self._requests.up = False
        try:
            self._handle.init(0)
        finally:
            self._requests.up = True


def _ends(name: str, kind: str, why: str, do: Callable[[], None]) -> Action:
    """What was sent in some life ends, once, in that life or later."""
    return Action(name, kind, why, lambda p, life: life in p.sent and life not in p.ended, lambda _: do(), per_life=True)


def _items(held: Any) -> Any:
    return held.items() if isinstance(held, dict) else held
