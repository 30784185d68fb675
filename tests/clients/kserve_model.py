"""A KServe model server with one model, ``y = 3 x`` for FP32 rows of four. It imports nothing of ours.

python kserve_model.py HTTP_PORT GRPC_PORT
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np

kserve: Any = importlib.import_module("kserve")


class Tripled(kserve.Model):  # type: ignore[misc]
    """KServe's own way to a model: subclass, say the types, predict."""

    def __init__(self) -> None:
        super().__init__("tripled")
        self.ready = True

    async def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]

    async def get_output_types(self) -> list[dict[str, Any]]:
        return [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]

    def predict(self, request: Any, _: Any = None, __: Any = None) -> Any:
        values = (request.inputs[0].as_numpy() * 3).astype(np.float32)
        output = kserve.InferOutput("y", list(values.shape), "FP32")
        output.set_data_from_numpy(values, binary_data=True)
        return kserve.InferResponse(
            request.id or "none",
            "tripled",
            [output],
            use_binary_outputs=request.use_binary_outputs,
            requested_outputs=request.request_outputs,
        )


if __name__ == "__main__":
    server = kserve.ModelServer(http_port=int(sys.argv[1]), grpc_port=int(sys.argv[2]), enable_docs_url=False)
    server.start([Tripled()])
