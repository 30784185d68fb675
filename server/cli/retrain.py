"""``tidegate retrain``: ask a running server for a training, or show what became of those that were asked for."""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import click

from server.cli import show
from server.cli.client import TOKEN, URL, read_json
from server.cli.registry import ACTOR, AS_JSON
from server.errors import ConfigError, TidegateError
from server.state import operator

_TIMEOUT_S: Final = 20
_MOST_BYTES: Final = 1 << 24
_COLUMNS: Final = ("trigger_id", "model", "state", "since", "kinds", "champion", "version", "detail")


@click.command()
@click.argument("model", required=False)
@click.option("--reason", metavar="TEXT", help="Why; it stands in the audit and in the event.")
@click.option("--list", "listing", is_flag=True, help="Show jobs, of MODEL or of all, and ask for nothing.")
@URL
@TOKEN
@ACTOR
@AS_JSON
def retrain(
    model: str | None, reason: str | None, listing: bool, url: str, token: str | None, actor: str | None, as_json: bool
) -> None:
    """Ask for a training of MODEL now: by its configured sinks, whatever the cool-down and the budget say.

    Refused while a rollout of MODEL or another of its jobs is open.
    """
    if listing:
        jobs = read_json(url, "/admin/v1/retrains", token)["retrains"]
        _show([job for job in jobs if model in (None, job["model"])], as_json=as_json)
        return
    if not model or not reason:
        raise click.UsageError("name the MODEL and say why with --reason TEXT, or say --list")
    asked = {"reason": reason, "actor": actor or operator()}
    job = _post(url, f"/admin/v1/retrains/{quote(model, safe='')}", asked, token)
    if as_json:
        show.as_json(job)
    else:
        click.echo(f"{job['trigger_id']}  {job['model']}  {job['state']}")


def _show(jobs: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        show.as_json(jobs)
        return
    rows = [[", ".join(cell) if isinstance(cell := job[key], list) else cell for key in _COLUMNS] for job in jobs]
    show.table([name.upper() for name in _COLUMNS], rows)


def _post(address: str, path: str, body: dict[str, str], token: str | None) -> dict[str, Any]:
    """The JSON object that a POST is answered with. Raises ConfigError for no address, else TidegateError."""
    url = (address if "://" in address else f"http://{address}").rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url takes the http or https URL of an admin address, got {address!r}")
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    request = Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310 - scheme checked above
    try:
        with urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - scheme checked above
            return dict(json.loads(answer.read(_MOST_BYTES)))
    except HTTPError as error:
        raise TidegateError(f"{url} answers {error.code}: {_reason(error)}") from error
    except (URLError, HTTPException, OSError, ValueError, TypeError) as error:
        raise TidegateError(f"{url} cannot be asked: {error}") from error


def _reason(error: HTTPError) -> str:
    """What the server says, else what the status means."""
    try:
        return str(json.loads(error.read(1 << 16))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)
