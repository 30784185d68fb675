"""Scenario files: who is asked what, how, and for how long. YAML; every unknown key is an error."""

from __future__ import annotations

import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any, Final, Literal, Self

import grpc
import numpy as np
import orjson
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loadtests import payloads
from loadtests.crew import Protocol, Way
from loadtests.load import Arrivals
from loadtests.servers import check_address
from server._pb import inference_pb2 as pb
from server.errors import ConfigError, InvalidArgument
from server.types import BYTES, DATATYPES

_LONGEST_S: Final = 24 * 3600.0
_MOST_CONNECTIONS: Final = 10_000
_ASK_S: Final = 10.0


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetSection(_Section):
    """A server that runs (``http``, ``grpc``, and ``pid`` for its processor time), or one to be started: ``serve``."""

    label: str = "target"
    http: str = ""
    grpc: str = ""
    pid: int = Field(default=0, ge=0)
    serve: Path | None = None
    transport: Literal["native", "reference"] = "native"

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.serve is None) == (not (self.http or self.grpc)):
            raise ValueError("a target has either serve, or http or grpc")
        if self.serve is not None and self.pid:
            raise ValueError("pid belongs to a server that runs; serve starts one")
        for address in filter(None, (self.http, self.grpc)):
            try:
                check_address(address)
            except InvalidArgument as error:
                raise ValueError(str(error)) from None
        return self


class TensorSection(_Section):
    """One input in place: a flat list."""

    datatype: str
    shape: tuple[int, ...]
    data: list[bool | int | float | str]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.array()
        return self

    def array(self) -> payloads.Array:
        if self.datatype != BYTES and self.datatype not in DATATYPES:
            raise ValueError(f"datatype must be one of {', '.join(DATATYPES)}, BYTES; got {self.datatype!r}")
        dtype = np.dtype(object) if self.datatype == BYTES else DATATYPES[self.datatype][0]
        try:
            return np.array(self.data, dtype=dtype).reshape(self.shape)
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"data does not fit {self.datatype} {list(self.shape)}: {error}") from None


class Generate(_Section):
    rows: int = Field(default=1, ge=1, le=65_536)
    seed: int = Field(default=1, ge=0)


class PayloadSection(_Section):
    """One of: ``inline`` arrays, an ``npz`` file, or ``generate`` from the model's signature (the default)."""

    inline: dict[str, TensorSection] | None = Field(default=None, min_length=1)
    npz: Path | None = None
    generate: Generate | None = None

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if sum(value is not None for value in (self.inline, self.npz, self.generate)) > 1:
            raise ValueError("a payload is one of inline, npz and generate")
        return self


class Scenario(_Section):
    """One way to ask one server. ``rate`` is that of the open loop, in requests a second."""

    name: str = Field(min_length=1, max_length=200)
    target: TargetSection
    model: str = Field(min_length=1)
    version: str = ""
    payload: PayloadSection = Field(default_factory=PayloadSection)
    protocol: Protocol
    loop: Literal["closed", "open"] = "closed"
    connections: int = Field(default=1, ge=1, le=_MOST_CONNECTIONS)
    streams: int = Field(default=1, ge=1, le=1000)
    rate: float = Field(default=0.0, ge=0.0, le=1e6, allow_inf_nan=False)
    arrivals: Arrivals = "poisson"
    ramp_s: float = Field(default=1.0, ge=0.0, le=_LONGEST_S, allow_inf_nan=False)
    duration_s: float = Field(default=10.0, gt=0.0, le=_LONGEST_S, allow_inf_nan=False)
    rounds: int = Field(default=3, ge=1, le=1000)
    generator: Literal["own", "h2load"] = "own"

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.loop == "open") != (self.rate > 0):
            raise ValueError("rate is that of the open loop: it must be positive there, and is not given otherwise")
        if self.generator == "h2load" and (self.loop == "open" or self.protocol == "grpcio"):
            raise ValueError("h2load runs closed loops of http-json, http-binary and grpc")
        try:
            self.way()
        except InvalidArgument as error:
            raise ValueError(str(error)) from None
        return self

    def way(self) -> Way:
        return Way(self.protocol, self.connections, self.streams)


def load_scenario(path: Path) -> Scenario:
    """Raises ConfigError naming the file and every wrong key. Relative paths start at the file."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a scenario is a mapping of keys, got {type(document).__name__}")
    try:
        scenario = Scenario.model_validate(document)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'scenario'}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None
    return _placed(scenario, path.parent)


def _placed(scenario: Scenario, folder: Path) -> Scenario:
    target, payload = scenario.target, scenario.payload
    if target.serve is not None:
        target = target.model_copy(update={"serve": folder / target.serve})
    if payload.npz is not None:
        payload = payload.model_copy(update={"npz": folder / payload.npz})
    return scenario.model_copy(update={"target": target, "payload": payload})


def payload_of(scenario: Scenario, http: str, grpc_address: str) -> payloads.Payload:
    """The arrays to be sent; generated ones after asking the server for the model's signature. Raises ConfigError."""
    given = scenario.payload
    if given.inline is not None:
        return {name: tensor.array() for name, tensor in given.inline.items()}
    if given.npz is not None:
        return read_npz(given.npz)
    wanted = given.generate or Generate()
    try:
        metadata = signature(http, grpc_address, scenario.model, scenario.version)
        return payloads.made_up(metadata, wanted.rows, wanted.seed)
    except InvalidArgument as error:
        raise ConfigError(f"model {scenario.model!r}: {error}") from None


def read_npz(path: Path) -> payloads.Payload:
    """Arrays by name. Raises ConfigError naming the file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {str(name): file[name] for name in file.files}
        for array in arrays.values():
            payloads.datatype_of(array)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, InvalidArgument, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not arrays:
        raise ConfigError(f"{path}: has no arrays")
    return arrays


def signature(http: str, grpc_address: str, model: str, version: str = "") -> dict[str, Any]:
    """A model's metadata as the server tells it. Raises ConfigError."""
    try:
        return _http_metadata(http, model, version) if http else _grpc_metadata(grpc_address, model, version)
    except (OSError, ValueError, urllib.error.URLError, grpc.RpcError) as error:
        raise ConfigError(f"cannot ask for the metadata of model {model!r}: {error}") from None


def _http_metadata(address: str, model: str, version: str) -> dict[str, Any]:
    url = f"http://{address}/v2/models/{model}" + (f"/versions/{version}" if version else "")
    with urllib.request.urlopen(url, timeout=_ASK_S) as answer:
        return dict(orjson.loads(answer.read()))


def _grpc_metadata(address: str, model: str, version: str) -> dict[str, Any]:
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelMetadata",
            pb.ModelMetadataRequest.SerializeToString,
            pb.ModelMetadataResponse.FromString,
        )
        answer = call(pb.ModelMetadataRequest(name=model, version=version), timeout=_ASK_S)
    return {"inputs": [{"name": i.name, "datatype": i.datatype, "shape": list(i.shape)} for i in answer.inputs]}
