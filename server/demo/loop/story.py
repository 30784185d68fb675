"""The loop's course: serve, watch, notice, train again, check, climb; then what becomes of a bad version."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.table import Table

from server.demo.data import KNOWN_WHEN, LATE_MINUTES, Flights, load_flights
from server.demo.loop.admin import Admin
from server.demo.loop.claims import Claims, LoopFailed, until
from server.demo.loop.commands import Tidegate
from server.demo.loop.replay import Replay
from server.demo.loop.rows import MODEL, break_forest, held_out, only_from, shuffled, write_table
from server.demo.loop.settings import FORCED, ROLLOUT, STEPS, Places, config_text, forced_text
from server.demo.loop.timeline import timeline
from server.demo.loop.training import RETRAINED_ON, described, train
from server.demo.process import Addresses, ServerProcess
from server.demo.report import Reporter

_CHAMPION_MONTHS: Final = (1, 2)
#: Rows a call while months are replayed, and while a rollout counts calls.
_MANY: Final = 32
_FEW: Final = 4
#: So many flights, all from one airport, are enough for every window.
_SHIFTED: Final = 4000
_AIRPORT: Final = b"JFK"
_SETTLE_S: Final = 20.0
_ALARM_S: Final = 20.0
_TRAINED_S: Final = 120.0
_CLIMBED_S: Final = 90.0
_OPERATOR: Final = "operator"


def run_loop(folder: Path, reporter: Reporter) -> tuple[list[str], ServerProcess, Addresses]:
    raise NotImplementedError
