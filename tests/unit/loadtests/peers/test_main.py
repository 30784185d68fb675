"""``python -m loadtests.peers``: what it refuses, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadtests.peers.catalog import PEERS
from loadtests.servers import ROOT


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer", "triton"], "a peer is one of mosec, pytriton"),
        (["--rounds", "0"], "rounds and limit must be positive"),
        (["--seconds", "0"], "seconds from 0.05 to 600"),
        (["--limit", "0"], "rounds and limit must be positive"),
    ],
)
def test_what_it_refuses(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "loadtests.peers", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_help_names_the_peers() -> None:
    command = [sys.executable, "-m", "loadtests.peers", "--help"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=50).stdout
    assert all(peer.name in said for peer in PEERS)
