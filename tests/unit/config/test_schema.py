"""The published JSON Schema: well formed, in step with the models, with values as the file writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.config.load import parse_config
from server.config.model import Config
from server.config.problems import InvalidConfig
from server.config.schema import DIALECT, config_schema

_KEYWORDS = {
    "$defs", "$ref", "$schema", "additionalProperties", "anyOf", "const", "default", "description", "enum",
    "exclusiveMaximum", "exclusiveMinimum", "items", "maxItems", "maxLength", "maxProperties", "maximum", "minItems",
    "minLength", "minProperties", "minimum", "pattern", "patternProperties", "properties", "required", "title", "type",
}  # fmt: skip


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and every schema in it."""
    yield schema
    for key in ("properties", "patternProperties", "$defs"):
        for inner in schema.get(key, {}).values():
            yield from subschemas(inner)
    for inner in [*schema.get("anyOf", []), schema.get("items"), schema.get("additionalProperties")]:
        if isinstance(inner, dict):
            yield from subschemas(inner)


def test_is_a_schema_of_the_dialect() -> None:
    schema = config_schema()
    assert schema["$schema"] == DIALECT
    assert json.loads(json.dumps(schema)) == schema
    for part in subschemas(schema):
        assert set(part) <= _KEYWORDS
        for pattern in [part.get("pattern"), *part.get("patternProperties", {})]:
            re.compile(pattern or "")
        if "$ref" in part:
            assert part["$ref"].removeprefix("#/$defs/") in schema["$defs"]


def test_every_section_refuses_unknown_keys_as_the_models_do() -> None:
    schema = config_schema()
    sections = [schema, *schema["$defs"].values()]
    assert all(section["additionalProperties"] is False for section in sections)
    assert schema["properties"]["models"]["additionalProperties"] is False
    assert schema["required"] == ["apiVersion"]


def test_every_key_of_every_model_is_there() -> None:
    schema = config_schema()
    for name, section in [("", schema), *schema["$defs"].items()]:
        model: type[BaseModel] = Config if not name else _models()[name]
        keys = {field.alias or key for key, field in model.model_fields.items()}
        assert set(section["properties"]) == keys


def _models() -> dict[str, type[BaseModel]]:
    from server.config import (
        capture,
        gates,
        mlflow,
        model,
        monitor_sections,
        retrain,
        rollout_section,
        routing_sections,
        sinks,
    )

    modules = (
        model, capture, gates, mlflow, monitor_sections, rollout_section, routing_sections, retrain, sinks,
    )  # fmt: skip
    named = [found for module in modules for found in vars(module).values()]
    kinds = (kind for kind in named if isinstance(kind, type) and issubclass(kind, BaseModel))
    return {kind.__name__: kind for kind in kinds}


def test_defaults_are_what_the_file_would_say() -> None:
    """A default with a unit fits its own pattern."""
    schema = config_schema()
    assert schema["$defs"]["Server"]["properties"]["drain"]["default"] == "30s"
    assert schema["$defs"]["Listeners"]["properties"]["http"]["default"] == "127.0.0.1:8000"
    checked = 0
    for part in subschemas(schema):
        if "default" in part and "pattern" in part:
            assert re.search(part["pattern"], part["default"])
            checked += 1
    assert checked > 10


_HEAD = "apiVersion: tidegate/v1\n"
_TRACES = _HEAD + "telemetry: {{traces: {{endpoint: {}}}}}\n"
_HOLDOUT = _HEAD + "gates: {{g: {{holdout: {{path: h.csv, label: y, sha256: {}}}}}}}\n"
_WARMUP = (
    _HEAD + "models: {{m: {{source: m.onnx, warmup: [{{inputs: {{x: {{datatype: FP32, dims: [1], file: {}}}}}}}]}}}}\n"
)


@pytest.mark.parametrize(
    ("section", "key", "text", "right", "wrong"),
    [
        (
            "Traces",
            "endpoint",
            _TRACES,
            ("http://127.0.0.1:4318", "https://otel.example.com/v1/traces", "http://[::1]:4318/"),
            ("", "127.0.0.1:4318", "grpc://collector:4317", "http://", "http:///v1", "http://a b", "HTTP://a"),
        ),
        (
            "Holdout",
            "sha256",
            _HOLDOUT,
            ("0" * 64, "0123456789abcdef" * 4),
            ("", "0" * 63, "0" * 65, "A" * 64, "g" * 64, f"sha256:{'0' * 64}"),
        ),
        ("WarmupTensor", "file", _WARMUP, ("x", "a-b_c.1", "_x"), ("", ".x", "../x", "a/b", "a b", "\u0436")),
    ],
)
def test_texts_of_a_form_are_those_that_the_loader_takes(
    section: str, key: str, text: str, right: tuple[str, ...], wrong: tuple[str, ...]
) -> None:
    described = config_schema()["$defs"][section]["properties"][key]
    assert described["type"] == "string"
    for value in right:
        assert re.search(described["pattern"], value), value
        parse_config(text.format(json.dumps(value)))
    for value in wrong:
        assert not re.search(described["pattern"], value), value
        with pytest.raises(InvalidConfig, match=f"{key}: wanted"):
            parse_config(text.format(json.dumps(value)))


def test_null_is_offered_nowhere() -> None:
    assert '"null"' not in json.dumps(config_schema())
    assert all(part.get("default", "") is not None for part in subschemas(config_schema()))
