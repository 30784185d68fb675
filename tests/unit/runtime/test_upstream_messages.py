"""server.runtime.upstream_messages: every datatype in both forms, and answers that mix them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from server.codec.json import encode_infer
from server.errors import InputRejected, RuntimeFailure, UpstreamFailure
from server.runtime.base import Batch
from server.runtime.upstream_messages import HEADER_LENGTH, BadAnswer, Dialect, dimensions, error_text, json_object
from server.types import BYTES, DATATYPES, InferenceResponse, ModelSpec, Tensor, TensorSpec

#: Edges of every datatype, as little-endian bytes.
EDGES: dict[str, bytes] = {
    "BOOL": b"\0\1",
    **{
        name: np.array([np.iinfo(kind).min, np.iinfo(kind).max], kind).tobytes()
        for name, (kind, _) in DATATYPES.items()
        if kind.kind in "iu" and name != "BF16"
    },
    "FP16": np.array([-65504, 6e-8], "<f2").tobytes(),
    "BF16": np.array([0x3DCD, 0xFF7F], "<u2").tobytes(),
    "FP32": np.array([0.1, -3.4028235e38], "<f4").tobytes(),
    "FP64": np.array([0.1, 5e-324], "<f8").tobytes(),
}
LIMITLESS = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


def spec_of(datatype: str, shape: tuple[int, ...] = (-1,), rows: int = 0) -> ModelSpec:
    return ModelSpec("m", "1", (TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape),),
                     max_batch_size=rows)  # fmt: skip


def batch(parts: list[Any], shape: tuple[int, ...] = (2,)) -> Batch:
    return Batch(0, [shape], [parts])


def echoed(document: dict[str, Any]) -> bytes:
    """The answer of a server that gives its one input back."""
    (entry,) = document["inputs"]
    return json.dumps({"outputs": [entry | {"name": "y", "parameters": None}]}).encode()


@pytest.mark.parametrize("datatype", sorted(DATATYPES))
def test_json_carries_every_datatype_exactly(datatype: str) -> None:
    dialect = Dialect(spec_of(datatype), binary=False)
    size = DATATYPES[datatype][1]
    parts = [EDGES[datatype][:size], memoryview(EDGES[datatype])[size:]]
    body, headers = dialect.request(batch(parts))
    assert headers == {"Content-Type": "application/json"}
    (answer,) = dialect.answer(batch(parts), None, echoed(json.loads(body)))
    assert (answer.name, answer.datatype, answer.shape, bytes(answer.data)) == (  # type: ignore[arg-type]
        "y", datatype, (2,), EDGES[datatype],
    )  # fmt: skip


@pytest.mark.parametrize("datatype", sorted({*DATATYPES, BYTES}))
def test_binary_carries_every_datatype_as_it_is(datatype: str) -> None:
    dialect = Dialect(spec_of(datatype), binary=True)
    parts: list[Any] = [[b"\xff", b""]] if datatype == BYTES else [EDGES[datatype]]
    body, headers = dialect.request(batch(parts))
    size = int(headers[HEADER_LENGTH])
    document, raw = json.loads(body[:size]), body[size:]
    assert document["outputs"] == [{"name": "y", "parameters": {"binary_data": True}}]
    assert document["inputs"][0]["parameters"] == {"binary_data_size": len(raw)}
    head = json.dumps({"outputs": [document["inputs"][0] | {"name": "y"}]}).encode()
    (answer,) = dialect.answer(batch(parts), str(len(head)), head + raw)
    assert answer.data == parts[0]


def test_texts_go_as_texts() -> None:
    dialect = Dialect(spec_of(BYTES), binary=False)
    parts = [["ä".encode()], [b""]]
    body, _ = dialect.request(batch(parts))
    assert json.loads(body)["inputs"][0]["data"] == ["ä", ""]
    (answer,) = dialect.answer(batch(parts), None, echoed(json.loads(body)))
    assert answer.data == ["ä".encode(), b""]
    with pytest.raises(InputRejected, match="not UTF-8"):
        dialect.request(batch([[b"\xff", b""]]))


@pytest.mark.parametrize("datatype", sorted(LIMITLESS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_without_a_literal_are_refused_but_read(datatype: str, value: float) -> None:
    """Strict parsers refuse the literals, so none are sent; a server that writes them is understood."""
    dialect = Dialect(spec_of(datatype), binary=False)
    data = np.array([1, value], LIMITLESS[datatype])
    with pytest.raises(InputRejected, match="NaN or infinite"):
        dialect.request(batch([data.tobytes()]))
    tensor = Tensor("y", datatype, (2,), data.tobytes())
    chunks, _ = encode_infer(InferenceResponse("m", "1", "", [tensor]), outputs=[], binary_default=False)
    (answer,) = dialect.answer(batch([]), None, b"".join(chunks))
    np.testing.assert_array_equal(answer.array(), data)


def test_each_output_may_have_either_form_and_any_order() -> None:
    outputs = tuple(TensorSpec(name, "INT64", (-1, 2)) for name in "abc")
    dialect = Dialect(ModelSpec("m", "1", (TensorSpec("x", "FP32", (1,)),), outputs), binary=True)
    big = 2**63 - 1
    entry = {"datatype": "INT64", "shape": [1, 2]}
    document = {
        "outputs": [
            {"name": "c", "data": [[big, -big]], **entry},
            {"name": "unknown", "data": "anything"},
            {"name": "b", "parameters": {"binary_data_size": 16}, **entry},
            {"name": "a", "data": [3.0, 4], "parameters": {"content_type": "np"}, **entry},
        ]
    }
    head = json.dumps(document).encode()
    raw = np.array([5, 6], "<i8").tobytes()
    answers = dialect.answer(batch([]), str(len(head)), head + raw)
    assert [answer.array().tolist() for answer in answers] == [[[3, 4]], [[5, 6]], [[big, -big]]]


def test_integers_that_a_double_cannot_tell_apart_are_read_exactly() -> None:
    dialect = Dialect(spec_of("UINT64"), binary=False)

    def answered(number: str) -> list[Tensor]:
        head = '{"outputs": [{"name": "y", "datatype": "UINT64", "shape": [1], "data": ['
        return dialect.answer(batch([]), None, f"{head}{number}]}}]}}".encode())

    assert answered(str(2**64 - 1))[0].array().tolist() == [2**64 - 1]
    for wrong in (str(2**64), "1e300", "-1", "0.5", "true", "null"):
        with pytest.raises(UpstreamFailure, match="output 'y': element 0 of the data"):
            answered(wrong)


def test_rows_are_counted_where_batches_are_joined() -> None:
    dialect = Dialect(spec_of("FP32", (-1,), rows=8), binary=False)
    answer = b'{"outputs": [{"name": "y", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}'
    assert dialect.answer(Batch(2, [(2,)], [[b""]]), None, answer)[0].shape == (2,)
    with pytest.raises(UpstreamFailure, match="2 rows for a batch of 3"):
        dialect.answer(Batch(3, [(3,)], [[b""]]), None, answer)


@pytest.mark.parametrize("datatype", ["FP32", BYTES])
def test_parts_that_do_not_fill_the_shape_are_our_mistake(datatype: str) -> None:
    parts: list[Any] = [[b"a"]] if datatype == BYTES else [bytes(4)]
    with pytest.raises(RuntimeFailure, match="its shape says"):
        Dialect(spec_of(datatype), binary=True).request(batch(parts))


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b'{"error": "why"}', "why"), (b'{"error": 7}', ""), (b'{"detail": "x"}', ""), (b"[]", ""), (b"\xff", "")],
)
def test_the_reason_of_an_error_answer(text: bytes, reason: str) -> None:
    assert error_text(text) == reason


def test_documents_and_shapes() -> None:
    assert json_object(b'{"a": NaN}').keys() == {"a"}
    for text, reason in ((b"[1]", "not a JSON object"), (b"{", "not JSON"), (b"[" * 100_000, "not JSON")):
        with pytest.raises(BadAnswer, match=reason):
            json_object(text)
    assert dimensions([2, -1], least=-1) == (2, -1)
    for wrong in (None, "2", [2, -1], ["2"], [True], [2**62], [1.0], [1] * 33):
        assert dimensions(wrong, least=0) is None
