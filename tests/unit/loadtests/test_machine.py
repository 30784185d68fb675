"""loadtests.machine: processor time of trees, pinning, facts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise

import pytest

from loadtests import machine

CHILD_WORKS = """
import subprocess, sys
works = "x = 0\\nfor i in range(3_000_000): x += i\\nprint('done', flush=True)\\ninput()"
child = subprocess.Popen([sys.executable, "-c", works], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
input()
child.communicate("\\n")
print("ended", flush=True)
input()
"""


def test_time_of_children_counts_while_they_live_and_after() -> None:
    command = [sys.executable, "-c", CHILD_WORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = int(process.stdout.readline().split()[0])
        alive = machine.cpu_seconds(process.pid)
        assert machine.tree(process.pid) == [process.pid, child]
        assert alive > machine.cpu_seconds(child) > 0.02
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        assert machine.cpu_seconds(process.pid) >= alive - 0.05
        process.communicate("\n")


WORKS_A_LITTLE = """
import sys, time
for _ in sys.stdin:
    end = time.process_time() + 0.004
    while time.process_time() < end:
        pass
    print("done", flush=True)
"""


def test_time_is_finer_than_a_tick() -> None:
    command = [sys.executable, "-c", WORKS_A_LITTLE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        seen = []
        for _ in range(4):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            seen.append(machine.cpu_seconds(process.pid))
        process.communicate()
    assert all(after - before > 0.003 for before, after in pairwise(seen))


def test_a_process_that_is_gone_has_no_time() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert machine.cpu_seconds(process.pid) == 0


STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE)
input()
"""


def test_a_tree_ends_whole_even_when_it_does_not_want_to() -> None:
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        members = machine.tree(process.pid)
        assert len(members) == 2
        machine.end_tree(process, 0.1)
    assert process.returncode == -signal.SIGKILL
    assert [machine.born(pid) for pid in members] == [None, None]


def test_a_process_is_known_by_when_it_was_started() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        start = machine.born(process.pid)
        assert start is not None
        assert machine.born(process.pid) == start
        process.communicate(b"\n")
    assert machine.born(process.pid) is None


def test_a_tree_is_stopped_and_goes_on() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        machine.signal_tree(process.pid, signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        machine.signal_tree(process.pid, signal.SIGCONT)
        assert os.WIFCONTINUED(os.waitpid(process.pid, os.WCONTINUED)[1])
        process.communicate(b"\n")


def test_time_by_thread() -> None:
    before = machine.thread_seconds(os.getpid())
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    seen = machine.thread_seconds(os.getpid())
    assert seen[threading.get_native_id()] - before[threading.get_native_id()] > 0.04


def test_what_is_started_while_pinned_stays_there() -> None:
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    with machine.pinned({core}):
        command = [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str({core})
    assert os.sched_getaffinity(0) == allowed


def test_a_tree_can_be_moved() -> None:
    core = max(machine.usable_cores())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        machine.pin_tree(process.pid, {core})
        assert os.sched_getaffinity(process.pid) == {core}
        process.communicate("\n")


def test_generator_and_server_are_apart_where_they_can_be() -> None:
    server, client = machine.split_cores()
    assert len(server) == len(client) == 1
    assert server.isdisjoint(client) == (len(machine.usable_cores()) > 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("123456,,instructions:u,1000,100.00,,\n", 123456),
        ("# started\n\n99,,instructions,1,50.00,0.5,insn per cycle\n", 99),
        ("<not supported>,,instructions:u,0,100.00,,\n", None),
        ("<not counted>,,instructions,0,0.00,,\n", None),
        ("", None),
    ],
)
def test_what_perf_says(text: str, count: int | None) -> None:
    assert machine.read_perf(text) == count


@pytest.mark.skipif(not machine.counts_instructions(), reason="the processor's counters are not to be had here")
def test_instructions_are_counted() -> None:
    counter = machine.Instructions([os.getpid()])
    sum(range(1_000_000))
    assert (counter.stop() or 0) > 0
