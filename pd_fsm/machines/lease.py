"""Whether memory that was exposed for a room may be touched by somebody.

One lease for each room and side. A verdict never releases memory: a room may be Failed while its lease is still REVOKING, and a
timeout changes the first, never the second. Every exit that is not success takes the same path, whoever began it.

`settled` is the event "one holder can touch the memory no more", with proof: its operation ended, its drain was acknowledged, the
transport vouches for it, or its process is known to be dead and nothing of it is left in the network.
"""

from __future__ import annotations

import enum

from pd_fsm.machines.table import compile_machine


class LeaseState(enum.IntEnum):
    """PRIVATE and QUIESCED memory belongs to its owner alone; in any other state it must not be used for something else."""

    PRIVATE = 0
    EXPOSED = 1
    REVOKING = 2
    QUIESCED = 3
    QUARANTINED = 4


FACTS = {"no_holder": "nobody is left who may touch the memory"}

ROWS = (
    {"trigger": "expose", "source": LeaseState.PRIVATE, "dest": LeaseState.EXPOSED},
    {"trigger": "expose", "source": LeaseState.EXPOSED, "dest": None},
    {"trigger": "settled", "source": LeaseState.EXPOSED, "dest": None},
    {"trigger": "conclude", "source": LeaseState.PRIVATE, "dest": LeaseState.QUIESCED},
    {
        "trigger": "conclude",
        "source": LeaseState.EXPOSED,
        "dest": LeaseState.QUIESCED,
        "conditions": ["no_holder"],
    },
    {"trigger": "conclude", "source": LeaseState.EXPOSED, "dest": LeaseState.REVOKING, "unless": ["no_holder"]},
    {
        "trigger": "settled",
        "source": LeaseState.REVOKING,
        "dest": LeaseState.QUIESCED,
        "conditions": ["no_holder"],
    },
    {"trigger": "settled", "source": LeaseState.REVOKING, "dest": None, "unless": ["no_holder"]},
    {"trigger": "unknown", "source": LeaseState.REVOKING, "dest": LeaseState.QUARANTINED},
    {
        "trigger": "settled",
        "source": LeaseState.QUARANTINED,
        "dest": LeaseState.QUIESCED,
        "conditions": ["no_holder"],
    },
    {"trigger": "settled", "source": LeaseState.QUARANTINED, "dest": None, "unless": ["no_holder"]},
)

LATE = {
    (
        "expose",
        (LeaseState.REVOKING, LeaseState.QUARANTINED, LeaseState.QUIESCED),
    ): "the room concluded; nothing new may be exposed for it",
    ("settled", (LeaseState.PRIVATE,)): "nobody holds memory that was never exposed: a duplicate from elsewhere",
    ("settled", (LeaseState.QUIESCED,)): "a repeated proof; the memory already belongs to its owner alone",
    (
        "conclude",
        (LeaseState.REVOKING, LeaseState.QUARANTINED, LeaseState.QUIESCED),
    ): "the room had already concluded",
    ("unknown", (LeaseState.PRIVATE,)): "nobody holds memory that was never exposed",
    (
        "unknown",
        (LeaseState.EXPOSED,),
    ): "the room is failed in the same step first; its lease is revoking when the doubt is recorded",
    ("unknown", (LeaseState.QUARANTINED,)): "already in doubt; only proof leaves this state",
    ("unknown", (LeaseState.QUIESCED,)): "the memory was proven free before the doubt was reported",
}

TERMINAL = (LeaseState.QUIESCED,)

LEASE = compile_machine("lease", LeaseState, LeaseState.PRIVATE, ROWS, FACTS, LATE, TERMINAL)
