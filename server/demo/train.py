"""Trains the demo's own models with scikit-learn and exports them with skl2onnx. Returns ONNX files as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from server.demo.data import Digits, Flights

#: Opset of the exported graphs: old enough for every ONNX Runtime that the package accepts.
_OPSET: Final = 18


def _logistic() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))


def _perceptron() -> Any:
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), MLPClassifier((128, 64), early_stopping=True, random_state=0))


def _digit_forest() -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(100, random_state=0)


#: Version -> (what it is, how an untrained one is made).
DIGIT_VERSIONS: Final[Mapping[str, tuple[str, Callable[[], Any]]]] = {
    "1": ("logistic regression", _logistic),
    "2": ("perceptron 128-64", _perceptron),
    "3": ("random forest of 100 trees", _digit_forest),
}


def train_digits(digits: Digits, version: str) -> bytes:
    """ONNX: ``pixels`` FP32 [n, 64] -> ``label`` INT64 [n], ``probabilities`` FP32 [n, 10]."""
    from skl2onnx.common.data_types import FloatTensorType
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # matrices this small only lose time by being shared out
        classifier = DIGIT_VERSIONS[version][1]().fit(digits.train_pixels, digits.train_digit)
    return _export(classifier, [("pixels", FloatTensorType([None, digits.train_pixels.shape[1]]))])


def train_flights(flights: Flights, trees: int = 40, depth: int = 10) -> bytes:
    """ONNX: ``numbers`` FP32 [n, 5], ``categories`` BYTES [n, 2] -> ``label`` INT64 [n], ``probabilities`` FP32 [n, 2].

    Categories never seen in training are taken as "none of the known ones", so a new carrier is no error.
    """
    from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    number_columns = list(range(flights.numbers.shape[1]))
    text_columns = [len(number_columns) + i for i in range(flights.categories.shape[1])]
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    columns = ColumnTransformer(
        [("numbers", "passthrough", number_columns), ("categories", one_hot, text_columns)],
    )
    forest = RandomForestClassifier(trees, max_depth=depth, random_state=0, n_jobs=-1)
    rows = np.concatenate([flights.numbers.astype(object), flights.categories.astype(str).astype(object)], axis=1)
    classifier = make_pipeline(columns, forest).fit(rows, flights.late)
    inputs = [
        ("numbers", FloatTensorType([None, len(number_columns)])),
        ("categories", StringTensorType([None, len(text_columns)])),
    ]
    return _export(classifier, inputs)


def _export(classifier: Any, inputs: list[tuple[str, Any]]) -> bytes:
    from skl2onnx import to_onnx

    model = to_onnx(classifier, initial_types=inputs, options={"zipmap": False}, target_opset=_OPSET)
    content: bytes = model.SerializeToString()
    return content
