"""Where a version is that another server has: plain values, for the configuration and for who connects."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit

from server.errors import ConfigError


@dataclass(slots=True, frozen=True)
class UpstreamOptions:
    """Where a version is served, by the operator's configuration. ConfigError for an address that cannot be one.

    ``url``: scheme, host, port and perhaps a path prefix. ``model``, ``version``: the upstream's names for it ("": the
    load request's name, and the version that the upstream chooses). ``timeout_s`` bounds one whole exchange.
    ``max_batch_rows``: at most so many rows in one request (0: what the upstream takes). ``headers`` are sent along.
    ``ca_file``: PEM file of the authorities trusted for https ("": the system's).
    """

    url: str
    model: str = ""
    version: str = ""
    connect_timeout_s: float = 2.0
    timeout_s: float = 30.0
    hold_off_s: float = 0.25
    max_response_bytes: int = 256 * 1024 * 1024
    max_batch_rows: int = 0
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    ca_file: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or not _has_port_or_default(self.url):
            raise ConfigError(f"an upstream's address must be http://HOST:PORT or https://HOST:PORT, got '{self.url}'")
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError("an upstream's address must not hold a user, a query or a fragment; use headers")


def _has_port_or_default(url: str) -> bool:
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False
