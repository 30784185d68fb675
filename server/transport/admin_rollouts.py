"""Rollouts on the admin address: what runs and ran, and the orders of people."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.routing import Route

from server.errors import FailedPrecondition, NotFound
from server.transport.answers import Answer, json_answer, metadata_of
from server.transport.app import Boundary

#: What may be asked of a rollout, by the word behind the colon.
ORDERS: Final = ("pause", "resume", "abort", "approve", "promote", "rollback", "clear")


@dataclass(slots=True, frozen=True)
class RolloutViews:
    """Handed in by who runs rollouts. ``one`` and ``order`` raise NotFound, ``order`` what is refused.

    ``order(id, word, actor, reason, revision)``; a FailedPrecondition that has ``actual`` speaks of a stale revision.
    """

    all: Callable[[], Sequence[Mapping[str, Any]]]
    one: Callable[[str], Mapping[str, Any]]
    order: Callable[[str, str, str, str, int | None], Awaitable[Mapping[str, Any]]]


def rollout_routes(
    boundary: Boundary,
    views: RolloutViews,
    who: Callable[[Mapping[str, str]], tuple[str, str]],
    if_match: Callable[[Mapping[str, str]], int | None],
) -> list[Route]:
    """``/admin/v1/rollouts``, one rollout, and ``POST /admin/v1/rollouts/{id}:ORDER``."""

    async def every(_: Request) -> Answer:
        return json_answer({"rollouts": list(views.all())})

    async def one(request: Request) -> Answer:
        if request.method == "GET":
            return _tagged(views.one(request.path_params["id"]))
        rollout, colon, order = request.path_params["id"].rpartition(":")
        if not colon or order not in ORDERS:
            raise NotFound(f"POST takes /admin/v1/rollouts/ID:ORDER, with one of {', '.join(ORDERS)}")
        metadata = metadata_of(request.scope["headers"])
        actor, reason = who(metadata)
        try:
            return _tagged(await views.order(rollout, order, actor, reason, if_match(metadata)))
        except FailedPrecondition as error:
            # 409 answers what the rollout's state forbids, 412 an order that was given for another revision.
            actual = getattr(error, "actual", None)
            if actual is None:
                return json_answer({"error": error.message}, 409)
            answer = json_answer({"error": error.message, "revision": actual}, 412)
            answer.headers.append(_etag(actual))
            return answer

    return [
        boundary.route("/admin/v1/rollouts", every, "GET"),
        boundary.route("/admin/v1/rollouts/{id:path}", one, "GET", "POST"),
    ]


def _tagged(found: Mapping[str, Any]) -> Answer:
    answer = json_answer(dict(found))
    if "revision" in found:
        answer.headers.append(_etag(int(found["revision"])))
    return answer


def _etag(revision: int) -> tuple[bytes, bytes]:
    return b"etag", b'"%d"' % revision
