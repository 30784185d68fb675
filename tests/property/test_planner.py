"""The planner under any interleaving, against a naive twin that looks at every waiting member every time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.batching.planner import (
    GONE,
    NEW,
    TAKEN,
    WAITING,
    Expire,
    Full,
    Limits,
    Member,
    Planner,
    Reason,
    Run,
    WakeAt,
)
from server.runtime.base import QueuePolicy

US = 1000


@dataclass(eq=False)
class Item(Member):
    number: int
    rows: int = 1
    plan: str = "a"
    priority: int = 0
    timeout_us: int = 0
    deadline_ns: int = 0
    enqueued_ns: int = 0
    bad: bool = False
    state: int = NEW
    ticket: int = 0
    lane: Any = None
    before: Any = None
    after: Any = None
    timeout_ns: int = 0
    ripe: bool = False
    # what the test knows of it
    level: int = 0
    delayed: bool = False
    limit_ns: int = 0
    began: bool = False
    ends: list[str] = field(default_factory=list)

    @property
    def weight(self) -> int:
        return max(self.rows, 1)

    @property
    def place(self) -> tuple[int, bool, int]:
        return (self.level, self.delayed, self.ticket if self.delayed else self.number)


class Twin:
    """The rules of the module's text, done the slow way on one list."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Item] = []

    def policy(self, level: int) -> QueuePolicy:
        return self.limits.policies.get(level, self.limits.default_policy)

    def accept(self, item: Item) -> bool:
        limits = self.limits
        item.level = item.priority if 1 <= item.priority <= limits.priority_levels else limits.default_level
        policy = self.policy(item.level)
        candidates = [us for us in (policy.default_timeout_us,) if us]
        if policy.allow_timeout_override and item.timeout_us > 0:
            candidates.append(item.timeout_us)
        item.limit_ns = item.enqueued_ns + min(candidates) * US if candidates else 0
        same_level = sum(other.level == item.level for other in self.waiting)
        if limits.max_waiting and len(self.waiting) >= limits.max_waiting:
            return False
        if policy.max_queue_size and same_level >= policy.max_queue_size:
            return False
        self.waiting.append(item)
        return True

    def expired(self, now: int) -> dict[int, Reason]:
        """Expire and put back; the numbers of those that leave."""
        out: dict[int, Reason] = {}
        for item in list(self.waiting):
            if item.deadline_ns and item.deadline_ns <= now:
                out[item.number] = Reason.DEADLINE
            elif item.limit_ns and not item.delayed and item.limit_ns <= now:
                if self.policy(item.level).timeout_action == "DELAY":
                    item.delayed = True
                else:
                    out[item.number] = Reason.TIMEOUT
        self.waiting = [item for item in self.waiting if item.number not in out]
        return out

    def ripe(self, item: Item, now: int) -> bool:
        return item.delayed or item.enqueued_ns + self.limits.max_delay_ns <= now

    def next_batch(self, now: int, *, full: bool = False) -> list[Item]:
        """``full``: only where its whole line has rows for a full batch."""
        limits = self.limits
        fill = max(limits.preferred, default=limits.max_rows)
        ready: list[list[Item]] = []
        for plan in {item.plan for item in self.waiting}:
            line = sorted((item for item in self.waiting if item.plan == plan), key=lambda item: item.place)
            waited = any(self.ripe(item, now) for item in line)
            sums = [sum(item.weight for item in line[: n + 1]) for n in range(len(line))]
            counts = [n + 1 for n, rows in enumerate(sums) if rows in limits.preferred]
            patient = bool(limits.preferred) and not (limits.max_delay_ns and waited)
            if not (waited or sums[-1] >= fill or counts):
                continue
            if patient and counts:
                ready.append(line[: counts[-1]])
                continue
            most = fill if patient else limits.max_rows
            ready.append(line[: max(1, sum(rows <= most for rows in sums))])
        batch = min(ready, key=lambda line: line[0].place, default=[])
        if full and batch and sum(item.weight for item in self.waiting if item.plan == batch[0].plan) < fill:
            return []
        self.waiting = [item for item in self.waiting if item not in batch]
        return batch

    def next_event(self, now: int) -> int:
        times = []
        for item in self.waiting:
            times += [item.deadline_ns, 0 if item.delayed else item.limit_ns]
            if not self.ripe(item, now):
                times.append(item.enqueued_ns + self.limits.max_delay_ns)
        return min((time for time in times if time), default=0)


