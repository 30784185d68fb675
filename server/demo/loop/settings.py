"""The loop's configuration file: what is watched, when to train again, what a candidate must show, how it climbs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.demo.data import FLIGHT_NUMBERS
from server.demo.loop.rows import LABEL, MODEL, PLACES
from server.demo.process import environment

#: So many labels in a window; the first ones, of March, say what is normal.
LABEL_WINDOW: Final = 5000
LEARN_ROWS: Final = 10_000
#: Shares of the traffic, in percent; the last step is the promotion.
STEPS: Final = (10, 50, 100)
ROLLOUT: Final = "flights"
FORCED: Final = "forced"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the loop keeps its things, all absolute. ``state`` is the server's own folder."""

    root: Path

    @property
    def state(self) -> Path:
        return self.root / "server"

    @property
    def config(self) -> Path:
        return self.root / "tidegate.yaml"

    @property
    def policy(self) -> Path:
        return self.root / "gate.yaml"

    @property
    def holdout(self) -> Path:
        return self.root / "holdout.npz"

    @property
    def log(self) -> Path:
        return self.root / "server.log"

    @property
    def report(self) -> Path:
        return self.root / "drift-report.html"

    @property
    def card(self) -> Path:
        return self.root / "model-card.html"


def config_text(places: Places) -> str:
    """The configuration as YAML."""
    return _yaml(_document(places))


def policy_text(places: Places) -> str:
    """The gate policy by itself, as a pipeline has it."""
    return _yaml(_policy(places))


def forced_text(places: Places) -> str:
    """The same with everything taken out that keeps a bad candidate from the traffic, and a rollout of its own."""
    document = _document(places)
    del document["gates"]
    model = document["models"][MODEL]
    rollout = model["rollout"]
    del model["gate"], rollout["shadow"], rollout["gates"]["diverge"]
    rollout |= {"id": FORCED, "keep_warm": "1m"}
    for step in rollout["steps"][:-1]:
        step["min"] = "5s"  # what its drift gate needs to fill a window
    return _yaml(document)


def _yaml(document: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(document, sort_keys=False, width=120)
    return text


def _document(places: Places) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate/v1",
        "registry": {"embedded": True, "poll_interval": "200ms"},
        "defaults": {"gates": {"evaluate_every": "200ms"}},
        "alerts": {"sinks": {"train": {"command": _training(places)}}},
        # All requests, for the training; strings are left out unless a column says otherwise.
        "capture": {"sample": "100%", "segment": {"age": "1s"}, "models": {MODEL: {"columns": {"categories": "keep"}}}},
        "gates": {MODEL: _policy(places)},
        "models": {
            MODEL: {
                "monitor": _monitor(),
                "gate": MODEL,
                "retrain": _retrain(),
                "rollout": _rollout(),
            },
        },
    }


def _training(places: Places) -> dict[str, Any]:
    """The local command that trains; it gets the event on its standard input, and nothing of the server's own."""
    ours = {name: value for name, value in environment().items() if name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    argv = [sys.executable, "-m", "server.demo.loop.training", str(places.root)]
    return {"argv": argv, "environment": ours, "timeout": "2m"}


def _monitor() -> dict[str, Any]:
    return {
        # A month has other weekdays and other weather than the two before: that much is not worth an alarm.
        "windows": [1000],
        "min_effect": {"psi": 0.1, "ks": 0.15},
        "labels": {
            "task": "binary",
            "output": "probabilities",
            "index": 1,
            "windows": [LABEL_WINDOW],
            "learn_rows": LEARN_ROWS,
            "expected_run": "10M",
        },
    }


def _retrain() -> dict[str, Any]:
    """By what labels say. Drift alone is no reason: the same inputs may mean the same as ever."""
    return {
        "on": {"labels": {}, "calibration": {}},
        "sinks": ["train"],
        "coalesce": "3s",
        "budget": "1 per day",
    }


def _policy(places: Places) -> dict[str, Any]:
    return {
        "holdout": {"path": str(places.holdout), "label": LABEL, "map": list(PLACES)},
        "output": "probabilities",
        "quality": {"compare": "non_inferior", "margin": "0.1%"},
        "slices": [{"column": "origin", "max_worse": "5%"}],
        "robustness": {"noise": "1%", "columns": [FLIGHT_NUMBERS[0], "distance"], "max_flips": "2%"},
        "rules": {"bounds": [{"low": 0, "high": 1}]},
    }


def _rollout() -> dict[str, Any]:
    """A service without errors shows nothing by comparing errors: what is certified is a rate under the ceiling."""
    climbing = [{"weight": f"{share}%", "min": "1s", "certify": {"ceiling": "5%"}} for share in STEPS[:-1]]
    return {
        "id": ROLLOUT,
        "candidate": "@challenger",
        "start": {"warm": [1, 8]},
        "shadow": {"sample": "100%", "pairs": 500, "rps": 1000},
        # How long a promotion can be taken back without loading anything; the next challenger waits for it.
        "keep_warm": "2s",
        "steps": [*climbing, {"weight": f"{STEPS[-1]}%"}],
        "gates": {
            "errors": {"event": "error", "worse_than": 1.5},
            "ceiling": {"event": "error", "max_rate": "10%"},
            "diverge": {"paired": "argmax_disagree", "max_rate": "20%"},
            # Of the version's own profile, which says what its answers looked like when it was trained.
            "drift": {"monitor": "psi", "over": 0.5, "for": 3},
        },
    }
