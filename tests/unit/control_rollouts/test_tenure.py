"""The right to work on the rollouts of a folder: one process has it, and its end gives it back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.control.rollouts.tenure import Tenure
from server.store.base import StoreError

TAKE = "import sys; from pathlib import Path; from server.control.rollouts.tenure import Tenure; "
HOLD = TAKE + "print(Tenure(Path(sys.argv[1])).take(), flush=True); sys.stdin.read()"


def test_one_has_it_at_a_time(tmp_path: Path) -> None:
    one, other = Tenure(tmp_path), Tenure(tmp_path)
    assert one.take()
    assert one.take()
    assert not other.take()
    one.give_up()
    one.give_up()
    assert other.take()
    assert not one.take()
    other.give_up()


def test_to_ask_is_not_to_take(tmp_path: Path) -> None:
    one, other = Tenure(tmp_path), Tenure(tmp_path)
    assert one.free()
    assert not one.held
    assert other.take()
    assert not one.free()
    assert other.free(), "it is its own"
    assert other.held
    other.give_up()
    assert one.free()


def test_a_killed_process_has_it_no_more(tmp_path: Path) -> None:
    tenure = Tenure(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        assert not tenure.take()
        holder.kill()
    assert tenure.take()
    tenure.give_up()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="lock of the rollouts"):
        Tenure(tmp_path / "nowhere").take()
