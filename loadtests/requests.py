"""One request as every generator sends it: where to, under which headers, which bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loadtests import payloads
from loadtests.lanes import INFER_PATH
from loadtests.payloads import Payload

_LENGTH_HEADER: Final = "inference-header-content-length"


@dataclass(slots=True, frozen=True)
class Request:
    """``body`` of a gRPC request is its message, without the prefix that frames it."""

    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


def v2_request(protocol: str, model: str, version: str, payload: Payload) -> Request:
    """What the V2 protocol asks for; ``protocol`` is one of ``crew.PROTOCOLS``."""
    if protocol.startswith("grpc"):
        message = payloads.grpc_message(model, version, payload)
        return Request(INFER_PATH, (("content-type", "application/grpc"), ("te", "trailers")), message)
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    if protocol == "http-json":
        return Request(path, (("content-type", "application/json"),), payloads.json_body(payload))
    body, size = payloads.binary_body(payload)
    return Request(path, (("content-type", "application/octet-stream"), (_LENGTH_HEADER, str(size))), body)
