"""Builds the object graph of one serving process from plain settings. The only place that knows every part."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from monitor import compare
from monitor.types import SHADOW
from server import __version__
from server.admin_token import load_or_make_token
from server.audit import DeferredAudit
from server.batching.batcher import Batcher, BatchRecord
from server.batching.offloop import OffLoopBatcher
from server.batching.timers import FineTimers, fine_timers
from server.capture.build import Recording, open_recording
from server.catalog import ServedCatalog
from server.codec.process.client import SUPPORTED, CodecProcess
from server.config.compile import (
    compile_gates,
    compile_retrains,
)
from server.config.model import Config
from server.config.routing import RoutingSpec, ShadowSpec
from server.config.settings import ServerSettings
from server.control.models import ModelControl
from server.control.monitored import Arms
from server.control.publishing import Publisher
from server.control.quality import LoadedVersions, QualityGates
from server.control.reload import ConfigControl
from server.control.retrains import RetrainControl, World
from server.control.rollouts.actions import Hands
from server.control.rollouts.aliases import Aliases
from server.control.rollouts.control import RolloutControl
from server.control.rollouts.levels import drift_levels
from server.control.rollouts.store import RolloutStore
from server.control.rollouts.tenure import Tenure
from server.control.shadows import ShadowLoader
from server.control.sources import Audit, ModelSource
from server.delivery import metrics as delivery_metrics
from server.delivery.build import make_sinks
from server.delivery.dispatcher import Dispatcher
from server.delivery.options import TRAINING
from server.errors import ModelLoadError, NotFound, TidegateError
from server.gates.keeper import Gatekeeper
from server.gateway import AdmissionLimits, Gateway, Served
from server.gateway.served import BatchCounts
from server.history import ConfigHistory, LastGood
from server.lifecycle import Lifecycle, Readiness
from server.listening import Admin, listeners
from server.mlflow.build import MlflowPart
from server.monitoring.alerts import AlertQueue
from server.monitoring.service import MonitorService
from server.monitoring.views import MonitorViews
from server.monitoring.watch import MonitoredRuntime, labels_of, rules_of, taps_of
from server.origins import models_of, source_of, take_mlflow, take_state, uses_registry
from server.outbox import Outbox
from server.runtime.base import Engine, ModelOptions, Runtime
from server.runtime.dispatch import DispatchRuntime
from server.runtime.onnx import OnnxRuntime
from server.runtime.upstream import UpstreamRuntime
from server.shadowing import CompareWorker, ShadowLane
from server.state import State
from server.telemetry.instruments import ModelTelemetry, Telemetry
from server.telemetry.otel import OtlpExport, OtlpOptions
from server.telemetry.snapshot import FamilySnapshot, Value
from server.telemetry.trace import SpanSink, TraceGate
from server.transport.admin import AdminViews
from server.transport.admin_retrains import RetrainViews
from server.transport.admin_rollouts import RolloutViews
from server.transport.feedback import Feedback, Hear
from server.transport.hints import RegistryHints
from server.transport.port import Services
from server.transport.settings import MemorySettings
from server.transport.status import INTERNAL, TABLE
from server.types import Unsent

log = structlog.get_logger("tidegate")


@dataclass(slots=True, frozen=True)
class ConfigFile:
    """The configuration file that the server was started with."""

    path: Path
    text: bytes
    config: Config


def build(settings: ServerSettings, file: ConfigFile | None = None, runtime: Runtime | None = None) -> Lifecycle:
    """One server, ready to run on the current event loop. Raises ConfigError for settings that cannot work."""
    loop = asyncio.get_running_loop()
    models = models_of(None if file is None else file.config, settings.model_repository)
    telemetry, export = _telemetry(settings)
    readiness = Readiness()
    timers = fine_timers(loop)
    recording = open_recording(settings.capture, settings.state_dir)
    gateway = Gateway(
        limits=settings.limits,
        admission=AdmissionLimits(max_requests=settings.max_pending),
        telemetry=telemetry,
        clock=time.monotonic_ns,
        call_soon=loop.call_soon,
        call_later=loop.call_later,
        decisions=settings.telemetry.decisions,
        capture=None if recording is None else recording.capture,
        unsent=Unsent(settings.max_unsent_bytes),
        busy_poll_ns=settings.busy_poll_ns,
    )
    gateway.starting = True
    telemetry.metrics.collect(lambda: [_in_flight(gateway), _unsent(gateway)])
    codec = CodecProcess() if settings.codec_process and SUPPORTED else None
    if codec is not None:
        telemetry.metrics.collect(codec.families)
    if recording is not None:
        telemetry.metrics.collect(recording.capture.families)
    state, deferred, audit = take_state(settings, models)
    mlflow = take_mlflow(settings, state)
    delivery = None if state is None else _delivery(settings, state, audit, telemetry)

    def alarmed(event: dict[str, Any]) -> None:
        if delivery is not None:
            delivery.alerts.put(event)
        if retrains is not None:
            retrains.on_alarm(event)

    folder = None if state is None else settings.state_dir / "monitors"
    monitors = MonitorService(folder, audit=audit, on_alarm=alarmed)
    telemetry.metrics.collect(monitors.families)
    arms = Arms(gateway, monitors)

    def published() -> None:
        arms.follow()
        readiness.changed()

    publisher = Publisher(gateway, published)
    control = ModelControl(
        source=source_of(settings, models, state, audit, mlflow),
        runtime=MonitoredRuntime(DispatchRuntime(runtime or OnnxRuntime(), UpstreamRuntime), monitors),
        gateway=gateway,
        serve=_server_of_versions(loop, timers, telemetry),
        publisher=publisher,
        forget=telemetry.forget,
        audit=audit,
        mode=settings.model_control,
        reload=settings.reload,
    )
    catalog = ServedCatalog(name=settings.name, gateway=gateway, control=control, readiness=readiness)
    shadows = _shadows(loop, control, publisher, telemetry, recording)
    publisher.follow_with(shadows.loader.follow)
    keeper = _gatekeeper(file, state, control, gateway)
    rollouts = _rollouts(settings, state, deferred, gateway, publisher, control, monitors, keeper, mlflow)
    if rollouts is not None:
        telemetry.metrics.collect(rollouts.families)
    retrains = _retrains(settings, file, state, delivery, control, gateway, rollouts, monitors, recording, mlflow)
    if retrains is not None:
        telemetry.metrics.collect(retrains.families)

    def applied(config: Config) -> None:
        if keeper is not None:
            keeper.replace_policies(compile_gates(config))
        if retrains is not None:
            retrains.replace_specs(compile_retrains(config))

    reconfigure = _reconfigure(settings, file, state, control, audit, rollouts, applied, mlflow)
    services = Services(catalog, control, MemorySettings(), readiness.subscribe, _hearing(gateway, recording))

    async def start_models() -> None:
        if mlflow is not None:
            # Takes what its aliases name, so that the first scan finds it.
            await asyncio.to_thread(mlflow.follower.start)
        if delivery is not None:
            delivery.dispatcher.start()
        await control.start(settings.load_models)
        failures = control.failures()
        if failures and not gateway.table.models:
            raise ModelLoadError("no model could be loaded: " + "; ".join(f"{f.name}: {f.reason}" for f in failures))
        if reconfigure is not None:
            await reconfigure.start()
        gateway.starting = False
        # What start-up made lives for good: keep the collector from walking it on every request's account.
        gc.collect()
        gc.freeze()
        # The usual threshold has it run every few dozen requests, to find nothing: requests leave no cycles behind.
        gc.set_threshold(10_000, 20, 20)

    async def reload() -> None:
        if reconfigure is not None:
            await reconfigure.reload()
        try:
            await control.refresh(retry_failed=True)
        except (TidegateError, OSError) as error:
            log.error("reload_failed", error=str(error))

    async def close_models() -> None:
        if retrains is not None:
            await asyncio.to_thread(retrains.close)
        if rollouts is not None:
            await rollouts.close()
        if keeper is not None:
            await asyncio.to_thread(keeper.close)
        await shadows.loader.close()
        await control.close()

    async def close() -> None:
        gateway.close()
        if codec is not None:
            await codec.close()
        if recording is not None:
            await asyncio.to_thread(recording.close)
        if mlflow is not None:
            await asyncio.to_thread(mlflow.follower.close)
        await asyncio.to_thread(shadows.worker.close)
        await asyncio.to_thread(monitors.close)
        if delivery is not None:
            await asyncio.to_thread(delivery.close)
        if export is not None:
            await asyncio.to_thread(export.close)
        if deferred is not None:
            await asyncio.to_thread(deferred.close)
        if state is not None:
            state.close()
        if timers is not None:
            timers.close()
        # What is frozen is not taken apart when the interpreter ends; libraries take that for leaks, and say so.
        gc.unfreeze()

    if export is not None:
        export.start()
    interval_s = settings.registry_poll_seconds if uses_registry(settings, models) else settings.poll_seconds
    polling = settings.model_control == "poll" or uses_registry(settings, models)
    background: list[Callable[[], Awaitable[None]]] = [control.mend]
    if polling:
        background.append(lambda: control.poll(interval_s))
        telemetry.metrics.collect(lambda: [_poll_failing(control)])
    if reconfigure is not None:
        background.append(reconfigure.watch)
    if rollouts is not None:
        background.append(rollouts.run)
    if retrains is not None:
        background.append(retrains.run)
    views = MonitorViews(monitors)
    admin = _admin(settings, state, reconfigure, shadows.loader, gateway, views, delivery, rollouts, retrains, mlflow)
    return Lifecycle(
        readiness=readiness,
        listeners=listeners(settings, gateway, services, telemetry, admin, codec),
        start_models=start_models,
        close_models=close_models,
        reload=reload,
        background=background,
        close=close,
        drain_seconds=settings.drain_seconds,
    )


def _rollout_views(rollouts: RolloutControl) -> RolloutViews:
    async def order(rollout: str, word: str, actor: str, reason: str, revision: int | None) -> dict[str, Any]:
        return await rollouts.order(rollout, word, actor=actor, reason=reason, expected=revision)

    return RolloutViews(rollouts.all, rollouts.status, order)


def _retrain_views(retrains: RetrainControl) -> RetrainViews:
    return RetrainViews(retrains.retraining.list, retrains.retraining.status, retrains.fire)


def _gatekeeper(
    file: ConfigFile | None, state: State | None, control: ModelControl, gateway: Gateway
) -> Gatekeeper | None:
    """Who judges candidates on holdout data; None without a state folder, where there are no rollouts either."""
    if state is None:
        return None
    policies = {} if file is None else compile_gates(file.config)
    versions = LoadedVersions(control.plan, gateway.served)
    return Gatekeeper(policies, versions, OnnxRuntime(measure_budget_s=0), state.audit.record)


def _retrains(
    settings: ServerSettings,
    file: ConfigFile | None,
    state: State | None,
    delivery: Delivery | None,
    control: ModelControl,
    gateway: Gateway,
    rollouts: RolloutControl | None,
    monitors: MonitorService,
    recording: Recording | None,
    mlflow: MlflowPart | None,
) -> RetrainControl | None:
    """Who asks for trainings; None without a configuration that could say when, or a state folder to remember in."""
    if file is None or state is None or delivery is None or rollouts is None:
        return None
    world = World(
        plan=control.plan,
        served=gateway.served,
        rollouts=rollouts.standing,
        monitors=monitors,
        registry=state.registry if mlflow is None else mlflow.registry,
        captured=(lambda _: ()) if recording is None else recording.paths,
        sinks=frozenset(settings.delivery.sinks),
    )
    return RetrainControl(state.store, state.audit, delivery.outbox, world, compile_retrains(file.config))


def _rollouts(
    settings: ServerSettings,
    state: State | None,
    deferred: DeferredAudit | None,
    gateway: Gateway,
    publisher: Publisher,
    control: ModelControl,
    monitors: MonitorService,
    keeper: Gatekeeper | None,
    mlflow: MlflowPart | None,
) -> RolloutControl | None:
    """Who climbs the steps of rollouts; None without a state folder to remember them in."""
    if state is None or deferred is None or keeper is None:
        return None
    hands = Hands(
        gateway=gateway,
        publisher=publisher,
        keeper=control,
        store=RolloutStore(state.store, state.audit),
        defer=deferred.record,
        load_again=control.load_again,
        mover=Aliases(state.registry) if mlflow is None else mlflow.aliases,
        quality=QualityGates(keeper),
    )
    return RolloutControl(hands, Tenure(settings.state_dir), levels=drift_levels(monitors))


@dataclass(slots=True, frozen=True)
class Delivery:
    """Events on their way to other systems: who takes alarms, who keeps them, who sends them."""

    alerts: AlertQueue
    outbox: Outbox
    dispatcher: Dispatcher

    def newest(self, limit: int) -> list[dict[str, object]]:
        """The newest deliveries."""
        return [found.as_dict() for found in self.outbox.list(limit)]

    def close(self) -> None:
        """Write what waits to be written, and send no more. Blocks for seconds at worst."""
        self.alerts.close()
        self.dispatcher.stop()


def _delivery(settings: ServerSettings, state: State, audit: Audit, telemetry: Telemetry) -> Delivery:
    sinks = make_sinks(settings.delivery.sinks, settings.state_dir / "commands")
    # What trains gets what asks for a training, by name; every other sink gets the alarms.
    listeners = [name for name, options in settings.delivery.sinks.items() if not isinstance(options, TRAINING)]
    outbox = Outbox(state.store, state.audit, sinks=listeners, limits=settings.delivery.limits)
    dispatcher = Dispatcher(outbox, sinks, retry=settings.delivery.retry)
    alerts = AlertQueue(outbox.publish, audit)

    def families() -> list[FamilySnapshot]:
        lost: dict[tuple[str, ...], Value] = {(): alerts.lost}
        text = "Alarms that did not get into the outbox."
        own = FamilySnapshot("tidegate_alerts_lost_total", text, "counter", (), lost)
        return [*delivery_metrics.families(dispatcher), own]

    telemetry.metrics.collect(families)
    return Delivery(alerts, outbox, dispatcher)


def _admin(
    settings: ServerSettings,
    state: State | None,
    reconfigure: ConfigControl | None,
    shadows: ShadowLoader,
    gateway: Gateway,
    monitors: MonitorViews,
    delivery: Delivery | None,
    rollouts: RolloutControl | None,
    retrains: RetrainControl | None,
    mlflow: MlflowPart | None,
) -> Admin:
    token = settings.admin_token
    if token is None and state is not None:
        token = load_or_make_token(settings.state_dir)
    audit = None if state is None else state.audit

    def tail(limit: int) -> list[dict[str, Any]]:
        return [row.as_dict() for row in audit.tail(limit)] if audit is not None else []

    def experiments() -> list[dict[str, Any]]:
        policies = gateway.policies.values()
        books = {policy.entry: policy.experiment for policy in policies if policy.experiment is not None}
        return [{"name": name, **asdict(book.report(time.time_ns()))} for name, book in books.items()]

    def experiment(wanted: str) -> dict[str, Any]:
        for found in experiments():
            if found["id"] == wanted:
                return found
        raise NotFound(f"there is no experiment '{wanted[:128]}'")

    views = AdminViews(
        audit=None if audit is None else tail,
        hooks=None if delivery is None else delivery.newest,
        shadows=lambda: {"shadows": shadows.report()},
        experiments=lambda: {"experiments": experiments()},
        experiment=experiment,
        monitors=monitors.all,
        monitor=monitors.one,
        monitor_sample=monitors.sample,
        rollouts=None if rollouts is None else _rollout_views(rollouts),
        retrains=None if retrains is None else _retrain_views(retrains),
        registry=None if mlflow is None else mlflow.standing,
    )
    hints = None if mlflow is None else RegistryHints(mlflow.follower.hint, mlflow.hints, token=token)
    return Admin(token, reconfigure, views, hints)


@dataclass(slots=True, frozen=True)
class Shadows:
    """Who loads shadows, and the thread that compares their answers."""

    loader: ShadowLoader
    worker: CompareWorker


def _shadows(
    loop: asyncio.AbstractEventLoop,
    control: ModelControl,
    publisher: Publisher,
    telemetry: Telemetry,
    recording: Recording | None,
) -> Shadows:
    worker = CompareWorker()
    capture = recording.capture if recording is not None and recording.settings.shadows else None

    def lane(spec: RoutingSpec, shadow: ShadowSpec) -> ShadowLane:
        def load() -> float:
            return max((load_of(s) for _, s in [publisher.find(spec.stable) or ("", None)] if s), default=0.0)

        return ShadowLane(
            None,
            budget=shadow.budget,
            compare=shadow.compare,
            telemetry=telemetry.shadow(spec.name, str(shadow.to)),
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            load=load,
            offload=worker.submit,
            traced=None if telemetry.sink is None else telemetry.sink.offer,
            captured=None if capture is None else partial(capture.offer_shadow, spec.entry),
        )

    def batcher(engine: Engine, served: Served) -> OffLoopBatcher:
        made = OffLoopBatcher(
            engine,
            served.options.batching,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )
        made.taps, made.arm = taps_of(engine), SHADOW
        return made

    async def load_again(served: Served) -> Engine:
        await asyncio.to_thread(compare.prepare)
        return await control.load_again(served)

    return Shadows(ShadowLoader(publisher, load=load_again, lane=lane, batcher=batcher), worker)


def load_of(served: Served) -> float:
    """How busy a version is, 0..1: full batches that wait, of four."""
    rows = max(1, served.spec.learned_batch_size)
    return min(1.0, served.batcher.pending() / (4 * rows))


def _reconfigure(
    settings: ServerSettings,
    file: ConfigFile | None,
    state: State | None,
    control: ModelControl,
    audit: Audit,
    rollouts: RolloutControl | None,
    applied: Callable[[Config], None],
    mlflow: MlflowPart | None,
) -> ConfigControl | None:
    """The configuration's own control; None without a file, or without a state folder to keep its history in."""
    if file is None or state is None:
        return None
    repository = settings.model_repository

    def source(config: Config) -> ModelSource:
        return source_of(settings, models_of(config, repository), state, audit, mlflow)

    return ConfigControl(
        control=control,
        history=lambda keep: ConfigHistory(state.store, state.audit, keep_texts=keep),
        last_good=LastGood(settings.state_dir),
        source=source,
        path=file.path,
        text=file.text,
        config=file.config,
        repository=repository,
        rollouts=rollouts,
        applied=applied,
    )


