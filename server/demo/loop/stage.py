"""What every scene of the loop works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.demo.data import Flights
from server.demo.loop.admin import Admin
from server.demo.loop.claims import Claims
from server.demo.loop.commands import Tidegate
from server.demo.loop.replay import Replay
from server.demo.loop.settings import Places
from server.demo.report import Reporter


@dataclass(frozen=True, slots=True)
class Stage:
    """The flights of the year that may be replayed, a server that is ready, and the ways to speak with it."""

    flights: Flights
    places: Places
    reporter: Reporter
    claims: Claims
    tidegate: Tidegate
    admin: Admin
    replay: Replay
    #: HOST:PORT of the admin address, for commands.
    admin_address: str

    async def audited(self, *actions: str) -> list[dict[str, Any]]:
        """The rows of the audit trail with one of these actions, oldest first."""
        return [event for event in await self.admin.audit() if event["action"] in actions]

    async def first_audited(self, *actions: str) -> dict[str, Any] | None:
        """The first of them."""
        return next(iter(await self.audited(*actions)), None)

    async def jobs(self) -> list[dict[str, Any]]:
        """The trainings that were asked for."""
        found = await self.admin.get("retrains")
        return [] if found is None else list(found["retrains"])
