"""loadtests.product: only a copy of what the source says now is measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from loadtests.product import compiled


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A source that was compiled."""
    for package in ("server", "router", "monitor"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "one.py").write_text("x = 1\n")
        shutil.copytree(tmp_path / package, tmp_path / "build" / "compiled" / package)
    (tmp_path / "build" / "compiled" / "tidegate__mypyc.so").touch()
    return tmp_path


def test_what_was_compiled(root: Path) -> None:
    assert compiled(root)


def test_no_copy(root: Path) -> None:
    (root / "build" / "compiled" / "tidegate__mypyc.so").unlink()
    assert not compiled(root)


def test_a_new_file(root: Path) -> None:
    (root / "router" / "two.py").touch()
    assert not compiled(root)


@pytest.mark.parametrize("later_s", [-60, 60])
def test_an_edit_that_the_compiler_did_not_see(root: Path, later_s: int) -> None:
    """One before the end of compiling, as one that came while it went on, and one after it."""
    end = (root / "build" / "compiled").stat().st_mtime
    (root / "server" / "one.py").write_text("x = 2\n")
    os.utime(root / "server" / "one.py", (end + later_s, end + later_s))
    assert not compiled(root)
