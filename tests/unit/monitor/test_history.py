"""The ring of looks: bounded, in order, restored whole or refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from monitor.errors import StateError
from monitor.history import History


def filled(looks: int, capacity: int = 4, columns: int = 2) -> History:
    history = History(columns, capacity)
    for look in range(looks):
        values = [np.full(columns, float(10 * look + place)) for place in range(5)]
        history.add(100 * look, look, math.log(1e-3), np.array(values), np.arange(columns) == look % 2)
    return history


@pytest.mark.parametrize("looks", [0, 3, 4, 11])
def test_the_newest_looks_are_kept_in_order(looks: int) -> None:
    found = filled(looks).to_dict(["a", "b"], 100)
    newest = list(range(looks))[-4:]
    assert found["rows"] == newest
    assert found["time_ns"] == [100 * look for look in newest]
    assert found["level"] == pytest.approx([1e-3] * len(newest))
    assert found["columns"]["b"]["ks"] == [10.0 * look + 2 for look in newest]
    assert found["columns"]["a"]["in_alarm"] == [look % 2 == 0 for look in newest]


def test_what_is_undefined_is_none() -> None:
    history = History(1, 2)
    history.add(0, 0, 0.0, [np.array([value]) for value in (np.nan, np.inf, 0.25, 0.5, -np.inf)], np.array([False]))
    found = history.to_dict(["a"], 5)["columns"]["a"]
    assert [found[name] for name in ("psi", "psi_threshold", "ks", "log10_p")] == [[None], [None], [0.25], [None]]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("capacity", [2, 4, 9])
def test_a_restored_history_goes_on(capacity: int) -> None:
    again = History(2, capacity)
    again.restore(filled(7).state())
    again.add(700, 7, math.log(1e-3), [np.full(2, 70.0 + place) for place in range(5)], np.array([False, True]))
    assert again.to_dict(["a", "b"], 100) == filled(8, min(capacity, 5)).to_dict(["a", "b"], 100)


def test_a_history_of_other_columns_is_refused() -> None:
    for state in (filled(3, columns=3).state(), {}, {"facts": np.zeros((2, 2))}):
        with pytest.raises(StateError, match="history is of other columns"):
            filled(1).restore(state)
