"""What the operating system says of this process, under Prometheus' usual names. Read when a page is asked for."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from server.telemetry.snapshot import FamilySnapshot, Kind, Merge, Number

_PROC = Path("/proc/self")


def collect() -> Iterator[FamilySnapshot]:
    """CPU seconds everywhere; memory, files and start time where there is a /proc."""
    times = os.times()
    yield _single("process_cpu_seconds_total", "User and system CPU time.", "counter", times.user + times.system)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _single("process_max_fds", "Limit on open file descriptors.", "gauge", soft, "min")
    if _PROC.is_dir():
        yield from _from_proc()


def _from_proc() -> Iterator[FamilySnapshot]:
    size, resident = (int(pages) for pages in (_PROC / "statm").read_text().split()[:2])
    page = resource.getpagesize()
    yield _single("process_virtual_memory_bytes", "Virtual memory size.", "gauge", size * page)
    yield _single("process_resident_memory_bytes", "Resident memory size.", "gauge", resident * page)
    yield _single("process_open_fds", "Open file descriptors.", "gauge", len(os.listdir(_PROC / "fd")))
    yield _single("process_start_time_seconds", "Start of the process, Unix time.", "gauge", _started_s(), "min")


def _started_s() -> float:
    # Field 22 of stat is the start in clock ticks since boot; the name in field 2 may hold spaces and brackets.
    ticks = int((_PROC / "stat").read_text().rpartition(")")[2].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime "))
    return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


def _single(name: str, help_text: str, kind: Kind, value: Number, merge: Merge = "sum") -> FamilySnapshot:
    return FamilySnapshot(name, help_text, kind, (), {(): value}, merge)
