"""The three declared machines: room, lease and peer. Read `room.py` first.

This package owns what may change and under which condition. It must never do I/O, read a clock, log, or know who raised an
event. Declarations are written with `transitions`; a flat table compiled from them runs (`table.py`).
"""

from pd_fsm.machines.lease import LEASE, LeaseState
from pd_fsm.machines.peer import PEER, PeerState
from pd_fsm.machines.room import ROOM, Phase
from pd_fsm.machines.table import DefinitionError, Row, Table

MACHINES = {"room": ROOM, "lease": LEASE, "peer": PEER}

__all__ = [
    "LEASE",
    "MACHINES",
    "PEER",
    "ROOM",
    "DefinitionError",
    "LeaseState",
    "PeerState",
    "Phase",
    "Row",
    "Table",
]
