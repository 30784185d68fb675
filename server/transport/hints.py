"""``POST /admin/v1/registry/hints``: something may have changed in the registry, so look now.

MLflow signs its webhooks and cannot send a bearer token; whoever sends no signature of MLflow's needs the admin token,
as for every other change. What a hint says is not read.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import Final

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.mlflow.hints import MAX_HINT_BYTES, SIGNATURE, HintRefused, MlflowHints
from server.transport.answers import Answer, BodyReader, HttpSettings, json_answer, metadata_of
from server.transport.app import Boundary

PATH: Final = "/admin/v1/registry/hints"


class RegistryHints:
    """Takes hints. ``wake`` polls soon; ``signed`` checks webhooks (None: only the token counts)."""

    def __init__(
        self,
        wake: Callable[[], None],
        signed: MlflowHints | None,
        *,
        token: str | None,
        settings: HttpSettings | None = None,
    ) -> None:
        self._wake = wake
        self._signed = signed
        self._token = token.encode() if token else b""
        self._reader = BodyReader(settings or HttpSettings())

    def in_front_of(self, guarded: ASGIApp, boundary: Boundary) -> ASGIApp:
        """``guarded``, which wants the token from everybody, with this route before it."""
        own = boundary.app([boundary.route(PATH, self._take, "POST")])

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            mine = scope["type"] == "http" and scope["path"] == PATH
            await (own if mine else guarded)(scope, receive, send)

        return app

    async def _take(self, request: Request) -> Answer:
        metadata = metadata_of(request.scope["headers"])
        if not self._has_token(metadata) and (self._signed is None or SIGNATURE not in metadata):
            return _refused("this needs the admin token, or the signature of a webhook whose secret is known here")
        body = await self._reader.read(request.receive, MAX_HINT_BYTES)
        if self._signed is not None and SIGNATURE in metadata:
            try:
                return json_answer({"polls": self._signed.take(metadata, bytes(body))}, 202)
            except HintRefused as refusal:
                return _refused(str(refusal))
        self._wake()
        return json_answer({"polls": True}, 202)

    def _has_token(self, metadata: Mapping[str, str]) -> bool:
        scheme, _, token = metadata.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        return bool(self._token) and scheme.lower() == "bearer" and hmac.compare_digest(given, self._token)


def _refused(reason: str) -> Answer:
    answer = json_answer({"error": reason}, 401)
    answer.headers += [(b"www-authenticate", b"Bearer"), (b"connection", b"close")]
    return answer
