"""What people do with MLflow's own client, told line by line as JSON on standard input; one line answers each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import mlflow  # type: ignore[import-not-found]
import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.models import ModelSignature  # type: ignore[import-not-found]
from mlflow.types import Schema, TensorSpec  # type: ignore[import-not-found]


def publish(
    client: MlflowClient, model: str, path: str, external: bool, names: bool, place: str, trigger_id: str
) -> dict[str, Any]:
    """``place``: where artifacts are to lie, outside the server's proxy; "": behind it."""
    named = ("x", "y") if names else (None, None)
    schema, outputs = (Schema([TensorSpec(np.dtype("float32"), (-1, 4), name)]) for name in named)
    if place and client.get_experiment_by_name(place) is None:
        client.create_experiment(place, artifact_location=place)
    mlflow.set_experiment(place or "Default")
    with mlflow.start_run() as run:
        mlflow.log_param("depth", 10)
        info = mlflow.onnx.log_model(
            onnx.load(path),
            name="model",
            registered_model_name=model,
            signature=ModelSignature(schema, outputs),
            pip_requirements=["onnxruntime"],
            save_as_external_data=external,
        )
        mlflow.log_metric("auc", 0.91, model_id=info.model_id)
    version = info.registered_model_version
    if trigger_id:
        client.set_model_version_tag(model, str(version), "tidegate.trigger_id", trigger_id)
    uri = client.get_model_version_download_uri(model, str(version))
    return {"version": int(version), "run": run.info.run_id, "uri": uri}


def webhook(client: MlflowClient, url: str, secret: str) -> dict[str, Any]:
    events = ["model_version_alias.created", "model_version_alias.deleted"]
    client.create_webhook(name="tidegate", url=url, events=events, secret=secret)
    return {}


def alias(client: MlflowClient, model: str, name: str, version: int) -> dict[str, Any]:
    client.set_registered_model_alias(model, name, str(version))
    return {}


def aliases(client: MlflowClient, model: str) -> dict[str, Any]:
    return {name: int(version) for name, version in client.get_registered_model(model).aliases.items()}


def main() -> None:
    mlflow.set_tracking_uri(sys.argv[1])
    client = MlflowClient()
    acts: dict[str, Callable[..., dict[str, Any]]] = {
        "publish": publish,
        "webhook": webhook,
        "alias": alias,
        "aliases": aliases,
    }
    for line in sys.stdin:
        asked = json.loads(line)
        print("@" + json.dumps(acts[asked.pop("do")](client, **asked)), flush=True)


if __name__ == "__main__":
    main()
