"""How many rows are worth gathering: measured once per model file and setting, then remembered across restarts.

On a CPU some models cost more per row in a batch than alone (rows that filled the caches no longer do), so the
maximum is what the measurement says and not what the signature allows.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

#: A size counts as no dearer per row up to this factor: under it lies the noise of the clock and the neighbours.
SLACK: Final = 1.05
#: Once a size costs this much more per row than the best so far, larger ones are not tried.
_HOPELESS: Final = 2.0
_MIN_ROUNDS, _MAX_ROUNDS = 3, 9
_FORMAT: Final = 1

Timer = Callable[[], int]


@dataclass(slots=True, frozen=True)
class Learned:
    """What is remembered of one model: rows to gather, why fewer than allowed, and ns per row at each size tried."""

    rows: int
    refusal: str = ""
    per_row_ns: Mapping[int, int] | None = None


def measure(run: Callable[[int], None], limit: int, budget_ns: int, timer: Timer) -> dict[int, int]:
    """Nanoseconds per row at sizes 1, 2, 4, ... up to ``limit`` or to the largest that the budget can compare fairly.

    ``run(rows)`` runs one batch. Sizes take turns, each for as many runs as make up the same number of rows, and the
    best turn counts: a busy neighbour then costs all sizes alike, whereas one long run would meet it more surely.
    """
    end = timer() + budget_ns
    costs = _ladder(run, limit, budget_ns, timer)
    top = max(costs)
    best = {rows: cost // rows for rows, cost in costs.items()}
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and timer() > end:
            break
        for rows in costs:
            runs = -(-top // rows)
            start = timer()
            for _ in range(runs):
                run(rows)
            best[rows] = min(best[rows], (timer() - start) // (runs * rows))
    return best


def _ladder(run: Callable[[int], None], limit: int, budget_ns: int, timer: Timer) -> dict[int, int]:
    """Sizes worth comparing, with the time of one warm run each; at least size 1."""
    costs: dict[int, int] = {}
    for rows in _sizes(limit):
        if costs and _MIN_ROUNDS * _round_cost({**costs, rows: 2 * max(costs.values())}) > budget_ns:
            break
        run(rows)
        start = timer()
        run(rows)
        costs[rows] = max(1, timer() - start)
        if costs[rows] / rows > _HOPELESS * min(cost / size for size, cost in costs.items()):
            break
    return costs


def _round_cost(costs: Mapping[int, int]) -> int:
    """Time of one turn of every size, each long enough for the rows of the largest."""
    top = max(costs)
    return sum(-(-top // rows) * cost for rows, cost in costs.items())


def choose(per_row_ns: Mapping[int, int]) -> int:
    """The largest size at which a row is no dearer than at any smaller one; 1 when nothing was measured."""
    chosen, best = 1, None
    for rows, cost in sorted(per_row_ns.items()):
        if best is None or cost <= best * SLACK:
            chosen = rows
        best = cost if best is None else min(best, cost)
    return chosen


def median_run_ns(run: Callable[[], None], timer: Timer, runs: int = 9, budget_ns: int = 50_000_000) -> int:
    """Median time of a warm run, in ns, from at most ``runs`` runs."""
    end = timer() + budget_ns
    times: list[int] = []
    while len(times) < runs and (not times or timer() < end):
        start = timer()
        run()
        times.append(timer() - start)
    return int(statistics.median(times))


def _sizes(limit: int) -> list[int]:
    powers = [1 << exponent for exponent in range(limit.bit_length())]
    return powers if powers[-1] == limit else [*powers, limit]


class LearnedStore:
    """One small JSON file per model digest and setting, replaced whole. An unusable file is as good as none."""

    def __init__(self, state_dir: Path | None) -> None:
        self._folder = None if state_dir is None else state_dir / "learned"

    def get(self, digest: str, setting: Mapping[str, object]) -> Learned | None:
        path = self._path(digest, setting)
        if path is None:
            return None
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != _FORMAT or content["digest"] != digest or content["setting"] != _plain(setting):
                return None
            return _checked(content["learned"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, digest: str, setting: Mapping[str, object], learned: Learned) -> None:
        """Remember; a full or read-only disk costs only a measurement at the next start."""
        path = self._path(digest, setting)
        if path is None:
            return
        content = {"format": _FORMAT, "digest": digest, "setting": _plain(setting), "learned": asdict(learned)}
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, json.dumps(content, indent=1, sort_keys=True).encode())

    def _path(self, digest: str, setting: Mapping[str, object]) -> Path | None:
        if self._folder is None:
            return None
        key = hashlib.sha256(json.dumps(_plain(setting), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:40]}-{key[:16]}.json"


def _plain(setting: Mapping[str, object]) -> object:
    """As it comes back from JSON, so that stored and asked compare equal."""
    return json.loads(json.dumps(setting, sort_keys=True))


def _checked(raw: Mapping[str, object]) -> Learned:
    rows, refusal, measured = raw["rows"], raw["refusal"], raw["per_row_ns"]
    if not isinstance(rows, int) or rows < 1 or not isinstance(refusal, str):
        raise ValueError("not what put wrote")
    per_row = {int(size): int(cost) for size, cost in measured.items()} if isinstance(measured, dict) else None
    return Learned(rows, refusal, per_row)


def _replace(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".learned-", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(file.name)
            raise
