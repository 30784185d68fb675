"""The table covers every error there is, and its numbers agree with the protocols' own."""

from __future__ import annotations

import http
from collections.abc import Iterator

import grpc
import pytest

import server.capture.formats
import server.errors
import server.store.base
import server.transport.faults
from server.errors import InvalidArgument, ModelNotReady, OutOfMemory, QueueFull, TidegateError, TooManyRequests
from server.transport.status import INTERNAL, SHEDDING, TABLE, StatusTable, safe_text

#: Imported for its classes, which join the tree.
FAULTS = (server.capture.formats, server.transport.faults, server.store.base)


def classes(base: type[TidegateError] = TidegateError) -> Iterator[type[TidegateError]]:
    yield base
    for child in base.__subclasses__():
        yield from classes(child)


def test_every_error_class_has_a_row_and_every_row_a_class() -> None:
    codes = {cls.code for cls in classes() if cls.__module__.startswith("server.")}
    assert codes == set(TABLE)


def test_grpc_numbers_and_names_agree() -> None:
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    assert all(names[status.grpc] == status.grpc_name for status in TABLE.values())


def test_http_numbers_are_errors_that_exist() -> None:
    known = {int(status) for status in http.HTTPStatus} | {499}
    assert all(400 <= status.http < 600 and status.http in known for status in TABLE.values())


def test_unknown_code_is_internal() -> None:
    class Novel(TidegateError):
        code = "novel"

    assert StatusTable().of(Novel("x")) == INTERNAL


def test_shedding_moves_together() -> None:
    usual, other = StatusTable(), StatusTable(shed_as_429=True)
    for cls in (QueueFull, TooManyRequests, server.errors.QueueTimeout):
        assert cls.code in SHEDDING
        assert (usual.of(cls("x")).http, usual.of(cls("x")).grpc_name) == (503, "UNAVAILABLE")
        assert (other.of(cls("x")).http, other.of(cls("x")).grpc_name) == (429, "RESOURCE_EXHAUSTED")
    assert other.of(ModelNotReady("x")).http == 503


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (InvalidArgument("x"), None),
        (QueueFull("x"), 1),
        (QueueFull("x", retry_after_s=0.01), 1),
        (QueueFull("x", retry_after_s=2.01), 3),
        (ModelNotReady("x"), 1),
        (OutOfMemory("x"), 1),
    ],
)
def test_retry_after_is_whole_seconds(error: TidegateError, seconds: int | None) -> None:
    assert StatusTable().retry_after(error) == seconds


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("snow \u2603", "snow \u2603"),
        ("lone \ud800", "lone ?"),
        ("x" * 2048, "x" * 2048),
        ("x" * 2049, "x" * 2045 + "..."),
        ("\u2603" * 1000, "\u2603" * 681 + "..."),
    ],
)
def test_safe_text_is_bounded_utf8(text: str, expected: str) -> None:
    assert safe_text(text) == expected
    assert len(safe_text(text).encode()) <= 2048
