"""Reads one server's metrics page."""

from __future__ import annotations

import time
import urllib.request

from tests.support.server import Server


def samples(server: Server, name: str) -> dict[str, float]:
    """Every sample of one metric, by its label text ("" without labels)."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=30) as response:
        text = response.read().decode()
    found = {}
    for line in text.splitlines():
        key, _, value = line.rpartition(" ")
        metric, brace, labels = key.partition("{")
        if metric == name:
            found[brace + labels] = float(value)
    return found


def total(server: Server, name: str) -> float:
    """The sum over all labels; 0 when there is none."""
    return sum(samples(server, name).values())


def wait_total(server: Server, name: str, wanted: float, seconds: float = 60.0) -> None:
    """Ask until the sum is ``wanted``: settles of other connections may be a turn of the loop behind."""
    until = time.monotonic() + seconds
    while (got := total(server, name)) != wanted:
        if time.monotonic() > until:
            raise AssertionError(f"{name} is {got}, not {wanted}, after {seconds} s")
