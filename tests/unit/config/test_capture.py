"""server.config.capture: the ``capture`` section, what it compiles to, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from server.config.capture import Capture, capture_contradictions, compile_capture
from server.config.capture_options import CaptureSpec, ColumnRule
from server.config.kinds import Context

SECRET = {"KEY": "sixteen or more characters"}


def read(**section: Any) -> Capture:
    return Capture.model_validate(section, context=Context(Path("/etc/tidegate"), SECRET))


def test_defaults_capture_nothing() -> None:
    assert compile_capture(None) is None
    assert compile_capture(read()) is None


def test_a_model_goes_on_top_of_what_holds_for_all() -> None:
    settings = compile_capture(
        read(
            sample="1%",
            columns={"ssn": "drop", "age": {"bucket": [18, 65.5]}},
            models={"fraud": {"sample": "100%", "columns": {"ssn": "hmac"}, "max_columns": 8}, "other": {}},
            secret="${KEY}",
            folder="captured",
            segment={"rows": 100, "size": "1MiB", "age": "10s"},
            shadows=True,
        )
    )
    assert settings is not None
    age = ColumnRule("bucket", (18.0, 65.5))
    assert settings.default == CaptureSpec(100, {"ssn": ColumnRule("drop"), "age": age})
    assert settings.of("fraud") == CaptureSpec(10_000, {"ssn": ColumnRule("hmac"), "age": age}, 8)
    assert settings.of("other") == settings.of("unnamed") == settings.default
    assert (settings.secret, settings.folder) == (SECRET["KEY"], Path("/etc/tidegate/captured"))
    assert settings.shadows
    assert (settings.segment_rows, settings.segment_bytes, settings.segment_age_s) == (100, 2**20, 10.0)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sample": "101%"}, "sample"),
        ({"columns": {"a": "hash"}}, "wanted keep, drop, hmac or"),
        ({"columns": {"a": {"bucket": [2, 1]}}}, "must ascend"),
        ({"columns": {"a": {"bucket": []}}}, "bucket"),
        ({"columns": {"a": {"bucket": [float("nan")]}}}, "finite"),
        ({"secret": "in plain sight"}, "never as the value itself"),
        ({"max_disk": "1B"}, "wanted 1MiB to 1024GiB"),
        ({"segment": {"age": "1ms"}}, "wanted 100ms to 1d"),
        ({"events": {"url": "http://user@host/"}}, "the value is not shown"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        read(**section)
    assert message in str(refusal.value)


def test_rules_that_span_keys() -> None:
    section = read(
        columns={"a": "hmac"},
        models={"none": {"columns": {"b": "hmac"}}},
        segment={"size": "128MiB"},
    )
    paths = [found.path for found in capture_contradictions(section, {"m": None})]
    assert paths == [
        ("capture", "segment", "size"),
        ("capture", "models", "none"),
        ("capture", "models", "none", "columns", "b"),
        ("capture", "columns", "a"),
    ]
    assert list(capture_contradictions(read(columns={"a": "hmac"}, secret="${KEY}"), {})) == []
