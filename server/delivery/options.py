"""What the configuration says of sinks and of the outbox: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

from server.delivery.airflow import AirflowOptions
from server.delivery.backoff import RetryPolicy
from server.delivery.command import CommandOptions
from server.delivery.exchange import Endpoint
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
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
        if not 1 <= len(self.secrets) <= 2:
            raise ConfigError(f"a webhook has one signing secret, or two while they change, got {len(self.secrets)}")
        _ = self.endpoint

    @property
    def endpoint(self) -> Endpoint:
        """Where it is. Raises ConfigError."""
        return Endpoint(self.url, self.allow, self.timeout_s, self.ca_file)


SinkOptions: TypeAlias = LogOptions | WebhookOptions | CommandOptions | AirflowOptions
#: Sinks that start a training: an alarm alone is no reason for one.
TRAINING: Final = (CommandOptions, AirflowOptions)


@dataclass(slots=True, frozen=True)
class DeliverySettings:
    """Where events go, how long they wait, and how often they are tried. By default they are logged."""

    sinks: Mapping[str, SinkOptions] = field(default_factory=lambda: MappingProxyType({"log": LogOptions()}))
    limits: Limits = field(default_factory=Limits)
    retry: RetryPolicy = field(default_factory=RetryPolicy)
