"""What a look's tests are held against is made once for looks of equal size, and kept only where that is little."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from monitor.calibration import Calibration
from monitor.drift.base import Pair
from monitor.drift.judge import Judgement, judge
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.types import AlarmRules


def judged(columns: int) -> Judgement:
    """A look at the profile's own rows."""
    values = np.random.default_rng(columns).standard_normal((50, columns))
    layout = Layout(ReferenceProfile.from_arrays({"x": values}))
    return judge(Pair(layout, layout.reference, layout.reference), AlarmRules(), -9.5, Calibration.none(layout))


@pytest.mark.parametrize("columns", [3, 300])
def test_the_same_thresholds_again(columns: int) -> None:
    one, other = judged(columns), judged(columns)
    for first, second in [(one.ks_threshold, other.ks_threshold), (one.psi_threshold, other.psi_threshold)]:
        assert (first is second) == (columns == 3)
        assert np.array_equal(first.table, second.table)
        assert np.array_equal(first.critical, second.critical)


def test_those_of_many_columns_go_with_their_look() -> None:
    held = judged(300)
    tables = [weakref.ref(held.ks_threshold.table), weakref.ref(held.psi_threshold.table)]
    del held
    assert [table() for table in tables] == [None, None]