def _hearing(gateway: Gateway, recording: Recording | None) -> Hear:
    def one(model: str, feedback: Feedback) -> bool:
        heard = gateway.hear(
            model,
            feedback.id,
            feedback.name,
            feedback.value,
            feedback.key,
            text=feedback.text,
            row=feedback.row,
            outcome_ns=feedback.time_ns,
        )
        if recording is None or not feedback.id or feedback.value is None:
            return heard
        entry = gateway.entry(model)
        capture = recording.capture
        kept = capture.offer_label(entry, feedback.id, feedback.name, feedback.value, feedback.row, feedback.time_ns)
        return kept or heard

    def hear(model: str, items: Sequence[Feedback]) -> int:
        for item in items:  # before any is taken
            gateway.check_outcome(model, item.id, item.name, item.value, item.key, text=item.text)
        return sum([one(model, item) for item in items])

    return hear


def _in_flight(gateway: Gateway) -> FamilySnapshot:
    """The permits that are out: what the limit of admission counts."""
    held: dict[tuple[str, ...], Value] = {(): gateway.requests_in_flight}
    return FamilySnapshot("tidegate_requests_in_flight", "Requests admitted and not over yet.", "gauge", (), held)


def _unsent(gateway: Gateway) -> FamilySnapshot:
    """What the limit on answers counts."""
    held: dict[tuple[str, ...], Value] = {(): gateway.unsent.total}
    return FamilySnapshot("tidegate_unsent_bytes", "Bytes of answers that wait for their readers.", "gauge", (), held)


