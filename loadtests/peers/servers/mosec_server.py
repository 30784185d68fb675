"""mosec: JSON ``{"x": [[...]]}`` at ``/json`` and bare FP32 rows at ``/binary``, each with its own worker.

mosec is no V2 server; these are the least bodies that carry a row. A route of its own for each form, rather than a look
at the first byte, so that no row can be taken for the other kind.
"""

from __future__ import annotations

import sys

import numpy as np
import orjson
from mosec import Server, Worker  # type: ignore[import-not-found]

from loadtests.peers.servers.served import DELAY_MS, FEATURES, HOST, MOST_ROWS, Array, Served, http_port


class Rows(Worker):  # type: ignore[misc]
    """A batch of single rows through the model."""

    def __init__(self) -> None:
        self._model = Served()

    def forward(self, data: list[Array]) -> list[Array]:
        return list(self._model.run(np.stack(data)))


class Json(Rows):
    def deserialize(self, data: bytes) -> Array:
        return np.asarray(orjson.loads(data)["x"], np.float32).reshape(FEATURES)

    def serialize(self, data: Array) -> bytes:
        return orjson.dumps({"y": [data.tolist()]})


class Binary(Rows):
    def deserialize(self, data: bytes) -> Array:
        return np.frombuffer(data, np.float32).reshape(FEATURES)

    def serialize(self, data: Array) -> bytes:
        return data.tobytes()


def main() -> None:
    # mosec reads its settings off the command line.
    sys.argv[1:] = ["--address", HOST, "--port", str(http_port()), "--log-level", "error", "--timeout", "60000"]
    server = Server()
    for worker, route in ((Json, "/json"), (Binary, "/binary")):
        server.append_worker(worker, num=1, max_batch_size=MOST_ROWS, max_wait_time=DELAY_MS, route=route)
    server.run()


if __name__ == "__main__":
    main()
