"""Records runs for the specification to follow: simulations, and real sessions on real sockets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import pd_fsm
from pd_fsm.testing.simulator import simulate
from pd_fsm.testing.spec_traces import Line, of_files

_ROOMS = 12
_WAIT_S = 10.0


def simulated(seed: int, folder: Path) -> list[Line]:
    """The lines of all sessions of one simulation."""
    path = folder / f"seed-{seed}.ndjson"
    simulate(seed, trace_path=path)
    return of_files([path])


def real_sessions(folder: Path) -> list[Line]:
    """The lines of a prefill and a decode session over ZeroMQ in this process: rooms of one to three chunks, some given up."""
    paths = [folder / "prefill.ndjson", folder / "decode.ndjson"]
    (source, source_layout), (target, target_layout) = _cache(), _cache()
    meet = pd_fsm.LocalRendezvous()
    with (
        pd_fsm.open_session("prefill", source_layout, rendezvous=meet.client(), trace=str(paths[0])) as prefill,
        pd_fsm.open_session("decode", target_layout, rendezvous=meet.client(), trace=str(paths[1])) as decode,
    ):
        for room in range(1, _ROOMS + 1):
            chunks = room % 3 + 1
            receiver = decode.receive(room=room, pages=list(range(chunks)))
            sender = prefill.send(room=room)
            given_up = room % 4
            if given_up == 1:
                receiver.abort("recorded to be checked")
            for chunk in range(chunks - (given_up == 2)):
                sender.send([chunk], tokens=(16 * chunk, 16 * chunk + 16), last=chunk == chunks - 1)
            if given_up in (1, 2):  # of a room that decode gave up before they met, prefill hears nothing
                sender.abort("recorded to be checked")
            receiver.wait(timeout_s=_WAIT_S)
            sender.wait(timeout_s=_WAIT_S)
            receiver.clear()
            sender.clear()
    del source, target
    return of_files(paths)


def _cache() -> tuple[np.ndarray, pd_fsm.KVLayout]:
    pages = np.zeros((8, 16, 2, 4), np.float16)
    return pages, pd_fsm.KVLayout([pd_fsm.paged("kv", [pages], page_size=16)])
