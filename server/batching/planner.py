"""When and with whom a waiting member runs. Pure: no clock, no thread, no I/O; ``now`` comes in, actions go out.

A *member* is one request's rows. It waits in the *group* of its row plan (members of one group may share a batch;
members of different groups never do), inside the group in the *lane* of its priority level. Every level has two
lanes: the members within their queue timeout, and behind them those that a DELAY policy has put back. Lanes are
first in, first out and are taken in order of priority.

Each engine instance runs one batch at a time. Whenever one is free, ``tick`` gives it a batch of the group whose
foremost member stands in the most urgent lane, the oldest first, so that no row plan starves another. A group is
*ready* at once, unless a queue delay is set: then it is ready when it fills a batch, reaches a preferred size, or
holds a *ripe* member, one that has waited for the whole delay.

While all instances are busy, up to ``ahead`` batches are handed out before their time, so that an instance goes on
without a turn of the loop in between. Only full ones: nobody who came later could have joined them. Their members
cannot expire any more, and more urgent ones come behind them.

A member's life::

    WAITING --tick--> TAKEN (running, expired, or failed: its owner has to settle it) --owner--> GONE
       \\-----------------------------------cancel----------------------------------------------/

A batch of several members that fails as one of them may have made it fail is run again by halves, until those that
fail alone are found: at most ``2n - 1`` runs for n members, ``O(k log n)`` for k culprits. One that fails otherwise (a
server behind it is not there) fails as a whole.

Cost: add, cancel and leaving are O(1) amortised; a member with a timer or a group with a new head costs O(log n).
Timers and ready entries are removed lazily; they hold tickets, not members, so that nothing keeps tensors alive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush, heapreplace
from itertools import chain
from typing import Final, Generic, TypeAlias, TypeVar, cast

from server.runtime.base import BatchingOptions, QueuePolicy
from server.types import ModelSpec

NEW: Final = 0
WAITING: Final = 1
TAKEN: Final = 2
GONE: Final = 3

#: Lazily removed entries are swept when they outnumber the live ones by this many.
_SLACK: Final = 64


class Member:
    """What the planner reads of a request (first block) and notes on it (second block). Compared by identity."""

    __slots__ = (
        "after", "before", "deadline_ns", "enqueued_ns", "lane", "plan", "priority", "ripe", "rows", "state", "ticket",
        "timeout_ns", "timeout_us",
    )  # fmt: skip

    def __init__(
        self,
        rows: int = 1,
        priority: int = 0,
        timeout_us: int = 0,
        deadline_ns: int = 0,
        enqueued_ns: int = 0,
        plan: Hashable = (),
    ) -> None:
        self.rows = rows  # 0 counts as 1
        self.priority = priority  # 0: the default level
        self.timeout_us = timeout_us  # its own queue timeout, where the policy allows one
        self.deadline_ns = deadline_ns  # 0: none
        self.enqueued_ns = enqueued_ns
        self.plan = plan

        self.state = NEW
        self.ticket = 0
        self.lane: _Lane | None = None
        self.before: Member | None = None  # its neighbours in the lane
        self.after: Member | None = None
        self.timeout_ns = 0
        self.ripe = False


M = TypeVar("M", bound=Member)


class Reason(Enum):
    """Why a member left the queue without having run."""

    DEADLINE = "deadline"
    TIMEOUT = "timeout"


class Run(Generic[M]):
    """Run these members, in order of runs, when an instance is free; then call ``finish(slot)`` or ``fail(slot)``."""

    __slots__ = ("members", "slot")

    def __init__(self, slot: int, members: list[M]) -> None:
        self.slot = slot
        self.members = members


class Expire(Generic[M]):
    """This member has left the queue; its owner answers it."""

    __slots__ = ("member", "reason")

    def __init__(self, member: M, reason: Reason) -> None:
        self.member = member
        self.reason = reason


@dataclass(slots=True)
class WakeAt:
    """Call ``wake`` at this time (ns). Replaces every earlier WakeAt."""

    at_ns: int


Action: TypeAlias = Run[M] | Expire[M] | WakeAt


@dataclass(slots=True, frozen=True)
class Full:
    """The bound that refused a member: ``waiting`` of at most ``limit``; ``level`` None is the bound of all levels."""

    waiting: int
    limit: int
    level: int | None = None


@dataclass(slots=True, frozen=True)
class Limits:
    """Everything the planner obeys. A ``max_rows`` of 1 means: never combine members."""

    slots: int = 1
    max_rows: int = 1
    preferred: frozenset[int] = frozenset()
    max_delay_ns: int = 0
    max_waiting: int = 1024
    priority_levels: int = 0
    default_level: int = 0
    default_policy: QueuePolicy = field(default_factory=QueuePolicy)
    policies: Mapping[int, QueuePolicy] = field(default_factory=dict)


def limits_for(spec: ModelSpec, options: BatchingOptions, slots: int) -> Limits:
    """The limits of one loaded version. Members are combined only where the version was found to allow it."""
    max_rows = 1
    if options.enabled and spec.max_batch_size and spec.learned_batch_size > 1:
        max_rows = min(options.max_rows or spec.learned_batch_size, spec.max_batch_size)
    return Limits(
        slots=slots,
        max_rows=max_rows,
        preferred=frozenset(size for size in options.preferred_batch_sizes if size <= max_rows),
        max_delay_ns=options.max_queue_delay_us * 1000,
        max_waiting=options.max_queue_size,
        priority_levels=options.priority_levels,
        default_level=options.default_priority_level,
        default_policy=options.default_queue_policy,
        policies=options.priority_queue_policy,
    )


class _Level:
    """One priority level: its queue policy, its first lane, and how many members wait in it."""

    __slots__ = ("lane", "max_waiting", "policy", "timeout_us", "waiting")

    def __init__(self, number: int, policy: QueuePolicy) -> None:
        self.policy = policy
        self.max_waiting = policy.max_queue_size
        self.timeout_us = policy.default_timeout_us
        self.lane = 2 * number
        self.waiting = 0


class _Lane:
    """Members of one group that are equally urgent, in order of tickets.

    They are linked to each other: one leaves from any place at once, and nothing is kept of those that have left.
    """

    __slots__ = ("first", "last", "level", "number")

    def __init__(self, number: int, level: _Level) -> None:
        self.number = number
        self.level = level
        self.first: Member | None = None
        self.last: Member | None = None

    def append(self, member: Member) -> None:
        last = self.last
        if last is None:
            self.first = member
        else:
            last.after = member
            member.before = last
        self.last = member
        member.lane = self
        self.level.waiting += 1

    def remove(self, member: Member) -> None:
        before, after = member.before, member.after
        if before is None:
            self.first = after
        else:
            before.after = after
        if after is None:
            self.last = before
        else:
            after.before = before
        member.before = member.after = member.lane = None
        self.level.waiting -= 1


class _Group:
    """The waiting members of one row plan, lane by lane."""

    __slots__ = ("lanes", "listed", "ripe", "rows")

    def __init__(self) -> None:
        self.lanes: dict[int, _Lane] = {}
        self.listed: set[int] = set()  # lanes with an entry in the planner's ready heap
        self.rows = 0
        self.ripe = 0

    def put(self, member: Member, number: int, level: _Level) -> None:
        lane = self.lanes.get(number)
        if lane is None:
            lane = self.lanes[number] = _Lane(number, level)
        lane.append(member)
        self.rows += member.rows or 1
        self.ripe += member.ripe

    def first(self) -> Member | None:
        """Who is to run before all others."""
        return self._first_behind(-1)

    def behind(self, member: Member) -> Member | None:
        """Who is to run after a member, as far as they wait now."""
        if member.after is not None or member.lane is None:
            return member.after
        return self._first_behind(member.lane.number)

    def _first_behind(self, number: int) -> Member | None:
        for following in sorted(self.lanes) if len(self.lanes) > 1 else self.lanes:
            if following > number and (first := self.lanes[following].first) is not None:
                return first
        return None

    def head(self, lane: int) -> int:
        """The foremost ticket of a lane; 0 when the lane is empty."""
        first = self.lanes[lane].first
        return 0 if first is None else first.ticket


class Planner(Generic[M]):
    """The queue of one loaded version. See the module's text for the rules."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        #: Full batches to hand out while all instances are busy; at most as many as there are instances.
        self.ahead = 0
        self._fill = max(limits.preferred, default=limits.max_rows)
        self._levels: dict[int, _Level] = {}
        self._groups: dict[Hashable, _Group] = {}
        self._waiting = 0
        self._tickets = 0
        #: (lane, ticket of its head when listed, group): at most one live entry per lane of a group. A lane's head
        #: ticket only grows, so an entry is never later than the truth and is corrected when it comes up.
        self._ready: list[tuple[int, int, _Group]] = []
        #: Members with something to happen to them while they wait, by ticket, and when (ns, ticket).
        self._timed: dict[int, M] = {}
        self._timers: list[tuple[int, int]] = []
        self._wake_ns = 0  # the WakeAt that is out; 0 = none
        self._free = list(range(2 * limits.slots))[::-1]
        self._running: dict[int, list[M]] = {}
        self._pieces: deque[list[M]] = deque()  # parts of failed batches, to run before anything else

    # --- what is so ------------------------------------------------------------------------------------------

    def waiting(self) -> int:
        """Members that have not been taken."""
        return self._waiting

    def in_flight(self) -> int:
        """Members in batches that run or are to be run again, cancelled ones among them."""
        return sum(map(len, self._running.values())) + sum(map(len, self._pieces))

    def running(self) -> int:
        """Batches that have been handed out and not settled."""
        return len(self._running)

    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not (self._waiting or self._running or self._pieces)

    def members(self) -> list[M]:
        """Everyone who waits, is being run, or is to be run again; those that were cancelled are not among them."""
        members = [member for group in self._groups.values() for member in self._foremost(group, group.rows)]
        taken = chain.from_iterable([*self._running.values(), *self._pieces])
        return members + [member for member in taken if member.state == TAKEN]

    def wants_tick(self) -> bool:
        """A tick could do something: hand out a batch, or ask for an earlier wake."""
        if len(self._running) < self._limits.slots + self.ahead and (self._waiting or self._pieces):
            return True
        return bool(self._timers) and (not self._wake_ns or self._timers[0][0] < self._wake_ns)

    # --- events ----------------------------------------------------------------------------------------------

    def add(self, member: M) -> Full | None:
        """Let a member wait, or say which bound refuses it. ``enqueued_ns`` and ``plan`` are set. Then tick."""
        limits = self._limits
        number = member.priority if 0 < member.priority <= limits.priority_levels else limits.default_level
        level = self._levels.get(number) or self._level(number)
        if 0 < limits.max_waiting <= self._waiting or 0 < level.max_waiting <= level.waiting:
            return self._full(level)
        if level.timeout_us or member.timeout_us:
            member.timeout_ns = _timeout_ns(member, level.policy)
        member.ripe = not limits.max_delay_ns
        member.state = WAITING
        self._enqueue(member, level.lane, level)
        return None

    def cancel(self, member: M) -> None:
        """Forget a member: a waiting one leaves the queue, a taken one is no longer among those to settle."""
        if member.state == WAITING:
            group = self._leave(member)
            if group.rows:
                self._offer(group)  # without it the others may add up to a preferred size
        member.state = GONE

    def wake(self, now: int) -> list[Action[M]]:
        """The time of the last WakeAt has come (or nearly: a new one follows)."""
        self._wake_ns = 0
        return self.tick(now)

    def tick(self, now: int) -> list[Action[M]]:
        """Expire what is due, then give every free instance a batch. Runs come first among the actions."""
        expired = self._fire(now) if self._timers else []
        actions: list[Action[M]] = []
        while members := self._next_batch():
            slot = self._free.pop()
            self._running[slot] = members
            actions.append(Run(slot, members))
        actions += expired
        next_ns = self._next_timer() if self._timers else 0
        if next_ns and (not self._wake_ns or next_ns < self._wake_ns):
            self._wake_ns = next_ns
            actions.append(WakeAt(next_ns))
        return actions

    def finish(self, slot: int) -> list[M]:
        """The slot's batch is done: the members to answer. Then tick."""
        return [member for member in self._release(slot) if member.state == TAKEN]

    def fail(self, slot: int, *, divide: bool = True) -> list[M]:
        """The slot's batch failed: the members to answer with its error; none while culprits are sought. Then tick.

        ``divide``: one member may be to blame, so a batch of several is run again in parts.
        """
        members = self._release(slot)
        left = [member for member in members if member.state == TAKEN]
        if len(members) == 1 or not divide:
            return left
        half = (len(left) + 1) // 2 if len(left) == len(members) else len(left)
        self._pieces.extendleft(piece for piece in (left[half:], left[:half]) if piece)
        return []

    # --- waiting ---------------------------------------------------------------------------------------------

    def _level(self, number: int) -> _Level:
        """A level whose first member comes."""
        level = self._levels[number] = _Level(number, self._limits.policies.get(number, self._limits.default_policy))
        return level

    def _full(self, level: _Level) -> Full:
        if 0 < self._limits.max_waiting <= self._waiting:
            return Full(self._waiting, self._limits.max_waiting)
        return Full(level.waiting, level.max_waiting, level.lane // 2)

    def _enqueue(self, member: M, lane: int, level: _Level) -> None:
        self._tickets += 1
        member.ticket = self._tickets
        group = self._groups.get(member.plan)
        if group is None:
            group = self._groups[member.plan] = _Group()
        group.put(member, lane, level)
        self._waiting += 1
        if member.deadline_ns or member.timeout_ns or not member.ripe:
            self._set_timer(member)
        if len(group.listed) < len(group.lanes):
            self._offer(group)

    def _leave(self, member: M) -> _Group:
        group = self._groups[member.plan]
        self._remove(group, [member])
        return group

    def _remove(self, group: _Group, members: list[M]) -> None:
        """Take members of one group out of the queue."""
        timed = self._timed
        rows = ripe = 0
        for member in members:
            if (lane := member.lane) is not None:
                lane.remove(member)
            rows += member.rows or 1
            ripe += member.ripe
            if timed:
                timed.pop(member.ticket, None)
        group.rows -= rows
        group.ripe -= ripe
        self._waiting -= len(members)
        if not group.rows:
            del self._groups[members[0].plan]

    # --- readiness and choice --------------------------------------------------------------------------------

    def _is_ready(self, group: _Group) -> bool:
        if group.ripe or group.rows >= self._fill:
            return True
        return bool(self._limits.preferred) and self._preferred_rows(group) > 0

    def _preferred_rows(self, group: _Group) -> int:
        """The largest preferred size that the foremost members make up; 0 when they make up none."""
        rows = found = 0
        member = group.first()
        while member is not None and rows < self._fill:
            rows += member.rows or 1
            if rows in self._limits.preferred:
                found = rows
            member = group.behind(member)
        return found

    def _offer(self, group: _Group) -> None:
        """List every lane of a ready group that is not listed yet."""
        if not self._is_ready(group):
            return
        for lane in group.lanes.keys() - group.listed:
            if ticket := group.head(lane):
                group.listed.add(lane)
                heappush(self._ready, (lane, ticket, group))
        if len(self._ready) > 2 * self._waiting + _SLACK:
            self._sweep_ready()

    def _sweep_ready(self) -> None:
        live = [entry for entry in self._ready if entry[2].head(entry[0])]
        for lane, _, group in self._ready:
            if not group.head(lane):
                group.listed.discard(lane)
        self._ready = live
        heapify(live)

    def _first_ready(self) -> _Group | None:
        """The group whose foremost member is the oldest of the most urgent lane; its entry stays listed."""
        while self._ready:
            lane, ticket, group = self._ready[0]
            head = group.head(lane)
            if not head or not self._is_ready(group):
                heappop(self._ready)
                group.listed.discard(lane)
            elif head != ticket:
                heapreplace(self._ready, (lane, head, group))
            else:
                return group
        return None

    def _next_batch(self) -> list[M]:
        """The members of the batch that is to be handed out now; empty when there is none."""
        running = len(self._running)
        if running < self._limits.slots:
            return self._next_piece() or self._compose()
        if running < self._limits.slots + self.ahead and not self._pieces:
            return self._compose(self._fill)
        return []

    def _compose(self, least_rows: int = 0) -> list[M]:
        """Take the members of the next batch out of the queue; empty when its group is not ready or has fewer rows."""
        group = self._first_ready()
        if group is None or group.rows < least_rows:
            return []
        members = self._choose(group)
        self._remove(group, members)
        for member in members:
            member.state = TAKEN
        return members

    def _choose(self, group: _Group) -> list[M]:
        """The foremost members that fit; a first member over the limit goes alone.

        While the queue delay has not passed (or none is set), a preferred size is kept where one can be had, and the
        largest preferred size is not exceeded.
        """
        patient = bool(self._limits.preferred) and not (self._limits.max_delay_ns and group.ripe)
        limit = self._fill if patient else self._limits.max_rows
        return self._foremost(group, (self._preferred_rows(group) if patient else 0) or limit)

    @staticmethod
    def _foremost(group: _Group, limit: int) -> list[M]:
        """The members to run first, up to so many rows; at least one."""
        members: list[Member] = []
        rows = 0
        member = group.first()
        while member is not None:
            rows += member.rows or 1
            if members and rows > limit:
                break
            members.append(member)
            member = group.behind(member)
        return cast("list[M]", members)

    # --- running ---------------------------------------------------------------------------------------------

    def _release(self, slot: int) -> list[M]:
        members = self._running.pop(slot)
        self._free.append(slot)
        return members

    def _next_piece(self) -> list[M]:
        while self._pieces:
            if members := [member for member in self._pieces.popleft() if member.state == TAKEN]:
                return members
        return []

    # --- time ------------------------------------------------------------------------------------------------

    def _set_timer(self, member: M) -> None:
        """Note when something is next due for a waiting member, if ever."""
        due = member.deadline_ns
        if member.timeout_ns and (not due or member.timeout_ns < due):
            due = member.timeout_ns
        if not member.ripe:
            ripe_ns = member.enqueued_ns + self._limits.max_delay_ns
            due = min(due, ripe_ns) if due else ripe_ns
        if not due:
            return
        self._timed[member.ticket] = member
        _push(self._timers, due, member.ticket)
        if len(self._timers) > 2 * len(self._timed) + _SLACK:
            self._timers = [timer for timer in self._timers if timer[1] in self._timed]
            heapify(self._timers)

    def _next_timer(self) -> int:
        """When the first live timer is due; 0 when there is none."""
        timers = self._timers
        if not self._timed:
            timers.clear()  # at once: one by one they cost more than all the rest of a batch
        while timers:
            due, ticket = timers[0]
            if ticket in self._timed:
                return due
            heappop(timers)
        return 0

    def _fire(self, now: int) -> list[Expire[M]]:
        """Everything that is due by now happens."""
        expired: list[Expire[M]] = []
        while 0 < self._next_timer() <= now:
            _, ticket = heappop(self._timers)
            member = self._timed[ticket]
            if reason := self._due(member, now):
                expired.append(Expire(member, reason))
        return expired

    def _due(self, member: M, now: int) -> Reason | None:
        """Apply what has come due to a waiting member; the reason when it must leave."""
        if 0 < member.deadline_ns <= now:
            return self._expire(member, Reason.DEADLINE)
        if 0 < member.timeout_ns <= now:
            lane = member.lane
            if lane is None or lane.level.policy.timeout_action != "DELAY":
                return self._expire(member, Reason.TIMEOUT)
            self._put_back(member, lane)
            return None
        group = self._groups[member.plan]
        member.ripe = True
        group.ripe += 1
        self._set_timer(member)
        self._offer(group)
        return None

    def _expire(self, member: M, reason: Reason) -> Reason:
        group = self._leave(member)
        member.state = TAKEN
        if group.rows:
            self._offer(group)
        return reason

    def _put_back(self, member: M, lane: _Lane) -> None:
        """DELAY: go to the lane behind, with a new ticket. It waits for no batch to fill any more."""
        group = self._leave(member)
        if group.rows:
            self._offer(group)
        member.timeout_ns = 0
        member.ripe = True
        self._enqueue(member, lane.number + 1, lane.level)


def _timeout_ns(member: Member, policy: QueuePolicy) -> int:
    """When the member's queue timeout ends (0: never). A request may shorten its level's timeout, never lengthen it."""
    timeout_us = policy.default_timeout_us
    if policy.allow_timeout_override and member.timeout_us > 0 and not 0 < timeout_us <= member.timeout_us:
        timeout_us = member.timeout_us
    return member.enqueued_ns + timeout_us * 1000 if timeout_us else 0


def _push(heap: list[tuple[int, int]], due: int, ticket: int) -> None:
    """``heappush``; what comes in order, as most does, without the call."""
    if heap:
        over_due, over_ticket = heap[(len(heap) - 1) >> 1]
        if over_due > due or (over_due == due and over_ticket > ticket):
            heappush(heap, (due, ticket))
            return
    heap.append((due, ticket))
