"""The ``alerts`` section: where events go, how long they wait for it, and how often that is tried.

It knows nothing of the rest of the file, which holds it; ``compile_alerts`` turns it into what delivery is built from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import MappingProxyType
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

from server.config import units
from server.config.kinds import (
    DURATION_SCHEMA,
    SIZE_SCHEMA,
    FilePath,
    Interval,
    Many,
    PositiveInt,
    Secret,
    Text,
    bounded_duration,
    bounded_size,
    default,
)
from server.config.problems import Contradiction
from server.config.section import Section
from server.config.tree import KeyPath
from server.delivery.airflow import AirflowOptions
from server.delivery.backoff import RetryPolicy
from server.delivery.command import CommandOptions
from server.delivery.exchange import Endpoint
from server.delivery.options import DeliverySettings, LogOptions, SinkOptions, WebhookOptions
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
from server.errors import ConfigError
from server.outbox import Limits

MAX_PENDING: Final = 100_000
_KINDS: Final = ("webhook", "command", "airflow", "log")

_NAME_PATTERN: Final = "[a-z][a-z0-9_-]{0,62}"
_NAME: Final = re.compile(_NAME_PATTERN, re.ASCII)
_URL_PATTERN: Final = r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?(\?[!-~]*)?"
_URL: Final = re.compile(_URL_PATTERN, re.ASCII)


def _sink_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(
            f"wanted a sink's name (a lower-case letter, then letters, digits, '_' or '-'), got {units.show(value)}"
        )
    return value


def _webhook_url(value: str) -> str:
    """An address that may be called. It is not shown, as the path of one may hold a token."""
    if not _URL.fullmatch(value) or "#" in value:
        raise ValueError(
            "wanted http://HOST or https://HOST, perhaps with port, path and query, without a user or a fragment; the "
            "value is not shown"
        )
    return value


def _signing_secret(value: str) -> str:
    try:
        SigningSecret.parse(value)
    except ConfigError as error:
        raise ValueError(error.message) from None
    return value


def _target(value: str) -> str:
    try:
        AllowList.parse([value])
    except ConfigError as error:
        raise ValueError(error.message) from None
    return value


SinkName = Annotated[
    str, BeforeValidator(_sink_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME_PATTERN}$"})
]
WebhookUrl = Annotated[
    Text, AfterValidator(_webhook_url), WithJsonSchema({"type": "string", "pattern": f"^{_URL_PATTERN}$"})
]
SigningKey = Annotated[Secret, AfterValidator(_signing_secret)]
AllowedTarget = Annotated[Text, AfterValidator(_target), WithJsonSchema({"type": "string", "minLength": 1})]
#: A lease and a thread are held that long: a receiver that needs longer has to answer before it works.
SendTime = Annotated[int, bounded_duration("100ms", "1m"), DURATION_SCHEMA]
CommandTime = Annotated[int, bounded_duration("1s", "23h"), DURATION_SCHEMA]
GraceTime = Annotated[int, bounded_duration("0s", "10m"), DURATION_SCHEMA]
MemorySize = Annotated[int, bounded_size("16MiB", "1024GiB"), SIZE_SCHEMA]
LogSize = Annotated[int, bounded_size("4KiB", "1GiB"), SIZE_SCHEMA]
_VARIABLE_PATTERN: Final = "[A-Za-z_][A-Za-z0-9_]{0,127}"
VariableName = Annotated[str, Field(pattern=f"^{_VARIABLE_PATTERN}$")]
KeepTime = Annotated[int, bounded_duration("1m", "3650d"), DURATION_SCHEMA]


class Webhook(Section):
    """A receiver of signed webhooks (standardwebhooks.com). ``secrets``: one, or two while the receiver changes over.

    ``allow``: hosts, ``*.DOMAIN``, addresses and networks that may be called; empty: every public address. Addresses
    that are not public may be called only when a network or an address in the list holds them. ``ca_file``: PEM file
    of the authorities that are trusted for https.
    """

    #: Where events are posted.
    url: WebhookUrl = Field(repr=False)
    secrets: Annotated[Many[SigningKey], Field(min_length=1, max_length=2)] = Field(repr=False)
    allow: Many[AllowedTarget] = ()
    #: How long one attempt may take.
    timeout: SendTime = default("10s", units.parse_duration)
    ca_file: FilePath | None = None


class Command(Section):
    """A local command with the event on its standard input.

    ``grace``: between SIGTERM and SIGKILL. ``queue``:
    how long an event waits for another one of its model. ``log``: how much of what it prints is kept. ``secrets`` are
    further variables of its environment.
    """

    #: The program and its arguments; no shell is between.
    argv: Annotated[Many[Text], Field(min_length=1, max_length=1000)]
    #: The folder that it runs in.
    cwd: FilePath | None = None
    #: Variables of its environment.
    environment: dict[VariableName, Text] = Field(default_factory=dict)
    secrets: dict[VariableName, Secret] = Field(default_factory=dict, repr=False)
    #: How long it may run.
    timeout: CommandTime = default("1h", units.parse_duration)
    grace: GraceTime = default("5s", units.parse_duration)
    queue: GraceTime = default("30s", units.parse_duration)
    #: Address space of each process.
    memory: MemorySize | None = None
    #: CPU time of each process.
    cpu: CommandTime | None = None
    log: LogSize = default("1MiB", units.parse_size)


class Airflow(Section):
    """A DAG of Airflow 3, run once for each event. ``allow`` and ``ca_file`` are those of a webhook."""

    #: Where Airflow is.
    url: WebhookUrl = Field(repr=False)
    #: The DAG that is run.
    dag: Text
    #: The user who runs it.
    username: Text
    #: The user's password.
    password: Annotated[Secret, Field(repr=False)]
    allow: Many[AllowedTarget] = ()
    #: How long one request may take.
    timeout: SendTime = default("10s", units.parse_duration)
    ca_file: FilePath | None = None


class LogLines(Section):
    """Events become lines of the server's own log. By default warnings: an alert is seen where information is not."""

    #: The level of the lines.
    level: Literal["info", "warning", "error"] = "warning"


