"""An environment for each peer, made when it is first needed: they want other releases than Tidegate does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from loadtests.servers import ROOT

#: Where they lie; ``make clean`` takes them along.
FOLDER: Final = ROOT / ".venv-peers"
_INSTALL_SECONDS: Final = 1200.0
_STAMP: Final = ".installed"


class Unavailable(Exception):
    """A peer cannot be installed or started here; says why."""


def requirements(name: str) -> Path:
    return Path(__file__).with_name(f"requirements-{name}.txt")


def pins(name: str) -> list[str]:
    """What a peer is installed from."""
    return [line for line in requirements(name).read_text().splitlines() if line and not line.startswith("#")]


def ready(name: str, folder: Path = FOLDER) -> bool:
    """Whether the peer's requirements, as they are now, are installed."""
    stamp = folder / name / _STAMP
    return stamp.exists() and stamp.read_text() == requirements(name).read_text() and _python(name, folder).exists()


def python_of(name: str, folder: Path = FOLDER) -> Path:
    """The peer's interpreter, installed first where that is to be done. Raises Unavailable."""
    if not ready(name, folder):
        _install(name, folder)
    return _python(name, folder)


def _install(name: str, folder: Path) -> None:
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    print(f"== set-up: {place} with {name} (the first time only)", flush=True)
    command = ["bash", str(ROOT / "scripts" / "venv.sh"), str(place), "-r", str(requirements(name))]
    environment = {**os.environ, "PYTHON": os.environ.get("PYTHON", sys.executable)}
    try:
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, timeout=_INSTALL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{name} was not installed within {_INSTALL_SECONDS:.0f} s") from None
    if done.returncode:
        raise Unavailable(f"{name} cannot be installed here: {_last(done.stderr)}")
    (place / _STAMP).write_text(requirements(name).read_text())


def _last(text: str) -> str:
    """What pip says last, which is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"


def _python(name: str, folder: Path) -> Path:
    return folder / name / "bin" / "python"
