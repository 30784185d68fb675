"""What is on disk of rollouts that this process does not work on: which ids were used, and which candidates tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from router.errors import RolloutRefused
from router.rollout.plan import FailedAttempt
from server.config.rollouts import RolloutTemplate
from server.control.rollouts.store import StoredRollout


@dataclass(slots=True)
class Known:
    """By id, as they were read or last written. ``unreadable``: those of which no machine can be made."""

    stored: dict[str, StoredRollout] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)

    def replace(self, rows: Iterable[StoredRollout]) -> None:
        """All that is on disk now."""
        self.stored = {row.id: row for row in rows}
        self.unreadable.clear()

    def put(self, row: StoredRollout) -> None:
        """One is as this now."""
        self.stored[row.id] = row

    def newest(self) -> list[StoredRollout]:
        """All, the newest first."""
        return sorted(self.stored.values(), key=lambda row: -row.began_ns)

    def of(self, template: RolloutTemplate) -> StoredRollout | None:
        """The newest that this very section has asked for."""
        fingerprint = template.fingerprint()
        found = [row for row in self.stored.values() if (row.name, row.template) == (template.entry, fingerprint)]
        return max(found, key=lambda row: row.began_ns, default=None)

    def used(self, template: RolloutTemplate) -> str:
        """Why a section cannot have its id; "" when it can."""
        row = self.stored.get(template.id)
        if row is None:
            return ""
        if row.id in self.unreadable:
            was = f"what was written down of rollout '{row.id}' ({row.state}) cannot be read"
        elif (row.name, row.template) != (template.entry, template.fingerprint()):
            was = f"rollout '{row.id}' has been used ({row.state})"
        else:
            return ""
        return f"{was}; give the new one an id of its own"

    def free_id(self, template: RolloutTemplate, candidate: str) -> str:
        """An id for a rollout of this candidate. Raises RolloutRefused when it was used, or tried and not cleared."""
        if not template.follows:
            if used := self.used(template):
                raise RolloutRefused(template.id, used)
            return template.id
        tries = self._tries(template, candidate)
        if tries and not tries[-1].cleared:
            was = f"version {candidate} was tried in '{tries[-1].id}' ({tries[-1].state}); clear it"
            raise RolloutRefused(template.id, was)
        return template.run_id(candidate, len(tries))

    def _tries(self, template: RolloutTemplate, candidate: str) -> list[StoredRollout]:
        """Every rollout of one candidate of a template, oldest first."""
        first = template.run_id(candidate)
        found = [row for row in self.stored.values() if row.id == first or row.id.startswith(f"{first}.")]
        return sorted(found, key=lambda row: row.began_ns)

    def failed(self) -> list[FailedAttempt]:
        """Those whose digests are not to be tried again at once."""
        found = (row.failed_attempt() for row in self.stored.values())
        return [attempt for attempt in found if attempt is not None]
