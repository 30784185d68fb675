"""Reading from the admin address of a running server, and giving it orders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import click

from server.admin_token import NAME
from server.errors import ConfigError, NotFound, TidegateError

_TIMEOUT_S: Final = 20
_MOST_BYTES: Final = 1 << 30

URL = click.option(
    "--url", default="127.0.0.1:8003", show_default=True, metavar="URL", help="Admin address of the server."
)
#: Of commands that change something: reading asks for the token on other addresses than a loopback one only.
STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    default=Path("tidegate-state"),
    show_default=True,
    help="Where the server's admin token lies, when none is given.",
)
TOKEN = click.option("--token", envvar="TIDEGATE_ADMIN_TOKEN", help="Bearer token, when reading asks for one.")


def read(
    address: str,
    path: str,
    token: str | None,
    *,
    method: str = "GET",
    told: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> bytes:
    """The body at a path of an admin address (URL or HOST:PORT); ``told``: further headers.

    Raises ConfigError for no address or no token, NotFound with the server's reason, TidegateError for anything else.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/") + path
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url takes the http or https URL of an admin address, got {address!r}")
    headers = bearer(token)
    # UTF-8, which HTTP hands on as Latin-1.
    headers |= {name: value.encode().decode("latin-1") for name, value in (told or {}).items()}
    try:
        request = Request(url, body, headers, method=method)  # noqa: S310 - scheme checked above
        with urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
            return bytes(answer.read(_MOST_BYTES))
    except HTTPError as error:
        kind = NotFound if error.code == HTTPStatus.NOT_FOUND else TidegateError
        with error:  # it holds the connection
            raise kind(f"{url} answers {error.code}: {_reason(error)}") from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise TidegateError(f"{url} cannot be read: {error}") from error


def read_json(address: str, path: str, token: str | None) -> dict[str, Any]:
    """The JSON object at a path; raises what ``read`` raises."""
    return _object(address, path, read(address, path, token))


def order(
    address: str, path: str, token: str | None, told: Mapping[str, str], asked: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """POST to a path, ``asked`` as JSON if it is given; the JSON object that answers. Raises what ``read`` raises."""
    body = None if asked is None else json.dumps(asked).encode()
    kind = {} if asked is None else {"Content-Type": "application/json"}
    return _object(address, path, read(address, path, token, method="POST", told={**kind, **told}, body=body))


def token_in(state_dir: Path) -> str | None:
    """The admin token that a server has made in its state folder; None where there is none to be read."""
    try:
        return (state_dir / NAME).read_text().strip()
    except OSError:
        return None


def bearer(token: str | None) -> dict[str, str]:
    """The header of an admin token, if there is one. Raises ConfigError, which does not show it."""
    if token is None:
        return {}
    if not (token.isascii() and token.isprintable()):
        raise ConfigError("the admin token has characters that a header cannot carry, wanted printable ASCII")
    return {"Authorization": f"Bearer {token}"}


def _object(address: str, path: str, body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise TidegateError(f"{address}{path} answers no JSON: {error}") from error
    if not isinstance(found, dict):
        raise TidegateError(f"{address}{path} answers no JSON object")
    return found


def _reason(error: HTTPError) -> str:
    """What the server says, else what the status means."""
    try:
        return str(json.loads(error.read(1 << 16))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)
