"""The configuration file's JSON Schema (draft 2020-12), for editors and ``check-config --schema``."""

from __future__ import annotations

from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema

from server.config.model import Config

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema of what a file may say: values with units are strings with a pattern."""
    schema = Config.model_json_schema(by_alias=True, schema_generator=_FileSchema)
    return {"$schema": DIALECT, **schema, "title": "Tidegate configuration"}


class _FileSchema(GenerateJsonSchema):
    """A key is left out for its default, never given as null, so null is not offered.

    Of a chain of checks every step says what it wants: pydantic's own way shows the first one only, without the pattern
    that a text must match besides.
    """

    def chain_schema(self, schema: Any) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for step in schema["steps"]:
            described |= self.generate_inner(step)
        return described

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        described = super().default_schema(schema)
        if described.get("default", "") is None:
            del described["default"]
        return described
