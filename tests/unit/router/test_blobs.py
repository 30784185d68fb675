"""Blobs on real files: content addresses, sources that must not be taken, staging and its sweep."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from router.registry.base import Damaged, PublishRefused, StorageFailed
from router.registry.blobs import BlobStore, open_regular
from router.registry.sources import Source, each_file, roles_of


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs", max_file_bytes=5_000_000)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    file = open_regular(path, path.name)
    yield file
    os.close(file)


def keep(blobs: BlobStore, path: Path) -> str:
    with blobs.staging() as folder, opened(path) as file:
        staged = blobs.stage(file, path.name, folder)
        blobs.keep([staged])
    return staged.sha256


def on_disk(blobs: BlobStore) -> list[str]:
    return sorted(str(path.relative_to(blobs.root)) for path in blobs.root.rglob("*") if path.is_file())


@pytest.mark.parametrize("content", [b"", b"x", os.urandom(3_000_001)], ids=["empty", "one byte", "3 MB"])
def test_a_file_is_kept_under_its_digest(blobs: BlobStore, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    sha256 = keep(blobs, source)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert on_disk(blobs) == [f"sha256/{sha256[:2]}/{sha256}"]
    assert blobs.path(sha256).read_bytes() == content
    assert blobs.path(sha256).stat().st_mode & 0o777 == 0o444
    assert blobs.path(sha256).stat().st_nlink == 1
    blobs.verify(sha256)
    assert [(info.sha256, info.size) for info in blobs.infos()] == [(sha256, len(content))]
    assert source.read_bytes() == content


def test_keeping_again_mends(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"right")
    sha256 = keep(blobs, source)
    blobs.path(sha256).chmod(0o644)
    blobs.path(sha256).write_bytes(b"wrong")
    with pytest.raises(Damaged, match=f"blob {sha256} was changed"):
        blobs.verify(sha256)
    assert keep(blobs, source) == sha256
    blobs.verify(sha256)


def test_copies_are_checked_and_stand_alone(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"right")
    sha256 = keep(blobs, source)
    blobs.copy(sha256, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"right"
    assert (tmp_path / "copy").stat().st_nlink == 1
    with pytest.raises(StorageFailed, match="File exists"):
        blobs.copy(sha256, tmp_path / "copy")
    blobs.path(sha256).chmod(0o644)
    blobs.path(sha256).write_bytes(b"wrong")
    with pytest.raises(Damaged, match="was changed"):
        blobs.copy(sha256, tmp_path / "other")


def test_missing_or_replaced_by_a_link(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="missing"):
        blobs.verify("a" * 64)
    source = tmp_path / "source"
    source.write_bytes(b"right")
    sha256 = keep(blobs, source)
    blobs.path(sha256).unlink()
    blobs.path(sha256).symlink_to(source)
    with pytest.raises(Damaged, match="missing"):
        blobs.copy(sha256, tmp_path / "copy")


def test_too_large_is_refused_before_copying(blobs: BlobStore, tmp_path: Path) -> None:
    source = tmp_path / "huge.bin"
    with source.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(PublishRefused, match=r"huge\.bin has 1099511627776 bytes; at most 5000000"):
        keep(blobs, source)
    assert on_disk(blobs) == []


def growing(file: int, path: Path) -> None:
    with path.open("ab") as more:
        more.write(b"more")


def shrinking(file: int, path: Path) -> None:
    os.truncate(path, 10)


def rewritten(file: int, path: Path) -> None:
    path.write_bytes(b"y" * path.stat().st_size)


@pytest.mark.parametrize("change", [growing, shrinking, rewritten])
def test_a_file_that_changes_while_it_is_copied_is_refused(
    blobs: BlobStore, tmp_path: Path, change: Callable[[int, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    read, reads = os.readv, iter(range(100))

    def readv(file: int, buffers: list[memoryview]) -> int:
        if next(reads) == 1:  # in the middle of the file
            change(file, source)
        return read(file, buffers)

    monkeypatch.setattr(os, "readv", readv)
    with pytest.raises(PublishRefused, match="source changed while it was copied"):
        keep(blobs, source)
    assert on_disk(blobs) == []


# --- sources ---


def taken(source: Source) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def take(path: str, file: int) -> None:
        found[path] = os.read(file, 1000)

    each_file(source, take)
    return found


def test_a_folder_is_walked(tmp_path: Path) -> None:
    (tmp_path / "v/deep/er").mkdir(parents=True)
    (tmp_path / "v/model.onnx").write_bytes(b"m")
    (tmp_path / "v/deep/er/w.bin").write_bytes(b"w")
    (tmp_path / "v/.hidden").write_bytes(b"h")
    os.link(tmp_path / "v/model.onnx", tmp_path / "other name")  # a second name of a source is nothing bad
    assert taken(tmp_path / "v") == {"model.onnx": b"m", "deep/er/w.bin": b"w"}


def test_a_file_alone_and_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "digits-7.onnx").write_bytes(b"m")
    (tmp_path / "w").write_bytes(b"w")
    assert taken(tmp_path / "digits-7.onnx") == {"model.onnx": b"m"}
    assert taken({"model.onnx": tmp_path / "digits-7.onnx", "x/w.bin": tmp_path / "w"}) == {
        "model.onnx": b"m",
        "x/w.bin": b"w",
    }


def linked_file(folder: Path) -> str:
    (folder / "link.bin").symlink_to("/etc/hostname")
    return r"link\.bin is a symbolic link"


def linked_inside(folder: Path) -> str:
    (folder / "link.bin").symlink_to("model.onnx")
    return r"link\.bin is a symbolic link"


def linked_folder(folder: Path) -> str:
    (folder / "link").symlink_to("/etc")
    return "link is a symbolic link"


def dangling(folder: Path) -> str:
    (folder / "link").symlink_to("nowhere")
    return "link is a symbolic link"


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return "pipe is not a regular file"


def unix_socket(folder: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))
    return "socket cannot be read"


def backslash(folder: Path) -> str:
    (folder / "a\\b").touch()
    return "backslash"


def newline(folder: Path) -> str:
    (folder / "a\nb").touch()
    return "control character"


def no_utf8(folder: Path) -> str:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).touch()
    return "no UTF-8"


def too_deep(folder: Path) -> str:
    (folder / "/".join("abcdefghijklmnopqrst")).mkdir(parents=True)
    return "more than 16 folders deep"


@pytest.mark.parametrize(
    "spoil",
    [linked_file, linked_inside, linked_folder, dangling, pipe, unix_socket, backslash, newline, no_utf8, too_deep],
)
def test_what_is_no_plain_file_is_refused(
    tmp_path: Path, spoil: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "model.onnx").write_bytes(b"m")
    with pytest.raises(PublishRefused, match=spoil(folder)):
        taken(folder)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "m.onnx").symlink_to("nowhere")
    for source, message in (
        (tmp_path / "nowhere", "nowhere cannot be read: No such file"),
        (tmp_path / "empty", "empty holds no file"),
        (tmp_path / "link", "link is a symbolic link"),
        (tmp_path / "m.onnx", r"m\.onnx is a symbolic link"),
        (Path("a\0b"), "cannot be read"),
        ({"model.onnx": Path("a\0b")}, "cannot be read"),
        ({"model.onnx": tmp_path / "m.onnx"}, r"model\.onnx is a symbolic link"),
        ({"model.onnx": tmp_path}, r"model\.onnx is not a regular file"),
    ):
        with pytest.raises(PublishRefused, match=message):
            taken(source)


@pytest.mark.parametrize("path", ["../model.onnx", "/model.onnx", "a/../../b", "", ".hidden", "a\0b"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(PublishRefused, match="wanted a relative path"):
        taken({path: tmp_path / "m"})


def test_too_many_files(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(PublishRefused, match="more than 4096 files"):
        taken({f"f{number}": tmp_path / "m" for number in range(4097)})


def test_roles() -> None:
    paths = ["model.onnx", "w.data", "config.pbtxt", "labels.txt", "sub/x", "other.onnx", "drift.tgp"]
    assert roles_of(paths, {"sub/x": "profile"}) == {
        "model.onnx": "model",
        "w.data": "data",
        "drift.tgp": "profile",
        "config.pbtxt": "config",
        "labels.txt": "labels",
        "sub/x": "profile",
        "other.onnx": "other",
    }
    assert roles_of(["a.onnx", "b"], {})["a.onnx"] == "model"
    assert roles_of(["a.onnx", "b.onnx"], {"b.onnx": "model"}) == {"a.onnx": "other", "b.onnx": "model"}
    for wrong, given, message in (
        (["a.onnx", "b.onnx"], {}, r"found: a\.onnx, b\.onnx"),
        (["a"], {}, "found: none"),
        (["model.onnx"], {"model.onnx": "evil"}, "'evil'"),
        (["model.onnx"], {"absent": "data"}, "'absent'"),
    ):
        with pytest.raises(PublishRefused, match=message):
            roles_of(wrong, given)


# --- staging ---

DYING = """
import os, sys
from pathlib import Path
from router.registry.blobs import BlobStore
with BlobStore(Path(sys.argv[1])).staging() as folder:
    (folder / "half").write_bytes(b"half")
    os._exit(1)
"""


def test_what_the_dead_leave_is_swept_when_it_is_old(blobs: BlobStore) -> None:
    subprocess.run([sys.executable, "-c", DYING, str(blobs.root)], check=False, timeout=30)
    (folder,) = (blobs.root / "tmp").iterdir()
    assert (folder / "half").exists()
    assert blobs.sweep() == 0
    long_ago = time.time() - 3601
    os.utime(folder, (long_ago, long_ago))
    assert blobs.sweep() == 1
    assert list((blobs.root / "tmp").iterdir()) == []


def test_what_the_living_hold_is_not_swept(blobs: BlobStore) -> None:
    with blobs.staging() as folder:
        (folder / "half").write_bytes(b"half")
        assert blobs.sweep(-1) == 0
        assert (folder / "half").exists()
    assert not folder.exists()


def write_and_fail(blobs: BlobStore) -> None:
    with blobs.staging() as folder:
        (folder / "half").write_bytes(b"half")
        raise KeyError


def test_staging_is_emptied_after_an_error(blobs: BlobStore) -> None:
    with pytest.raises(KeyError):
        write_and_fail(blobs)
    assert list((blobs.root / "tmp").iterdir()) == []
