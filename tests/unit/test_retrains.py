"""server.control.retrains: jobs follow what is true, also after a kill; alarms are made good; people ask."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from monitor.retrain.rules import RetrainRules, SignalRule
from router.registry.base import Version
from router.registry.manifest import DataSource, Description, Lineage, Manifest, Metric
from router.rollout.events import State as Phase
from server.control.registry import RegistryPlans
from server.control.retrains import RetrainControl, World, champion_of, drift_alarms, label_alarms, unix_ns
from server.control.rollouts.store import Standing
from server.control.sources import ModelPlan
from server.errors import FailedPrecondition, ModelNotFound, NotFound
from server.gateway import Served
from server.monitoring.service import MonitorService
from server.outbox import Limits, Outbox
from server.retraining import RetrainSpec
from server.runtime.base import ModelOptions
from server.state import State, open_state
from server.types import ModelSpec
from tests.support import models

SPEC = RetrainSpec(RetrainRules("m", labels=SignalRule(), coalesce_ns=0), ("train",))


@dataclass
class Counting:
    """As much of a batcher: what its rows are counted as."""

    arm: str = "stable"


@dataclass
class Answering:
    """As much of a served version as is looked at."""

    spec: ModelSpec
    batcher: Counting = field(default_factory=Counting)


@dataclass
class House:
    """A state folder with ``m``, whose version 1 is champion and answers; ``standing``: the rollouts there are.

    ``shop`` is another name over its versions: ``shown`` answers there, and its rows are counted as ``arm``.
    """

    root: Path
    state: State
    answers: str = "1"
    shown: str = "1"
    arm: str = "stable"
    standing: list[Standing] = field(default_factory=list)
    monitors: MonitorService = field(default_factory=lambda: MonitorService(None))
    #: So many looks fail; ``well`` is set by the second one after them, when one was right all through.
    troubles: int = 0
    well: asyncio.Event | None = None

    def control(self, *, max_pending: int = 1000, **specs: RetrainSpec) -> RetrainControl:
        """As in a process that was just started."""
        limits = Limits(max_pending=max_pending)
        outbox = Outbox(self.state.store, self.state.audit, sinks=["train"], limits=limits)
        world = World(
            self.plan, self.served, self.rollouts, self.monitors, self.state.registry,
            lambda model: (f"/captured/{model}/requests-*",), frozenset({"train"}),
        )  # fmt: skip
        return RetrainControl(self.state.store, self.state.audit, outbox, world, specs or {"m": SPEC})

    def rollouts(self) -> list[Standing]:
        self.troubles -= 1
        if self.troubles >= 0:
            raise OSError("the disk is gone")
        if self.well is not None and self.troubles < -1:
            self.well.set()
        return self.standing

    def plan(self, model: str) -> ModelPlan:
        if model != "m":
            raise ModelNotFound(model)
        return RegistryPlans(self.state.registry, self.root, lambda *_: None).by_alias("m", "m", ModelOptions())

    def served(self, model: str, _version: str) -> Served:
        if model not in ("m", "shop") or not self.answers:
            raise ModelNotFound(model)
        number, arm = (self.answers, "stable") if model == "m" else (self.shown, self.arm)
        digest = self.state.registry.version("m", int(number)).digest
        return Answering(ModelSpec("m", number, (), (), digest=digest), Counting(arm))  # type: ignore[return-value]

    def publish(self, shift: float, alias: str | None, trigger_id: str = "") -> str:
        path = models.affine(self.root / f"{shift}.onnx", 1.0, shift)
        about = Description(
            metrics=(Metric("holdout", "auc", 0.9),),
            lineage=Lineage(
                DataSource(time_range=("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z")), trigger_id=trigger_id
            ),
        )
        done = self.state.registry.publish("m", {"model.onnx": path}, about, alias=alias, actor="test")
        return str(done.version)

    def rolls(self, candidate: str, phase: Phase, reason: str = "") -> None:
        ended = phase in {Phase.FAILED, Phase.ABORTED, Phase.ROLLED_BACK}
        self.standing = [Standing("m", candidate, phase, reason, ended)]

    def audited(self, prefix: str) -> list[dict[str, Any]]:
        rows = [row.as_dict() for row in self.state.audit.tail(100)]
        return [row for row in rows if str(row["action"]).startswith(prefix)]

    def look(self, control: RetrainControl) -> tuple[str, str]:
        """State and version of the newest job after a look."""
        asyncio.run(control.look())
        job = control.retraining.list("m")[0]
        return job["state"], job["version"]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    state = open_state(tmp_path / "state")
    found = House(tmp_path, state)
    found.publish(0.0, "champion")
    yield found
    state.close()


def fire(control: RetrainControl) -> str:
    return str(asyncio.run(control.fire("m", "to see", "ada"))["trigger_id"])


@pytest.mark.parametrize("killed", [False, True])
def test_a_job_follows_its_version_to_the_top_and_back(house: House, killed: bool) -> None:
    control = house.control()
    trigger_id = fire(control)

    def look() -> tuple[str, str]:
        return house.look(house.control() if killed else control)

    assert look() == ("requested", "")
    house.publish(1.0, None)
    assert look() == ("requested", "")
    number = house.publish(2.0, None, trigger_id)
    assert look() == ("registered", number)
    house.rolls(number, Phase.PENDING, "waits for approval: no data")
    assert look() == ("registered", number)
    assert control.retraining.list("m")[0]["detail"] == "waits for approval: no data"
    house.rolls(number, Phase.STEP)
    assert look() == ("gated", number)
    house.answers = number
    house.rolls(number, Phase.PROMOTED)
    assert look() == look() == ("promoted", number)
    house.answers = "1"
    house.rolls(number, Phase.ROLLED_BACK, "worse by errors")
    assert look() == look() == ("rejected", number)
    actions = [row["action"] for row in house.audited("retrain.")]
    wanted = ["requested", "registered", "registered", "gated", "promoted", "rejected"]
    assert actions == [f"retrain.{word}" for word in wanted]


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.ABORTED, Phase.ROLLED_BACK])
def test_what_rollouts_refuse_is_rejected_and_may_come_anew(house: House, phase: Phase) -> None:
    control = house.control()
    trigger_id = fire(control)
    first = house.publish(1.0, "challenger", trigger_id)
    house.rolls(first, phase, "why it was")
    assert house.look(control) == ("rejected", first)
    assert control.retraining.list("m")[0]["detail"] == "why it was"
    second = house.publish(2.0, "challenger", trigger_id)
    assert house.look(control) == house.look(house.control()) == ("registered", second)
    house.answers = second  # by a person, without any rollout
    house.rolls(second, phase, "given up")
    assert house.look(control) == house.look(control) == ("promoted", second)
    house.answers = house.publish(3.0, "champion")
    assert house.look(control) == ("promoted", second)


def test_an_open_rollout_holds_people_back_and_nobody_else_is_asked(house: House) -> None:
    control = house.control()
    house.rolls("2", Phase.STEP)
    with pytest.raises(FailedPrecondition, match="a rollout of it is open"):
        fire(control)
    with pytest.raises(NotFound):
        asyncio.run(control.fire("other", "to see", "ada"))


def test_the_event_says_what_serves_and_where_requests_are(house: House) -> None:
    control = house.control()
    fire(control)
    (row,) = house.audited("retrain.requested")
    detail = row["detail"]
    champion = detail["champion"]
    assert (champion["version"], champion["metrics"]) == ("1", {"holdout/auc": 0.9})
    assert champion["digest"] == house.state.registry.version("m", 1).digest
    assert detail["capture"]["paths"] == ["/captured/m/requests-*"]
    assert detail["capture"]["start"].startswith("2026-02-01T00:00:00")


def test_alarms_are_taken_and_what_was_missed_is_made_good(house: House) -> None:
    control = house.control()
    gone = {"event": "performance.raised", "key": "k", "model": "m", "version": "1", "arm": "stable", "slice": "",
            "name": "auc", "value": 0.7}  # fmt: skip
    asyncio.run(control.look())
    control.on_alarm(gone)
    assert house.look(control) == ("requested", "")
    assert [alarm["cleared"] for alarm in control.retraining.status("m")["alarms"]] == [None]
    again = house.control()  # its first look asks the monitors, which have no such alarm
    asyncio.run(again.look())
    assert [alarm["cleared"] is None for alarm in again.retraining.status("m")["alarms"]] == [False]


def alarm(event: str, version: str, arm: str) -> dict[str, Any]:
    column = {"feature": "x", "segment": ""} if event.startswith("drift") else {"name": "auc", "slice": ""}
    return {"event": event, "key": "k", "model": "m", "version": version, "arm": arm, "value": 0.7, **column}


BOTH = RetrainSpec(RetrainRules("shop", drift=SignalRule(), labels=SignalRule(), coalesce_ns=0), ("train",))


@pytest.mark.parametrize(
    ("event", "version", "arm", "fires"),
    [
        ("performance.raised", "2", "stable", True),
        ("performance.raised", "1", "stable", False),
        ("performance.raised", "2", "pinned", False),
        ("drift.raised", "2", "pinned", True),
        ("drift.raised", "2", "stable", False),
        ("drift.raised", "1", "stable", False),
    ],
)
def test_a_name_over_the_versions_of_another_is_trained_for_what_answers_there(
    house: House, event: str, version: str, arm: str, fires: bool
) -> None:
    house.shown, house.arm = house.publish(1.0, "challenger"), "pinned"
    control = house.control(shop=BOTH)
    asyncio.run(control.look())
    assert control.retraining.status("shop")["champion"] == "2"
    control.on_alarm(alarm(event, version, arm))
    asyncio.run(control.look())
    assert [job["state"] for job in control.retraining.list("shop")] == (["requested"] if fires else [])


def test_a_job_of_such_a_name_follows_its_version(house: House) -> None:
    control = house.control(shop=replace(SPEC, rules=replace(SPEC.rules, model="shop")))
    trigger_id = asyncio.run(control.fire("shop", "to see", "ada"))["trigger_id"]
    number = house.publish(1.0, "challenger", trigger_id)

    def look() -> tuple[str, str]:
        asyncio.run(control.look())
        job = control.retraining.list("shop")[0]
        return job["state"], job["version"]

    assert look() == ("registered", number)
    house.rolls(number, Phase.STEP)  # under the model's own name, whose champion answers here too
    assert look() == ("gated", number)
    house.shown = number
    assert look() == ("promoted", number)


def test_an_alarm_reaches_the_model_and_every_name_that_it_answers_under(house: House) -> None:
    control = house.control(m=SPEC, shop=replace(SPEC, rules=replace(SPEC.rules, model="shop")))
    asyncio.run(control.look())
    control.on_alarm(alarm("performance.raised", "1", "stable"))
    asyncio.run(control.look())
    assert {job["model"] for job in control.retraining.list()} == {"m", "shop"}


def test_nothing_is_done_without_specs_and_after_the_end(house: House) -> None:
    control = house.control()
    control.replace_specs({})
    asyncio.run(control.look())
    assert control.retraining.list() == []
    control.replace_specs({"m": SPEC})
    trigger_id = fire(control)
    control.close()
    house.publish(1.0, None, trigger_id)
    assert house.look(control) == ("requested", "")


def test_a_spec_whose_sink_comes_with_the_next_start_waits(house: House) -> None:
    with capture_logs() as logs:
        control = house.control(m=SPEC, late=replace(SPEC, sinks=("train", "new")))
    assert list(control.retraining.specs) == ["m"]
    assert [(line["event"], line["model"]) for line in logs] == [("retrain_waits_for_restart", "late")]


def test_a_look_that_fails_is_logged_once_and_made_good(house: House) -> None:
    control = house.control()
    trigger_id = fire(control)
    number = house.publish(1.0, None, trigger_id)

    async def scenario() -> None:
        house.troubles, house.well = 2, asyncio.Event()
        running = asyncio.create_task(control.run(every_s=0.01))
        await house.well.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    with capture_logs() as logs:
        asyncio.run(asyncio.wait_for(scenario(), 20))
    job = control.retraining.list("m")[0]
    assert (job["state"], job["version"]) == ("registered", number)
    assert sum(line["event"] == "retrain_look_failed" for line in logs) == 1


def test_a_full_outbox_holds_up_nobody_elses_jobs(house: House) -> None:
    """``shop`` is due for a training, and the one that a person has asked for ``m`` fills the outbox."""
    due = replace(SPEC, rules=RetrainRules("shop", age_ns=1, coalesce_ns=0))
    control = house.control(max_pending=1, shop=due, m=SPEC)
    number = house.publish(1.0, None, fire(control))
    with capture_logs() as logs:
        for _ in range(2):
            assert house.look(control) == ("registered", number)
    assert [line["event"] for line in logs].count("retrain_not_requested") == 1
    assert control.retraining.list("shop") == []


def test_what_is_known_of_a_champion() -> None:
    bare = champion_of("3", "d", None, "profile")
    assert (bare.version, bare.digest, bare.created_ns, bare.reference) == ("3", "d", 0, "profile")
    published = Version("m", 3, "published", "2026-01-01T00:00:00Z", manifest=Manifest(()))
    assert champion_of("3", "d", published, "").digest == "published"
    assert champion_of("3", "d", published, "").created_ns == 1_767_225_600 * 10**9
    assert unix_ns("2026-01-01T00:00:00.25Z") == 1_767_225_600_250_000_000
    assert unix_ns("yesterday") == unix_ns("") == 0


def test_alarms_of_reports_are_named_as_their_events_name_them() -> None:
    score = {"column": "a", "psi": 0.3, "psi_p": 0.0, "ks_low": 0.2, "ks_p": 0.0, "rows": 100}
    window = {"arm": "stable", "window": "1h", "rows": 100, "scores": [score], "in_alarm": ["a"]}
    other = {**window, "arm": "candidate", "in_alarm": ["b"]}
    part = {"arm": "stable", "segment": "eu", "window": "1h", "in_alarm": ["c"]}
    found = drift_alarms({"windows": [window, other], "segments": [part]})
    assert found == {
        "a": {"window": "1h", "psi": 0.3, "psi_p": 0.0, "ks": 0.2, "ks_p": 0.0, "rows": 100},
        "c[eu]": {"window": "1h"},
    }
    signal = {"name": "auc", "value": 0.7, "reference": 0.9, "effect": 0.2, "p": 0.0}
    labels = {"arm": "stable", "slice": "", "window": "200rows", "signals": [signal], "in_alarm": ["auc", "bias"]}
    apart = {**labels, "slice": "eu", "in_alarm": ["auc"]}
    unlearnt = {"arm": "stable", "slice": "us", "window": "200rows"}
    assert label_alarms([labels, apart, unlearnt, {**labels, "arm": "candidate"}]) == {
        "labels": {
            "auc": {"window": "200rows", "value": 0.7, "reference": 0.9, "effect": 0.2, "p": 0.0},
            "auc[eu]": {"window": "200rows", "value": 0.7, "reference": 0.9, "effect": 0.2, "p": 0.0},
        },
        "calibration": {"bias": {"window": "200rows"}},
    }
