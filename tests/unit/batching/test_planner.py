"""The planner's rules, one small example each; ``tests/property/test_planner.py`` covers their interleavings."""

from __future__ import annotations

from typing import Any

import pytest

from server.batching.planner import Expire, Limits, Member, Planner, Reason, Run, WakeAt, limits_for
from server.runtime.base import BatchingOptions, QueuePolicy
from server.types import ModelSpec

US = 1000


#: What the tests call their members.
NAMES: dict[Member, str] = {}


def item(
    name: str,
    rows: int = 1,
    plan: str = "",
    priority: int = 0,
    timeout_us: int = 0,
    deadline_ns: int = 0,
    enqueued_ns: int = 1,
) -> Member:
    member = Member(rows, priority, timeout_us, deadline_ns, enqueued_ns, plan)
    NAMES[member] = name
    return member


def queue(planner: Planner[Member], *items: Member) -> None:
    for one in items:
        assert planner.add(one) is None


def names(actions: list[Any]) -> list[str]:
    """The runs of a tick, each as the joined names of its members."""
    return ["".join(NAMES[member] for member in action.members) for action in actions if isinstance(action, Run)]


def expiries(actions: list[Any]) -> list[tuple[str, Reason]]:
    return [(NAMES[action.member], action.reason) for action in actions if isinstance(action, Expire)]


def wakes(actions: list[Any]) -> list[int]:
    return [action.at_ns for action in actions if isinstance(action, WakeAt)]


def drain(planner: Planner[Member], now: int) -> list[str]:
    """Run one batch after the other in slot 0."""
    order: list[str] = []
    while ran := names(planner.tick(now)):
        order += ran
        planner.finish(0)
    return order


def test_everything_that_waits_goes_in_at_once() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=8))
    queue(planner, *[item(name) for name in "abc"])
    assert names(planner.tick(1)) == ["abc"]
    queue(planner, *[item(name) for name in "defgh"])
    assert planner.tick(1) == []
    assert (planner.waiting(), planner.in_flight()) == (5, 3)
    planner.finish(0)
    assert names(planner.tick(1)) == ["defgh"]


def test_full_batches_are_handed_out_ahead() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=2))
    planner.ahead = 1
    queue(planner, *[item(name) for name in "abcdefg"])
    assert names(planner.tick(1)) == ["ab", "cd"]
    assert not planner.wants_tick()
    assert (planner.waiting(), planner.in_flight(), planner.running()) == (3, 4, 2)
    planner.finish(0)
    assert names(planner.tick(1)) == ["ef"]
    planner.finish(1)
    assert planner.tick(1) == [], "one row is no full batch"
    planner.finish(0)
    assert names(planner.tick(1)) == ["g"]


def test_parts_of_a_failed_batch_come_before_what_is_not_handed_out() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=2))
    planner.ahead = 1
    queue(planner, *[item(name) for name in "abcdef"])
    assert names(planner.tick(1)) == ["ab", "cd"]
    assert planner.fail(0) == []
    assert planner.tick(1) == [], "the engine has a batch"
    planner.finish(1)
    assert names(planner.tick(1)) == ["a"]


def test_a_batch_stays_within_max_rows_and_in_order() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=4))
    queue(planner, item("a", 2), item("b", 3), item("c", 1), item("d", 1))
    assert drain(planner, 1) == ["a", "bc", "d"]


def test_a_member_over_max_rows_runs_alone() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=4))
    queue(planner, item("a"), item("b", 9), item("c"))
    assert drain(planner, 1) == ["a", "b", "c"]


def test_several_slots_share_the_work() -> None:
    planner: Planner[Member] = Planner(Limits(slots=2, max_rows=2))
    queue(planner, *[item(name) for name in "abcde"])
    assert names(planner.tick(1)) == ["ab", "cd"]


def test_row_plans_never_mix_and_the_oldest_goes_first() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=2))
    queue(
        planner, item("a", plan="x"), item("b", plan="y"), item("c", plan="x"), item("d", plan="x"), item("e", plan="y")
    )
    assert drain(planner, 1) == ["ac", "be", "d"]


