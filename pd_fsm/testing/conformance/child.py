"""One role in a process of its own: `python -m pd_fsm.testing.conformance.child SETTINGS`, told what to do by lines of JSON.

It is the chaos run's engine over the transport under test. There is no bootstrap server: the run tells decode where prefill is.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pd_fsm
from pd_fsm.core.events import Event
from pd_fsm.runtime.transport import Host, Transport, make_transport
from pd_fsm.testing.chaos_worker import CLOSE_S, Engine, end_with_parent, obey, say, serve
from pd_fsm.testing.conformance.target import Target, resolve


class Meeting:
    """The rendezvous of a process that learns by command who its prefill is."""

    def __init__(self) -> None:
        self._local = pd_fsm.LocalRendezvous()

    def client(self) -> pd_fsm.Rendezvous:
        return self._local.client()

    def met(self, endpoint: str, incarnation: str, name: str) -> None:
        """From now on this is the prefill of every lookup."""
        registrar = self._local.client()
        registrar.start(_ignore)
        registrar.register(pd_fsm.PeerRecord(bytes.fromhex(incarnation), endpoint, name))


def _ignore(_: Event) -> None:
    """Nobody asks the registrar anything."""


def main(text: str) -> int:
    """`text` is JSON: role, name, seed, transport, options, directory, port, deadlines, in_flight_bytes_max."""
    end_with_parent()
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log
    settings = json.loads(text)
    role = settings["role"]
    target = Target(resolve(settings["transport"]), settings["options"])
    engine, meeting = Engine(role, settings["seed"]), Meeting()
    endpoint: list[str] = []

    def make(host: Host, **options: Any) -> Transport:
        made = make_transport(target.transport, host, options)
        endpoint.append(made.control.endpoint)
        return made

    engine.session = pd_fsm.open_session(
        role,
        engine.layout,
        transport=make,
        rendezvous=meeting.client(),
        name=settings["name"],
        deadlines=pd_fsm.Deadlines(**settings["deadlines"]),
        limits=pd_fsm.Limits(in_flight_bytes_max=settings["in_flight_bytes_max"]),
        transport_options=target.options_for(role, Path(settings["directory"]), settings["port"]),
    )

    def carry_out(engine: Engine, do: str, arguments: dict[str, Any]) -> Any:
        if do == "meet":
            meeting.met(**arguments)
        elif do == "abort":
            for room in arguments["rooms"]:
                engine.of_room[room].handle.abort("as told")
        else:
            return obey(engine, do, arguments)
        return {}

    try:
        say({"endpoint": endpoint[0], "incarnation": engine.session.incarnation.hex(), "name": settings["name"]})
        serve(engine, carry_out)
    finally:
        engine.session.close(CLOSE_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
