"""The unary methods of ``inference.GRPCInferenceService`` other than ModelInfer: bytes in, bytes out.

Nothing here knows a gRPC library; any transport that carries calls by path can serve ``InferenceRpcs.methods``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn, TypeAlias, TypeVar

from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from server._pb import inference_pb2 as pb
from server.errors import InvalidArgument, NotFound, PayloadTooLarge, Unimplemented
from server.transport.faults import check_repository_name, check_version
from server.transport.port import Services, SettingValue
from server.types import ParameterValue, TensorSpec

Method: TypeAlias = Callable[[bytes], Awaitable[bytes]]
_M = TypeVar("_M", bound=Message)

SERVICE: Final = "inference.GRPCInferenceService"
#: Of a message of any method but those that infer, as of a body over HTTP: they are small and admitted by nobody.
MAX_BYTES: Final = 1024 * 1024


def check_message_size(size: int) -> None:
    """Raises PayloadTooLarge for a message of a method that needs no large ones."""
    if size > MAX_BYTES:
        raise PayloadTooLarge(f"message of {size} bytes is over the limit of {MAX_BYTES} bytes")


def parse(kind: type[_M], raw: bytes) -> _M:
    """The message in ``raw``, or InvalidArgument saying that it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError:
        raise InvalidArgument(f"the {len(raw)} bytes received are not a {kind.DESCRIPTOR.full_name} message") from None


class InferenceRpcs:
    """Health, metadata, repository, statistics and settings over ``Services``."""

    def __init__(self, services: Services) -> None:
        self._catalog = services.catalog
        self._control = services.control
        self._settings = services.settings
        named: dict[str, Method] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._system_memory_status,
            "SystemSharedMemoryRegister": self._no_system_memory,
            "SystemSharedMemoryUnregister": self._no_system_memory,
            "CudaSharedMemoryStatus": self._cuda_memory_status,
            "CudaSharedMemoryRegister": self._no_cuda_memory,
            "CudaSharedMemoryUnregister": self._no_cuda_memory,
            "TraceSetting": self._trace_setting,
            "LogSettings": self._log_settings,
        }
        #: Path -> method.
        self.methods: Mapping[str, Method] = {f"/{SERVICE}/{name}": method for name, method in named.items()}

    async def _server_live(self, raw: bytes) -> bytes:
        parse(pb.ServerLiveRequest, raw)
        return pb.ServerLiveResponse(live=self._catalog.live()).SerializeToString()

    async def _server_ready(self, raw: bytes) -> bytes:
        parse(pb.ServerReadyRequest, raw)
        return pb.ServerReadyResponse(ready=self._catalog.ready()).SerializeToString()

    async def _model_ready(self, raw: bytes) -> bytes:
        request = parse(pb.ModelReadyRequest, raw)
        check_version(request.version)
        try:
            ready = self._catalog.model_ready(request.name, request.version)
        except NotFound:
            ready = False
        return pb.ModelReadyResponse(ready=ready).SerializeToString()

    async def _server_metadata(self, raw: bytes) -> bytes:
        parse(pb.ServerMetadataRequest, raw)
        catalog = self._catalog
        return pb.ServerMetadataResponse(
            name=catalog.server_name(), version=catalog.server_version(), extensions=catalog.extensions()
        ).SerializeToString()

    async def _model_metadata(self, raw: bytes) -> bytes:
        request = parse(pb.ModelMetadataRequest, raw)
        check_version(request.version)
        spec, versions = self._catalog.metadata(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=spec.name,
            versions=versions,
            platform=spec.platform,
            inputs=[_tensor(tensor) for tensor in spec.inputs],
            outputs=[_tensor(tensor) for tensor in spec.outputs],
        ).SerializeToString()

    async def _model_config(self, raw: bytes) -> bytes:
        request = parse(pb.ModelConfigRequest, raw)
        check_version(request.version)
        config = self._catalog.config(request.name, request.version)
        return pb.ModelConfigResponse(config=config).SerializeToString()

    async def _model_statistics(self, raw: bytes) -> bytes:
        request = parse(pb.ModelStatisticsRequest, raw)
        check_version(request.version)
        entries = self._catalog.statistics(request.name, request.version)
        response = json_format.ParseDict({"model_stats": entries}, pb.ModelStatisticsResponse())
        return response.SerializeToString()

    async def _repository_index(self, raw: bytes) -> bytes:
        request = parse(pb.RepositoryIndexRequest, raw)
        _check_repository(request.repository_name)
        response = pb.RepositoryIndexResponse()
        for entry in self._catalog.repository_index(request.ready):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response.SerializeToString()

    async def _load(self, raw: bytes) -> bytes:
        request = parse(pb.RepositoryModelLoadRequest, raw)
        _check_repository(request.repository_name)
        check_repository_name(request.model_name)
        await self._control.load(request.model_name, _parameters(request))
        return pb.RepositoryModelLoadResponse().SerializeToString()

    async def _unload(self, raw: bytes) -> bytes:
        request = parse(pb.RepositoryModelUnloadRequest, raw)
        _check_repository(request.repository_name)
        check_repository_name(request.model_name)
        await self._control.unload(request.model_name, unload_dependents(_parameters(request)))
        return pb.RepositoryModelUnloadResponse().SerializeToString()

    async def _system_memory_status(self, raw: bytes) -> bytes:
        parse(pb.SystemSharedMemoryStatusRequest, raw)
        return pb.SystemSharedMemoryStatusResponse().SerializeToString()

    async def _cuda_memory_status(self, raw: bytes) -> bytes:
        parse(pb.CudaSharedMemoryStatusRequest, raw)
        return pb.CudaSharedMemoryStatusResponse().SerializeToString()

    async def _no_system_memory(self, raw: bytes) -> bytes:
        parse(pb.SystemSharedMemoryRegisterRequest, raw)
        _no_shared_memory("system")

    async def _no_cuda_memory(self, raw: bytes) -> bytes:
        parse(pb.CudaSharedMemoryRegisterRequest, raw)
        _no_shared_memory("CUDA")

    async def _trace_setting(self, raw: bytes) -> bytes:
        request = parse(pb.TraceSettingRequest, raw)
        if request.model_name:
            self._catalog.model_ready(request.model_name, "")
        if request.settings:
            changes = {name: list(setting.value) or None for name, setting in request.settings.items()}
            self._settings.update_trace(request.model_name, changes)
        response = pb.TraceSettingResponse()
        for name, value in self._settings.trace(request.model_name).items():
            response.settings[name].value.extend(value if isinstance(value, list) else [str(value)])
        return response.SerializeToString()

    async def _log_settings(self, raw: bytes) -> bytes:
        request = parse(pb.LogSettingsRequest, raw)
        if request.settings:
            self._settings.update_logging({name: _choice(value) for name, value in request.settings.items()})
        response = pb.LogSettingsResponse()
        for name, value in self._settings.logging().items():
            _set_choice(response.settings[name], value)
        return response.SerializeToString()


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _check_repository(name: str) -> None:
    if name:
        raise Unimplemented("naming a repository is not supported: this server has one, leave the name empty")


