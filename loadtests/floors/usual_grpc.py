"""The usual gRPC stack: grpc.aio, protobuf objects, a queue, one executor. It does what Tidegate does for a request."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np

from loadtests.floors.batcher import Batcher, batchers
from server._pb import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"


class Infer:
    def __init__(self, models: dict[str, Batcher]) -> None:
        self._models = models

    async def infer(
        self,
        request: pb.ModelInferRequest,
        context: grpc.aio.ServicerContext[pb.ModelInferRequest, pb.ModelInferResponse],
    ) -> pb.ModelInferResponse:
        model = self._models.get(request.model_name)
        if model is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_name!r}")
            raise AssertionError("unreachable: abort raises")
        tensor = request.inputs[0]
        rows = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tuple(tensor.shape))
        answer = await model.infer(rows)
        output = pb.ModelInferResponse.InferOutputTensor(name="y", datatype="FP32", shape=answer.shape)
        return pb.ModelInferResponse(
            model_name=request.model_name, id=request.id, outputs=[output], raw_output_contents=[answer.tobytes()]
        )


async def start(folder: Path) -> tuple[grpc.aio.Server, str]:
    """A server and its address."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    handler = grpc.unary_unary_rpc_method_handler(
        Infer(batchers(folder)).infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"
