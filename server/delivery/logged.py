"""The sink that needs nobody: each event becomes one line of the log."""

from __future__ import annotations

import json

import structlog

from server.delivery.base import Delivered, Outcome
from server.outbox import Message

log = structlog.get_logger("tidegate.events")


class LogSink:
    """Logs events at ``level``, one of info, warning and error."""

    timeout_s = 1.0

    def __init__(self, name: str, level: str = "warning") -> None:
        self.name = name
        self._level = level

    def send(self, message: Message) -> Outcome:
        """Write the line; the data of the event is in it."""
        event = json.loads(message.body)
        write = getattr(log, self._level)
        write(
            "outbox_event",
            sink=self.name,
            id=message.id,
            type=message.type,
            subject=message.subject,
            time=event["time"],
            idempotency_key=message.key,
            data=event["data"],
        )
        return Delivered()
