"""Saved states: counts come back as they were, from files of builds before too, and damage is told of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from monitor import sealed
from monitor.errors import StateError
from monitor.panes import ArmState, SeriesState
from monitor.state import MonitorState

KIND = "monitor state"


def state(counts: np.ndarray) -> MonitorState:
    panes = len(counts)
    rows = counts.sum(axis=1).astype("i8")
    facts = np.arange(panes), rows, np.zeros(panes, "i8"), np.arange(panes), np.arange(panes) + 1
    series = SeriesState("rows", 500, panes, *facts, counts)
    total = counts.sum(axis=0, dtype="i8")
    return MonitorState("m", "1", "0" * 64, {"stable": ArmState(int(rows.sum()), 2, 3, total, [series])})


def rare(panes: int, cells: int, most: int) -> np.ndarray:
    """Counts of few rows, some of them large."""
    rng = np.random.default_rng(panes + cells)
    counts = rng.poisson(0.4, (panes, cells)).astype("i4")
    counts.ravel()[rng.integers(0, counts.size, counts.size // 40)] = most
    return counts


def same(found: MonitorState, wanted: MonitorState) -> None:
    one, other = found.arms["stable"], wanted.arms["stable"]
    assert (one.rows, one.dropped, one.refused) == (other.rows, other.dropped, other.refused)
    assert one.total.dtype == other.total.dtype
    assert (one.total == other.total).all()
    assert one.series[0].counts.dtype in ("i4", other.series[0].counts.dtype)
    assert one.series[0].counts.shape == other.series[0].counts.shape
    assert (one.series[0].counts == other.series[0].counts).all()


@pytest.mark.parametrize(
    "counts",
    [
        *[rare(20, cells, most) for cells in (2050, 2051) for most in (14, 15, 16, 255, 256, 500, 2**31 - 1)],
        np.full((3, 4), 200, "i4"),
        np.full((3, 4), 70_000, "i4"),
        rare(20, 2051, 500).astype("i8"),
        np.where(rare(20, 2051, 500) == 500, 2**32 + 1, 0),
        np.where(rare(20, 2051, 500) == 500, 2**31, 1),
        np.zeros((2, 1), "i4"),
        np.empty((0, 7), "i4"),
    ],
    ids=lambda counts: f"{counts.shape}-{counts.max(initial=0)}",
)
def test_counts_come_back_as_they_were(counts: np.ndarray) -> None:
    wanted = state(counts)
    data = wanted.to_bytes()
    same(MonitorState.from_bytes(data), wanted)
    assert MonitorState.from_bytes(data).to_bytes() == data


def test_counts_of_few_rows_take_half_a_byte() -> None:
    wanted = state(rare(20, 60_000, 500))
    assert len(wanted.to_bytes()) < 20 * 60_000 * 0.75  # of which 0.2 for the large ones, and the total


def arrays_of(wanted: MonitorState) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    header, arrays, _ = sealed.unpack(wanted.to_bytes(), KIND, StateError, "state")
    return header, dict(arrays)


@pytest.mark.parametrize("dtype", ["u1", "i4"])
def test_states_of_the_build_before_are_read(dtype: str) -> None:
    wanted = state(rare(5, 301, 200))
    header, arrays = arrays_of(wanted)
    del arrays["stable/0/few"], arrays["stable/0/many"]
    arrays["stable/0/counts"] = wanted.arms["stable"].series[0].counts.astype(dtype)
    arrays["stable/total"] = wanted.arms["stable"].total
    same(MonitorState.from_bytes(sealed.pack(KIND, header | {"schema": 2}, arrays)), wanted)


def test_a_schema_that_is_to_come_is_refused() -> None:
    header, arrays = arrays_of(state(rare(5, 301, 200)))
    with pytest.raises(StateError, match="schema 4 is not known, wanted 3"):
        MonitorState.from_bytes(sealed.pack(KIND, header | {"schema": 4}, arrays))


def test_a_header_that_is_no_text_is_told_of() -> None:
    data = state(rare(5, 301, 200)).to_bytes()
    end = 12 + int.from_bytes(data[8:12], "little")
    content, sizes = json.loads(data[12:end])
    head = json.dumps([content.replace('"m"', '"\ud800"'), sizes]).encode()
    with pytest.raises(StateError, match="the file is damaged"):
        MonitorState.from_bytes(data[:8] + len(head).to_bytes(4, "little") + head + data[end:])


def few(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({"stable/0/few": change(arrays["stable/0/few"])})


def many(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({"stable/0/many": change(arrays["stable/0/many"].copy())})


def beyond(place: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(found: np.ndarray) -> np.ndarray:
        found[0, 0] = place
        return found

    return change


@pytest.mark.parametrize(
    "damage",
    [
        few(lambda found: found[:, :-1]),
        few(lambda found: found[:-1]),
        few(np.ravel),
        few(lambda found: found.astype("f4")),
        many(lambda found: found[:1]),
        many(lambda found: found[:, :-1].ravel()),
        many(lambda found: found.astype("f4")),
        many(beyond(-1)),
        many(beyond(5 * 301)),
        lambda arrays: arrays.pop("stable/0/few"),
        lambda arrays: arrays.pop("stable/0/many"),
        lambda arrays: arrays.pop("stable/total"),
    ],
)
def test_damaged_counts_are_told_of(damage: Callable[[dict[str, np.ndarray]], object]) -> None:
    header, arrays = arrays_of(state(rare(5, 301, 200)))
    damage(arrays)
    with pytest.raises(StateError, match="the state is damaged"):
        MonitorState.from_bytes(sealed.pack(KIND, header, arrays))
