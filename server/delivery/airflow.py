"""The sink that starts a DAG run of Airflow 3 by its REST API, once for each event.

The run's id is the event's idempotency key, so that Airflow itself keeps a second delivery from becoming a second run:
it answers 409, which is as good as the first success. ``logical_date`` is null: the run belongs to no interval, and
nothing but its id must be unique. The event is the run's ``conf``.

A token is had from ``/auth/token`` with user and password and kept until Airflow refuses it: with 401 when its time is
over, with 403 when it was signed by another key, as after a restart of an Airflow that draws its key anew. Then a new
one is asked for, once.

What no time mends is refused: a password that is not taken (asking on would lock the account), and a request that
Airflow says is wrong in itself (400, 422). A DAG that is not known (404) or not permitted (403) may be parsed, and its
permissions synced, in a moment: that is refused from ``PATIENCE_S`` after the event on, or after an operator had it
tried again. Everything else may pass.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final
from urllib.parse import quote

from server.delivery.base import Delivered, Failed, Outcome, Refused
from server.delivery.exchange import Answer, Endpoint, Exchange, ExchangeFailed, seconds
from server.errors import ConfigError
from server.outbox import NS_PER_S, Message

#: What Airflow takes as the id of a run by default (scheduler.allowed_run_id_pattern).
_RUN_ID: Final = re.compile(r"[A-Za-z0-9_.~:+-]{1,250}", re.ASCII)
_DAG_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,250}", re.ASCII)
_JSON: Final = {"Content-Type": "application/json", "Accept": "application/json"}
#: Longer than a new DAG takes until it is known: Airflow looks for new files every 5 minutes by default.
PATIENCE_S: Final = 900.0
_WRONG: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY})
_NO_TOKEN: Final = _WRONG | {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_STALE_TOKEN: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})
#: The most of Airflow's own words that becomes part of a reason.
_MAX_DETAIL_CHARS: Final = 160


@dataclass(slots=True, frozen=True)
class AirflowOptions:
    """A DAG to be run. ``endpoint``: the base address of Airflow's API server. Raises ConfigError for no DAG's id."""

    endpoint: Endpoint
    dag_id: str
    username: str
    password: str = field(repr=False)

    def __post_init__(self) -> None:
        if not _DAG_ID.fullmatch(self.dag_id):
            raise ConfigError(
                f"a DAG's id is 1 to 250 letters, digits, '_', '.' or '-', got {self.dag_id[:64]!r}",
            )
        if self.endpoint.parts.query or "/api/v" in self.endpoint.parts.path:
            raise ConfigError(
                "the address of Airflow must be that of its web page, without /api/v2 and without a query"
            )


class AirflowSink:
    """One DAG of one Airflow. Raises ConfigError when its file of authorities cannot be used."""

    def __init__(self, name: str, options: AirflowOptions, *, clock: Callable[[], float] = time.time) -> None:
        self.name = name
        self.timeout_s = options.endpoint.timeout_s
        self._exchange = Exchange(options.endpoint)
        self._clock = clock
        base = self._exchange.target.rstrip("/")
        self._runs = f"{base}/api/v2/dags/{quote(options.dag_id, safe='')}/dagRuns"
        self._tokens = f"{base}/auth/token"
        self._credentials = json.dumps({"username": options.username, "password": options.password}).encode()
        self._dag_id, self._username = options.dag_id, options.username
        self._lock = threading.Lock()
        self._token = ""

    def send(self, message: Message) -> Outcome:
        """Start the run, within ``timeout_s`` for all of it."""
        deadline = time.monotonic() + self.timeout_s
        body = _run(message)
        token = self._token
        try:
            if token:
                answer = self._start(body, token, deadline)
                if answer.status not in _STALE_TOKEN:
                    return self._outcome(answer, message)
            fresh = self._instead_of(token, deadline)
            return self._outcome(self._start(body, fresh, deadline), message) if isinstance(fresh, str) else fresh
        except ExchangeFailed as error:
            return Failed(str(error))

    def _start(self, body: bytes, token: str, deadline: float) -> Answer:
        headers = {**_JSON, "Authorization": f"Bearer {token}"}
        return self._exchange.post(self._runs, body, headers, deadline)

    def _instead_of(self, token: str, deadline: float) -> str | Failed | Refused:
        """A token that is not ``token``; one thread asks for it, the others wait."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return Failed(f"no token within {self.timeout_s:g} s")
        try:
            return self._login(deadline) if self._token == token else self._token
        finally:
            self._lock.release()

    def _login(self, deadline: float) -> str | Failed | Refused:
        answer = self._exchange.post(self._tokens, self._credentials, _JSON, deadline)
        if answer.status in _NO_TOKEN:
            return Refused(f"no token: answered {answer.status} to user {self._username} and the password")
        if answer.status == HTTPStatus.NOT_FOUND:
            return Failed("no token: answered 404: no Airflow 3 whose users have passwords is at this address")
        if not 200 <= answer.status < 300:
            return Failed(f"no token: answered {answer.status}", seconds(answer.retry_after, self._clock()))
        token = _token(answer.body)
        if not token:
            return Failed("no token: the answer holds none")
        self._token = token
        return token

    def _outcome(self, answer: Answer, message: Message) -> Outcome:
        status = answer.status
        if 200 <= status < 300 or status == HTTPStatus.CONFLICT:
            return Delivered()
        words = _detail(answer.body)
        if status in _WRONG:
            return Refused(f"answered {status}: Airflow does not take the request{words}")
        now = self._clock()
        problem = self._problem(status)
        if problem and now - message.since_ns / NS_PER_S >= PATIENCE_S:
            return Refused(f"answered {status}: {problem}{words}")
        return Failed(f"answered {status}{problem and f': {problem}'}{words}", seconds(answer.retry_after, now))

    def _problem(self, status: int) -> str:
        """What most likely has to be set right in Airflow; "" when that is not known."""
        if status == HTTPStatus.NOT_FOUND:
            return f"there is no DAG {self._dag_id}"
        if status == HTTPStatus.FORBIDDEN:
            return f"user {self._username} may not run DAG {self._dag_id}"
        return ""


def _run(message: Message) -> bytes:
    event = json.loads(message.body)
    return json.dumps({"dag_run_id": run_id(message.key), "logical_date": None, "conf": event}).encode()


def run_id(key: str) -> str:
    """The id of the run for an idempotency key: the key itself, or its SHA-256 where Airflow would not take it."""
    return key if _RUN_ID.fullmatch(key) else hashlib.sha256(key.encode()).hexdigest()


def _token(body: bytes) -> str:
    """The token of an answer; "" when there is none that can be sent in a header."""
    try:
        token = json.loads(body)["access_token"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return token if isinstance(token, str) and token.isascii() and token.isprintable() else ""


def _detail(body: bytes) -> str:
    """What Airflow says of a request that it does not take, to be added to a reason; "" when it says nothing short."""
    try:
        detail = json.loads(body)["detail"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({detail[:_MAX_DETAIL_CHARS]})" if isinstance(detail, str) and detail else ""
