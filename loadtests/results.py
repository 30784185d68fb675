"""What a run leaves behind: samples by row and column, with the facts of the machine, as one JSON file.

A row is a way to ask, a column who was asked. Samples of a cell are windows of the same length, one per round; cells of
one round stand at the same place of their lists, as long as no window was left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from loadtests.crew import Sample
from loadtests.histogram import Histogram
from loadtests.machine import facts, load_average
from server.errors import ConfigError

SCHEMA: Final = "tidegate-loadtest/1"
#: What can be read off a sample, and the percentile in us of those that are latencies.
METRICS: Final[Mapping[str, float | None]] = {
    "rate": None,
    "cpu_us": None,
    "instructions_each": None,
    "p50_us": 50.0,
    "p90_us": 90.0,
    "p99_us": 99.0,
    "p99.9_us": 99.9,
}


def read(sample: Sample, metric: str) -> float:
    """One of ``METRICS``; NaN where it was not measured."""
    percentile = METRICS[metric]
    if percentile is not None:
        return sample.latency.percentile(percentile) / 1000
    return float(getattr(sample, metric))


@dataclass(slots=True)
class Result:
    """``cells[row][column]`` has one sample for each round."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=facts)
    started_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    load_start: float = field(default_factory=load_average)
    load_end: float = 0.0
    cells: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)

    def add(self, row: str, column: str, sample: Sample) -> None:
        self.cells.setdefault(row, {}).setdefault(column, []).append(sample)

    def values(self, row: str, column: str, metric: str) -> list[float]:
        """The metric in each round; empty when the cell was not measured."""
        return [read(sample, metric) for sample in self.cells.get(row, {}).get(column, [])]

    def save(self, path: Path) -> None:
        self.load_end = load_average()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "name": self.name,
            "started_at": self.started_at,
            "machine": self.machine,
            "load_average": {"start": self.load_start, "end": self.load_end},
            "settings": self.settings,
            "cells": [
                {"row": row, "column": column, "samples": [sample_json(sample) for sample in samples]}
                for row, columns in self.cells.items()
                for column, samples in columns.items()
            ],
        }

    @classmethod
    def from_json(cls, found: Any) -> Result:
        """Raises ConfigError for what is no result of this schema."""
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            got = found.get("schema") if isinstance(found, dict) else type(found).__name__
            raise ConfigError(f"a result has the schema {SCHEMA!r}, got {got!r}")
        try:
            load = found["load_average"]
            result = cls(
                str(found["name"]),
                dict(found["settings"]),
                dict(found["machine"]),
                str(found["started_at"]),
                float(load["start"]),
                float(load["end"]),
            )
            for cell in found["cells"]:
                for sample in cell["samples"]:
                    result.add(str(cell["row"]), str(cell["column"]), sample_from_json(sample))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the result is incomplete or damaged: {type(error).__name__}: {error}") from None
        return result


def check_folder(folder: Path) -> None:
    """Make the folder for a result, before anything is measured. Raises OSError when none can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"results cannot be written to {folder}")


def load(path: Path) -> Result:
    """Raises ConfigError naming the file."""
    try:
        return Result.from_json(json.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}") from None


_OPTIONAL: Final = ("server_cpu_s", "foreign_cpu_s", "instructions")


def sample_json(sample: Sample) -> dict[str, Any]:
    """The counts, and the usual figures once more for readers; the figures are made anew when it is read back."""
    figures = {metric: read(sample, metric) for metric in METRICS}
    return {
        "seconds": sample.seconds,
        "completed": sample.completed,
        "outcomes": sample.outcomes,
        "client_cpu_s": sample.client_cpu_s,
        **{name: getattr(sample, name) for name in _OPTIONAL},
        "late_sends": sample.late_sends,
        "figures": {name: round(value, 3) for name, value in figures.items() if math.isfinite(value)},
        "latency": sample.latency.to_json(),
        "late": sample.late.to_json(),
    }


def sample_from_json(found: Mapping[str, Any]) -> Sample:
    optional = {name: found[name] for name in _OPTIONAL}
    for name, value in optional.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{name} must be a number or null, got {value!r}")
    return Sample(
        float(found["seconds"]),
        int(found["completed"]),
        {str(outcome): int(count) for outcome, count in found["outcomes"].items()},
        Histogram.from_json(found["latency"]),
        Histogram.from_json(found["late"]),
        client_cpu_s=float(found["client_cpu_s"]),
        **optional,
    )
