"""router.policy.key: where keys come from, and what counts as none."""

from __future__ import annotations

import pytest

from router.policy.key import as_text, compile_sources, extract, problems
from router.types import KeySpec
from tests.support.routes import ask

ALL = KeySpec(("header:X-User", "parameter:user_id", "request:id"))


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (ask("ann", parameters={"user_id": "bob"}, request_id="r"), "ann"),
        (ask(parameters={"user_id": "bob"}, request_id="r"), "bob"),
        (ask(request_id="r"), "r"),
        (ask(headers={"x-user": ""}, parameters={"user_id": ""}, request_id="r"), "r"),
        (ask(parameters={"user_id": 17}), "17"),
        (ask(parameters={"user_id": 0}), "0"),
        (ask(parameters={"user_id": False}), "false"),
        (ask(), ""),
    ],
)
def test_the_first_source_that_holds_something(query: object, key: str) -> None:
    assert extract(compile_sources(ALL), query) == key


def test_parameter_names_keep_their_case_and_header_names_do_not() -> None:
    sources = compile_sources(KeySpec(("parameter:UserId", "header:X-Id")))
    assert extract(sources, ask(parameters={"userid": "no", "UserId": "yes"})) == "yes"
    assert extract(sources, ask(headers={"x-id": "found"})) == "found"


@pytest.mark.parametrize(("value", "text"), [("a", "a"), (True, "true"), (False, "false"), (7, "7"), (0.5, "0.5")])
def test_parameters_as_text(value: bool | int | float | str, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize("source", ["header", "header:", "cookie:x", "request:name", "", "parameter:"])
def test_sources_that_make_no_sense(source: str) -> None:
    (problem,) = problems(KeySpec(("header:x", source)))
    assert problem.where == ("key", "from", 1)
    assert repr(source) in problem.message


def test_missing_must_be_one_of_three_and_reject_needs_a_source() -> None:
    assert [p.where for p in problems(KeySpec(("request:id",), "maybe"))] == [("key", "missing")]
    assert [p.where for p in problems(KeySpec((), "reject"))] == [("key", "missing")]
    assert list(problems(ALL)) == []
