"""The document is closed in itself: every reference resolves, names are unique, path parameters are declared."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from server.transport.openapi import document

DOCUMENT = document("tidegate", "1.0")


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)


def resolve(reference: str) -> Any:
    node: Any = DOCUMENT
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in DOCUMENT["paths"].items():
        for operation in item.values():
            yield path, operation


def test_references_resolve_and_components_are_used() -> None:
    references = {node["$ref"] for node in nodes(DOCUMENT) if "$ref" in node}
    for reference in references:
        assert isinstance(resolve(reference), dict)
    for kind, components in DOCUMENT["components"].items():
        for name in components:
            assert f"#/components/{kind}/{name}" in references, f"{kind}/{name} is not used"


def test_operation_ids_are_unique() -> None:
    ids = [operation["operationId"] for _, operation in operations()]
    assert len(ids) == len(set(ids))


def test_path_parameters_are_declared() -> None:
    for path, operation in operations():
        declared = [resolve(parameter["$ref"]) for parameter in operation.get("parameters", [])]
        in_path = {parameter["name"] for parameter in declared if parameter["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", path)), path
        assert all(parameter["required"] for parameter in declared if parameter["in"] == "path")


def test_every_operation_has_an_answer_and_errors_in_one_shape() -> None:
    for path, operation in operations():
        assert "200" in operation["responses"], path
        assert "500" in operation["responses"], path
        for code, response in operation["responses"].items():
            if "$ref" in response:
                schema = resolve(response["$ref"])["content"]["application/json"]["schema"]
                assert (int(code) >= 400, schema) == (True, {"$ref": "#/components/schemas/Error"})


def test_version_and_title_are_the_servers() -> None:
    assert DOCUMENT["openapi"].startswith("3.1.")
    assert DOCUMENT["info"]["version"] == "1.0"
    assert DOCUMENT["info"]["title"].startswith("tidegate")
