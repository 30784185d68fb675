"""``tidegate explain-route`` and the plan of ``check-config --against``: what a configuration would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from router.compiled import CompiledRoutes, is_version
from router.errors import BadVersion, KeyMissing
from router.types import RouteDecision, RouteQuery
from server.cli import show
from server.config.load import load_config, parse_config
from server.config.plan import ReloadPlan, plan_reload
from server.config.routing import Reference, RoutingSpec, compile_all, expecting
from server.errors import ConfigError, TidegateError

_HEADER: Final = "header:"
_PARAMETER: Final = "parameter:"


@dataclass(slots=True, frozen=True)
class Explanation:
    """Where a request goes. ``decision`` is None when chance decides, or when the request is ``refused``."""

    steps: tuple[str, ...]
    decision: RouteDecision[Reference] | None = None
    refused: str = ""


@click.command("explain-route")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="The name that the request asks for.")
@click.option("--header", "headers", multiple=True, metavar="K=V", help="A header of the request; may be repeated.")
@click.option("--parameter", "parameters", multiple=True, metavar="K=V", help="A parameter; may be repeated.")
@click.option("--key", default="", help="The routing key, put where the model looks for it first.")
@click.option("--version", default="", help="The version that the request names.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain_route(
    file: Path, model: str, headers: Sequence[str], parameters: Sequence[str], key: str, version: str, as_json: bool
) -> None:
    """Say which version would answer a request under the configuration in FILE, and why."""
    specs = compile_all(load_config(file))
    if model not in specs:
        raise click.UsageError(f"{file} has no model '{model}'; it has {', '.join(specs) or 'none'}")
    metadata = {name.lower(): value for name, value in _pairs("--header", headers).items()}
    query = RouteQuery(model, version, metadata, dict(_pairs("--parameter", parameters)), "")
    if key:
        _put_key(specs[model], query, key)
    found = explain(specs[model], query)
    if as_json:
        show.as_json(_as_dict(found))
    else:
        click.echo("\n".join(found.steps))


def explain(spec: RoutingSpec, query: RouteQuery) -> Explanation:
    """The steps of one decision, and its end. Versions are the file's: references, not what an alias points at."""
    routes = CompiledRoutes(spec.name, expecting(spec, query.version))
    try:
        steps = tuple(routes.explain(query))
        decision = routes.decide(query, 0, 0)
    except KeyMissing as error:
        return Explanation((f"refused: {error}",), refused=str(error))
    except BadVersion:
        return Explanation((f"refused: {_not_served(spec, query.version)}",), refused=_not_served(spec, query.version))
    if query.version and decision.target == Reference(spec.model, query.version):
        text = _not_served(spec, query.version)
        if text:
            return Explanation((*steps[:-1], f"refused: {text}"), refused=text)
    by_chance = decision.reason == "split" and decision.unit == "request"
    return Explanation(steps, None if by_chance else decision)


def _not_served(spec: RoutingSpec, version: str) -> str:
    """Why a version cannot be asked for; "" when it can, or when only the server knows."""
    if not is_version(version):
        return f"'{version}' is no version: wanted a positive integer"
    if not spec.versions or version in spec.versions:
        return ""
    return f"version {version} is not among those of '{spec.model}' ({', '.join(spec.versions)})"


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, mark, value = text.partition("=")
        if not mark or not name:
            raise click.UsageError(f"{option}: wanted NAME=VALUE, got '{text}'")
        pairs[name] = value
    return pairs


def _put_key(spec: RoutingSpec, query: RouteQuery, key: str) -> None:
    """Give the request its key at the first place where the model looks."""
    sources = spec.routes.key.sources
    if not sources:
        raise click.UsageError(f"--key: '{spec.name}' has no key; say where it is found with key: {{from: [...]}}")
    first = sources[0]
    if first.startswith(_HEADER):
        query.metadata = {**query.metadata, first.removeprefix(_HEADER).lower(): key}
    elif first.startswith(_PARAMETER):
        query.parameters = {**query.parameters, first.removeprefix(_PARAMETER): key}
    else:
        query.request_id = key


def _as_dict(found: Explanation) -> dict[str, Any]:
    return {
        "steps": list(found.steps),
        "refused": found.refused or None,
        "decision": None if found.decision is None else _decision(found.decision),
    }


def _decision(decision: RouteDecision[Reference]) -> dict[str, Any]:
    return {
        "model": decision.model,
        "version": decision.version,
        "arm": decision.arm,
        "reason": decision.reason,
        "counted": decision.counted,
        "unit": decision.unit,
        "propensity": decision.propensity,
        "fallback": None if decision.fallback is None else str(decision.fallback.target),
    }


# --- check-config --against -------------------------------------------------------------------------------------------


def plan_against(file: Path, running: str | None) -> ReloadPlan:
    """What serving ``file`` would do to a server that runs ``running``, the text of its configuration (None: none).

    Relative paths in both start at the file's folder. Raises InvalidConfig for mistakes in either.
    """
    new = load_config(file)
    old = None if running is None else parse_config(running, path="<running>", folder=file.parent)
    return plan_reload(old, new)


def running_text(address: str, token: str | None) -> str | None:
    """The configuration in force at an admin address (URL or HOST:PORT); None when it runs without a file."""
    url = (address if "://" in address else f"http://{address}").rstrip("/") + "/admin/v1/config"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--against takes the http or https URL of an admin address, got {address!r}")
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urlopen(Request(url, headers=headers), timeout=20) as answer:  # noqa: S310 - scheme checked above
            return str(answer.read().decode())
    except HTTPError as error:
        if error.code == HTTPStatus.NOT_FOUND:
            return None
        raise TidegateError(f"{url} answers {error.code}: {error.reason}") from error
    except (URLError, OSError, UnicodeDecodeError) as error:
        raise TidegateError(f"{url} cannot be read: {error}") from error


def show_plan(plan: ReloadPlan, *, as_json: bool) -> int:
    """Print a plan; the exit code: 0 when it may be carried out, 2 when it is refused."""
    if as_json:
        show.as_json(plan.as_dict())
    else:
        click.echo("\n".join(plan.lines()))
    return 0 if plan.allowed else 2
