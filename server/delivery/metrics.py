"""What the metrics page says of the outbox."""

from __future__ import annotations

from server.delivery.dispatcher import Dispatcher
from server.telemetry.snapshot import FamilySnapshot, Kind, Points

_SINK = ("sink",)


def families(dispatcher: Dispatcher) -> list[FamilySnapshot]:
    """All families, from memory: a ``Collector`` by way of ``lambda: families(dispatcher)``. Never waits."""
    census, counts = dispatcher.census, dispatcher.counts
    sinks = sorted({sink for sink, _ in census} | counts.keys())
    waiting: Points = {(sink,): census.get((sink, "pending"), 0) + census.get((sink, "leased"), 0) for sink in sinks}
    dead: Points = {(sink,): census.get((sink, "dead"), 0) for sink in sinks}
    return [
        _family("tidegate_outbox_pending", "Deliveries that wait or are being tried.", "gauge", waiting),
        _family("tidegate_outbox_dead", "Deliveries given up and still kept.", "gauge", dead),
        _family(
            "tidegate_outbox_delivered_total", "Deliveries that the receiver took.", "counter",
            {(sink,): count.delivered for sink, count in counts.items()},
        ),
        _family(
            "tidegate_outbox_failed_attempts_total", "Attempts that failed.", "counter",
            {(sink,): count.failed for sink, count in counts.items()},
        ),
        _family(
            "tidegate_outbox_given_up_total", "Deliveries given up after their last attempt.", "counter",
            {(sink,): count.dead for sink, count in counts.items()},
        ),
        FamilySnapshot(
            "tidegate_outbox_refused_total", "Events refused because the outbox was full.", "counter", (),
            {(): dispatcher.refused},
        ),
    ]  # fmt: skip


def _family(name: str, text: str, kind: Kind, points: Points) -> FamilySnapshot:
    # Gateways that share a store all count the same rows.
    return FamilySnapshot(name, text, kind, _SINK, points, "max" if kind == "gauge" else "sum")
