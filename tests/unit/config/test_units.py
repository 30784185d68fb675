"""Values with units: what is read, what is refused, and that both directions agree."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import units


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("0s", 0),
        ("1ns", 1),
        ("500us", 500_000),
        ("200ms", 200_000_000),
        ("1.5s", 1_500_000_000),
        ("0.000000001s", 1),
        ("2m", 120_000_000_000),
        ("1h", 3_600_000_000_000),
        ("1d", 86_400_000_000_000),
    ],
)
def test_durations(text: str, nanoseconds: int) -> None:
    assert units.parse_duration(text) == nanoseconds


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0B", 0),
        ("512B", 512),
        ("1kB", 1000),
        ("64KiB", 65_536),
        ("64MiB", 2**26),
        ("1.5GiB", 3 * 2**29),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert units.parse_size(text) == count


@pytest.mark.parametrize(
    ("text", "fraction"), [("0%", 0.0), ("5%", 0.05), ("0.1%", 0.001), ("33.3%", 0.333), ("100%", 1.0)]
)
def test_percentages(text: str, fraction: float) -> None:
    assert units.parse_percent(text) == fraction


@pytest.mark.parametrize("parse", [units.parse_duration, units.parse_size, units.parse_percent])
@pytest.mark.parametrize(
    "value",
    ["", "5", 5, 0.5, True, None, [], {}, "5 s", "-5s", "5S", "5seconds", "5 %", "1e3s", "5KB", "5mb", "5Mi", ".5s",
     "5.s", "+5s", "\u0665s", "5s\n", "1" * 19 + "s", "0x5s", "inf%", "nan%", "101%", "0.5ns", "0.5B", b"5s"],
)  # fmt: skip
def test_other_values_are_refused_with_what_was_wanted_and_got(parse: Callable[[object], Any], value: object) -> None:
    with pytest.raises(ValueError, match=r"^wanted .*, got "):
        parse(value)


@given(st.integers(0, 10**17), st.sampled_from([("us", 10**3), ("ms", 10**6), ("s", 10**9)]))
def test_decimal_places_are_exact(nanoseconds: int, unit: tuple[str, int]) -> None:
    name, scale = unit
    whole, rest = divmod(nanoseconds, scale)
    text = f"{whole}.{rest:0{len(str(scale)) - 1}d}{name}"
    assert units.parse_duration(text) == nanoseconds
    assert re.match(units.DURATION_PATTERN, text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("localhost:65535", ("localhost", 65535)),
        ("my-host.example.org:1", ("my-host.example.org", 1)),
        ("host_with_underscore:1", ("host_with_underscore", 1)),
        ("[::1]:0", ("::1", 0)),
        ("[::]:8000", ("::", 8000)),
        ("[0:0:0:0:0:0:0:1]:8000", ("::1", 8000)),
        ("[fe80::1%eth0]:8000", ("fe80::1%eth0", 8000)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert units.parse_address(text) == address
    assert units.parse_address(units.format_address(address)) == address
    assert re.match(units.ADDRESS_PATTERN, text)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (8000, "got number 8000"),
        (None, "got nothing"),
        ("8000", "has no port"),
        ("localhost", "has no port"),
        (":8000", "names no host"),
        ("localhost:", "port from 0 to 65535"),
        ("localhost:http", "port from 0 to 65535"),
        ("localhost:65536", "port from 0 to 65535"),
        ("localhost:-1", "port from 0 to 65535"),
        ("localhost:\u0668", "port from 0 to 65535"),
        ("localhost: 80", "port from 0 to 65535"),
        ("::1:8000", "in brackets"),
        ("[::1]", "port from 0 to 65535"),
        ("[::1:8000", "in brackets"),
        ("[127.0.0.1]:8000", "no IPv6 address"),
        ("[]:8000", "no IPv6 address"),
        ("1.2.3:80", "no IPv4 address"),
        ("256.0.0.1:80", "no IPv4 address"),
        ("01.2.3.4:80", "no IPv4 address"),
        ("http://localhost:80", "in brackets"),
        ("a b:80", "no host name"),
        ("a..b:80", "no host name"),
        ("-a:80", "no host name"),
        ("a/b:80", "no host name"),
        ("x" * 64 + ":80", "no host name"),
    ],
)
def test_what_is_no_address(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        units.parse_address(value)
    assert str(caught.value).startswith("wanted HOST:PORT, such as 127.0.0.1:8000")


@given(st.text(max_size=40))
def test_no_text_raises_anything_but_value_errors(text: str) -> None:
    for parse in (units.parse_address, units.parse_duration, units.parse_size, units.parse_percent):
        with contextlib.suppress(ValueError):
            parse(text)


def test_long_values_are_shortened_in_messages() -> None:
    assert len(units.show("x" * 10_000)) < 100
    assert units.show(10**500) == "number a very large one"
    assert units.show({"a": 1}) == "a mapping"
    assert units.show(b"x") == "a bytes"
