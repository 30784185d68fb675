"""router.policy.rules: what matches, in which order, and which rules are refused."""

from __future__ import annotations

from typing import Any

import pytest

from router.decision import RouteDecision
from router.errors import BadRoutes
from router.table import RoutingTable
from router.types import Destination, Match, Rule, ValueTest
from tests.support.routes import PRESENT, ask, one_of, rollout, routes, to


def table(*rules: Rule[str], **more: Any) -> RoutingTable[str]:
    return RoutingTable({"m": routes(rules=rules, tenant_header="X-Tenant", split=rollout(5_000), **more)}, 1)


def decide(rules: tuple[Rule[str], ...], query: Any) -> RouteDecision[str]:
    return table(*rules).resolve(query, 0)


MATCHES = [
    (
        Match(header={"X-Canary": one_of("always")}),
        {"headers": {"x-canary": "always"}},
        {"headers": {"x-canary": "no"}},
    ),
    (Match(header={"x-t": one_of("a", "b")}), {"headers": {"x-t": "b"}}, {"headers": {"x-t": "ab"}}),
    (
        Match(header={"x-t": ValueTest(prefixes=("eu-", "us-"))}),
        {"headers": {"x-t": "us-1"}},
        {"headers": {"x-t": "u"}},
    ),
    (Match(header={"x-t": PRESENT}), {"headers": {"x-t": ""}}, {}),
    (Match(parameter={"tier": one_of("1")}), {"parameters": {"tier": 1}}, {"parameters": {"tier": 2}}),
    (Match(parameter={"beta": one_of("true")}), {"parameters": {"beta": True}}, {"parameters": {"beta": False}}),
    (Match(parameter={"beta": one_of("true")}), {"parameters": {"beta": "true"}}, {"headers": {"beta": "true"}}),
    (Match(tenant=one_of("acme")), {"headers": {"x-tenant": "acme"}}, {"headers": {"x-tenant": "Acme"}}),
    (
        Match(header={"a": PRESENT}, parameter={"b": PRESENT}, tenant=one_of("t")),
        {"headers": {"a": "1", "x-tenant": "t"}, "parameters": {"b": 0}},
        {"headers": {"a": "1", "x-tenant": "t"}},
    ),
]


@pytest.mark.parametrize(("match", "good", "bad"), MATCHES)
def test_matches(match: Match, good: dict[str, Any], bad: dict[str, Any]) -> None:
    rules = (Rule("chosen", match, to("7")),)
    assert decide(rules, ask("u", **good)).reason == "chosen"
    assert decide(rules, ask("u", **bad)).reason == "split"


def test_matched_requests_are_not_counted_and_nothing_was_drawn() -> None:
    decision = decide((Rule("chosen", Match(tenant=one_of("acme")), to("7")),), ask("u", headers={"x-tenant": "acme"}))
    assert (decision.version, decision.target, decision.arm) == ("7", "m:7", "pinned")
    assert (decision.counted, decision.propensity, decision.unit, decision.key_hash) == (False, 1.0, "request", 0)
    assert decision.fall_back() is None


def test_the_first_rule_in_order_wins() -> None:
    rules = (Rule("one", Match(header={"a": PRESENT}), to("3")), Rule("two", Match(header={"b": PRESENT}), to("4")))
    assert decide(rules, ask(headers={"a": "", "b": ""})).version == "3"
    assert decide(rules[::-1], ask(headers={"a": "", "b": ""})).version == "4"


def test_a_rule_may_lead_to_an_arm_and_then_has_its_fallback() -> None:
    rules: tuple[Rule[str], ...] = (
        Rule("testers", Match(header={"a": PRESENT}), "a2"),
        Rule("back", Match(header={"b": PRESENT}), "stable"),
    )
    decision = decide(rules, ask(headers={"a": ""}))
    assert (decision.arm, decision.version, decision.propensity, decision.counted) == ("a2", "2", 1.0, False)
    fallen = decision.fall_back()
    assert fallen is not None
    assert (fallen.version, fallen.reason, fallen.counted) == ("1", "fallback", False)
    stable = decide(rules, ask(headers={"b": ""}))
    assert (stable.arm, stable.version, stable.counted) == ("stable", "1", False)


def test_rules_without_a_version_never_see_a_request_that_names_one() -> None:
    decision = decide((Rule("all", Match(header={"a": PRESENT}), to("7")),), ask(version="3", headers={"a": ""}))
    assert (decision.version, decision.reason, decision.arm) == ("3", "version", "pinned")


def test_rules_on_versions() -> None:
    rules: tuple[Rule[str], ...] = (
        Rule("retired", Match(version=one_of("42")), to("7")),
        Rule("guests", Match(version=PRESENT, header={"x-guest": PRESENT}), "stable"),
        Rule("explicit", Match(version=PRESENT), "requested"),
    )
    assert decide(rules, ask(version="42")).target == "m:7"
    assert decide(rules, ask(version="3", headers={"x-guest": ""})).version == "1"
    explicit = decide(rules, ask(version="3"))
    assert (explicit.version, explicit.arm, explicit.reason, explicit.counted) == ("3", "pinned", "explicit", False)
    assert decide(rules, ask("u")).reason == "split"


def test_a_rule_may_lead_to_another_model() -> None:
    rules = (Rule("other", Match(header={"a": PRESENT}), Destination("n", "12", "n:12")),)
    decision = decide(rules, ask(headers={"a": ""}))
    assert (decision.model, decision.version, decision.public_name) == ("n", "12", "m")


BAD: list[tuple[Rule[str], tuple[str | int, ...]]] = [
    (Rule("", Match(tenant=PRESENT), "stable"), ("rules", 0, "name")),
    (Rule("split", Match(tenant=PRESENT), "stable"), ("rules", 0, "name")),
    (Rule("r", Match(), "stable"), ("rules", 0, "match")),
    (Rule("r", Match(header={"h": ValueTest()}), "stable"), ("rules", 0, "match", "header", "h")),
    (
        Rule("r", Match(parameter={"p": ValueTest(frozenset({"a"}), ("b",))}), "stable"),
        ("rules", 0, "match", "parameter", "p"),
    ),
    (Rule("r", Match(tenant=PRESENT), "nobody"), ("rules", 0, "to")),
    (Rule("r", Match(tenant=PRESENT), "requested"), ("rules", 0, "to")),
]


@pytest.mark.parametrize(("rule", "where"), BAD)
def test_rules_that_make_no_sense(rule: Rule[str], where: tuple[str | int, ...]) -> None:
    with pytest.raises(BadRoutes) as caught:
        table(rule)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_tenants_need_their_header_and_names_are_not_taken_twice() -> None:
    rule: Rule[str] = Rule("r", Match(tenant=PRESENT), "stable")
    with pytest.raises(BadRoutes) as caught:
        RoutingTable({"m": routes(rules=(rule, rule))}, 1)
    places = [problem.where for problem in caught.value.problems]
    assert places == [("rules", 0, "match", "tenant"), ("rules", 1, "name"), ("rules", 1, "match", "tenant")]
