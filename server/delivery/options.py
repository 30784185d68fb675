"""What the configuration says of sinks and of the outbox: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from server.delivery.backoff import RetryPolicy
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList, literal
from server.errors import ConfigError
from server.outbox import Limits


@dataclass(slots=True, frozen=True)
class LogOptions:
    """A sink that writes events to the log, at ``level``: info, warning or error."""

    level: str = "warning"


@dataclass(slots=True, frozen=True)
class WebhookOptions:
    """A receiver of signed webhooks. Raises ConfigError for a target that could never be called.

    ``url`` is not shown, as its path may hold a token. ``secrets``: one, or two while a receiver changes over.
    ``timeout_s`` bounds one whole exchange. ``ca_file``: PEM file of the authorities trusted for https ("": the
    system's).
    """

    url: str = field(repr=False)
    secrets: tuple[SigningSecret, ...] = field(repr=False)
    allow: AllowList = field(default_factory=AllowList)
    timeout_s: float = 10.0
    ca_file: str = ""

    def __post_init__(self) -> None:
        host = self.parts.hostname or ""
        if self.parts.scheme not in ("http", "https") or not host or not _has_port_or_default(self.parts):
            raise ConfigError("a webhook's address must be http://HOST or https://HOST, perhaps with port and path")
        if (
            self.parts.username is not None
            or self.parts.fragment
            or not (self.url.isascii() and self.url.isprintable())
        ):
            raise ConfigError("a webhook's address must be ASCII without spaces, a user or a fragment")
        if not 1 <= len(self.secrets) <= 2:
            raise ConfigError(f"a webhook has one signing secret, or two while they change, got {len(self.secrets)}")
        address = literal(host)
        if address is not None and (refusal := self.allow.refusal(host, address)):
            raise ConfigError(f"the webhook's address can never be called: {refusal}")
        if address is None and self.allow.hosts and not self.allow.networks and not self.allow.names(host):
            raise ConfigError(f"the webhook's host {host[:128]} is not among the allowed ones")

    @property
    def parts(self) -> SplitResult:
        """The address in parts."""
        return urlsplit(self.url)


SinkOptions: TypeAlias = LogOptions | WebhookOptions


@dataclass(slots=True, frozen=True)
class DeliverySettings:
    """Where events go, how long they wait, and how often they are tried. By default they are logged."""

    sinks: Mapping[str, SinkOptions] = field(default_factory=lambda: MappingProxyType({"log": LogOptions()}))
    limits: Limits = field(default_factory=Limits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)


def _has_port_or_default(parts: SplitResult) -> bool:
    try:
        return parts.port != 0
    except ValueError:
        return False
