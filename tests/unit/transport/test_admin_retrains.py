"""server.transport.admin_retrains: what a person may send."""

from __future__ import annotations

import pytest

from server.errors import InvalidArgument
from server.transport.admin_retrains import parse


def test_reason_and_actor() -> None:
    assert parse(b'{"reason": "to see", "actor": "ada"}') == ("to see", "ada")
    assert parse(b'{"reason": "to see"}') == ("to see", "admin")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"[]", '"reason": TEXT'),
        (b"{}", '"reason": TEXT'),
        (b'{"reason": 1}', '"reason": TEXT'),
        (b'{"reason": "x", "why": "y"}', '"reason": TEXT'),
        (b'{"reason": "x", "actor": ""}', "actor must be"),
        (b'{"reason": "x", "actor": null}', "actor must be"),
        (b'{"reason": "x", "actor": "a\\nb"}', "actor must be"),
    ],
)
def test_what_is_refused(body: bytes, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        parse(body)