policies = st.builds(
    QueuePolicy,
    timeout_action=st.sampled_from(["REJECT", "DELAY"]),
    default_timeout_us=st.sampled_from([0, 0, 20, 50]),
    allow_timeout_override=st.booleans(),
    max_queue_size=st.sampled_from([0, 0, 2, 5]),
)


@st.composite
def all_limits(draw: st.DrawFn) -> Limits:
    max_rows = draw(st.sampled_from([1, 2, 4, 8]))
    levels = draw(st.sampled_from([0, 0, 1, 3]))
    return Limits(
        slots=draw(st.integers(1, 3)),
        max_rows=max_rows,
        preferred=frozenset(draw(st.sets(st.integers(1, max_rows), max_size=2)))
        if draw(st.booleans())
        else frozenset(),
        max_delay_ns=draw(st.sampled_from([0, 0, 10 * US, 40 * US])),
        max_waiting=draw(st.sampled_from([0, 4, 12, 1000])),
        priority_levels=levels,
        default_level=draw(st.integers(1, levels)) if levels else 0,
        default_policy=draw(policies),
        policies=draw(st.dictionaries(st.integers(1, 3), policies, max_size=2)) if levels else {},
    )


class PlannerMachine(RuleBasedStateMachine):
    """Random events; every action the planner returns is compared with the twin's."""

    @initialize(limits=all_limits(), ahead=st.booleans())
    def start(self, limits: Limits, ahead: bool) -> None:
        self.limits = limits
        self.planner: Planner[Item] = Planner(limits)
        self.planner.ahead = self.ahead = limits.slots if ahead else 0
        self.twin = Twin(limits)
        self.now = 1_000_000
        self.items: list[Item] = []
        self.running: dict[int, list[Item]] = {}
        self.pieces: list[list[Item]] = []  # the first to run is the first
        self.wake_ns = 0
        self.ticked = True  # nothing has happened since the last tick

    # --- events ---

    @rule(
        rows=st.integers(0, 9),
        plan=st.sampled_from("aaab"),
        priority=st.integers(-1, 4),
        timeout_us=st.sampled_from([0, 0, 5, 30, 90]),
        deadline_us=st.sampled_from([0, 0, 0, 7, 35, 200]),
        bad=st.sampled_from([False, False, False, True]),
    )
    def add(self, rows: int, plan: str, priority: int, timeout_us: int, deadline_us: int, bad: bool) -> None:
        item = Item(len(self.items) + 1, rows, plan, priority, timeout_us, enqueued_ns=self.now, bad=bad)
        item.deadline_ns = self.now + deadline_us * US if deadline_us else 0
        accepted = self.twin.accept(item)
        full = self.planner.add(item)
        assert (full is None) == accepted
        if accepted:
            self.items.append(item)
            self.ticked = False
        else:
            assert full is not None
            assert full.waiting >= full.limit
            assert item.state == NEW

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        item = data.draw(st.sampled_from(self.items[-12:]))
        if item.state in (WAITING, TAKEN) and not item.ends:
            item.ends.append("cancelled")
        self.planner.cancel(item)
        assert item.state == GONE
        self.twin.waiting = [other for other in self.twin.waiting if other is not item]
        self.ticked = False

    @rule(us=st.sampled_from([1, 5, 10, 40, 300]))
    def pass_time(self, us: int) -> None:
        self.now += us * US
        self.tick()

    @rule()
    def tick(self) -> None:
        self.follow(self.planner.tick(self.now))

    @precondition(lambda self: self.wake_ns)
    @rule(early=st.sampled_from([0, 0, 1]))
    def wake(self, early: int) -> None:
        """The timer fires, perhaps a little early."""
        self.now = max(self.now, self.wake_ns - early)
        self.wake_ns = 0
        self.follow(self.planner.wake(self.now))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def complete(self, data: Any) -> None:
        self.end_run(data.draw(st.sampled_from(sorted(self.running))))
        self.ticked = False

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        """A batch fails as none of its members made it fail: all of them are answered, none is run again."""
        slot = data.draw(st.sampled_from(sorted(self.running)))
        live = [item for item in self.running.pop(slot) if item.state != GONE]
        self.settle(self.planner.fail(slot, divide=False), live, "lost")
        self.ticked = False

    # --- checks ---

    def end_run(self, slot: int) -> None:
        members = self.running.pop(slot)
        live = [item for item in members if item.state != GONE]
        if not any(item.bad for item in members):
            self.settle(self.planner.finish(slot), live, "answered")
        elif len(members) == 1:
            self.settle(self.planner.fail(slot), live, "failed")
        else:
            assert self.planner.fail(slot) == []
            half = -(-len(live) // 2) if len(live) == len(members) else len(live)
            self.pieces = [piece for piece in (live[:half], live[half:]) if piece] + self.pieces

    def settle(self, got: list[Item], wanted: list[Item], end: str) -> None:
        assert got == wanted
        for item in got:
            item.ends.append(end)
            item.state = GONE

    def follow(self, actions: list[Any]) -> None:
        expired = {action.member.number: action.reason for action in actions if isinstance(action, Expire)}
        assert expired == self.twin.expired(self.now)
        for action in actions:
            if isinstance(action, Expire):
                action.member.ends.append(action.reason.value)
                assert action.member.state == TAKEN
                action.member.state = GONE
            elif isinstance(action, WakeAt):
                assert action.at_ns > self.now
                self.wake_ns = action.at_ns
            else:
                self.check_run(action)
        if len(self.running) < self.limits.slots + self.ahead:
            assert self.next_expected() == []
        event = self.twin.next_event(self.now)
        assert not event or 0 < self.wake_ns <= event
        self.ticked = True

    def next_expected(self) -> list[Item]:
        if len(self.running) >= self.limits.slots:
            return [] if self.pieces else self.twin.next_batch(self.now, full=True)
        while self.pieces:
            if members := [item for item in self.pieces.pop(0) if item.state == TAKEN]:
                return members
        return self.twin.next_batch(self.now)

    def check_run(self, run: Run[Item]) -> None:
        members = run.members
        assert members == self.next_expected()
        assert run.slot not in self.running
        assert 0 <= run.slot < self.limits.slots + self.ahead
        assert len(self.running) < self.limits.slots + self.ahead
        assert len({item.plan for item in members}) == 1
        assert len(members) == 1 or sum(item.weight for item in members) <= self.limits.max_rows
        assert all(item.state == TAKEN and not item.ends for item in members)
        for item in members:
            assert item.began or not 0 < item.deadline_ns <= self.now
            item.began = True
        self.running[run.slot] = members

    @invariant()
    def counts(self) -> None:
        if not hasattr(self, "planner"):
            return
        assert self.planner.waiting() == len(self.twin.waiting)
        pieces = sum(map(len, self.pieces))
        assert self.planner.in_flight() == sum(map(len, self.running.values())) + pieces
        assert not self.limits.max_waiting or self.planner.waiting() <= self.limits.max_waiting

    @invariant()
    def a_tick_that_is_not_wanted_starts_nothing(self) -> None:
        if hasattr(self, "planner") and not self.ticked and not self.planner.wants_tick():
            assert len(self.running) == self.limits.slots + self.ahead or not (self.twin.waiting or self.pieces)

    def teardown(self) -> None:
        """Everything still in the queue comes out, and each member ended exactly once, in the right way."""
        if not hasattr(self, "planner"):
            return
        for _ in range(10 * len(self.items) + 10):
            if self.planner.idle():
                break
            for slot in list(self.running):
                self.end_run(slot)
            self.now += 5 * US
            self.follow(self.planner.tick(self.now))
        assert self.planner.idle()
        assert all(len(item.ends) == 1 for item in self.items)
        assert all(item.bad for item in self.items if item.ends == ["failed"])
        assert not any(item.bad for item in self.items if item.ends == ["answered"])


TestPlannerMachine = PlannerMachine.TestCase
TestPlannerMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def added(planner: Planner[Item], *items: Item) -> list[Item]:
    for item in items:
        assert planner.add(item) is None
    return list(items)


def runs(actions: list[Any]) -> list[list[int]]:
    return [[item.number for item in action.members] for action in actions if isinstance(action, Run)]


@given(bad=st.lists(st.booleans(), min_size=1, max_size=64))
def test_culprits_are_found_in_bounded_runs(bad: list[bool]) -> None:
    planner: Planner[Item] = Planner(Limits(max_rows=64))
    items = added(planner, *[Item(number, bad=flag, enqueued_ns=1) for number, flag in enumerate(bad)])
    answered: list[Item] = []
    failed: list[Item] = []
    count = 0
    while actions := planner.tick(2):
        (run,) = actions
        assert isinstance(run, Run)
        count += 1
        if any(item.bad for item in run.members):
            failed += planner.fail(run.slot)
        else:
            answered += planner.finish(run.slot)
    assert sorted(item.number for item in answered) == [item.number for item in items if not item.bad]
    assert sorted(item.number for item in failed) == [item.number for item in items if item.bad]
    culprits = sum(bad)
    assert count <= 2 * len(bad) - 1
    assert count <= 1 + 2 * culprits * max(1, (len(bad) - 1).bit_length())


@given(plans=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60), max_rows=st.integers(1, 4))
def test_no_plan_starves_another(plans: list[str], max_rows: int) -> None:
    """Each batch begins with the oldest member of all, so a member waits for at most the batches of older ones."""
    planner: Planner[Item] = Planner(Limits(max_rows=max_rows))
    waiting = added(planner, *[Item(number, plan=plan, enqueued_ns=1) for number, plan in enumerate(plans)])
    while actions := planner.tick(2):
        (run,) = actions
        assert isinstance(run, Run)
        assert run.members[0] is waiting[0]
        waiting = [item for item in waiting if item not in run.members]
        planner.finish(run.slot)
    assert waiting == []


