"""The life of one room, declared once.

A room is one request's hand-off as one rank sees it. ROWS and LATE are the whole machine: every change of a room's phase is a row,
everything that may come too late to matter is an entry of LATE with the reason why that is harmless, and any other pair is
refused when this module is imported. The machine does not know whether it serves a sender or a receiver: both are held to the
same rules.

Verdict and memory are two facts. This machine is the verdict; when pages may be used again is the lease's business (`lease.py`).
"""

from __future__ import annotations

import enum

from pd_fsm.machines.table import compile_machine


class Phase(enum.IntEnum):
    """A room's phase as the engine sees it.

    Values and order are a public contract: engines take the minimum over ranks, so Failed must sort lowest and Success
    highest (the same integers as SGLang's KVPoll).
    """

    FAILED = 0
    BOOTSTRAPPING = 1
    WAITING_FOR_INPUT = 2
    TRANSFERRING = 3
    SUCCESS = 4


LIVE = (Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING)
TERMINAL = (Phase.SUCCESS, Phase.FAILED)

FACTS = {
    "all_peers_known": "every peer that this room needs has completed its part of the bootstrap",
    "all_confirmed": "every expected part was confirmed, each once, under its full key",
}

ROWS = (
    {
        "trigger": "peer_ready",
        "source": Phase.BOOTSTRAPPING,
        "dest": Phase.WAITING_FOR_INPUT,
        "conditions": ["all_peers_known"],
    },
    {"trigger": "peer_ready", "source": Phase.BOOTSTRAPPING, "dest": None, "unless": ["all_peers_known"]},
    {"trigger": "start", "source": Phase.WAITING_FOR_INPUT, "dest": Phase.TRANSFERRING},
    {
        "trigger": "part_settled",
        "source": Phase.TRANSFERRING,
        "dest": Phase.SUCCESS,
        "conditions": ["all_confirmed"],
    },
    {"trigger": "part_settled", "source": Phase.TRANSFERRING, "dest": None, "unless": ["all_confirmed"]},
    {"trigger": "fail", "source": list(LIVE), "dest": Phase.FAILED},
)

LATE = {
    (
        "peer_ready",
        (Phase.WAITING_FOR_INPUT, Phase.TRANSFERRING),
    ): "the peers were already known: a repeated offer or welcome",
    ("peer_ready", TERMINAL): "the room concluded before this peer was ready; the peer is told the verdict",
    ("start", (Phase.BOOTSTRAPPING,)): "a chunk handed in before the peers are known is kept until they are",
    ("start", (Phase.TRANSFERRING,)): "the transfer had already started: a further chunk or part",
    ("start", TERMINAL): "the room concluded while the engine was handing in a chunk",
    (
        "part_settled",
        (Phase.BOOTSTRAPPING, Phase.WAITING_FOR_INPUT),
    ): "no part was exposed yet in this life of the room: a duplicate from elsewhere",
    ("part_settled", TERMINAL): "a completion of a write that was submitted before the room concluded",
    ("fail", TERMINAL): "the room already concluded; the first verdict and its reason stand",
}

ROOM = compile_machine("room", Phase, Phase.BOOTSTRAPPING, ROWS, FACTS, LATE, TERMINAL)
