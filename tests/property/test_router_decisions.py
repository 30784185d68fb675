"""Decisions against a twin that walks the configuration with fractions, and explanations against decisions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from router.decision import RouteQuery
from router.errors import KeyMissing, UnknownVersion
from router.policy.base import SPACE
from router.policy.sticky import position, redraw, seed_of
from router.table import RoutingTable
from router.types import (
    Arm,
    Destination,
    ExperimentSplit,
    KeySpec,
    Match,
    ModelRoutes,
    RolloutSplit,
    Rule,
    ShadowRoute,
    ValueTest,
)
from tests.support.routes import ask, routes, to

VALUES = st.sampled_from(["", "a", "ab", "b", "1", "true"])
TESTS = st.one_of(
    st.frozensets(VALUES, min_size=1, max_size=3).map(lambda values: ValueTest(one_of=values)),
    st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=2).map(lambda p: ValueTest(prefixes=tuple(p))),
    st.just(ValueTest(present=True)),
)
NAMES = st.sampled_from(["x-a", "x-b", "x-user"])
VERSION_TESTS = st.none() | st.sampled_from([ValueTest(present=True), ValueTest(frozenset({"3", "42"}))])


@st.composite
def splits(draw: st.DrawFn) -> RolloutSplit[str] | ExperimentSplit[str] | None:
    """Weights in steps of 5 %, so that every edge is a small fraction that the twin holds exactly."""
    kind = draw(st.sampled_from(["none", "rollout", "experiment"]))
    if kind == "none":
        return None
    count = draw(st.sampled_from([1, 2, 4]))
    most = 10_000 // count // 500
    if kind == "rollout":
        weights = [500 * draw(st.integers(0, most)) for _ in range(count)]
        return RolloutSplit("r", tuple(Arm(f"a{n}", to(str(n)), w) for n, w in enumerate(weights, 2)), b"s")
    arms = tuple(Arm(f"a{n}", to(str(n), "n"), 10_000 // count) for n in range(1, count + 1))
    return ExperimentSplit("e", arms, 1_000 * draw(st.integers(0, 10)))


@st.composite
def all_routes(draw: st.DrawFn) -> ModelRoutes[str]:
    split = draw(splits())
    ends = [to("7"), to("4", "n"), "stable", *([arm.name for arm in split.arms] if split else [])]
    rules = []
    for number in range(draw(st.integers(0, 3))):
        version = draw(VERSION_TESTS)
        header = draw(st.dictionaries(NAMES, TESTS, max_size=2))
        parameter = draw(st.dictionaries(st.sampled_from(["p", "q"]), TESTS, max_size=2))
        tenant = draw(st.none() | TESTS) if header or parameter or version else draw(TESTS)
        more: list[Any] = ["requested"] if version else []
        end = draw(st.sampled_from([*ends, *more]))
        rules.append(Rule(f"rule {number}", Match(header, parameter, tenant, version), end))
    sources = draw(st.lists(st.sampled_from(["header:x-user", "parameter:p", "request:id"]), max_size=3, unique=True))
    missing = draw(st.sampled_from(["random", "stable", "reject"] if sources else ["random", "stable"]))
    shadows = tuple(ShadowRoute(f"s{n}", to(str(n)), draw(st.sampled_from([0, 2_500, 10_000]))) for n in (2, 9))
    return routes(
        rules=tuple(rules), tenant_header="x-t", key=KeySpec(tuple(sources), missing), split=split, shadows=shadows
    )


QUERIES = st.builds(
    lambda version, headers, parameters, request_id: ask(
        version=version, headers=headers, parameters=parameters, request_id=request_id
    ),
    st.sampled_from(["", "", "", "1", "3", "42"]),
    st.dictionaries(st.sampled_from(["x-a", "x-b", "x-t", "x-user"]), VALUES | st.text(max_size=5)),
    st.dictionaries(st.sampled_from(["p", "q"]), VALUES | st.booleans() | st.integers(0, 2)),
    st.sampled_from(["", "r1", "r2"]),
)
DRAWS = st.integers(0, SPACE - 1)


# --- the twin ---


def text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def passes(test: ValueTest, value: object) -> bool:
    if value is None:
        return False
    return test.present or text(value) in test.one_of or any(text(value).startswith(prefix) for prefix in test.prefixes)


def matches(match: Match, query: RouteQuery) -> bool:
    if bool(query.version) != (match.version is not None):
        return False
    wanted: list[tuple[ValueTest, Any]] = [(test, query.metadata.get(name)) for name, test in match.header.items()]
    wanted += [(test, query.parameters.get(name)) for name, test in match.parameter.items()]
    wanted += [(match.tenant, query.metadata.get("x-t"))] if match.tenant else []
    wanted += [(match.version, query.version)] if match.version else []
    return all(passes(test, value) for test, value in wanted)


def key_of(spec: KeySpec, query: RouteQuery) -> str:
    places = {
        "header:x-user": query.metadata.get("x-user"),
        "parameter:p": query.parameters.get("p"),
        "request:id": query.request_id,
    }
    found = [text(places[source]) for source in spec.sources if places[source] not in (None, "")]
    return found[0] if found else ""


def arm_at(split: RolloutSplit[str] | ExperimentSplit[str], place: Fraction) -> str:
    start = Fraction(0)
    for index, arm in enumerate(split.arms):
        weight = Fraction(arm.weight, 10_000)
        if isinstance(split, RolloutSplit):
            start, width = Fraction(index, len(split.arms)), weight
        else:
            width = weight * split.coverage / 10_000
        if start <= place < start + width:
            return arm.name
        start += weight
    return "stable"


def served(config: ModelRoutes[str], end: Any, version: str) -> tuple[str, str, str]:
    """(arm, model, version) of where a rule or an arm leads."""
    if isinstance(end, Destination):
        return "pinned", end.model, end.version
    if end == "requested":
        return "pinned", "m", version
    arms = {arm.name: arm.to for arm in config.split.arms} if config.split else {}
    return (end, arms[end].model, arms[end].version) if end in arms else ("stable", "m", config.stable)


def twin(config: ModelRoutes[str], query: RouteQuery, draw: int) -> Any:
    """(arm, model, version, reason, counted, shadows), or the error's class."""
    for rule in config.rules:
        if matches(rule.match, query):
            end = served(config, rule.to, query.version)
            if rule.to == "requested" and query.version not in config.versions:
                return UnknownVersion
            return (*end, rule.name, False, [])
    if query.version:
        known = query.version in config.versions
        return ("pinned", "m", query.version, "version", False, []) if known else UnknownVersion
    arm, reason, counted = "stable", "default", True
    if config.split is not None:
        key, split, reason = key_of(config.key, query), config.split, "split"
        if key:
            secret = split.secret
            arm = arm_at(split, Fraction(position(key, seed_of(split.id, secret)), SPACE))
        elif config.key.missing == "random":
            arm = arm_at(split, Fraction(draw, SPACE))
        elif config.key.missing == "reject":
            return KeyMissing
        else:
            reason, counted = "keyless", False
    end = served(config, arm, "")
    shadows = [
        shadow.id
        for shadow in config.shadows
        if Fraction(redraw(draw, seed_of(shadow.id)), SPACE) < Fraction(shadow.sample, 10_000)
        and (shadow.to.model, shadow.to.version) != end[1:]
    ]
    return (*end, reason, counted, shadows)


