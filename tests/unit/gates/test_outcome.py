"""server.gates.outcome: one verdict of many findings, in plain values."""

from __future__ import annotations

import json

import numpy as np
import pytest

from router.rollout.quality import Finding, Status
from server.gates.outcome import GateOutcome, plain

PASSED, FAILED = Finding("a", Status.PASSED, "is fine"), Finding("b", Status.FAILED, "is not")
UNDECIDED = Finding("c", Status.UNDECIDED, "nobody knows")


@pytest.mark.parametrize(
    ("findings", "status", "reason"),
    [
        ((PASSED,), Status.PASSED, ""),
        ((PASSED, FAILED, UNDECIDED), Status.FAILED, "b: is not"),
        ((PASSED, UNDECIDED), Status.UNDECIDED, "c: nobody knows"),
        ((), Status.UNDECIDED, "no gate was looked at"),
    ],
)
def test_the_verdict_and_its_reason(findings: tuple[Finding, ...], status: Status, reason: str) -> None:
    outcome = GateOutcome("m", "2", findings)
    assert (outcome.status, outcome.reason) == (status, reason)


def test_plain_values_are_json() -> None:
    odd = {"a": np.float32(0.5), "b": float("nan"), "c": (np.int64(1), None), 3: {"d": np.inf, "e": np.True_}}
    assert plain(odd) == {"a": 0.5, "b": "nan", "c": [1, None], "3": {"d": "inf", "e": True}}
    told = GateOutcome("m", "2", (Finding("g", Status.PASSED, "r", odd),)).to_json()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
