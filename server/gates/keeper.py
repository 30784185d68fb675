"""The gatekeeper: which policy a model has, loading both versions, what was found before, and the audit of it.

One evaluation runs at a time, on the caller's thread (``evaluate``) or on the keeper's own (``check``): two models are
loaded beside those that serve, and no more. Results are kept by the digests of candidate, champion, policy and data.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Protocol, TypeAlias

import structlog

from router.rollout.quality import Finding, Status, missing
from server.audit import AuditEvent
from server.config.gates import GatePolicy
from server.errors import InvalidArgument, ModelLoadError, NotFound, TidegateError
from server.gates.evaluation import Contest, Progress, judge
from server.gates.holdout import digest_files, read_holdout
from server.gates.outcome import GateOutcome
from server.gates.running import Pace
from server.runtime.base import Engine, LoadRequest, Runtime
from server.types import ModelSpec

log = structlog.get_logger("gates")

#: Outcomes kept; the oldest go.
MOST_KEPT: Final = 64
ACTOR: Final = "tidegate"

#: Digests of candidate, champion, policy and data.
_Key: TypeAlias = tuple[str, str, str, str]


@dataclass(slots=True, frozen=True)
class Found:
    """A version that can be loaded. ``digest`` pins its bytes; ``declared``: the signature that it came with."""

    name: str
    digest: str
    request: LoadRequest
    declared: ModelSpec | None = None


class Versions(Protocol):
    """Where versions come from. Blocks."""

    def find(self, model: str, reference: str) -> Found:
        """The version meant by ``7`` or ``@champion``. Raises NotFound when there is none, or ModelLoadError."""
        ...


class Gatekeeper:
    """``policies`` by model. ``record`` takes audit events; it may fail, which is logged and changes nothing.

    Without it nothing is told to anybody but the caller.
    """

    def __init__(
        self,
        policies: Mapping[str, GatePolicy],
        versions: Versions,
        runtime: Runtime,
        record: Callable[[AuditEvent], object] | None = None,
        *,
        progress: Progress = lambda _: None,
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._policies = dict(policies)
        self._versions = versions
        self._runtime = runtime
        self._record = record
        self._progress = progress
        self._now = now
        self._kept: OrderedDict[_Key, tuple[Mapping[str, object], tuple[Finding, ...]]] = OrderedDict()
        self._one_at_a_time = threading.Lock()
        self._stopped = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gates")

    def covers(self, model: str) -> bool:
        """Whether the model has a policy; without one ``evaluate`` is undecided."""
        return model in self._policies

    def replace_policies(self, policies: Mapping[str, GatePolicy]) -> None:
        """Those of a new configuration, for evaluations that begin from now on."""
        self._policies = dict(policies)

    async def check(self, model: str, version: str, against: str = "@champion") -> GateOutcome:
        """``evaluate`` on the keeper's own thread. Cancelling it leaves the evaluation to its time limit."""
        work = partial(self.evaluate, model, version, against)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def evaluate(self, model: str, version: str, against: str = "@champion") -> GateOutcome:
        """Judge a version (``7`` or ``@challenger``) beside another one. Blocks; never raises a TidegateError."""
        with self._one_at_a_time:
            outcome = self._evaluate(model, version, against)
        if self._record is not None:
            self._tell(self._record, outcome)
        return outcome

    def stop(self) -> None:
        """Call off what is going on, at its next batch, and whatever comes. Does not wait."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and wait for it. Idempotent."""
        self.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)

    # -- one evaluation -------------------------------------------------------------------------------------------

    def _evaluate(self, model: str, version: str, against: str) -> GateOutcome:
        outcome = GateOutcome(model, version.removeprefix("@"), (), against=against)
        policy = self._policies.get(model)
        if policy is None:
            return replace(outcome, findings=(missing("policy", "gate policy for this model"),))
        pace = Pace(self._now() + policy.time_limit if policy.time_limit else 0, self._now, self._stopped.is_set)
        outcome = replace(outcome, policy=policy.digest())
        try:
            candidate = self._versions.find(model, version)
        except TidegateError as error:
            return replace(outcome, findings=(missing("load", f"version that can be had: {error.message}"),))
        champion, why = self._champion(model, against)
        outcome = replace(
            outcome,
            version=candidate.name,
            candidate=candidate.digest,
            champion="" if champion is None else champion.digest,
            against="" if champion is None else champion.name,
        )
        try:
            self._progress("holdout")
            sha256 = digest_files(policy.paths())
            return self._on_data(outcome, policy, candidate, champion, why, sha256, pace)
        except InvalidArgument as error:
            return replace(outcome, findings=(Finding("holdout", Status.UNDECIDED, f"not decidable: {error}"),))

    def _champion(self, model: str, against: str) -> tuple[Found | None, str]:
        """Who is compared with; or what there is none of."""
        try:
            return self._versions.find(model, against), ""
        except NotFound:
            return None, f"champion: {model} has no version {against}"
        except TidegateError as error:
            return None, f"champion to compare with: {error.message}"

    def _on_data(
        self, outcome: GateOutcome, policy: GatePolicy, candidate: Found, champion: Found | None, why: str,
        sha256: str, pace: Pace,
    ) -> GateOutcome:  # fmt: skip
        key = (outcome.candidate, outcome.champion, outcome.policy, sha256)
        if (kept := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return replace(outcome, data=kept[0], findings=kept[1])
        holdout = read_holdout(policy, sha256)
        outcome = replace(outcome, data=holdout.told())
        with ExitStack() as loaded:
            try:
                ours = loaded.enter_context(self._loaded(candidate))
                theirs, why = self._beside(loaded, champion, why)
            except ModelLoadError as error:
                return replace(outcome, findings=(Finding("load", Status.FAILED, error.message),))
            except MemoryError:
                return replace(outcome, findings=(missing("load", "memory for both models"),))
            request = candidate.request
            contest = Contest(ours, theirs, why, candidate.declared, request.options.warmup, request.folder)
            findings = tuple(judge(contest, policy, holdout, pace, self._progress))
        if not (self._stopped.is_set() or (pace.until and self._now() >= pace.until)):
            self._keep(key, outcome.data, findings)
        return replace(outcome, findings=findings)

    def _beside(self, loaded: ExitStack, champion: Found | None, why: str) -> tuple[Engine | None, str]:
        """The champion's engine; or what there is none of."""
        if champion is None:
            return None, why
        try:
            return loaded.enter_context(self._loaded(champion)), ""
        except ModelLoadError as error:
            return None, f"champion to compare with: {error.message}"

    @contextmanager
    def _loaded(self, version: Found) -> Iterator[Engine]:
        """An engine for as long as it is needed. Raises ModelLoadError or MemoryError."""
        self._progress(f"loading {version.name}")
        engine = self._runtime.load(version.request)
        try:
            yield engine
        finally:
            engine.close()

    def _keep(self, key: _Key, data: Mapping[str, object], findings: tuple[Finding, ...]) -> None:
        self._kept[key] = (data, findings)
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)

    @staticmethod
    def _tell(record: Callable[[AuditEvent], object], outcome: GateOutcome) -> None:
        event = event_of(outcome)
        log.info("gate_evaluated", subject=event.subject, status=outcome.status.value, reason=outcome.reason)
        try:
            record(event)
        except TidegateError as error:
            log.error("gate_not_recorded", subject=event.subject, error=error.message)


def event_of(outcome: GateOutcome, actor: str = ACTOR) -> AuditEvent:
    """``gate.passed``, ``gate.failed`` or ``gate.undecided`` of ``model:version``, with all findings."""
    subject = f"{outcome.model}:{outcome.version}"
    return AuditEvent(actor, f"gate.{outcome.status.value}", subject, outcome.to_json())
