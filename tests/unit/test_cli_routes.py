"""``explain-route`` and the plan of ``check-config --against``, run as commands on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from server.cli.routes import NotAllowed, RunningText, explain_route, plan_against, running_text, show_plan
from server.config.problems import InvalidConfig
from server.errors import ConfigError

CONFIG = """\
apiVersion: tidegate/v1
models:
  m:
    versions: {"7": {source: a.onnx}, "8": {source: b.onnx}}
    aliases: [also]
    stable: "7"
    key: {from: [KEY], missing: MISSING}
    rules:
      - {name: testers, match: {header: {X-Canary: {present: true}}}, to: candidate}
      - {name: old, match: {version: "6"}, to: "8"}
    rollout: {id: r, candidate: "8", weight: 50%, control: all}
  plain: {source: p.onnx}
"""


def write(folder: Path, key: str = "header:X-User", missing: str = "random") -> Path:
    path = folder / "tidegate.yaml"
    path.write_text(CONFIG.replace("KEY", key).replace("MISSING", missing))
    return path


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(explain_route, [str(path), *arguments])


def explained(path: Path, *arguments: str) -> dict[str, Any]:
    result = run(path, *arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.output)
    return found


@pytest.mark.parametrize("key", ["header:X-User", "parameter:user", "request:id"])
def test_a_key_lands_where_the_model_looks_for_it(tmp_path: Path, key: str) -> None:
    """The same key is drawn alike wherever it comes from; both arms occur among a few."""
    path = write(tmp_path, key)
    arms = {user: explained(path, "--model", "m", "--key", user)["decision"]["arm"] for user in "abcdefgh"}
    assert set(arms.values()) == {"candidate", "stable"}
    assert {user: explained(path, "--model", "also", "--key", user)["decision"]["arm"] for user in "abcdefgh"} == arms
    write(tmp_path, "header:other")
    assert {user: explained(path, "--model", "m", "--key", user)["decision"]["arm"] for user in "abcdefgh"} == arms


def test_the_steps_say_why(tmp_path: Path) -> None:
    result = run(write(tmp_path), "--model", "m", "--header", "x-user=a")
    assert result.exit_code == 0
    first, rule, key, position, end = result.output.splitlines()
    assert first == "model 'm': stable is m version 7"
    assert rule == "rule 'testers': header x-canary is absent"
    assert key == "key 'a' from header:X-User"
    assert position.startswith("position 0.")
    assert end.startswith("-> m version ")


def test_a_rule_decides_before_the_split(tmp_path: Path) -> None:
    found = explained(write(tmp_path), "--model", "m", "--header", "X-CANARY=1", "--key", "a")
    assert found["refused"] is None
    assert found["decision"] == {
        "model": "m",
        "version": "8",
        "arm": "candidate",
        "reason": "testers",
        "counted": False,
        "unit": "request",
        "propensity": 1.0,
        "fallback": "m:7",
    }


def test_chance_is_left_open(tmp_path: Path) -> None:
    found = explained(write(tmp_path), "--model", "m")
    assert found["decision"] is None
    assert found["steps"][-1] == "no key: drawn at random among stable 50.00%, candidate 50.00%"


def test_a_missing_key_may_be_refused(tmp_path: Path) -> None:
    found = explained(write(tmp_path, missing="reject"), "--model", "m")
    assert found["decision"] is None
    assert found["refused"] == "model 'm' wants a routing key in one of: header:X-User; the request has none"


@pytest.mark.parametrize(
    ("model", "version", "served"),
    [("m", "8", "8"), ("m", "6", "8"), ("also", "7", "7"), ("plain", "3", "3")],
)
def test_a_named_version(tmp_path: Path, model: str, version: str, served: str) -> None:
    found = explained(write(tmp_path), "--model", model, "--version", version)
    assert (found["decision"]["version"], found["decision"]["counted"]) == (served, False)


@pytest.mark.parametrize(
    ("model", "version", "reason"),
    [
        ("m", "9", "version 9 is not among those of 'm' (7, 8)"),
        ("m", "two", "'two' is no version: wanted a positive integer"),
        ("plain", "@latest", "'@latest' is no version: wanted a positive integer"),
    ],
)
def test_a_version_that_cannot_be_asked_for(tmp_path: Path, model: str, version: str, reason: str) -> None:
    found = explained(write(tmp_path), "--model", model, "--version", version)
    assert (found["decision"], found["refused"]) == (None, reason)
    assert found["steps"][-1] == f"refused: {reason}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "n"], "has no model 'n'; it has m, also, plain"),
        (["--model", "m", "--header", "x"], "--header: wanted NAME=VALUE, got 'x'"),
        (["--model", "m", "--parameter", "=x"], "--parameter: wanted NAME=VALUE, got '=x'"),
        (["--model", "plain", "--key", "x"], "'plain' has no key"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], reason: str) -> None:
    result = run(write(tmp_path), *arguments)
    assert result.exit_code == 2
    assert reason in result.output


# --- check-config --against -------------------------------------------------------------------------------------------


def tells_nothing(_: bytes) -> dict[str, Any]:
    raise NotAllowed("URL answers 401: this needs the admin token")


def shown(
    path: Path,
    running: str | None,
    dry_run: Callable[[bytes], dict[str, Any]] = tells_nothing,
    *,
    as_json: bool = False,
) -> tuple[int, str]:
    @click.command()
    def show() -> int:
        found = plan_against(path, None if running is None else RunningText(running, dry_run))
        return show_plan(found, as_json=as_json)

    result = CliRunner().invoke(show, standalone_mode=False)
    assert result.exception is None, result.exception
    return result.return_value, result.output


def test_the_same_file_against_itself(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert shown(path, path.read_text()) == (0, "nothing changes\n")


def test_against_nothing_everything_loads(tmp_path: Path) -> None:
    code, text = shown(write(tmp_path), None)
    assert code == 0
    assert text.splitlines() == ["add model m", "add model plain", "load plain", "load m:7", "load m:8"]


def test_a_plan_that_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    code, text = shown(path, path.read_text().replace("id: r,", "id: other,"), as_json=True)
    assert code == 2
    assert json.loads(text)["allowed"] is False
    assert json.loads(text)["movements"]["m"]["share"] == 0.5


def test_a_running_configuration_with_mistakes_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="<running>:2:1: nope: unknown key"):
        plan_against(write(tmp_path), RunningText("apiVersion: tidegate/v1\nnope: 1\n", tells_nothing))


CLIMBING = """apiVersion: tidegate/v1
models:
  m:
    versions: {'7': {source: a.onnx}, '8': {source: b.onnx}}
    stable: 7
    rollout: {id: r8, candidate: 8, steps: [{weight: 5%, approve: true}], gates: {e: {event: error, max_rate: 1%}}}
