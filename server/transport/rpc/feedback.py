"""``tidegate.v1.Feedback``: the gRPC form of ``POST /v2/models/{model}/feedback``."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Final

from server._pb import feedback_pb2 as pb
from server.errors import InvalidArgument
from server.transport.feedback import MAX_ITEMS, Feedback, check_size, number_of, time_of
from server.transport.port import Services
from server.transport.rpc.unary import Method, parse

SERVICE: Final = "tidegate.v1.Feedback"


class FeedbackRpcs:
    """Takes outcomes for the gateway; without a taker the service is not offered."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog
        self._hear = services.hear
        self.methods: Mapping[str, Method] = {} if services.hear is None else {f"/{SERVICE}/Report": self._report}

    async def _report(self, raw: bytes) -> bytes:
        request = parse(pb.ReportRequest, raw)
        if len(request.outcomes) > MAX_ITEMS:
            raise InvalidArgument(f"at most {MAX_ITEMS} outcomes are taken at once, got {len(request.outcomes)}")
        items = [_feedback(number, outcome) for number, outcome in enumerate(request.outcomes)]
        self._catalog.model_ready(request.model_name, "")
        joined = 0 if self._hear is None else self._hear(request.model_name, items)
        return pb.ReportResponse(accepted=len(items), joined=joined).SerializeToString()


def _feedback(number: int, outcome: pb.Outcome) -> Feedback:
    where = f"item {number}: "
    if not outcome.id and not outcome.key:
        raise InvalidArgument(f"{where}'id' or 'key' must say whose outcome it is")
    for name in ("id", "key", "name", "text"):
        check_size(getattr(outcome, name), name, where)
    if not isfinite(outcome.value):
        raise InvalidArgument(f"{where}'value' must be a finite number, got {outcome.value}")
    time_ns = time_of(outcome.time, where) if outcome.time else None
    # A value of 0 that is not sent is a value of 0 to older clients.
    value = number_of(outcome.text) if outcome.text else outcome.value
    return Feedback(outcome.id, outcome.key, outcome.name, value, outcome.text, outcome.row, time_ns)
