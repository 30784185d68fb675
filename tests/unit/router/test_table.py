"""router.table: resolution, errors, and that a table never changes."""

from __future__ import annotations

import pytest

from router.errors import BadVersion, UnknownModel, UnknownVersion
from router.table import RoutingTable, is_version
from router.types import ModelRoutes, RouteQuery


def query(model: str, version: str = "") -> RouteQuery:
    return RouteQuery(model, version, {}, {}, "")


@pytest.fixture
def table() -> RoutingTable[str]:
    return RoutingTable({"m": ModelRoutes({"1": "one", "10": "ten", "9": "nine"}, "9")}, 4)


def test_unversioned_requests_go_to_stable(table: RoutingTable[str]) -> None:
    decision = table.resolve(query("m"))
    assert (decision.target, decision.version, decision.arm, decision.generation) == ("nine", "9", "stable", 4)


def test_a_named_version_is_pinned(table: RoutingTable[str]) -> None:
    decision = table.resolve(query("m", "10"))
    assert (decision.target, decision.arm, decision.reason) == ("ten", "pinned", "version")


def test_errors_name_what_was_asked(table: RoutingTable[str]) -> None:
    with pytest.raises(UnknownModel):
        table.resolve(query("other"))
    with pytest.raises(UnknownVersion) as caught:
        table.resolve(query("m", "2"))
    assert caught.value.served == ("1", "9", "10")
    for text in ("x", "-1", "01", "1.0", " 1", "9" * 19, "²"):
        with pytest.raises(BadVersion):
            table.resolve(query("m", text))


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
