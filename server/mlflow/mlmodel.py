"""The file ``MLmodel``: which of a version's files is the ONNX graph, and what its publisher declared of tensors.

Read strictly: plain YAML without anchors, tags or repeated keys. Execution providers that it asks for are not looked
at, as those are the gateway's choice, and nothing that it calls code is ever taken.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import date, datetime
from types import NoneType
from typing import Any, Final

import yaml

from router.registry.manifest import DATATYPES, ManifestError, Signature, TensorEntry, check_path
from router.registry.origin import Unusable

FILENAME: Final = "MLmodel"
MAX_BYTES: Final = 2**20

_DATATYPES: Final = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "object": "BYTES",
    "str": "BYTES",
    "bytes": "BYTES",
    **{name.lower(): name for name in sorted(DATATYPES) if "INT" in name},
}

#: What SafeLoader makes of YAML, mappings aside.
_KINDS: Final[dict[type, str]] = {
    NoneType: "nothing",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
    bytes: "binary data",
    date: "a date",
    datetime: "a date",
    list: "a list",
    set: "a set",
}


@dataclass(slots=True, frozen=True)
class MlModel:
    """``graph``: path of the ONNX file. ``digest``: SHA-256 of the file MLmodel itself.

    ``signature`` is None when there is none that says all. MLflow leaves the name of a tensor out that is the only one
    on its side: such a one is named "" here, and means the graph's only one.
    """

    graph: str
    digest: str
    signature: Signature | None = None


class _Loader(yaml.SafeLoader):
    """YAML as MLflow writes it, and no more."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise Unusable("MLmodel holds a YAML alias, which MLflow writes none of")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) != len(node.value):
            raise Unusable("MLmodel holds a key twice, or one that is no text")
        return super().construct_mapping(node, deep)


def read_mlmodel(text: bytes) -> MlModel:
    """Raises Unusable for anything that does not say where an ONNX graph is."""
    try:
        found = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Unusable(f"MLmodel is no YAML: {type(error).__name__}") from error
    flavors = _mapping(_mapping(found, "MLmodel").get("flavors"), "flavors")
    if "onnx" not in flavors:
        others = ", ".join(str(name)[:40] for name in list(flavors)[:5])
        raise Unusable(f"the model has no ONNX flavor, only {others or 'none'}")
    graph = _mapping(flavors["onnx"], "flavors.onnx").get("data")
    if not isinstance(graph, str):
        raise Unusable("flavors.onnx.data of MLmodel must be the path of the ONNX file")
    try:
        check_path(graph)
    except ManifestError as error:
        raise Unusable(f"flavors.onnx.data of MLmodel: {error}") from error
    return MlModel(graph, hashlib.sha256(text).hexdigest(), _signature(found.get("signature")))


def _mapping(value: object, what: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise Unusable(f"{what} must be a mapping, got {_KINDS[type(value)]}")
    return value


def _signature(declared: object) -> Signature | None:
    if not isinstance(declared, dict):
        return None
    inputs, outputs = _tensors(declared.get("inputs")), _tensors(declared.get("outputs"))
    return Signature(inputs, outputs) if inputs and outputs else None


def _tensors(text: object) -> tuple[TensorEntry, ...]:
    """One side of a signature, which is JSON in a string; empty unless each is a tensor, with a name if not alone."""
    if not isinstance(text, str):
        return ()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("the signature in MLmodel is no JSON") from error
    tensors = [_tensor(item) for item in found] if isinstance(found, list) else []
    known = tuple([tensor for tensor in tensors if tensor is not None])
    names = {tensor.name for tensor in known}
    whole = len(known) == len(tensors) == len(names) and (len(known) == 1 or "" not in names)
    return known if whole else ()


def _tensor(item: object) -> TensorEntry | None:
    """A tensor, named "" without a name; None for a column of a data frame, and for a type that V2 has not."""
    if not isinstance(item, dict) or item.get("type") != "tensor":
        return None
    name, spec = item.get("name") or "", item.get("tensor-spec")
    if not isinstance(name, str) or not isinstance(spec, dict):
        return None
    datatype, shape = _DATATYPES.get(str(spec.get("dtype"))), spec.get("shape")
    if datatype is None or not isinstance(shape, list):
        return None
    if not all(type(dim) is int and -1 <= dim < 2**63 for dim in shape):
        return None
    return TensorEntry(name, datatype, tuple(shape))
