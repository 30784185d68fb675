"""Requests of a known form mean what they would mean if nothing had been remembered."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.codec.forms import LONGEST, Forms, form_of
from server.codec.json import decode_infer
from server.errors import InvalidArgument, TidegateError
from server.types import BYTES, InferenceRequest, RequestLimits, Tensor

LIMITS = RequestLimits()
#: Nothing of this length has a form, so it is read the usual way.
PADDING = b" " * (LONGEST + 1)


def read(text: bytes, binary: bytes = b"", limits: RequestLimits = LIMITS) -> InferenceRequest:
    return decode_infer(text + binary, model="m", version="", limits=limits, json_size=len(text) if binary else None)


def outcome(text: bytes, binary: bytes = b"") -> Any:
    return outcome_of(lambda: read(text, binary))


def outcome_of(reading: Callable[[], InferenceRequest]) -> Any:
    """What a request comes to, in values that can be compared."""
    try:
        request = reading()
    except TidegateError as error:
        return type(error), str(error)
    inputs = [
        (t.name, t.datatype, t.shape, t.data if isinstance(t.data, list) else bytes(t.data)) for t in request.inputs
    ]
    return inputs, request.id, request.outputs, request.parameters, request.binary_output


def agree(text: bytes, binary: bytes = b"") -> None:
    """Three times: the first shows a form, the second has it learned, the third is read by it."""
    wanted = outcome(text + PADDING, binary)
    for _ in range(3):
        assert outcome(text, binary) == wanted, text


def document(data: str, *, shape: str = "[1,3]", datatype: str = "FP32", rest: str = "", before: str = "") -> bytes:
    return f'{{{before}"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},"data":{data}}}]{rest}}}'.encode()


def test_numbers_change_and_nothing_else() -> None:
    before = '"id":"numbers","parameters":{"binary_data_output":true,"priority":3},'
    rest = ',"outputs":[{"name":"y","parameters":{"binary_data":false}}]'
    for step in range(5):
        agree(document(f"[{step}.5, -{step},1e{step}]", before=before, rest=rest))
    agree(document("[[1.5,2,3]]"))
    agree(document("[[ 4.5, 5,\n6]]"))
    agree(document("[ [1,2,3] ]", datatype="INT8"))


def test_a_list_behind_json_of_a_known_form_is_no_data() -> None:
    size = '"parameters":{"binary_data_size":8}'
    text = f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[2],{size}}}],"id":"data"}}'.encode()
    agree(text, struct.pack("<2f", 1, 2))
    for behind in (b"[]", b"[1]", b"[1,2]"):
        with pytest.raises(InvalidArgument, match="not valid JSON"):
            read(text + behind)


def test_a_form_is_used() -> None:
    forms = Forms()
    text = document("[1,2,3]")
    form = form_of(text, has_binary=False)
    assert form is not None
    request = read(text)
    for _ in range(2):
        assert forms.request(form, text, len(text), "m", "", LIMITS) is None
        forms.learn(form, request, 0, LIMITS)
    other = document("[4,5,6]")
    assert form_of(other, has_binary=False) == form
    found = forms.request(form, other, len(other), "m", "7", LIMITS)
    assert found is not None
    assert (found.version, found.inputs) == ("7", [Tensor("x", "FP32", (1, 3), struct.pack("<3f", 4, 5, 6))])
    assert forms.request(form, other, len(other), "m", "7", RequestLimits(max_dims=1)) is None, "other limits"


@pytest.mark.parametrize(
    "other",
    [
        "[1,2]",
        "[1,2,3,4]",
        "[]",
        "[1,2,null]",
        '[1,2,"3"]',
        "[1,2,true]",
        "[1,2,1e39]",
        "[1,2,1e400]",
        "[1,2,NaN]",
        "[1,2,Infinity]",
        "[1,2,3",
        "[1,2,3,]",
        "[1,2,[3]]",
        "[[1,2,3]]",
        "[[1],[2],[3]]",
        "null",
        '"[1,2,3]"',
        '{"data":[1,2,3]}',
        "[1,2,123456789012345678901234567890]",
        "[1,2,03]",
        "[1 2 3]",
    ],
)
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "FP16", "BF16", "INT64", "UINT8", "BOOL", "BYTES"])
def test_what_does_not_fit_a_known_form_is_answered_as_ever(other: str, datatype: str) -> None:
    for _ in range(3):
        outcome(document("[1,2,3]", datatype=datatype))
    agree(document(other, datatype=datatype))


def test_a_request_without_inputs_has_no_form_to_learn() -> None:
    forms, text = Forms(), b'{"parameters":{"data":"[1]"},"inputs":[]}'
    form = form_of(text, has_binary=False)
    assert form is not None
    for _ in range(3):
        forms.learn(form, read(text), 0, LIMITS)
        assert forms.request(form, text, len(text), "m", "", LIMITS) is None
    assert len(forms) == 0


def test_integers_beyond_a_double_stay_exact() -> None:
    for text in ("[1,2,3]", "[9007199254740993,1,2]", "[9223372036854775807,-9223372036854775808,0]", "[1.0,2,3]"):
        agree(document(text, datatype="INT64"))
    agree(document("[18446744073709551615,1,2]", datatype="UINT64"))
    agree(document("[9007199254740993.0,1,2]", datatype="INT64"))


@pytest.mark.parametrize(
    "text",
    [
        # the list that stands first is not the one that counts
        '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[7,8,9],"data":[%s]}]}',
        '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[%s],"data":[7,8,9]}]}',
        (
            '{"inputs":[{"name":"a","datatype":"FP32","shape":[1],"data":[%s]}],'
            '"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[7,8,9]}]}'
        ),
        '{"parameters":{"data":"[%s]"},"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[7,8,9]}]}',
        '{"x":{"data":[%s]},"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[7,8,9]}]}',
        '{"inputs":[{"name":"\\"data\\":[1]","datatype":"FP32","shape":[1,3],"data":[%s]}]}',
        '{"inputs":[{"data":[%s],"name":"x","datatype":"FP32","shape":[1,3]}]}',
        '{"inputs":[{"data":[[%s]],"name":"x","shape":[1,3],"datatype":"FP32"}]}',
        '{"inputs":[{"name":"x","data":null,"datatype":"FP32","shape":[%s]}]}',
        (
            '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,3],"data":[%s]},'
            '{"name":"z","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}'
        ),
        '{"inputs":[{"name":"x","datatype":"FP32","shape":[2,3],"data":[[%s],[4,5,6]]}]}',
        '{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1,3],"data":[[[%s]]]}]}',
        '{"inputs":[{"name":"x","datatype":"FP32","shape":[3,1],"data":[[%s]]}]}',
        '"data":[%s]',
        '[%s]"data"',
        '{"data":[%s]}',
    ],
)
def test_only_the_list_that_is_the_data_is_taken_for_it(text: str) -> None:
    for numbers in ("1,2,3", "4,5,6", "1", "2", "7,8,9"):
        agree((text % numbers).encode())


def test_what_was_handed_out_is_not_remembered() -> None:
    text = document("[1,2,3]", before='"parameters":{"priority":3},', rest=',"outputs":[{"name":"y"}]')
    for _ in range(4):
        request = read(text)
        assert request.parameters == {"priority": 3}
        assert [output.name for output in request.outputs] == ["y"]
        request.parameters.clear()
        request.outputs.clear()


def test_the_form_of_the_newest_request_is_tried_first() -> None:
    forms = Forms()
    text, other = document("[1,2,3]"), document("[4,5.5,6]")
    form = form_of(text, has_binary=False)
    assert form is not None
    for _ in range(2):
        forms.learn(form, read(text), 0, LIMITS)
    assert forms.newest(other, len(other), "m", "", LIMITS) is None, "of this model none was read"
    assert forms.request(form, text, len(text), "m", "", LIMITS) is not None
    found = forms.newest(other, len(other), "m", "7", LIMITS)
    assert found is not None
    assert (found.model, found.version) == ("m", "7")
    assert found.inputs == [Tensor("x", "FP32", (1, 3), struct.pack("<3f", 4, 5.5, 6))]
    assert forms.newest(other, len(other), "n", "", LIMITS) is None, "another model"
    assert forms.newest(other, len(other), "m", "", RequestLimits(max_dims=1)) is None, "other limits"
    assert forms.newest(other, len(other) - 1, "m", "", LIMITS) is None, "the last byte is no JSON"
    for data in ("[4,5]", "[4,5,6,7]", "[4,5,true]", "[4,5,[6]]", "4,5,6", '{"a":1,"b":2,"c":3}', '"abc"', "", " "):
        changed = document(data)
        assert forms.newest(changed, len(changed), "m", "", LIMITS) is None, data
    followed = text + b"??" + form[1]
    assert forms.newest(followed, len(text), "m", "", LIMITS) is None, "what follows the JSON belongs to no input"
    overlapping = form[0] + form[1][1:]
    assert forms.newest(overlapping, len(overlapping), "m", "", LIMITS) is None


#: What is put into bodies of a known form: more than a form may tell apart.
PIECES = [
    *(b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"-", b".", b"e", b"0", b"7", b" ", b"\n", b"\x00", b"\xff"),
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e400", b"1e39", b"18446744073709551616", b"9007199254740993.0"),
    *(b'"a"', b"[1]", b"{}", b"],[", b'],"data":[9,9,9', b'"id":"z",', b'"parameters":{},', b"\\u0078", b"// 1\n"),
    *(b'"shape":[3],', b'"outputs":[],', b'"inputs":[],', b"\xef\xbb\xbf"),
]


def mutants(text: bytes) -> Iterator[bytes]:
    """Each piece at each place, put in and in place of what is there; each stretch of few bytes left out or doubled."""
    for at in range(len(text) + 1):
        for piece in PIECES:
            yield text[:at] + piece + text[at:]
            yield text[:at] + piece + text[at + 1 :]
        for size in (1, 2, 3, 7):
            yield text[:at] + text[at + size :]
            yield text[:at] + text[at : at + size] + text[at:]


def read_anew(text: bytes, binary: bytes, size: int | None) -> Any:
    """A buffer that is no ``bytes`` is read without forms, and means the same."""
    return outcome_of(
        lambda: decode_infer(bytearray(text + binary), model="m", version="", limits=LIMITS, json_size=size)
    )


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (document("[1.5, 2, 3]"), b""),
        (document("[[1, 2.5e1, 3]]", rest=',"id":"i"'), b""),
        (document("[1,2,3]", datatype="INT64", before='"parameters":{"binary_data_output":true},'), b""),
        (document("[1,2,3]", datatype="BF16", before='"id":"\\u00e9\\"[1]",'), b""),
        (document("[true,false,true]", datatype="BOOL"), b""),
        (orjson.dumps({"inputs": [{"data": [1, 2, 3], "datatype": "FP64", "shape": [3], "name": "data"}]}), b""),
        (
            b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}]}',
            struct.pack("<2f", 1, 2),
        ),
    ],
)
def test_bodies_close_to_a_known_form_mean_what_they_say(text: bytes, contents: bytes) -> None:
    for number, changed in enumerate(mutants(text)):
        if number % 64 == 0:
            for _ in range(3):
                read(text, contents)  # by now the form is known, and the newest
        size = len(changed) if contents else None
        assert outcome(changed, contents) == read_anew(changed, contents, size), changed


def test_a_split_that_lies_close_to_a_known_one() -> None:
    text = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"parameters":{"binary_data_size":8}}]}'
    contents = struct.pack("<2f", 1, 2)
    for size in (*range(len(text) - 3, len(text) + 12), 0, 1):
        for _ in range(3):
            read(text, contents)
        body = text + contents
        now = outcome_of(lambda: decode_infer(body, model="m", version="", limits=LIMITS, json_size=size))  # noqa: B023
        assert now == read_anew(text, contents, size), size


def test_two_forms_of_one_model_in_turn() -> None:
    for step in range(6):
        agree(document(f"[{step},2,3]"))
        agree(document(f"[ {step},2]", shape="[2]", datatype="FP64", rest=',"id":"other"'))
        agree(described(("x", "FP32", [2], 8)), struct.pack("<2f", step, 1))


# --- the binary extension --------------------------------------------------------------------------------------------


def described(*inputs: tuple[str, str, list[int], int | list[Any]], **more: Any) -> bytes:
    """(name, datatype, shape, bytes behind the JSON or data in it)."""
    entries: list[dict[str, Any]] = []
    for name, datatype, shape, data in inputs:
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        if isinstance(data, int):
            entry["parameters"] = {"binary_data_size": data}
        else:
            entry["data"] = data
        entries.append(entry)
    return orjson.dumps({"inputs": entries, **more})


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        (described(("x", "FP32", [2, 3], 24)), (24, 23, 25, 0)),
        (described(("x", "FP32", [2, 3], 20)), (20, 24)),
        (described(("x", "INT64", [1], 8), ("z", "BOOL", [4], 4)), (12, 11, 13)),
        (
            described(("z", "BOOL", [4], 4), ("x", "FP64", [1], 8), id="i", parameters={"binary_data_output": True}),
            (12,),
        ),
        (described(("x", "FP32", [1], 4), ("z", "FP32", [1], [1.5])), (4, 8)),
        (described(("z", "FP32", [1], [1.5]), ("x", "FP32", [1], 4)), (4, 8)),
        (described(("x", "FP32", [0, 3], 0), ("z", "FP32", [1], 4)), (4, 0)),
        (described(("x", BYTES, [1], 8)), (8,)),
    ],
)
def test_binary_contents_are_where_the_form_says(text: bytes, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        for start in (0, 1, 2):
            agree(text, bytes([(start + k) % 3 for k in range(size)]))


@pytest.mark.parametrize(("count", "kind"), [(1024, bytes), (1025, memoryview)])
def test_small_contents_do_not_keep_the_body(count: int, kind: type) -> None:
    text = described(("x", "FP32", [count], 4 * count), id="kept")
    for _ in range(4):
        request = read(text, bytes(4 * count))
    assert type(request.inputs[0].data) is kind


def test_a_boolean_is_looked_at_each_time() -> None:
    text = described(("z", "BOOL", [2], 2))
    for _ in range(3):
        read(text, b"\x00\x01")
    with pytest.raises(InvalidArgument, match="a BOOL byte must be 0 or 1, got 2"):
        read(text, b"\x00\x02")


numbers = st.one_of(st.integers(-300, 300), st.floats(width=32), st.integers(-(2**70), 2**70), st.none(), st.booleans())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(numbers, max_size=4), min_size=1, max_size=4), st.sampled_from(["FP32", "INT64", "UINT8"]))
def test_any_numbers_in_turn(lists: list[list[Any]], datatype: str) -> None:
    for data in lists:
        text = ",".join(["null" if x is None else str(x).lower().replace("inf", "Infinity").replace("nan", "NaN")
                         if isinstance(x, bool | float) else str(x) for x in data])  # fmt: skip
        agree(document(f"[{text}]", datatype=datatype, shape=f"[1,{max(1, len(data))}]"))


def test_memory_is_bounded() -> None:
    forms = Forms()
    request = read(document("[1,2,3]"))
    for number in range(5000):
        text = document("[1,2,3]", before=f'"id":"{number}",')
        form = form_of(text, has_binary=False)
        assert form is not None
        for _ in range(2):
            forms.learn(form, request, 0, LIMITS)
    assert len(forms) <= 256
    for number in range(600):
        assert forms.request(form, text, len(text), f"m{number}", "", LIMITS) is not None
    kept = [n for n in range(600) if forms.newest(text, len(text), f"m{n}", "", LIMITS) is not None]
    assert len(kept) <= 256
    assert kept[-1] == 599
    forms.learn((b"[" * 5000, b""), request, 0, LIMITS)
    forms.learn((b"[" * 5000, b""), request, 0, LIMITS)
    assert len(forms) <= 256
