"""What the admin address shows of monitors: documents for JSON and for the page. Made in milliseconds, off the loop."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from monitor.errors import MonitorError, SettingsError
from monitor.types import STABLE, Array, WindowReport
from server.errors import NotFound
from server.monitoring.service import MonitorService

if TYPE_CHECKING:
    from monitor.engine import Monitor


class MonitorViews:
    """The documents of one service. All raise NotFound for versions that are not monitored."""

    def __init__(self, service: MonitorService) -> None:
        self._service = service

    def all(self) -> dict[str, Any]:
        """What is watched."""
        return {"monitors": list(self._service.list())}

    def one(self, model: str, version: str) -> dict[str, Any]:
        """Everything known of one version, as ``server.pages.drift`` describes it.

        A version without a profile has an empty report. ``comparisons`` hold every other arm against stable.
        ``performance`` and ``estimate`` are absent where no labels
        are joined; they hold this version only, ``performance.join`` the whole model.
        """
        drift = self._drift(model, version)
        labels = self._labels(model, version)
        if drift is None and labels is None:
            raise NotFound(f"version '{version[:32]}' of model '{model[:128]}' is not monitored")
        empty = {"report": {"model": model, "version": version, "windows": []}}
        return {**(drift or empty), **(labels or {}), "alarms": list(self._service.alarms(model, version))}

    def sample(self, model: str, version: str) -> bytes:
        """The rows kept of one version, as an npz file. Raises NotFound when none are kept, too."""
        try:
            kept = self._service.monitor(model, version).sample()
        except SettingsError:
            raise NotFound(f"no rows of {model}:{version} are kept: set monitor.sample") from None
        return _npz(kept)

    def _drift(self, model: str, version: str) -> dict[str, Any] | None:
        try:
            monitor = self._service.monitor(model, version)
        except NotFound:
            return None
        report = self._service.report(model, version)
        shares = []
        for arm, window in dict.fromkeys([(found["arm"], found["window"]) for found in report["windows"]]):
            with suppress(MonitorError):  # the arm went meanwhile
                shares.append(monitor.distributions(arm, window))
        arms = list(report["counted"])
        compared = [_against_stable(monitor, arm) for arm in arms if arm != STABLE and STABLE in arms]
        comparisons = [window for windows in compared for window in windows]
        return {"report": report, "history": monitor.history(), "distributions": shares, "comparisons": comparisons}

    def _labels(self, model: str, version: str) -> dict[str, Any] | None:
        found = self._service.labels.report_of(model, version)
        if found is None:
            return None
        estimates = found.pop("estimates")
        return {"performance": found, "estimate": estimates}


def _against_stable(monitor: Monitor, arm: str) -> list[dict[str, Any]]:
    """Each window of an arm held against the same of stable, where both have rows: two samples, and no alarm."""
    found: tuple[WindowReport, ...] = ()
    with suppress(MonitorError):  # the arm went meanwhile
        found = monitor.compare(arm)
    windows = [replace(one, in_alarm=(), quality=()) for one in found if one.rows and one.scores[0].reference_rows]
    return [{**asdict(window), "against": STABLE} for window in windows]


def _npz(arrays: Mapping[str, Array]) -> bytes:
    """What ``numpy.savez`` writes; that takes names as keywords, and a column may be called ``file``."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return out.getvalue()
