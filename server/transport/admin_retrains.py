"""Retraining on the admin address: what was asked for and what became of it, and the request of a person."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.routing import Route

from server.errors import FailedPrecondition, InvalidArgument
from server.transport.answers import Answer, BodyReader, json_answer
from server.transport.app import Boundary

_MOST_BYTES: Final = 16 * 1024
_ACTOR_CHARS: Final = 128
_KEYS: Final = frozenset({"reason", "actor"})


@dataclass(slots=True, frozen=True)
class RetrainViews:
    """Handed in by who retrains. ``all`` and ``one`` wait for the disk and are called off the event loop.

    ``one`` raises NotFound. ``fire(model, reason, actor)`` raises NotFound, InvalidArgument, and FailedPrecondition
    while a rollout of the model or another of its jobs is open.
    """

    all: Callable[[], Sequence[Mapping[str, Any]]]
    one: Callable[[str], Mapping[str, Any]]
    fire: Callable[[str, str, str], Awaitable[Mapping[str, Any]]]


def retrain_routes(
    boundary: Boundary, views: RetrainViews, reader: BodyReader, query: Callable[[Request], str | None]
) -> list[Route]:
    """``GET /admin/v1/retrains``, ``GET`` and ``POST /admin/v1/retrains/{model}``."""

    async def every(request: Request) -> Answer:
        query(request)
        return json_answer({"retrains": list(await asyncio.to_thread(views.all))})

    async def one(request: Request) -> Answer:
        query(request)
        model = request.path_params["model"]
        if request.method == "GET":
            return json_answer(dict(await asyncio.to_thread(views.one, model)))
        reason, actor = parse(await reader.read(request.receive, _MOST_BYTES))
        try:
            return json_answer(dict(await views.fire(model, reason, actor)), 202)
        except FailedPrecondition as error:
            # As with rollouts: 409 answers what the state of the model forbids.
            return json_answer({"error": error.message}, 409)

    return [
        boundary.route("/admin/v1/retrains", every, "GET"),
        boundary.route("/admin/v1/retrains/{model}", one, "GET", "POST"),
    ]


def parse(body: bytes | bytearray | memoryview) -> tuple[str, str]:
    """Reason and actor of a request. Raises InvalidArgument."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidArgument('the request body must be JSON: {"reason": TEXT, "actor": TEXT}') from None
    if not isinstance(document, dict) or document.keys() - _KEYS or not isinstance(document.get("reason"), str):
        raise InvalidArgument(
            'the request body must be {"reason": TEXT, "actor": TEXT}, of which actor may be left out'
        )
    actor = document.get("actor", "admin")
    if not isinstance(actor, str) or not 1 <= len(actor) <= _ACTOR_CHARS or not actor.isprintable():
        raise InvalidArgument(f"actor must be 1 to {_ACTOR_CHARS} printable characters")
    return document["reason"], actor
