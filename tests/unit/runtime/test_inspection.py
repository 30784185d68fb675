from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from server.errors import ModelLoadError
from server.runtime.base import InspectionLimits
from server.runtime.inspection import Inspection, Supported, inspect_files, recheck
from tests.unit.runtime.graphs import FLOAT, constant, node, save, unary

WEIGHTS = np.arange(4, dtype="<f4").tobytes()


@dataclass(frozen=True)
class Listed:
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Listed:
        return cls(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the model file goes: a version folder with room above it."""
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    return folder / "model.onnx"


def with_external(path: Path, location: str = "w.bin", **entries: Any) -> Path:
    """``y = x + w`` with ``w`` in another file, which is not written."""
    save(
        path,
        [node("Add", ["x", "w"], ["y"])],
        [("x", FLOAT, ("N", 4))],
        [("y", FLOAT, ("N", 4))],
        [constant("w", [0] * 4)],
    )
    model = onnx.ModelProto.FromString(path.read_bytes())
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        weights.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())
    return path


def inspect(path: Path, **options: Any) -> Inspection:
    return inspect_files(path, options.pop("folder", path.parent.parent), **options)


def refusal(path: Path, **options: Any) -> str:
    """The one sentence with which the files are refused."""
    with pytest.raises(ModelLoadError) as caught:
        inspect(path, **options)
    message = caught.value.message
    assert message.endswith(".")
    assert "\n" not in message
    assert str(path.parents[2]) not in message
    return message


# --- what passes -----------------------------------------------------------------------------------------------------


def test_a_plain_model_is_named_by_the_digest_of_its_bytes(path: Path) -> None:
    unary(path, "Relu")
    found = inspect(path)
    assert found.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [(file.name, file.size, file.sha256) for file in found.files] == [
        ("model.onnx", path.stat().st_size, found.digest)
    ]
    assert found.total_bytes == path.stat().st_size
    assert found.facts.ir_version == 10


def test_external_data_counts_in_the_digest(path: Path) -> None:
    with_external(path, "./deep/w.bin", offset=0, length=16)
    weights = path.parent / "deep" / "w.bin"
    weights.parent.mkdir()
    weights.write_bytes(WEIGHTS)
    before = inspect(path)
    assert [file.name for file in before.files] == ["model.onnx", "deep/w.bin"]
    assert before.files[1].sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert inspect(path).digest == before.digest != before.files[0].sha256
    weights.write_bytes(WEIGHTS[::-1])
    assert inspect(path).digest != before.digest


def test_the_digest_is_of_the_content_not_of_the_place(tmp_path: Path) -> None:
    first = unary(tmp_path / "a" / "model.onnx", "Relu")
    second = unary(tmp_path / "b" / "other.onnx", "Relu")
    third = unary(tmp_path / "c" / "model.onnx", "Sigmoid")
    digests = [inspect(place, folder=None).digest for place in (first, second, third)]
    assert digests[0] == digests[1] != digests[2]


def test_a_link_may_lead_anywhere_inside_the_models_folder(path: Path) -> None:
    real = unary(path.parent.parent / "data" / "model.onnx", "Relu")
    path.symlink_to("../data/model.onnx")
    assert inspect(path).digest == inspect(real).digest


def test_a_bare_file_may_be_a_link_and_have_any_neighbours(path: Path, tmp_path: Path) -> None:
    path.symlink_to(unary(tmp_path / "elsewhere" / "model.onnx", "Relu"))
    (path.parent / "lib.so").write_bytes(b"\x7fELF")
    assert inspect(path, folder=None).digest


@pytest.mark.parametrize("domain", ["ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"])
def test_domains_that_are_built_in(path: Path, domain: str) -> None:
    inspect(unary(path, "Relu", domain=domain))


# --- the model file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "reason"), [(None, "does not exist"), (b"", "is empty")])
def test_no_content(path: Path, content: bytes | None, reason: str) -> None:
    if content is not None:
        path.write_bytes(content)
    assert refusal(path) == f"model.onnx {reason}."


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo])
def test_a_folder_or_a_pipe_is_no_model_file(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    assert refusal(path) == "model.onnx is not a regular file."


@pytest.mark.parametrize("target", ["nowhere", "model.onnx"])
def test_links_that_lead_nowhere(path: Path, target: str) -> None:
    path.symlink_to(target)
    assert refusal(path) == "model.onnx does not exist."


def test_a_file_link_out_of_the_folder(path: Path, tmp_path: Path) -> None:
    path.symlink_to(unary(tmp_path / "other" / "model.onnx", "Relu"))
    assert refusal(path) == "model.onnx is or lies behind a symbolic link that leads out of the model's folder."


def test_a_folder_link_out_of_the_folder(path: Path, tmp_path: Path) -> None:
    other = unary(tmp_path / "models" / "m-2" / "model.onnx", "Relu")
    path.parent.rmdir()
    path.parent.symlink_to(other.parent)
    assert "leads out of the model's folder" in refusal(path)


def test_a_file_over_the_format_is_refused_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**31)
    assert refusal(path) == "model.onnx has 2147483648 bytes; an ONNX file has at most 2147483647."


def test_a_sparse_gigabyte_is_refused_at_its_first_field(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**30)
    began = time.process_time()
    assert refusal(path) == (
        "model.onnx cannot be loaded: its bytes are no ONNX model, there is no valid field at byte 0."
    )
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "content", [b"hello world", os.urandom(5000), b"{}", b"PK\x03\x04", b"\x0a\xff\xff\xff\xff\x7f"]
)
def test_what_is_not_onnx(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert refusal(path).startswith("model.onnx cannot be loaded: its bytes are no ONNX model, ")


def test_a_model_cut_short_anywhere(path: Path) -> None:
    content = unary(path, "Relu").read_bytes()
    whole = set()
    for end in range(1, len(content)):
        path.write_bytes(content[:end])
        with contextlib.suppress(ModelLoadError):
            inspect(path)
            whole.add(end)
    # A protobuf message may end behind any of its top-level fields: behind the graph there is only the opset import.
    assert len(whole) == 1
    path.write_bytes(content[:-1])
    assert refusal(path).startswith("model.onnx cannot be loaded: its bytes are no ONNX model, the field at byte ")


def test_a_bound_on_fields(path: Path) -> None:
    unary(path, "Relu")
    assert refusal(path, limits=InspectionLimits(max_fields=5)) == "model.onnx has more than 5 fields to look at."


# --- versions and operators ------------------------------------------------------------------------------------------


def test_an_ir_version_that_is_too_new(path: Path) -> None:
    unary(path, "Relu")
    supported = Supported("onnxruntime 1.2", ir_version=9)
    assert refusal(path, supported=supported) == "model.onnx has IR version 10, onnxruntime 1.2 takes at most 9."
    inspect(path, supported=replace(supported, ir_version=10))


def test_an_opset_that_is_too_new(path: Path) -> None:
    unary(path, "Relu")
    supported = Supported("onnxruntime 1.2", opsets={"": 20, "ai.onnx.ml": 1})
    assert refusal(path, supported=supported) == (
        "model.onnx needs opset 21 of ai.onnx, onnxruntime 1.2 takes at most 20."
    )


def test_operators_that_nobody_brings(path: Path) -> None:
    unary(path, "Evil", domain="my.ops")
    assert refusal(path) == (
        "model.onnx uses operator 'Evil' of domain 'my.ops', which is not built in: "
        "no library of custom operators is allowed for this model."
    )
    inspect(path, limits=InspectionLimits(allowed_custom_ops=frozenset({"ab" * 32})))


# --- external data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../w.bin", "has '..' in it"),
        ("a/../../w.bin", "has '..' in it"),
        ("..", "has '..' in it"),
        ("/etc/passwd", "is absolute"),
        ("C:/w.bin", "is absolute"),
        ("c:w.bin", "is absolute"),
        ("..\\w.bin", "has a backslash"),
        ("\\\\host\\share", "has a backslash"),
        ("", "is empty"),
        ("a//w.bin", "has an empty part"),
        ("a/", "has an empty part"),
        (".", "has an empty part"),
        ("w\n.bin", "has characters that are not printable"),
        ("w\0.bin", "has characters that are not printable"),
    ],
)
def test_locations_that_are_refused_by_their_name(path: Path, location: str, reason: str) -> None:
    message = refusal(with_external(path, location))
    assert message.startswith("Tensor 'w' has its external data at ")
    assert f", which {reason}: wanted a path relative to the model file's folder and inside it." in message


def test_a_location_that_is_not_there(path: Path) -> None:
    assert refusal(with_external(path)) == "External data 'w.bin' of tensor 'w' does not exist."


def test_a_memory_address_is_no_location(path: Path) -> None:
    """ONNX Runtime marks tensors in its own memory with this location, and the address as the offset."""
    message = refusal(with_external(path, "*/_ORT_MEM_ADDR_/*", offset=4096, length=16))
    assert message == "External data '*/_ORT_MEM_ADDR_/*' of tensor 'w' does not exist."


def test_external_data_behind_a_file_link(path: Path) -> None:
    real = path.parent / "real.bin"
    real.write_bytes(WEIGHTS)
    (path.parent / "w.bin").symlink_to(real)
    assert refusal(with_external(path)) == (
        "External data 'w.bin' of tensor 'w' is a symbolic link, wanted a regular file."
    )


@pytest.mark.parametrize("inside", [True, False])
def test_external_data_behind_a_folder_link(path: Path, tmp_path: Path, inside: bool) -> None:
    real = (path.parent if inside else tmp_path) / "real"
    real.mkdir()
    (real / "w.bin").write_bytes(WEIGHTS)
    (path.parent / "link").symlink_to(real)
    assert refusal(with_external(path, "link/w.bin")) == (
        "External data 'link/w.bin' of tensor 'w' lies behind a symbolic link or something else that is no folder."
    )


def test_external_data_with_a_second_name(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHTS)
    os.link(secret, path.parent / "w.bin")
    assert refusal(with_external(path)) == ("External data 'w.bin' of tensor 'w' has 2 hard links, wanted exactly one.")


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo])
def test_external_data_that_is_no_file(path: Path, make: Callable[[Path], None]) -> None:
    make(path.parent / "w.bin")
    assert refusal(with_external(path)) == "External data 'w.bin' of tensor 'w' is not a regular file."


@pytest.mark.parametrize(
    ("entries", "end"),
    [
        ({"offset": 1, "length": 16}, 17),
        ({"offset": 17}, 17),
        ({"length": 2**62}, 2**62),
        ({"offset": 2**62, "length": 2**62}, 2**63),
    ],
)
def test_external_data_past_its_end(path: Path, entries: dict[str, int], end: int) -> None:
    (path.parent / "w.bin").write_bytes(WEIGHTS)
    assert refusal(with_external(path, **entries)) == (
        f"Tensor 'w' wants bytes {entries.get('offset', 0)} to {end} of external data 'w.bin', which has 16."
    )


def test_the_total_size_has_a_bound(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(WEIGHTS)
    size = with_external(path).stat().st_size + len(WEIGHTS)
    inspect(path, limits=InspectionLimits(max_total_bytes=size))
    assert refusal(path, limits=InspectionLimits(max_total_bytes=size - 1)) == (
        f"The model and its external data have {size} bytes, at most {size - 1} are taken."
    )


def test_the_number_of_external_files_has_a_bound(path: Path) -> None:
    with_external(path)
    assert refusal(path, limits=InspectionLimits(max_external_files=0)) == (
        "The model has 1 external data files, at most 0 are taken."
    )


def test_no_descriptor_is_left_open(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(WEIGHTS)
    with_external(path)
    before = len(os.listdir("/proc/self/fd"))
    inspect(path)
    for location in ("w.bin", "gone/w.bin", "w.bin/x"):
        refusal(with_external(path, location, offset=99))
    (path.parent / "w.bin").unlink()
    os.mkfifo(path.parent / "w.bin")
    refusal(with_external(path))
    assert len(os.listdir("/proc/self/fd")) == before


# --- manifest --------------------------------------------------------------------------------------------------------


def test_every_file_must_be_as_the_manifest_lists_it(path: Path) -> None:
    weights = path.parent / "w.bin"
    weights.write_bytes(WEIGHTS)
    with_external(path)
    listed = {"1/model.onnx": Listed.of(path), "1/w.bin": Listed.of(weights)}
    inspect(path, listed=listed)
    plain = {name.removeprefix("1/"): entry for name, entry in listed.items()}
    inspect(path, folder=path.parent, listed=plain)
    inspect(path, folder=None, listed=plain)
    for name, entry in listed.items():
        short = name.removeprefix("1/")
        rest = {other: listed[other] for other in listed if other != name}
        assert refusal(path, listed=rest) == f"'{short}' is not listed in the version's manifest."
        assert refusal(path, listed=rest | {name: replace(entry, size=5)}) == (
            f"'{short}' has {entry.size} bytes, the version's manifest lists 5."
        )
        assert refusal(path, listed=rest | {name: replace(entry, sha256="0" * 64)}) == (
            f"'{short}' has SHA-256 {entry.sha256[:12]}, the version's manifest lists 000000000000."
        )


# --- shared libraries ------------------------------------------------------------------------------------------------

PE = b"MZ" + bytes(58) + (64).to_bytes(4, "little") + b"PE\0\0"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lib.so", b"text"),
        ("lib.so.1.2", b""),
        ("deep/LIB.DLL", b""),
        ("lib.dylib", b""),
        ("lib.pyd", b""),
        ("notes.txt", b"\x7fELF\x02\x01"),
        ("deep/er/notes", b"\xcf\xfa\xed\xfe"),
        ("notes", b"\xca\xfe\xba\xbe"),
        ("notes", PE),
    ],
)
def test_a_shared_library_beside_the_model(path: Path, name: str, content: bytes) -> None:
    unary(path, "Relu")
    library = path.parent / name
    library.parent.mkdir(parents=True, exist_ok=True)
    library.write_bytes(content)
    assert refusal(path) == f"'{name}' beside the model is a shared library that is not allowed by its SHA-256."
    inspect(path, limits=InspectionLimits(allowed_custom_ops=frozenset({Listed.of(library).sha256})))


def test_a_link_named_like_a_library(path: Path) -> None:
    unary(path, "Relu")
    (path.parent / "lib.so").symlink_to("/lib/libm.so.6")
    assert refusal(path) == "'lib.so' beside the model is named like a shared library and no regular file."


def test_a_library_as_external_data_of_a_bare_file(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(b"\x7fELF" + bytes(12))
    assert "is a shared library" in refusal(with_external(path), folder=None)


def test_ordinary_neighbours_do_no_harm(path: Path) -> None:
    unary(path, "Relu")
    (path.parent / "labels.txt").write_text("MZ is how it starts\n")
    (path.parent / "short").write_bytes(b"MZ")
    (path.parent / "solo").write_bytes(b"")
    (path.parent / "warmup").mkdir()
    (path.parent / "warmup" / "x").write_bytes(WEIGHTS)
    (path.parent / "lib.so").mkdir()
    (path.parent / "loop").symlink_to(".")
    os.mkfifo(path.parent / "pipe")
    inspect(path)


def test_a_folder_with_too_many_files(path: Path) -> None:
    unary(path, "Relu")
    (path.parent / "other").write_bytes(b"")
    assert refusal(path, limits=InspectionLimits(max_folder_files=1)) == "The model's folder holds over 1 files."


# --- change after the inspection -------------------------------------------------------------------------------------


def old(path: Path) -> Inspection:
    """An inspection that began long after its files were last changed."""
    return replace(inspect(path), began_ns=time.time_ns() + 10**12)


def test_files_left_alone_pass_again(path: Path) -> None:
    (path.parent / "w.bin").write_bytes(WEIGHTS)
    found = inspect(with_external(path))
    recheck(found)
    recheck(old(path))


def overwritten(weights: Path) -> None:
    weights.write_bytes(WEIGHTS[::-1])


def replaced(weights: Path) -> None:
    copy = weights.with_name("copy")
    copy.write_bytes(WEIGHTS)
    copy.rename(weights)


def backdated(weights: Path) -> None:
    status = weights.stat()
    weights.write_bytes(WEIGHTS[::-1])
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [overwritten, replaced, backdated])
def test_a_change_is_seen(path: Path, change: Callable[[Path], None]) -> None:
    weights = path.parent / "w.bin"
    weights.write_bytes(WEIGHTS)
    found = inspect(with_external(path))
    change(weights)
    with pytest.raises(ModelLoadError, match=r"^'w.bin' was changed while it was loaded\.$"):
        recheck(found)


def test_a_file_that_went_away(path: Path) -> None:
    found = inspect(unary(path, "Relu"))
    path.unlink()
    with pytest.raises(ModelLoadError, match=r"^'model.onnx' went away while it was loaded\.$"):
        recheck(found)


def test_a_write_within_one_tick_of_the_clock_is_seen(path: Path) -> None:
    """Same size, same inode, same stamps: what a write right behind another can look like."""
    content = unary(path, "Relu").read_bytes()
    found = inspect(path)
    path.write_bytes(content[::-1])
    status = path.stat()
    stamp = replace(found.files[0].stamp, mtime_ns=status.st_mtime_ns, ctime_ns=status.st_ctime_ns)
    same_stamp = replace(found, files=(replace(found.files[0], stamp=stamp),))
    with pytest.raises(ModelLoadError, match="was changed"):
        recheck(same_stamp)
