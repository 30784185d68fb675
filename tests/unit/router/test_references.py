"""router.registry.references."""

from __future__ import annotations

import pytest

from router.registry.references import split_reference


@pytest.mark.parametrize(
    ("reference", "parts"),
    [("m", ("m", "")), ("m:7", ("m", "7")), ("m@champion", ("m", "@champion")), ("m:", ("m", "")), ("", ("", ""))],
)
def test_split(reference: str, parts: tuple[str, str]) -> None:
    assert split_reference(reference) == parts
