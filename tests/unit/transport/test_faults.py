"""Checks of names and versions that every protocol shares."""

from __future__ import annotations

import pytest

from server.errors import InvalidArgument
from server.transport.faults import Internal, MethodNotAllowed, check_repository_name, check_version, new_id


@pytest.mark.parametrize("version", ["", "0", "1", "007", "9" * 50])
def test_versions_are_decimal_numbers(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["x", "-1", "+1", "1.0", " 1", "1 ", "\u0663", "1\n", "v1"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(InvalidArgument, match="decimal number"):
        check_version(version)


@pytest.mark.parametrize("name", ["m", "Digits_v2", "a.b-c", "modèle", "x" * 255])
def test_repository_names(name: str) -> None:
    check_repository_name(name)


@pytest.mark.parametrize("name", ["", "x" * 256, ".", "..", ".git", "a/b", "../a", "a\\b", "a\x00", "a\nb", "\u202e"])
def test_names_that_could_leave_the_repository(name: str) -> None:
    with pytest.raises(InvalidArgument, match="model name"):
        check_repository_name(name)


def test_errors_of_transports() -> None:
    assert MethodNotAllowed("PUT", "GET, POST").allowed == "GET, POST"
    assert Internal("abc").message == "internal error, id abc"
    assert len({new_id() for _ in range(100)}) == 100
