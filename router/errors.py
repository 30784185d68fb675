"""What can go wrong in a routing decision. The caller turns these into its own errors."""

from __future__ import annotations


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
