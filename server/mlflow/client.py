"""An MLflow registry as an origin: its aliases are the intent, its artifacts the bytes.

The source of a version is never read for a place: in MLflow 3 it names a logged model. The place is what
``get-download-uri`` answers, and artifacts are taken from within reach only (``server.mlflow.artifacts``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from router.registry.base import TRIGGERED, InvalidName, NotInRegistry, check_alias, shown
from router.registry.directory import CONFIG_FILENAME, is_model_name
from router.registry.manifest import CONFIG, DATA, LABELS, MAX_FILES, MODEL, OTHER, PROFILE
from router.registry.origin import Intent, Offer, OfferedFile, Unreachable, Unusable
from server.mlflow.artifacts import Listed, Places, is_segment
from server.mlflow.fields import object_of, objects_of, text_of, time_of, version_of
from server.mlflow.lineage import description_of, trigger_of
from server.mlflow.mlmodel import FILENAME, MAX_BYTES, MlModel, read_mlmodel
from server.mlflow.options import MlflowOptions
from server.mlflow.wire import Refusal, Wire

_API: Final = "/api/2.0/mlflow"
_PAGE: Final = 200
_MAX_PAGES: Final = 100
_MAX_DEPTH: Final = 8
_MAX_FOLDERS: Final = 256
_NOT_THERE: Final = "RESOURCE_DOES_NOT_EXIST"
#: What MLflow lays beside a model for its own loaders, right in the version's folder.
_ITS_OWN: Final = frozenset(
    {
        FILENAME,
        "conda.yaml",
        "python_env.yaml",
        "requirements.txt",
        "constraints.txt",
        "input_example.json",
        "serving_input_example.json",
        "registered_model_meta",
    }
)
_CODE: Final = "code"


class MlflowOrigin:
    """Implements ``router.registry.origin.Origin``, and the writing of aliases."""

    def __init__(self, options: MlflowOptions) -> None:
        self._options = options
        self._wire = Wire(options)
        self._places = Places(self._wire, options.parts.netloc, options.artifact_folders)

    @property
    def name(self) -> str:
        return self._options.name

    def intents(self) -> Mapping[str, Intent]:
        """Models whose names cannot be ours, and aliases that cannot, are left out."""
        found = map(self._model, self._options.models) if self._options.models else self._all_models()
        return {
            text_of(model, "name"): _intent(model)
            for model in found
            if model is not None and is_model_name(text_of(model, "name"))
        }

    def aliases(self, model: str) -> Mapping[str, int]:
        """Where a model's aliases point now. Raises NotInRegistry."""
        found = self._model(model)
        if found is None:
            raise NotInRegistry(f"MLflow has no model {shown(model)}")
        return _intent(found).aliases

    def versions(self, model: str) -> tuple[int, ...]:
        query = (("filter", f"name='{_checked(model)}'"),)
        rows = self._pages("/model-versions/search", query, "model_versions")
        found = tuple(sorted(version_of(row) for row in rows))
        if not found and self._model(model) is None:
            raise NotInRegistry(f"MLflow has no model {shown(model)}")
        return found

    def triggered(self, model: str) -> Mapping[str, int]:
        query = (
            ("filter", f"name='{_checked(model)}'"),
            ("order_by", "version_number DESC"),
            ("max_results", str(TRIGGERED)),
        )
        rows = objects_of(self._answer("/model-versions/search", query), "model_versions")
        found = sorted((version_of(row), trigger_of(row)) for row in rows[:TRIGGERED])
        return {trigger_id: version for version, trigger_id in found if trigger_id}

    def offer(self, model: str, version: int) -> Offer:
        query = (("name", _checked(model)), ("version", str(version)))
        found = object_of(self._version("/model-versions/get", query), "model_version")
        status = text_of(found, "status")
        if status not in ("", "READY"):
            raise Unreachable(f"MLflow says that {model}:{version} is {status[:40]}")
        place = self._version("/model-versions/get-download-uri", query)
        root = self._places.of(text_of(place, "artifact_uri"))
        mlmodel = self._mlmodel(root)
        description = description_of(self._optional, found, mlmodel.signature)
        files = tuple(sorted(self._files(root, mlmodel), key=lambda file: file.path))
        return Offer(files, description, mlmodel.digest, time_of(found, "creation_timestamp"))

    def read(self, file: OfferedFile, target: int, limit: int) -> None:
        self._places.at(file.location).copy(file.location, target, limit)

    # -- writing --------------------------------------------------------------------------------------------------

    def set_alias(self, model: str, alias: str, version: int) -> None:
        """Point an alias at a version, wherever it was: MLflow has no compare and set. Raises RegistryError."""
        body = {"name": _checked(model), "alias": alias, "version": str(version)}
        self._write("POST", body, f"{model}@{alias}")

    def drop_alias(self, model: str, alias: str) -> None:
        """Take an alias away, wherever it was. Raises RegistryError."""
        self._write("DELETE", {"name": _checked(model), "alias": alias}, f"{model}@{alias}")

    def _write(self, method: str, body: Mapping[str, object], what: str) -> None:
        try:
            self._wire.send(method, f"{_API}/registered-models/alias", body)
        except Refusal as refusal:
            raise Unusable(f"{what} was not moved: {refusal}") from refusal

    # -- asking ---------------------------------------------------------------------------------------------------

    def _model(self, name: str) -> Mapping[str, Any] | None:
        """What MLflow says of a model; None when it says that there is none."""
        try:
            found = self._wire.get(f"{_API}/registered-models/get", (("name", name),))
        except Refusal as refusal:
            if refusal.code == _NOT_THERE:
                return None
            raise _odd(refusal) from refusal
        model = object_of(found, "registered_model")
        if text_of(model, "name") != name:
            raise Unusable(f"MLflow answered for another model than {shown(name)}")
        return model

    def _all_models(self) -> Iterator[Mapping[str, Any]]:
        return self._pages("/registered-models/search", (), "registered_models")

    def _pages(self, path: str, query: Sequence[tuple[str, str]], key: str) -> Iterator[Mapping[str, Any]]:
        token = ""
        for _ in range(_MAX_PAGES):
            page = (("max_results", str(_PAGE)), *((("page_token", token),) if token else ()))
            found = self._answer(path, (*query, *page))
            yield from objects_of(found, key)
            token = text_of(found, "next_page_token")
            if not token:
                return
        raise Unusable(f"MLflow has more than {_PAGE * _MAX_PAGES} entries; name the models to follow")

    def _answer(self, path: str, query: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
        try:
            return self._wire.get(_API + path, query)
        except Refusal as refusal:
            raise _odd(refusal) from refusal

    def _version(self, path: str, query: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
        try:
            return self._wire.get(_API + path, query)
        except Refusal as refusal:
            if refusal.code == _NOT_THERE:
                (_, model), (_, version) = query
                raise NotInRegistry(f"model {shown(model)} has no version {version}") from refusal
            raise _odd(refusal) from refusal

    def _optional(self, path: str, query: Sequence[tuple[str, str]]) -> Mapping[str, Any]:
        """What is only told of a version: nothing, when MLflow refuses to tell."""
        try:
            return self._wire.get(_API + path, query)
        except Refusal:
            return {}

    # -- artifacts ------------------------------------------------------------------------------------------------

    def _mlmodel(self, root: str) -> MlModel:
        return read_mlmodel(self._places.at(root).text(f"{root}/{FILENAME}", MAX_BYTES))

    def _files(self, root: str, mlmodel: MlModel) -> Iterator[OfferedFile]:
        """Every file of the version but MLflow's own and code."""
        folders, seen, count = [""], 0, 0
        while folders:
            above = folders.pop()
            seen += 1
            if seen > _MAX_FOLDERS or above.count("/") > _MAX_DEPTH:
                raise Unusable(f"the version has more than {_MAX_FOLDERS} folders, or more than {_MAX_DEPTH} levels")
            for row in self._listed(root, above):
                path = above + row.name
                if row.name.startswith(".") or (not above and (row.name in _ITS_OWN or row.name == _CODE)):
                    continue
                if row.is_folder:
                    folders.append(f"{path}/")
                    continue
                count += 1
                if count > MAX_FILES:
                    raise Unusable(f"the version has more than {MAX_FILES} files")
                yield OfferedFile(path, f"{root}/{path}", row.size, _role(path, mlmodel.graph))

    def _listed(self, root: str, above: str) -> list[Listed]:
        rows = self._places.at(root).listed(f"{root}/{above}".rstrip("/"))
        for row in rows:
            if not is_segment(row.name):
                raise Unusable(f"{shown(row.name)} is listed among the files, which leads elsewhere")
        return rows


def _checked(model: str) -> str:
    """A name that can stand in a filter. Raises NotInRegistry."""
    if not is_model_name(model):
        raise NotInRegistry(f"MLflow has no model {shown(model)}")
    return model


def _intent(model: Mapping[str, Any]) -> Intent:
    rows = objects_of(model, "aliases")
    aliases = {text_of(row, "alias"): version_of(row) for row in rows if _is_alias(text_of(row, "alias"))}
    latest = max((version_of(row) for row in objects_of(model, "latest_versions")), default=0)
    return Intent(aliases, latest)


def _is_alias(name: str) -> bool:
    try:
        check_alias(name)
    except InvalidName:
        return False
    return True


def _role(path: str, graph: str) -> str:
    """What a file is for. What lies beside a graph without being known is its external data, whatever it is called."""
    if path == graph:
        return MODEL
    if path == CONFIG_FILENAME:
        return CONFIG
    folder = graph.rpartition("/")[0]
    roles = {"txt": LABELS, "tgp": PROFILE, "json": OTHER, "md": OTHER, "yaml": OTHER, "py": OTHER}
    beside = DATA if path.startswith(f"{folder}/" if folder else "") else OTHER
    return roles.get(path.rpartition("/")[2].rpartition(".")[2], beside)


def _odd(refusal: Refusal) -> Exception:
    """A refusal that says nothing of what was asked for: somebody else's 404, a request that MLflow does not take."""
    return Unreachable(str(refusal))
