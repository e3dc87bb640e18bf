"""One remote engine process, as this session sees it.

A peer is an incarnation: a restart at the same address is another peer with another machine. LOST and REFUSED are absorbing, so
nothing that was learned from a dead process can be revived by a late message; a process that comes back is met anew, from
CONNECTING, with a new handshake.
"""

from __future__ import annotations

import enum

from pd_fsm.machines.table import compile_machine


class PeerState(enum.IntEnum):
    CONNECTING = 0
    READY = 1
    SUSPECT = 2
    LOST = 3
    REFUSED = 4


FACTS: dict[str, str] = {}

ROWS = (
    {"trigger": "welcome", "source": PeerState.CONNECTING, "dest": PeerState.READY},
    {"trigger": "refuse", "source": PeerState.CONNECTING, "dest": PeerState.REFUSED},
    {"trigger": "heard", "source": PeerState.SUSPECT, "dest": PeerState.READY},
    {"trigger": "silent", "source": PeerState.READY, "dest": PeerState.SUSPECT},
    {
        "trigger": "lost",
        "source": [PeerState.CONNECTING, PeerState.READY, PeerState.SUSPECT],
        "dest": PeerState.LOST,
    },
)

TERMINAL = (PeerState.LOST, PeerState.REFUSED)

LATE = {
    ("welcome", (PeerState.READY, PeerState.SUSPECT)): "a repeated handshake",
    ("welcome", TERMINAL): "the peer was given up; it is met anew by a new handshake",
    ("refuse", (PeerState.READY, PeerState.SUSPECT)): "the handshake had already succeeded",
    ("refuse", TERMINAL): "the peer had already been given up",
    ("heard", (PeerState.CONNECTING,)): "only the handshake makes a peer ready",
    ("heard", (PeerState.READY,)): "it was not suspected",
    ("heard", TERMINAL): "a sign of life from a peer that was given up; it is met anew by a new handshake",
    ("silent", (PeerState.CONNECTING,)): "a peer that never answered has its own deadline",
    ("silent", (PeerState.SUSPECT,)): "already suspected",
    ("silent", TERMINAL): "the peer had already been given up",
    ("lost", TERMINAL): "the peer had already been given up",
}

PEER = compile_machine("peer", PeerState, PeerState.CONNECTING, ROWS, FACTS, LATE, TERMINAL)
