"""scripts.compiling and the wheel's hook: what is compiled does the same, and what cannot be is told, not lost."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts.compiling import MODULES, PACKAGES, TYPED, CannotCompile, compile_into

ROOT = Path(__file__).parents[2]
NO_COMPILER = "/nonexistent/cc"

SMALL = """
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self, more: int) -> int:
        self.value += more
        return self.value
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A product of one module."""
    for package in PACKAGES:
        (tmp_path / "source" / package).mkdir(parents=True)
        (tmp_path / "source" / package / "__init__.py").touch()
    (tmp_path / "source" / "server" / "small.py").write_text(SMALL)
    return tmp_path / "source"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_to_be_compiled_exists() -> None:
    assert [module for module in MODULES if not (ROOT / module).is_file()] == []
    assert list(MODULES) == sorted(set(MODULES))


def test_an_isolated_build_has_the_types_that_are_needed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = set(project["build-system"]["requires"])
    assert {line for line in project["project"]["dependencies"] if line.partition(">")[0] in TYPED} <= wanted
    assert set(TYPED) <= {line.partition(">")[0] for line in wanted}


def test_a_module_is_compiled_beside_its_source(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = compile_into(out, source, ["server/small.py"])
    assert [str(path).partition(".")[0] for path in made] == ["server/small", "tidegate__mypyc"]
    assert (out / "server" / "small.py").read_text() == SMALL
    ask = "from server import small; c = small.Counter(); c.add(2); print(small.__file__, c.add(3))"
    said = run("-c", ask, PYTHONPATH=str(out), PYTHONSAFEPATH="1").stdout.split()
    assert said == [str(out / made[0]), "5"]
    library = ctypes.CDLL(str(out / made[1]))
    assert library.PyInit_tidegate__mypyc
    with pytest.raises(AttributeError):  # known outside, its calls could not be direct
        _ = library.CPyArg_ParseStackAndKeywords


def test_wrong_types_are_not_compiled(source: Path, tmp_path: Path) -> None:
    (source / "server" / "small.py").write_text(SMALL.replace("-> int", "-> str"))
    with pytest.raises(CannotCompile, match=r'small.py:8: error: Incompatible return value type \(got "int"'):
        compile_into(tmp_path / "out", source, ["server/small.py"])


def test_without_a_compiler_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("-m", "scripts.compiling", str(out), CC=NO_COMPILER)
    assert (done.returncode, done.stderr) == (1, f"cannot compile: no C compiler: {NO_COMPILER} is not on PATH\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_copy_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "own.txt").touch()
    done = run("-m", "scripts.compiling", str(tmp_path))
    assert done.returncode == 1
    assert "it is not replaced" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


def wheel(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", str(folder), "."]
    done = run(*command, **environment)
    return done, list(folder.glob("*.whl"))


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TIDEGATE_COMPILE": "0"}, ""),
        ({"CC": NO_COMPILER}, f"left uncompiled: no C compiler: {NO_COMPILER} is not on PATH"),
    ],
    ids=["not wanted", "no compiler"],
)
def test_a_wheel_may_be_pure_python(environment: dict[str, str], said: str, tmp_path: Path) -> None:
    done, wheels = wheel(tmp_path, **environment)
    assert done.returncode == 0, done.stdout
    assert said in done.stdout + done.stderr
    assert [one.name.endswith("-py3-none-any.whl") for one in wheels] == [True]
    assert not [name for name in zipfile.ZipFile(wheels[0]).namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TIDEGATE_COMPILE": "1", "CC": NO_COMPILER}, "TIDEGATE_COMPILE=1, and no C compiler"),
        ({"TIDEGATE_COMPILE": "yes"}, "TIDEGATE_COMPILE: wanted auto, 0 or 1, got 'yes'"),
    ],
    ids=["no compiler", "wrong word"],
)
def test_a_wheel_that_is_not_what_was_asked_for_is_not_made(
    environment: dict[str, str], said: str, tmp_path: Path
) -> None:
    done, wheels = wheel(tmp_path, **environment)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert wheels == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_carries_the_request_path_compiled(tmp_path: Path) -> None:
    done, wheels = wheel(tmp_path, TIDEGATE_COMPILE="1")
    assert done.returncode == 0, done.stdout
    names = zipfile.ZipFile(wheels[0]).namelist()
    compiled = {name.partition(".")[0] + ".py" for name in names if name.endswith(".so")}
    assert compiled == {*MODULES, "tidegate__mypyc.py"}
    assert compiled - {"tidegate__mypyc.py"} <= set(names)  # the source stays beside it
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(tmp_path / "installed")
    done = run("-m", "server", "doctor", "--json", PYTHONPATH=str(tmp_path / "installed"), PYTHONSAFEPATH="1")
    assert '"request path"' in done.stdout
    assert '"compiled"' in done.stdout
