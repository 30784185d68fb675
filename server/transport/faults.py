"""Errors that only a transport can find, and the name checks that every protocol shares."""

from __future__ import annotations

import uuid
from typing import Final

from server.errors import InvalidArgument, TidegateError


class RequestTimeout(TidegateError):
    """The body did not arrive in time."""

    code = "request_timeout"


class MethodNotAllowed(TidegateError):
    """The path exists, the HTTP method is not one of its own."""

    code = "method_not_allowed"

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"method {method} is not allowed here; allowed: {allowed}")
        self.allowed = allowed


class HeadersTooLarge(TidegateError):
    """Request line and headers are over the limit."""

    code = "headers_too_large"


class Internal(TidegateError):
    """What a caller is told of an unexpected exception: the id under which it was logged and nothing else."""

    code = "internal"

    def __init__(self, tidegate_id: str) -> None:
        super().__init__(f"internal error, id {tidegate_id}")


def new_id() -> str:
    """An id for what was refused before the gateway gave it one."""
    return uuid.uuid4().hex


def check_version(version: str) -> None:
    """Raises InvalidArgument unless ``version`` is "" (none named) or a decimal number."""
    if version and not (version.isascii() and version.isdecimal()):
        raise InvalidArgument(f"model version must be a decimal number, got {version[:64]!r}")


_NAME_CHARS: Final = 255


def check_repository_name(model: str) -> None:
    """Raises InvalidArgument for a name that could mean anything but one entry of the model repository."""
    if not model or len(model) > _NAME_CHARS:
        raise InvalidArgument(f"model name must have 1 to {_NAME_CHARS} characters, got {len(model)}")
    if model.startswith(".") or any(c in "/\\" or not c.isprintable() for c in model):
        raise InvalidArgument(
            f"model name {model[:64]!r} must not start with a dot or contain a slash, backslash or control character"
        )
