"""What the operating system says: facts of the machine, processor time of process trees, pinning, instructions.

Linux only, by ``/proc``.
"""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from loadtests import product

_PROC: Final = Path("/proc")
_LOOK_S: Final = 0.02
#: A process that was killed is gone after this long.
_KILLED_S: Final = 5.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PACKAGES: Final = ("tidegate", "numpy", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "ngh2", "uvloop")
_SERVER_PACKAGES: Final = ("httptools", "orjson", "starlette", "uvicorn")
_ALLOWED: Final = frozenset(os.sched_getaffinity(0))
_REPOSITORY: Final = Path(__file__).resolve().parent.parent


# --- processes -------------------------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """Fields of a process from its state on (``proc(5)``, field 3 is the first). Raises OSError when it is gone."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def tree(pid: int) -> list[int]:
    """A process and all that descend from it, as far as they live."""
    parents: dict[int, list[int]] = {}
    for path in _PROC.iterdir():
        if path.name.isdecimal():
            with suppress(OSError):
                parents.setdefault(int(_stat(int(path.name))[1]), []).append(int(path.name))
    found = [pid]
    for one in found:  # grows while it is walked
        found += parents.get(one, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process tree, with that of children that have ended and were waited for."""
    total = 0.0
    for one in tree(pid):
        with suppress(OSError):
            fields = [int(field) for field in _stat(one)[11:15]]
            total += max(sum(fields[:2]) / _TICKS, _thread_seconds(one)) + sum(fields[2:]) / _TICKS
    return total


def _thread_seconds(pid: int) -> float:
    """Time of the threads that live, to the nanosecond; less than the process's when threads have ended."""
    return sum(thread_seconds(pid).values())


def thread_seconds(pid: int) -> dict[int, float]:
    """Processor time of each thread of a process, by its id, to the nanosecond. Raises OSError when it is gone."""
    times: dict[int, float] = {}
    for thread in (_PROC / str(pid) / "task").iterdir():
        with suppress(OSError):
            times[int(thread.name)] = int((thread / "schedstat").read_text().split()[0]) / 1e9
    return times


def born(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None when it has ended (or waits to be reaped).

    A process is the same as before where this is: its number alone may be another's by then.
    """
    try:
        fields = _stat(pid)
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def end_tree(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """Ask a child to end, and kill whatever of its tree is left after ``patience_s``."""
    members = {pid: born(pid) for pid in tree(process.pid)}
    end = time.monotonic() + patience_s
    process.terminate()
    signal_tree(process.pid, signal.SIGCONT)  # a stopped one hears nothing
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    for pid in _left(members, end):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    _left(members, time.monotonic() + _KILLED_S)


def _left(members: Mapping[int, int | None], end: float) -> list[int]:
    """Those that still are the processes they were, at ``end``; empty as soon as there are none."""
    while True:
        left = [pid for pid, start in members.items() if start is not None and born(pid) == start]
        if not left or time.monotonic() >= end:
            return left
        time.sleep(_LOOK_S)


def signal_tree(pid: int, number: signal.Signals) -> None:
    """Send a signal to each process of a tree."""
    for one in tree(pid):
        with suppress(ProcessLookupError):
            os.kill(one, number)


def busy_seconds() -> float:
    """Processor time of the whole machine that was not idle, not waiting and not stolen."""
    fields = [int(field) for field in (_PROC / "stat").read_text().split("\n", 1)[0].split()[1:8]]
    user, nice, system, _idle, _wait, irq, softirq = fields
    return (user + nice + system + irq + softirq) / _TICKS


# --- pinning ---------------------------------------------------------------------------------------------------------


def usable_cores() -> set[int]:
    """All cores that this process was started on, also when this thread is pinned to some of them."""
    return set(_ALLOWED)


def split_cores() -> tuple[set[int], set[int]]:
    """Cores for the server and for the generator, apart from each other where there are two or more."""
    cores = sorted(usable_cores())
    return ({cores[0]}, {cores[-1]}) if len(cores) > 1 else ({cores[0]}, {cores[0]})


@contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """This thread, and what it starts meanwhile, on ``cores`` only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def pin_tree(pid: int, cores: set[int]) -> None:
    """Every thread of a process tree on ``cores`` only, from now on."""
    for one in tree(pid):
        with suppress(OSError):
            for thread in (_PROC / str(one) / "task").iterdir():
                with suppress(OSError):
                    os.sched_setaffinity(int(thread.name), cores)


# --- facts -----------------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What a result depends on besides the program: two results of other facts are not to be compared."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(usable_cores()),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: found for name in (*_PACKAGES, *_SERVER_PACKAGES) if (found := _version(name))},
        "commit": _commit(),
        "compiled": product.compiled(),
    }


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    lines = (_PROC / "cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Processor"))]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """The checked out commit, with ``+`` behind it when files differ; empty without git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(_REPOSITORY), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return done.stdout.strip() if done.returncode == 0 else ""


# --- instructions ----------------------------------------------------------------------------------------------------


class Instructions:
    """Counts the instructions of a process tree by ``perf stat``: neighbours on the machine barely move them."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".perf")  # noqa: SIM115 - closed by stop
        listed = ",".join(str(pid) for pid in pids)
        command = ["perf", "stat", "-x", ",", "-e", "instructions", "-o", self._file.name, "-p", listed]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self) -> int | None:
        """How many were counted; None when the counter gave nothing."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        with self._file as file:
            return read_perf(Path(file.name).read_text())


def read_perf(text: str) -> int | None:
    """The number of instructions in what ``perf stat -x ,`` wrote; None when they were not counted."""
    for line in text.splitlines():
        fields = line.split(",")
        if len(fields) > 2 and fields[2].startswith("instructions") and fields[0].isdecimal():
            return int(fields[0])
    return None


def counts_instructions() -> bool:
    """``perf`` is here, allowed, and the processor's counters are let through to this machine."""
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-x", ",", "-e", "instructions", "--", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return read_perf(done.stderr) is not None
