"""router.rollout.first_events: once per key and step, with the chance that each event had."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from router.errors import BadRolloutState
from router.rollout.evidence import TwoArms
from router.rollout.first_events import FirstEvents, Placing


def test_a_key_counts_once_in_a_step() -> None:
    events, placing = FirstEvents(), Placing(1, 0.1)
    for _ in range(5):
        events.add(1, True, placing)
        events.add(2, False, placing)
    assert events.take() == (TwoArms(0, 1, 0, 1, 0.1),)
    assert events.take() == ()


def test_a_key_of_stable_counts_again_with_its_chance_to_have_moved() -> None:
    events = FirstEvents()
    events.add(1, True, Placing(1, 0.1))
    events.add(2, False, Placing(1, 0.1))
    events.take()
    events.add(1, True, Placing(2, 0.4))
    events.add(2, True, Placing(2, 0.4))
    events.add(3, False, Placing(2, 0.4))
    again, new = events.take()
    assert (again.share, again.candidate_events, again.stable_events) == (pytest.approx(1 / 3), 1, 0)
    assert (new.share, new.candidate_events, new.stable_events) == (0.4, 0, 1)


def test_a_share_that_does_not_grow_opens_no_place() -> None:
    events = FirstEvents()
    events.add(1, False, Placing(1, 0.4))
    events.take()
    events.add(1, False, Placing(2, 0.4))
    assert events.take() == ()


def test_what_is_heard_late_counts_with_the_chance_of_its_own_step() -> None:
    """And is no news of a key that has counted in a later one."""
    events = FirstEvents()
    events.add(1, False, Placing(2, 0.4))
    events.add(2, False, Placing(1, 0.1))
    events.add(1, False, Placing(1, 0.1))
    assert events.take() == (TwoArms(0, 0, 0, 1, 0.4), TwoArms(0, 0, 0, 1, 0.1))


def test_chances_are_those_with_which_keys_fall() -> None:
    """Sick keys of equal arms over three steps: of the events at each chance, that part is the candidate's."""
    rng = np.random.default_rng(3)
    ours: Counter[float] = Counter()
    every: Counter[float] = Counter()
    for _ in range(200):
        events, positions = FirstEvents(), rng.random(100)
        for step, share in enumerate((0.1, 0.25, 0.5)):
            for key in np.flatnonzero(rng.random(100) < 0.6):
                events.add(int(key), bool(positions[key] < share), Placing(step, share))
            for row in events.take():
                assert row.share is not None
                ours[row.share] += row.candidate_events
                every[row.share] += row.candidate_events + row.stable_events
    assert len(every) == 6
    for share, count in every.items():
        assert abs(ours[share] - share * count) < 4 * (count * share * (1 - share)) ** 0.5


def test_memory_is_bounded_and_what_found_no_place_is_counted() -> None:
    events = FirstEvents(max_keys=10)
    for key in range(25):
        events.add(key, key % 2 == 0, Placing(1, 0.5))
    assert events.take() == (TwoArms(0, 5, 0, 5, 0.5),)
    assert events.unplaced == 15
    events.add(1, False, Placing(2, 0.75))
    assert events.take() == (TwoArms(0, 0, 0, 1, 0.5),)


def test_what_is_stored_goes_on_alike() -> None:
    events, again = FirstEvents(), FirstEvents()
    events.add(2**64 - 1, False, Placing(1, 0.1))
    events.take()
    again.restore(json.loads(json.dumps(events.to_dict())))
    for one in (events, again):
        one.add(2**64 - 1, False, Placing(1, 0.1))
        one.add(2**64 - 1, True, Placing(2, 0.5))
    assert again.take() == events.take() != ()
    assert again.to_dict() == events.to_dict()


@pytest.mark.parametrize("damage", [{}, {"seen": [[1]], "unplaced": 0}])
def test_a_damaged_state_is_named_so(damage: dict[str, Any]) -> None:
    with pytest.raises(BadRolloutState):
        FirstEvents().restore(damage)
