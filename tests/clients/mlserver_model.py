"""A model for MLServer, loaded by its own process: ``y = 3 x`` for FP32 rows of four. It imports nothing of ours."""

from __future__ import annotations

import importlib
from typing import Any

mlserver: Any = importlib.import_module("mlserver")
NumpyCodec: Any = importlib.import_module("mlserver.codecs").NumpyCodec


class Tripled(mlserver.MLModel):  # type: ignore[misc]
    """MLServer's own way to a model: subclass, load, predict."""

    async def load(self) -> bool:
        return True

    async def predict(self, payload: Any) -> Any:
        x = NumpyCodec.decode_input(payload.inputs[0])
        answer = importlib.import_module("mlserver.types").InferenceResponse
        outputs = [NumpyCodec.encode_output("y", x * 3)]
        return answer(model_name=self.name, model_version=self.version, id=payload.id, outputs=outputs)
