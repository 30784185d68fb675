"""Rollouts as they are shown: JSON for operators, and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp
from typing import Any

from router.rollout.events import State
from router.rollout.gates import Verdict
from router.rollout.plan import Traffic, plan
from router.rollout.spec import ERROR, NS_PER_S, SLOW, RateGate, RatioGate, RolloutSpec
from server.config.rollouts import RolloutTemplate
from server.control.rollouts.run import Run, plain
from server.control.rollouts.store import StoredRollout
from server.telemetry.snapshot import FamilySnapshot, Points

_LABELS = ("model", "id")
#: Evidence over this is shown as this: what it says is long clear.
_MOST_LOG_E = 700.0


def shown(run: Run, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One rollout that this process knows everything of; ``steps`` as they are ``expected``."""
    machine, spec = run.machine, run.machine.spec
    return plain(  # type: ignore[no-any-return]
        {
            "id": spec.id,
            "name": run.template.entry,
            "model": run.template.model,
            "stable": spec.stable,
            "candidate": spec.candidate,
            "digest": spec.digest,
            "state": machine.state.value,
            "reason": machine.reason,
            "ended": machine.ended,
            "paused": machine.paused,
            "step": machine.step,
            "weight": run.weight / 100,
            "steps": [
                {"weight": step.weight / 100, "min_s": step.min_ns / NS_PER_S, "approve": step.approve}
                | {"certify": dict(step.certify)}
                for step in spec.steps
            ],
            "state_s": machine.state_ns / NS_PER_S,
            "step_s": machine.step_ns / NS_PER_S,
            "starter": machine.starter,
            "approvals": list(machine.approvals),
            "revision": run.revision,
            "uncounted": run.books.uncounted,
            "gates": [gate_shown(verdict) for verdict in machine.verdicts()],
            "plan": steps,
        }
    )


def gate_shown(verdict: Verdict) -> dict[str, Any]:
    """A verdict, with one word for what it says and the evidence as a number."""
    found = verdict.to_dict()
    if verdict.log_e is not None:
        found["e"] = exp(min(verdict.log_e, _MOST_LOG_E))
    return found | {"verdict": word(verdict)}


def word(verdict: Verdict) -> str:
    """What a gate says: ``worse``, ``certified`` or ``unknown``."""
    if verdict.worse:
        return "worse"
    return "certified" if verdict.certified else "unknown"


def past_shown(stored: StoredRollout) -> dict[str, Any]:
    """One that ended before, by what was written down."""
    machine = stored.document.get("machine", {})
    spec = machine.get("spec", {})
    return {
        "id": stored.id,
        "name": stored.name,
        "stable": spec.get("stable", ""),
        "candidate": spec.get("candidate", ""),
        "digest": stored.digest,
        "state": stored.state,
        "reason": machine.get("reason", ""),
        "ended": True,
        "cleared": stored.cleared,
        "revision": stored.document.get("revision", 0),
    }


def expected(template: RolloutTemplate, spec: RolloutSpec, rps: float, error_rate: float) -> list[dict[str, Any]]:
    """How long each step is expected to take with traffic as it is: weights in percent, seconds None if not known.

    Gates on errors and on latency can be told of, as stable is slow once in a hundred by definition; others cannot.
    """
    known = {ERROR: error_rate, SLOW: 0.01}
    rates = {
        name: known[gate.source]
        for name, gate in spec.gates
        if isinstance(gate, RatioGate | RateGate) and gate.source in known
    }
    return [
        {
            "weight": step.weight / 100,
            "median_s": step.median_s,
            "p90_s": step.p90_s,
            "gate": step.gate,
            "approve": step.approve,
        }
        for step in plan(spec, Traffic(rps, rates, template.matched))
    ]


def families(runs: Iterable[Run]) -> Iterator[FamilySnapshot]:
    """States, shares and evidence as metrics."""
    states: Points = {}
    weights: Points = {}
    evidence: Points = {}
    verdicts: Points = {}
    uncounted: Points = {}
    for run in runs:
        labels = (run.template.entry, run.id)
        states |= {(*labels, state.value): int(run.machine.state is state) for state in State}
        weights[labels] = run.weight / 10_000
        uncounted[labels] = run.books.uncounted
        for verdict in () if run.machine.ended else run.machine.verdicts():
            if verdict.log_e is not None:
                evidence[*labels, verdict.gate] = verdict.log_e
            said = word(verdict)
            for possible in ("worse", "certified", "unknown"):
                verdicts[*labels, verdict.gate, possible] = int(said == possible)
    yield FamilySnapshot("tidegate_rollout_state", "1 for the state it is in.", "gauge", (*_LABELS, "state"), states)
    yield FamilySnapshot("tidegate_rollout_weight", "The candidate's share, 0 to 1.", "gauge", _LABELS, weights)
    yield FamilySnapshot(
        "tidegate_rollout_log_evidence",
        "Natural logarithm of the evidence that the candidate is worse, by gate.",
        "gauge",
        (*_LABELS, "gate"),
        evidence,
    )
    text = "Keys and their events that the evidence leaves out, as there were too many keys."
    yield FamilySnapshot("tidegate_rollout_uncounted_total", text, "counter", _LABELS, uncounted)
    yield FamilySnapshot(
        "tidegate_rollout_verdict", "1 for what a gate says.", "gauge", (*_LABELS, "gate", "verdict"), verdicts
    )
