"""Requests, answers and tensors survive the way to the codec process and back."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.codec.process import messages
from server.codec.process.messages import Notice, Unfit, pack_tensors, packed_head, unpack_tensors
from server.codec.process.steps import at_once
from server.types import Buffer, InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor

texts = st.lists(st.text().map(str.encode))
tensors = st.lists(
    st.one_of(
        texts.map(lambda elements: Tensor("t", "BYTES", (len(elements),), elements)),
        st.binary().map(lambda data: Tensor("é", "UINT8", (len(data), 1), data)),
    )
)


def there_and_back(items: list[Tensor]) -> list[Tensor]:
    entries, chunks = at_once(pack_tensors(items))
    return at_once(unpack_tensors(json.loads(json.dumps(entries)), memoryview(b"".join(chunks))))


@given(tensors)
def test_tensors(items: list[Tensor]) -> None:
    assert there_and_back(items) == items


def sent(head: dict[str, Any], chunks: list[Buffer]) -> tuple[dict[str, Any], memoryview]:
    """As the other side has it."""
    text = packed_head(head)
    whole = bytearray(b"".join([text, *chunks]))
    notice = Notice.unpacked(Notice(1, len(text), len(whole)).packed())
    assert notice == (1, len(text), len(whole))
    return messages.parted(notice, memoryview(whole))


def test_tensors_are_aligned() -> None:
    items = [Tensor("t", "UINT8", (size,), bytes(size)) for size in (1, 5, 16, 17)]
    items += [Tensor("s", "BYTES", (2,), [b"a", b"bc"]), Tensor("f", "FP64", (1,), bytes(8))]
    head, data = sent(*at_once(messages.decoded(InferenceRequest("m", "1", "", items))))
    for tensor in at_once(messages.request_of(head, data, "m", "1")).inputs:
        assert tensor.datatype == "BYTES" or tensor.array().ctypes.data % 16 == 0


def test_many_elements_are_parted_in_pieces() -> None:
    items = [Tensor("t", "BYTES", (9000,), [b"%d" % i if i % 3 else b"" for i in range(9000)])]
    assert sum(1 for _ in pack_tensors(items)) == 3
    assert there_and_back(items) == items


@pytest.mark.parametrize("elements", [[b"\xff"], [b"a", b"b\xffc"], [b""] * 5000 + [b"\xff\xff"]])
def test_bytes_that_are_no_text_are_not_taken(elements: list[bytes]) -> None:
    with pytest.raises(Unfit):
        at_once(pack_tensors([Tensor("t", "BYTES", (len(elements),), elements)]))


def test_a_request() -> None:
    request = InferenceRequest(
        "m",
        "3",
        "id \u2028 é\0",
        [Tensor("x", "INT8", (2,), b"ab"), Tensor("s", "BYTES", (), [b"q"])],
        [RequestedOutput("y"), RequestedOutput("z", False, 2)],
        {"whole": 1, "ratio": 1.0, "flag": True, "text": "\U0001f600", "huge": 10**60, "endless": -math.inf},
        binary_output=True,
    )
    head, data = sent(*at_once(messages.decoded(request)))
    back = at_once(messages.request_of(head, data, "m", "3"))
    assert back == request
    assert [type(value) for value in back.parameters.values()] == [int, float, bool, str, int, float]


def test_an_answer() -> None:
    response = InferenceResponse("m", "3", "a", [Tensor("y", "FP32", (1,), b"abcd")], {"p": math.nan})
    outputs = [RequestedOutput("y", False)]
    job, chunks, kept = at_once(messages.encode_job(response, outputs, True, False))
    assert kept == []
    head, data = sent(job, chunks)
    back = at_once(messages.response_of(head, data))
    assert math.isnan(back.parameters.pop("p"))
    response.parameters.clear()
    assert back == response
    assert messages.unpacked_outputs(head["outputs"]) == outputs
    assert (head["binary_default"], head["strict_json"]) == (True, False)


def test_limits() -> None:
    limits = RequestLimits(*range(1, 10))
    head, _ = sent(messages.decode_job(7, limits), [])
    assert messages.limits_of(head) == limits
    assert head["json_size"] == 7
