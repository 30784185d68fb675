"""The app of the metrics address: ``GET /metrics`` and nothing else."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp

from server.telemetry.exposition import OPENMETRICS_CONTENT_TYPE, TEXT_CONTENT_TYPE, negotiate
from server.transport.answers import Answer
from server.transport.app import Boundary
from server.transport.status import StatusTable


def metrics_app(render: Callable[[bool], bytes]) -> ASGIApp:
    """``render(openmetrics)`` gives the page; True when the scraper's Accept header prefers OpenMetrics."""

    async def page(request: Request) -> Answer:
        openmetrics = negotiate(request.headers.get("accept", ""))
        content_type = OPENMETRICS_CONTENT_TYPE if openmetrics else TEXT_CONTENT_TYPE
        return Answer(200, [(b"content-type", content_type.encode())], [render(openmetrics)])

    boundary = Boundary(StatusTable())
    return boundary.app([boundary.route("/metrics", page, "GET")])
