"""server.gateway.decisions: a sample of the decisions is logged, each with the real probability of its arm."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import structlog

from router.decision import RouteQuery
from router.policy.sticky import position, seed_of
from router.table import RoutingTable
from router.types import Arm, Destination, ExperimentSplit, KeySpec, Match, ModelRoutes, RolloutSplit, Rule, ValueTest
from server.gateway.decisions import DecisionLog

ALL = 10_000
KEY = KeySpec(("header:x-user",))
TO_2 = Destination("m", "2", "two")
ROLLOUT = RolloutSplit("r", (Arm("candidate", TO_2, 1_000, control="control"),))
EXPERIMENT = ExperimentSplit("e", (Arm("a", Destination("m", "1", "one"), 2_500), Arm("b", TO_2, 7_500)), 4_000)


def table(split: Any, key: KeySpec = KEY, rules: tuple[Rule[str], ...] = ()) -> RoutingTable[Any]:
    routes = ModelRoutes({"1": "one", "2": "two"}, "1", key=key, split=split, rules=rules)
    return RoutingTable({"m": routes}, 7)


def logged(routing: RoutingTable[Any], count: int, sample: int = ALL, version: str = "", **more: str) -> list[Any]:
    """The lines of so many requests, each of a user of its own."""
    decisions = DecisionLog(sample)
    with structlog.testing.capture_logs() as lines:
        for n in range(count):
            query = RouteQuery("m", version, {"x-user": f"user-{n}", **more}, {}, "")
            route = routing.resolve(query, (n * 0x9E3779B97F4A7C15) % 2**64)
            decisions.note(route, f"id-{n}", route.key_hash)
    return lines


@pytest.mark.parametrize("key", [KEY, KeySpec()], ids=["by key", "at random"])
@pytest.mark.parametrize(
    ("split", "shares"),
    [
        (ROLLOUT, {"stable": 0.8, "candidate": 0.1, "control": 0.1}),
        (EXPERIMENT, {"stable": 0.6, "a": 0.1, "b": 0.3}),
        (None, {"stable": 1.0}),
    ],
    ids=["rollout", "experiment", "no split"],
)
def test_propensities_are_the_shares_of_the_arms(split: Any, shares: dict[str, float], key: KeySpec) -> None:
    lines = logged(table(split, key), 4000)
    assert len(lines) == 4000
    arms = Counter(line["arm"] for line in lines)
    assert set(arms) == set(shares)
    for line in lines:
        assert line["propensity"] == pytest.approx(shares[line["arm"]])
    for arm, share in shares.items():
        assert arms[arm] / 4000 == pytest.approx(share, abs=0.03)
    # What the estimate of a policy rests on: the inverse propensities of an arm add up to the number of requests.
    for arm in shares:
        total = sum(1 / line["propensity"] for line in lines if line["arm"] == arm)
        assert total == pytest.approx(4000, rel=0.15)


def test_where_nothing_is_drawn_the_propensity_is_one() -> None:
    rule = Rule("testers", Match(header={"x-tester": ValueTest(present=True)}), TO_2)
    (ruled,) = logged(table(ROLLOUT, rules=(rule,)), 1, **{"x-tester": "1"})
    assert (ruled["reason"], ruled["version"], ruled["propensity"]) == ("testers", "2", 1.0)
    (named,) = logged(table(ROLLOUT), 1, version="2")
    assert (named["reason"], named["arm"], named["propensity"]) == ("version", "pinned", 1.0)
    (keyless,) = logged(table(ROLLOUT, KeySpec(("header:x-other",), "stable")), 1)
    assert (keyless["reason"], keyless["arm"], keyless["propensity"]) == ("keyless", "stable", 1.0)


def test_a_line_says_everything_that_an_estimate_needs() -> None:
    (line,) = logged(table(ROLLOUT), 1)
    unit = position("user-0", seed_of("r", b""))
    assert line["event"] == "decision"
    assert (line["model"], line["generation"], line["id"], line["sample"]) == ("m", 7, "id-0", 1.0)
    assert line["unit"] == f"{unit:016x}"


def test_only_the_sample_is_logged() -> None:
    lines = logged(table(ROLLOUT), 5000, sample=1000)
    assert 350 < len(lines) < 650
    assert {line["sample"] for line in lines} == {0.1}
