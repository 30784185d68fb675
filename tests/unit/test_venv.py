"""scripts/venv.sh: which Python an environment is made with, when it is kept, what is said where none can be."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "venv.sh"
BASH = shutil.which("bash") or "bash"
#: Installs nothing, and needs no package index.
NOTHING = "--help"


def venv(*arguments: str | Path, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script where only the commands in `path` are found."""
    return subprocess.run(
        [BASH, SCRIPT, *arguments],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder of the commands that the script needs, without any Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("rm", "sed"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def command(path: Path, text: str) -> str:
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)
    return str(path)


def python(path: Path, before: str = "") -> str:
    """An interpreter like this one; with `before`, one that runs those statements first."""
    site = path.with_name(f"{path.name}-site")
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(before)
    return command(path, f'PYTHONPATH={site} exec {sys.executable} "$@"')


OLD = "import sys; sys.version_info = (3, 10, 13, 'final', 0)"
OTHER = "import sys; sys.version = 'another build'"
NO_ENSUREPIP = "import sys; sys.modules['ensurepip'] = None"


@pytest.mark.timeout(180)  # makes an environment
def test_an_environment_is_kept_while_it_works_and_is_the_one_asked_for(commands: Path, tmp_path: Path) -> None:
    where = tmp_path / "env"
    python(commands / "python3")
    assert venv(where, path=commands).returncode == 1
    made = venv(where, NOTHING, path=commands)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout.startswith(f"creating {where} with Python 3.")
    assert venv(where, path=commands).returncode == 0
    assert "creating" not in venv(where, NOTHING, path=commands).stdout

    assert venv(where, path=commands, PYTHON=str(commands / "python3")).returncode == 0
    assert venv(where, path=commands, PYTHON=python(tmp_path / "other", OTHER)).returncode == 1
    assert venv(where, path=commands, PYTHON="/nonexistent/python").returncode == 1

    # As after an upgrade of the system: the interpreter runs, and looks for packages in a folder of another version.
    (packages,) = (where / "lib").glob("python3.*")
    packages.rename(where / "lib" / "python3.0")
    assert venv(where, path=commands).returncode == 1
    python(commands / "python3", NO_ENSUREPIP)  # makes none, which takes less time
    assert venv(where, NOTHING, path=commands).stdout.startswith(f"creating {where} ")


def test_a_python_too_old_is_passed_over(commands: Path, tmp_path: Path) -> None:
    python(commands / "python3", OLD)
    refused = venv(tmp_path / "env", NOTHING, path=commands)
    assert refused.returncode == 1
    assert refused.stderr.startswith(
        "error: no Python 3.11 to 3.14 found on PATH; install one, or name one: make PYTHON="
    )
    taken = python(commands / "python3.12", NO_ENSUREPIP)
    assert venv(tmp_path / "env", NOTHING, path=commands).stderr.startswith(f"error: {taken} has no venv")


@pytest.mark.parametrize("before", [OLD, None], ids=["old", "missing"])
def test_a_named_python_that_cannot_be_taken_is_an_error(commands: Path, tmp_path: Path, before: str | None) -> None:
    named = "/nonexistent/python" if before is None else python(tmp_path / "named", before)
    python(commands / "python3")
    refused = venv(tmp_path / "env", NOTHING, path=commands, PYTHON=named)
    assert refused.returncode == 1
    assert refused.stderr == f"error: PYTHON={named} does not run or is older than Python 3.11\n"
    assert not (tmp_path / "env").exists()


def test_a_python_without_its_venv_package_names_the_package(commands: Path, tmp_path: Path) -> None:
    python(commands / "python3", NO_ENSUREPIP)
    refused = venv(tmp_path / "env", NOTHING, path=commands)
    assert refused.returncode == 1
    assert (
        "python3 has no venv or ensurepip module (on Debian and Ubuntu: apt-get install python3-venv" in refused.stderr
    )