def _poll_failing(control: ModelControl) -> FamilySnapshot:
    """What is logged once may last."""
    failing: dict[tuple[str, ...], Value] = {(): int(bool(control.failing))}
    return FamilySnapshot(
        "tidegate_poll_failing", "1 while the models cannot be looked at again, or else 0.", "gauge", (), failing
    )


def _server_of_versions(
    loop: asyncio.AbstractEventLoop, timers: FineTimers | None, telemetry: Telemetry
) -> Callable[[Engine, ModelOptions], Served]:
    """How a loaded engine becomes something that the gateway can send requests to."""

    def serve(engine: Engine, options: ModelOptions) -> Served:
        spec = engine.spec
        counted = telemetry.model(spec.name, spec.version)
        kind = OffLoopBatcher if getattr(engine, "remote", False) else Batcher
        batcher = kind(
            engine,
            options.batching,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
            call_later_ns=None if timers is None else timers.call_later,
            on_batch=_counting(counted),
        )
        batcher.taps = taps_of(engine)
        return Served(
            spec, batcher, options, counted, telemetry.instruments, rules=rules_of(engine), labels=labels_of(engine)
        )

    return serve


def _counting(counted: ModelTelemetry) -> Callable[[BatchRecord], None]:
    return BatchCounts(counted).count


def _telemetry(settings: ServerSettings) -> tuple[Telemetry, OtlpExport | None]:
    traces = settings.telemetry.traces
    if not traces.enabled:
        return Telemetry.create(__version__), None
    sink = SpanSink()
    telemetry = Telemetry.create(__version__, TraceGate(traces.sampling), sink)
    options = OtlpOptions(
        traces.endpoint.rstrip("/").removesuffix("/v1/traces"),
        headers=traces.headers,
        service_name=traces.service_name,
        service_version=__version__,
    )
    return telemetry, OtlpExport(options, sink=sink, registry=telemetry.metrics, status_of=_wire_status)


def _wire_status(protocol: str, code: str) -> int:
    """The number that a span carries for an outcome: HTTP's or gRPC's."""
    if code == "ok":
        return 200 if protocol == "http" else 0
    row = TABLE.get(code, INTERNAL)
    return row.http if protocol == "http" else row.grpc
