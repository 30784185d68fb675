"""Models and data of the gates' tests, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import gate_models


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file per model of ``gate_models``, and holdout.csv."""
    folder = tmp_path_factory.mktemp("gates")
    for name in ("good", "worse", "biased", "tree", "slow", "truth", "not_finite", "line"):
        getattr(gate_models, name)(folder / f"{name}.onnx")
    gate_models.good(folder / "again.onnx", seed=11)
    gate_models.line(folder / "off.onnx", shift=0.5)
    gate_models.write_holdout(folder / "holdout.csv")
    gate_models.write_holdout(folder / "unlabelled.csv", labels=False)
    return folder
