"""The admin listener: loopback by default. Changes need the bearer token; so does reading when it listens elsewhere.

What the routes show and change is handed in; a route whose part was not handed in does not exist.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Protocol, TypeAlias

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.codec import compression
from server.config.load import MAX_BYTES
from server.config.problems import InvalidConfig, Problem, UnloadableConfig
from server.errors import ConfigError, InvalidArgument, ModelLoadError, NotFound
from server.history import Stale
from server.pages import drift_page
from server.transport.admin_retrains import RetrainViews, retrain_routes
from server.transport.admin_rollouts import RolloutViews, rollout_routes
from server.transport.answers import (
    Answer,
    BodyReader,
    Headers,
    HttpSettings,
    declared_length,
    error_answer,
    json_answer,
    metadata_of,
    too_large,
)
from server.transport.app import Boundary, Endpoint
from server.transport.hints import RegistryHints
from server.transport.port import Catalog
from server.transport.status import StatusTable, safe_text

Json: TypeAlias = dict[str, Any]

_ACTOR_CHARS: Final = 128
_REASON_CHARS: Final = 1024
_MOST_ROWS: Final = 1000
_DEFAULT_ROWS: Final = 50
_NAME_CHARS: Final = 100
#: Highest number that SQLite can hold.
_MOST_GENERATION: Final = 2**63 - 1

_YAML: Final = (b"content-type", b"application/yaml")
_NOT_KEPT: Final = (b"cache-control", b"no-store")
_NOT_GUESSED: Final = (b"x-content-type-options", b"nosniff")
#: The page states its own policy on what it may load; only a header can say that it is not to be framed.
_PAGE: Final = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"frame-ancestors 'none'"),
    _NOT_GUESSED,
)


class Reconfigure(Protocol):
    """The applied configuration, and its change by one operator at a time.

    ``apply`` and ``rollback`` take turns by one lock, and ``apply`` compares ``expected`` with the applied generation
    *inside* it, before it does anything else. So of two operators who both saw generation 7 and both apply, one makes
    generation 8 and the other gets Stale(7, 8), even when the second waited while the first was loading models. A
    comparison before the lock would let both through. ``generation`` and ``text`` change together, without an await
    between, so that who reads one after the other without awaiting gets a pair that belongs together.
    """

    def generation(self) -> int:
        """The number of the applied configuration; 0 before the first."""
        ...

    def text(self) -> bytes:
        """The text that is applied now."""
        ...

    async def plan(self, text: bytes) -> Json:
        """What applying ``text`` would do. Changes nothing. Raises ConfigError."""
        ...

    async def apply(self, text: bytes, *, expected: int | None, actor: str, reason: str) -> Json:
        """Apply ``text``; answers ``{"generation": number, "plan": {...}}``, the number being the new one's.

        ``expected`` None: whatever is applied. Raises Stale, ConfigError, ModelLoadError, and then nothing has changed.
        """
        ...

    async def rollback(self, to: int, *, actor: str, reason: str) -> Json:
        """Apply the text and the digests of generation ``to`` as a new generation; answers as ``apply`` does.

        Raises NotFound for a generation that is unknown or too old, and what ``apply`` raises.
        """
        ...

    def history(self, limit: int) -> Sequence[Mapping[str, Any]]:
        """The last ``limit`` generations, newest first. Called off the event loop, as it may wait for the disk."""
        ...


@dataclass(slots=True, frozen=True)
class AdminViews:
    """What can be read beside the configuration; each answers what JSON can hold. None: there is no such route."""

    #: The last events of the audit trail, at most so many, oldest first. Called off the event loop.
    audit: Callable[[int], Sequence[Mapping[str, Any]]] | None = None
    #: The last deliveries of events to other systems, at most so many, newest first. Called off the event loop.
    hooks: Callable[[int], Sequence[Mapping[str, Any]]] | None = None
    shadows: Callable[[], Mapping[str, Any]] | None = None
    experiments: Callable[[], Mapping[str, Any]] | None = None
    #: One experiment by its id; raises NotFound.
    experiment: Callable[[str], Mapping[str, Any]] | None = None
    #: What is watched. The monitors' views are called off the event loop, as they wait for the counting thread.
    monitors: Callable[[], Mapping[str, Any]] | None = None
    #: How things are with a registry that is another server's.
    registry: Callable[[], Mapping[str, Any]] | None = None
    #: The drift document of a model's version, as ``server.pages.drift`` describes it; raises NotFound.
    monitor: Callable[[str, str], Mapping[str, Any]] | None = None
    #: The captured rows of a model's version as an npz file; raises NotFound.
    monitor_sample: Callable[[str, str], bytes] | None = None
    rollouts: RolloutViews | None = None
    retrains: RetrainViews | None = None


def is_loopback(host: str) -> bool:
    """Is a listener on this host reachable from this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def admin_app(
    catalog: Catalog,
    *,
    token: str | None,
    loopback: bool,
    reconfigure: Reconfigure | None = None,
    views: AdminViews | None = None,
    hints: RegistryHints | None = None,
    statuses: StatusTable | None = None,
    settings: HttpSettings | None = None,
) -> ASGIApp:
    """The routes under ``/admin/v1``. Without a token nothing can be changed, and off loopback nothing read."""
    statuses, settings = statuses or StatusTable(), settings or HttpSettings()
    boundary = Boundary(statuses)
    routes = [boundary.route("/admin/v1/models", _models(catalog), "GET")]
    if reconfigure is not None:
        routes += _ConfigRoutes(reconfigure, statuses, settings).routes(boundary)
    routes += _view_routes(boundary, views or AdminViews(), settings)
    guarded = BearerGuard(boundary.app(routes), token=token, open_reading=loopback)
    return guarded if hints is None else hints.in_front_of(guarded, boundary)


