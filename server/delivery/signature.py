"""Signatures of messages as https://www.standardwebhooks.com defines them (symmetric keys, version ``v1``)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from server.errors import ConfigError

_PREFIX: Final = "whsec_"
_MIN_KEY_BYTES: Final = 24
_MAX_KEY_BYTES: Final = 64


@dataclass(slots=True, frozen=True)
class SigningSecret:
    """One key, which is never shown."""

    key: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> SigningSecret:
        """The key in ``whsec_<base64>``. Raises ConfigError, whose text does not show it."""
        try:
            key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        except (binascii.Error, ValueError):
            key = b""
        if not text.startswith(_PREFIX) or not _MIN_KEY_BYTES <= len(key) <= _MAX_KEY_BYTES:
            raise ConfigError(
                f"wanted a signing secret: {_PREFIX} and the base64 of {_MIN_KEY_BYTES} to {_MAX_KEY_BYTES} bytes "
                "(not shown here)"
            )
        return cls(key)


def signature(secrets: Sequence[SigningSecret], message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of ``webhook-signature``: base64 of HMAC-SHA256 over ``id.timestamp.body``, one for each secret.

    Two secrets let a receiver change from one to the other without a moment in which neither is right.
    """
    signed = b".".join((message_id.encode(), str(timestamp_s).encode(), body))
    digests = (hmac.digest(secret.key, signed, hashlib.sha256) for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)
