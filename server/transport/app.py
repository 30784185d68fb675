"""The HTTP surface of the inference address: a Starlette app for everything but inference, which stands in front.

Every endpoint is a coroutine from a request to a plain value; ``_route`` turns values and errors into answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from server.codec import compression
from server.codec.checks import kind_of
from server.codec.process.client import CodecProcess
from server.errors import InvalidArgument, NotFound, TidegateError
from server.transport import feedback
from server.transport.answers import (
    Answer,
    BodyReader,
    HttpSettings,
    declared_length,
    error_answer,
    json_answer,
    metadata_of,
    parse_json,
    parse_json_object,
    too_large,
)
from server.transport.faults import Internal, MethodNotAllowed, check_repository_name, check_version, new_id
from server.transport.http_infer import InferApp
from server.transport.openapi import document
from server.transport.port import Services
from server.transport.rpc.unary import unload_dependents
from server.transport.status import StatusTable
from server.types import Buffer, ModelSpec, ParameterValue, Port, TensorSpec

Endpoint: TypeAlias = Callable[[Request], Awaitable[Answer]]

#: Bodies of control and settings routes are small.
_CONTROL_BYTES: Final = 1024 * 1024


def build_app(
    port: Port,
    services: Services,
    *,
    statuses: StatusTable | None = None,
    settings: HttpSettings | None = None,
    codec: CodecProcess | None = None,
) -> InferApp:
    """The ASGI app of the inference address. ``codec`` is closed by its owner."""
    statuses = statuses or StatusTable()
    settings = settings or HttpSettings()
    rest = Routes(services, statuses, settings).app()
    return InferApp(port, services.catalog, rest, statuses=statuses, settings=settings, codec=codec)


class Boundary:
    """Turns whatever an endpoint does into one JSON answer, and Starlette's own refusals too."""

    def __init__(self, statuses: StatusTable) -> None:
        self._statuses = statuses
        self._log = structlog.get_logger("tidegate.http")

    def route(self, path: str, endpoint: Endpoint, *methods: str) -> Route:
        return Route(path, _Guarded(self, endpoint, methods))

    def app(self, routes: list[Route]) -> Starlette:
        app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_route})
        app.router.redirect_slashes = False
        return app

    def refusal(self, error: TidegateError) -> Answer:
        return error_answer(error, self._statuses)

    def failure(self, path: str, error: Exception) -> Answer:
        """An unexpected exception: logged here, no text to the client."""
        id_ = new_id()
        self._log.error("request_failed", id=id_, protocol="http", path=path, exc_info=error)
        return self.refusal(Internal(id_))

    async def _no_route(self, request: Request, _: Exception) -> Response:
        answer = self.refusal(_no_such_path(request))
        return Response(b"".join(answer.chunks), answer.status, dict(_texts(answer)))


