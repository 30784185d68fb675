"""Manifests: one canonical form, strict reading that names key, wanted and got."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.registry.manifest import (
    CodeSource,
    DataSource,
    Description,
    FileEntry,
    Lineage,
    Manifest,
    ManifestError,
    Metric,
    Signature,
    TensorEntry,
    canonical_json,
    check_path,
    describe,
    make,
    parse,
    parse_description,
)

SHA = "a" * 64
FILES = (FileEntry("model.onnx", SHA, 10, "model"), FileEntry("w/weights.bin", "b" * 64, 0, "data"))
FULL = Description(
    signature=Signature((TensorEntry("x", "FP32", (-1, 4)),), (TensorEntry("y", "INT64", ()),)),
    metrics=(Metric("test", "auc", 0.875, 1000), Metric("test", "brier", 1.0)),
    params={"depth": 7, "rate": 0.5, "kind": "forest", "warm": True, "seed": None},
    lineage=Lineage(
        DataSource("s3://x", SHA, 100, ("2013-01-01T00:00:00Z", "2013-02-01T00:00:00Z")),
        CodeSource("git@x", "abc", dirty=False),
        SHA,
        "run-1",
        3,
        "trigger-1",
    ),
    profile={"x": {"edges": [0.0, 1.5], "counts": [3, 4, 5]}},
    gate_policy=SHA,
    card="# Card\n",
    licence="Apache-2.0",
    publisher="ci",
)


def plain(manifest: Manifest) -> dict[str, Any]:
    return json.loads(manifest.canonical())


def test_round_trip() -> None:
    manifest = make(FILES, FULL)
    assert manifest == Manifest(FILES, FULL)
    assert parse(manifest.canonical()) == manifest
    assert parse_description(canonical_json(describe(FULL))) == FULL
    assert manifest.digest() == hashlib.sha256(manifest.canonical()).hexdigest()


def test_the_canonical_form_is_this_one() -> None:
    manifest = make([FILES[0]], Description(metrics=(Metric("t", "a", 1),), card="é"))
    assert manifest.canonical().decode() == (
        '{"card":"é","files":[{"path":"model.onnx","role":"model","sha256":"' + SHA + '","size":10}],'
        '"format":"tidegate.manifest/1","metrics":[{"dataset":"t","name":"a","value":1.0}]}'
    )


def test_order_of_files_and_keys_does_not_matter_but_contents_do() -> None:
    digest = make(FILES, FULL).digest()
    assert make(reversed(FILES), FULL).digest() == digest
    shuffled = json.dumps(dict(reversed(plain(make(FILES, FULL)).items())), indent=3)
    assert parse(shuffled).digest() == digest
    assert make(FILES, Description(publisher="ci")).digest() != digest
    assert make(FILES[:1], FULL).digest() != digest


def test_file_by_role() -> None:
    assert make(FILES).file("data") == FILES[1]
    assert make(FILES).file("profile") is None


def put(*keys: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(manifest: Any) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("format", value="tidegate.manifest/2"),
            r"format: wanted 'tidegate\.manifest/1', got 'tidegate\.manifest/2'",
        ),
        (put("files", value=[]), r"files: wanted 1 to 4096 files, got 0"),
        (put("files", value={}), r"files: wanted a list, got \{\}"),
        (put("files", 0, value=3), r"files\[0\]: wanted an object, got 3"),
        (put("files", 0, "size", value=-1), r"files\[0\]\.size: wanted a non-negative integer, got -1"),
        (put("files", 0, "size", value=True), r"files\[0\]\.size: wanted a non-negative integer, got True"),
        (put("files", 0, "size", value=None), r"files\[0\]\.size: wanted a non-negative integer, got nothing"),
        (put("files", 0, "sha256", value="A" * 64), r"files\[0\]\.sha256: wanted 64 lower-case hex"),
        (put("files", 0, "sha256", value=""), r"files\[0\]\.sha256: wanted 64 lower-case hex"),
        (put("files", 1, "role", value="evil"), r"files\[1\]\.role: wanted one of model, .*, got 'evil'"),
        (put("files", 1, "role", value="model"), r"wanted exactly one file of role 'model', got 2"),
        (put("files", 0, "role", value="data"), r"wanted exactly one file of role 'model', got 0"),
        (put("files", 1, "path", value="model.onnx"), r"wanted each path once, in order"),
        (put("files", 1, "path", value="model.onnx/w"), r"'model.onnx' is both a file and a folder"),
        (put("files", 1, "path", value="../w"), r"file path '\.\./w' has an empty, hidden"),
        (put("files", 1, "extra", value=1), r"files\[1\]\.extra: unknown key; known are path"),
        (put("surprise", value=1), r"surprise: unknown key"),
        (put("metrics", 0, "value", value="0.9"), r"metrics\[0\]\.value: wanted a finite number, got '0\.9'"),
        (put("metrics", 0, "value", value=10**400), r"metrics\[0\]\.value: wanted a finite number"),
        (put("metrics", 0, "n", value=1.5), r"metrics\[0\]\.n: wanted a non-negative integer, got 1\.5"),
        (put("metrics", 0, "name", value=""), r"metrics\[0\]\.name: wanted a text, got nothing"),
        (put("params", value=[1]), r"params: wanted an object, got \[1\]"),
        (put("params", "depth", value=[1]), r"params\.depth: wanted a text, number, true, false or null, got \[1\]"),
        (put("signature", "inputs", 0, "datatype", value="FLOAT"), r"signature\.inputs\[0\]\.datatype: wanted one of"),
        (put("signature", "inputs", 0, "shape", value=[-2]), r"signature\.inputs\[0\]\.shape: wanted .*, got \[-2\]"),
        (put("signature", "outputs", value=2 * [{"name": "y", "datatype": "BOOL"}]), "wanted each name once"),
        (put("lineage", "data", "sha256", value="zz"), r"lineage\.data\.sha256: wanted 64"),
        (put("lineage", "data", "time_range", value=["a"]), r"lineage\.data\.time_range: wanted two times"),
        (put("lineage", "code", "dirty", value="no"), r"lineage\.code\.dirty: wanted true or false, got 'no'"),
        (put("lineage", "parent_version", value="3"), r"lineage\.parent_version: wanted a non-negative integer"),
        (put("lineage", value=7), r"lineage: wanted an object, got 7"),
        (put("profile", value=[]), r"profile: wanted an object"),
        (put("gate_policy", value=5), r"gate_policy: wanted a text"),
        (put("card", value="x" * 70_000), r"card: wanted a text of at most 65536 bytes"),
        (put("files", 1, "role", value="profile"), r"profile: given both inline and as a file"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[dict[str, Any]], None], message: str) -> None:
    manifest = plain(make(FILES, FULL))
    change(manifest)
    with pytest.raises(ManifestError, match=message):
        parse(json.dumps(manifest))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        b"\xff",
        '{"format": 1, "format": 2}',
        '{"x": NaN}',
        '{"x": 1e999}',
        '{"x": -Infinity}',
        "[" * 100_000,
        '{"x": ' + "9" * 5000 + "}",
    ],
)
def test_what_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(ManifestError):
        parse(text)


@pytest.mark.parametrize(
    "description",
    [
        Description(metrics=(Metric("t", "a", float("nan")),)),
        Description(metrics=(Metric("t", "a", float("inf")),)),
        Description(params={"x": float("nan")}),
        Description(profile={"x": [float("inf")]}),
        Description(profile={"x": object()}),
        Description(card="\ud800"),
    ],
)
def test_what_json_cannot_say_is_refused(description: Description) -> None:
    with pytest.raises(ManifestError, match=r"finite|UTF-8"):
        make(FILES, description)


@pytest.mark.parametrize("path", ["model.onnx", "a/b/c.bin", "é/ü", "a b", "a..b", "x" * 255])
def test_good_paths(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "/etc/passwd", "..", "../x", "a/../b", "a/..", "./a", "a/./b", "a//b", "a/", ".hidden", "a/.git/x",
        "a\\b", "..\\x", "a\0b", "a\nb", "\x7f", "x" * 256, "é" * 128, "/".join(["abc"] * 300), "\udcff",
    ],
)  # fmt: skip
def test_bad_paths(path: str) -> None:
    with pytest.raises(ManifestError, match="wanted a relative path"):
        check_path(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(plain(make(FILES, FULL)))), JSON)
def test_any_value_under_any_key_is_read_or_refused(key: str, value: object) -> None:
    manifest = plain(make(FILES, FULL)) | {key: value}
    try:
        found = parse(json.dumps(manifest))
        again = parse(found.canonical())
    except ManifestError:
        return
    assert again == found
    assert again.digest() == found.digest()
