"""The command line, run as its users run it."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.server import PRODUCT_PATH


def cli(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own; an error with what it said when ``check`` and it failed."""
    environment = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "server", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
