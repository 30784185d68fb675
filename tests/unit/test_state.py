"""server.state: commands that only read or change what is there make no state where none is."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from server.cli.main import cli
from server.doctor import examine
from server.errors import NotFound
from server.state import open_existing, open_state


def test_only_what_may_make_a_state_makes_one(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with pytest.raises(NotFound, match=r"no gateway's state in .*state; name its folder with --state-dir"):
        open_existing(folder)
    assert list(tmp_path.iterdir()) == []
    open_state(folder).close()
    open_existing(folder).close()


@pytest.mark.parametrize(
    "arguments",
    [
        "audit tail",
        "audit verify",
        "batch --in in.npz --out out.npz --model m:1",
        "registry card m:1",
        "export m:1 bundle",
        "gate check --model m:1 --policy ../policy.yaml",
        "hook list",
        "registry alias m",
        "registry alias m champion 1",
        "registry alias m champion --drop",
        "registry fetch m:1 copy",
        "registry gc",
        "registry list",
        "registry retire m:1",
        "registry show m:1",
        "registry verify",
    ],
)
def test_a_mistyped_folder_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    (tmp_path / "policy.yaml").write_text("holdout: {path: holdout.csv, label: label}\n")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    result = CliRunner().invoke(cli, [*arguments.split(), "--state-dir", "typo"])
    assert isinstance(result.exception, NotFound), result.output
    assert str(result.exception) == "there is no gateway's state in typo; name its folder with --state-dir"
    assert list(here.iterdir()) == []


def test_publishing_makes_a_state(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"model")
    arguments = ["registry", "publish", "m", str(tmp_path / "m.onnx"), "--state-dir", str(tmp_path / "new")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    open_existing(tmp_path / "new").close()


def test_the_doctor_makes_no_folder(tmp_path: Path) -> None:
    def said(folder: Path) -> tuple[str, str]:
        (found,) = [finding for finding in examine(folder, dict) if finding.check == "state directory"]
        return found.level, found.detail

    assert said(tmp_path) == ("ok", f"{tmp_path} can be written and synced")
    new = tmp_path / "a" / "b"
    assert said(new) == ("ok", f"{new} is not there yet; it can be made, written and synced")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert said(tmp_path / "file" / "state") == ("error", f"{tmp_path / 'file'}: Not a directory")
