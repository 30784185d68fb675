"""A copy of the product that counts nothing about its requests: by what it is cheaper, that is what counting costs.

Compiled modules call each other in C. A stand-in for their statistics would have to be an interpreted object, dearer
than what it stands for, or a seam that the product needs for nothing else. So the source is copied, the functions that
count are emptied, and the copy is compiled as the product is: nothing else differs.
"""

from __future__ import annotations

import ast
import hashlib
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from scripts.compiling import PACKAGES, ROOT, compile_into

#: Who counts requests, attempts, decisions and batches, by file. ``Call._count`` makes records of traced requests too:
#: the copy is for servers that trace nothing. ``_counting`` gives what a batcher calls after each batch, or None.
COUNTING: Final[Mapping[str, Collection[str]]] = {
    "server/gateway/call.py": ("Call._count",),
    "server/gateway/served.py": ("Served.attempted", "Served.routed"),
    "server/wiring.py": ("_counting",),
}
_DIGEST: Final = "made-from"


def emptied(source: str, names: Collection[str]) -> str:
    """The source with functions (``name`` or ``Class.name``) that do nothing. Raises LookupError for one not there."""
    lines, bodies = source.splitlines(keepends=True), _bodies(ast.parse(source))
    if missing := sorted(set(names) - bodies.keys()):
        raise LookupError(f"no function {', '.join(missing)} to be emptied")
    for name in sorted(names, key=lambda one: -bodies[one].start):  # from the end, so that places stay true
        own = bodies[name]
        indent = lines[own.start][: len(lines[own.start]) - len(lines[own.start].lstrip())]
        lines[own.start : own.stop] = [f"{indent}return None\n"]
    return "".join(lines)


def _bodies(module: ast.Module) -> dict[str, range]:
    """Lines of each function's body, from 0, by its name."""
    scopes = [("", module.body), *((f"{one.name}.", one.body) for one in module.body if isinstance(one, ast.ClassDef))]
    return {
        f"{scope}{one.name}": range(one.body[0].lineno - 1, one.body[-1].end_lineno or one.body[-1].lineno)
        for scope, body in scopes
        for one in body
        if isinstance(one, ast.FunctionDef)
    }


def copy_source(out: Path, root: Path = ROOT) -> None:
    """The packages in the new folder ``out``, with nothing counted. Raises LookupError when what counts has moved."""
    for package in PACKAGES:
        shutil.copytree(root / package, out / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file, names in COUNTING.items():
        path = out / file
        try:
            path.write_text(emptied(path.read_text(), names))
        except LookupError as error:
            raise LookupError(f"{file}: {error}") from None


def compiled_copy(root: Path = ROOT) -> Path:
    """The copy compiled, in ``build/unobserved``; made anew, in two minutes or so, when a source file has changed.

    Raises LookupError as ``copy_source``, and CannotCompile.
    """
    out, digest = root / "build" / "unobserved", _digest(root)
    if (out / _DIGEST).is_file() and (out / _DIGEST).read_text() == digest:
        return out
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as name:
        source, made = Path(name, "source"), Path(name, "made")
        copy_source(source, root)
        compile_into(made, source)
        (made / _DIGEST).write_text(digest)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return out


def _digest(root: Path) -> str:
    """Of everything that the copy is made from."""
    found = hashlib.sha256(repr(sorted(COUNTING.items())).encode())
    files = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    for path in sorted([*files, root / "scripts" / "compiling.py"]):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()
