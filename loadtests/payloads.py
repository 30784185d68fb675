"""Requests and answers of the V2 protocol as bytes: JSON, JSON with binary tensors, and gRPC messages.

A payload is arrays by input name. It comes from a scenario, from an ``.npz`` file, or from a model's own signature.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from server._pb import inference_pb2 as pb
from server.codec.binary import decode_bytes, encode_bytes
from server.errors import InvalidArgument
from server.types import BYTES, DATATYPES, element_count

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Payload: TypeAlias = Mapping[str, Array]

#: numpy type -> datatype; BF16 has none of its own.
_NAMES: Final = {dtype: name for name, (dtype, _) in DATATYPES.items() if name != "BF16"}
#: A free dimension that is not the batch gets this size when arrays are made up.
_FREE: Final = 1
_LARGEST_MADE: Final = 64 * 1024 * 1024


def datatype_of(array: Array) -> str:
    """Raises InvalidArgument for a type that the protocol does not have."""
    if array.dtype.kind in "OSU":
        return BYTES
    name = _NAMES.get(array.dtype.newbyteorder("<"))
    if name is None:
        raise InvalidArgument(f"an array must be of a type of the V2 protocol, got {array.dtype}")
    return name


def raw(array: Array) -> bytes:
    """Contents as binary tensors carry them: little-endian, row-major; strings behind their lengths."""
    if datatype_of(array) == BYTES:
        return encode_bytes([_element(value) for value in array.ravel().tolist()])
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def _element(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _plain(array: Array) -> list[Any]:
    if datatype_of(array) == BYTES:
        return [_element(value).decode() for value in array.ravel().tolist()]
    return list(array.ravel().tolist())


# --- requests --------------------------------------------------------------------------------------------------------


def json_body(payload: Payload) -> bytes:
    return json.dumps({"inputs": [{**_head(name, a), "data": _plain(a)} for name, a in payload.items()]}).encode()


def binary_body(payload: Payload) -> tuple[bytes, int]:
    """A body, and the length of the JSON before its tensors. All outputs are asked for as binary tensors."""
    contents = [raw(array) for array in payload.values()]
    inputs = [
        {**_head(name, array), "parameters": {"binary_data_size": len(content)}}
        for (name, array), content in zip(payload.items(), contents, strict=True)
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([head, *contents]), len(head)


def grpc_message(model: str, version: str, payload: Payload) -> bytes:
    """A ``ModelInferRequest`` with raw contents."""
    tensor = pb.ModelInferRequest.InferInputTensor
    return pb.ModelInferRequest(
        model_name=model,
        model_version=version,
        inputs=[tensor(name=name, datatype=datatype_of(a), shape=a.shape) for name, a in payload.items()],
        raw_input_contents=[raw(array) for array in payload.values()],
    ).SerializeToString()


def _head(name: str, array: Array) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}


# --- answers ---------------------------------------------------------------------------------------------------------


def read_json(body: bytes) -> dict[str, Array]:
    """Outputs by name. Raises ValueError, KeyError or TypeError when the body is no answer."""
    return {
        output["name"]: _from_values(output["datatype"], output["shape"], output["data"])
        for output in json.loads(body)["outputs"]
    }


def read_binary(body: bytes) -> dict[str, Array]:
    """As :func:`read_json`, where binary tensors may stand behind the JSON; its length is found by reading it."""
    text = body.decode("latin-1")
    document, at = json.JSONDecoder().raw_decode(text)
    found: dict[str, Array] = {}
    for output in document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = _from_values(output["datatype"], output["shape"], output["data"])
            continue
        found[output["name"]] = _from_raw(output["datatype"], output["shape"], body[at : at + size])
        at += size
    return found


def read_grpc(message: bytes) -> dict[str, Array]:
    """As :func:`read_json`, for a ``ModelInferResponse`` with raw contents."""
    answer = pb.ModelInferResponse.FromString(message)
    pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
    return {output.name: _from_raw(output.datatype, output.shape, content) for output, content in pairs}


def _from_values(datatype: str, shape: Sequence[int], values: list[Any]) -> Array:
    kind = object if datatype == BYTES else DATATYPES[datatype][0]
    return np.array(values, dtype=kind).reshape(tuple(shape))


def _from_raw(datatype: str, shape: Sequence[int], content: bytes) -> Array:
    if datatype == BYTES:
        elements = decode_bytes("answer", content, element_count(tuple(shape)))
        return np.array(elements, dtype=object).reshape(tuple(shape))
    return np.frombuffer(content, dtype=DATATYPES[datatype][0]).reshape(tuple(shape))


def agrees(got: Mapping[str, Array], wanted: Mapping[str, Array]) -> bool:
    """The outputs that are wanted are there and equal, floats to what batching may change in their last bits."""
    return all(name in got and _close(got[name], array) for name, array in wanted.items())


def _close(got: Array, wanted: Array) -> bool:
    if got.shape != wanted.shape:
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(got, wanted))
    return bool(np.allclose(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True))


# --- made up ---------------------------------------------------------------------------------------------------------


def made_up(metadata: Mapping[str, Any], rows: int, seed: int = 1) -> dict[str, Array]:
    """Arrays that fit a model's metadata (``GET /v2/models/NAME``): -1 as first dimension becomes ``rows``.

    Raises InvalidArgument for metadata that no arrays can be made from.
    """
    random = np.random.default_rng(seed)
    try:
        inputs = [(str(i["name"]), str(i["datatype"]), [int(d) for d in i["shape"]]) for i in metadata["inputs"]]
    except (KeyError, TypeError, ValueError):
        raise InvalidArgument(f"metadata must list inputs with name, datatype and shape, got {metadata!r}") from None
    return {name: _made(random, datatype, _sizes(shape, rows)) for name, datatype, shape in inputs}


def _sizes(shape: Sequence[int], rows: int) -> tuple[int, ...]:
    sizes = tuple((rows if place == 0 else _FREE) if dim < 0 else dim for place, dim in enumerate(shape))
    if element_count(sizes) > _LARGEST_MADE:
        raise InvalidArgument(f"an input of shape {list(shape)} is too large to be made up; give one as .npz")
    return sizes


def _made(random: np.random.Generator, datatype: str, shape: tuple[int, ...]) -> Array:
    if datatype == BYTES:
        words = [f"word{number}".encode() for number in random.integers(0, 1000, element_count(shape))]
        return np.array(words, dtype=object).reshape(shape)
    dtype = DATATYPES.get(datatype, (None,))[0]
    if dtype is None or datatype == "BF16":
        raise InvalidArgument(f"an input of datatype {datatype!r} cannot be made up; give arrays")
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)