class BearerGuard:
    """Asks for ``Authorization: Bearer TOKEN`` on every change, and on reading unless that is open."""

    def __init__(self, app: ASGIApp, *, token: str | None, open_reading: bool) -> None:
        self._app = app
        self._token = token.encode() if token else b""
        self._open_reading = open_reading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = json_answer({"error": "this needs the admin token: Authorization: Bearer TOKEN"}, 401)
        refusal.headers.append((b"www-authenticate", b"Bearer"))
        await refusal.send(send)

    def _allowed(self, scope: Scope) -> bool:
        if self._open_reading and scope["method"] in ("GET", "HEAD"):
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if not self._token or len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self._token)


class _ConfigRoutes:
    """Reading, planning, applying and rolling back the configuration."""

    def __init__(self, reconfigure: Reconfigure, statuses: StatusTable, settings: HttpSettings) -> None:
        self._reconfigure = reconfigure
        self._statuses = statuses
        self._reader = BodyReader(settings)

    def routes(self, boundary: Boundary) -> list[Route]:
        return [
            boundary.route("/admin/v1/config", self._config, "GET", "POST"),
            boundary.route("/admin/v1/config:rollback", self._refusals_told(self._rollback), "POST"),
            boundary.route("/admin/v1/config/history", self._history, "GET"),
        ]

    async def _config(self, request: Request) -> Answer:
        change = self._refusals_told(self._post)
        return await (change(request) if request.method == "POST" else self._get(request))

    async def _get(self, request: Request) -> Answer:
        _query(request)
        # Read without an await between: the text is that generation's.
        generation, text = self._reconfigure.generation(), self._reconfigure.text()
        return Answer(200, [_YAML, _NOT_KEPT, _etag(generation)], [text])

    async def _post(self, request: Request) -> Answer:
        dry_run = _flag(_query(request, "dry_run"), "dry_run")
        metadata = metadata_of(request.scope["headers"])
        expected = _if_match(metadata)
        actor, reason = _who(metadata)
        text = await self._body(request, metadata)
        if dry_run:
            return await self._plan(text, expected)
        return _changed(await self._reconfigure.apply(text, expected=expected, actor=actor, reason=reason))

    async def _plan(self, text: bytes, expected: int | None) -> Answer:
        generation = self._reconfigure.generation()
        if expected is not None and expected != generation:
            raise Stale(expected, generation)
        plan = await self._reconfigure.plan(text)
        return json_answer({"generation": generation, "dry_run": True, "plan": plan})

    async def _rollback(self, request: Request) -> Answer:
        to = _number(_query(request, "to"), "to", _MOST_GENERATION)
        metadata = metadata_of(request.scope["headers"])
        if "if-match" in metadata:
            raise InvalidArgument("If-Match is not taken here: a rollback names its generation by ?to=")
        actor, reason = _who(metadata)
        return _changed(await self._reconfigure.rollback(to, actor=actor, reason=reason))

    async def _history(self, request: Request) -> Answer:
        limit = _number(_query(request, "limit"), "limit", _MOST_ROWS, _DEFAULT_ROWS)
        rows = await asyncio.to_thread(self._reconfigure.history, limit)
        return json_answer({"generation": self._reconfigure.generation(), "history": list(rows)})

    async def _body(self, request: Request, metadata: Mapping[str, str]) -> bytes:
        length = declared_length(metadata)
        if length is not None and length > MAX_BYTES:
            raise too_large(length, MAX_BYTES)
        body = await self._reader.read(request.receive, MAX_BYTES)
        text = bytes(compression.decompress(body, metadata.get("content-encoding"), MAX_BYTES))
        if not text.strip():
            raise InvalidArgument("the request body must be the whole configuration, got an empty one")
        return text

    def _refusals_told(self, endpoint: Endpoint) -> Endpoint:
        """``endpoint`` with what its errors know beyond a text: the applied generation, or each mistake's place."""

        async def told(request: Request) -> Answer:
            try:
                return await endpoint(request)
            except Stale as error:
                body = {"error": error.message, "generation": error.actual}
                # The one status that the table cannot have: it answers a condition of HTTP, not a state of the server.
                return _with_headers(json_answer(body, 412), [_etag(error.actual)])
            except (ConfigError, ModelLoadError) as error:
                body = {"error": safe_text(error.message), "problems": _problems(error)}
                return json_answer(body, error_answer(error, self._statuses).status)

        return told


