"""The programs of ``loadtests`` refuse settings that mean nothing by one sentence, before anything is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadtests.servers import ROOT


@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        ("bench --rounds 0", "rounds must be positive"),
        ("bench --seconds nan", "seconds from 0.05 to 600"),
        ("bench --peer grpc=127.0.0.1:9,label=other", "other: nobody answers at 127.0.0.1:9"),
        ("bench --output /dev/null/results", "/dev/null"),
        ("peers --rounds 0", "rounds and limit must be positive"),
        ("peers --output /dev/null/results", "/dev/null"),
        ("observers_cost --starts 0", "must be positive"),
        ("observers_cost --seconds 0", "seconds from 0.05 to 600"),
        ("observers_cost --output /dev/null/result.json", "/dev/null"),
        ("codec_crossover --rounds 0", "rounds must be positive"),
        ("reload_cost --pairs 0", "must be positive"),
        ("rollback_time --repeats 0", "must be positive"),
        ("route_cost --rounds 0", "rounds must be positive"),
    ],
)
def test_settings_that_mean_nothing(program: str, wanted: str) -> None:
    command = [sys.executable, "-m", *f"loadtests.{program}".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert "Traceback" not in done.stderr
    assert "starting" not in done.stdout
