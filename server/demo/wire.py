"""A client's view of the Open Inference Protocol V2 over HTTP: request bodies out, answers in, as JSON or binary.

Written apart from the server's codec on purpose, so that one mistake cannot hide on both sides.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import orjson

from server.demo.data import Array

LENGTH_HEADER: Final = "inference-header-content-length"

_DTYPES: Final = {"FP32": np.float32, "FP64": np.float64, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_}
_DATATYPES: Final = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def datatype(values: Array) -> str:
    """V2 name of an array's type; fixed-width bytes are BYTES."""
    return "BYTES" if values.dtype.kind == "S" else _DATATYPES[values.dtype]


def json_body(inputs: Mapping[str, Array]) -> bytes:
    """An inference request with all data as JSON."""
    return orjson.dumps({"inputs": [{**_head(name, values), "data": _json(values)} for name, values in inputs.items()]})


def _head(name: str, values: Array) -> dict[str, Any]:
    return {"name": name, "shape": list(values.shape), "datatype": datatype(values)}


def _json(values: Array) -> list[Any]:
    flat: list[Any] = values.ravel().tolist()
    return [item.decode() for item in flat] if values.dtype.kind == "S" else flat


def binary_body(inputs: Mapping[str, Array]) -> tuple[bytes, int]:
    """An inference request with all data behind the JSON, and the length of that JSON for the header."""
    heads, contents = [], []
    for name, values in inputs.items():
        content = raw(values)
        heads.append({**_head(name, values), "parameters": {"binary_data_size": len(content)}})
        contents.append(content)
    header = orjson.dumps({"inputs": heads, "parameters": {"binary_data_output": True}})
    return b"".join([header, *contents]), len(header)


def raw(values: Array) -> bytes:
    """An array's contents as V2 sends them behind the JSON, and in gRPC."""
    if values.dtype.kind != "S":
        return values.tobytes()
    return b"".join(struct.pack("<I", len(item)) + item for item in values.ravel().tolist())


def parse_answer(body: bytes, header_length: int | None) -> dict[str, Array]:
    """Outputs by name. ``header_length`` is the answer's length header, None when all of it is JSON.

    Raises ValueError, KeyError or TypeError on an answer that is not V2.
    """
    end = len(body) if header_length is None else header_length
    outputs: dict[str, Array] = {}
    for output in orjson.loads(body[:end])["outputs"]:
        dtype = np.dtype(_DTYPES[output["datatype"]])
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = np.array(output["data"], dtype)
        else:
            values = np.frombuffer(body[end : end + size], dtype)
            end += size
        outputs[output["name"]] = values.reshape(output["shape"])
    return outputs
