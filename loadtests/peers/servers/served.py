"""What every peer has in common: the model on the same onnxruntime session, the addresses, the limits of a batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from loadtests.session import session

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

#: Name of the model in every server; its input is ``x``, FP32 [batch, features], its output ``y``, FP32 [batch, 2].
NAME: Final = "bench"
FEATURES: Final = 30
OUTPUTS: Final = 2
HOST: Final = "127.0.0.1"
MOST_ROWS: Final = 32
DELAY_MS: Final = 1


def http_port() -> int:
    return int(os.environ["PEER_HTTP"])


def grpc_port() -> int:
    return int(os.environ["PEER_GRPC"])


class Served:
    """The model that ``PEER_MODEL`` names."""

    def __init__(self) -> None:
        self._session = session(Path(os.environ["PEER_MODEL"]))

    def run(self, rows: Array) -> Array:
        """FP32 [rows, 30] -> FP32 [rows, 2]."""
        return np.asarray(self._session.run(None, {"x": np.ascontiguousarray(rows, np.float32)})[0])