def test_a_model_that_does_not_combine_runs_members_one_by_one() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=1, max_delay_ns=1000 * US))
    queue(planner, item("a", 0), item("b", 0), item("c", 0))
    assert drain(planner, 1) == ["a", "b", "c"]


def test_urgent_members_overtake() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=2, priority_levels=3, default_level=2))
    queue(
        planner, item("a", priority=3), item("b"), item("c", priority=1), item("d", priority=7), item("e", priority=-1)
    )
    assert drain(planner, 1) == ["cb", "de", "a"]


def test_the_most_urgent_member_chooses_the_plan() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=4, priority_levels=2, default_level=2))
    queue(planner, item("a", plan="x"), item("b", plan="y"), item("c", plan="y", priority=1))
    assert drain(planner, 1) == ["cb", "a"]


def test_a_rejected_timeout_expires_and_never_runs() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=4, default_policy=QueuePolicy(default_timeout_us=50)))
    queue(planner, item("a", 4))
    assert names(planner.tick(1)) == ["a"]
    queue(planner, item("b"))
    assert wakes(planner.tick(1)) == [1 + 50 * US]
    assert expiries(planner.wake(1 + 50 * US)) == [("b", Reason.TIMEOUT)]
    planner.finish(0)
    assert planner.tick(1 + 50 * US) == []
    assert planner.idle()


def test_a_delayed_timeout_goes_behind_its_level_but_before_the_next() -> None:
    policy = QueuePolicy(timeout_action="DELAY", default_timeout_us=50)
    limits = Limits(max_rows=1, priority_levels=2, default_level=2, policies={1: policy})
    planner: Planner[Member] = Planner(limits)
    queue(planner, item("late", priority=1), item("low"))
    now = 1 + 60 * US
    queue(planner, item("fresh", priority=1, enqueued_ns=now))
    assert drain(planner, now) == ["fresh", "late", "low"]


@pytest.mark.parametrize(
    ("policy", "own_us", "expected_us"),
    [
        (QueuePolicy(default_timeout_us=100, allow_timeout_override=True), 40, 40),
        (QueuePolicy(default_timeout_us=100, allow_timeout_override=True), 400, 100),
        (QueuePolicy(default_timeout_us=100, allow_timeout_override=True), 0, 100),
        (QueuePolicy(default_timeout_us=100), 40, 100),
        (QueuePolicy(allow_timeout_override=True), 40, 40),
        (QueuePolicy(allow_timeout_override=True), -3, None),
        (QueuePolicy(), 40, None),
    ],
)
def test_a_request_may_shorten_its_timeout_only(policy: QueuePolicy, own_us: int, expected_us: int | None) -> None:
    planner: Planner[Member] = Planner(Limits(default_policy=policy))
    queue(planner, item("blocker"))
    planner.tick(1)
    planner.finish(0)
    queue(planner, item("blocker"))
    planner.tick(1)
    queue(planner, item("a", timeout_us=own_us, enqueued_ns=7))
    actions = planner.wake(7)
    assert wakes(actions) == ([] if expected_us is None else [7 + expected_us * US])


def test_a_deadline_in_the_past_never_runs_even_when_a_slot_is_free() -> None:
    planner: Planner[Member] = Planner(Limits())
    queue(planner, item("a", deadline_ns=5))
    actions = planner.tick(5)
    assert names(actions) == []
    assert expiries(actions) == [("a", Reason.DEADLINE)]


def test_one_wake_for_many_deadlines() -> None:
    planner: Planner[Member] = Planner(Limits())
    queue(planner, item("busy"))
    planner.tick(1)
    queue(planner, *[item(str(n), deadline_ns=100 + n) for n in range(9)])
    assert wakes(planner.tick(1)) == [100]
    queue(planner, item("later", deadline_ns=500))
    assert planner.tick(1) == []
    queue(planner, item("sooner", deadline_ns=50))
    assert planner.wants_tick()
    assert wakes(planner.tick(1)) == [50]
    assert expiries(planner.wake(102)) == [(name, Reason.DEADLINE) for name in ("sooner", "0", "1", "2")]


def test_an_early_wake_is_repeated() -> None:
    planner: Planner[Member] = Planner(Limits())
    queue(planner, item("busy"), item("a", deadline_ns=100))
    assert wakes(planner.tick(1)) == [100]
    assert planner.wake(99) == [WakeAt(100)]


