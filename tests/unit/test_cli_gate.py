"""``tidegate gate check``: exit codes, the table, JSON, files and the registry, and what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from server.cli.main import cli
from server.config.problems import InvalidConfig
from server.errors import TidegateError
from server.state import open_state
from tests.support import cli as process
from tests.support import gate_models

POLICY = "holdout: {path: holdout.csv, label: label}\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    gate_models.good(folder / "good.onnx")
    gate_models.worse(folder / "worse.onnx")
    gate_models.write_holdout(folder / "holdout.csv")
    gate_models.write_holdout(folder / "bare.csv", labels=False)
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "bare.yaml").write_text("holdout: {path: bare.csv, label: label}\n")
    (folder / "config.yaml").write_text(
        "apiVersion: tidegate/v1\ngates:\n  first: {holdout: {path: bare.csv}}\n"
        "  second: {holdout: {path: holdout.csv, label: label}}\nmodels: {loans: {gate: second}}\n"
    )
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["gate", "check", *[str(argument) for argument in arguments]])


def test_exit_codes_say_the_verdict(made: Path) -> None:
    good, worse = made / "good.onnx", made / "worse.onnx"
    policy = ("--policy", made / "policy.yaml")
    passed = run("--candidate", good, "--champion", good, *policy)
    assert passed.exit_code == 0, passed.output
    assert passed.stdout.splitlines()[-1] == "verdict: passed"
    assert "holdout: 3000 of 3000 rows" in passed.stdout
    failed = run("--candidate", worse, "--champion", good, *policy)
    assert (failed.exit_code, failed.stdout.splitlines()[-1]) == (3, "verdict: failed")
    assert run("--candidate", good, *policy).exit_code == 4
    assert run("--candidate", good, "--champion", good, "--policy", made / "bare.yaml").exit_code == 4


def test_json_is_all_of_it_and_nothing_else(made: Path) -> None:
    done = process.cli(
        "gate", "check", "--candidate", str(made / "worse.onnx"), "--champion", str(made / "good.onnx"),
        "--policy", str(made / "policy.yaml"), "--json", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    found = json.loads(done.stdout)
    assert (found["status"], [one["gate"] for one in found["findings"]]) == (
        "failed",
        ["admission", "outputs", "quality"],
    )
    assert found["findings"][2]["evidence"]["low"] > 0


def test_versions_of_the_registry_are_judged_and_recorded(made: Path, tmp_path: Path) -> None:
    state = open_state(tmp_path)
    state.registry.publish("loans", {"model.onnx": made / "good.onnx"}, alias="champion", actor="t")
    state.registry.publish("loans", {"model.onnx": made / "worse.onnx"}, alias="challenger", actor="t")
    where = ("--config", made / "config.yaml", "--state-dir", tmp_path)
    assert run("--model", "loans", *where).exit_code == 3
    row = state.audit.tail(1)[0].event
    assert (row.action, row.subject, row.detail["against"]) == ("gate.failed", "loans:2", "1")
    assert "@" in row.actor
    head = state.audit.head()
    assert run("--model", "loans:1", "--against", "loans:2", "--no-record", *where).exit_code == 0
    assert run("--model", "loans@champion", "--no-record", *where).exit_code == 0
    assert state.audit.head() == head
    state.close()
    missing = run("--model", "loans:9", *where)
    assert isinstance(missing.exception, TidegateError)
    assert "no version 9" in missing.exception.message


def test_a_bad_policy_ends_with_its_mistakes(made: Path, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("holdout: {path: h.csv}\nlos: brier\n")
    refused = run("--candidate", made / "good.onnx", "--policy", tmp_path / "p.yaml")
    assert isinstance(refused.exception, InvalidConfig)
    assert "p.yaml:2:1: los: unknown key" in refused.exception.message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name the candidate"),
        (("--model", "m", "--candidate", "x.onnx"), "name the candidate"),
        (("--candidate", "x.onnx", "--against", "m:1"), "--against goes with --model"),
        (("--model", "m", "--champion", "x.onnx"), "--champion goes with --candidate"),
        (("--model", "m"), "name the policy"),
        (("--candidate", "x.onnx", "--policy", "a", "--config", "b"), "name the policy"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_another_models_version_is_none_to_compare_with(made: Path, tmp_path: Path) -> None:
    policy = ("--policy", made / "policy.yaml", "--state-dir", tmp_path)
    assert "must be of the same model, m, got other" in run("--model", "m:1", "--against", "other:1", *policy).output
    lost = run("--candidate", tmp_path / "none.onnx", "--policy", made / "policy.yaml")
    assert isinstance(lost.exception, TidegateError)
