"""Groups of ranks in a world: the real `RankAgreement` of each actor, with a collective that is a plain function.

`Group.tick` is one collective: every rank hands in its block, all ranks decide from the same bytes, and Violation is raised when
they do not decide the same. A room is watched at the first tick after it was opened, as an engine would that looks once a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.core import events as ev
from pd_fsm.core.events import Failure
from pd_fsm.core.ledger import Room
from pd_fsm.runtime.agreement import Decision, RankAgreement
from pd_fsm.testing.world import Actor, Violation, World


@attrs.define(eq=False)
class Handle:
    """One room of an actor, as far as an agreement looks at it."""

    world: World
    actor: Actor
    life: Room

    @property
    def room(self) -> int:
        return self.life.room

    @property
    def failure(self) -> Failure | None:
        return self.life.failure

    def poll(self) -> int:
        return self.life.state

    def abort(self, reason: str) -> None:
        event = ev.AbortRequested(self.life.generation, reason)
        self.world.apply(self.actor, self.actor.alive.step(event, self.world.now_ms))


class Poller:
    """A session, as far as an agreement looks at it."""

    def poll_many(self, handles: Sequence[Handle]) -> NDArray[np.int8]:
        return np.array([handle.poll() for handle in handles], dtype=np.int8)


class Group:
    """The ranks of one engine. `decided` is what the last tick decided."""

    def __init__(self, world: World, actors: Sequence[Actor], rows_max: int = 128) -> None:
        self.world = world
        self.actors = list(actors)
        self.decided: list[Decision] = []
        self._watched: set[tuple[str, int]] = set()  # (actor, generation)
        poller: Any = Poller()
        ranks = len(self.actors)
        self._ranks = {
            actor.name: RankAgreement(poller, self._no_gather, rank, ranks, rows_max=rows_max)
            for rank, actor in enumerate(self.actors)
        }

    @staticmethod
    def _no_gather(_: NDArray[np.uint8]) -> NDArray[np.uint8]:
        raise AssertionError("the group gathers by itself")

    def tick(self) -> None:
        for actor in self.actors:
            self._watch(actor)
        gathered = np.stack([rank.block() for rank in self._ranks.values()])
        decided = [rank.apply(gathered.copy()) for rank in self._ranks.values()]
        if any(other != decided[0] for other in decided):
            raise Violation(f"the ranks decided differently: {decided}")
        self.decided = decided[0]
        names = ", ".join(actor.name for actor in self.actors)
        self.world.log += [f"{names} decide: {tell(decision)}" for decision in self.decided]

    def _watch(self, actor: Actor) -> None:
        for life in list(actor.alive.registry.by_room.values()):
            if (actor.name, life.generation) in self._watched:
                continue
            self._watched.add((actor.name, life.generation))
            handle: Any = Handle(self.world, actor, life)
            self._learn(actor, self._ranks[actor.name].watch(handle))

    def refuse(self, actor: Actor, room: int, reason: str) -> None:
        self._learn(actor, self._ranks[actor.name].refuse(room, reason))

    def _learn(self, actor: Actor, decision: Decision | None) -> None:
        if decision is not None:
            self.world.log.append(f"{actor.name} learns: {tell(decision)}")


def tell(decision: Decision) -> str:
    failure = decision.failure
    why = f" (rank {decision.rank}, {failure.cause}: {failure.reason})" if failure else ""
    return f"room {decision.room} {decision.phase.name}{why}"
