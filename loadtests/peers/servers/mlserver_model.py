"""The model as MLServer loads it."""

from __future__ import annotations

from mlserver import MLModel  # type: ignore[import-not-found]
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found]
from mlserver.types import InferenceRequest, InferenceResponse  # type: ignore[import-not-found]

from loadtests.peers.servers.served import NAME, Served


class Rows(MLModel):  # type: ignore[misc]
    async def load(self) -> bool:
        self._served = Served()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = self._served.run(NumpyCodec.decode_input(payload.inputs[0]))
        return InferenceResponse(model_name=NAME, outputs=[NumpyCodec.encode_output("y", rows)])
