"""The process's own numbers, compared with what the operating system tells by other means."""

from __future__ import annotations

import os
import resource
import sys
import time

import pytest

from server.telemetry.process_metrics import collect


def values() -> dict[str, float]:
    return {family.name: family.points[()] for family in collect()}  # type: ignore[misc]


def test_cpu_seconds_grow_with_work() -> None:
    before = values()["process_cpu_seconds_total"]
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert values()["process_cpu_seconds_total"] >= before + 0.03


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_files_and_start_are_this_processs() -> None:
    before = values()
    reader, writer = os.pipe()
    try:
        after = values()
    finally:
        os.close(reader)
        os.close(writer)
    assert after["process_open_fds"] == before["process_open_fds"] + 2
    assert after["process_max_fds"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak / 4 < after["process_resident_memory_bytes"] <= peak * 1.1
    assert after["process_virtual_memory_bytes"] >= after["process_resident_memory_bytes"]
    assert 0 <= time.time() - after["process_start_time_seconds"] < 24 * 3600
