"""The training that the server asks for: a local command with the event on its standard input.

    python -m server.demo.loop.training FOLDER

It exports what was captured since the champion was made, as far as labels have come, trains on it, writes the
version's profile, and publishes it as @challenger with the trigger's id in its lineage. The gateway does the rest.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.demo.data import Flights
from server.demo.loop.commands import Tidegate
from server.demo.loop.rows import MODEL, PLACES, read_captured, write_table
from server.demo.loop.settings import Places
from server.demo.train import train_flights

#: A sink may be told of more than trainings, such as alarms.
_ASKED: Final = "io.tidegate.retrain.requested.v1"


@dataclass(frozen=True, slots=True)
class Trained:
    """A model file and its profile."""

    model: Path
    profile: Path
    rows: int


async def train(flights: Flights, name: str, folder: Path, tidegate: Tidegate) -> Trained:
    """Train on ``flights`` and describe them as the profile of the version: ``name.onnx`` and ``name.tgp``."""
    model, profile, table = (folder / f"{name}.{suffix}" for suffix in ("onnx", "tgp", "npz"))
    content = await asyncio.to_thread(train_flights, flights)
    model.write_bytes(content)
    await asyncio.to_thread(write_table, table, flights)
    places = [word for place in PLACES for word in ("--map", place)]
    await tidegate.run("monitor", "profile", str(table), "--model", str(model), *places, "--run", "-o", str(profile))
    return Trained(model, profile, len(flights.late))


def described(trained: Trained, source: str, trigger_id: str = "") -> dict[str, Any]:
    """What the publisher says of the version."""
    return {
        "params": {"trees": 40, "depth": 10},
        "lineage": {"data": {"uri": source, "rows": trained.rows}, "trigger_id": trigger_id},
        "publisher": "tidegate demo",
    }


async def retrain(event: dict[str, Any], places: Places) -> int:
    """Train and publish what the event asks for; the version's number. Raises CommandFailed."""
    asked = event["data"]
    tidegate = Tidegate(places.state)
    captured, since = places.root / "captured.npz", str(asked["capture"]["start"])
    await tidegate.here("data", "export", "--model", MODEL, "--labelled", "--from", since, "-o", str(captured))
    flights = await asyncio.to_thread(read_captured, captured)
    trained = await train(flights, "retrained", places.root, tidegate)
    about = described(trained, f"captured since {since}", str(asked["trigger_id"]))
    return await tidegate.publish(MODEL, trained.model, trained.profile, "challenger", about)


def main() -> None:
    """Exit code 0 when a version was published, or when the event asks for none."""
    event = json.load(sys.stdin)
    if event["type"] != _ASKED:
        return
    version = asyncio.run(retrain(event, Places(Path(sys.argv[1]))))
    print(f"{MODEL}:{version} published for {event['data']['trigger_id']}")


if __name__ == "__main__":
    main()
