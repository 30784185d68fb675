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
NAMES = st.sampled_from([b":path", b"te", b"x-a", b"x-a-bin", b"-bin", b"x-b"])


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


@given(st.lists(st.tuples(NAMES, st.binary(max_size=4)), max_size=8))
def test_as_decoded_at_once(headers: list[Header]) -> None:
    wanted: dict[str, str] = {}
    for name, value in headers:
        if not name.startswith(b":") and not name.endswith(b"-bin"):
            key, text = name.decode(), value.decode("latin-1")
            wanted[key] = f"{wanted[key]}, {text}" if key in wanted else text
    metadata = Metadata(tuple(headers))
    assert dict(metadata) == wanted
    assert {name: metadata.get(name) for name in ("te", "x-a", "x-b")} == {
        name: wanted.get(name) for name in ("te", "x-a", "x-b")
    }