def test_the_queue_delay_waits_for_more_once_per_batch() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=3, max_delay_ns=100))
    queue(planner, item("a", enqueued_ns=10))
    assert planner.tick(10) == [WakeAt(110)]
    queue(planner, item("b", enqueued_ns=60))
    assert planner.tick(60) == []
    assert names(planner.wake(110)) == ["ab"]
    planner.finish(0)
    queue(planner, *[item(name, enqueued_ns=200) for name in "cde"])
    assert names(planner.tick(200)) == ["cde"]


def test_a_full_plan_does_not_wait_behind_one_that_fills() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=2, max_delay_ns=100))
    queue(planner, item("a", plan="x"), item("b", plan="y"), item("c", plan="y"))
    assert names(planner.tick(1)) == ["bc"]


def test_preferred_sizes_without_delay() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=16, preferred=frozenset({2, 4})))
    queue(planner, *[item(name) for name in "abcdefghi"])
    assert drain(planner, 1) == ["abcd", "efgh", "i"]


def test_preferred_sizes_with_delay() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=6, preferred=frozenset({4}), max_delay_ns=100))
    queue(planner, *[item(name) for name in "abc"])
    assert names(planner.tick(1)) == []
    queue(planner, item("d"), item("e"))
    assert names(planner.tick(2)) == ["abcd"]
    planner.finish(0)
    queue(planner, *[item(name, enqueued_ns=50) for name in "fghijk"])
    assert names(planner.tick(101)) == ["efghij"], "once the delay has passed, up to max_rows"


def test_a_cancel_can_make_up_a_preferred_size() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=8, preferred=frozenset({3, 8}), max_delay_ns=100))
    odd = item("b", 2)
    queue(planner, item("a", 2), odd, item("c", 1))
    assert names(planner.tick(1)) == []
    planner.cancel(odd)
    assert planner.wants_tick()
    assert names(planner.tick(1)) == ["ac"]


def test_a_member_that_runs_at_once_needs_no_wake() -> None:
    planner: Planner[Member] = Planner(Limits())
    queue(planner, item("a", deadline_ns=100))
    assert names(actions := planner.tick(1)) == ["a"]
    assert wakes(actions) == []


def test_cancelled_members_are_not_answered_and_not_run_again() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=8))
    items = [item(name) for name in "abcd"]
    queue(planner, *items)
    planner.tick(1)
    planner.cancel(items[1])
    assert planner.fail(0) == []
    assert names(planner.tick(1)) == ["acd"]
    planner.cancel(items[0])
    assert [NAMES[member] for member in planner.finish(0)] == ["c", "d"]
    assert planner.idle()


def test_pieces_of_a_failed_batch_go_before_new_work() -> None:
    planner: Planner[Member] = Planner(Limits(max_rows=4))
    queue(planner, *[item(name) for name in "abcde"])
    planner.tick(1)
    planner.fail(0)
    order = drain(planner, 1)
    assert order == ["ab", "cd", "e"]


@pytest.mark.parametrize(
    ("declared", "learned", "options", "expected"),
    [
        (0, 0, BatchingOptions(max_rows=8), 1),
        (32, 1, BatchingOptions(max_rows=8), 1),
        (32, 16, BatchingOptions(), 16),
        (32, 16, BatchingOptions(max_rows=24), 24),
        (32, 16, BatchingOptions(max_rows=99), 32),
        (32, 16, BatchingOptions(enabled=False), 1),
    ],
)
def test_limits_for(declared: int, learned: int, options: BatchingOptions, expected: int) -> None:
    spec = ModelSpec("m", "1", (), (), max_batch_size=declared, learned_batch_size=learned)
    assert limits_for(spec, options, 2).max_rows == expected


def test_limits_for_leaves_out_preferred_sizes_that_cannot_be_reached() -> None:
    spec = ModelSpec("m", "1", (), (), max_batch_size=32, learned_batch_size=8)
    options = BatchingOptions(preferred_batch_sizes=(4, 8, 16), max_queue_delay_us=5)
    limits = limits_for(spec, options, 1)
    assert limits.preferred == {4, 8}
    assert limits.max_delay_ns == 5000
