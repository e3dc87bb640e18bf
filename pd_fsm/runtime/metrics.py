"""Prometheus metrics of sessions: a collector for a `prometheus_client` registry. Reads `describe()` at each scrape.

    prometheus_client.REGISTRY.register(SessionCollector(session))

Every terminal state of a room increments exactly one counter. A scrape never raises into the exporter and never changes a session.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pd_fsm.errors import MissingDependency

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from pd_fsm.runtime.session import Session


class SessionCollector:
    """Metrics of sessions, told apart by name and role. Thread-safe. Raises MissingDependency without prometheus_client."""

    def __init__(self, *sessions: Session) -> None:
        try:
            from prometheus_client import metrics_core  # noqa: PLC0415 - an extra
        except ImportError as error:
            raise MissingDependency("metrics need prometheus_client; install it with: pip install 'pd-fsm[metrics]'") from error
        self._core = metrics_core
        self._sessions = sessions

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        names = ["session", "role"]
        concluded = self._core.CounterMetricFamily(
            "pd_fsm_rooms_concluded",
            "Rooms that ended, by outcome: success, or the cause of the failure",
            labels=[*names, "outcome"],
        )
        counts = self._core.CounterMetricFamily(
            "pd_fsm_events", "Late, repeated, malformed and other notable events, by kind", labels=[*names, "event"]
        )
        rooms = self._core.GaugeMetricFamily("pd_fsm_rooms", "Open rooms, by phase", labels=[*names, "phase"])
        leases = self._core.GaugeMetricFamily(
            "pd_fsm_leases", "Rooms whose memory somebody else may still touch, by lease state", labels=[*names, "state"]
        )
        peers = self._core.GaugeMetricFamily("pd_fsm_peers", "Known peers, by state", labels=[*names, "state"])
        transport = self._core.GaugeMetricFamily(
            "pd_fsm_transport", "What the transport counts, by figure (docs/transports.md)", labels=[*names, "figure"]
        )
        for session in self._sessions:
            seen = session.describe()
            who = [seen["name"], seen["role"]]
            for kind, count in seen["counts"].items():
                outcome = "success" if kind == "succeeded" else kind.removeprefix("failed.")
                family, label = (concluded, outcome) if outcome != kind else (counts, kind)
                family.add_metric([*who, label], count)
            _gauge(rooms, who, (room["phase"] for room in seen["rooms"]))
            _gauge(leases, who, (lease["state"] for lease in seen["leases"]))
            _gauge(peers, who, (peer["state"] for peer in seen["peers"]))
            for figure, count in seen["transport"].items():
                transport.add_metric([*who, figure], count)
        yield from (concluded, counts, rooms, leases, peers, transport)


def _gauge(family: Any, who: list[str], states: Iterator[str]) -> None:
    for state, count in Counter(states).items():
        family.add_metric([*who, state], count)
