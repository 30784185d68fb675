"""The command line: run as its users run it, or in the process of the tests, where it is a test's beginning only."""

from __future__ import annotations

import os
import subprocess
import sys

from click.testing import CliRunner

from server.cli.main import cli as commands
from tests.support.server import PRODUCT_PATH


def quickly(*args: str) -> str:
    """What one command says that goes well, in this process: in one of its own it would take a second more."""
    done = CliRunner().invoke(commands, args)
    assert done.exit_code == 0, (args, done.output, done.exception)
    return done.stdout


def cli(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own; an error with what it said when ``check`` and it failed."""
    environment = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "server", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
