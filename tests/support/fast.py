"""Clients for tests that need answers by the ten thousand: many requests on few connections, over both protocols.

Every answer's status and numbers are checked; what is given back is where the request went.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import grpc
import numpy as np

from server._pb import inference_pb2 as pb
from tests.support.routed import SCALES, X
from tests.support.server import Server

#: Requests on their way at once: on one HTTP connection, and among all gRPC calls.
_PIPELINE: Final = 32
_CALLS: Final = 64
_PATIENCE_S: Final = 60.0

_INPUT: Final = np.float32([1, 2, 3, 4])
_OUTPUTS: Final = {version: (_INPUT * np.float32(scale)).tobytes() for version, scale in SCALES.items()}
_JSON_OUTPUTS: Final = {version: [scale * x for x in (1, 2, 3, 4)] for version, scale in SCALES.items()}


@dataclass(slots=True, frozen=True)
class Ask:
    """One request as both protocols can say it. ``metadata``: headers, or gRPC's metadata."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str | int | bool | float] = field(default_factory=dict)
    version: str = ""


@dataclass(slots=True, frozen=True)
class Went:
    """Where a request went, as its answer says."""

    version: str
    arm: str
    reason: str
    generation: int


def by_user(users: Iterable[str]) -> list[Ask]:
    return [Ask({"x-user": user}) for user in users]


# --- HTTP -----------------------------------------------------------------------------------------------------------


def http_request(ask: Ask, model: str = "m") -> bytes:
    """The bytes of one POST."""
    body = json.dumps({"inputs": X} | ({"parameters": dict(ask.parameters)} if ask.parameters else {})).encode()
    version = f"/versions/{ask.version}" if ask.version else ""
    headers = "".join(f"{name}: {value}\r\n" for name, value in ask.metadata.items())
    line = f"POST /v2/models/{model}{version}/infer HTTP/1.1\r\nhost: t\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return line.encode() + body


def ask_http(server: Server, asks: Sequence[Ask], model: str = "m") -> list[Went]:
    """Every answer in order, over one connection, some requests ahead of their answers."""
    host, _, port = server.http.rpartition(":")
    waiting, found = iter(asks), []
    with socket.create_connection((host, int(port)), _PATIENCE_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile("rb", 1 << 18) as answers:
            while batch := list(islice(waiting, _PIPELINE)):
                connection.sendall(b"".join(http_request(ask, model) for ask in batch))
                found += [_went_http(answers) for _ in batch]
    return found


def _went_http(answers: Any) -> Went:
    status = answers.readline()
    headers: dict[str, str] = {}
    while (line := answers.readline()) not in (b"\r\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip()
    body = answers.read(int(headers.get("content-length", "0")))
    assert status.startswith(b"HTTP/1.1 200"), (status, body)
    answer = json.loads(body)
    version = answer["model_version"]
    assert answer["outputs"][0]["data"] == _JSON_OUTPUTS[version], answer
    return _went(headers, version)


def _went(metadata: Mapping[str, str], version: str) -> Went:
    assert metadata["x-tidegate-version"] == version
    generation = int(metadata["x-tidegate-generation"])
    return Went(version, metadata["x-tidegate-arm"], metadata["x-tidegate-reason"], generation)


# --- gRPC -----------------------------------------------------------------------------------------------------------


def grpc_request(ask: Ask, model: str = "m") -> bytes:
    """The bytes of one message."""
    request = pb.ModelInferRequest(model_name=model, model_version=ask.version)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(_INPUT.tobytes())
    for name, value in ask.parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return bytes(request.SerializeToString())


def ask_grpc_all(server: Server, asks: Sequence[Ask], model: str = "m") -> list[Went]:
    """Every answer in order, over one channel, many calls at once."""
    return asyncio.run(_ask_grpc(server, asks, model))


async def _ask_grpc(server: Server, asks: Sequence[Ask], model: str) -> list[Went]:
    found: dict[int, Went] = {}
    waiting = iter(enumerate(asks))
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        async def caller() -> None:
            for place, ask in waiting:
                done = infer(grpc_request(ask, model), timeout=_PATIENCE_S, metadata=tuple(ask.metadata.items()))
                answer = pb.ModelInferResponse.FromString(await done)
                version = answer.model_version
                assert answer.raw_output_contents[0] == _OUTPUTS[version], answer
                headers = {str(name): str(value) for name, value in await done.initial_metadata()}
                found[place] = _went(headers, version)

        await asyncio.gather(*[caller() for _ in range(_CALLS)])
    return [found[place] for place in range(len(asks))]
