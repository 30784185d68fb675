"""Where the servers that are measured come from: the compiled copy that a wheel would have, or the source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent
COMPILED: Final = _ROOT / "build" / "compiled"
_PACKAGES: Final = ("server", "router", "monitor")


def compiled(root: Path = _ROOT) -> bool:
    """Whether ``make compiled`` has made a copy, and every source file is still as it was copied."""
    copy = root / "build" / "compiled"
    if not any(copy.glob("*.so")):
        return False
    sources = [path for package in _PACKAGES for path in (root / package).rglob("*.py")]
    return all(_unchanged(path, copy / path.relative_to(root)) for path in sources)


def _unchanged(source: Path, copy: Path) -> bool:
    """A copy has its source's time; the folder's own is that of the end of compiling, after later edits."""
    return copy.exists() and source.stat().st_mtime_ns == copy.stat().st_mtime_ns


def python_path(copy: Path | None = None) -> str:
    """``PYTHONPATH`` of a server to be measured; of one from a ``copy`` of the packages, if that is given."""
    first = copy or (COMPILED if compiled() else None)
    return os.pathsep.join([*([str(first)] if first else []), str(_ROOT)])
