"""Alarms on their way to the outbox: a bounded queue, and a thread that waits for the disk in the place of others.

An alarm becomes ``io.tidegate.alert.KIND.raised`` or ``.cleared``. Its idempotency key is made of the alarm's own, so
an episode is one alert and one end, however often the signal flaps and whoever says so twice. Nothing is lost silently:
what finds no room, or what the outbox does not take in the end, is logged and audited as ``alert.lost``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import structlog

from server.errors import TidegateError
from server.outbox import Event

log: Any = structlog.get_logger("monitor")

_KEY_CHARS: Final = 40
#: Waits between tries to write one alert: a full disk or a full outbox may pass.
_PAUSES_S: Final = (0.2, 1.0, 5.0)

#: ``publish(event)``; False when its key is known. Waits for the disk; raises TidegateError.
Publish: TypeAlias = Callable[[Event], bool]
Audit: TypeAlias = Callable[[str, str, Mapping[str, object]], None]


def alert(event: Mapping[str, Any]) -> Event:
    """The CloudEvent of an alarm's event (``events``). Raises InvalidArgument for what no CloudEvent can be."""
    action = event["event"]
    key = hashlib.sha256(event["key"].encode("utf-8", "surrogatepass")).hexdigest()[:_KEY_CHARS]
    data = {name: value for name, value in event.items() if name != "event"}
    subject = f"{event['model']}:{event['version']}"
    return Event(f"io.tidegate.alert.{action}", f"/models/{event['model']}", subject, f"{action}/{key}", data)


class AlertQueue:
    """Takes alarms without waiting, and has one thread publish them in order.

    At most ``capacity`` wait; one more is lost, and said to be. ``pauses_s``: how long to wait before each further try.
    """

    def __init__(
        self,
        publish: Publish,
        audit: Audit,
        *,
        capacity: int = 1000,
        pauses_s: tuple[float, ...] = _PAUSES_S,
    ) -> None:
        self._publish = publish
        self._audit = audit
        self._capacity = capacity
        self._pauses_s = pauses_s
        self._waiting: deque[dict[str, Any]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        #: Alarms that did not get into the outbox.
        self.lost = 0
        self._thread = threading.Thread(target=self._run, name="tidegate-alerts", daemon=True)
        self._thread.start()

    def put(self, event: dict[str, Any]) -> None:
        """Hand in one alarm's event. Never waits, never raises."""
        with self._changed:
            room = len(self._waiting) < self._capacity and not self._closing
            if room:
                self._waiting.append(event)
                self._changed.notify_all()
        if not room:
            self._lose(event, f"{self._capacity} alerts wait already, or the server is ending")

    def close(self, timeout_s: float = 5.0) -> None:
        """Publish what waits, each tried once more at most; what is left after ``timeout_s`` is lost."""
        until = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, until - time.monotonic()))
        while self._waiting:
            self._lose(self._waiting.popleft(), "the server ended before it was written")

    def _run(self) -> None:
        while (event := self._next()) is not None:
            try:
                self._send(event)
            except Exception as error:  # noqa: BLE001 - the thread's boundary: one alert is lost, and said to be
                self._lose(event, f"{type(error).__name__}: {error}")

    def _next(self) -> dict[str, Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting else None

    def _send(self, event: dict[str, Any]) -> None:
        made = alert(event)
        for pause_s in self._pauses_s:
            try:
                self._write(made, event)
            except TidegateError as error:
                log.warning("alert_not_written", key=event["key"], error=error.message, again_in_s=pause_s)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, pause_s)
            else:
                return
        self._write(made, event)

    def _write(self, made: Event, event: Mapping[str, Any]) -> None:
        if not self._publish(made):
            log.info("alert_known", key=event["key"], type=made.type)

    def _lose(self, event: Mapping[str, Any], reason: str) -> None:
        self.lost += 1
        log.error("alert_lost", key=event["key"], action=event["event"], reason=reason)
        detail = {"key": event["key"], "event": event["event"], "reason": reason}
        self._audit("alert.lost", f"{event['model']}:{event['version']}", detail)
