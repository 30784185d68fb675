"""server.demo.loop.rows: who is replayed, who is held out, what a table holds, what is broken about the broken one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monitor.loaders import read_table
from server.demo import train
from server.demo.data import FLIGHT_CATEGORIES, FLIGHT_NUMBERS, Flights
from server.demo.loop import rows
from server.demo.workload import Reference


def flights(count: int) -> Flights:
    """Flights whose first number says which they are; those of over an hour's delay are late."""
    stream = np.random.default_rng(1)
    numbers = stream.random((count, len(FLIGHT_NUMBERS))).astype("f4")
    numbers[:, 0] = np.arange(count)
    origins = np.array([b"JFK", b"LGA"])[np.arange(count) % 2]
    categories = np.stack([origins, np.full(count, b"AA")], axis=1)
    return Flights(numbers, categories, (numbers[:, 0] > count / 2).astype("i8"), np.full(count, 3))


def test_nobody_is_both_replayed_and_held_out() -> None:
    every = flights(103)
    kept, held = rows.kept(every).numbers[:, 0], rows.held_out(every).numbers[:, 0]
    assert sorted([*kept, *held]) == list(range(103))
    assert len(held) == 21


def test_shuffling_keeps_flights_whole() -> None:
    every = flights(50)
    mixed = rows.shuffled(every, seed=1)
    order = mixed.numbers[:, 0].astype(int)
    assert order.tolist() != list(range(50))
    assert sorted(order.tolist()) == list(range(50))
    assert np.array_equal(mixed.late, every.late[order])
    assert np.array_equal(mixed.categories, every.categories[order])


def test_one_airport() -> None:
    assert set(rows.only_from(flights(10), b"JFK").categories[:, 0].tolist()) == {b"JFK"}


def test_a_table_has_a_column_for_every_place(tmp_path: Path) -> None:
    some = flights(7)
    rows.write_table(tmp_path / "t.npz", some, labels=True)
    table = read_table(tmp_path / "t.npz")
    assert [place.partition("=")[0] for place in rows.PLACES] == list(table)[:-1]
    assert list(table)[-1] == rows.LABEL
    assert np.array_equal(table["dep_delay"], some.numbers[:, 0])
    assert [place.partition("=")[2] for place in rows.PLACES][-2:] == ["categories[0]", "categories[1]"]
    assert list(FLIGHT_CATEGORIES) == ["origin", "carrier"]


def test_captured_flights_are_read_as_they_were_sent(tmp_path: Path) -> None:
    some = flights(9)
    columns = {f"numbers[{place}]": some.numbers[:, place] for place in range(len(FLIGHT_NUMBERS))}
    columns |= {f"categories[{place}]": some.categories[:, place].astype(str) for place in range(2)}
    np.savez(tmp_path / "c.npz", __id=np.arange(9).astype(str), __label=some.late.astype(float), **columns)
    read = rows.read_captured(tmp_path / "c.npz")
    assert np.array_equal(read.numbers, some.numbers)
    assert read.numbers.dtype == np.float32
    assert np.array_equal(read.categories, some.categories)
    assert np.array_equal(read.late, some.late)


def test_a_broken_forest_answers_and_knows_nothing() -> None:
    some = flights(2000)
    good = train.train_flights(some, trees=20, depth=5)
    inputs = {"numbers": some.numbers, "categories": some.categories}
    right, wrong = (Reference(onnx).run(inputs)["probabilities"][:, 1] for onnx in (good, rows.break_forest(good)))
    assert np.all((wrong >= 0) & (wrong <= 1.0001))
    losses = [float(np.mean((answer - some.late) ** 2)) for answer in (right, wrong)]
    assert losses[0] < 0.05
    assert losses[1] > 3 * losses[0]
