"""A small MLflow: a real HTTP server with the answers of MLflow 3.17, as far as the gateway asks for them.

What is in it is changed by its methods, from any thread; ``trouble`` decides what goes wrong with a request.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

MLMODEL = b"""artifact_path: mlflow-artifacts:/0/models/m-1/artifacts
flavors:
  onnx:
    code: null
    data: model.onnx
    onnx_version: 1.22.0
    providers:
    - CUDAExecutionProvider
    - CPUExecutionProvider
  python_function:
    data: model.onnx
    loader_module: mlflow.onnx
mlflow_version: 3.17.2
model_uuid: m-1
signature:
  inputs: '[{"name": "x", "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]'
  outputs: '[{"name": "y", "type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]'
  params: null
"""
NOT_THERE = 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "not found"}
_ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"
_API = "/api/2.0/mlflow"


@dataclass
class Asked:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass
class Model:
    versions: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)


Reply = tuple[int, Any]


class Mlflow:
    """``trouble(asked)``: an answer in place of the right one, or None. An answer's bytes are sent as they are."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.lock = threading.RLock()
        self.models: dict[str, Model] = {}
        self.files: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.trouble: Callable[[Asked], Reply | None] = lambda _: None
        self.tags: dict[str, str] = {}
        #: Where the artifacts of versions lie, instead of behind the proxy.
        self.places: dict[tuple[str, int], str] = {}
        #: Tags of single versions, on top of those of all.
        self.own_tags: dict[tuple[str, int], dict[str, str]] = {}

    def add(self, model: str, files: Mapping[str, bytes], *, mlmodel: bytes = MLMODEL) -> int:
        """Register a version; its number."""
        with self.lock:
            versions = self.models.setdefault(model, Model()).versions
            number = max(versions, default=0) + 1
            versions[number] = f"0/models/m-{model}-{number}/artifacts"
            own = {"MLmodel": mlmodel, "conda.yaml": b"", "requirements.txt": b"mlflow\n"}
            for name, content in {**own, **files}.items():
                self.files[f"{versions[number]}/{name}"] = content
            return number

    def point(self, model: str, alias: str, version: int | None) -> None:
        with self.lock:
            aliases = self.models[model].aliases
            if version is None:
                aliases.pop(alias, None)
            else:
                aliases[alias] = version

    def tamper(self, model: str, version: int, name: str, content: bytes | None) -> None:
        """Put other bytes under a version, as anybody can with ``PUT`` on the artifact proxy; None: delete them."""
        with self.lock:
            path = f"{self.models[model].versions[version]}/{name}"
            if content is None:
                del self.files[path]
            else:
                self.files[path] = content

    def count(self, path: str) -> int:
        """How often something was asked whose path ends so."""
        with self.lock:
            return sum(asked.path.endswith(path) for asked in self.asked)

    # -- answers ----------------------------------------------------------------------------------------------------

    def answer(self, asked: Asked) -> Reply:
        with self.lock:
            self.asked.append(asked)
        trouble = self.trouble(asked)
        if trouble is not None:
            return trouble
        with self.lock:
            if asked.path.startswith(_ARTIFACTS):
                return self._artifact(asked.path.removeprefix(_ARTIFACTS).strip("/"), asked.query)
            return self._api(asked.path.removeprefix(_API), asked)

    def _api(self, path: str, asked: Asked) -> Reply:
        query = asked.query
        if path == "/registered-models/search":
            return 200, {"registered_models": [self._model(name) for name in sorted(self.models)]}
        if path == "/model-versions/search":
            name = query["filter"].removeprefix("name='").removesuffix("'")
            model = self.models.get(name, Model())
            return 200, {"model_versions": [self._version(name, n) for n in reversed(model.versions)]}
        if path == "/registered-models/alias":
            return self._alias(asked)
        if path.startswith("/logged-models/"):
            info = {"source_run_id": "run-7", "status": "LOGGED_MODEL_READY"}
            metric = {"key": "auc", "value": 0.91, "step": "0", "dataset_name": "holdout"}
            data = {"params": [{"key": "depth", "value": "10"}], "metrics": [metric, {"key": "loss", "value": "NaN"}]}
            return 200, {"model": {"info": info, "data": data}}
        if path == "/runs/get":
            tags = [{"key": "mlflow.source.git.commit", "value": "c0ffee"}]
            dataset = {"dataset": {"name": "flights", "digest": "ab12", "source_type": "local", "source": "{}"}}
            return 200, {"run": {"data": {"tags": tags}, "inputs": {"dataset_inputs": [dataset]}}}
        named = self.models.get(query.get("name", ""))
        if named is None:
            return NOT_THERE
        if path == "/registered-models/get":
            return 200, {"registered_model": self._model(query["name"])}
        if int(query["version"]) not in named.versions:
            return NOT_THERE
        if path == "/model-versions/get-download-uri":
            number = int(query["version"])
            place = self.places.get((query["name"], number), f"mlflow-artifacts:/{named.versions[number]}")
            return 200, {"artifact_uri": place}
        return 200, {"model_version": self._version(query["name"], int(query["version"]))}

    def _model(self, name: str) -> dict[str, Any]:
        model = self.models[name]
        aliases = [{"alias": alias, "version": str(version)} for alias, version in model.aliases.items()]
        latest = [self._version(name, max(model.versions))] if model.versions else []
        return {
            "name": name,
            "creation_timestamp": 1,
            "latest_versions": latest,
            **({"aliases": aliases} if aliases else {}),
        }

    def _version(self, name: str, number: int) -> dict[str, Any]:
        return {
            "name": name,
            "version": str(number),
            "creation_timestamp": 1_700_000_000_000,
            "status": "READY",
            "source": f"models:/m-{name}-{number}",
            "run_id": "",
            "model_id": f"m-{name}-{number}",
            "tags": [
                {"key": key, "value": value}
                for key, value in (self.tags | self.own_tags.get((name, number), {})).items()
            ],
        }

    def _alias(self, asked: Asked) -> Reply:
        change = json.loads(asked.body)
        model = self.models.get(change["name"])
        if model is None or (asked.method == "POST" and int(change["version"]) not in model.versions):
            return NOT_THERE
        self.point(change["name"], change["alias"], int(change["version"]) if asked.method == "POST" else None)
        return 200, {}

    def _artifact(self, path: str, query: Mapping[str, str]) -> Reply:
        if path:
            found = self.files.get(path)
            return NOT_THERE if found is None else (200, found)
        folder = query["path"] + "/"
        below = {name.removeprefix(folder): content for name, content in self.files.items() if name.startswith(folder)}
        files = [{"path": n, "is_dir": False, "file_size": len(c)} for n, c in below.items() if "/" not in n]
        folders = sorted({name.partition("/")[0] for name in below if "/" in name})
        return 200, {"files": [*files, *({"path": name, "is_dir": True} for name in folders)]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the sender was killed between head and body: nothing was asked
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        asked = Asked(self.command, unquote(parts.path), query, headers, body)
        status, content = cast("_Server", self.server).mlflow.answer(asked)
        if status == 0:  # raw bytes, and the end of the connection
            self.wfile.write(content)
            self.close_connection = True
            return
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.mlflow = Mlflow(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        """A gateway that went away early is no matter of the server's."""


@contextmanager
def running() -> Iterator[Mlflow]:
    server = _Server(0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.mlflow
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
