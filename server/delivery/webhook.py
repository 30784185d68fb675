"""The sink that posts signed webhooks in the layout of https://www.standardwebhooks.com.

How it gets there is ``exchange``'s. Redirects are failures. Of the answer only the status and
``Retry-After`` count. 2xx: delivered. 410: the receiver wants no more, dead at once. Anything else is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from server.delivery.base import Delivered, Failed, Outcome, Refused
from server.delivery.exchange import Answer, Exchange, ExchangeFailed, seconds
from server.delivery.options import WebhookOptions
from server.delivery.signature import signature
from server.outbox import Message

_GONE: Final = 410


class WebhookSink:
    """One receiver. Raises ConfigError when its file of authorities cannot be used."""

    def __init__(self, name: str, options: WebhookOptions, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.timeout_s = options.timeout_s
        self._options = options
        self._clock = clock
        self._exchange = Exchange(options.endpoint)

    def send(self, message: Message) -> Outcome:
        """One exchange, within ``timeout_s`` but for the look-up of the name, which the system bounds."""
        deadline = time.monotonic() + self.timeout_s
        try:
            answer = self._exchange.post(self._exchange.target, message.body, self._headers(message), deadline)
        except ExchangeFailed as error:
            return Failed(str(error))
        return _outcome(answer, self._clock())

    def _headers(self, message: Message) -> dict[str, str]:
        timestamp_s = int(self._clock())
        return {
            "Content-Type": "application/cloudevents+json; charset=utf-8",
            "Idempotency-Key": message.key,
            "webhook-id": message.id,
            "webhook-timestamp": str(timestamp_s),
            "webhook-signature": signature(self._options.secrets, message.id, timestamp_s, message.body),
        }


def _outcome(answer: Answer, now: float) -> Outcome:
    status = answer.status
    if 200 <= status < 300:
        return Delivered()
    if status == _GONE:
        return Refused("answered 410: the receiver wants no more events")
    if 300 <= status < 400:
        return Failed(f"answered {status}: redirects are not followed")
    return Failed(f"answered {status}", seconds(answer.retry_after, now))
