"""Admission, the current routing table with its policies, and the way into a call. Implements ``server.types.Port``.

Everything here runs on the loop thread; engines run behind the batcher. The table and the policies are swapped
together, and a call keeps what it was routed with until it ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import getrandbits
from time import time_ns
from typing import Any, cast

import structlog
from xxhash import xxh3_64_intdigest

from router.decision import RouteDecision, RouteQuery
from router.errors import BadVersion, RoutingError, UnknownModel, UnknownVersion
from router.experiment import ExperimentBooks
from router.policy.sticky import position, seed_of
from router.table import RoutingTable
from router.types import ModelRoutes
from server.batching.batcher import CallLater, CallSoon, Work
from server.errors import (
    Draining,
    InvalidArgument,
    ModelNotFound,
    ModelNotReady,
    TidegateError,
    TooManyRequests,
    VersionNotFound,
)
from server.gateway.call import Call
from server.gateway.deadlines import Deadlines
from server.gateway.decisions import DecisionLog
from server.gateway.policy import Answered, FeedbackIndex, ModelPolicy
from server.gateway.polling import BusyPoll
from server.gateway.served import CapturePort, Labels, Served
from server.gateway.tracing import SampledRequests, beside
from server.telemetry.instruments import Telemetry
from server.telemetry.trace import RequestTrace, TraceContext
from server.types import Clock, InferenceRequest, Permit, Port, Reply, RequestHead, RequestLimits, Ticket, Unsent

log: Any = structlog.get_logger("gateway")

_UNKNOWN_SIZE_BYTES = 1024 * 1024
_STARTING = "the server is starting"


@dataclass(slots=True, frozen=True)
class AdmissionLimits:
    """How much may be in flight in the whole process; over it a request is refused before its body is read."""

    max_requests: int = 4096
    max_bytes: int = 2 * 1024 * 1024 * 1024
    retry_after_s: float = 1.0


class GatewayPermit(Permit):
    """A place among the requests in flight, with the bytes it may hold."""

    __slots__ = ("_bytes", "_gateway", "_released", "head", "tidegate_id", "trace")

    def __init__(
        self, head: RequestHead, tidegate_id: str, trace: TraceContext | None, gateway: Gateway, size: int
    ) -> None:
        self.head = head
        self.tidegate_id = tidegate_id
        self.trace = trace
        self._gateway = gateway
        self._bytes = size
        self._released = False

    @property
    def traceresponse(self) -> str | None:
        """The ``traceresponse`` header of a sampled request."""
        return None if self.trace is None else self.trace.header()

    def hold(self, size: int) -> None:
        """Bodies that do not say how long they are are counted as they come, and as they go. Raises TidegateError."""
        declared = self.head.content_length
        more = max(size, _UNKNOWN_SIZE_BYTES if declared is None else declared) - self._bytes
        if more and not self._released:
            self._gateway.take_more(more)
            self._bytes += more

    def of_message(self) -> GatewayPermit:
        """Stands for it in one message of a stream, where each has a span of its own: the first has the stream's."""
        if self.trace is None:
            return self
        message = GatewayPermit(self.head, self.tidegate_id, self.trace, self._gateway, 0)
        message._released = True  # it has no place of its own
        self.trace = beside(self.trace)
        return message

    def release(self) -> None:
        """Give the place back. Twice is harmless."""
        if not self._released:
            self._released = True
            self._gateway.give_back(self._bytes)


