"""Rules of columns: what violates them, what a request is told, and rules that cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from monitor.errors import SettingsError
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.schema import SchemaCheck, compile_rules, marks
from monitor.types import ColumnRule


@dataclass
class Tensor:
    name: str
    datatype: str
    data: Any


PROFILE = ReferenceProfile.from_arrays(
    {
        "x": np.random.default_rng(0).random((500, 3)).astype("f4"),
        "word": np.array([b"red", b"green", b"", b"blue"] * 125, object),
        "level": np.array([1, 2, 3, 4, 5] * 100),
        "half": np.linspace(0, 1, 500).astype("f2"),
        "flag": np.array([True, False] * 250),
    },
    {"y": np.linspace(0, 1, 500)},
    names={"x": ["age", "weight", "height"]},
)
LAYOUT = Layout(PROFILE)


def reject(*rules: ColumnRule) -> SchemaCheck:
    return SchemaCheck(rules, LAYOUT)


def x(*rows: tuple[float, float, float]) -> Tensor:
    return Tensor("x", "FP32", np.array(rows, "f4").tobytes())


def rule(column: str, **given: Any) -> ColumnRule:
    return ColumnRule(column, action="reject", **given)


@pytest.mark.parametrize(
    ("rules", "tensor", "message"),
    [
        (
            (rule("weight", min=0), rule("age", max=150)),
            x((1, 2, 3), (1, -4, 3), (200, -5, 3)),
            "column 'weight' (input 'x', element 1): rule min: wanted at least 0, got -4 in row 1 (2 of 3 rows)",
        ),
        (
            (rule("age", max=150),),
            x((float("inf"), 0, 0)),
            "column 'age' (input 'x', element 0): rule max: wanted at most 150, got inf in row 0 (1 of 1 rows)",
        ),
        (
            (rule("height", finite=True),),
            x((0, 0, float("nan"))),
            (
                "column 'height' (input 'x', element 2): rule finite: wanted a finite number, got nan in row 0 "
                "(1 of 1 rows)"
            ),
        ),
        (
            (rule("age", missing=0.3, min=0),),
            x((float("nan"), 0, 0), (1, 0, 0)),
            (
                "column 'age' (input 'x', element 0): rule missing: wanted at most 0.3 of the rows missing, got 1 of 2 "
                "rows missing"
            ),
        ),
        (
            (rule("word", range="profile"),),
            Tensor("word", "BYTES", [b"red", b"pink", b""]),
            (
                "column 'word' (input 'word'): rule categories: wanted one of 'blue', 'green', 'red', got 'pink' in "
                "row 1 (1 of 3 rows)"
            ),
        ),
        (
            (rule("word", missing=0.0),),
            Tensor("word", "BYTES", [b"red", b""]),
            "column 'word' (input 'word'): rule missing: wanted at most 0 of the rows missing, got 1 of 2 rows missing",
        ),
        (
            (rule("level", range="profile"),),
            Tensor("level", "INT64", np.array([3, 6]).tobytes()),
            "column 'level' (input 'level'): rule max: wanted at most 5, got 6 in row 1 (1 of 2 rows)",
        ),
        (
            (rule("level", min=3.5),),
            Tensor("level", "INT64", np.array([4, 3]).tobytes()),
            "column 'level' (input 'level'): rule min: wanted at least 3.5, got 3 in row 1 (1 of 2 rows)",
        ),
        (
            (rule("level", categories=(1, 2, 4)),),
            Tensor("level", "INT64", np.array([4, 3]).tobytes()),
            "column 'level' (input 'level'): rule categories: wanted one of 1, 2, 4, got 3 in row 1 (1 of 2 rows)",
        ),
        (
            (rule("age", min=0),),
            Tensor("x", "FP64", np.zeros(3).tobytes()),
            "input 'x': the schema is of datatype FP32, got FP64",
        ),
        ((rule("age", min=0),), Tensor("x", "FP32", bytes(16)), "input 'x': wanted 3 elements per row, got 4 elements"),
        (
            (rule("age", missing=0.5),),
            Tensor("other", "FP32", b""),
            (
                "column 'age' (input 'x', element 0): rule missing: wanted at most 0.5 of the rows missing, got no "
                "such input"
            ),
        ),
    ],
)
def test_a_request_is_told_column_rule_wanted_and_got(
    rules: tuple[ColumnRule, ...], tensor: Tensor, message: str
) -> None:
    assert reject(*rules).check([tensor]) == message


@pytest.mark.parametrize(
    ("rules", "tensors"),
    [
        ((rule("age", min=0.1, max=0.1),), [x((0.1, -9, -9))]),  # limits are cast to FP32
        ((rule("half", max=0.1),), [Tensor("half", "FP16", np.array([0.1], "f2").tobytes())]),
        ((rule("age", min=0, max=1),), [x((float("nan"), 5, 5))]),  # missing values have a rule of their own
        ((rule("age", missing=0.5),), [x((float("nan"), 0, 0), (1, 0, 0))]),
        ((rule("word", categories=("red",)),), [Tensor("word", "BYTES", [b"", b"red"])]),
        ((rule("age", min=0),), []),  # an optional input that is absent
        ((rule("age", min=0),), [x()]),
        ((rule("flag", range="profile"),), [Tensor("flag", "BOOL", b"\0\1")]),
        ((rule("age", range="profile"),), [x((float(PROFILE.columns[0].knots[-1]), 7, 7))]),
        ((ColumnRule("age", min=5),), [x((1, 1, 1))]),  # counted, not rejected
    ],
)
def test_what_the_rules_allow(rules: tuple[ColumnRule, ...], tensors: list[Tensor]) -> None:
    assert reject(*rules).check(tensors) is None


def test_whether_there_is_anything_to_check() -> None:
    assert not reject(ColumnRule("age", min=0))
    assert reject(rule("age", min=0))


@pytest.mark.parametrize("seed", range(5))
def test_a_request_is_refused_exactly_when_some_row_is_marked(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rules = [{"column": "age", "min": 0.2, "max": 0.9}, {"column": "height", "max": 0.5, "finite": True}]
    check = reject(*[ColumnRule(action="reject", **given) for given in rules])
    counted = compile_rules([ColumnRule(**given) for given in rules], LAYOUT, "count")
    verdicts = set()
    for _ in range(200):
        rows = rng.choice([0.1, 0.2, 0.4, 0.5, 0.8, np.nan, np.inf], (2, 3), p=[0.04, 0.3, 0.3, 0.3, 0.02, 0.02, 0.02])
        raw = rows.astype("f4").tobytes()
        block = LAYOUT.read([[raw], None, None, None, None, None], 2)
        assert block is not None
        refused = check.check([Tensor("x", "FP32", raw)]) is not None
        assert refused == marks(counted, block).any()
        verdicts.add(refused)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: [ColumnRule("shoe", min=0)], "no column 'shoe'; there are age, weight"),
        (lambda: [ColumnRule("age")], "rule of 'age' demands nothing"),
        (lambda: [ColumnRule("word", min=0)], "rule of 'word': strings have no min"),
        (lambda: [ColumnRule("word", categories=(1,))], "categories must fit BYTES"),
        (lambda: [ColumnRule("age", categories=("a",))], "categories must fit FP32"),
        (lambda: [ColumnRule("age", min=float("nan"))], "NaN is no limit"),
        (lambda: [ColumnRule("age", min=0), ColumnRule("age", min=1)], "column 'age' has the rule min twice"),
        (lambda: [ColumnRule("age", min=2, max=1)], "wanted min <= max, got 2 and 1"),
        (lambda: [ColumnRule("age", missing=1.5)], "missing must be a share in 0..1, got 1.5"),
    ],
)
def test_rules_that_cannot_be(wrong: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
        compile_rules(wrong(), LAYOUT, "count")


def test_outputs_are_counted_but_not_rejected() -> None:
    assert [check.name for check in compile_rules([ColumnRule("y", max=1)], LAYOUT, "count")] == ["max"]
    with pytest.raises(SettingsError, match="an output cannot be rejected"):
        reject(rule("y", max=1))
