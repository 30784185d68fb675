"""The OpenAPI 3.1 document of the inference address, for ``GET /openapi.json``. It describes; it does not route."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, TypeAlias

from server.transport.http_infer import MAX_TIMEOUT_MS

Node: TypeAlias = dict[str, Any]

_DATATYPES: Final = [
    *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "BF16", "FP32", "FP64", "BYTES"),
]


def _ref(name: str) -> Node:
    return {"$ref": f"#/components/schemas/{name}"}


def _array(items: Node) -> Node:
    return {"type": "array", "items": items}


def _object(properties: Node, *required: str) -> Node:
    schema: Node = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return schema


_STRING: Final[Node] = {"type": "string"}
_FLAG: Final[Node] = {"type": "boolean"}
_COUNT: Final[Node] = {"type": "integer", "minimum": 0}
_SHAPE: Final[Node] = _array({"type": "integer", "format": "int64"})
_DIMS: Final[Node] = _array({"type": "integer", "format": "int64", "minimum": 0})
_TENSOR: Final[Node] = {"name": _STRING, "datatype": {"type": "string", "enum": _DATATYPES}}
_DATA: Final[Node] = {
    "type": "array",
    "description": "Elements in row-major order, flat or nested as the shape says; BYTES are UTF-8 strings. Absent "
    "when contents follow in binary.",
    "items": {},
}

_SCHEMAS: Final[Node] = {
    "Error": _object({"error": _STRING}, "error"),
    "Live": _object({"live": _FLAG}, "live"),
    "Ready": _object({"ready": _FLAG}, "ready"),
    "ModelReady": _object({"name": _STRING, "ready": _FLAG}, "name", "ready"),
    "ServerMetadata": _object(
        {"name": _STRING, "version": _STRING, "extensions": _array(_STRING)}, "name", "version", "extensions"
    ),
    "TensorMetadata": _object({**_TENSOR, "shape": _SHAPE}, "name", "datatype", "shape"),
    "ModelMetadata": _object(
        {
            "name": _STRING,
            "versions": _array(_STRING),
            "platform": _STRING,
            "inputs": _array(_ref("TensorMetadata")),
            "outputs": _array(_ref("TensorMetadata")),
        },
        *("name", "versions", "platform", "inputs", "outputs"),
    ),
    "ModelConfig": {"type": "object", "description": "The model configuration, with the field names of config.pbtxt."},
    "Parameters": {"type": "object", "additionalProperties": {"type": ["boolean", "number", "string"]}},
    "RequestInput": _object(
        {**_TENSOR, "shape": _DIMS, "parameters": _ref("Parameters"), "data": _DATA}, "name", "datatype", "shape"
    ),
    "RequestedOutput": _object({"name": _STRING, "parameters": _ref("Parameters")}, "name"),
    "InferRequest": _object(
        {
            "id": _STRING,
            "parameters": _ref("Parameters"),
            "inputs": _array(_ref("RequestInput")),
            "outputs": _array(_ref("RequestedOutput")),
        },
        "inputs",
    ),
    "ResponseOutput": _object(
        {**_TENSOR, "shape": _DIMS, "parameters": _ref("Parameters"), "data": _DATA}, "name", "datatype", "shape"
    ),
    "InferResponse": _object(
        {
            "id": _STRING,
            "model_name": _STRING,
            "model_version": _STRING,
            "parameters": _ref("Parameters"),
            "outputs": _array(_ref("ResponseOutput")),
        },
        *("model_name", "outputs"),
    ),
    "Duration": _object({"count": _COUNT, "ns": _COUNT}),
    "ModelStatistics": _object(
        {
            "name": _STRING,
            "version": _STRING,
            "last_inference": _COUNT,
            "inference_count": _COUNT,
            "execution_count": _COUNT,
            "inference_stats": {"type": "object", "additionalProperties": _ref("Duration")},
            "batch_stats": _array({"type": "object"}),
        },
        *("name", "version"),
    ),
    "Statistics": _object({"model_stats": _array(_ref("ModelStatistics"))}, "model_stats"),
    "IndexRequest": _object({"ready": _FLAG}),
    "IndexEntry": _object(
        {
            "name": _STRING,
            "version": _STRING,
            "state": {"type": "string", "enum": ["READY", "UNAVAILABLE", "LOADING", "UNLOADING"]},
            "reason": _STRING,
        },
        "name",
    ),
    "Index": _array(_ref("IndexEntry")),
    "Feedback": _object(
        {
            "id": {"type": "string", "description": "x-tidegate-id of the answer, or the id that the client sent."},
            "key": {"type": "string", "description": "The routing key, instead of an id."},
            "outcome": {
                "type": ["number", "string", "boolean"],
                "description": "What became of it. As text: a number, true, false, yes, no, or the name of a class "
                "where the model's labels have classes. Any other text has the whole list refused.",
            },
            "name": {"type": "string", "description": "Which outcome; may be left out when there is one."},
            "row": {**_COUNT, "description": "Which row of the request; 0 when it is left out."},
            "time": {
                "type": "string",
                "format": "date-time",
                "description": "When the outcome was, with its offset from UTC: which window of time the labels count "
                "it in. Left out or in the future, it is now.",
            },
        },
        "outcome",
    ),
    "Feedbacks": {"oneOf": [_ref("Feedback"), _array(_ref("Feedback"))]},
    "FeedbackTaken": _object(
        {
            "accepted": {**_COUNT, "description": "Outcomes of the request."},
            "joined": {
                **_COUNT,
                "description": "Those of them that the model's labels or its experiment took. Labels are joined a "
                "moment later: whether their id was known is in tidegate_label_unknown_labels_total.",
            },
        },
        *("accepted", "joined"),
    ),
    "ControlRequest": _object({"parameters": _ref("Parameters")}),
    "Empty": {"type": "object"},
    "TraceSettings": {
        "type": "object",
        "description": "Numbers are written as text; null in a request clears a setting.",
        "additionalProperties": {"type": ["string", "integer", "array", "null"]},
    },
    "LogSettings": {
        "type": "object",
        "description": "null in a request clears a setting.",
        "additionalProperties": {"type": ["boolean", "integer", "string", "null"]},
    },
    "Document": {"type": "object"},
}


def _parameter(name: str, place: str, schema: Node, text: str) -> Node:
    node: Node = {"name": name, "in": place, "description": text, "schema": schema}
    if place == "path":
        node["required"] = True
    return node


_PARAMETERS: Final[Node] = {
    "model": _parameter("model", "path", {"type": "string", "minLength": 1}, "Name of a model."),
    "version": _parameter("version", "path", {"type": "string", "pattern": "^[0-9]+$"}, "Number of a version."),
    "timeout": _parameter(
        *("x-tidegate-timeout-ms", "header", {"type": "integer", "minimum": 1, "maximum": MAX_TIMEOUT_MS}),
        "The caller's deadline: after it the call is answered 504 and queued work is dropped.",
    ),
    "headerLength": _parameter(
        *("Inference-Header-Content-Length", "header", {"type": "integer", "minimum": 0}),
        "Length of the JSON part when binary tensors follow it. 0: the whole body is the one input, in binary.",
    ),
}

_HEADERS: Final[Node] = {
    "id": {"description": "Unique id of this request.", "schema": _STRING},
    "version": {"description": "Version that answered.", "schema": _STRING},
    "arm": {"description": "Arm of the route that answered.", "schema": _STRING},
    "generation": {"description": "Generation of the routing table.", "schema": _COUNT},
    "retryAfter": {"description": "Whole seconds to wait before another try.", "schema": _COUNT},
}

_ERRORS: Final = {
    400: "The request is malformed or does not fit the model; the text names what was wrong, wanted and got.",
    404: "No such model or version.",
    405: "The path is served with another method.",
    408: "The request did not arrive in time.",
    413: "The body, raw or decompressed, is over the limit.",
    415: "A Content-Encoding that is not spoken here.",
    429: "The server sheds load (by setting, instead of 503).",
    500: "Internal error; the text names the id to ask the operator about.",
    501: "A part of the protocol that this server does not offer.",
    503: "Not ready, shutting down, or shedding load; retry later.",
    504: "The caller's deadline passed.",
}
_ROUTE_ERRORS: Final = (400, 405, 500)
_MODEL_ERRORS: Final = (404, 503)
_BODY_ERRORS: Final = (408, 413, 415)


def _response(code: int) -> Node:
    node: Node = {"description": _ERRORS[code], "content": {"application/json": {"schema": _ref("Error")}}}
    if code in (429, 503):
        node["headers"] = {"Retry-After": {"$ref": "#/components/headers/retryAfter"}}
    return node


def _errors(codes: Iterable[int]) -> Node:
    return {str(code): {"$ref": f"#/components/responses/{code}"} for code in sorted(codes)}


def _operation(
    id_: str, summary: str, schema: str, *, parameters: Iterable[str] = (), body: str = "", errors: Iterable[int] = ()
) -> Node:
    codes = {*_ROUTE_ERRORS, *errors, *(_BODY_ERRORS if body else ())}
    node: Node = {
        "operationId": id_,
        "summary": summary,
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": _ref(schema)}}},
            **_errors(codes),
        },
    }
    names = list(parameters)
    if names:
        node["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    if body:
        node["requestBody"] = {"content": {"application/json": {"schema": _ref(body)}}}
    return node


def _not_ready(operation: Node, schema: str) -> Node:
    """Health routes answer 503 with the same body as 200."""
    content = {"application/json": {"schema": {"anyOf": [_ref(schema), _ref("Error")]}}}
    operation["responses"]["503"] = {"description": "Not ready.", "content": content}
    return operation


def _infer(id_: str, parameters: list[str]) -> Node:
    node = _operation(
        id_,
        "Run inference",
        "InferResponse",
        parameters=[*parameters, "timeout", "headerLength"],
        body="InferRequest",
        errors=(*_MODEL_ERRORS, 429, 501, 504),
    )
    octets = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
    node["requestBody"]["required"] = True
    node["requestBody"]["content"]["application/octet-stream"] = octets
    node["responses"]["200"]["content"]["application/octet-stream"] = octets
    node["responses"]["200"]["headers"] = {
        f"x-tidegate-{name}": {"$ref": f"#/components/headers/{name}"}
        for name in ("id", "version", "arm", "generation")
    }
    return node


def _model_paths(base: str, suffix: str, parameters: list[str]) -> Node:
    def get(name: str, summary: str, schema: str) -> Node:
        return _operation(f"{name}{suffix}", summary, schema, parameters=parameters, errors=_MODEL_ERRORS)

    ready = get("modelReady", "Is the model ready", "ModelReady")
    return {
        base: {"get": get("modelMetadata", "Signature of a model", "ModelMetadata")},
        f"{base}/ready": {"get": _not_ready(ready, "ModelReady")},
        f"{base}/config": {"get": get("modelConfig", "Configuration of a model", "ModelConfig")},
        f"{base}/stats": {"get": get("modelStatistics", "Statistics of a model", "Statistics")},
        f"{base}/infer": {"post": _infer(f"infer{suffix}", parameters)},
    }


def _settings(id_: str, schema: str, parameters: list[str]) -> Node:
    errors = _MODEL_ERRORS if parameters else ()
    return {
        "get": _operation(f"get{id_}", "Settings in force", schema, parameters=parameters, errors=errors),
        "post": _operation(f"set{id_}", "Change settings", schema, parameters=parameters, body=schema, errors=errors),
    }


def _control(name: str) -> Node:
    return {
        "post": _operation(
            *(f"{name}Model", f"{name.capitalize()} a model", "Empty"),
            parameters=["model"],
            body="ControlRequest",
            errors=_MODEL_ERRORS,
        )
    }


def _paths() -> Node:
    server = _operation("serverMetadata", "Name, version and extensions", "ServerMetadata")
    return {
        "/v2": {"get": server},
        "/v2/": {"get": {**server, "operationId": "serverMetadataSlash"}},
        "/v2/health/live": {"get": _not_ready(_operation("live", "Is the server alive", "Live"), "Live")},
        "/v2/health/ready": {"get": _not_ready(_operation("ready", "Is the server ready", "Ready"), "Ready")},
        "/v2/models/stats": {"get": _operation("statistics", "Statistics of all models", "Statistics")},
        **_model_paths("/v2/models/{model}", "", ["model"]),
        **_model_paths("/v2/models/{model}/versions/{version}", "Version", ["model", "version"]),
        "/v2/repository/index": {
            "post": _operation("index", "What the model repository holds", "Index", body="IndexRequest")
        },
        "/v2/models/{model}/feedback": {
            "post": _operation(
                "feedback",
                "What became of answered requests",
                "FeedbackTaken",
                parameters=["model"],
                body="Feedbacks",
                errors=_MODEL_ERRORS,
            )
        },
        "/v2/repository/models/{model}/load": _control("load"),
        "/v2/repository/models/{model}/unload": _control("unload"),
        "/v2/trace/setting": _settings("TraceSettings", "TraceSettings", []),
        "/v2/models/{model}/trace/setting": _settings("ModelTraceSettings", "TraceSettings", ["model"]),
        "/v2/logging": _settings("LogSettings", "LogSettings", []),
        "/openapi.json": {"get": _operation("openapi", "This document", "Document")},
    }


def document(name: str, version: str) -> Node:
    """The document of the server called ``name``."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name}: Open Inference Protocol V2",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": _paths(),
        "components": {
            "schemas": _SCHEMAS,
            "parameters": _PARAMETERS,
            "headers": _HEADERS,
            "responses": {str(code): _response(code) for code in _ERRORS},
        },
    }
