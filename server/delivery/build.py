"""The sinks that settings ask for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from server.delivery.airflow import AirflowOptions, AirflowSink
from server.delivery.base import Sink
from server.delivery.command import CommandOptions, CommandSink
from server.delivery.logged import LogSink
from server.delivery.options import SinkOptions, WebhookOptions
from server.delivery.webhook import WebhookSink


def make_sinks(sinks: Mapping[str, SinkOptions], folder: Path) -> tuple[Sink, ...]:
    """One sink for each name. ``folder``: where commands leave their traces. Raises ConfigError for unusable files."""
    return tuple(_sink(name, options, folder) for name, options in sinks.items())


def _sink(name: str, options: SinkOptions, folder: Path) -> Sink:
    match options:
        case WebhookOptions():
            return WebhookSink(name, options)
        case CommandOptions():
            return CommandSink(name, options, folder / name)
        case AirflowOptions():
            return AirflowSink(name, options)
        case _:
            return LogSink(name, options.level)
