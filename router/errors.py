"""What can go wrong in a routing decision. The caller turns these into its own errors."""

from __future__ import annotations

from dataclasses import dataclass


class RoutingError(Exception):
    """Base of all routing failures."""


class UnknownModel(RoutingError):
    """The table has no such model."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model


class UnknownVersion(RoutingError):
    """The model is there; the version asked for is not served."""

    def __init__(self, model: str, version: str, served: tuple[str, ...]) -> None:
        super().__init__(f"{model}:{version}")
        self.model = model
        self.version = version
        self.served = served


class BadVersion(RoutingError):
    """The version asked for is not a positive integer."""

    def __init__(self, model: str, version: str) -> None:
        super().__init__(f"{model}:{version}")
        self.model = model
        self.version = version


class KeyMissing(RoutingError):
    """The model's split wants a key and the request has none. ``sources`` are the places where it was looked for."""

    def __init__(self, model: str, sources: tuple[str, ...]) -> None:
        super().__init__(f"model '{model}' wants a routing key in one of: {', '.join(sources)}; the request has none")
        self.model = model
        self.sources = sources


@dataclass(slots=True, frozen=True)
class Problem:
    """One mistake in the routes of a model: where in it (keys and indexes), and what was wrong, wanted and got."""

    where: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.where))}: {self.message}"


class BadRoutes(RoutingError):
    """Routes that make no sense; ``problems`` holds every mistake found."""

    def __init__(self, model: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(f"routes of model '{model}': " + "; ".join(map(str, problems)))
        self.model = model
        self.problems = problems


class BadRollout(RoutingError):
    """A rollout's specification that makes no sense; ``problems`` holds every mistake found."""

    def __init__(self, rollout: str, problems: tuple[Problem, ...]) -> None:
        super().__init__(f"rollout '{rollout}': " + "; ".join(map(str, problems)))
        self.rollout = rollout
        self.problems = problems


class RolloutRefused(RoutingError):
    """What was asked of a rollout is not possible, or not allowed, now."""

    def __init__(self, rollout: str, reason: str) -> None:
        super().__init__(f"rollout '{rollout}': {reason}")
        self.rollout = rollout
        self.reason = reason


class BadRolloutState(RoutingError):
    """A stored rollout cannot be read: damaged, or written by a newer program."""
