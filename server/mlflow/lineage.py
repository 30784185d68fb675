"""Where a version comes from, as MLflow tells: the run, its parameters and metrics, its data set, the commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from router.registry.manifest import CodeSource, DataSource, Description, Lineage, Metric, Signature
from server.mlflow.fields import finite, object_of, objects_of, pairs_of, text_of

#: Tags of a version that say which request for retraining it answers.
TRIGGER_TAGS: Final = ("tidegate.trigger_id", "trigger_id")
_MOST: Final = 1000

#: ``ask(path, query)``: an answer of MLflow's, empty when it refuses.
Ask: TypeAlias = Callable[[str, Sequence[tuple[str, str]]], Mapping[str, Any]]


def trigger_of(version: Mapping[str, Any]) -> str:
    """The request for retraining that a version answers, "" when its tags name none. Raises Unusable."""
    tags = pairs_of(version, "tags")
    return next((tags[name] for name in TRIGGER_TAGS if name in tags), "")


def description_of(ask: Ask, version: Mapping[str, Any], signature: Signature | None) -> Description:
    """What is known of a version beside its files. Raises Unreachable or Unusable."""
    logged = _logged_model(ask, text_of(version, "model_id"))
    info = object_of(logged, "info")
    run_id = text_of(version, "run_id") or text_of(info, "source_run_id")
    run = _run(ask, run_id)
    of_model, of_run = object_of(logged, "data"), object_of(run, "data")
    return Description(
        signature=signature,
        metrics=_metrics(objects_of(of_model, "metrics") or objects_of(of_run, "metrics")),
        params=dict(islice((pairs_of(of_run, "params") | pairs_of(of_model, "params")).items(), _MOST)),
        lineage=Lineage(
            data=_data(run),
            code=_code(pairs_of(of_run, "tags")),
            parent_run=run_id,
            trigger_id=trigger_of(version),
        ),
        card=text_of(version, "description"),
        publisher=text_of(version, "user_id"),
    )


def _logged_model(ask: Ask, model_id: str) -> Mapping[str, Any]:
    if not model_id or "/" in model_id or model_id in (".", ".."):
        return {}
    return object_of(ask(f"/logged-models/{model_id}", ()), "model")


def _run(ask: Ask, run_id: str) -> Mapping[str, Any]:
    return object_of(ask("/runs/get", (("run_id", run_id),)), "run") if run_id else {}


def _metrics(rows: Sequence[Mapping[str, Any]]) -> tuple[Metric, ...]:
    """The finite ones, the last of each name and data set; sorted, as the order of the answer means nothing."""
    found = {}
    for row in rows[:_MOST]:
        name, value = text_of(row, "key"), finite(row.get("value"))
        dataset = text_of(row, "dataset_name") or "mlflow"
        if name and value is not None and abs(value) < 2.0**1023:
            found[dataset, name] = Metric(dataset, name, value)
    return tuple(found[key] for key in sorted(found))


def _data(run: Mapping[str, Any]) -> DataSource:
    """The first data set that the run had as input, by MLflow's name and digest (which is no SHA-256)."""
    inputs = objects_of(object_of(run, "inputs"), "dataset_inputs")
    if not inputs:
        return DataSource()
    dataset = object_of(inputs[0], "dataset")
    name, digest = text_of(dataset, "name"), text_of(dataset, "digest")
    return DataSource(uri=f"mlflow-dataset:{quote(name, safe='')}#{quote(digest, safe='')}")


def _code(tags: Mapping[str, str]) -> CodeSource:
    return CodeSource(tags.get("mlflow.source.git.repoURL", ""), tags.get("mlflow.source.git.commit", ""))
