"""The admin token on a real disk, made by several processes at once too."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.admin_token import NAME, load_or_make_token
from server.errors import ConfigError


def test_made_once_for_the_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    before = os.umask(0)
    try:
        token = load_or_make_token(folder)
    finally:
        os.umask(before)
    assert len(base64.urlsafe_b64decode(token + "=")) == 32
    assert load_or_make_token(folder) == token
    assert (folder / NAME).stat().st_mode & 0o7777 == 0o600
    assert [file.name for file in folder.iterdir()] == [NAME]


def test_each_folder_has_its_own(tmp_path: Path) -> None:
    assert load_or_make_token(tmp_path / "a") != load_or_make_token(tmp_path / "b")


def test_what_a_dead_process_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / f".{NAME}.part").write_text("half")
    assert len(load_or_make_token(tmp_path)) == 43


def test_processes_that_start_at_once_get_the_same(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from server.admin_token import load_or_make_token as f"
    command = [sys.executable, "-c", f"{program}; print(f(Path(sys.argv[1])))", str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    tokens = {process.communicate(timeout=60)[0].strip() for process in running}
    assert tokens == {load_or_make_token(tmp_path)}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o666])
def test_one_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    token = load_or_make_token(tmp_path)
    (tmp_path / NAME).chmod(mode)
    with pytest.raises(ConfigError, match=f"wanted mode 600, got {mode:o}") as caught:
        load_or_make_token(tmp_path)
    assert token not in caught.value.message
    (tmp_path / NAME).chmod(0o400)
    assert load_or_make_token(tmp_path) == token


@pytest.mark.parametrize("content", ["", "\n", "short", "x" * 15, "a token with spaces", "ä" * 20, "x" * 20 + "\0"])
def test_one_that_holds_no_token_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    (tmp_path / NAME).chmod(0o600)
    with pytest.raises(ConfigError, match="must be 16 or more printable ASCII characters"):
        load_or_make_token(tmp_path)


def test_one_written_by_hand_is_taken(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("correct-horse-battery\r\n")
    (tmp_path / NAME).chmod(0o600)
    assert load_or_make_token(tmp_path) == "correct-horse-battery"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        load_or_make_token(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="cannot be used: File exists"):
        load_or_make_token(tmp_path / "state")
