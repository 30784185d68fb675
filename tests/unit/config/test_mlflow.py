"""The ``registry.mlflow`` section: what it takes, refuses and becomes, and that no secret is ever shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from router.registry.taking import Limits
from server.config.kinds import Context
from server.config.mlflow import Mlflow, compile_mlflow, mlflow_contradictions
from server.errors import ConfigError
from server.mlflow.options import MlflowOptions

URL = "https://mlflow.example.com:5000/base"


def read(**section: Any) -> Mlflow:
    context = Context(Path("/etc"), {"TOKEN": "tok-1", "OLD": "whsec-old", "NEW": "whsec-new"})
    return Mlflow.model_validate({"url": URL, **section}, context=context)


def broken(**section: Any) -> list[tuple[str | int, ...]]:
    return [found.path for found in mlflow_contradictions(read(**section), ("registry", "mlflow"))]


def test_the_defaults_are_those_of_the_options() -> None:
    assert compile_mlflow(read()) == MlflowOptions(URL)


def test_all_keys() -> None:
    section = read(
        models=["fraud"],
        token="${TOKEN}",
        ca_file="ca.pem",
        poll="5s",
        timeout="2s",
        download_timeout="5m",
        check="6h",
        keep_unused="1d",
        max_file="1GiB",
        max_version="2GiB",
        webhook_secrets=["${NEW}", "${OLD}"],
        promotes=True,
        artifact_folders=["/srv/mlartifacts", "../var/shared"],
    )
    assert list(mlflow_contradictions(section, ("registry", "mlflow"))) == []
    options = compile_mlflow(section)
    assert options == MlflowOptions(
        URL,
        models=("fraud",),
        token="tok-1",
        ca_file="/etc/ca.pem",
        poll_s=5.0,
        timeout_s=2.0,
        download_s=300.0,
        check_every_s=21_600.0,
        keep_unused_s=86_400.0,
        limits=Limits(2**30, 2**31),
        hint_secrets=("whsec-new", "whsec-old"),
        promotes=True,
        artifact_folders=(Path("/srv/mlartifacts"), Path("/var/shared")),
    )
    for shown in (repr(section), repr(options)):
        assert not any(secret in shown for secret in ("tok-1", "whsec"))


def test_a_user_and_a_password() -> None:
    assert broken(user="u", password="${TOKEN}") == []
    assert compile_mlflow(read(user="u", password="${TOKEN}")).password == "tok-1"
    assert broken(user="u") == [("registry", "mlflow", "user")]
    assert broken(password="${TOKEN}") == [("registry", "mlflow", "user")]
    assert broken(user="u", password="${TOKEN}", token="${TOKEN}") == [("registry", "mlflow", "token")]


def test_a_file_is_no_larger_than_the_whole() -> None:
    assert broken(max_file="2GiB", max_version="1GiB") == [("registry", "mlflow", "max_file")]


@pytest.mark.parametrize(
    "section",
    [
        {"url": "mlflow.example.com"},
        {"url": "https://u:p@h"},
        {"url": "file:///x"},
        {"token": "in the clear"},
        {"models": ["not/ours"]},
        {"poll": "10ms"},
        {"poll": 5},
        {"check": "1s"},
        {"max_file": "1B"},
        {"webhook_secrets": ["${NEW}", "${OLD}", "${TOKEN}"]},
        {"promotes": "yes"},
        {"surprise": 1},
    ],
)
def test_anything_else_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(**section)


@pytest.mark.parametrize(
    "options",
    [
        {"url": "ftp://h"},
        {"url": "http://"},
        {"url": "http://u@h"},
        {"url": "http://h?x=1"},
        {"url": "http://h#x"},
        {"url": "http://h:0"},
        {"url": "http://h:x"},
        {"url": "http://h/a b"},
        {"url": URL, "token": "a\r\nb"},
        {"url": URL, "token": "a", "user": "b"},
        {"url": URL, "user": "a:b"},
    ],
)
def test_options_that_could_never_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        MlflowOptions(**options)
