"""MLflow's webhooks, taken as hints: they wake the poll and say nothing that is believed.

MLflow may lose any of them, and sends a lost one again under the same delivery id. A signature is base64 of HMAC-SHA256
over ``id.timestamp.body`` with the text of the secret as key. https://mlflow.org/docs/latest/ml/webhooks/
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from server.errors import ConfigError

ID, TIMESTAMP, SIGNATURE = "x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"
#: The largest body that whoever receives hints should read; MLflow's are far smaller.
MAX_HINT_BYTES: Final = 256 * 1024
_MAX_AGE_S: Final = 300
_MAX_ID_CHARS: Final = 128
#: Delivery ids that are remembered; with more in five minutes the oldest are forgotten, and wake the poll once more.
_REMEMBERED: Final = 10_000


class HintRefused(Exception):
    """A hint whose signature, time or headers are wrong. The text does not tell a forger which."""


class MlflowHints:
    """Checks webhooks and calls ``wake`` for each new one. Thread-safe.

    ``secrets``: those that are valid now, two while one is changed. ``clock``: seconds since the epoch.
    """

    def __init__(
        self, secrets: Sequence[str], wake: Callable[[], None], *, clock: Callable[[], float] = time.time
    ) -> None:
        if not secrets or not all(secrets):
            raise ConfigError("hints want at least one secret, and no empty one")
        self._secrets = [secret.encode() for secret in secrets]
        self._wake = wake
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, float] = OrderedDict()

    def take(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Wake the poll; False for a delivery that was taken before. ``headers``: names in lower case.

        Raises HintRefused.
        """
        id_, stamp = headers.get(ID, ""), headers.get(TIMESTAMP, "")
        if not self._is_signed(id_, stamp, headers.get(SIGNATURE, ""), body) or not self._is_fresh(stamp):
            raise HintRefused("the webhook is not signed with a secret known here, or older than five minutes")
        if not self._is_new(id_):
            return False
        self._wake()
        return True

    def _is_signed(self, id_: str, stamp: str, given: str, body: bytes) -> bool:
        if not 0 < len(id_) <= _MAX_ID_CHARS or not given.isascii():
            return False
        signed = b".".join((id_.encode(), stamp.encode(), body))
        wanted = [_signature(secret, signed) for secret in self._secrets]
        return any(hmac.compare_digest(one, other) for one in wanted for other in given.split(" ")[:4])

    def _is_fresh(self, stamp: str) -> bool:
        if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
            return False
        return abs(self._clock() - int(stamp)) <= _MAX_AGE_S

    def _is_new(self, id_: str) -> bool:
        # A stamp may be five minutes in the future, and is then fresh for ten.
        oldest = self._clock() - 2 * _MAX_AGE_S
        with self._lock:
            while self._seen and (len(self._seen) >= _REMEMBERED or next(iter(self._seen.values())) < oldest):
                self._seen.popitem(last=False)
            if id_ in self._seen:
                return False
            self._seen[id_] = self._clock()
            return True


def _signature(secret: bytes, signed: bytes) -> str:
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()
