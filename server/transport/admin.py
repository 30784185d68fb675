"""The admin listener: loopback by default. Changes need the bearer token; so does reading when it listens elsewhere."""

from __future__ import annotations

import hmac
import ipaddress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from server.transport.answers import Answer, json_answer
from server.transport.app import Boundary
from server.transport.port import Catalog
from server.transport.status import StatusTable


def is_loopback(host: str) -> bool:
    """Is a listener on this host reachable from this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def admin_app(catalog: Catalog, *, token: str | None, loopback: bool) -> ASGIApp:
    """The routes under ``/admin/v1``. Without a token nothing can be changed, and off loopback nothing read."""

    async def models(_: Request) -> Answer:
        index = catalog.repository_index(ready_only=False)
        rows = [{"name": e.name, "version": e.version, "state": e.state, "reason": e.reason} for e in index]
        return json_answer({"models": rows})

    boundary = Boundary(StatusTable())
    app = boundary.app([boundary.route("/admin/v1/models", models, "GET")])
    return BearerGuard(app, token=token, open_reading=loopback)


class BearerGuard:
    """Asks for ``Authorization: Bearer TOKEN`` on every change, and on reading unless that is open."""

    def __init__(self, app: ASGIApp, *, token: str | None, open_reading: bool) -> None:
        self._app = app
        self._token = token
        self._open_reading = open_reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = json_answer({"error": "this needs the admin token: Authorization: Bearer TOKEN"}, 401)
        refusal.headers.append((b"www-authenticate", b"Bearer"))
        await refusal.send(send)

    def _allowed(self, scope: Scope) -> bool:
        if self._open_reading and scope["method"] in ("GET", "HEAD"):
            return True
        if not self._token:
            return False
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], b"Bearer " + self._token.encode())
