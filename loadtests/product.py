"""Where the servers that are measured come from: the compiled copy that a wheel would have, or the source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent
_COMPILED: Final = _ROOT / "build" / "compiled"
_PACKAGES: Final = ("server", "router", "monitor")


def compiled(root: Path = _ROOT) -> bool:
    """Whether ``make compiled`` has made a copy, and no source file is newer than it."""
    copy = root / "build" / "compiled"
    if not any(copy.glob("*.so")):
        return False
    made = copy.stat().st_mtime
    return all(path.stat().st_mtime <= made for package in _PACKAGES for path in (root / package).rglob("*.py"))


def python_path() -> str:
    """``PYTHONPATH`` of a server to be measured."""
    return os.pathsep.join([*([str(_COMPILED)] if compiled() else []), str(_ROOT)])