def _no_shared_memory(kind: str) -> NoReturn:
    raise Unimplemented(f"{kind} shared memory is not supported: send tensors in the request")


def _choice(message: Any) -> Any:
    """The value set in a ``parameter_choice``, None when none is."""
    field = message.WhichOneof("parameter_choice")
    return None if field is None else getattr(message, field)


def _set_choice(target: pb.LogSettingsResponse.SettingValue, value: SettingValue) -> None:
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        target.uint32_param = value
    else:
        target.string_param = str(value)


def _parameters(
    request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest,
) -> dict[str, ParameterValue]:
    values: dict[str, ParameterValue] = {}
    for name, parameter in request.parameters.items():
        value = _choice(parameter)
        if value is None or isinstance(value, bytes):
            raise InvalidArgument(f"parameter {name[:64]!r} must be a boolean, integer or string")
        values[name] = value
    return values


def unload_dependents(parameters: Mapping[str, ParameterValue]) -> bool:
    """The one parameter of an unload; anything else in ``parameters`` is InvalidArgument."""
    unknown = sorted(set(parameters) - {"unload_dependents"})
    if unknown:
        raise InvalidArgument(f"unknown unload parameter {unknown[0][:64]!r}; known: unload_dependents")
    value = parameters.get("unload_dependents", False)
    if not isinstance(value, bool):
        raise InvalidArgument(f"parameter 'unload_dependents' must be true or false, got {str(value)[:64]!r}")
    return value
