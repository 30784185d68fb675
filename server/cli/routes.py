"""``tidegate explain-route`` and the plan of ``check-config --against``: what a configuration would do."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from router.compiled import CompiledRoutes, is_version
from router.decision import RouteDecision, RouteQuery
from router.errors import BadVersion, KeyMissing
from server.cli import show
from server.cli.client import bearer
from server.cli.rollouts import STEP_HEADINGS, step_cells
from server.config.load import load_config, parse_config
from server.config.plan import ReloadPlan, plan_reload
from server.config.rollouts import compile_rollouts
from server.config.routing import Reference, RoutingSpec, compile_all, expecting
from server.errors import ConfigError, NotFound, TidegateError

_HEADER: Final = "header:"
_PARAMETER: Final = "parameter:"
#: How many names an error lists.
_SHOWN: Final = 20


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
        raise click.UsageError(f"{file} has no model '{model}'; it has {_some(specs)}")
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


def _some(names: Collection[str]) -> str:
    """Names for an error: the first few, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(islice(names, _SHOWN)) + more if names else "none"


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


class NotAllowed(TidegateError):
    """The server wants a token, or another one."""


@dataclass(slots=True, frozen=True)
class RunningText:
    """The configuration in force, and the server's own word on what another text would do: its dry run.

    ``dry_run`` raises NotAllowed without the admin token.
    """

    text: str
    dry_run: Callable[[bytes], Mapping[str, Any]]


@dataclass(slots=True, frozen=True)
class PlanAgainst:
    """What serving a file would do to a server. ``plan`` is reckoned here, and where rollouts are concerned the server
    has ``told``: it alone knows how they stand and how much traffic they have. ``untold``: why it did not tell."""

    plan: ReloadPlan
    told: Mapping[str, Any] = field(default_factory=dict)
    untold: str = ""

    @property
    def rollouts(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """By models entry, the steps of each rollout that would begin, as they are expected to go."""
        return dict(self.told.get("rollouts", {}))

    @property
    def refusals(self) -> tuple[Mapping[str, Any], ...]:
        """What the server speaks against and the plan alone does not."""
        ours = self.plan.as_dict()["refusals"]
        return tuple(refusal for refusal in self.told.get("refusals", ()) if refusal not in ours)

    @property
    def allowed(self) -> bool:
        return self.plan.allowed and not self.refusals

    def as_dict(self) -> dict[str, Any]:
        """Plain values, in the form of the dry run."""
        found = self.plan.as_dict()
        refusals = [*found["refusals"], *self.refusals]
        return found | {"allowed": self.allowed, "refusals": refusals, "rollouts": self.rollouts}


def plan_against(file: Path, running: RunningText | None) -> PlanAgainst:
    """What serving ``file`` would do to a server (None: to one that serves nothing yet).

    Relative paths in both texts start at the file's folder. Raises InvalidConfig for mistakes in either.
    """
    new = load_config(file)
    if running is None:
        return PlanAgainst(plan_reload(None, new))
    plan = plan_reload(parse_config(running.text, path="<running>", folder=file.parent), new)
    if not compile_rollouts(new):
        return PlanAgainst(plan)
    try:
        return PlanAgainst(plan, running.dry_run(file.read_bytes()))
    except NotAllowed as error:
        return PlanAgainst(plan, untold=error.message)


def running_text(address: str, token: str | None) -> RunningText | None:
    """The configuration in force at an admin address (URL or HOST:PORT); None when it runs without a file."""
    url = (address if "://" in address else f"http://{address}").rstrip("/") + "/admin/v1/config"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--against takes the http or https URL of an admin address, got {address!r}")
    try:
        text = _ask(url, token).decode()
    except NotFound:
        return None
    except UnicodeDecodeError as error:
        raise TidegateError(f"{url} cannot be read: {error}") from error
    return RunningText(text, lambda body: _dry_run(url, token, body))


def _dry_run(url: str, token: str | None, body: bytes) -> Mapping[str, Any]:
    answer = _ask(f"{url}?dry_run=1", token, body)
    try:
        return dict(json.loads(answer)["plan"])
    except (ValueError, KeyError, TypeError) as error:
        raise TidegateError(f"{url} answers no plan: {error!r}") from error


def _ask(url: str, token: str | None, body: bytes | None = None) -> bytes:
    headers = bearer(token)
    try:
        with urlopen(Request(url, body, headers), timeout=20) as answer:  # noqa: S310 - scheme checked by the caller
            return bytes(answer.read())
    except HTTPError as error:
        kind = _REFUSED.get(error.code, TidegateError)
        with error:  # it holds the connection
            raise kind(f"{url} answers {error.code}: {_reason(error)}") from error
    except (URLError, OSError) as error:
        raise TidegateError(f"{url} cannot be read: {error}") from error


_REFUSED: Final[Mapping[int, type[TidegateError]]] = {
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.UNAUTHORIZED: NotAllowed,
    HTTPStatus.FORBIDDEN: NotAllowed,
}


def _reason(error: HTTPError) -> str:
    """What the server says, else what the status means."""
    try:
        return str(json.loads(error.read(1 << 16))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


def show_plan(found: PlanAgainst, *, as_json: bool) -> int:
    """Print a plan; the exit code: 0 when it may be carried out, 2 when it is refused."""
    if as_json:
        show.as_json(found.as_dict())
        return 0 if found.allowed else 2
    click.echo("\n".join(found.plan.lines()))
    if found.rollouts:
        click.echo("rollouts, if candidates are as good as stable and traffic stays as it is:")
        rows = [[name, *step_cells(step)] for name, steps in found.rollouts.items() for step in steps]
        show.table(["MODEL", *STEP_HEADINGS], rows)
    if found.untold:
        click.echo(f"how long the steps of rollouts take is not known: {found.untold}")
    for refusal in found.refusals:
        click.echo(f"refused: {refusal['reason']}")
    return 0 if found.allowed else 2
