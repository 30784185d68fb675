"""Runs this interpreter's pip, as configured on this machine, and builds the clients' virtual environment with it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

#: tritonclient needs protobuf < 7 and its generated code clashes with ours: it lives in its own environment.
TRITONCLIENT: Final = "2.73.0"

_VERSION_PROBE: Final = "import importlib.metadata as m, tritonclient.grpc.aio; print(m.version('tritonclient'))"


class ClientsUnavailable(Exception):
    """No interpreter with tritonclient could be had. The message says why, in one line."""


def run_pip(arguments: Sequence[str], progress: Callable[[str], None], *, python: Path | None = None) -> str:
    """Run pip (for another environment when ``python`` is given), passing each line of its output to ``progress``.

    Returns the empty string, or one line saying what failed.
    """
    if importlib.util.find_spec("pip") is None:
        return f"{sys.executable} has no pip"
    target = ["--python", str(python)] if python else []
    common = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", *target, *arguments, *common]
    last_error = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None  # noqa: S101 - asked for with PIPE
        for line in process.stdout:
            progress(line.strip())
            if line.startswith("ERROR"):
                last_error = last_error or line.strip()
    return "" if process.returncode == 0 else last_error or f"pip ended with {process.returncode}"


def clients_python(folder: Path, *, offline: bool, progress: Callable[[str], None]) -> Path:
    """The interpreter of a virtual environment that has tritonclient; made on first use, about 60 MB.

    Raises ClientsUnavailable.
    """
    python = folder.absolute() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if _tritonclient_version(python) == TRITONCLIENT:
        return python
    if offline:
        raise ClientsUnavailable(f"{folder} has no tritonclient {TRITONCLIENT} (offline)")
    if not python.exists():
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
            raise ClientsUnavailable(f"{folder} exists and is no virtual environment")
        venv.EnvBuilder(symlinks=os.name != "nt").create(folder)
    failure = run_pip(["install", f"tritonclient[grpc]=={TRITONCLIENT}"], progress, python=python)
    if failure:
        raise ClientsUnavailable(f"pip could not install tritonclient {TRITONCLIENT}: {failure}")
    if _tritonclient_version(python) != TRITONCLIENT:
        raise ClientsUnavailable(f"tritonclient {TRITONCLIENT} was installed into {folder} but cannot be imported")
    return python


def _tritonclient_version(python: Path) -> str:
    if not python.exists():
        return ""
    probe = subprocess.run([str(python), "-I", "-c", _VERSION_PROBE], capture_output=True, text=True, check=False)
    return probe.stdout.strip() if probe.returncode == 0 else ""