def _models(catalog: Catalog) -> Endpoint:
    async def models(_: Request) -> Answer:
        index = catalog.repository_index(ready_only=False)
        rows = [{"name": e.name, "version": e.version, "state": e.state, "reason": e.reason} for e in index]
        return json_answer({"models": rows})

    return models


def _view_routes(boundary: Boundary, views: AdminViews, settings: HttpSettings) -> list[Route]:
    routes = []
    if views.rollouts is not None:
        routes += rollout_routes(boundary, views.rollouts, _who, _if_match)
    if views.retrains is not None:
        routes += retrain_routes(boundary, views.retrains, BodyReader(settings), _query)
    if views.audit is not None:
        routes.append(boundary.route("/admin/v1/audit", _rows("events", views.audit), "GET"))
    if views.hooks is not None:
        routes.append(boundary.route("/admin/v1/hooks", _rows("hooks", views.hooks), "GET"))
    if views.shadows is not None:
        routes.append(boundary.route("/admin/v1/shadows", _shown(views.shadows), "GET"))
    if views.experiments is not None:
        routes.append(boundary.route("/admin/v1/experiments", _shown(views.experiments), "GET"))
    if views.experiment is not None:
        routes.append(boundary.route("/admin/v1/experiments/{id}", _shown_by_id(views.experiment), "GET"))
    if views.registry is not None:
        routes.append(boundary.route("/admin/v1/registry", _shown(views.registry), "GET"))
    if views.monitors is not None:
        routes.append(boundary.route("/admin/v1/monitors", _shown_off_loop(views.monitors), "GET"))
    if views.monitor is not None:
        shown = _monitor(views.monitor, views.monitor_sample)
        routes.append(boundary.route("/admin/v1/monitors/{model}/{version}", shown, "GET"))
    return routes


def _rows(name: str, newest: Callable[[int], Sequence[Mapping[str, Any]]]) -> Endpoint:
    async def rows(request: Request) -> Answer:
        limit = _number(_query(request, "limit"), "limit", _MOST_ROWS, _DEFAULT_ROWS)
        return json_answer({name: list(await asyncio.to_thread(newest, limit))})

    return rows


def _shown(view: Callable[[], Mapping[str, Any]]) -> Endpoint:
    async def shown(_: Request) -> Answer:
        return json_answer(view())

    return shown


def _shown_by_id(view: Callable[[str], Mapping[str, Any]]) -> Endpoint:
    async def shown(request: Request) -> Answer:
        return json_answer(view(request.path_params["id"]))

    return shown


def _shown_off_loop(view: Callable[[], Mapping[str, Any]]) -> Endpoint:
    async def shown(request: Request) -> Answer:
        _query(request)
        return json_answer(await asyncio.to_thread(view))

    return shown