class _Guarded:
    """An endpoint as an ASGI object, so that Starlette leaves the methods to it."""

    def __init__(self, boundary: Boundary, endpoint: Endpoint, methods: tuple[str, ...]) -> None:
        self._boundary = boundary
        self._endpoint = endpoint
        self._methods = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = await self._answer(Request(scope, receive))
        await answer.send(send)

    async def _answer(self, request: Request) -> Answer:
        try:
            self._check(request)
            return await self._endpoint(request)
        except TidegateError as error:
            return self._boundary.refusal(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request
            return self._boundary.failure(request.url.path, error)

    def _check(self, request: Request) -> None:
        if b"%2f" in request.scope["raw_path"].lower():
            raise _no_such_path(request)  # an encoded slash belongs to a name, and no name has one
        method = "GET" if request.method == "HEAD" else request.method
        if method not in self._methods:
            raise MethodNotAllowed(request.method, ", ".join(self._methods))


def _no_such_path(request: Request) -> NotFound:
    return NotFound(f"no such path: {request.url.path[:256]}")


def _texts(answer: Answer) -> list[tuple[str, str]]:
    return [(name.decode(), value.decode()) for name, value in answer.headers]


class Routes:
    """Health, metadata, configuration, statistics, repository and settings."""

    def __init__(self, services: Services, statuses: StatusTable, settings: HttpSettings) -> None:
        self._catalog = services.catalog
        self._control = services.control
        self._settings = services.settings
        self._hear = services.hear
        self._boundary = Boundary(statuses)
        self._reader = BodyReader(settings)
        self._document = document(services.catalog.server_name(), services.catalog.server_version())

    def app(self) -> Starlette:
        route = self._boundary.route
        routes = [
            route("/v2", self._server, "GET"),
            route("/v2/", self._server, "GET"),
            route("/v2/health/live", self._live, "GET"),
            route("/v2/health/ready", self._ready, "GET"),
            route("/v2/models/stats", self._all_statistics, "GET"),
            route("/v2/trace/setting", self._trace, "GET", "POST"),
            route("/v2/logging", self._logging, "GET", "POST"),
            route("/v2/repository/index", self._index, "POST"),
            route("/v2/repository/models/{model}/load", self._load, "POST"),
            route("/v2/repository/models/{model}/unload", self._unload, "POST"),
            route("/openapi.json", self._openapi, "GET"),
            route("/v2/models/{model}/trace/setting", self._trace, "GET", "POST"),
        ]
        if self._hear is not None:
            routes.append(route("/v2/models/{model}/feedback", self._feedback, "POST"))
        for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                route(base, self._metadata, "GET"),
                route(f"{base}/ready", self._model_ready, "GET"),
                route(f"{base}/config", self._config, "GET"),
                route(f"{base}/stats", self._statistics, "GET"),
            ]
        return self._boundary.app(routes)

    async def _server(self, _: Request) -> Answer:
        catalog = self._catalog
        return json_answer(
            {"name": catalog.server_name(), "version": catalog.server_version(), "extensions": catalog.extensions()}
        )

    async def _live(self, _: Request) -> Answer:
        live = self._catalog.live()
        return json_answer({"live": live}, 200 if live else 503)

    async def _ready(self, _: Request) -> Answer:
        ready = self._catalog.ready()
        return json_answer({"ready": ready}, 200 if ready else 503)

    async def _openapi(self, _: Request) -> Answer:
        return json_answer(self._document)

    async def _metadata(self, request: Request) -> Answer:
        return json_answer(_metadata(*self._catalog.metadata(*_target(request))))

    async def _model_ready(self, request: Request) -> Answer:
        model, version = _target(request)
        ready = self._catalog.model_ready(model, version)
        return json_answer({"name": model, "ready": ready}, 200 if ready else 503)

    async def _config(self, request: Request) -> Answer:
        answer = json_answer(None)
        answer.chunks = [self._catalog.config_json(*_target(request))]
        return answer

    async def _statistics(self, request: Request) -> Answer:
        return json_answer({"model_stats": self._catalog.statistics(*_target(request))})

    async def _all_statistics(self, _: Request) -> Answer:
        return json_answer({"model_stats": self._catalog.statistics("", "")})

    async def _index(self, request: Request) -> Answer:
        ready_only = (await self._json(request)).get("ready", False)
        if not isinstance(ready_only, bool):
            raise InvalidArgument(f"'ready' must be true or false, got {str(ready_only)[:64]!r}")
        entries = self._catalog.repository_index(ready_only)
        return json_answer(
            [{"name": e.name, "version": e.version, "state": e.state, "reason": e.reason} for e in entries]
        )

    async def _load(self, request: Request) -> Answer:
        model = request.path_params["model"]
        check_repository_name(model)
        await self._control.load(model, _parameters(await self._json(request)))
        return json_answer({})

    async def _unload(self, request: Request) -> Answer:
        model = request.path_params["model"]
        check_repository_name(model)
        await self._control.unload(model, unload_dependents(_parameters(await self._json(request))))
        return json_answer({})

    async def _trace(self, request: Request) -> Answer:
        model = request.path_params.get("model", "")
        if model:
            self._catalog.model_ready(model, "")
        if request.method == "POST":
            self._settings.update_trace(model, await self._json(request))
        return json_answer(self._settings.trace(model))

    async def _logging(self, request: Request) -> Answer:
        if request.method == "POST":
            self._settings.update_logging(await self._json(request))
        return json_answer(self._settings.logging())

    async def _feedback(self, request: Request) -> Answer:
        model, hear = request.path_params["model"], self._hear
        items = feedback.parse(parse_json(await self._body(request)))
        self._catalog.model_ready(model, "")
        joined = 0 if hear is None else hear(model, items)
        return json_answer({"accepted": len(items), "joined": joined})

    async def _json(self, request: Request) -> dict[str, Any]:
        return parse_json_object(await self._body(request))

    async def _body(self, request: Request) -> Buffer:
        metadata = metadata_of(request.scope["headers"])
        length = declared_length(metadata)
        if length is not None and length > _CONTROL_BYTES:
            raise too_large(length, _CONTROL_BYTES)
        body = await self._reader.read(request.receive, _CONTROL_BYTES)
        return compression.decompress(body, metadata.get("content-encoding"), _CONTROL_BYTES)


def _target(request: Request) -> tuple[str, str]:
    version = request.path_params.get("version", "")
    check_version(version)
    return request.path_params["model"], version


def _tensor(spec: TensorSpec) -> dict[str, object]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _metadata(spec: ModelSpec, versions: tuple[str, ...]) -> dict[str, object]:
    return {
        "name": spec.name,
        "versions": versions,
        "platform": spec.platform,
        "inputs": [_tensor(tensor) for tensor in spec.inputs],
        "outputs": [_tensor(tensor) for tensor in spec.outputs],
    }


def _parameters(body: Mapping[str, Any]) -> dict[str, ParameterValue]:
    parameters = body.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidArgument(f"'parameters' must be an object, got {kind_of(parameters)}")
    for name, value in parameters.items():
        if not isinstance(value, bool | int | float | str):
            raise InvalidArgument(f"parameter {name[:64]!r} must be a boolean, number or string")
    return parameters
