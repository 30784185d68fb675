"""A request is counted by what its caller was told: an answer that cannot be written is no success of the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.support import models
from tests.support.server import Server, serving
from tests.support.v2 import call, get

#: Models by the elements of a row: their answers are written at once, and off the loop.
WIDTHS = {"few": 4, "many": 1_000_000}


@pytest.fixture(scope="module", params=["native", "reference"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    for name, width in WIDTHS.items():
        models.identity(root / name / "1" / "model.onnx", width=width)
    config = {
        "apiVersion": "tidegate/v1",
        "server": {"strict_json": True},
        "models": {name: {"source": str(root / name)} for name in WIDTHS},
    }
    path = root / "tidegate.yaml"
    path.write_text(json.dumps(config))
    with serving(str(path), "--state-dir", str(root / "state"), "--transport", request.param) as running:
        yield running


def ask(server: Server, model: str, value: float) -> tuple[int, Any]:
    """The input as binary data, the output as JSON."""
    raw = np.full(WIDTHS[model], value, "<f4").tobytes()
    parameters = {"binary_data_size": len(raw)}
    x = {"name": "x", "shape": [1, WIDTHS[model]], "datatype": "FP32", "parameters": parameters}
    head = json.dumps({"inputs": [x]}).encode()
    headers = {"inference-header-content-length": str(len(head))}
    status, body, _ = call(server.http, "POST", f"/v2/models/{model}/infer", head + raw, headers)
    return status, body


def counted(server: Server, model: str) -> tuple[int, int, int]:
    """Requests that succeeded and that failed, and runs of the model."""
    entry = get(server.http, f"/v2/models/{model}/stats")[1]["model_stats"][0]
    stats = entry["inference_stats"]
    return stats["success"]["count"], stats["fail"]["count"], entry["execution_count"]


@pytest.mark.parametrize("model", sorted(WIDTHS))
def test_numbers_that_strict_json_cannot_carry_are_counted_as_failed(server: Server, model: str) -> None:
    good, bad, runs = counted(server, model)
    status, body = ask(server, model, 2.5)
    assert (status, body["outputs"][0]["data"][0]) == (200, 2.5)
    assert counted(server, model) == (good + 1, bad, runs + 1)
    status, body = ask(server, model, float("nan"))
    assert status == 400
    assert "strict JSON" in body["error"]
    assert counted(server, model) == (good + 1, bad + 1, runs + 2)
