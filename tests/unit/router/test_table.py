"""router.table: resolution, errors, and that a table never changes."""

from __future__ import annotations

import pytest

from router.decision import RouteQuery
from router.errors import BadRoutes, BadVersion, UnknownModel, UnknownVersion
from router.table import RoutingTable, is_version
from router.types import Match, ModelRoutes, Rule
from tests.support.routes import one_of, rollout, routes, to


def query(model: str, version: str = "") -> RouteQuery:
    return RouteQuery(model, version, {}, {}, "")


@pytest.fixture
def table() -> RoutingTable[str]:
    return RoutingTable({"m": ModelRoutes({"1": "one", "10": "ten", "9": "nine"}, "9")}, 4)


def test_unversioned_requests_go_to_stable(table: RoutingTable[str]) -> None:
    decision = table.resolve(query("m"), 0)
    assert (decision.target, decision.version, decision.arm, decision.generation) == ("nine", "9", "stable", 4)


def test_a_named_version_is_pinned(table: RoutingTable[str]) -> None:
    decision = table.resolve(query("m", "10"), 0)
    assert (decision.target, decision.arm, decision.reason) == ("ten", "pinned", "version")


def test_errors_name_what_was_asked(table: RoutingTable[str]) -> None:
    with pytest.raises(UnknownModel):
        table.resolve(query("other"), 0)
    with pytest.raises(UnknownVersion) as caught:
        table.resolve(query("m", "2"), 0)
    assert caught.value.served == ("1", "9", "10")
    for text in ("x", "-1", "01", "1.0", " 1", "9" * 19, "²"):
        with pytest.raises(BadVersion):
            table.resolve(query("m", text), 0)


def test_the_next_generation_leaves_this_one_alone(table: RoutingTable[str]) -> None:
    later = table.with_model("n", ModelRoutes({"1": "new"}, "1")).with_model("m", None)
    assert later.generation == 6
    assert set(later.models) == {"n"}
    assert set(table.models) == {"m"}
    with pytest.raises(TypeError):
        table.models["x"] = table.models["m"]  # type: ignore[index]


def test_is_version() -> None:
    assert is_version("1")
    assert is_version("123456789012345678")
    assert not is_version("0")


def test_lookups_route_nothing() -> None:
    table = RoutingTable({"m": routes(split=rollout(10_000))}, 1)
    assert table.resolve(query("m"), 0).target == "m:2"
    assert table.lookup("m", "") == "m:1"
    assert table.lookup("m", "7") == "m:7"
    with pytest.raises(UnknownVersion):
        table.lookup("m", "77")
    with pytest.raises(UnknownModel):
        table.lookup("n", "")


def test_a_check_passes_what_a_rule_may_save() -> None:
    table = RoutingTable({"m": routes(rules=(Rule("old", Match(version=one_of("42")), to("3")),))}, 1)
    table.check("m", "")
    table.check("m", "42")
    with pytest.raises(UnknownVersion):
        table.check("m", "43")
    with pytest.raises(UnknownModel):
        table.check("n", "")


def test_bad_routes_are_refused_and_name_their_model(table: RoutingTable[str]) -> None:
    with pytest.raises(BadRoutes, match="routes of model 'n': stable"):
        table.with_model("n", ModelRoutes({"1": "one"}, "2"))


def test_a_decision_stays_in_the_generation_that_made_it(table: RoutingTable[str]) -> None:
    old = table.with_model("m", routes(split=rollout(10_000)))
    decision = old.resolve(query("m"), 0)
    old.with_model("m", None)
    fallen = decision.fall_back()
    assert fallen is not None
    assert (fallen.generation, fallen.target) == (old.generation, "m:1")


def test_explanations_speak_of_the_model(table: RoutingTable[str]) -> None:
    assert table.explain(query("m"))[0] == "model 'm': stable is m version 9"
    with pytest.raises(UnknownModel):
        table.explain(query("n"))


def test_untouched_models_are_not_compiled_again(table: RoutingTable[str]) -> None:
    assert table.with_model("n", ModelRoutes({"1": "x"}, "1")).compiled("m") is table.compiled("m")
