"""Kinds of values that several sections share."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from server.config import capture, kinds, mlflow, retrain, sinks, units


@pytest.mark.parametrize(
    ("kind", "low", "high", "over"),
    [
        (kinds.Interval, "100ms", "1d", "2d"),
        (capture.SegmentAge, "100ms", "1d", "25h"),
        (mlflow.RequestTime, "100ms", "1m", "61s"),
        (retrain.Cooldown, "0s", "366d", "367d"),
        (sinks.CommandTime, "1s", "23h", "24h"),
        (kinds.HeaderSize, "1KiB", "1MiB", "2MiB"),
        (capture.DiskSize, "1MiB", "1024GiB", "1025GiB"),
        (mlflow.TakenSize, "1KiB", "1024GiB", "2TiB"),
        (sinks.LogSize, "4KiB", "1GiB", "2GiB"),
    ],
)
def test_amounts_with_bounds_are_refused_alike_everywhere(kind: Any, low: str, high: str, over: str) -> None:
    adapter: TypeAdapter[int] = TypeAdapter(kind)
    is_time = high[-1] in "dhms"
    parse = units.parse_duration if is_time else units.parse_size
    for text in (low, high):
        assert adapter.validate_python(text) == parse(text)
    pattern = adapter.json_schema()["pattern"]
    assert pattern == (units.DURATION_PATTERN if is_time else units.SIZE_PATTERN)
    assert re.search(pattern, over)
    with pytest.raises(ValidationError, match=re.escape(f"wanted {low} to {high}, got {over}")):
        adapter.validate_python(over)
    with pytest.raises(ValidationError, match=f"wanted a {'duration' if is_time else 'size'} with a unit"):
        adapter.validate_python(5)
