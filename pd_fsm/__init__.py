"""pd-fsm: the session layer of disaggregated LLM serving, as explicit state machines with pluggable transports.

    session = pd_fsm.open_session("decode", layout, rendezvous="http://prefill:8998")
    receiver = session.receive(room, pages, aux=row)

See `open_session` for where to begin and docs/embedding.md for how an engine uses it. Importing this package imports neither
torch nor any transfer library.
"""

from pd_fsm.core.events import CAUSES, Failure, PeerRecord
from pd_fsm.core.settings import Deadlines, Limits, Topology
from pd_fsm.errors import (
    ConfigError,
    LocalProtocolError,
    MissingDependency,
    PdError,
    RoomFailed,
    WaitTimeout,
    WireError,
)
from pd_fsm.kv import Component, KVLayout, RawBuffer, paged, rows
from pd_fsm.machines import LeaseState, PeerState, Phase
from pd_fsm.runtime.rendezvous import HttpRendezvous, LocalRendezvous, Rendezvous
from pd_fsm.runtime.session import Handle, HandleGroup, Receiver, Sender, Session, open_session

__version__ = "0.1.0"

__all__ = [
    "CAUSES",
    "Component",
    "ConfigError",
    "Deadlines",
    "Failure",
    "Handle",
    "HandleGroup",
    "HttpRendezvous",
    "KVLayout",
    "LeaseState",
    "Limits",
    "LocalProtocolError",
    "LocalRendezvous",
    "MissingDependency",
    "PdError",
    "PeerRecord",
    "PeerState",
    "Phase",
    "RawBuffer",
    "Receiver",
    "Rendezvous",
    "RoomFailed",
    "Sender",
    "Session",
    "Topology",
    "WaitTimeout",
    "WireError",
    "__version__",
    "open_session",
    "paged",
    "rows",
]
