"""``grpc.reflection.v1`` and ``v1alpha``: one question in, one answer out, from our own descriptor pool.

The two versions have the same messages under two package names, so each is served by its own instance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.descriptor import FileDescriptor

from server._pb import feedback_pb2, health_pb2, inference_pb2, reflection_pb2, reflection_v1alpha_pb2
from server.transport.rpc.unary import parse

V1_PATH: Final = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
V1ALPHA_PATH: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
_INVALID_ARGUMENT: Final = 3
_NOT_FOUND: Final = 5

_ROOTS: Final = (inference_pb2, feedback_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2)


def _with_imports(file: FileDescriptor) -> Iterator[FileDescriptor]:
    """``file`` first, then what it imports, each once."""
    seen: set[str] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current.name not in seen:
            seen.add(current.name)
            waiting.extend(current.dependencies)
            yield current


class Reflection:
    """Answers for every served service; ``module`` is the generated module of the protocol version to speak."""

    def __init__(self, module: Any) -> None:
        self._pb = module
        self._pool = inference_pb2.DESCRIPTOR.pool
        roots = [root.DESCRIPTOR for root in _ROOTS]
        self._services = sorted(service.full_name for root in roots for service in root.services_by_name.values())

    def answer(self, raw: bytes) -> bytes:
        """Raises InvalidArgument for bytes that are no question; what is not found is an answer of its own."""
        request = parse(self._pb.ServerReflectionRequest, raw)
        response = self._pb.ServerReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        try:
            self._fill(response, request, kind)
        except KeyError:
            _fail(response, _NOT_FOUND, f"{kind} not found")
        encoded: bytes = response.SerializeToString()
        return encoded

    def _fill(self, response: Any, request: Any, kind: str | None) -> None:
        match kind:
            case "list_services":
                for name in self._services:
                    response.list_services_response.service.add(name=name)
            case "file_by_filename":
                self._add_files(response, self._pool.FindFileByName(request.file_by_filename))
            case "file_containing_symbol":
                self._add_files(response, self._file_of(request.file_containing_symbol))
            case "file_containing_extension":
                extension = request.file_containing_extension
                message = self._pool.FindMessageTypeByName(extension.containing_type)
                found = self._pool.FindExtensionByNumber(message, extension.extension_number)
                self._add_files(response, self._pool.FindFileContainingSymbol(found.full_name))
            case "all_extension_numbers_of_type":
                message = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
                numbers = response.all_extension_numbers_response
                numbers.base_type_name = message.full_name
                numbers.extension_number.extend(found.number for found in self._pool.FindAllExtensions(message))
            case _:
                _fail(response, _INVALID_ARGUMENT, "the request asks nothing: one of message_request must be set")

    def _file_of(self, symbol: str) -> FileDescriptor:
        """The pool's own search leaves out methods."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            return self._pool.FindServiceByName(service).methods_by_name[method].containing_service.file

    def _add_files(self, response: Any, file: FileDescriptor) -> None:
        response.file_descriptor_response.file_descriptor_proto.extend(
            found.serialized_pb for found in _with_imports(file)
        )


def _fail(response: Any, code: int, text: str) -> None:
    response.error_response.error_code = code
    response.error_response.error_message = text


def v1() -> Reflection:
    return Reflection(reflection_pb2)


def v1alpha() -> Reflection:
    return Reflection(reflection_v1alpha_pb2)
