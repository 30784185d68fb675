"""server.gates.evaluation, judging and stress: real models against a policy; who passes, who fails, by which gate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from router.rollout.quality import Finding, Status
from server.config.gates import GatePolicy
from server.config.kinds import Context
from server.errors import RuntimeFailure
from server.gates.evaluation import Contest, judge
from server.gates.holdout import digest_files, read_holdout
from server.gates.running import Pace
from server.runtime.base import Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.runtime.onnx import OnnxRuntime
from tests.support import models

PASSED, FAILED, UNDECIDED = Status.PASSED, Status.FAILED, Status.UNDECIDED
COLUMNS = ["age", "income", "debt", "region"]


def policy(folder: Path, *, data: str = "holdout.csv", **asked: Any) -> GatePolicy:
    holdout = {"path": data, "label": "label", "columns": COLUMNS} | asked.pop("holdout", {})
    return GatePolicy.model_validate({"holdout": holdout, **asked}, context=Context(folder))


@contextmanager
def loaded(path: Path | None) -> Iterator[Engine | None]:
    if path is None:
        yield None
        return
    engine = OnnxRuntime(measure_budget_s=0).load(LoadRequest(path.stem, "1", path, ModelOptions()))
    try:
        yield engine
    finally:
        engine.close()


def found(
    folder: Path, candidate: str, champion: str | None, asked: GatePolicy, pace: Pace | None = None
) -> dict[str, Finding]:
    """Findings by gate."""
    beside = None if champion is None else folder / f"{champion}.onnx"
    with loaded(folder / f"{candidate}.onnx") as ours, loaded(beside) as theirs:
        assert ours is not None
        holdout = read_holdout(asked, digest_files(asked.paths()))
        findings = judge(Contest(ours, theirs), asked, holdout, pace or Pace(), lambda _: None)
    assert len({finding.gate for finding in findings}) == len(findings)
    return {finding.gate: finding for finding in findings}


def statuses(findings: dict[str, Finding]) -> dict[str, Status]:
    return {gate: finding.status for gate, finding in findings.items()}


# --- quality ---------------------------------------------------------------------------------------------------------


def test_an_equal_model_passes(made: Path) -> None:
    every = found(made, "good", "good", policy(made))
    assert statuses(every) == {"admission": PASSED, "outputs": PASSED, "quality": PASSED}
    told = every["quality"].evidence
    assert (told["rows"], told["loss"], told["candidate"]) == (3000, "brier", told["champion"])
    assert told["metrics"]["candidate"] == told["metrics"]["champion"]


def test_another_sample_of_the_same_is_within_a_margin(made: Path) -> None:
    assert found(made, "again", "good", policy(made, quality={"margin": "2%"}))["quality"].status is PASSED


@pytest.mark.parametrize("loss", ["brier", "log_loss", "zero_one"])
def test_a_worse_model_fails(made: Path, loss: str) -> None:
    worse = "tree" if loss == "zero_one" else "worse"
    assert found(made, worse, "good", policy(made, loss=loss))["quality"].status is FAILED


def test_superior_wants_more_than_being_as_good(made: Path) -> None:
    asked = policy(made, quality={"compare": "superior"})
    assert found(made, "good", "worse", asked)["quality"].status is PASSED
    assert found(made, "good", "good", asked)["quality"].status is FAILED
    assert found(made, "worse", "good", asked)["quality"].status is FAILED


def test_regressions_are_judged_by_their_errors(made: Path) -> None:
    """The label here is the first column itself, which both lines predict, one of them half a unit beside."""
    about = {"label": "age", "path": "holdout.csv", "columns": COLUMNS}
    asked = policy(made, task="regression", loss="absolute", holdout=about, robustness={"probes": []})
    assert statuses(found(made, "line", "line", asked)) == {
        "admission": PASSED, "outputs": PASSED, "quality": PASSED, "noise": PASSED,
    }  # fmt: skip
    every = found(made, "off", "line", policy(made, task="regression", holdout=about))
    assert every["quality"].status is FAILED
    assert every["quality"].evidence["metrics"]["candidate"]["bias"] == pytest.approx(
        every["quality"].evidence["metrics"]["champion"]["bias"] + 0.5, abs=1e-3
    )


def test_evidence_is_the_same_every_time(made: Path) -> None:
    asked = policy(
        made, robustness={}, slices=[{"column": "region", "max_worse": "5%"}], rules={"monotone": [{"column": "age"}]}
    )
    first, second = (found(made, "tree", "good", asked) for _ in range(2))
    assert first == second
    other = found(made, "tree", "good", policy(made, seed=7, robustness={}))
    assert other["quality"].evidence["low"] != first["quality"].evidence["low"]
    assert other["noise"].evidence["flips"] != first["noise"].evidence["flips"]


# --- without data ----------------------------------------------------------------------------------------------------


def test_without_labels_nothing_about_quality_is_decided(made: Path) -> None:
    asked = policy(
        made,
        data="unlabelled.csv",
        slices=[{"column": "region", "min": 0.5}],
        fairness=[{"column": "region", "demographic_parity": "10%"}],
        robustness={},
    )
    every = found(made, "good", "good", asked)
    assert statuses(every) == {
        "admission": PASSED, "outputs": PASSED, "quality": UNDECIDED, "slices of region": UNDECIDED,
        "demographic parity of region": UNDECIDED, "noise": PASSED, "bad values": PASSED,
    }  # fmt: skip
    assert every["quality"].reason == "not decidable: there is no label in the holdout"


def test_without_a_champion_nothing_beside_it_is_decided(made: Path) -> None:
    every = found(made, "good", None, policy(made, slices=[{"column": "region", "max_worse": "5%"}], latency={}))
    assert statuses(every) == {
        "admission": PASSED, "outputs": PASSED, "quality": UNDECIDED, "slices of region": PASSED,
        "slices of region beside the champion": UNDECIDED, "latency in batches of 1": UNDECIDED,
    }  # fmt: skip
    assert "no champion" in every["quality"].reason


def test_a_column_that_is_not_there_is_said(made: Path) -> None:
    every = found(made, "good", "good", policy(made, slices=[{"column": "city", "min": 0.5}]))
    assert every["slices of city"].status is UNDECIDED
    assert "no column 'city'; it has age, income, debt, region, label" in every["slices of city"].reason
    every = found(made, "good", "good", policy(made, holdout={"columns": ["age"]}))
    assert every["run"].status is UNDECIDED


@pytest.mark.parametrize("classes", [(), ("001", "002", "003")])
def test_labels_that_look_like_numbers_are_what_a_model_of_strings_answers(
    tmp_path: Path, classes: tuple[str, ...]
) -> None:
    codes = [f"{code:03d}" for code in np.random.default_rng(0).integers(1, 4, 600)]
    (tmp_path / "holdout.csv").write_text("code,label\n" + "".join(f"{code},{code}\n" for code in codes))
    models.identity(tmp_path / "same.onnx", "BYTES", 1)
    asked = policy(tmp_path, holdout={"columns": ["code"]}, loss="zero_one", classes=classes)
    evidence = found(tmp_path, "same", "same", asked)["quality"].evidence
    assert evidence["metrics"] == {"candidate": {"accuracy": 1.0}, "champion": {"accuracy": 1.0}}


def test_a_label_that_is_no_class_is_said(made: Path) -> None:
    every = found(made, "good", "good", policy(made, holdout={"label": "region"}))
    assert every["labels"].status is UNDECIDED
    assert "2 classes, the labels have 4 values" in every["labels"].reason


def test_what_has_no_time_left_is_not_decided(made: Path) -> None:
    ticks = iter(range(10**9))
    every = found(made, "good", "good", policy(made), Pace(until=3, now=lambda: next(ticks)))
    assert every["run"].reason == "not decidable: the time limit passed"
    stopped = found(made, "good", "good", policy(made), Pace(stopped=lambda: True))
    assert stopped["run"].reason == "not decidable: it was called off"


# --- slices and fairness ---------------------------------------------------------------------------------------------


def test_a_biased_model_fails_by_its_group(made: Path) -> None:
    """It passes as a whole under a wide margin, and is a coin in one region."""
    asked = policy(
        made,
        quality={"margin": "30%"},
        slices=[{"column": "region", "min": 0.7, "max_gap": 0.1, "max_worse": "5%"}],
        fairness=[
            {"column": "region", "demographic_parity": "10%", "equal_opportunity": "10%", "equalized_odds": "10%"}
        ],
    )
    every = found(made, "biased", "truth", asked)
    assert statuses(every) == {
        "admission": PASSED, "outputs": PASSED, "quality": PASSED,
        "slices of region": FAILED, "slices of region beside the champion": FAILED,
        "demographic parity of region": FAILED, "equal opportunity of region": FAILED,
        "equalized odds of region": FAILED,
    }  # fmt: skip
    beside = every["slices of region beside the champion"]
    assert beside.reason.startswith("3: ")
    assert [group["status"] for group in beside.evidence["groups"].values()] == ["passed", "passed", "passed", "failed"]
    accuracy = every["slices of region"].evidence
    assert min(accuracy["groups"], key=accuracy["groups"].__getitem__) == "3"
    assert sum(accuracy["rows"].values()) == 3000
    assert (
        every["equalized odds of region"].evidence["gap"]
        == every["equalized odds of region"].evidence["false_positive_rate"]["gap"]
    )
    fair = found(made, "truth", "truth", asked)
    assert {fair[gate].status for gate in fair if "region" in gate} == {PASSED}


def test_groups_that_are_too_small_are_asked_about_or_skipped(made: Path) -> None:
    def asked(**more: Any) -> GatePolicy:
        return policy(made, slices=[{"column": "age", "bins": [-3, 0, 3], "min": 0.5, "max_worse": "50%", **more}])

    every = found(made, "good", "good", asked())
    gates = ("slices of age", "slices of age beside the champion")
    assert [every[gate].status for gate in gates] == [UNDECIDED, UNDECIDED]
    assert every["slices of age"].evidence["left_out"] == ["from 3", "under -3"]
    every = found(made, "good", "good", asked(small="skip"))
    assert [every[gate].status for gate in gates] == [PASSED, PASSED]
    assert sorted(every["slices of age"].evidence["groups"]) == ["-3 to 0", "0 to 3"]


# --- stress ----------------------------------------------------------------------------------------------------------


def test_outputs_that_are_not_finite_are_caught(made: Path) -> None:
    every = found(made, "not_finite", "truth", policy(made))
    assert (every["outputs"].status, every["quality"].status) == (FAILED, FAILED)


def test_a_model_that_noise_throws_about_is_caught(made: Path) -> None:
    asked = policy(made, robustness={"probes": []})
    assert found(made, "tree", "good", asked)["noise"].status is FAILED
    assert found(made, "good", "good", asked)["noise"].status is PASSED


def test_bad_values_are_held_against_what_the_champion_does(made: Path) -> None:
    """A linear model answers NaN to NaN; a tree has an answer to everything."""
    every = found(made, "good", "tree", policy(made, robustness={}))["bad values"]
    assert (every.status, every.evidence["not_finite"]) == (FAILED, 16)
    asked = policy(made, robustness={})
    same = found(made, "truth", "truth", asked)["bad values"]
    assert (same.status, same.evidence["champion_too"] > 0) == (PASSED, True)
    strict = found(made, "truth", "truth", policy(made, robustness={"strict": True, "probes": ["missing"]}))[
        "bad values"
    ]
    assert (strict.status, strict.evidence["not_finite"]) == (FAILED, 16)
    assert strict.evidence["first"][0] == {"column": "age", "value": "nan", "answer": "not finite"}
    alone = found(made, "truth", None, asked)["bad values"]
    assert alone.status is FAILED


def test_directions_and_bounds(made: Path) -> None:
    rules = {
        "bounds": [{"low": 0, "high": 1}, {"output": "probabilities", "high": 0.5}],
        "monotone": [{"column": "age"}, {"column": "income", "direction": "decreasing"}],
    }
    asked = policy(made, rules=rules | {"bounds": [{"low": 0, "high": 1}]})
    steady = found(made, "good", "good", asked)
    assert {steady[g].status for g in ("bounds of probabilities", "direction of age", "direction of income")} == {
        PASSED
    }
    crooked = found(made, "tree", "good", asked)
    assert (crooked["direction of age"].status, crooked["direction of income"].status) == (FAILED, FAILED)
    with_half = policy(made, rules={"bounds": [{"high": 0.5}]})
    assert found(made, "good", "good", with_half)["bounds of probabilities"].status is FAILED
    wrong = policy(made, rules={"monotone": [{"column": "age", "direction": "decreasing"}]})
    assert found(made, "good", "good", wrong)["direction of age"].evidence["wrong"] > 3000


def test_a_slow_model_is_caught_by_the_ratio(made: Path) -> None:
    asked = policy(made, latency={"p50": 3, "p99": None, "runs": 1000})
    slow = found(made, "slow", "truth", asked)["latency in batches of 1, p50"]
    assert slow.status is FAILED
    assert slow.evidence["low"] > 3
    assert found(made, "truth", "truth", asked)["latency in batches of 1, p50"].status is PASSED


# --- models that break -----------------------------------------------------------------------------------------------


def run_fakes(folder: Path, ours: Script, theirs: Script) -> dict[str, Finding]:
    """``y = 2x + 1`` of four columns, as a regression of the first output on the label."""
    (folder / "x.csv").write_text("a,b,label\n" + "1,2,3\n" * 40)
    asked = GatePolicy.model_validate(
        {"task": "regression", "holdout": {"path": "x.csv", "label": "label"}}, context=Context(folder)
    )
    request = LoadRequest("m", "1", folder / "m.onnx", ModelOptions())
    engines = [FakeRuntime(script).load(request) for script in (ours, theirs)]
    holdout = read_holdout(asked, digest_files(asked.paths()))
    return {f.gate: f for f in judge(Contest(*engines), asked, holdout, Pace(), lambda _: None)}


def test_a_candidate_that_cannot_run_fails_and_a_champion_is_then_none(tmp_path: Path) -> None:
    breaks = Script(width=2, faults={0: RuntimeFailure("It broke.")})
    narrow = Script(width=1)
    assert run_fakes(tmp_path, breaks, Script(width=2))["run"].status is FAILED
    assert run_fakes(tmp_path, narrow, narrow)["run"].status is UNDECIDED
    assert "one number per row" in run_fakes(tmp_path, Script(width=2), Script(width=2))["run"].reason


def test_answers_that_are_no_probabilities_fail_beside_a_champion_whose_are(made: Path, tmp_path: Path) -> None:
    """The truth without its sigmoid."""
    import onnx

    model = onnx.load(made / "truth.onnx")
    sigmoid = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    sigmoid.op_type = "Identity"
    onnx.save(model, made / "logits.onnx")
    every = found(made, "logits", "truth", policy(made))
    assert every["run"].status is FAILED
    assert "wanted probabilities" in every["run"].reason
    assert found(made, "logits", "logits", policy(made))["run"].status is UNDECIDED


def test_admission_speaks_too(made: Path) -> None:
    """Another signature than the champion's."""
    every = found(made, "truth", "good", policy(made))
    assert every["admission"].status is FAILED
    assert np.all([check["detail"] for check in every["admission"].evidence.values()])


def test_an_index_out_of_range_that_is_refused_is_answered_well(tmp_path: Path) -> None:
    """The graph refuses indexes that its table does not have, and there are no floats to disturb."""
    models.lookup(tmp_path / "m.onnx")
    (tmp_path / "x.csv").write_text("x,label\n" + "\n".join(f"{i % 8},{i % 8 * 10}" for i in range(100)))
    about = {"path": "x.csv", "label": "label", "columns": ["x"]}
    every = found(tmp_path, "m", "m", policy(tmp_path, task="regression", holdout=about, robustness={}))
    assert (every["quality"].status, every["noise"].status) == (PASSED, UNDECIDED)
    assert every["bad values"].status is PASSED
    assert (every["bad values"].evidence["rows"], every["bad values"].evidence["refused"]) == (8, 8)


def test_a_gate_that_cannot_be_decided_hides_no_other(made: Path) -> None:
    asked = policy(made, slices=[{"column": "city", "min": 0.5}, {"column": "region", "min": 0.99}])
    every = found(made, "good", "good", asked)
    assert (every["slices of city"].status, every["slices of region"].status) == (UNDECIDED, FAILED)