@pytest.mark.parametrize("change", [{}, {"max_delay_ns": 1000 * US}, {"priority_levels": 2, "default_level": 1}])
def test_churn_leaves_nothing_behind(change: dict[str, int]) -> None:
    """Members that come and are cancelled while the engine is busy must not pile up in the lazily swept heaps."""
    planner: Planner[Item] = Planner(replace(Limits(max_rows=4), **change))
    blocker = Item(0, plan="blocker", rows=4, enqueued_ns=1)
    added(planner, blocker)
    assert runs(planner.tick(1)) == [[0]]
    for number in range(1, 5000):
        item = Item(number, plan=f"plan {number}", enqueued_ns=number, deadline_ns=10**12 + number)
        added(planner, item)
        planner.tick(number)
        planner.cancel(item)
    assert planner.waiting() == 0
    assert len(planner._timers) <= 70
    assert len(planner._ready) <= 70
    assert not planner._timed
    assert not planner._groups


def test_full_names_the_bound() -> None:
    limits = Limits(max_waiting=2, priority_levels=2, default_level=2, policies={1: QueuePolicy(max_queue_size=1)})
    planner: Planner[Item] = Planner(limits)
    added(planner, Item(1, priority=1))
    assert planner.add(Item(2, priority=1)) == Full(1, 1, 1)
    added(planner, Item(3))
    assert planner.add(Item(4)) == Full(2, 2)
