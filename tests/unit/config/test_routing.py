"""The routing part of the file: its mistakes in their places, what it compiles to, how it is bound, and reload plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from monitor.compare import CompareSpec
from router.breaker import BreakerPolicy
from router.experiment import ExperimentSpec, OutcomeSpec
from router.shadow import ShadowBudget
from router.table import RoutingTable
from router.types import (
    Arm,
    Destination,
    ExperimentSplit,
    KeySpec,
    Match,
    RolloutSplit,
    RouteQuery,
    Rule,
    ShadowRoute,
    ValueTest,
)
from server.config.compile import RegistryVersion, compile_models, compile_versions
from server.config.load import parse_config
from server.config.model import Config
from server.config.plan import ReloadPlan, plan_reload
from server.config.problems import InvalidConfig
from server.config.routing import LATEST, Bound, Reference, RoutingSpec, bind, compile_all, compile_routing

HEAD = "apiVersion: tidegate/v1\n"
TWO = 'versions: {"7": {source: a.onnx}, "8": {source: b.onnx}}'
ROLLOUT = f'{TWO}, stable: "7", key: {{from: [header:u]}}'
PAGE = Path(__file__).parents[3] / "docs" / "routing.md"


def parse(text: str) -> Config:
    return parse_config(HEAD + text, folder=Path("/conf"), environ={"SALT": "s3cret", "FRAUD_SALT": "s"})


def model(section: str, registry: str = "") -> Config:
    return parse(f"{registry}models: {{m: {{{section}}}}}\n")


def spec_of(section: str, registry: str = "") -> RoutingSpec:
    return compile_routing(model(section, registry))["m"]


def said(text: str) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        parse(text)
    return {problem.key: problem.message for problem in caught.value.problems}


def to(version: str, of: str = "m") -> Destination[Reference]:
    return Destination(of, version, Reference(of, version))


# --- mistakes ---------------------------------------------------------------------------------------------------------

BAD = """\
models:
  m:
    versions:
      "7": {source: a.onnx}
      "8": {source: "registry:m"}
      "09": {source: c.onnx}
    version_policy: all
  n:
    source: n.onnx
    versions: {"1": {source: a.onnx}}
    aliases: [m, extra]
    stable: 2
    key: {from: [cookie:x], missing: perhaps}
    rules:
      - {name: split, match: {}, to: requested}
      - {name: a, match: {header: {x: {exact: y, prefix: z}}}, to: "n:"}
      - {name: a, match: {tenant: acme}, to: nowhere}
    experiment: {id: e, arms: {a: {to: 1, share: 60%}, stable: {to: 1, share: 30.005%}}, coverage: 101%}
    shadow: [{to: 1, sample: 5, budget: {rps: 0}}]
    resilience: {retry: {on: [unavailabel]}, breaker: {event: error}}
  o:
    versions: {"1": {source: a.onnx}, "2": {source: b.onnx}}
    aliases: [extra]
    rules:
      - {name: split, match: {}, to: requested}
      - {name: a, match: {tenant: acme}, to: nowhere}
      - {name: a, match: {header: {X-A: 1, x-a: 2}}, to: "p:1"}
    rollout: {id: r, candidate: "2", weight: 101%, secret: hunter2}
  q:
    versions: {"1": {source: a.onnx}, "2": {source: b.onnx}}
    rollout: {id: r, candidate: "2", weight: 50%, steps: []}
    resilience: {breaker: {open_at: 0%}}
  s:
    model: t
    runtime: {instances: 2}
    shadow: [{to: "q:3", sample: 1%}, {to: "q@champion", sample: 1%}, {to: "q:1", sample: 1%}, {to: "q:1", sample: 1%}]
    experiment: {id: e2, arms: {a: {to: "q:1", share: 60%}, b: {to: "s:1", share: 0%}}}
  t: {model: q, key: {missing: reject}}
"""

# (line, column, key, start of the message)
EXPECTED = [
    (6, 21, 'models.m.versions."8".source', "wanted a path, registry:NAME/VERSION or registry:NAME@ALIAS"),
    (7, 7, 'models.m.versions."09"', "wanted a version (a positive integer), got text '09'"),
    (14, 18, "models.n.key.from[0]", None),
    (14, 38, "models.n.key.missing", "wanted 'random', 'stable' or 'reject', got text 'perhaps'"),
]


def problems() -> dict[str, tuple[int, int, str]]:
    with pytest.raises(InvalidConfig) as caught:
        parse(BAD)
    return {problem.key: (problem.line, problem.column, problem.message) for problem in caught.value.problems}


def test_show() -> None:
    for key, (line, column, message) in problems().items():
        print((line, column, key, message))
    assert 0
