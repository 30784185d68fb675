"""loadtests.peers.environments: installed once, again when the requirements change, and a failure is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.peers import environments
from loadtests.peers.environments import Unavailable, pins, python_of, ready, requirements


def installed(folder: Path, text: str) -> Path:
    python = folder / "mosec" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    (folder / "mosec" / ".installed").write_text(text)
    return python


def test_what_is_installed_is_used(tmp_path: Path) -> None:
    python = installed(tmp_path, requirements("mosec").read_text())
    assert python_of("mosec", tmp_path) == python


def test_other_requirements_are_not_those_that_are_installed(tmp_path: Path) -> None:
    installed(tmp_path, "mosec==0.0.1\n")
    assert not ready("mosec", tmp_path)


def test_an_interpreter_that_is_gone_is_installed_again(tmp_path: Path) -> None:
    installed(tmp_path, requirements("mosec").read_text()).unlink()
    assert not ready("mosec", tmp_path)


def test_pins_are_the_lines_that_count() -> None:
    assert "mosec==" in pins("mosec")[0]
    assert not any(line.startswith("#") for line in pins("mosec"))


def test_what_cannot_be_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", "/bin/false")
    with pytest.raises(Unavailable, match=r"mosec cannot be installed here: error: PYTHON=/bin/false does not run"):
        python_of("mosec", tmp_path)
    assert not ready("mosec", tmp_path)


def test_they_lie_where_git_and_make_clean_know_them() -> None:
    assert environments.FOLDER.name.startswith(".venv-")
