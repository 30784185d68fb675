"""Which flights the loop trains on, replays and holds out, and how they are written for commands that read tables."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from server.demo.data import FLIGHT_CATEGORIES, FLIGHT_NUMBERS, Flights

MODEL: Final = "flights"
#: Which element of which input a column is, as ``--map`` and a gate policy want it.
PLACES: Final = (
    *(f"{name}=numbers[{place}]" for place, name in enumerate(FLIGHT_NUMBERS)),
    *(f"{name}=categories[{place}]" for place, name in enumerate(FLIGHT_CATEGORIES)),
)
LABEL: Final = "late"
#: The months that are replayed before the training; a part of them is held out for the gates.
REPLAYED: Final = (3, 4)
#: Of the year's flights every so many is neither replayed nor trained on.
_HELD_OUT: Final = 5


def shuffled(flights: Flights, seed: int) -> Flights:
    """The same flights in random order.

    In the order of departure a thousand of them are one day: its weekday, its weather. That is real drift against two
    months, and none that a model should be trained again for.
    """
    return flights.rows(np.random.default_rng(seed).permutation(len(flights.late)))


def held_out(flights: Flights) -> Flights:
    """Every fifth flight."""
    return flights.rows(np.arange(len(flights.late)) % _HELD_OUT == 0)


def kept(flights: Flights) -> Flights:
    """All but the held out ones."""
    return flights.rows(np.arange(len(flights.late)) % _HELD_OUT != 0)


def only_from(flights: Flights, origin: bytes) -> Flights:
    """The flights from one airport."""
    return flights.rows(flights.categories[:, 0] == origin)


def write_table(path: Path, flights: Flights, *, labels: bool = False) -> None:
    """One column per feature, and the label where it is asked for, as .npz."""
    columns = {name: flights.numbers[:, place] for place, name in enumerate(FLIGHT_NUMBERS)}
    columns |= {name: flights.categories[:, place].astype(str) for place, name in enumerate(FLIGHT_CATEGORIES)}
    if labels:
        columns[LABEL] = flights.late
    np.savez(path, **columns)  # type: ignore[arg-type]


def read_captured(path: Path) -> Flights:
    """The flights of a captured data set with labels (.npz), in the order of their requests; months are not known."""
    with np.load(path, allow_pickle=False) as table:
        numbers = [table[f"numbers[{place}]"].astype(np.float32) for place in range(len(FLIGHT_NUMBERS))]
        texts = [table[f"categories[{place}]"].astype("S") for place in range(len(FLIGHT_CATEGORIES))]
        late = table["__label"].astype(np.int64)
    return Flights(np.stack(numbers, axis=1), np.stack(texts, axis=1), late, np.zeros(len(late), np.int64))


def break_forest(onnx: bytes, seed: int = 0) -> bytes:
    """The same graph with the weights of its leaves shuffled: loads, answers within [0, 1], and is worth nothing."""
    import onnx as onnx_format

    model = onnx_format.load_model_from_string(onnx)
    stream = np.random.default_rng(seed)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "class_weights":
                mixed = stream.permutation(np.asarray(attribute.floats, np.float32))
                del attribute.floats[:]
                attribute.floats.extend(mixed.tolist())
    content: bytes = model.SerializeToString()
    return content
