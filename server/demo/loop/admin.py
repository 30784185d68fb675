"""The server's admin address, as an operator's program uses it: monitors, rollouts, audit, configuration."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Final, Self

from server.demo.clients import CallFailed

_TIMEOUT_S: Final = 30.0
_AUDIT_PAGE: Final = 1000


class Admin:
    """One connection to an admin address, with the token of its state folder."""

    def __init__(self, address: str, state_dir: Path) -> None:
        import httpx

        token = (state_dir / "admin-token").read_text(encoding="utf-8").strip()
        self._http = httpx.AsyncClient(
            base_url=f"http://{address}/admin/v1",
            timeout=_TIMEOUT_S,
            headers={"authorization": f"Bearer {token}"},
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
        )

    async def get(self, path: str) -> dict[str, Any] | None:
        """The JSON object at a path; None when there is no such thing. Raises CallFailed."""
        answer = await self._send("GET", path)
        return None if answer.status_code == 404 else _object(path, answer)

    async def monitor(self, model: str, version: str) -> dict[str, Any]:
        """All that is known of the traffic of a version; empty while it is not watched."""
        return await self.get(f"monitors/{model}/{version}") or {}

    async def rollout(self, rollout: str) -> dict[str, Any]:
        """One rollout; empty when there is none of this id."""
        return await self.get(f"rollouts/{rollout}") or {}

    async def audit(self) -> list[dict[str, Any]]:
        """The last rows of the audit trail, oldest first."""
        found = await self.get(f"audit?limit={_AUDIT_PAGE}")
        return [] if found is None else list(found["events"])

    async def apply(self, text: str, actor: str, reason: str) -> None:
        """Put a configuration in force. Raises CallFailed with why it is refused."""
        headers = {"x-tidegate-actor": actor, "x-tidegate-reason": reason}
        _object("config", await self._send("POST", "config", content=text.encode(), headers=headers))

    async def _send(self, method: str, path: str, **more: Any) -> Any:
        import httpx

        try:
            return await self._http.request(method, f"/{path}", **more)
        except httpx.HTTPError as error:
            raise CallFailed(f"{method} /admin/v1/{path}: {type(error).__name__}: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()


def _object(path: str, answer: Any) -> dict[str, Any]:
    if not answer.is_success:
        raise CallFailed(f"/admin/v1/{path} answers {answer.status_code}: {answer.text[:500]}")
    try:
        return dict(answer.json())
    except (ValueError, TypeError) as error:
        raise CallFailed(f"/admin/v1/{path} answers no JSON object: {error}") from error
