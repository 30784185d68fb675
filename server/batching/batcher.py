"""The shell around the planner: it reads the clock, runs batches, and answers members. One per loaded version.

Owns the hand-off to the engine and the exactly-once answer of every ``Work``. Leaves to the planner *who* runs when,
to ``assemble`` how tensors are joined, and to the transports what an answer looks like.

**Gathering.** ``submit`` only queues and asks for a flush at the end of the loop's turn, so all requests that were
read in one turn meet in one batch. Batches of a short model run on the loop itself (``inline``): one per turn, so
that the loop reads what has arrived in between. Longer ones run on one thread per engine instance; the loop is woken
once per finished batch. The way to the loop and back takes a good part of a millisecond, more where the loop is at
work and has the interpreter: while requests make up full batches, the next one lies ready before a thread asks for
it. A moving estimate of the run time moves a model from the loop to the threads and back. What is short for a few
rows may be long for many: a batch of many more rows than were seen to be short runs on a thread in any case.

**Threads.** Everything but ``_work``, ``_execute`` and ``close`` happens on the loop's thread. Between the hand-off of
a batch and the wake its thread reads the members' inputs and sets their outputs; the loop touches neither meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import structlog

from monitor.tap import Tap
from server.batching.assemble import Layout
from server.batching.planner import GONE, TAKEN, WAITING, Action, Full, Member, Planner, Reason, Run, WakeAt, limits_for
from server.errors import (
    ConfigError,
    DeadlineExceeded,
    Draining,
    OutOfMemory,
    QueueFull,
    QueueTimeout,
    RuntimeFailure,
    TidegateError,
)
from server.runtime.base import BatchingOptions, Engine
from server.types import Clock, Tensor

#: A batch this short (ns) costs less on the loop than the hand-off to a thread and back.
INLINE_NS: Final = 300_000
#: A batch this long (ns) holds up the loop's other connections; between the two the model stays where it is.
THREAD_NS: Final = 1_000_000
#: A batch of up to so many times the rows of one that was short may be tried on the loop.
_GROWTH: Final = 4
#: More rows than any batch has.
_NONE_LONG: Final = 1 << 60
#: Batches of a run this long (ns) are not handed out ahead: there is little to gain, and members could not expire.
AHEAD_NS: Final = 50_000_000

#: Waits shorter than this (ns) are kept by fine timers, where there are any; of longer ones a millisecond is little.
_FINE_NS: Final = 10_000_000

#: What a refused caller is told to wait.
_RETRY_AFTER_S: Final = 1.0

T = TypeVar("T")

_log: Any = structlog.get_logger(__name__)


class TimerHandle(Protocol):
    def cancel(self) -> object: ...


CallSoon: TypeAlias = Callable[..., object]
CallLater: TypeAlias = Callable[[float, Callable[[], None]], TimerHandle]
#: As ``CallLater``, with nanoseconds, and true to a small part of a millisecond (``server.batching.timers``).
CallLaterNs: TypeAlias = Callable[[int, Callable[[], None]], TimerHandle]


class Work(Member):
    """One request for one version, and later its answer.

    ``inputs`` stand in spec order and fit the spec; None is an absent optional input. ``settle`` is called exactly
    once, on the loop, unless it was cancelled; before that exactly one of ``outputs`` (this request's own rows, in spec
    order) and ``error`` is set. Times are monotonic ns; a time that never came is 0. ``started_ns``: its first batch
    was handed to the engine; a failed batch may be run again in parts.
    """

    __slots__ = (
        "apart", "assembled_ns", "batch_id", "batch_members", "batch_rows", "computed_ns", "done", "error",
        "finished_ns", "inputs", "outputs", "started_ns",
    )  # fmt: skip

    def __init__(
        self,
        inputs: list[Tensor | None],
        rows: int,  # 0 for a model that does not batch
        done: Callable[[Work], None] | None = None,  # None: what follows is said by a ``settle`` of its own
        deadline_ns: int = 0,
        priority: int = 0,
        timeout_us: int = 0,
        outputs: list[Tensor] | None = None,
        error: TidegateError | None = None,
        enqueued_ns: int = 0,
    ) -> None:
        super().__init__(rows, priority, timeout_us, deadline_ns, enqueued_ns)
        self.inputs = inputs
        self.done = done
        self.outputs = outputs
        self.error = error
        self.started_ns = 0
        self.assembled_ns = 0
        self.computed_ns = 0
        self.finished_ns = 0
        self.batch_rows = 0
        self.batch_members = 0
        self.batch_id = 0
        #: Requests with another mark never share a batch with it: a part of the traffic that is measured by itself.
        self.apart = ""

    def settle(self, told: Work) -> None:
        """It is over. ``told`` says how: itself, or one that stands for it while a thread may still write to it."""
        if self.done is not None:
            self.done(told)


@dataclass(slots=True, init=False)
class BatchRecord:
    """One run of the engine, for statistics; a batch that fails and is run again in parts gives one record per run.

    ``queue_ns`` is the sum over the members of their wait, counted in the first run only (0 in further runs), as
    requests are counted. ``error`` is the code of the error that the run ended with, None when it was right.
    """

    id: int
    instance: int
    rows: int
    members: int
    started_ns: int
    queue_ns: int
    assemble_ns: int
    compute_ns: int
    split_ns: int
    error: str | None

    def __init__(
        self,
        id: int,
        instance: int,
        rows: int,
        members: int,
        started_ns: int,
        queue_ns: int,
        assemble_ns: int,
        compute_ns: int,
        split_ns: int,
        error: str | None,
    ) -> None:
        self.id = id
        self.instance = instance
        self.rows = rows
        self.members = members
        self.started_ns = started_ns
        self.queue_ns = queue_ns
        self.assemble_ns = assemble_ns
        self.compute_ns = compute_ns
        self.split_ns = split_ns
        self.error = error


class _Execution:
    """A batch on its way through the engine. Phase ends are 0 when the phase was not reached."""

    __slots__ = (
        "assembled_ns", "computed_ns", "error", "finished_ns", "id", "instance", "members", "queue_ns", "rows", "slot",
        "started_ns",
    )  # fmt: skip

    def __init__(self, id: int, slot: int, members: list[Work]) -> None:
        self.id = id
        self.slot = slot  # the planner's number for it
        self.members = members
        self.instance = 0  # which engine instance ran it
        self.started_ns = 0
        self.queue_ns = 0
        self.rows = 0
        self.assembled_ns = 0
        self.computed_ns = 0
        self.finished_ns = 0
        self.error: TidegateError | None = None

    def record(self) -> BatchRecord:
        assembled_ns = self.assembled_ns or self.finished_ns  # a phase that failed ends where the run ended
        computed_ns = self.computed_ns or self.finished_ns
        return BatchRecord(
            self.id, self.instance, self.rows, len(self.members), self.started_ns, self.queue_ns,
            assembled_ns - self.started_ns, computed_ns - assembled_ns, self.finished_ns - computed_ns,
            self.error.code if self.error is not None else None,
        )  # fmt: skip


class Batcher:
    """Gathers the requests of one loaded version into batches and runs them. Use it from the loop's thread only.

    ``clock`` is monotonic ns. ``call_soon``, ``call_soon_threadsafe`` and ``call_later`` are the loop's, which keeps
    time by the millisecond; ``call_later_ns`` keeps it better, None: nobody does. ``on_batch`` is called once
    per run, before the members are answered. ``on_idle`` (also an attribute, to be set later) is called when nothing
    waits, runs or is unanswered any more, perhaps more than once. Both are called on the loop.
    Raises ConfigError when the options do not fit the engine's spec.
    """

    def __init__(
        self,
        engine: Engine,
        options: BatchingOptions,
        *,
        clock: Clock,
        call_soon: CallSoon,
        call_soon_threadsafe: CallSoon,
        call_later: CallLater,
        call_later_ns: CallLaterNs | None = None,
        on_batch: Callable[[BatchRecord], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        _check_levels(engine.spec.name, options)
        self._engine = engine
        self._clock = clock
        self._call_soon = call_soon
        self._call_soon_threadsafe = call_soon_threadsafe
        self._call_later = call_later
        self._call_later_ns = call_later_ns
        self._on_batch = on_batch
        self.on_idle = on_idle
        #: One tap per engine instance, whose batches follow each other, on whichever thread; None: nobody watches.
        self.taps: tuple[Tap, ...] | None = None
        #: What its batches are counted as: the version's part in the routing table.
        self.arm = "stable"
        self._layout = Layout(engine.spec, options)
        self._planner: Planner[Work] = Planner(limits_for(engine.spec, options, engine.instances))
        self._run_ns = engine.run_ns
        self._runs_inline = engine.instances == 1 and engine.run_ns < INLINE_NS
        #: The most rows of a run that was short, the fewest above them of one that was long, and the most that are run
        #: on the loop: at first so many as are short if each takes what warm-up took for one.
        self._short_rows = 1
        self._long_rows = _NONE_LONG
        self._inline_rows = max(_GROWTH, INLINE_NS // max(1, engine.run_ns))
        self._workers: list[Thread] = []
        #: Batches for whichever worker is free next; never more than two for each.
        self._executions: SimpleQueue[_Execution | None] = SimpleQueue()
        self._may_look_ahead = not options.priority_levels
        #: All unanswered members in order of submission, where the order of answers is to be kept.
        self._order: deque[Work] | None = deque() if options.preserve_ordering else None
        self._unanswered = 0
        self._batches = 0
        self._flush_due = False
        self._acting = False
        self._timer: TimerHandle | None = None
        self._closed = False
        if not self._runs_inline:
            self._start_workers()
            self._look_ahead(1, engine.run_ns)

    # --- for the gateway -------------------------------------------------------------------------------------

    def submit(self, work: Work) -> None:
        """Queue a request; it is settled on a later turn of the loop, never from here.

        Raises QueueFull when a bound is reached, InvalidArgument when an input is over its largest bucket, Draining
        after ``close``; then it is never settled.
        """
        if self._closed:
            raise Draining(f"{self._name()} is being unloaded")
        plan = self._layout.plan(work.inputs)
        work.plan = (work.apart, plan) if work.apart else plan
        work.enqueued_ns = self._clock()
        full = self._planner.add(work)
        if full is not None and self._make_room():
            full = self._planner.add(work)
        if full is not None:
            raise self._queue_full(full)
        self._unanswered += 1
        if self._order is not None:
            self._order.append(work)
        self._flush_soon()

    def cancel(self, work: Work) -> None:
        """Forget a request: queued, it is dropped at once; running, its result is. Neighbours notice nothing."""
        if work.state not in (WAITING, TAKEN):
            return
        self._planner.cancel(work)
        self._unanswered -= 1
        if self._order:
            self._call_soon(self._answer_in_order)
        self._flush_soon()  # without it the others may make up a preferred size
        self._tell_idle()

    def abandon(self, why: TidegateError) -> int:
        """Answer everything that is unanswered with an error, and take nothing more. How many that were.

        Runs go on to their end, and what they give is thrown away. Members are told through a ``Work`` of its own:
        the thread of a run may still write to theirs.
        """
        self._closed = True
        members = self._planner.members()
        members += [work for work in self._order or () if work.finished_ns and work.state == TAKEN]
        for work in members:
            self.cancel(work)
        for work in members:
            self._settle(work, Work(work.inputs, work.rows, error=why, enqueued_ns=work.enqueued_ns))
        return len(members)

    def pending(self) -> int:
        """Requests that wait and have not been started."""
        return self._planner.waiting()

    def in_flight(self) -> int:
        """Members of batches that are being run (or are to be run again in parts)."""
        return self._planner.in_flight()

    def inline(self) -> bool:
        """Whether batches are run on the loop at present, but for those that are large for it."""
        return self._runs_inline

    def is_idle(self) -> bool:
        """Nothing waits, nothing runs, nothing is unanswered."""
        return not self._unanswered and self._planner.idle()

    def close(self) -> None:
        """End the worker threads, after the batches they are running. Blocks that long, so call it off the loop.

        Allowed once no request is left to answer; runs whose members were all cancelled may still be going on.
        """
        if self._planner.waiting():
            raise RuntimeError(f"{self._planner.waiting()} requests still wait: drain before closing")
        self._closed = True
        for _ in self._workers:
            self._executions.put(None)
        for thread in self._workers:
            thread.join()
        with suppress(RuntimeError):  # the loop may be closed already, and its timers with it
            self._call_soon_threadsafe(self._drop_timer)

    # --- acting on the plan ----------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        """Flush at the end of this turn of the loop, if there will be anything to do."""
        if not self._flush_due and self._planner.wants_tick():
            self._flush_due = True
            self._call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self._act(self._planner.tick(self._clock()))

    def _wake(self) -> None:
        self._timer = None
        self._act(self._planner.wake(self._clock()))

    def _make_room(self) -> bool:
        """Start or expire what can be when a bound is hit: those count as waiting who wait for a busy engine."""
        if self._acting or not self._planner.wants_tick():
            return False
        self._act(self._planner.tick(self._clock()))
        return True

    def _act(self, actions: list[Action[Work]]) -> None:
        self._acting = True
        for action in actions:
            if isinstance(action, Run):
                self._run(action)
            elif isinstance(action, WakeAt):
                self._set_timer(action.at_ns)
            else:
                self._expire(action.member, action.reason)
        self._acting = False
        self._tell_idle()

    def _set_timer(self, at_ns: int) -> None:
        self._drop_timer()
        left_ns = max(0, at_ns - self._clock())
        if self._call_later_ns is not None and left_ns < _FINE_NS:
            self._timer = self._call_later_ns(left_ns, self._wake)
        else:  # by the millisecond: less would be rounded to none, and asked for again until it has passed
            self._timer = self._call_later(-(-left_ns // 1_000_000) / 1e3, self._wake)

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell_idle(self) -> None:
        if self.on_idle is not None and self.is_idle():
            self.on_idle()

    # --- running ---------------------------------------------------------------------------------------------

    def _run(self, run: Run[Work]) -> None:
        execution = self._begin(run)
        if self._runs_inline and self._is_for_loop(run.members):
            self._execute(execution, 0)
            self._answer_all(execution, self._release(execution))
            self._flush_soon()
        else:
            self._executions.put(execution)

    def _is_for_loop(self, members: list[Work]) -> bool:
        """Whether a short model's batch is short too, and the only one that is handed out: a thread may have the other.

        Without a thread to spare, everything is.
        """
        if self._planner.running() == 1:
            rows = 0
            for work in members:
                rows += work.rows
            if rows <= self._inline_rows:
                return True
        return not self._has_workers()

    def _begin(self, run: Run[Work]) -> _Execution:
        self._batches += 1
        return _Execution(self._batches, run.slot, run.members)

    def _start_workers(self) -> None:
        """One thread per engine instance. Idempotent."""
        for instance in range(len(self._workers), self._engine.instances):
            name = f"tidegate-{self._engine.spec.name}-{instance}"
            thread = Thread(target=self._work, args=(instance,), name=name, daemon=True)
            thread.start()
            self._workers.append(thread)

    def _has_workers(self) -> bool:
        """Whether there are threads to run on; False when the system has none to spare."""
        try:
            self._start_workers()
        except RuntimeError:
            return False
        return True

    def _work(self, instance: int) -> None:
        """A worker thread: one batch after the other, one wake of the loop for each."""
        while (execution := self._executions.get()) is not None:
            self._execute(execution, instance)
            try:
                self._call_soon_threadsafe(self._finished, execution)
            except RuntimeError:
                return  # the loop is closed: nobody is left to be answered
            del execution  # an idle worker keeps no tensors

    def _execute(self, execution: _Execution, instance: int) -> None:
        """Assemble, compute, split. Never raises: the outcome is in the execution, the outputs in its members."""
        members, clock = execution.members, self._clock
        execution.instance, execution.started_ns = instance, clock()
        try:
            inputs, rows = [work.inputs for work in members], [work.rows for work in members]
            batch = self._layout.join(inputs, sum(rows))
            taps = self.taps
            batch.keep = taps is not None
            execution.rows = batch.rows
            execution.assembled_ns = clock()
            outputs = self._engine.run(instance, batch)
            execution.computed_ns = clock()
            for index, share in enumerate(self._layout.split(inputs, rows, outputs)):
                members[index].outputs = share
            if taps is not None:
                taps[instance].offer(batch.rows, batch.parts, outputs, execution.computed_ns, self.arm)
        except TidegateError as error:
            execution.error = error.with_traceback(None)  # its frames would keep the batch alive
        except MemoryError:
            execution.error = OutOfMemory(
                f"there was no memory for a batch of {len(members)} requests for {self._name()}"
            )
        except Exception as error:  # noqa: BLE001 - the engine's boundary: whatever it raises must not end the worker
            _log.error("engine_raised", **self._log_fields(), members=len(members), exc_info=error)
            execution.error = RuntimeFailure(f"the runtime of {self._name()} failed")
        execution.finished_ns = clock()

    def _finished(self, execution: _Execution) -> None:
        """A worker's batch is back on the loop: its instance goes on with the next while the members are answered."""
        members = self._release(execution)
        self._act(self._planner.tick(self._clock()))
        self._answer_all(execution, members)

    def _release(self, execution: _Execution) -> list[Work]:
        """Give the slot back, learn from the run and report it. The members to be answered."""
        if execution.error is None:
            members = self._planner.finish(execution.slot)
        else:
            members = self._planner.fail(execution.slot, divide=execution.error.divides)
        self._note_start(execution)
        record = execution.record()
        # What fails may fail at once: that says nothing of how long a good run takes, but that it may take longer does.
        if execution.error is None or record.compute_ns > self._run_ns:
            self._learn(execution.rows, record.compute_ns, execution.error is not None)
        if self._on_batch is not None:
            self._call_back(self._on_batch, record)
        return members

    def _note_start(self, execution: _Execution) -> None:
        """Its members' first start, and the sum of their waits."""
        started_ns = execution.started_ns
        for work in execution.members:
            if not work.started_ns:
                work.started_ns = started_ns
                execution.queue_ns += started_ns - work.enqueued_ns

    def _look_ahead(self, rows: int, compute_ns: int) -> None:
        """Have full batches handed out before their time, or not: as the last run was, so the next will be."""
        on_loop = self._runs_inline and rows <= self._inline_rows
        worthwhile = self._may_look_ahead and not on_loop and INLINE_NS <= compute_ns < AHEAD_NS
        self._planner.ahead = self._engine.instances if worthwhile else 0

    def _learn(self, rows: int, compute_ns: int, failed: bool) -> None:
        """Move between loop and thread as the moving estimate of the run time says (weight of the newest: 1/8).

        A run counts as at most 4 ms, so that one pause of the whole process does not move a short model. Runs of more
        rows than would be run on the loop say nothing of those that would.
        """
        self._learn_rows(rows, compute_ns, failed)
        if rows <= self._inline_rows:
            self._run_ns += (min(compute_ns, 4 * THREAD_NS) - self._run_ns) // 8
        if self._runs_inline and self._run_ns > THREAD_NS:
            if not self._has_workers():
                return  # stay on the loop
            self._runs_inline = False
        elif not self._runs_inline and self._run_ns < INLINE_NS and not self._planner.running():
            self._runs_inline = self._engine.instances == 1
        self._look_ahead(rows, compute_ns)

    def _learn_rows(self, rows: int, compute_ns: int, failed: bool) -> None:
        """How many rows may be run on the loop, if the model may be.

        Those that were short once are left to the moving estimate. More are tried a step further at a time, up to
        those that were found long; a good run of these that is short makes up for it.
        """
        if compute_ns < INLINE_NS:
            if failed or rows <= self._short_rows:
                return
            self._short_rows = rows
            if rows >= self._long_rows:
                self._long_rows = _NONE_LONG
            self._inline_rows = min(max(self._inline_rows, _GROWTH * rows), self._long_rows - 1)
        elif compute_ns > THREAD_NS and self._short_rows < rows < self._long_rows:
            self._long_rows = rows
            self._inline_rows = min(self._inline_rows, rows - 1)

    # --- answering -------------------------------------------------------------------------------------------

    def _answer_all(self, execution: _Execution, members: list[Work]) -> None:
        error, rows, count, number = execution.error, execution.rows, len(execution.members), execution.id
        assembled_ns, computed_ns = execution.assembled_ns, execution.computed_ns
        finished_ns = execution.finished_ns
        for work in members:
            work.error = error
            work.assembled_ns = assembled_ns
            work.computed_ns = computed_ns
            work.finished_ns = finished_ns
            work.batch_rows = rows
            work.batch_members = count
            work.batch_id = number
            if self._order is None:
                self._reply(work)
            else:
                self._answer_in_order()
        self._tell_idle()

    def _expire(self, work: Work, reason: Reason) -> None:
        work.finished_ns = self._clock()
        waited_us = (work.finished_ns - work.enqueued_ns) // 1000
        if reason is Reason.TIMEOUT:
            limit_us = (work.timeout_ns - work.enqueued_ns) // 1000
            work.error = QueueTimeout(
                f"Request timeout expired: waited {waited_us} us in the queue of {self._name()}, "
                f"the limit is {limit_us} us"
            )
        else:
            work.error = DeadlineExceeded(
                f"the deadline passed after {waited_us} us in the queue of {self._name()}; the request was not run"
            )
        self._answer(work)

    def _answer(self, work: Work) -> None:
        if self._order is None:
            self._reply(work)
        else:
            self._answer_in_order()

    def _answer_in_order(self) -> None:
        order = self._order
        while order and (order[0].finished_ns or order[0].state == GONE):
            self._reply(order.popleft())

    def _reply(self, work: Work) -> None:
        if work.state == TAKEN:  # else it was cancelled, perhaps by a neighbour's ``settle``
            work.state = GONE
            self._unanswered -= 1
            self._settle(work, work)

    def _settle(self, work: Work, told: Work) -> None:
        try:
            work.settle(told)
        except Exception as error:  # noqa: BLE001 - the request's boundary
            self._raised(error)

    def _call_back(self, callback: Callable[[T], None], argument: T) -> None:
        try:
            callback(argument)
        except Exception as error:  # noqa: BLE001 - the request's boundary
            self._raised(error)

    def _raised(self, error: Exception) -> None:
        """A callback that raises is a defect of its owner: logged, and kept from the neighbours."""
        _log.error("callback_raised", **self._log_fields(), exc_info=error)

    # --- words -----------------------------------------------------------------------------------------------

    def _name(self) -> str:
        return f"model '{self._engine.spec.name}' version '{self._engine.spec.version}'"

    def _log_fields(self) -> dict[str, str]:
        return {"model": self._engine.spec.name, "version": self._engine.spec.version}

    def _queue_full(self, full: Full) -> QueueFull:
        at = "" if full.level is None else f" at priority {full.level}"
        return QueueFull(
            f"Exceeds maximum queue size: {full.waiting} requests wait for {self._name()}{at}, "
            f"the limit is {full.limit}",
            retry_after_s=_RETRY_AFTER_S,
        )


def _check_levels(model: str, options: BatchingOptions) -> None:
    if options.priority_levels and not 1 <= options.default_priority_level <= options.priority_levels:
        raise ConfigError(
            f"model '{model}': default_priority_level must be between 1 and priority_levels "
            f"({options.priority_levels}), got {options.default_priority_level}"
        )
