"""Answers that are made beforehand, by wire form: what echoes send, whatever they are asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.models import MODEL, bench_row
from loadtests.session import session
from server._pb import inference_pb2 as pb


@dataclass(slots=True, frozen=True)
class Canned:
    """Answers of the small model to its fixed row."""

    json: bytes
    binary: bytes
    grpc: bytes

    @classmethod
    def of(cls, folder: Path) -> Canned:
        rows = np.asarray(session(folder / f"{MODEL}.onnx").run(None, {"x": bench_row()})[0])
        output: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": list(rows.shape)}
        named: dict[str, Any] = {"model_name": MODEL, "model_version": "1"}
        sized = {**output, "parameters": {"binary_data_size": rows.nbytes}}
        tensor = pb.ModelInferResponse.InferOutputTensor(**output)
        message = pb.ModelInferResponse(**named, outputs=[tensor], raw_output_contents=[rows.tobytes()])
        return cls(
            json.dumps({**named, "outputs": [{**output, "data": rows.ravel().tolist()}]}).encode(),
            json.dumps({**named, "outputs": [sized]}).encode() + rows.tobytes(),
            message.SerializeToString(),
        )
