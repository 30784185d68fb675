"""One request from ``handle`` to its single end, over as many attempts as its policy allows.

Who takes a request settles it exactly once: it ends by an answer, by its own error, by its deadline or by a cancel,
whichever comes first. Every attempt is counted when it ends, before a retry or a fallback is decided, so that a
fallback never hides what a candidate did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from router.breaker import REFUSED, Breaker
from router.decision import RouteDecision
from router.retry import Next
from router.types import ShadowRoute
from server.batching.batcher import Work
from server.batching.planner import NEW
from server.checks import check_request, queue_terms
from server.codec.classification import classify
from server.errors import DeadlineExceeded, InvalidArgument, ModelNotReady, TidegateError, VersionTimeout
from server.gateway.deadlines import Timed
from server.gateway.ends import NO_TRIAL
from server.gateway.policy import ModelPolicy, outcome_of
from server.gateway.served import Served
from server.gateway.tracing import record_of
from server.types import (
    WRITING,
    InferenceRequest,
    InferenceResponse,
    ModelSpec,
    Reply,
    RequestedOutput,
    Tensor,
    Ticket,
)

if TYPE_CHECKING:
    from server.gateway.core import Gateway, GatewayPermit

log: Any = structlog.get_logger("gateway")

#: Timers of the loop are true to about a millisecond.
_TIMER_SLACK_NS = 2_000_000
#: Answers up to this size are given even where no more may wait for their readers: sockets take them.
_LARGE_BYTES = 64 * 1024
#: Refusals of a version's own queue, counted beside those of admission.
_SHED = frozenset({"queue_full", "queue_timeout"})


class Attempt(Work):
    """One version's try at a request. From its start to its end it holds its version, and the one it may fall back to.

    So a reload cannot close under a request what its own table promised it. ``begun_ns`` is 0 where nobody asks for it.
    """

    __slots__ = ("begun_ns", "call", "decision", "picked", "route", "served", "term")

    def __init__(self, call: Call, route: RouteDecision[Served], term: int, now: int) -> None:
        super().__init__([], 0)
        self.call = call
        self.route = route
        self.served = route.target
        self.decision = self.served.decision(route)
        self.term = term
        self.begun_ns = now
        self.picked: list[int] | None = None
        self.served.calls += 1
        if route.fallback is not None:
            route.fallback.target.calls += 1

    @property
    def work(self) -> Work | None:
        """Itself, once its version's batcher has taken it."""
        return None if self.state == NEW else self

    def settle(self, told: Work) -> None:
        self.call.ran(self, told)

    def release(self) -> None:
        """Let go of what it holds."""
        self.served.release()
        if self.route.fallback is not None:
            self.route.fallback.target.release()


