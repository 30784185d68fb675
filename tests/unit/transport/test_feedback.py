"""server.transport.feedback: what is taken, and every refusal names the item and the key."""

from __future__ import annotations

import pytest

from server.errors import InvalidArgument
from server.transport.feedback import MAX_ITEMS, Feedback, parse


def test_one_and_many() -> None:
    assert parse({"id": "a", "outcome": 1}) == [Feedback("a", "", "", 1.0)]
    assert parse([{"key": "u", "outcome": "yes", "name": "click"}, {"id": "b", "outcome": "0.5", "row": 2}]) == [
        Feedback("", "u", "click", 1.0, "yes"),
        Feedback("b", "", "", 0.5, "0.5", 2),
    ]
    assert parse({"id": "a", "outcome": "setosa"}) == [Feedback("a", "", "", None, "setosa")]
    assert parse([]) == []
    assert parse({"id": "a", "outcome": True}) == [Feedback("a", "", "", 1.0, "true")]  # may be a class of that name
    assert parse({"id": "a", "outcome": False, "time": "2026-01-02T03:04:05Z"})[0].value == 0.0


@pytest.mark.parametrize("text", ["nan", "-inf", "Infinity", "1e999", "1_0", "0x1", "setosa"])
def test_text_that_is_no_finite_number_may_only_be_a_class(text: str) -> None:
    assert parse({"id": "a", "outcome": text}) == [Feedback("a", "", "", None, text)]


@pytest.mark.parametrize(("text", "number"), [("1", 1.0), (" -2.5e3 ", -2500.0), ("YES", 1.0), ("false", 0.0)])
def test_numbers_as_text(text: str, number: float) -> None:
    assert parse({"id": "a", "outcome": text})[0].value == number


@pytest.mark.parametrize(
    ("time", "wanted"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("2026-01-02T03:04:05.678901+02:00", 1_767_315_845_678_901_000),
        ("1969-12-31T23:59:59.999999-00:00", -1000),
        ("9999-12-31T23:59:59Z", 253_402_300_799 * 10**9),
    ],
)
def test_when_an_outcome_was(time: str, wanted: int) -> None:
    assert parse({"id": "a", "outcome": 1, "time": time})[0].time_ns == wanted


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (3, "must be an object, got 3"),
        ({"outcome": 1}, "'id' or 'key'"),
        ({"id": "a"}, "'outcome' must be a number or text"),
        ({"id": "a", "outcome": ""}, "got an empty text"),
        ({"id": "a", "outcome": "x" * 4097}, "'outcome' must be text of at most 4096"),
        ({"id": "a", "outcome": float("inf")}, "'outcome' must be a finite number, got inf"),
        ({"id": "a", "outcome": float("nan")}, "'outcome' must be a finite number, got nan"),
        ({"id": "a", "outcome": [1]}, "got a list"),
        ({"id": "a"}, "got nothing"),
        ({"id": "a", "outcome": {"v": 1}}, "got an object"),
        ({"id": 1, "outcome": 1}, "'id' must be text, got 1"),
        ({"id": "x" * 4097, "outcome": 1}, "'id' must be text of at most 4096 characters, got 4097"),
        ({"id": "a", "outcome": 1, "row": -1}, "'row' must be a whole number of 0 or more, got -1"),
        ({"id": "a", "outcome": 1, "row": True}, "'row' .*got true"),
        ({"id": "a", "outcome": 1, "row": "1"}, "'row' .*got '1'"),
        ({"id": "a", "outcome": 1, "time": "soon"}, "RFC 3339 with its offset, .*got 'soon'"),
        ({"id": "a", "outcome": 1, "time": "2026-01-02T03:04:05"}, "with its offset"),
        ({"id": "a", "outcome": 1, "time": 5}, "RFC 3339 with its offset, .*got 5"),
        ({"id": "a", "outcome": 1, "time": None}, "RFC 3339 with its offset, .*got nothing"),
        ({"id": "a", "outcome": 1, "time": None}, "with its offset"),
        ({"id": "a", "outcome": 1, "more": 1}, "unknown key 'more'"),
        ([{"id": "a", "outcome": 1}, {"id": "a"}], "item 1: 'outcome'"),
        ({"id": "a", "outcome": 10**400}, "out of range"),
        ([{}] * (MAX_ITEMS + 1), "at most"),
    ],
)
def test_refusals(document: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse(document)
