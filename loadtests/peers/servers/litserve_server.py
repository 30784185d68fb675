"""LitServe: JSON ``{"x": [[...]]}`` at ``/predict``. No V2 server."""

# No `from __future__ import annotations`: LitServe reads the annotation of `decode_request` as an object.

from typing import Any

import litserve as ls  # type: ignore[import-not-found]
import numpy as np
from fastapi import Request  # type: ignore[import-not-found]

from loadtests.peers.servers.served import DELAY_MS, HOST, MOST_ROWS, Array, Served, http_port


class Rows(ls.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self._served = Served()

    def decode_request(self, request: Request) -> Array:
        # LitServe hands in the parsed body of what it declares as a request.
        return np.asarray(request["x"], np.float32)

    def batch(self, inputs: list[Array]) -> Array:
        return np.concatenate(inputs)

    def predict(self, x: Array) -> Array:
        return self._served.run(x)

    def unbatch(self, output: Array) -> list[Array]:
        return [output[i : i + 1] for i in range(len(output))]

    def encode_response(self, output: Array) -> dict[str, Any]:
        return {"y": output.tolist()}


def main() -> None:
    api = Rows(max_batch_size=MOST_ROWS, batch_timeout=DELAY_MS / 1000)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host=HOST, port=http_port(), num_api_servers=1, log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