"""


def test_the_server_tells_how_long_steps_take_and_what_speaks_against_them(tmp_path: Path) -> None:
    path, sent = tmp_path / "climbing.yaml", []
    path.write_text(CLIMBING)
    steps = [
        {"weight": 5.0, "median_s": 61.0, "p90_s": 180.4, "gate": "e", "approve": True},
        {"weight": 10.0, "median_s": None, "p90_s": None, "gate": "e", "approve": False},
    ]
    refused = {"model": "m", "reason": "m: rollout 'r8' has been used"}

    def told(body: bytes) -> dict[str, Any]:
        sent.append(body)
        return {"rollouts": {"m": steps}, "refusals": [refused], "allowed": False}

    code, text = shown(path, CLIMBING.replace("rollout:", "# "), told)
    assert (code, sent) == (2, [CLIMBING.encode()])
    lines = text.splitlines()
    assert lines[-4].split() == ["MODEL", "WEIGHT", "MEDIAN", "90", "%", "BY"]
    assert lines[-3].split() == ["m", "5%", "61", "s", "180", "s", "e,", "then", "approval"]
    assert lines[-2].split() == ["m", "10%", "not", "known", "not", "known", "e"]
    assert lines[-1] == "refused: m: rollout 'r8' has been used"
    found = json.loads(shown(path, CLIMBING, told, as_json=True)[1])
    assert (found["allowed"], found["refusals"], found["rollouts"]) == (False, [refused], {"m": steps})


def test_without_the_token_steps_are_not_told_and_without_rollouts_nobody_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "climbing.yaml"
    path.write_text(CLIMBING)
    code, text = shown(path, CLIMBING)
    told = "how long the steps of rollouts take is not known: URL answers 401: this needs the admin token"
    assert (code, text.splitlines()) == (0, ["nothing changes", told])
    assert "not known" not in shown(write(tmp_path), CLIMBING)[1]


def test_an_unknown_model_is_told_from_some_of_the_known(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("apiVersion: tidegate/v1\nmodels:\n" + "".join(f"  m{n}: {{source: m.onnx}}\n" for n in range(30)))
    found = CliRunner().invoke(explain_route, [str(path), "--model", "z"])
    assert found.exit_code == 2
    assert "m19 and 10 more" in found.output


def test_a_token_that_no_header_carries_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="wanted printable ASCII") as refused:
        running_text("127.0.0.1:9", "se\nzret")
    assert "zret" not in str(refused.value)
