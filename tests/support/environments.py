"""Environments beside ours, for foreign servers and clients whose requirements are not ours; made on first use."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.support.server import ROOT

CLIENTS = ROOT / "tests" / "clients"


def environment(name: str) -> Path:
    """The interpreter of ``.venv-NAME``, which has ``requirements-NAME.txt``: a minute or two the first time.

    A stamp in it says for which requirements it was made. Of several test processes that want it one makes it, while
    the others wait.
    """
    requirements = CLIENTS / f"requirements-{name}.txt"
    folder = ROOT / f".venv-{name}"
    stamp, interpreter = folder / ".installed", folder / "bin" / "python"
    with requirements.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        wanted = file.read()
        if not (stamp.is_file() and stamp.read_text() == wanted):
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True, timeout=120)
            command = [str(interpreter), "-m", "pip", "install", "--quiet", "-r", str(requirements)]
            subprocess.run(command, check=True, timeout=700)
            stamp.write_text(wanted)
    return interpreter
