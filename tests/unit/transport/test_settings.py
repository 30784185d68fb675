"""Trace and log settings: layers, checks, and that a refused update changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import InvalidArgument
from server.transport.settings import MemorySettings


def test_a_model_lies_over_the_global_settings() -> None:
    settings = MemorySettings()
    settings.update_trace("", {"trace_rate": "7", "trace_count": 5})
    settings.update_trace("m", {"trace_rate": ["9"], "trace_level": ["TIMESTAMPS", "TENSORS"]})
    assert settings.trace("m")["trace_rate"] == "9"
    assert settings.trace("m")["trace_count"] == "5"
    assert settings.trace("m")["trace_level"] == ["TIMESTAMPS", "TENSORS"]
    assert settings.trace("other")["trace_rate"] == "7"
    settings.update_trace("m", {"trace_rate": None})
    assert settings.trace("m")["trace_rate"] == "7"
    settings.update_trace("", {"trace_rate": None})
    assert settings.trace("m")["trace_rate"] == "1000"


def test_log_settings_change_and_clear() -> None:
    settings = MemorySettings()
    settings.update_logging({"log_info": False, "log_verbose_level": 3, "log_format": "ISO8601"})
    changed = settings.logging()
    assert (changed["log_info"], changed["log_verbose_level"], changed["log_format"]) == (False, 3, "ISO8601")
    settings.update_logging(dict.fromkeys(changed))
    assert settings.logging() == MemorySettings().logging()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"trace_file": "/etc/passwd"}, "cannot be changed by a client"),
        ({"trace_mode": "triton"}, "cannot be changed by a client"),
        ({"trace_rate": "x"}, "integer from 0"),
        ({"trace_rate": "-1"}, "integer from 0"),
        ({"trace_rate": "9" * 30}, "integer from 0"),
        ({"trace_rate": "\u0663"}, "integer from 0"),
        ({"trace_rate": True}, "integer from 0"),
        ({"trace_rate": 1.5}, "integer from 0"),
        ({"trace_rate": ["1", "2"]}, "takes one value, got 2"),
        ({"trace_count": "-2"}, "integer from -1"),
        ({"trace_level": ["LOUD"]}, "OFF, TIMESTAMPS, TENSORS"),
        ({"trace_level": []}, "OFF, TIMESTAMPS, TENSORS"),
        ({"nonsense": "1"}, "unknown trace setting 'nonsense'"),
    ],
)
def test_wrong_trace_settings_change_nothing(changes: dict[str, Any], text: str) -> None:
    settings = MemorySettings()
    before = settings.trace("m")
    with pytest.raises(InvalidArgument, match=text):
        settings.update_trace("m", {"log_frequency": "4", **changes})
    assert settings.trace("m") == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"log_file": "x"}, "cannot be changed by a client"),
        ({"log_info": 1}, "true or false"),
        ({"log_verbose_level": -1}, "integer from 0"),
        ({"log_verbose_level": {}}, "integer from 0"),
        ({"log_format": "xml"}, "default, ISO8601"),
        ({"log_format": []}, "default, ISO8601"),
        ({"log": 1}, "unknown log setting"),
    ],
)
def test_wrong_log_settings_change_nothing(changes: dict[str, Any], text: str) -> None:
    settings = MemorySettings()
    with pytest.raises(InvalidArgument, match=text):
        settings.update_logging({"log_error": False, **changes})
    assert settings.logging() == MemorySettings().logging()
