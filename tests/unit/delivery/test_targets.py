"""Which addresses may be called."""

from __future__ import annotations

import ipaddress

import pytest

from server.delivery.targets import AllowList, literal
from server.errors import ConfigError

PUBLIC = ("93.184.216.34", "2606:2800:220:1::1")
NOT_PUBLIC = (
    "127.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "239.1.1.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff0e::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:a00:1::", "2002:7f00:1::1",
)  # fmt: skip


def refusal(allow: list[str], host: str, address: str) -> str:
    return AllowList.parse(allow).refusal(host, ipaddress.ip_address(address))


@pytest.mark.parametrize("address", PUBLIC)
def test_an_empty_list_admits_public_addresses(address: str) -> None:
    assert refusal([], "hooks.example.com", address) == ""


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_need_a_network_that_holds_them(address: str) -> None:
    assert "not a public address" in refusal([], "hooks.example.com", address)
    assert "not a public address" in refusal(["hooks.example.com", "203.0.113.0/24"], "hooks.example.com", address)


@pytest.mark.parametrize(
    ("entry", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("10.0.0.0/8", "10.200.3.4"),
        ("fc00::/7", "fd00::1"),
        ("10.0.0.0/8", "::ffff:10.1.1.1"),
        ("10.0.0.0/8", "64:ff9b::a00:1"),
    ],
)
def test_a_network_admits_what_it_holds(entry: str, address: str) -> None:
    assert refusal([entry], "inside.example.com", address) == ""


def test_a_list_with_entries_admits_nothing_else() -> None:
    allow = ["hooks.example.com", "*.partner.example", "198.51.100.0/24"]
    assert refusal(allow, "hooks.example.com", PUBLIC[0]) == ""
    assert refusal(allow, "HOOKS.example.com.", PUBLIC[0]) == ""
    assert refusal(allow, "a.b.partner.example", PUBLIC[0]) == ""
    for other in ("example.com", "evilhooks.example.com", "partner.example", "evilpartner.example"):
        assert "is allowed" in refusal(allow, other, PUBLIC[0])
    assert refusal(["10.0.0.0/8"], "hooks.example.com", PUBLIC[0]) != ""


@pytest.mark.parametrize(
    "entry", ["10.0.0.1/8", "10.0.0.0/33", "a b", "*", "*.", "http://x", "1.2.3", "a..b", "", "*.*"]
)
def test_an_entry_that_names_nothing_is_refused(entry: str) -> None:
    with pytest.raises(ConfigError, match="wanted a"):
        AllowList.parse([entry])


def test_an_address_is_told_from_a_name() -> None:
    assert literal("10.0.0.1") == ipaddress.IPv4Address("10.0.0.1")
    assert literal("::1") == ipaddress.IPv6Address("::1")
    assert literal("localhost") is None
