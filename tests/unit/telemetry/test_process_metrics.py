"""The process's own numbers, compared with what the operating system tells by other means."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from server.telemetry.process_metrics import collect
from tests.support.server import ROOT


def values() -> dict[str, float]:
    return {family.name: family.points[()] for family in collect()}  # type: ignore[misc]


def test_cpu_seconds_grow_with_work() -> None:
    before = values()["process_cpu_seconds_total"]
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert values()["process_cpu_seconds_total"] >= before + 0.03


#: Nothing else goes on in this process: no thread of another test opens or closes files, or had memory before.
ALONE = """
import json, os, resource, time
from server.telemetry.process_metrics import collect
def values():
    return {family.name: family.points[()] for family in collect()}
before = values()
os.pipe()
after = values()
limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
# rusage's peak would be that of whoever forked it, too.
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps([before, after, limit, peak, time.time()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_files_and_start_are_this_processs() -> None:
    said = subprocess.run([sys.executable, "-c", ALONE], stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout
    before, after, limit, peak, now = json.loads(said)
    assert after["process_open_fds"] == before["process_open_fds"] + 2
    assert after["process_max_fds"] == limit
    assert peak / 4 < after["process_resident_memory_bytes"] <= peak * 1.1
    assert after["process_virtual_memory_bytes"] >= after["process_resident_memory_bytes"]
    assert 0 <= now - after["process_start_time_seconds"] < 24 * 3600
