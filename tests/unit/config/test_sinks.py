"""The ``alerts`` section: what it takes, refuses and becomes, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.config.kinds import Context
from server.config.sinks import Alerts, alert_contradictions, compile_alerts
from server.delivery.airflow import AirflowOptions, AirflowSink
from server.delivery.backoff import RetryPolicy
from server.delivery.build import make_sinks
from server.delivery.command import CommandOptions, CommandSink
from server.delivery.exchange import Endpoint
from server.delivery.logged import LogSink
from server.delivery.options import DeliverySettings, LogOptions, WebhookOptions
from server.delivery.targets import AllowList
from server.delivery.webhook import WebhookSink
from server.outbox import Limits
from tests.support.receiver import KEY, SECRET

WEBHOOK = {"url": "https://hooks.example.com/in/token-1?k=v", "secrets": ["${OPS}"]}


def read(section: dict[str, Any], folder: Path = Path()) -> Alerts:
    return Alerts.model_validate(section, context=Context(folder, {"OPS": SECRET, "BAD": "hunter2hunter2"}))


def with_webhook(**keys: Any) -> dict[str, Any]:
    return {"sinks": {"ops": {"webhook": {**WEBHOOK, **keys}}}}


def webhook_of(settings: DeliverySettings) -> WebhookOptions:
    options = settings.sinks["ops"]
    assert isinstance(options, WebhookOptions)
    return options


def test_nothing_said_means_the_log() -> None:
    settings = compile_alerts(read({}))
    assert settings == DeliverySettings()
    assert settings.sinks == {"log": LogOptions()}
    (sink,) = make_sinks(settings.sinks, Path("commands"))
    assert isinstance(sink, LogSink)
    assert sink.name == "log"


def test_everything_said(tmp_path: Path) -> None:
    (tmp_path / "next").write_text(SECRET + "\n")
    section = {
        **with_webhook(
            secrets=["${OPS}", "file:next"], allow=["*.example.com", "10.0.0.0/8"], timeout="2s", ca_file="ca"
        ),
        "max_pending": 7,
        "retry": {"first": "200ms", "cap": "1m", "max_attempts": 5, "max_retry_after": "2m"},
        "keep": {"delivered": "1h", "dead": "2d", "events": 50},
    }
    section["sinks"]["lines"] = {"log": {"level": "info"}}
    alerts = read(section, tmp_path)
    assert list(alert_contradictions(alerts)) == []
    settings = compile_alerts(alerts)
    assert settings.limits == Limits(7, 50, 3600.0, 172_800.0)
    assert settings.retry == RetryPolicy(0.2, 60.0, 5, 120.0)
    options = webhook_of(settings)
    assert options.url == WEBHOOK["url"]
    assert [secret.key for secret in options.secrets] == [KEY, KEY]
    assert (options.timeout_s, options.ca_file) == (2.0, str(tmp_path / "ca"))
    assert options.allow.names("a.example.com")
    assert settings.sinks["lines"] == LogOptions("info")


def test_a_webhook_becomes_a_sink() -> None:
    settings = compile_alerts(read(with_webhook()))
    (sink,) = make_sinks(settings.sinks, Path("commands"))
    assert isinstance(sink, WebhookSink)
    assert (sink.name, sink.timeout_s) == ("ops", 10.0)


def test_the_defaults_are_the_compiled_ones() -> None:
    assert compile_alerts(Alerts()) == DeliverySettings()


@pytest.mark.parametrize(
    "url",
    [
        "", "hooks.example.com", "ftp://hooks.example.com/", "https://", "https://user:hunter2@hooks.example.com/",
        "https://hooks.example.com/#part", "https://hooks.example.com/a b", "https://hooks.example.com/ключ",
        "https://hooks.example.com/\r\nx: y", "${URL}", 7,
    ],
)  # fmt: skip
def test_addresses_that_are_refused(url: object) -> None:
    with pytest.raises(ValidationError) as refused:
        read(with_webhook(url=url))
    (error,) = refused.value.errors()
    assert error["loc"] == ("sinks", "ops", "webhook", "url")
    assert "hunter2" not in error["msg"]


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        ({"secrets": []}, ("secrets",)),
        ({"secrets": ["${OPS}"] * 3}, ("secrets",)),
        ({"secrets": [SECRET]}, ("secrets", 0)),
        ({"secrets": ["${NONE}"]}, ("secrets", 0)),
        ({"secrets": ["${BAD}"]}, ("secrets", 0)),
        ({"allow": ["10.0.0.1/8"]}, ("allow", 0)),
        ({"allow": ["http://x"]}, ("allow", 0)),
        ({"timeout": "2m"}, ("timeout",)),
        ({"timeout": "1ms"}, ("timeout",)),
        ({"timeout": 5}, ("timeout",)),
        ({"method": "PUT"}, ("method",)),
    ],
)
def test_keys_that_are_refused(keys: dict[str, Any], place: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        read(with_webhook(**keys))
    error, *others = refused.value.errors()
    assert error["loc"] == ("sinks", "ops", "webhook", *place)
    assert {other["type"] for other in others} <= {"too_short"}  # of the list that lost its entry
    assert "hunter2" not in error["msg"]
    assert KEY.decode() not in error["msg"]


@pytest.mark.parametrize("name", ["", "Ops", "1ops", "o ps", "o" * 64])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="a sink's name"):
        read({"sinks": {name: {"log": {}}}})


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"sinks": {"a": {}}}, ("alerts", "sinks", "a"), "exactly one of webhook, command, airflow and log"),
        ({"sinks": {"a": {"log": {}, "webhook": WEBHOOK}}}, ("alerts", "sinks", "a"), "exactly one"),
        ({"retry": {"first": "1m", "cap": "1s"}}, ("alerts", "retry", "first"), "longer than cap"),
        (with_webhook(url="http://127.0.0.1:9/"), ("alerts", "sinks", "ops", "webhook", "url"), "not a public address"),
        (with_webhook(url="http://x:99999/"), ("alerts", "sinks", "ops", "webhook", "url"), "perhaps with port"),
        (with_webhook(allow=["example.org"]), ("alerts", "sinks", "ops", "webhook", "url"), "not among the allowed"),
    ],
)
def test_rules_over_several_keys(section: dict[str, Any], path: tuple[str, ...], words: str) -> None:
    (found,) = alert_contradictions(read(section))
    assert found.path == path
    assert words in found.message
    assert "token-1" not in found.message


def test_loopback_is_fine_when_it_is_named() -> None:
    alerts = read(with_webhook(url="http://127.0.0.1:9/", allow=["127.0.0.1"]))
    assert list(alert_contradictions(alerts)) == []


def test_no_secret_is_shown() -> None:
    alerts = read(with_webhook())
    for shown in (repr(alerts), repr(compile_alerts(alerts)), str(alerts)):
        assert SECRET not in shown
        assert SECRET.removeprefix("whsec_") not in shown
        assert "token-1" not in shown
        assert KEY.decode() not in shown


# --- commands and Airflow ---

COMMAND = {"argv": ["/bin/train", "--model", "fraud"]}
AIRFLOW = {"url": "https://airflow.example.com", "dag": "retrain", "username": "tidegate", "password": "${OPS}"}


def sink_of(**kinds: Any) -> dict[str, Any]:
    return {"sinks": {"train": kinds}}


def test_a_command(tmp_path: Path) -> None:
    section = sink_of(
        command={
            **COMMAND,
            "cwd": "work",
            "environment": {"RATE": "0.1"},
            "secrets": {"TOKEN": "${OPS}"},
            "timeout": "2h",
            "grace": "1s",
            "queue": "1m",
            "memory": "8GiB",
            "cpu": "90s",
            "log": "64KiB",
        }
    )
    alerts = read(section, tmp_path)
    assert list(alert_contradictions(alerts)) == []
    settings = compile_alerts(alerts)
    assert settings.sinks["train"] == CommandOptions(
        ("/bin/train", "--model", "fraud"), str(tmp_path / "work"), {"RATE": "0.1", "TOKEN": SECRET},
        7200.0, 1.0, 60.0, 8 << 30, 90, 64 << 10,
    )  # fmt: skip
    (sink,) = make_sinks(settings.sinks, tmp_path)
    assert isinstance(sink, CommandSink)
    assert SECRET not in repr(alerts) + repr(settings)


def test_a_command_with_nothing_said() -> None:
    assert compile_alerts(read(sink_of(command=COMMAND))).sinks["train"] == CommandOptions(
        ("/bin/train", "--model", "fraud")
    )


def test_airflow() -> None:
    alerts = read(sink_of(airflow={**AIRFLOW, "allow": ["*.example.com"], "timeout": "3s"}))
    assert list(alert_contradictions(alerts)) == []
    settings = compile_alerts(alerts)
    endpoint = Endpoint(AIRFLOW["url"], AllowList.parse(["*.example.com"]), 3.0, "", "Airflow server")
    assert settings.sinks["train"] == AirflowOptions(endpoint, "retrain", "tidegate", SECRET)
    (sink,) = make_sinks(settings.sinks, Path())
    assert isinstance(sink, AirflowSink)
    assert SECRET not in repr(alerts) + repr(settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"command": {"argv": []}},
        {"command": {"argv": "/bin/train --all"}},
        {"command": {**COMMAND, "timeout": "24h"}},
        {"command": {**COMMAND, "memory": "1KiB"}},
        {"command": {**COMMAND, "environment": {"A B": "x"}}},
        {"command": {**COMMAND, "environment": {"TOKEN": "${OPS}"}}},
        {"command": {**COMMAND, "secrets": {"TOKEN": "hunter2"}}},
        {"airflow": {**AIRFLOW, "password": "hunter2"}},
        {"airflow": {**AIRFLOW, "url": "airflow.example.com"}},
    ],
)
def test_executors_that_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        read(sink_of(**wrong))
    assert "hunter2" not in str(caught.value).replace("input_value='hunter2'", "")


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        ({"command": {"argv": [""]}}, ("command", "argv")),
        ({"airflow": {**AIRFLOW, "dag": "a/b"}}, ("airflow", "url")),
        ({"airflow": {**AIRFLOW, "url": "http://10.0.0.1/"}}, ("airflow", "url")),
        ({"command": COMMAND, "airflow": AIRFLOW}, ()),
    ],
)
def test_executors_that_could_never_work(wrong: dict[str, Any], place: tuple[str, ...]) -> None:
    (found,) = alert_contradictions(read(sink_of(**wrong)))
    assert found.path == ("alerts", "sinks", "train", *place)