class Gateway(Port):
    """Admission, routing table, calls. Implements ``server.types.Port``.

    ``decisions``: how many of 10,000 routing decisions are logged. ``capture``: who records requests that are over.
    ``unsent``: what the connections hold of answers, counted by them. ``busy_poll_ns``: see ``polling``; 0: never.
    """

    def __init__(
        self,
        *,
        limits: RequestLimits,
        admission: AdmissionLimits,
        telemetry: Telemetry,
        clock: Clock,
        call_soon: CallSoon,
        call_later: CallLater,
        decisions: int = 0,
        capture: CapturePort | None = None,
        unsent: Unsent | None = None,
        busy_poll_ns: int = 0,
    ) -> None:
        self.limits = limits
        self.admission = admission
        self.unsent = unsent or Unsent()
        self.telemetry = telemetry
        self.clock = clock
        self.deadlines = Deadlines(clock, call_later)
        self.capture = capture
        self._sampled = SampledRequests(telemetry, call_soon)
        self.table: RoutingTable[Served] = RoutingTable({}, 0)
        #: What surrounds the decisions of public names that say anything about it.
        self.policies: dict[str, ModelPolicy] = {}
        #: None: no decision is logged.
        self.decisions = DecisionLog(decisions) if decisions else None
        self.feedback = FeedbackIndex()
        #: Models known but not served: name -> why (loading, failed...). Kept by the control.
        self.unready: dict[str, str] = {}
        #: Not everything that the server is to serve has been named and loaded yet: what is unknown is not ready.
        self.starting = False
        self._requests = 0
        self._bytes = 0
        self._closed = False
        self._id_prefix = os.urandom(8).hex() + "-"
        self._ids = 0
        self._alone_from = 0  # the id of the request that came when none was in flight
        self._poll = BusyPoll(busy_poll_ns, clock, call_soon) if busy_poll_ns else None

    # -- admission ----------------------------------------------------------------------------------------------

    def admit(self, head: RequestHead) -> GatewayPermit:
        """Take or refuse from the head alone. Raises TidegateError naming the limit or the model."""
        if self._closed:
            raise self.refuse(Draining("the server is shutting down", retry_after_s=self.admission.retry_after_s))
        if self._requests >= self.admission.max_requests:
            raise self.refuse(
                TooManyRequests(
                    f"{self._requests} requests are in flight, the limit is {self.admission.max_requests}",
                    retry_after_s=self.admission.retry_after_s,
                )
            )
        if self.unsent.total > self.unsent.limit:
            raise self.unread()
        size = _UNKNOWN_SIZE_BYTES if head.content_length is None else head.content_length
        if self._bytes + size > self.admission.max_bytes:
            raise self._too_many_bytes(size)
        if head.model:
            self._check(head.model, head.version)
        self._requests += 1
        self._bytes += size
        self._ids += 1
        if self._requests == 1 and self._poll is not None:
            self._alone_from = self._ids
            self._poll.came()
        gate = self.telemetry.gate
        trace = None if gate is None else gate.start(head.traceparent, head.metadata)
        return GatewayPermit(head, f"{self._id_prefix}{self._ids}", trace, self, size)

    def take_more(self, size: int) -> None:
        """A request that was admitted holds so much more than before, or less. Raises TidegateError."""
        if size > 0 and self._bytes + size > self.admission.max_bytes:
            raise self._too_many_bytes(size)
        self._bytes += size

    def _too_many_bytes(self, size: int) -> TidegateError:
        return self.refuse(
            TooManyRequests(
                f"requests in flight hold {self._bytes} bytes, {size} more would pass the limit of "
                f"{self.admission.max_bytes}",
                retry_after_s=self.admission.retry_after_s,
            )
        )

    def unread(self) -> TidegateError:
        """The refusal, counted, while too much of what was answered waits for its readers."""
        return self.refuse(
            TooManyRequests(
                f"{self.unsent.total} bytes of answers wait for their readers, the limit is {self.unsent.limit}",
                retry_after_s=self.admission.retry_after_s,
            )
        )

    def refuse(self, error: TidegateError) -> TidegateError:
        """Count a refusal by its reason, once."""
        if not error.counted:
            error.counted = True
            self.telemetry.rejected(error.code).inc()
        return error

    def give_back(self, size: int) -> None:
        """A permit was released."""
        self._requests -= 1
        self._bytes -= size
        if self._requests == 0 and self._poll is not None:
            self._poll.emptied(self._alone_from == self._ids)

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    def close(self) -> None:
        """Refuse everything from now on; what is in flight goes on."""
        self._closed = True

    # -- the use case -------------------------------------------------------------------------------------------

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply, received_ns: int = 0) -> Ticket:
        """Route, check, batch and run one request. Never raises: every outcome reaches ``reply``."""
        held = cast("GatewayPermit", permit)
        if received_ns:
            held = held.of_message()
        else:
            received_ns = held.head.received_ns
        call = Call(self, held, request, reply, received_ns)
        call.start()
        return call

    def route(self, request: InferenceRequest, head: RequestHead) -> RouteDecision[Served]:
        """The version that answers this request."""
        if not request.version:
            plain = self.table.plain(request.model)
            if plain is not None:
                return plain
        query = RouteQuery(request.model, request.version, head.metadata, request.parameters, request.id)
        try:
            return self.table.resolve(query, getrandbits(64))
        except RoutingError as error:
            raise self._translate(error) from None

    def _translate(self, error: RoutingError) -> TidegateError:
        if isinstance(error, BadVersion):
            return InvalidArgument(
                f"version of model '{_shown(error.model)}' must be a positive whole number, "
                f"got '{_shown(error.version)}'"
            )
        if isinstance(error, UnknownVersion):
            if self.starting:
                return self._not_ready(f"model '{_shown(error.model)}' version {error.version}", _STARTING)
            served = ", ".join(error.served)
            return VersionNotFound(
                f"Request for unknown model: '{_shown(error.model)}' version {error.version} is not found; "
                f"versions served: {served}"
            )
        if isinstance(error, UnknownModel):
            reason = self.unready.get(error.model, _STARTING if self.starting else None)
            if reason is not None:
                return self._not_ready(f"model '{_shown(error.model)}'", reason)
            return ModelNotFound(f"Request for unknown model: '{_shown(error.model)}' is not found")
        return InvalidArgument(str(error))

    def _not_ready(self, what: str, reason: str) -> ModelNotReady:
        return ModelNotReady(f"{what} is not ready: {reason}", retry_after_s=self.admission.retry_after_s)

    def routes(self, model: str) -> ModelRoutes[Served]:
        """Routes of one model, or ModelNotFound / ModelNotReady."""
        try:
            return self.table.routes(model)
        except RoutingError as error:
            raise self._translate(error) from None

    def served(self, model: str, version: str) -> Served:
        """One served version; "" means the stable one. Nothing is routed."""
        try:
            return self.table.lookup(model, version)
        except RoutingError as error:
            raise self._translate(error) from None

    # -- experiments --------------------------------------------------------------------------------------------

    def unit_of(self, route: RouteDecision[Served], tidegate_id: str) -> int:
        """What was drawn, and is counted by experiments: the key's hash, or the request's where there was none."""
        return route.key_hash or xxh3_64_intdigest(tidegate_id.encode())

    def expose(self, books: ExperimentBooks, route: RouteDecision[Served], tidegate_id: str, request_id: str) -> None:
        """A counted decision of an experiment: book it, log it once per unit and day, remember it for feedback."""
        unit = self.unit_of(route, tidegate_id)
        if books.expose(route.arm, unit, time_ns()):
            log.info(
                "exposure", experiment=books.spec.id, model=route.public_name, arm=route.arm, unit=f"{unit:016x}",
                propensity=route.propensity, generation=route.generation,
            )  # fmt: skip
        answered, entry = Answered(books, unit), self.entry(route.public_name)
        self.feedback.add(entry, tidegate_id, answered)
        if request_id:
            self.feedback.add(entry, request_id, answered)

    def hear(
        self,
        model: str,
        request_id: str,
        name: str,
        value: float | None,
        key: str = "",
        *,
        text: str = "",
        row: int = 0,
        outcome_ns: int | None = None,
    ) -> bool:
        """Feedback about a row of an answered request, or about a key: to the labels and to the experiment.

        ``value``: the outcome as a number, None when it is none; ``text``: as it was said, if that was text. ``name``
        "": the label, or the experiment's only outcome. ``outcome_ns``: when it was, in wall time, if that was said.
        False when nobody takes it: it came too late, or nobody remembers the request. What the labels take they join by
        and by, or count as unknown. Raises ModelNotFound, ModelNotReady, or InvalidArgument for an outcome that the
        experiment does not know and the labels do not take.
        """
        routes = self.routes(model)
        labelled = bool(request_id) and self._label(routes, request_id, row, value, text, name, outcome_ns)
        labelled = self._judged(model, request_id, name, value) or labelled
        try:
            counted = self._count_outcome(model, routes, request_id, name, value, key, text)
        except InvalidArgument:
            # The labels knew it and had no room for it, or no use: it was dropped and counted, and its name is right.
            if not labelled and not self._for_labels(routes, request_id, name, value, text):
                raise
            return labelled
        return labelled or counted

    def _judged(self, model: str, request_id: str, name: str, value: float | None) -> bool:
        """Give an outcome to the gates of the rollout that runs, if it is one that they look at."""
        policy = self.policies.get(model)
        if policy is None or policy.rollout is None or value is None:
            return False
        return policy.rollout.hear(request_id, name, value)

    def check_outcome(
        self, model: str, request_id: str, name: str, value: float | None, key: str = "", *, text: str = ""
    ) -> None:
        """Raises what ``hear`` would raise, and takes nothing: so a list is taken whole or not at all."""
        routes = self.routes(model)
        if self._for_labels(routes, request_id, name, value, text):
            return
        if value is None:
            raise InvalidArgument(
                f"'outcome' as text must be a number, true, false, yes, no or a class of the labels, got '{text[:64]}'"
            )
        self._experiment_of(model, routes, request_id, name, key)

    def _for_labels(
        self, routes: ModelRoutes[Served], request_id: str, name: str, value: float | None, text: str
    ) -> bool:
        """Whether this is an outcome that the labels look at: text only when it is one of their classes."""
        return bool(request_id) and any(
            labels.wants(name) if value is not None else labels.takes(text, name) for labels in self._labels(routes)
        )

    @staticmethod
    def _labels(routes: ModelRoutes[Served]) -> Iterable[Labels]:
        """The labels of every model that answers under these routes."""
        served = [*routes.versions.values()]
        if routes.split is not None:
            served += [arm.to.target for arm in routes.split.arms]
        return {id(one.labels.labels): one.labels for one in served if one.labels is not None}.values()

    def _label(
        self,
        routes: ModelRoutes[Served],
        request_id: str,
        row: int,
        value: float | None,
        text: str,
        name: str,
        outcome_ns: int | None,
    ) -> bool:
        """Give an outcome to all of them."""
        now_ns = time_ns()
        taken = [
            labels.label(request_id, row, value, text, name, now_ns, outcome_ns) for labels in self._labels(routes)
        ]
        return any(taken)

    def _count_outcome(
        self,
        model: str,
        routes: ModelRoutes[Served],
        request_id: str,
        name: str,
        value: float | None,
        key: str,
        text: str,
    ) -> bool:
        if value is None:
            raise InvalidArgument(f"'outcome' as text must be a number, true, false, yes or no, got '{text[:64]}'")
        found = self._experiment_of(model, routes, request_id, name, key)
        if found is None:
            return False
        books, unit, known_name = found
        try:
            return books.outcome(known_name, unit, value, time_ns())
        except ValueError as error:
            raise InvalidArgument(str(error)) from None

    def _experiment_of(
        self, model: str, routes: ModelRoutes[Served], request_id: str, name: str, key: str
    ) -> tuple[ExperimentBooks, int, str] | None:
        """The experiment that an outcome is for, its unit, and its name there; None: for none that is known.

        Raises InvalidArgument for a name that the experiment does not have.
        """
        answered = self.feedback.find(self.entry(model), request_id) if request_id else None
        policy = self.policies.get(model)
        if answered is not None:
            books, unit = answered.experiment, answered.unit
        elif key and policy is not None and policy.experiment is not None and routes.split is not None:
            books, unit = policy.experiment, position(key, seed_of(routes.split.id, routes.split.secret))
        else:
            return None
        names = [outcome.name for outcome in books.spec.outcomes]
        if not name and len(names) == 1:
            name = names[0]
        if name not in names:
            known = ", ".join(names) or "none"
            raise InvalidArgument(f"outcome must be one of {known} for model '{model}', got '{name[:64]}'")
        return books, unit, name

    def entry(self, name: str) -> str:
        """What a public name is a name of: an alias's own model, else itself."""
        policy = self.policies.get(name)
        return name if policy is None else policy.entry or name

    def remember(
        self, labels: Labels, route: RouteDecision[Served], work: Work, tidegate_id: str, request_id: str
    ) -> None:
        """Keep an answer until its label comes."""
        unit = self.unit_of(route, tidegate_id)
        outputs = work.outputs or ()
        labels.answered((tidegate_id, request_id), route.arm, work.rows, work.inputs, outputs, unit, time_ns())

    # -- publishing ---------------------------------------------------------------------------------------------

    def _check(self, model: str, version: str) -> None:
        """Could a request for this be answered, as far as its head tells?"""
        try:
            self.table.check(model, version)
        except RoutingError as error:
            raise self.refuse(self._translate(error)) from None

    def traced(self, record: RequestTrace, work: Work | None) -> None:
        """Hand on the record of a sampled request that is over."""
        self._sampled.add(record, work)

    def publish(self, table: RoutingTable[Served], policies: Mapping[str, ModelPolicy] | None = None) -> None:
        """Swap the routing table, and with it the policies (None: those stay). What is in flight finishes as it is.

        What is told of a version's queue is what waits where the table leads, whatever else was loaded of it since.
        """
        self.table = table
        for routes in table.models.values():
            for served in routes.versions.values():
                served.telemetry.stats.pending = served.batcher.pending
        if policies is not None:
            self.policies = dict(policies)
        self.telemetry.instruments.config_generation.labels("applied").set(table.generation)


def _shown(name: str) -> str:
    """A caller's own words, cut to a length that may be echoed."""
    return name if len(name) <= 128 else f"{name[:128]}..."
