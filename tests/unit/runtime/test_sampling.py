from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from server.errors import ModelLoadError
from server.runtime.base import WarmupInput, WarmupSample
from server.runtime.sampling import Domain, domains, join, operator_batch, random_batch, random_rows
from server.types import ALL_DATATYPES, BYTES, DATATYPES, ModelSpec, TensorSpec

RNG = np.random.default_rng(1)


def spec(*inputs: TensorSpec, limit: int = 8) -> ModelSpec:
    return ModelSpec("m", "1", inputs, (), max_batch_size=limit)


X = TensorSpec("x", "FP32", (-1, 2))


@pytest.mark.parametrize("datatype", sorted(ALL_DATATYPES))
def test_every_datatype_gets_data_of_its_size(datatype: str) -> None:
    batch = random_batch(spec(TensorSpec("x", datatype, (-1, 3, -1))), Domain(5, 8), 4, RNG)
    assert batch.shapes == [(4, 3, 5)]
    (parts,) = batch.parts
    assert parts is not None
    assert len(parts) == 4
    size = 15 if datatype == BYTES else 15 * DATATYPES[datatype][1]
    assert [len(part) for part in parts] == [size] * 4


def test_integers_are_small_and_floats_within_one() -> None:
    model = spec(TensorSpec("i", "INT64", (-1, 500)), TensorSpec("f", "FP64", (-1, 500)))
    integers, floats = random_batch(model, Domain(1, 8), 1, RNG).parts
    assert integers is not None
    assert floats is not None
    ids = np.frombuffer(integers[0], "<i8")  # type: ignore[arg-type]
    reals = np.frombuffer(floats[0], "<f8")  # type: ignore[arg-type]
    assert (ids.min(), ids.max()) == (0, 7)
    assert 0 <= reals.min() <= reals.max() < 1


def test_joined_rows_keep_their_order() -> None:
    rows = random_rows(spec(X), Domain(1, 8), 3, RNG)
    joined = join(rows)
    assert (joined.rows, joined.shapes) == (3, [(3, 2)])
    assert joined.parts[0] == [row.parts[0][0] for row in rows]  # type: ignore[index]


def test_a_model_without_batch_gets_its_whole_shape() -> None:
    batch = random_batch(spec(TensorSpec("x", "FP32", (2, -1)), limit=0), Domain(3, 8), 7, RNG)
    assert (batch.rows, batch.shapes) == (1, [(2, 3)])


def test_optional_inputs_are_left_out() -> None:
    batch = random_batch(spec(X, TensorSpec("w", "FP32", (-1, 2), optional=True)), Domain(1, 8), 2, RNG)
    assert batch.parts[1] is None


def test_the_operators_shapes_are_tried_first() -> None:
    sample = WarmupSample("s", 1, {"x": WarmupInput("FP32", (48, 320))})
    first = next(domains(spec(TensorSpec("x", "FP32", (-1, -1, -1))), (sample,)))
    assert first.row_shape(TensorSpec("x", "FP32", (-1, -1, -1)), True) == (48, 320)


def test_domains_vary_only_what_the_model_has() -> None:
    assert len(list(domains(spec(X)))) == 1
    assert len(list(domains(spec(TensorSpec("x", "INT64", (-1, 2)))))) == 2
    assert len(list(domains(spec(TensorSpec("x", "INT64", (-1, -1)))))) == 8


def warm(
    entry: WarmupInput, folder: Path | None = None, batch_size: int = 2, model: ModelSpec | None = None
) -> list[object]:
    sample = WarmupSample("s", batch_size, {"x": entry})
    (parts,) = operator_batch(model or spec(X), sample, folder, RNG).parts
    assert parts is not None
    return list(parts)


def test_zero_random_and_file_data(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    one = np.array([1, 2], "<f4").tobytes()
    (tmp_path / "warmup" / "one").write_bytes(one)
    (tmp_path / "warmup" / "both").write_bytes(one + one)
    assert b"".join(warm(WarmupInput("FP32", (2,)))) == bytes(16)  # type: ignore[arg-type]
    assert len(b"".join(warm(WarmupInput("FP32", (2,), "random")))) == 16  # type: ignore[arg-type]
    assert warm(WarmupInput("FP32", (2,), "one"), tmp_path) == [one, one]
    assert warm(WarmupInput("FP32", (2,), "both"), tmp_path) == [one + one]


def test_strings_from_a_file_have_length_prefixes(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "text").write_bytes(b"\x02\0\0\0hi\0\0\0\0")
    model = spec(TensorSpec("x", BYTES, (-1, 2)))
    assert warm(WarmupInput(BYTES, (2,), "text"), tmp_path, 1, model) == [[b"hi", b""]]
    for broken, reason in ((b"\x02\0", "inside the length"), (b"\x09\0\0\0hi", "longer than the rest")):
        (tmp_path / "warmup" / "text").write_bytes(broken)
        with pytest.raises(ModelLoadError, match=reason):
            warm(WarmupInput(BYTES, (2,), "text"), tmp_path, 1, model)


@pytest.mark.parametrize(
    ("entry", "batch_size", "reason"),
    [
        (WarmupInput("FP32", (2,)), 9, "batch_size 9 is over max_batch_size 8"),
        (WarmupInput("FP64", (2,)), 1, "datatype FP64 is given, the model has FP32"),
        (WarmupInput("FP32", (3,)), 1, r"shape \[1, 3\] is given, the model has \[-1, 2\]"),
        (WarmupInput("FP32", (-1,)), 1, "must not have free dimensions"),
        (WarmupInput("FP32", (2,), "absent"), 1, "there is no file 'absent'"),
        (WarmupInput("FP32", (2,), "../secret"), 1, "there is no file '../secret'"),
        (WarmupInput("FP32", (2,), "short"), 1, "the file has 3 bytes, one row has 8"),
    ],
)
def test_a_sample_that_does_not_fit_says_so(tmp_path: Path, entry: WarmupInput, batch_size: int, reason: str) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "secret").write_bytes(bytes(8))
    (tmp_path / "warmup" / "short").write_bytes(bytes(3))
    with pytest.raises(ModelLoadError, match=reason):
        warm(entry, tmp_path, batch_size)


def test_samples_name_every_input_and_no_other() -> None:
    with pytest.raises(ModelLoadError, match="input 'x' is missing"):
        operator_batch(spec(X), WarmupSample("s", 1, {}), None, RNG)
    with pytest.raises(ModelLoadError, match="the model has no input 'z'"):
        operator_batch(spec(X), WarmupSample("s", 1, {"z": WarmupInput("FP32", (2,))}), None, RNG)