class Sink(Section):
    """Where events go; exactly one of the keys."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    #: Posted, signed.
    webhook: Webhook | None = None
    #: Given to a program on this machine.
    command: Command | None = None
    #: Run as a DAG.
    airflow: Airflow | None = None
    #: Written to the log.
    log: LogLines | None = None


class Redelivery(Section):
    """Attempts, and the waits between them: random below a bound that doubles from ``first`` up to ``cap``.

    ``max_retry_after``: the longest wait that a receiver may ask for.
    """

    #: The bound of the first wait.
    first: Interval = default("1s", units.parse_duration)
    #: The longest bound.
    cap: Interval = default("10m", units.parse_duration)
    #: After so many an event is given up.
    max_attempts: Annotated[int, Field(ge=1, le=100_000)] = 300
    max_retry_after: Interval = default("1h", units.parse_duration)


class Kept(Section):
    """How long events are kept that were delivered or given up, and at most how many."""

    #: Delivered events.
    delivered: KeepTime = default("7d", units.parse_duration)
    #: Events that were given up.
    dead: KeepTime = default("30d", units.parse_duration)
    #: How many of both.
    events: PositiveInt = 10_000


class Alerts(Section):
    """Events that other systems are told of. Without ``sinks`` they are logged.

    ``max_pending``: when so many events wait to be delivered, further ones are refused and counted.
    """

    #: Where events go, by a name of your own.
    sinks: dict[SinkName, Sink] = Field(default_factory=dict, json_schema_extra={"additionalProperties": False})
    max_pending: Annotated[int, Field(ge=1, le=MAX_PENDING)] = 1000
    retry: Redelivery = Field(default_factory=Redelivery)
    keep: Kept = Field(default_factory=Kept)


def alert_contradictions(alerts: Alerts) -> Iterator[Contradiction]:
    """Broken rules of the section that span several keys."""
    if alerts.retry.first > alerts.retry.cap:
        path: KeyPath = ("alerts", "retry")
        yield Contradiction((*path, "first"), "the first wait is longer than cap, the longest", ((*path, "cap"),))
    for name, sink in alerts.sinks.items():
        path = ("alerts", "sinks", name)
        given = [kind for kind in _KINDS if getattr(sink, kind) is not None]
        if len(given) != 1:
            text = f"wanted exactly one of {', '.join(_KINDS[:-1])} and {_KINDS[-1]}"
            yield Contradiction(path, text, tuple((*path, kind) for kind in _KINDS))
        else:
            yield from _impossible(sink, (*path, given[0]))


def _impossible(sink: Sink, path: KeyPath) -> Iterator[Contradiction]:
    try:
        _options(sink)
    except ConfigError as error:
        place, *more = ("argv", "timeout") if sink.command is not None else ("url", "allow", "secrets", "dag")
        yield Contradiction((*path, place), error.message, tuple((*path, key) for key in more))


def compile_alerts(alerts: Alerts) -> DeliverySettings:
    """What delivery is built from. The section has no contradictions."""
    retry, keep = alerts.retry, alerts.keep
    plain = DeliverySettings(
        limits=Limits(alerts.max_pending, keep.events, keep.delivered / units.NS_PER_S, keep.dead / units.NS_PER_S),
        retry=RetryPolicy(
            retry.first / units.NS_PER_S,
            retry.cap / units.NS_PER_S,
            retry.max_attempts,
            retry.max_retry_after / units.NS_PER_S,
        ),
    )
    if not alerts.sinks:
        return plain
    sinks = {name: _options(sink) for name, sink in alerts.sinks.items()}
    return DeliverySettings(MappingProxyType(sinks), plain.limits, plain.retry)


def _options(sink: Sink) -> SinkOptions:
    if sink.webhook is not None:
        return _webhook_options(sink.webhook)
    if sink.command is not None:
        return _command_options(sink.command)
    if sink.airflow is not None:
        return _airflow_options(sink.airflow)
    return LogOptions() if sink.log is None else LogOptions(sink.log.level)


def _webhook_options(webhook: Webhook) -> WebhookOptions:
    return WebhookOptions(
        url=webhook.url,
        secrets=tuple(map(SigningSecret.parse, webhook.secrets)),
        allow=AllowList.parse(webhook.allow),
        timeout_s=webhook.timeout / units.NS_PER_S,
        ca_file="" if webhook.ca_file is None else str(webhook.ca_file),
    )


def _command_options(command: Command) -> CommandOptions:
    return CommandOptions(
        argv=command.argv,
        cwd="" if command.cwd is None else str(command.cwd),
        environment={**command.environment, **command.secrets},
        timeout_s=command.timeout / units.NS_PER_S,
        grace_s=command.grace / units.NS_PER_S,
        queue_s=command.queue / units.NS_PER_S,
        memory_bytes=command.memory or 0,
        cpu_s=-(-(command.cpu or 0) // units.NS_PER_S),
        log_bytes=command.log,
    )


def _airflow_options(airflow: Airflow) -> AirflowOptions:
    ca_file = "" if airflow.ca_file is None else str(airflow.ca_file)
    allow = AllowList.parse(airflow.allow)
    endpoint = Endpoint(airflow.url, allow, airflow.timeout / units.NS_PER_S, ca_file, "Airflow server")
    return AirflowOptions(endpoint, airflow.dag, airflow.username, airflow.password)
