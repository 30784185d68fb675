"""Text with units -> plain numbers: "200ms" (ns), "64MiB" (bytes), "5%" (fraction), "127.0.0.1:8000" (host, port).

Every function raises ValueError with a text that says what was wanted and what was got.
"""

from __future__ import annotations

import ipaddress
import re
from fractions import Fraction
from typing import Final

NS_PER_US: Final = 1_000
NS_PER_S: Final = 1_000_000_000

_DURATION_NS: Final = {
    "ns": 1,
    "us": NS_PER_US,
    "ms": 1_000_000,
    "s": NS_PER_S,
    "m": 60 * NS_PER_S,
    "h": 3_600 * NS_PER_S,
    "d": 86_400 * NS_PER_S,
}
_SIZE_BYTES: Final = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_NUMBER: Final = r"([0-9]{1,18}(?:\.[0-9]{1,9})?)"

DURATION_PATTERN: Final = rf"^{_NUMBER}({'|'.join(_DURATION_NS)})$"
SIZE_PATTERN: Final = rf"^{_NUMBER}({'|'.join(_SIZE_BYTES)})$"
PERCENT_PATTERN: Final = rf"^{_NUMBER}%$"
ADDRESS_PATTERN: Final = r"^(\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"

_DURATION: Final = re.compile(DURATION_PATTERN, re.ASCII)
_SIZE: Final = re.compile(SIZE_PATTERN, re.ASCII)
_PERCENT: Final = re.compile(PERCENT_PATTERN, re.ASCII)
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?", re.ASCII)
_PORT: Final = re.compile(r"[0-9]{1,5}", re.ASCII)

_SHOWN: Final = 60


def show(value: object) -> str:
    """How a value is named in an error text: its kind, and its contents when they are short."""
    match value:
        case None:
            return "nothing"
        case bool():
            return f"boolean {str(value).lower()}"
        case int() | float():
            digits = str(value) if abs(value) < 10**_SHOWN else "a very large one"
            return f"number {digits}"
        case str():
            return f"text {_shorten(value)!r}"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return f"a {type(value).__name__}"


def _shorten(text: str) -> str:
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _quantity(value: object, pattern: re.Pattern[str], units: dict[str, int], wanted: str) -> int:
    """``value`` in the base unit as a whole number."""
    found = pattern.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"wanted {wanted}, got {show(value)}")
    exact = Fraction(found[1]) * units[found[2]]
    if exact.denominator != 1:
        raise ValueError(f"wanted {wanted}, got {show(value)}, which is not a whole number of the smallest unit")
    return int(exact)


def parse_duration(value: object) -> int:
    """Nanoseconds of "200ms", "1.5s", "2m"... (units ns, us, ms, s, m, h, d; no bare numbers)."""
    return _quantity(value, _DURATION, _DURATION_NS, "a duration with a unit, such as 200ms, 30s or 5m")


def parse_size(value: object) -> int:
    """Bytes of "64MiB", "1.5GB", "512B"... (no bare numbers)."""
    return _quantity(value, _SIZE, _SIZE_BYTES, "a size with a unit, such as 512B, 64KiB or 64MiB")


def parse_percent(value: object) -> float:
    """The fraction 0..1 of "5%" or "0.1%"."""
    found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"wanted a percentage, such as 5% or 0.1%, got {show(value)}")
    fraction = Fraction(found[1]) / 100
    if fraction > 1:
        raise ValueError(f"wanted a percentage from 0% to 100%, got {show(value)}")
    return float(fraction)


def parse_address(value: object) -> tuple[str, int]:
    """(host, port) of "HOST:PORT". An IPv6 host stands in brackets and comes back without; port 0 means a free one."""
    wanted = "wanted HOST:PORT, such as 127.0.0.1:8000 or [::1]:0"
    if not isinstance(value, str):
        raise ValueError(f"{wanted}, got {show(value)}")
    host, colon, port = value.rpartition(":")
    if not colon:
        raise ValueError(f"{wanted}, got {show(value)}, which has no port")
    if not _PORT.fullmatch(port) or int(port) > 65_535:
        raise ValueError(f"{wanted} with a port from 0 to 65535, got {show(value)}")
    return _parse_host(host, f"{wanted}, got {show(value)}"), int(port)


def _parse_host(host: str, complaint: str) -> str:
    if not host:
        raise ValueError(f"{complaint}, which names no host (0.0.0.0 stands for every IPv4 interface)")
    if host.startswith("[") and host.endswith("]"):
        return _parse_ipv6(host[1:-1], complaint)
    if ":" in host:
        raise ValueError(f"{complaint}: an IPv6 host stands in brackets")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise ValueError(f"{complaint}, which is no IPv4 address") from error
    if len(host) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in host.removesuffix(".").split(".")):
        raise ValueError(f"{complaint}, which is no host name")
    return host


def _parse_ipv6(host: str, complaint: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise ValueError(f"{complaint}, which is no IPv6 address") from error


def format_address(address: tuple[str, int]) -> str:
    """The inverse of ``parse_address``."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
