"""loadtests.unobserved: the copy differs from the product in nothing but the functions that count."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from loadtests.unobserved import COUNTING, copy_source, emptied
from scripts.compiling import MODULES, PACKAGES, ROOT

SOURCE = '''"""A module."""

import abc


def free(x: int) -> None:
    """Says something."""
    print(x)


class One(abc.ABC):
    x = 1

    def method(
        self, y: int
    ) -> int:
        def inner() -> int:
            return y

        return inner()

    def kept(self) -> int:
        return 7
'''


def test_functions_are_emptied_and_all_else_stays() -> None:
    made = emptied(SOURCE, ("One.method", "free"))
    assert made == SOURCE.replace('    """Says something."""\n    print(x)\n', "    return None\n").replace(
        "        def inner() -> int:\n            return y\n\n        return inner()\n", "        return None\n"
    )
    assert emptied(SOURCE, ()) == SOURCE


@pytest.mark.parametrize("name", ["method", "One", "One.inner", "inner", "One.free", "absent"])
def test_what_is_no_function_is_named(name: str) -> None:
    with pytest.raises(LookupError, match=name):
        emptied(SOURCE, (name,))


def test_the_copy_counts_nothing_and_is_else_the_product(tmp_path: Path) -> None:
    copy_source(tmp_path / "copy")
    files = [path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    differ = {str(file) for file in files if (ROOT / file).read_bytes() != (tmp_path / "copy" / file).read_bytes()}
    assert differ == set(COUNTING)
    for file in COUNTING:
        ast.parse((tmp_path / "copy" / file).read_text())
    # What every request passes is compiled there too; only the wiring is not.
    assert differ - set(MODULES) == {"server/wiring.py"}


def test_what_counts_has_moved(tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    served = tmp_path / "server" / "gateway" / "served.py"
    served.write_text(served.read_text().replace("def routed(", "def decided("))
    with pytest.raises(LookupError, match=r"server/gateway/served\.py: no function Served\.routed"):
        copy_source(tmp_path / "copy", tmp_path)
