"""Holders of leases: the living, the dead, those with a dead one's number, and those of whom nothing is known."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from server.delivery.owners import is_gone, own_name

SAY_NAME = "from server.delivery.owners import own_name; print(own_name(), flush=True); input()"


def test_a_process_is_gone_when_it_was_killed_and_not_before() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SAY_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    assert not is_gone(name)
    process.kill()
    process.communicate()
    assert is_gone(name)


def test_a_dead_process_that_nobody_waited_for_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", SAY_NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    name = process.stdout.readline().decode().strip()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert is_gone(name)
    process.communicate()


def test_who_has_a_dead_ones_number_is_another() -> None:
    host, pid, started, word = own_name().split(":")
    assert not is_gone(f"{host}:{pid}:{started}:other")
    assert is_gone(f"{host}:{pid}:{int(started) + 1}:{word}")


def test_who_cannot_look_takes_nobody_for_dead() -> None:
    """A process without a free descriptor, which asks about itself."""
    ask = (
        "import os, resource; from server.delivery.owners import is_gone, own_name\n"
        "name = own_name(); last = os.open(os.devnull, os.O_RDONLY)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, last + 1))\n"
        "print(is_gone(name))\n"
    )
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize("name", ["", "me", "elsewhere:1:2:3", "a:b", "{0}", "{0}:x:1:2", "{0}:1::2", "{0}:999999:abc"])
def test_of_others_nothing_is_known(name: str) -> None:
    assert not is_gone(name.format(own_name().partition(":")[0]))
