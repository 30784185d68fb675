"""router.shadow: bounds of the lane, each with its reason, and what leaves first."""

from __future__ import annotations

from typing import Any

import pytest

from router.shadow import ShadowBudget, ShadowLane

S = 1_000_000_000


def lane(**budget: Any) -> ShadowLane[int]:
    return ShadowLane(ShadowBudget(**({"rps": 0.0} | budget)))


def test_copies_leave_in_order() -> None:
    copies = lane()
    assert [copies.offer(n, 10, 0.0, 0) for n in range(3)] == ["", "", ""]
    assert copies.waiting_bytes == 30
    assert [copies.take(0.0, 1) for _ in range(4)] == [0, 1, 2, None]
    assert (copies.sent, copies.in_flight, copies.waiting_bytes, copies.dropped) == (3, 3, 0, {})


def test_the_oldest_makes_room() -> None:
    copies = lane(queue=2)
    for n in range(5):
        assert copies.offer(n, 1, 0.0, 0) == ""
    assert copies.dropped == {"queue": 3}
    assert [copies.take(0.0, 0), copies.take(0.0, 0)] == [3, 4]


def test_bytes_are_bounded_too() -> None:
    copies = lane(max_queue_bytes=100, max_body_bytes=90)
    for n in range(3):
        copies.offer(n, 40, 0.0, 0)
    assert (len(copies), copies.waiting_bytes, copies.dropped) == (2, 80, {"queue": 1})
    copies.offer(3, 90, 0.0, 0)
    assert (len(copies), copies.waiting_bytes) == (1, 90)


def test_a_large_body_is_refused() -> None:
    copies = lane(max_body_bytes=100)
    assert copies.offer(0, 100, 0.0, 0) == ""
    assert copies.offer(1, 101, 0.0, 0) == "body"
    assert copies.dropped == {"body": 1}


def test_it_yields_while_the_primary_is_loaded() -> None:
    copies = lane(yield_above_load=0.7)
    assert copies.offer(0, 1, 0.7, 0) == ""
    assert copies.offer(1, 1, 0.71, 0) == "load"
    assert copies.take(0.71, 0) is None
    assert copies.take(0.7, 0) == 0


def test_few_are_in_flight() -> None:
    copies = lane(in_flight=2)
    for n in range(4):
        copies.offer(n, 1, 0.0, 0)
    assert [copies.take(0.0, 0) for _ in range(3)] == [0, 1, None]
    copies.done()
    assert copies.take(0.0, 0) == 2


def test_what_waited_too_long_is_dropped() -> None:
    copies = lane(timeout_ns=S)
    copies.offer(0, 1, 0.0, 0)
    copies.offer(1, 1, 0.0, S // 2)
    assert copies.take(0.0, S + 1) == 1
    assert copies.dropped == {"timeout": 1}


@pytest.mark.parametrize("rps", [0.5, 3.0, 50.0, 1_000.0])
def test_the_rate_holds_over_any_second(rps: float) -> None:
    copies = lane(rps=rps, queue=1_000_000, timeout_ns=1_000 * S)
    taken = [now for now in range(0, 20 * S, S // 4_000) if copies.offer(0, 1, 0.0, now) == ""]
    assert len(taken) == pytest.approx(20 * rps, abs=rps / 10 + 1)
    for start in range(0, 19 * S, S // 2):
        assert sum(start <= now < start + S for now in taken) <= rps * 1.1 + 1
    assert copies.dropped["rps"] == 80_000 - len(taken)


def test_refused_copies_do_not_use_up_the_rate() -> None:
    copies = lane(rps=1.0)
    assert copies.offer(0, 1, 0.9, 0) == "load"
    assert copies.offer(0, 1, 0.0, 0) == ""
    assert copies.offer(0, 1, 0.0, 0) == "rps"


def test_the_shells_own_drops_and_clearing() -> None:
    copies = lane()
    copies.drop("primary_failed")
    copies.offer(0, 5, 0.0, 0)
    copies.offer(1, 5, 0.0, 0)
    copies.clear("no_model")
    assert copies.dropped == {"primary_failed": 1, "no_model": 2}
    assert (len(copies), copies.waiting_bytes, copies.take(0.0, 0)) == (0, 0, None)


@pytest.mark.parametrize(
    "bad", [{"queue": 0}, {"in_flight": 0}, {"rps": -1.0}, {"rps": float("nan")}, {"timeout_ns": 0}]
)
def test_budgets_that_make_no_sense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive bounds"):
        ShadowBudget(**bad)


def test_an_idle_lane_saves_up_no_more_than_a_tenth_of_a_second() -> None:
    copies = lane(rps=100.0)
    copies.offer(0, 1, 0.0, 0)
    taken = sum(copies.offer(0, 1, 0.0, 100 * S) == "" for _ in range(1_000))
    assert taken == 10
