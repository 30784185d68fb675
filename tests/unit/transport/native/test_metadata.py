"""Metadata that is decoded on demand says what decoding all of it at once would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.transport.native.metadata import Metadata
from server.transport.native.session import Header

HEADERS: tuple[Header, ...] = (
    (b":path", b"/p"),
    (b"x-user", b"ann"),
    (b"x-many", b"1"),
    (b"trace-bin", b"\x00\xff"),
    (b"x-many", b"\xe9"),
    (b"x-empty", b""),
)
NAMES = st.sampled_from([b":path", b"te", b"x-a", b"x-a-bin", b"-bin", b"x-b", b"traceparent", b"traceparenu"])


def test_names_values_and_what_is_left_out() -> None:
    metadata = Metadata(HEADERS)
    assert dict(metadata) == {"x-user": "ann", "x-many": "1, é", "x-empty": ""}
    assert len(metadata) == 3
    assert metadata.get("x-empty", "default") == ""
    for absent in (":path", "trace-bin", "none", "X-User", "ü"):
        assert absent not in metadata
        assert metadata.get(absent) is None
        assert metadata.get(absent, "default") == "default"
        with pytest.raises(KeyError, match=absent):
            metadata[absent]
    assert 1 not in metadata
    assert [metadata.get(name) for name in ("x-user", "x-many", ":path", "none")] == ["ann", "1, é", None, None]


def test_what_every_call_is_asked_for() -> None:
    found = Metadata(((b":path", b"/p"), (b"content-type", b"a"), (b"grpc-timeout", b""), (b"content-type", b"b")))
    assert (found.path, found.content_type, found.timeout, found.encoded) == (b"/p", b"b", b"", False)
    assert found.size == len(":path/pcontent-typeagrpc-timeoutcontent-typeb")
    coded = Metadata(((b"grpc-encoding", b"gzip"), (b"content-type2", b"x"), (b"grpc-timeou", b"1S")))
    assert (coded.path, coded.content_type, coded.timeout, coded.encoded) == (b"", b"", None, True)
    assert Metadata(((b"grpc-timeout", b"1S"), (b"grpc-timeout", b"2S"))).timeout == b"1S, 2S"


@given(st.lists(st.tuples(NAMES, st.binary(max_size=4)), max_size=8))
def test_as_decoded_at_once(headers: list[Header]) -> None:
    wanted: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(b":") and not name.endswith(b"-bin"):
            key, text = name.decode(), value.decode("latin-1")
            wanted[key] = f"{wanted[key]}, {text}" if key in wanted else text
    metadata = Metadata(tuple(headers))
    assert dict(metadata) == wanted
    assert len(metadata) == len(wanted)
    assert {name: metadata.get(name) for name in ("te", "x-a", "x-b", "traceparent")} == {
        name: wanted.get(name) for name in ("te", "x-a", "x-b", "traceparent")
    }
    assert {name for name in ("te", "traceparent", "traceparenu") if name in metadata} == wanted.keys() - {"x-a", "x-b"}
    assert metadata.traceparent.decode("latin-1") == wanted.get("traceparent", "")
