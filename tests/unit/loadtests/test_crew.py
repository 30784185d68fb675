"""loadtests.crew: what a window says of a server that did not live through it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

from loadtests.crew import Meter
from loadtests.histogram import Histogram
from loadtests.load import Taken

WORKS = "x = 0\nfor i in range(1_000_000): x += i\nprint('done', flush=True)\ninput()"


def test_time_of_a_server_that_is_gone_is_not_known() -> None:
    command = [sys.executable, "-c", WORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        meter, lasting = Meter(process.pid), Meter(process.pid)
        meter.begin()
        lasting.begin()
        lasting.end()
        process.kill()
    meter.end()
    taken = Taken(1.0, 0, Counter(), Histogram(), Histogram())
    assert (meter.sample(taken).server_cpu_s, meter.sample(taken).foreign_cpu_s) == (None, None)
    assert lasting.sample(taken).server_cpu_s is not None
