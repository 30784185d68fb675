"""A plain V2 JSON client on the standard library, for tests that want nothing between them and the wire."""

from __future__ import annotations

import http.client
import json
from typing import Any


def call(
    address: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any, dict[str, str]]:
    """(status, decoded JSON or raw bytes, headers in lower case) of one request on its own connection."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    try:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        raw = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        if found.get("content-type", "").startswith("application/json"):
            return response.status, json.loads(raw), found
        return response.status, raw, found
    finally:
        connection.close()


def get(address: str, path: str) -> tuple[int, Any]:
    status, body, _ = call(address, "GET", path)
    return status, body


def tensor(name: str, datatype: str, shape: list[int], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data}


def infer(address: str, model: str, inputs: list[dict[str, Any]], version: str = "", **more: Any) -> tuple[int, Any]:
    """POST one inference; (status, body)."""
    path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
    status, body, _ = call(address, "POST", path, {"inputs": inputs, **more})
    return status, body
