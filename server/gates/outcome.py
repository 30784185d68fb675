"""What an evaluation came to: a status, findings, and on what. Plain values for audit, cards and commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from router.rollout.quality import Finding, Status, overall


@dataclass(slots=True, frozen=True)
class GateOutcome:
    """The verdict on ``candidate`` beside ``champion`` (digests and names, "" for none).

    ``policy``: digest of the policy, ``data``: facts of the holdout. Undecided is not passed: a person is asked.
    """

    model: str
    version: str
    findings: tuple[Finding, ...]
    candidate: str = ""
    champion: str = ""
    against: str = ""
    policy: str = ""
    data: Mapping[str, object] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        return overall(self.findings)

    @property
    def reason(self) -> str:
        """The findings that decided it, one sentence each; empty when all gates passed."""
        decisive = [finding for finding in self.findings if finding.status is self.status]
        if self.status is Status.PASSED:
            return ""
        return "; ".join([f"{finding.gate}: {finding.reason}" for finding in decisive]) or "no gate was looked at"

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, text, finite numbers and booleans; a number that is not finite is a text."""
        found: dict[str, Any] = plain(
            {
                "model": self.model,
                "version": self.version,
                "status": self.status.value,
                "reason": self.reason,
                "candidate": self.candidate,
                "champion": self.champion,
                "against": self.against,
                "policy": self.policy,
                "data": self.data,
                "findings": [
                    {"gate": one.gate, "status": one.status.value, "reason": one.reason, "evidence": one.evidence}
                    for one in self.findings
                ],
            }
        )
        return found


def plain(value: object) -> Any:
    """The same as JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
