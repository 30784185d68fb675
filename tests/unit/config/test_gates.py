"""server.config.gates and gate_files: what a policy may say, where a mistake is shown, and what its digest is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.config.gate_files import load_policy, policy_of
from server.config.gates import GatePolicy
from server.config.problems import InvalidConfig
from server.errors import ConfigError

LEAST: dict[str, Any] = {"holdout": {"path": "h.csv"}}


def test_an_empty_section_has_its_defaults_and_an_absent_one_is_not_checked() -> None:
    least = GatePolicy.model_validate(LEAST)
    assert (least.robustness, least.latency, least.slices, least.loss_name) == (None, None, (), "brier")
    assert (least.quality.margin, least.quality.confidence) == (0.001, 0.95)
    full = GatePolicy.model_validate(LEAST | {"robustness": {}, "latency": {}, "task": "regression"})
    assert full.robustness is not None
    assert (full.robustness.noise, full.robustness.max_flips, len(full.robustness.probes)) == (0.01, 0.01, 3)
    assert full.latency is not None
    assert (full.latency.p99, full.loss_name) == (1.2, "squared")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"loss": "squared"}, "loss: wanted one of brier, log_loss, zero_one for classification, got squared"),
        ({"task": "regression", "loss": "brier"}, "wanted one of squared, absolute"),
        ({"task": "regression", "slices": [{"column": "a"}]}, "the metric of a regression is loss"),
        ({"task": "regression", "fairness": [{"column": "a", "equal_opportunity": "5%"}]}, "fairness"),
        ({"fairness": [{"column": "a"}]}, "at least one of demographic_parity"),
        ({"slices": [{"column": "a", "bins": [2, 1]}]}, "ascending order"),
        ({"slices": [{"column": "a", "metric": "loss", "min": 0.5}]}, "no least value"),
        ({"rules": {"bounds": [{"low": 2, "high": 1}]}}, "low 2 is over high 1"),
        ({"classes": ["a", "b"], "positive": "c"}, "positive: wanted one of a, b, got c"),
        ({"quality": {"confidence": "20%"}}, "0.5"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        GatePolicy.model_validate(LEAST | asked)
    assert words in str(refused.value)


def test_the_digest_is_of_what_is_asked_and_not_of_where_the_data_lie() -> None:
    digest = GatePolicy.model_validate(LEAST).digest()
    assert digest == GatePolicy.model_validate({"holdout": {"path": "/else/where.csv"}}).digest()
    assert digest == GatePolicy.model_validate(LEAST | {"quality": {"margin": "0.1%"}}).digest()
    assert digest != GatePolicy.model_validate(LEAST | {"quality": {"margin": "0.2%"}}).digest()
    assert len(digest) == 64


def test_the_schema_can_be_published() -> None:
    schema = GatePolicy.model_json_schema()
    assert {"holdout", "quality", "slices", "latency"} <= schema["properties"].keys()


# --- files -----------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    file = folder / "p.yaml"
    file.write_text(text)
    return file


def test_a_file_of_one_policy(tmp_path: Path) -> None:
    found = load_policy(write(tmp_path, "holdout: {path: [a.csv, b.csv], label: y}\nclasses: [0, yes_it_is]\n"))
    assert found.paths() == (tmp_path / "a.csv", tmp_path / "b.csv")
    assert found.classes == ("0", "yes_it_is")


def test_every_mistake_is_shown_where_it_is(tmp_path: Path) -> None:
    file = write(tmp_path, "holdout: {path: h.csv, labl: y}\nseed: -1\nlatency:\n  p50: fast\nslices: [{min: 1}]\n")
    with pytest.raises(InvalidConfig) as refused:
        load_policy(file)
    shown = {(p.line, p.column, p.key): p.message for p in refused.value.problems}
    assert shown == {
        (1, 24, "holdout.labl"): "unknown key",
        (2, 7, "seed"): "input should be greater than or equal to 0, got number -1",
        (4, 8, "latency.p50"): "input should be a valid number, got text 'fast'",
        (5, 10, "slices[0].column"): "required key is missing",
    }


def test_a_configuration_names_the_policy_of_a_model(tmp_path: Path) -> None:
    text = "gates:\n  a: {holdout: {path: a.csv}}\n  b: {holdout: {path: b.csv}}\n"
    text += "models:\n  m: {gate: b}\n  n: {gate: c}\n"
    file = write(tmp_path, text + "server: {auth: {admin_token: '${NOT_SET}'}}\n")
    assert policy_of(file, "m").paths() == (tmp_path / "b.csv",)
    with pytest.raises(ConfigError, match="gates has no policy 'c'; it has a, b"):
        policy_of(file, "n")
    with pytest.raises(ConfigError, match="names no policy, and gates has 2"):
        policy_of(file, "o")
    only = write(tmp_path, "gates: {a: {holdout: {path: a.csv}}}\n")
    assert policy_of(only, "anything").paths() == (tmp_path / "a.csv",)
    wrong = write(tmp_path, "gates:\n  a:\n    holdout: {path: a.csv}\n    loss: none\n")
    with pytest.raises(InvalidConfig, match=r"p\.yaml:4:11: gates\.a\.loss: "):
        policy_of(wrong, "m")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "p.yaml:"),
        ("holdout: yes", "p.yaml:1:10"),
        ("[]", "wanted a mapping, got a list"),
        ("", "is empty"),
    ],
)
def test_files_that_are_no_policy(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_policy(write(tmp_path, text))
    assert words in refused.value.message
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_policy(tmp_path / "b.yaml")