class Call(Timed, Ticket):
    """A request in flight. ``cancel`` after the end is harmless.

    It is counted by what its caller is told: an answer that the transport cannot write ends it by an error.
    """

    __slots__ = ("_attempt", "_done", "_gateway", "_permit", "_policy", "_received_ns", "_reply", "_request",
                 "_retries", "_shadows")  # fmt: skip

    def __init__(
        self, gateway: Gateway, permit: GatewayPermit, request: InferenceRequest, reply: Reply, received_ns: int
    ) -> None:
        super().__init__()
        self._received_ns = received_ns
        self._gateway = gateway
        self._permit = permit
        self._request = request
        self._reply = reply
        self._done = False
        self._retries = 0
        self._policy: ModelPolicy | None = None
        self._attempt: Attempt | None = None
        #: Who is to get a copy of the request and of what the version that was chosen for it answers.
        self._shadows: tuple[ShadowRoute[Served], ...] = ()

    def start(self) -> None:
        """Route and make the first attempt. Never raises: whatever goes wrong ends the call."""
        try:
            route = self._gateway.route(self._request, self._permit.head)
            decisions = self._gateway.decisions
            if decisions is not None:
                tidegate_id = self._permit.tidegate_id
                decisions.note(route, tidegate_id, self._gateway.unit_of(route, tidegate_id))
            policy = self._policy = self._gateway.policies.get(route.public_name)
            if policy is not None:
                self._shadows = route.shadows
                self._take_policy(policy, route)
            self._try(route)
        except TidegateError as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged, no text to the caller
            self._crashed(error)

    def cancel(self) -> None:
        """The caller went away: queued work is dropped, running work's result is thrown away. No reply follows."""
        if not self._done:
            self._withdraw("cancelled")
            self._finish_books("cancelled")
            if self._shadows:
                self._shadow(None)
        elif self._attempt is not None:
            self.written("cancelled")

    def written(self, code: str) -> None:
        """The transport is done with an answer that took its time: "ok", or what the caller was told instead."""
        attempt = self._attempt
        if self._done and attempt is not None:
            self._attempt = None
            self._answered(attempt, attempt, code)

    # -- attempts -----------------------------------------------------------------------------------------------

    def _take_policy(self, policy: ModelPolicy, route: RouteDecision[Served]) -> None:
        policy.budget.request(self._gateway.clock())
        if policy.experiment is not None and route.counted:
            self._gateway.expose(policy.experiment, route, self._permit.tidegate_id, self._request.id)

    def _set_timer(self, now: int) -> None:
        """Arm the timer of the next attempt: by the caller's deadline or the policy's limit, whichever is earlier."""
        self._gateway.deadlines.discard(self)
        limit_ns = 0 if self._policy is None else self._policy.timeout_ns
        until = self._permit.head.deadline_ns
        if limit_ns:
            until = min(until, now + limit_ns) if until else now + limit_ns
        if until:
            if until <= now:
                when = "the request arrived" if self._attempt is None else "another attempt was to begin"
                raise DeadlineExceeded(f"the deadline had passed when {when}")
            self._gateway.deadlines.add(self, until, now)

    def _try(self, route: RouteDecision[Served]) -> None:
        """Begin an attempt, on stable when this version's breaker is open. Raises what a bad request deserves."""
        if self._policy is None and not self._permit.head.deadline_ns:
            term, now = 1, 0  # nothing limits its time or refuses its version
        else:
            now = self._gateway.clock()
            self._set_timer(now)
            term = self._admitted(route, now)
        if term == REFUSED:
            instead = route.fall_back()
            if instead is None:
                raise ModelNotReady(
                    f"model '{route.model}' version {route.version} fails too often and is given a rest",
                    retry_after_s=self._gateway.admission.retry_after_s,
                )
            route = instead
            term = self._admitted(route, now) or 1
        before, attempt = self._attempt, Attempt(self, route, term, now)
        self._attempt = attempt
        if before is not None:  # only now: a try that could not begin leaves its request counted where the last one was
            before.release()
        attempt.served.routed(route.arm, route.reason)
        try:
            self._submit(attempt)
        except TidegateError as error:
            self._attempt_ended(attempt, error.code)
            self._after_failure(attempt, error)

    def _admitted(self, route: RouteDecision[Served], now: int) -> int:
        breaker = self._breaker(route.target)
        return 1 if breaker is None else breaker.admit(now)

    def _breaker(self, served: Served) -> Breaker | None:
        return None if self._policy is None else self._policy.breaker(served)

    def _submit(self, attempt: Attempt) -> None:
        request, spec = self._request, attempt.served.spec
        attempt.inputs, attempt.rows, attempt.picked = check_request(request, spec)
        rules = attempt.served.rules
        if rules is not None and (wrong := rules.refusal(request.inputs)) is not None:
            raise InvalidArgument(f"model '{spec.name}' refuses the request: {wrong}")
        attempt.deadline_ns = self._permit.head.deadline_ns
        if request.parameters:
            attempt.priority, attempt.timeout_us = queue_terms(request.parameters)
        if self._policy is not None and self._policy.rollout is not None:
            attempt.apart = self._policy.rollout.lane(attempt.route.arm)
        attempt.served.batcher.submit(attempt)

    def ran(self, attempt: Attempt, work: Work) -> None:
        """The batcher is done with this attempt."""
        if self._done or self._attempt is not attempt:
            return
        if work.outputs is None:
            error = work.error or TidegateError("internal error")
            self._attempt_ended(attempt, error.code)
            self._after_failure(attempt, error)
            return
        self._attempt_ended(attempt, "ok")
        unsent = self._gateway.unsent
        if unsent.total > unsent.limit and _size(work.outputs) > _LARGE_BYTES:
            self._end(self._gateway.unread())  # it was admitted before answers that nobody reads had filled their room
            return
        try:
            response = self._respond(attempt, work.outputs)
        except TidegateError as error:
            self._end(error)
            return
        self._answer(attempt, work, response)

    def _after_failure(self, attempt: Attempt, error: TidegateError) -> None:
        """Retry, fall back, or tell the caller."""
        if self._done:
            return  # by an answer to another call, given while this one was being queued
        try:
            again = self._next(attempt, error)
            if again is None:
                self._end(error)
            else:
                self._try(again)
        except TidegateError as final:
            self._end(final)
        except Exception as crash:  # noqa: BLE001 - the boundary of one request: logged, no text to the caller
            self._crashed(crash)

    def _next(self, attempt: Attempt, error: TidegateError) -> RouteDecision[Served] | None:
        policy = self._policy
        if policy is None:
            return None
        following = policy.next(attempt.route, error.code, self._retries, self._gateway.clock())
        if following is Next.RETRY:
            self._retries += 1
            return attempt.route
        return attempt.route.fall_back() if following is Next.FALLBACK else None

    def _attempt_ended(self, attempt: Attempt, code: str) -> None:
        """Count one attempt, before anything else is decided about the request."""
        route, served, policy = attempt.route, attempt.served, self._policy
        served.attempted(route.arm, code)
        if policy is None:
            return
        now = self._gateway.clock()
        breaker = self._breaker(served)
        if breaker is not None and breaker.settle(attempt.term, outcome_of(code, route), now):
            state = breaker.state.value
            log.warning("breaker", name=route.public_name, model=route.model, version=route.version, state=state)
        if not route.counted:
            return
        if policy.rollout is not None and not self._retries:
            policy.rollout.attempt(route.arm, route.key_hash, code, attempt.work)
        if policy.experiment is not None and code not in NO_TRIAL:
            unit = self._gateway.unit_of(route, self._permit.tidegate_id)
            policy.experiment.attempt(route.arm, unit, code != "ok", now - attempt.begun_ns)

    # -- the end ------------------------------------------------------------------------------------------------

    def _answer(self, attempt: Attempt, work: Work, response: InferenceResponse) -> None:
        self._done = True
        if self.turn_ns:
            self._gateway.deadlines.discard(self)
        self._attempt = None
        self._reply.message(response, attempt.decision)
        code = self._reply.finish(None)
        if code is None:
            self._answered(attempt, work, "ok")
        elif code == WRITING:
            self._attempt = attempt  # it holds its version on: the counts of one that is closed are forgotten
        else:
            self._answered(attempt, work, code)

    def _answered(self, attempt: Attempt, work: Work, code: str) -> None:
        """The caller has the answer, or the error that came in its place."""
        self._count(attempt, code)
        attempt.release()
        self._capture(attempt, work, code)
        if code != "ok":
            if self._shadows:
                self._shadow(None)
            return
        policy = self._policy
        if policy is not None and policy.rollout is not None and attempt.route.counted:
            route = attempt.route
            policy.rollout.answered(route.arm, self._permit.tidegate_id, self._request.id, route.key_hash)
        if attempt.served.labels is not None:
            self._gateway.remember(
                attempt.served.labels, attempt.route, work, self._permit.tidegate_id, self._request.id
            )
        if self._shadows:
            self._shadow(work if attempt.route.shadows else None)  # a fallback's answer is not the primary's

    def _shadow(self, work: Work | None) -> None:
        """Offer the sampled copies of what the primary has answered. None: it has not, and nothing can be compared."""
        policy = self._policy
        if policy is None:
            return
        for shadow in self._shadows:
            lane = policy.lane(shadow)
            if lane is None:
                continue
            if work is None:
                lane.primary_failed()
            else:
                lane.offer(self._permit.tidegate_id, work, self._permit.trace, self._request.id)

    def _end(self, error: TidegateError) -> None:
        """End with an error, if not ended yet."""
        if not self._done:
            attempt = self._attempt
            work = None if attempt is None else attempt.work
            self._finish_books(error.code)
            self._reply.finish(error)
            if attempt is not None:
                self._capture(attempt, work, error.code)
            if self._shadows:
                self._shadow(None)

    def _capture(self, attempt: Attempt, work: Work | None, status: str) -> None:
        """Offer a request that is over to who records them. A request that no version tried is not recorded."""
        gateway = self._gateway
        if gateway.capture is None:
            return
        inputs = [] if work is None else work.inputs
        outputs = work.outputs if work is not None and status == "ok" else None
        gateway.capture.offer(
            gateway.entry(attempt.route.public_name), self._request.id, self._permit.tidegate_id, attempt.decision,
            attempt.served.spec, inputs, outputs, status, gateway.clock() - self._received_ns,
        )  # fmt: skip

    def _crashed(self, error: Exception) -> None:
        log.error("request_failed", id=self._permit.tidegate_id, model=self._request.model, exc_info=error)
        self._end(TidegateError(f"internal error, id {self._permit.tidegate_id}"))

    def expired(self) -> None:
        """The caller's time is up, or this attempt's."""
        attempt, deadline_ns = self._attempt, self._permit.head.deadline_ns
        if self._done or attempt is None:
            return
        if deadline_ns and self._gateway.clock() >= deadline_ns - _TIMER_SLACK_NS:
            self._withdraw("deadline_exceeded")
            self._end(DeadlineExceeded("the deadline passed before the model had answered"))
            return
        self._withdraw("version_timeout")
        limit_ms = 0 if self._policy is None else self._policy.timeout_ns // 1_000_000
        late = f"model '{attempt.route.model}' version {attempt.route.version} did not answer within {limit_ms} ms"
        self._after_failure(attempt, VersionTimeout(late))

    def _withdraw(self, code: str) -> None:
        """Take the attempt in flight back from its batcher."""
        attempt = self._attempt
        if attempt is not None and attempt.work is not None:
            attempt.served.batcher.cancel(attempt.work)
            self._attempt_ended(attempt, code)

    def _respond(self, attempt: Attempt, outputs: list[Tensor]) -> InferenceResponse:
        spec, request = attempt.served.spec, self._request
        if attempt.picked is not None:
            pairs = zip(attempt.picked, request.outputs, strict=True)
            outputs = [_chosen(outputs[i], spec, i, want) for i, want in pairs]
        return InferenceResponse(attempt.route.public_name, spec.version, request.id, outputs)

    def _finish_books(self, code: str) -> None:
        """Everything that the end of a request without an answer owes, whichever end it was."""
        self._done = True
        if self.turn_ns:
            self._gateway.deadlines.discard(self)
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            self._gateway.telemetry.rejected(code).inc()
            return
        if code in _SHED:
            self._gateway.telemetry.rejected(code).inc()
        self._count(attempt, code)
        attempt.release()

    def _count(self, attempt: Attempt, code: str) -> None:
        head, work, trace = self._permit.head, attempt.work, self._permit.trace
        now = self._gateway.clock()
        queue_ns = input_ns = infer_ns = output_ns = rows = 0
        if work is not None and work.computed_ns:
            queue_ns = work.started_ns - work.enqueued_ns
            input_ns = work.assembled_ns - work.started_ns
            infer_ns = work.computed_ns - work.assembled_ns
            output_ns = work.finished_ns - work.computed_ns
            rows = work.rows or 1
        attempt.served.telemetry.request_done(
            attempt.decision.arm, head.protocol, code, now - self._received_ns,
            queue_ns, input_ns, infer_ns, output_ns, rows, trace,
        )  # fmt: skip
        if trace is not None:
            record = record_of(
                head, self._received_ns, self._permit.tidegate_id, trace, attempt.decision, work, code, now
            )
            self._gateway.traced(record, work)


def _size(outputs: list[Tensor]) -> int:
    """Bytes of what they contain."""
    return sum([sum(map(len, one.data)) if isinstance(one.data, list) else len(one.data) for one in outputs])


def _chosen(tensor: Tensor, spec: ModelSpec, index: int, want: RequestedOutput) -> Tensor:
    if not want.classification:
        return tensor
    return classify(tensor, want.classification, spec.outputs[index].labels, batched=spec.max_batch_size > 0)