def decided(table: RoutingTable[str], query: RouteQuery, draw: int) -> Any:
    try:
        decision = table.resolve(query, draw)
    except (UnknownVersion, KeyMissing) as error:
        return type(error)
    shadows = [shadow.id for shadow in decision.shadows]
    assert decision.target == f"{decision.model}:{decision.version}"
    return decision.arm, decision.model, decision.version, decision.reason, decision.counted, shadows


@given(all_routes(), QUERIES, DRAWS)
@example(routes(split=RolloutSplit("r", (Arm("a2", to("2"), 10_000),))), ask(), SPACE - 1)
def test_decisions_are_those_of_the_twin(config: ModelRoutes[str], query: RouteQuery, draw: int) -> None:
    assert decided(RoutingTable({"m": config}, 1), query, draw) == twin(config, query, draw)


@given(all_routes(), QUERIES, DRAWS)
def test_explanations_conclude_what_was_decided(config: ModelRoutes[str], query: RouteQuery, draw: int) -> None:
    table = RoutingTable({"m": config}, 1)
    wanted = decided(table, query, draw)
    if isinstance(wanted, type):
        return
    arm, model, version, *_ = wanted
    conclusions = [line for line in table.explain(query, draw) if line.startswith("->")]
    assert len(conclusions) == 1
    assert conclusions[0].startswith(f"-> {model} version {version} as arm '{arm}' (")
