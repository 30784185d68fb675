"""Which peers there are, which protocols each speaks, and how those are asked that are no V2 servers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

from loadtests.crew import Protocol, checking
from loadtests.lanes import Check
from loadtests.payloads import agrees
from loadtests.requests import Request
from server.errors import InvalidArgument

Array: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(slots=True, frozen=True)
class Form:
    """A way to carry one row there and its answer back that is not V2's."""

    request: Callable[[Array], Request]
    read: Callable[[bytes], Array]


@dataclass(slots=True, frozen=True)
class Peer:
    """``name`` is also that of its requirements, its environment and its program in ``servers``."""

    name: str
    says: str
    protocols: tuple[Protocol, ...]
    forms: Mapping[Protocol, Form] = field(default_factory=dict, hash=False)
    #: Takes processor time while nobody asks: it is stopped (SIGSTOP) while others are measured.
    polls: bool = False

    def requests(self, row: Array) -> dict[str, Request]:
        """Its own requests, by protocol."""
        return {protocol: form.request(row) for protocol, form in self.forms.items()}

    def check(self, protocol: Protocol, wanted: Array) -> Check:
        """Says whether a body is this peer's right answer."""
        form = self.forms.get(protocol)
        if form is None:
            return checking(protocol, {"y": wanted})
        return lambda body: agrees({"y": form.read(body)}, {"y": wanted})


def plain_json(path: str) -> Form:
    """``{"x": [[...]]}``, answered with ``{"y": [[...]]}`` or the rows alone: the least that JSON can carry them in."""

    def request(row: Array) -> Request:
        return Request(path, (("content-type", "application/json"),), json.dumps({"x": row.tolist()}).encode())

    def read(body: bytes) -> Array:
        answer = json.loads(body)
        return np.asarray(answer["y"] if isinstance(answer, dict) else answer, np.float32)

    return Form(request, read)


def bare_rows(path: str, columns: int) -> Form:
    """FP32, little-endian, there and back, and nothing around it. ``columns`` of the answer."""

    def request(row: Array) -> Request:
        return Request(path, (("content-type", "application/octet-stream"),), row.astype("<f4").tobytes())

    def read(body: bytes) -> Array:
        return np.frombuffer(body, "<f4").reshape(-1, columns)

    return Form(request, read)


_V2: Final[tuple[Protocol, ...]] = ("http-json", "http-binary", "grpc")

MOSEC: Final = Peer(
    "mosec",
    "a Rust front before Python workers; no V2 server",
    ("http-json", "http-binary"),
    {"http-json": plain_json("/json"), "http-binary": bare_rows("/binary", 2)},
)
PYTRITON: Final = Peer("pytriton", "NVIDIA Triton's C++ server, the model in its Python backend", _V2)
MLSERVER: Final = Peer("mlserver", "MLServer, model and server in one process", ("http-json", "grpc"))
KSERVE: Final = Peer("kserve", "KServe's Python SDK, which has no batcher", _V2)
LITSERVE: Final = Peer(
    "litserve", "LitServe; no V2 server", ("http-json",), {"http-json": plain_json("/predict")}, polls=True
)
BENTOML: Final = Peer("bentoml", "BentoML; no V2 server", ("http-json",), {"http-json": plain_json("/infer")})

PEERS: Final = (MOSEC, PYTRITON, MLSERVER, KSERVE, LITSERVE, BENTOML)


def chosen(names: Iterable[str]) -> tuple[Peer, ...]:
    """Peers by name, all when none is named. Raises InvalidArgument for one that is not there."""
    known, wanted = {peer.name: peer for peer in PEERS}, set(names)
    for name in wanted:
        if name not in known:
            raise InvalidArgument(f"a peer is one of {', '.join(known)}; got {name!r}")
    return tuple(peer for peer in PEERS if not wanted or peer.name in wanted)
