"""KServe's Python SDK. It has no batcher of its own (that is a separate agent), so each row is a run."""

from __future__ import annotations

import logging
from typing import Any

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer  # type: ignore[import-not-found]

from loadtests.peers.servers.served import NAME, Served, grpc_port, http_port


class Rows(Model):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(NAME)
        self.load()

    def load(self) -> bool:
        self._served = Served()
        self.ready = True
        return True

    async def predict(self, payload: InferRequest, headers: Any = None, response_headers: Any = None) -> InferResponse:
        rows = self._served.run(payload.inputs[0].as_numpy())
        binary = bool(payload.use_binary_outputs)
        output = InferOutput(name="y", shape=list(rows.shape), datatype="FP32")
        output.set_data_from_numpy(rows, binary_data=binary)
        return InferResponse(payload.id or "", NAME, infer_outputs=[output], use_binary_outputs=binary)


def main() -> None:
    logging.disable(logging.INFO)  # several lines for each request otherwise
    server = ModelServer(
        http_port=http_port(),
        grpc_port=grpc_port(),
        workers=1,
        enable_grpc=True,
        enable_docs_url=False,
        access_log_format=None,
    )
    server.start([Rows()])


if __name__ == "__main__":
    main()
