"""What a sink is: somewhere events are sent, one at a time, with an outcome for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from server.outbox import Message


@dataclass(slots=True, frozen=True)
class Delivered:
    """The receiver has it."""


@dataclass(slots=True, frozen=True)
class Failed:
    """It may work later. ``reason`` is shown to operators and holds no secret; ``retry_after_s`` is what was asked."""

    reason: str
    retry_after_s: float | None = None


@dataclass(slots=True, frozen=True)
class Refused:
    """It will never work: no further attempt is made."""

    reason: str


Outcome: TypeAlias = Delivered | Failed | Refused


class Sink(Protocol):
    """Where events go. Called from several threads at once.

    An event may come again after it was sent, with the same id and key: nobody can know that an answer was lost.
    """

    @property
    def name(self) -> str:
        """Its name in the configuration, which stays the same over restarts: deliveries are kept by it."""
        ...

    @property
    def timeout_s(self) -> float:
        """``send`` takes no longer than about this; a lease lasts that long and some more."""
        ...

    def send(self, message: Message) -> Outcome:
        """Send it and wait for the outcome. Raises nothing: what goes wrong is an outcome."""
        ...
