"""The usual HTTP stack: a Starlette route under uvicorn, orjson and numpy, and the same batcher as the gRPC one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from loadtests.floors.batcher import Array, batchers

_LENGTH = "inference-header-content-length"


def _rows(document: Any, tail: bytes) -> Array:
    tensor = document["inputs"][0]
    if "data" in tensor:
        return np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    return np.frombuffer(tail, np.float32).reshape(tensor["shape"])


def _answer(model: str, rows: Array, *, binary: bool) -> Response:
    output: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": rows.shape}
    document = {"model_name": model, "outputs": [output]}
    if not binary:
        output["data"] = rows.ravel()
        return Response(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
    output["parameters"] = {"binary_data_size": rows.nbytes}
    head = orjson.dumps(document)
    return Response(head + rows.tobytes(), headers={_LENGTH: str(len(head))}, media_type="application/octet-stream")


def app(folder: Path) -> Starlette:
    """``POST /v2/models/NAME/infer`` for one input and one output, JSON or binary. Needs a running loop."""
    models = batchers(folder)

    async def infer(request: Request) -> Response:
        model = models.get(request.path_params["model"])
        if model is None:
            return Response(b'{"error": "no such model"}', 404)
        body = await request.body()
        size = int(request.headers.get(_LENGTH, len(body)))
        document = orjson.loads(body[:size])
        rows = await model.infer(_rows(document, body[size:]))
        return _answer(request.path_params["model"], rows, binary=size < len(body))

    return Starlette(routes=[Route("/v2/models/{model}/infer", infer, methods=["POST"])])
