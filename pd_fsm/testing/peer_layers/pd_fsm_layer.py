"""pd-fsm's own layer in the shape of SGLang's, over the native API and the memory transport: the control of the search.

The other side is a real session, too. Nothing moves by itself: one action lets messages arrive, so they are as late as the search
wants them to be.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

import pd_fsm
from pd_fsm.runtime.session import Handle, Session
from pd_fsm.testing.peer_layers.adapter import WAITING_FOR_INPUT, Action, engine_actions
from pd_fsm.testing.snapshot import freeze

ROOM = 7


class PdFsmLayer:
    """One side of pd-fsm, with one room."""

    plays_peer = True

    def __init__(self, side: str) -> None:
        self.name = f"native {side}"
        self._side = side
        self._sessions: list[Session] = []
        self._handle: Any = None
        self._peer_handles: dict[int, Any] = {}

    def reset(self) -> None:
        for session in self._sessions:
            session.close(timeout_s=0)
        meet = pd_fsm.LocalRendezvous()
        self._sessions = []
        for role in ("prefill", "decode"):
            layout = pd_fsm.KVLayout([pd_fsm.paged("kv", [np.zeros((8, 16, 4), np.uint8)], page_size=16)])
            self._sessions.append(
                pd_fsm.open_session(
                    role, layout, transport="memory", rendezvous=meet.client(), thread=False, incarnation=role.encode().ljust(16)
                )
            )
        self._handle = None
        self._peer_handles = {}

    @property
    def _own(self) -> Session:
        return self._sessions[0 if self._side == "sender" else 1]

    @property
    def _other(self) -> Session:
        return self._sessions[1 if self._side == "sender" else 0]

    # --- what a search asks --------------------------------------------------------------------------------------------------

    def status(self) -> int | None:
        found = [room for room in self._own.describe()["rooms"] if room["room"] == ROOM]
        return int(pd_fsm.Phase[found[0]["phase"]]) if found else None

    def remains(self) -> Mapping[str, str]:
        """Rooms; what is owed about memory outlives them on purpose, and ends without them."""
        held = [room for room in self._own.describe()["rooms"] if room["room"] == ROOM]
        return {"rooms": str(held)} if held else {}

    def fingerprint(self) -> Hashable:
        waiting = tuple(len(session.driver._inbox) + len(session.driver._effects) for session in self._sessions)
        return tuple(freeze(session.driver.core) for session in self._sessions), waiting

    def actions(self) -> list[Action]:
        shared = [
            *engine_actions(self._create, lambda: self._handle, self._clear, self._raise),
            Action("messages arrive", "", "both drivers run", lambda p, _: p.life > 0, lambda _: self._arrive()),
            Action(
                "the other side aborts",
                "failed",
                "its client left",
                lambda p, life: life in self._peer_handles and life not in p.ended,
                self._peer_aborts,
                per_life=True,
            ),
        ]
        opens = Action(
            "the other side opens the room",
            "registered",
            "its scheduler takes the request, also when this one gave up meanwhile",
            lambda p, life: life > 0 and life not in p.registered,
            self._peer_opens,
            per_life=True,
        )
        if self._side == "receiver":
            return [*shared, opens]
        send = Action(
            "send the last chunk",
            "send",
            "the forward pass ended",
            lambda p, _: p.open and p.life not in p.sent and p.polled == WAITING_FOR_INPUT,
            lambda _: self._handle.send([1], (0, 16), last=True),
        )
        return [*shared, opens, send]

    # --- what the actions do -------------------------------------------------------------------------------------------------

    def _create(self, _: int) -> None:
        self._handle = self._open(self._own)

    @staticmethod
    def _open(session: Session) -> Handle:
        if session.driver.core.sends:
            return session.send(ROOM)
        pages = [session.driver.core.registry._last_generation % 8]
        return session.receive(ROOM, pages)

    def _raise(self) -> None:
        handle, self._handle = self._handle, None
        handle.clear()
        handle.raise_for_failure()

    def _clear(self) -> None:
        self._handle.clear()
        self._handle = None

    def _peer_opens(self, life: int) -> None:
        for handle in self._peer_handles.values():
            if not handle.cleared:
                handle.abort("retried")
                handle.clear()
        handle = self._peer_handles[life] = self._open(self._other)
        if isinstance(handle, pd_fsm.Sender):
            handle.send([1], (0, 16), last=True)

    def _peer_aborts(self, life: int) -> None:
        self._peer_handles[life].abort()

    def _arrive(self) -> None:
        while self._sessions[0].progress() | self._sessions[1].progress():  # both, each time
            pass
