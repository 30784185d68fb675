"""Which hosts events may be sent to, so that no configuration or name server can turn the sender on its own network.

Addresses are checked, not names alone, and the connection goes to an address that was checked: a name that changes its
address between check and use gains nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from server.errors import ConfigError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_HOST: Final = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*\.?", re.ASCII)
#: Of IPv6 addresses that stand for an IPv4 address (RFC 6052), what comes before it.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(slots=True, frozen=True)
class AllowList:
    """Hosts (``hooks.example.com``, ``*.example.com``) and networks (``10.2.0.0/16``, ``127.0.0.1``).

    An empty list admits every public address. A list with entries admits what one of them names. An address that is
    not public (private, loopback, link-local, multicast...) is admitted by a network that holds it and by nothing else.
    """

    hosts: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, entries: Sequence[str]) -> AllowList:
        """The list of what a file says. Raises ConfigError."""
        networks = {entry: _network(entry) for entry in entries}
        hosts = [entry.lower() for entry, network in networks.items() if network is None]
        for host in hosts:
            if not _HOST.fullmatch(host) or len(host) > 253 or re.fullmatch(r"[0-9.]+", host):
                raise ConfigError(
                    f"wanted a host, *.DOMAIN, an address or a network such as 10.2.0.0/16, got {host[:64]!r}"
                )
        return cls(tuple(host.rstrip(".") for host in hosts), tuple(n for n in networks.values() if n is not None))

    def names(self, host: str) -> bool:
        """Whether one of the hosts is this one."""
        host = host.lower().rstrip(".")
        return any(host == known or (known[:2] == "*." and host.endswith(known[1:])) for known in self.hosts)

    def refusal(self, host: str, address: Address) -> str:
        """Why ``address``, which ``host`` stands for, may not be called; "" when it may."""
        meant = [address, *_embedded(address)]
        if any(
            all(one.version == network.version and one in network for one in meant[-1:]) for network in self.networks
        ):
            return ""
        if not all(one.is_global and not one.is_multicast for one in meant):
            return f"{address} is not a public address, and no network that is allowed holds it"
        if (self.hosts or self.networks) and not self.names(host):
            return f"neither {host[:128]} nor {address} is allowed"
        return ""


def literal(host: str) -> Address | None:
    """The address that ``host`` is written as; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        if "/" in entry:
            raise ConfigError(
                f"wanted a network such as 10.2.0.0/16, without bits behind its prefix, got {entry[:64]!r}"
            ) from None
        return None


def _embedded(address: Address) -> list[Address]:
    """The IPv4 address that packets to this IPv6 address may end at."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    if address in _NAT64:
        return [ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)]
    found = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
    return [found] if found else []
