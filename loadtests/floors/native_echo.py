"""Tidegate's native listener before a port that answers at once: transport and codec without gateway and batcher."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette

from loadtests.models import MODEL, bench_row
from loadtests.session import session
from server.errors import TidegateError
from server.transport.answers import HttpSettings
from server.transport.http_infer import InferApp
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.port import Services
from server.transport.status import StatusTable
from server.types import (
    Decision,
    InferenceRequest,
    InferenceResponse,
    Permit,
    Reply,
    RequestHead,
    RequestLimits,
    Tensor,
)


@dataclass(slots=True)
class EchoPermit:
    head: RequestHead
    tidegate_id: str = "floor"
    traceresponse: str | None = None

    def hold(self, size: int) -> None:
        """Nothing is counted."""

    def release(self) -> None:
        """Nothing was counted."""


class Answered:
    """The ticket of a request that has its answer already."""

    def cancel(self) -> None:
        """Too late."""

    def written(self, code: str) -> None:
        """Nothing is counted."""


class EchoPort:
    """``server.types.Port``: every request gets the same output."""

    def __init__(self, folder: Path) -> None:
        self.limits = RequestLimits()
        rows = np.asarray(session(folder / f"{MODEL}.onnx").run(None, {"x": bench_row()})[0])
        self._output = Tensor("y", "FP32", rows.shape, rows.tobytes())
        self._decision = Decision(MODEL, "1", "stable", 1, "default")
        self._ticket = Answered()

    def refuse(self, error: TidegateError) -> TidegateError:
        """Nothing is counted."""
        return error

    def admit(self, head: RequestHead) -> Permit:
        return EchoPermit(head)

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> Answered:
        reply.message(InferenceResponse(request.model, "1", request.id, [self._output]), self._decision)
        reply.finish(None)
        return self._ticket


async def start(folder: Path) -> tuple[list[NativeServer], dict[str, str]]:
    """An HTTP and a gRPC listener and their addresses. Only inference is served."""
    port, absent = EchoPort(folder), _absent()
    app = InferApp(port, absent.catalog, Starlette(), statuses=StatusTable(), settings=HttpSettings())
    served = Served(port, absent.catalog, app, GrpcMethods(absent))
    servers = [NativeServer(served), NativeServer(served)]
    bound = [await server.start("127.0.0.1", 0) for server in servers]
    return servers, {name: f"{host}:{number}" for name, (host, number) in zip(("http", "grpc"), bound, strict=True)}


def _absent() -> Services:
    """Services that nobody calls: the generators ask for inference only."""
    nothing: Any = None
    return Services(nothing, nothing, nothing, nothing)