def _monitor(view: Callable[[str, str], Mapping[str, Any]], sample: Callable[[str, str], bytes] | None) -> Endpoint:
    """One version's drift: JSON, the page for people, or the captured rows. Everything is made off the event loop."""

    def as_json(model: str, version: str) -> Answer:
        return json_answer(view(model, version))

    def as_page(model: str, version: str) -> Answer:
        return Answer(200, [*_PAGE, _NOT_KEPT], [drift_page(view(model, version)).encode()])

    def as_npz(model: str, version: str) -> Answer:
        if sample is None:
            raise NotFound("no rows are captured here")
        return Answer(200, [*_npz_headers(model, version), _NOT_KEPT], [sample(model, version)])

    formats = {"json": as_json, "html": as_page, "npz": as_npz}

    async def shown(request: Request) -> Answer:
        wanted = _query(request, "format") or "json"
        if wanted not in formats:
            raise InvalidArgument(f"format must be one of {', '.join(formats)}, got {wanted[:64]!r}")
        model, version = request.path_params["model"], request.path_params["version"]
        return await asyncio.to_thread(formats[wanted], model, version)

    return shown


def _npz_headers(model: str, version: str) -> Headers:
    """The file's name keeps of model and version what is a safe name everywhere."""
    name = "".join([char if char.isascii() and char.isalnum() else "_" for char in f"{model}_{version}"])[:_NAME_CHARS]
    disposition = f'attachment; filename="{name}.npz"'
    return [(b"content-type", b"application/x-npz"), (b"content-disposition", disposition.encode()), _NOT_GUESSED]


def _changed(result: Json) -> Answer:
    return _with_headers(json_answer(result), [_etag(result["generation"])])


def _with_headers(answer: Answer, headers: Headers) -> Answer:
    answer.headers.extend(headers)
    return answer


def _etag(generation: int) -> tuple[bytes, bytes]:
    return b"etag", b'"%d"' % generation


def _problems(error: ConfigError | ModelLoadError) -> list[Json]:
    """``{line, column, key, message}`` each; line and column are 0 for what has no place in the text."""
    known = error.problems if isinstance(error, InvalidConfig | UnloadableConfig) else []
    found = known or [Problem("", 0, 0, "", error.message)]
    return [{name: value for name, value in asdict(problem).items() if name != "path"} for problem in found]


def _query(request: Request, known: str = "") -> str | None:
    """The value of the one parameter that the route knows. Others are refused: ``?dryrun=1`` must not apply."""
    items = request.query_params.multi_items()
    unknown = [name for name, _ in items if name != known]
    if unknown:
        wanted = f"wanted {known}" if known else "none is known here"
        raise InvalidArgument(f"unknown query parameter {unknown[0][:64]!r}: {wanted}")
    if len(items) > 1:
        raise InvalidArgument(f"query parameter {known} is given {len(items)} times")
    return items[0][1] if items else None


def _flag(text: str | None, name: str) -> bool:
    if text not in (None, "0", "1", "false", "true"):
        raise InvalidArgument(f"{name} must be 0 or 1, got {text[:64]!r}")
    return text in ("1", "true")


def _number(text: str | None, name: str, most: int, default: int | None = None) -> int:
    """A whole number from 1 to ``most``."""
    if text is None and default is not None:
        return default
    number = _decimal(text or "")
    if number is None or not 1 <= number <= most:
        raise InvalidArgument(f"{name} must be a whole number from 1 to {most}, got {(text or '')[:64]!r}")
    return number


def _decimal(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 19 else None


def _if_match(metadata: Mapping[str, str]) -> int | None:
    """The generation that the change was made for: 7 or "7". None: no matter which (``*``, or no header)."""
    given = metadata.get("if-match")
    if given is None or given.strip() == "*":
        return None
    text = given.strip()
    bare = text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text
    generation = _decimal(bare)
    if generation is None:
        raise InvalidArgument(f'If-Match must be one generation such as 7 or "7", got {given[:64]!r}')
    return generation


def _who(metadata: Mapping[str, str]) -> tuple[str, str]:
    """Actor and reason as the audit will name them."""
    actor = _plain(metadata, "x-tidegate-actor", _ACTOR_CHARS) or "admin"
    return actor, _plain(metadata, "x-tidegate-reason", _REASON_CHARS)


def _plain(metadata: Mapping[str, str], name: str, most: int) -> str:
    """A header as printable text: UTF-8, which HTTP hands on as Latin-1."""
    try:
        text = metadata.get(name, "").encode("latin-1").decode()
    except UnicodeDecodeError:
        raise InvalidArgument(f"header {name} must be UTF-8 text") from None
    if len(text) > most or not text.isprintable():
        raise InvalidArgument(f"header {name} must be at most {most} printable characters, got {text[:64]!r}")
    return text.strip()
