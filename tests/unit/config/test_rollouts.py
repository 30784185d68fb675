"""Sections of rollouts: what they become, and every mistake in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.rollout.spec import LevelGate, MeanGate, MismatchGate, RateGate, RatioGate, Reaction
from server.config.load import parse_config
from server.config.model import Config
from server.config.problems import InvalidConfig
from server.config.rollouts import RolloutTemplate, Steering, compile_rollouts, steered
from server.config.routing import Reference, compile_routing

HEAD = """apiVersion: tidegate/v1
models:
  m:
    versions: {'7': {source: a.onnx}, '8': {source: b.onnx}}
    stable: 7
"""
FULL = """    rollout:
      id: m-8
      candidate: 8
      start: {warm: [1, 8], ignore_first: 5s}
      shadow: {sample: 50%, pairs: 100}
      steps:
        - {weight: 1%, min: 2m, certify: {errors: 4.0}}
        - {weight: 50%, certify: {errors: 1.5, ceiling: 1%}, approve: true}
        - {weight: 100%}
      gates:
        errors: {event: error, worse_than: 1.2}
        slow: {event: "latency > stable.p99", worse_than: 1.3}
        ceiling: {event: error, max_rate: 2%}
        diverge: {paired: argmax_disagree, max_rate: 3%, action: hold}
        drift: {monitor: psi, over: 0.25, for: 4, action: hold}
        revenue: {feedback: revenue, worse_by: 0.5, better: higher, action: hold}
        chargeback: {feedback: chargeback, worse_than: 1.1, action: hold}
        srm: {alpha: 0.001, action: hold}
      inconclusive: {after: 1h, then: rollback}
      on_crash: resume
      cooldown: 1m
      approvals: 2
      two_person: true
"""


def parsed(rollout: str) -> Config:
    return parse_config(HEAD + rollout, path="f.yaml", folder=Path())


def template(rollout: str = FULL) -> RolloutTemplate:
    return compile_rollouts(parsed(rollout))["m"]


def mistakes(rollout: str) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as refused:
        parsed(rollout)
    assert all(problem.line for problem in refused.value.problems)
    return {problem.key.removeprefix("models.m.rollout"): problem.message for problem in refused.value.problems}


def test_everything_reaches_the_machine() -> None:
    found = template()
    spec = found.spec("m-8", "7", "8", "abc")
    gates = dict(spec.gates)
    assert gates["errors"] == RatioGate("error", 1.2, Reaction.ROLLBACK)
    assert gates["ceiling"] == RateGate("error", 0.02, Reaction.ROLLBACK)
    assert gates["diverge"] == RateGate("argmax_disagree", 0.03, Reaction.HOLD, paired=True)
    assert gates["drift"] == LevelGate("psi", 0.25, 4, Reaction.HOLD)
    assert gates["revenue"] == MeanGate("revenue", 0.5, True, Reaction.HOLD)
    assert gates["srm"] == MismatchGate(0.001, Reaction.HOLD)
    assert [(step.weight, step.approve) for step in spec.steps] == [(100, False), (5000, True), (10_000, False)]
    assert dict(spec.steps[1].certify) == {"errors": 1.5, "ceiling": 0.01}
    assert (spec.on_crash, spec.approvals, spec.two_person) == ("resume", 2, True)
    assert (spec.inconclusive_after_ns, spec.inconclusive_then) == (3600 * 10**9, "rollback")
    assert (found.warm, found.matched, found.follows) == ((1, 8), True, False)


def test_a_weight_without_steps_is_no_rollout_of_ours() -> None:
    config = parsed("    rollout: {id: r, candidate: 8, weight: 5%}\n")
    assert compile_rollouts(config) == {}
    split = compile_routing(config)["m"].routes.split
    assert split is not None
    assert split.arms[0].weight == 500


@pytest.mark.parametrize(
    ("rollout", "key", "says"),
    [
        ("{id: r, candidate: 8}", "", "neither a weight nor steps"),
        ("{id: r, candidate: 8, weight: 1%, cooldown: 1m}", ".cooldown", "needs steps"),
        ("{id: r, candidate: 8, weight: 1%, steps: [{weight: 5%, approve: true}]}", ".weight", "either weight"),
        ("{id: r, candidate: 8, steps: [{weight: 5%}], gates: {e: {event: error, max_rate: 1%}}}", ".steps[0].certify",
         "silence advances nothing"),
        ("{id: r, candidate: 8, steps: [{weight: 5%, approve: true}], gates: {e: {event: error}}}", ".gates.e",
         "exactly one of worse_than, max_rate"),
        ("{id: r, candidate: 8, steps: [{weight: 5%, approve: true}], gates: {e: {monitor: psi, max_rate: 1%}}}",
         ".gates.e.max_rate", "means nothing"),
        ("{id: r, candidate: 8, steps: [{weight: 5%, approve: true}], gates: {e: {feedback: error, max_rate: 1%}}}",
         ".gates.e.feedback", "names an event"),
        ("{id: r, candidate: 8, steps: [{weight: 5%, approve: true}]}", ".gates", "at least one gate that rolls back"),
        ("{id: r, candidate: 'm@champion', steps: [{weight: 5%, approve: true}], gates: {e: {alpha: 0.1}}}",
         ".candidate", "aliases need a model of the registry"),
    ],
)  # fmt: skip
def test_mistakes(rollout: str, key: str, says: str) -> None:
    assert says in mistakes(f"    rollout: {rollout}\n")[key]


def test_the_fingerprint_follows_the_section_and_nothing_else() -> None:
    same = template(FULL + "    resilience: {timeout: 1s}\n")
    assert same.fingerprint() == template().fingerprint()
    for old, new in (
        ("worse_than: 1.2", "worse_than: 1.3"),
        ("m-8", "m-9"),
        ("[1, 8]", "[1]"),
        ("pairs: 100", "pairs: 99"),
    ):
        assert template(FULL.replace(old, new)).fingerprint() != template().fingerprint(), old


def test_a_course_sets_stable_and_share() -> None:
    spec = compile_routing(parsed(FULL))["m"]
    assert spec.routes.split is not None
    assert spec.routes.split.arms[0].weight == 0
    climbing = steered(spec, Steering("8", weight=2500, salt="m-8"))
    assert climbing.routes.split is not None
    assert (climbing.routes.split.arms[0].weight, climbing.stable) == (2500, Reference("m", "7"))
    promoted = steered(spec, Steering("8", stable="8"))
    assert (promoted.routes.split, promoted.stable) == (None, Reference("m", "8"))
