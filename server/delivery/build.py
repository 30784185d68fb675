"""The sinks that settings ask for."""

from __future__ import annotations

from collections.abc import Mapping

from server.delivery.base import Sink
from server.delivery.logged import LogSink
from server.delivery.options import SinkOptions, WebhookOptions
from server.delivery.webhook import WebhookSink


def make_sinks(sinks: Mapping[str, SinkOptions]) -> tuple[Sink, ...]:
    """One sink for each name. Raises ConfigError for files that cannot be used."""
    return tuple(_sink(name, options) for name, options in sinks.items())


def _sink(name: str, options: SinkOptions) -> Sink:
    return WebhookSink(name, options) if isinstance(options, WebhookOptions) else LogSink(name, options.level)
