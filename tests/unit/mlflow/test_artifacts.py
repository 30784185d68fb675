"""Artifacts on a disk of this machine: what the operator allows is read, and nothing leads out of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from router.registry.origin import Unreachable, Unusable
from server.errors import ConfigError
from server.mlflow.artifacts import Listed, Places
from server.mlflow.options import MlflowOptions
from server.mlflow.wire import Wire
from tests.support.rights import permissions_hold

URL = "http://127.0.0.1:9"
LIMIT = 1000


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    """The allowed folder, with one version in it; beside it lies what nobody may have."""
    folder = tmp_path / "allowed"
    (folder / "1" / "deep").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(b"graph")
    (folder / "1" / "deep" / "weights").write_bytes(b"weights")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_bytes(b"key")
    return folder


def places(*folders: Path) -> Places:
    return Places(Wire(MlflowOptions(URL)), "127.0.0.1:9", folders)


def copied(found: Places, path: str, tmp_path: Path) -> bytes:
    target = tmp_path / "target"
    descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        found.at(path).copy(path, descriptor, LIMIT)
    finally:
        os.close(descriptor)
    return target.read_bytes()


@pytest.mark.parametrize("form", ["file://{}/1", "file://localhost{}/1/", "file:{}/1", "{}/1"])
def test_an_allowed_folder_is_listed_and_read(allowed: Path, tmp_path: Path, form: str) -> None:
    found = places(allowed)
    root = found.of(form.format(allowed))
    assert root == f"{allowed}/1"
    rows = sorted(found.at(root).listed(root), key=lambda row: row.name)
    assert [(row.name, row.is_folder) for row in rows] == [("deep", True), ("model.onnx", False)]
    assert rows[1] == Listed("model.onnx", False, 5)
    assert found.at(root).text(f"{root}/model.onnx", 5) == b"graph"
    assert copied(found, f"{root}/deep/weights", tmp_path) == b"weights"


def test_a_name_that_is_escaped_in_the_address(allowed: Path) -> None:
    (allowed / "a b").mkdir()
    assert places(allowed).of((allowed / "a b").as_uri()) == f"{allowed}/a b"
    assert places(allowed).of(f"{allowed}/a b") == f"{allowed}/a b"


def test_an_allowed_folder_may_itself_be_a_link(allowed: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(allowed)
    found = places(link)
    for root in (f"{link}/1", f"{allowed}/1"):
        assert found.at(root).text(f"{found.of(root)}/model.onnx", LIMIT) == b"graph"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("file://{secret}", "in none of the folders that registry.mlflow.artifact_folders allows"),
        ("{secret}", "in none of the folders"),
        ("{allowed}", "in none of the folders"),
        ("{allowed}-more/1", "in none of the folders"),
        ("file://elsewhere{allowed}/1", "lie at file://"),
        ("file://{allowed}/../secret", "leads elsewhere"),
        ("file://{allowed}/%2e%2e/secret", "leads elsewhere"),
        ("file://{allowed}/1%2f..%2f..%2fsecret", "leads elsewhere"),
        ("file://{allowed}/1%00", "leads elsewhere"),
        ("file://{allowed}/1?x=1", "leads elsewhere"),
        ("{allowed}/./1", "leads elsewhere"),
        ("s3://bucket/{allowed}", "lie at s3://"),
    ],
)
def test_addresses_that_lead_elsewhere_are_refused(allowed: Path, tmp_path: Path, address: str, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        places(allowed).of(address.format(allowed=allowed, secret=tmp_path / "secret"))


def test_nothing_on_disk_is_allowed_unless_said(allowed: Path) -> None:
    with pytest.raises(Unusable, match="artifact_folders"):
        places().of(f"file://{allowed}/1")


def _link(path: Path, secret: Path) -> None:
    path.symlink_to(secret / "key")


def _hard_link(path: Path, secret: Path) -> None:
    os.link(secret / "key", path)


def _linked_folder(path: Path, secret: Path) -> None:
    (path.parent / "deep" / "weights").unlink()
    (path.parent / "deep").rmdir()
    (path.parent / "deep").symlink_to(secret)


def _pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path, _: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: a terabyte that takes no place


@pytest.mark.parametrize(
    ("attack", "name", "reason"),
    [
        (_link, "x", "links are not followed"),
        (_hard_link, "x", "has 2 links"),
        (_linked_folder, "deep/key", "links are not followed"),
        (_pipe, "x", "is not a regular file"),
        (_huge, "x", "more than the 1000 bytes"),
        (lambda *_: None, "x", "has no '.*/1/x'"),
        (lambda *_: None, "deep", "is not a regular file"),
        (lambda *_: None, "model.onnx/x", "not a folder"),
    ],
)
def test_what_lies_there_leads_nowhere_else(
    allowed: Path, tmp_path: Path, attack: Callable[[Path, Path], None], name: str, reason: str
) -> None:
    attack(allowed / "1" / "x", tmp_path / "secret")
    found = places(allowed)
    with pytest.raises(Unusable, match=reason):
        copied(found, f"{allowed}/1/{name}", tmp_path)
    with pytest.raises(Unusable, match=reason):
        found.at(f"{allowed}/1").text(f"{allowed}/1/{name}", LIMIT)


def test_a_disk_that_is_away_is_an_outage(allowed: Path) -> None:
    found = places(allowed)
    allowed.rename(allowed.with_name("unmounted"))
    with pytest.raises(Unreachable, match=r"the artifact folder .* cannot be read: No such file"):
        found.at(f"{allowed}/1").listed(f"{allowed}/1")


def test_a_folder_whose_files_may_not_be_looked_at_is_an_outage(allowed: Path) -> None:
    deep = allowed / "1" / "deep"
    deep.chmod(0o444)  # the names can be read, what they stand for cannot
    found = places(allowed)
    with permissions_hold(), pytest.raises(Unreachable, match="cannot be read: Permission denied"):
        found.at(str(deep)).listed(str(deep))
    deep.chmod(0o755)
    assert found.at(str(deep)).listed(str(deep)) == [Listed("weights", False, 7)]


@pytest.mark.skipif(sys.platform != "linux", reason="wants a file of Linux that cannot be read")
def test_a_file_that_a_disk_cannot_read_is_an_outage() -> None:
    own = Path(os.path.realpath("/proc/self"))
    found = places(own)
    with pytest.raises(Unreachable, match=r"/mem' cannot be read: Input/output error"):  # at 0 lies no memory
        found.at(str(own)).text(f"{own}/mem", LIMIT)


@pytest.mark.parametrize("folder", ["relative", "/a/../b"])
def test_allowed_folders_are_absolute(folder: str) -> None:
    with pytest.raises(ConfigError, match="an artifact folder must be an absolute path"):
        MlflowOptions(URL, artifact_folders=(Path(folder),))
