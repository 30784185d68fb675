"""Lineage from MLflow's answers: what is kept, and in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from router.registry.manifest import CodeSource, DataSource, Description, Metric
from router.registry.origin import Unusable
from server.mlflow.lineage import description_of

VERSION = {"run_id": "r-1", "model_id": "m-1", "user_id": "olga", "description": "card"}


def told(version: Mapping[str, Any] = VERSION, **answers: Mapping[str, Any]) -> Description:
    asked: list[str] = []

    def ask(path: str, query: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
        asked.append(path)
        assert query == ((("run_id", "r-1"),) if path == "/runs/get" else ())
        return answers.get(path.split("/")[1].replace("-", "_"), {})

    return description_of(ask, version, None)


def test_nothing_told_is_nothing_claimed() -> None:
    found = told({})
    assert found == Description()


def test_metrics_of_the_model_go_before_those_of_the_run() -> None:
    def metric(key: str, value: object, dataset: str = "") -> dict[str, object]:
        return {"key": key, "value": value, "dataset_name": dataset}

    run = {"run": {"data": {"metrics": [metric("b", 1), metric("a", 2)]}}}
    assert told(runs=run).metrics == (Metric("mlflow", "a", 2.0), Metric("mlflow", "b", 1.0))
    rows = [metric("a", 1, "d"), metric("a", 3, "d"), metric("n", "NaN"), metric("i", float("inf")), metric("t", True)]
    logged = {"model": {"data": {"metrics": rows}}}
    assert told(runs=run, logged_models=logged).metrics == (Metric("d", "a", 3.0),)


def test_params_tags_and_texts() -> None:
    run = {"run": {"data": {"params": [{"key": "a", "value": "1"}, {"key": "b", "value": "2"}]}}}
    logged = {"model": {"data": {"params": [{"key": "b", "value": "3"}]}}}
    version = {
        **VERSION,
        "tags": [{"key": "trigger_id", "value": "t"}, {"key": "tidegate.trigger_id", "value": "ours"}],
    }
    found = told(version, runs=run, logged_models=logged)
    assert found.params == {"a": "1", "b": "3"}
    assert (found.lineage.trigger_id, found.lineage.parent_run) == ("ours", "r-1")
    assert (found.card, found.publisher) == ("card", "olga")
    assert (found.lineage.code, found.lineage.data) == (CodeSource(), DataSource())


def test_the_run_of_a_logged_model_is_found_when_the_version_names_none() -> None:
    logged = {"model": {"info": {"source_run_id": "r-1"}}}
    assert told({"model_id": "m-1"}, logged_models=logged).lineage.parent_run == "r-1"


@pytest.mark.parametrize("model_id", ["..", ".", "a/b", "../../runs"])
def test_ids_that_lead_elsewhere_are_not_asked_for(model_id: str) -> None:
    def ask(path: str, _query: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
        raise AssertionError(path)

    assert description_of(ask, {"model_id": model_id}, None).params == {}


@pytest.mark.parametrize(
    "run", [{"run": []}, {"run": {"data": {"params": {}}}}, {"run": {"data": {"tags": [{"key": 1}]}}}]
)
def test_answers_without_sense_are_refused(run: Mapping[str, Any]) -> None:
    with pytest.raises(Unusable):
        told(runs=run)
