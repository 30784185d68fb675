"""Wrong values at every place of the configuration: an answer in our own words that names the place, and is short."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from server.config.load import parse_config
from server.config.model import Config
from server.config.problems import InvalidConfig, Problem

WRONG: tuple[Any, ...] = (
    [], {}, [[]], {"x": {}}, {"a/b": 1}, {"": 1}, [None], ["a"] * 300,
    "", "x", "é/\U0001f600", "a" * 10_000, "-5%", "1e9%", "999999999999d", "99999999999999999999GiB", "${X}", "file:/",
    "127.0.0.1:99999", "(((((", "25:61 UTC", True, -1, 0, 1, 1.5, 10**30, -(10**30), 1e308,
)  # fmt: skip
MOST_TEXT = 1500


def places(
    kind: Any, path: tuple[str | int, ...] = (), above: tuple[type, ...] = ()
) -> Iterator[tuple[str | int, ...]]:
    """Every place that a file may have a value at: one name for names that may be chosen, one entry of a list."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from places(inside[0], path, above)
    elif origin in {types.UnionType, Union}:
        for one in inside:
            yield from places(one, path, above)
    elif origin is tuple:
        yield (*path, 0)
        yield from places(inside[0], (*path, 0), above)
    elif origin is not None and len(inside) == 2:
        yield (*path, "k1")
        yield from places(inside[1], (*path, "k1"), above)
    elif isinstance(kind, type) and issubclass(kind, BaseModel) and above.count(kind) < 2:
        for name, field in kind.model_fields.items():
            yield (*path, field.alias or name)
            yield from places(field.annotation, (*path, field.alias or name), (*above, kind))


def document(path: tuple[str | int, ...], value: Any) -> str:
    for key in reversed(path):
        value = [value] if isinstance(key, int) else {key: value}
    return yaml.safe_dump({"apiVersion": "tidegate/v1"} | value)


SECTIONS = sorted({str(place[0]) for place in places(Config)})


def problems(text: str, folder: Path) -> tuple[Problem, ...]:
    try:
        parse_config(text, folder=folder, environ={})
    except InvalidConfig as error:
        return tuple(error.problems)
    return ()


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_wrong_values_are_told_by_place(section: str, tmp_path: Path) -> None:
    for path in sorted({place for place in places(Config) if place[0] == section}, key=str):
        for value in WRONG:
            found = problems(document(path, value), tmp_path)
            assert all(problem.key for problem in found), (path, value)
            assert all(len(problem.message) < MOST_TEXT for problem in found), (path, value)
            assert not [problem for problem in found if "Input should" in problem.message], (path, value)
        assert any(problems(document(path, value), tmp_path) for value in WRONG), path
