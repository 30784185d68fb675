"""DAG runs of a real Airflow 3: once for each event, with tokens that end, and what becomes of requests it refuses."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from server.audit import AuditLog
from server.delivery.airflow import PATIENCE_S, AirflowOptions, AirflowSink, run_id
from server.delivery.backoff import RetryPolicy
from server.delivery.base import Delivered
from server.delivery.dispatcher import Dispatcher
from server.delivery.exchange import Endpoint
from server.delivery.targets import AllowList
from server.outbox import Delivery, Event, Outbox
from server.store.sqlite import SqliteStore
from tests.contracts.sink_contract import message
from tests.support import models
from tests.support.airflow_server import LOOKER, PASSWORD, USER, AirflowServer
from tests.support.cli import cli
from tests.support.server import ROOT, serving

#: The first one installs Airflow where that has not been done, which takes a minute or two.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RETRY = RetryPolicy(first_s=0.2, cap_s=1.0, max_attempts=1000)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AirflowServer]:
    server = AirflowServer(tmp_path_factory.mktemp("airflow"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


def sink(
    airflow: AirflowServer,
    *,
    dag: str = "retrain",
    user: str = USER,
    password: str = PASSWORD,
    clock: Callable[[], float] = time.time,
) -> AirflowSink:
    endpoint = Endpoint(airflow.url, AllowList.parse(["127.0.0.1"]))
    return AirflowSink("airflow", AirflowOptions(endpoint, dag, user, password), clock=clock)


def event(key: str) -> Event:
    return Event("io.tidegate.retrain.requested.v1", "/models/m", "m:1", key, {"trigger_id": key})


@contextmanager
def outbox_of(root: Path, to: AirflowSink) -> Iterator[tuple[Outbox, AuditLog]]:
    """An outbox whose events are on their way to the sink."""
    with closing(SqliteStore(root / "tidegate.db")) as store:
        audit = AuditLog(store)
        outbox = Outbox(store, audit, sinks=[to.name])
        dispatcher = Dispatcher(outbox, [to], retry=RETRY, poll_s=0.1)
        dispatcher.start()
        try:
            yield outbox, audit
        finally:
            assert dispatcher.stop(20)


def delivery(outbox: Outbox, wanted: Callable[[Delivery], bool], seconds: float = 60) -> Delivery:
    """The only delivery, once it is as ``wanted``."""
    end = time.monotonic() + seconds
    while not wanted(outbox.list(1)[0]):
        assert time.monotonic() < end, outbox.list(1)
        time.sleep(0.05)  # the store tells nobody
    (found,) = outbox.list(2)
    return found


def test_two_deliveries_are_one_run_with_the_event_for_its_conf(airflow: AirflowServer) -> None:
    sent = message("once", psi=0.3, text="\u043a\u043b\u044e\u0447")
    assert [sink(airflow).send(sent), sink(airflow).send(sent)] == [Delivered(), Delivered()]
    (run,) = [run for run in airflow.runs("retrain") if run["dag_run_id"] == "once"]
    assert run["conf"] == json.loads(sent.body)
    assert run["logical_date"] is None
    airflow.until(lambda: airflow.trained("once"))
    assert airflow.trained("once") == [json.loads(sent.body)]


def test_a_token_that_has_ended_is_replaced(airflow: AirflowServer) -> None:
    to = sink(airflow)
    assert to.send(message("early")) == Delivered()
    token = airflow.token(USER)  # younger than the one that the sink has
    airflow.until(lambda: airflow.ask("GET", "dags", token=token)[0] == 401)
    assert to.send(message("late")) == Delivered()
    assert {run["dag_run_id"] for run in airflow.runs("retrain")} >= {"early", "late"}


def test_a_wrong_password_is_a_dead_letter_that_says_so(airflow: AirflowServer, tmp_path: Path) -> None:
    with outbox_of(tmp_path, sink(airflow, password="hunter2")) as (outbox, audit):
        outbox.publish(event("locked-out"))
        found = delivery(outbox, lambda one: one.state == "dead")
        assert (found.attempts, found.error) == (1, "no token: answered 401 to user tidegate and the password")
        assert [row.event.action for row in audit.tail(9)] == ["hook.dead"]


@pytest.mark.parametrize(
    ("dag", "user", "error"),
    [
        ("nobody", USER, "answered 404: there is no DAG nobody (Dag with dag_id: 'nobody' not found)"),
        ("retrain", LOOKER, "answered 403: user looker may not run DAG retrain (Forbidden)"),
    ],
)
def test_what_may_yet_come_is_waited_for_and_then_a_dead_letter(
    airflow: AirflowServer, tmp_path: Path, dag: str, user: str, error: str
) -> None:
    later_s = [0.0]
    to = sink(airflow, dag=dag, user=user, clock=lambda: time.time() + later_s[0])
    with outbox_of(tmp_path, to) as (outbox, _):
        outbox.publish(event("refused"))
        assert delivery(outbox, lambda one: one.attempts > 1).state in ("pending", "leased")
        later_s[0] = PATIENCE_S
        assert delivery(outbox, lambda one: one.state == "dead").error == error


def test_a_key_that_is_no_run_id_for_airflow_is_sent_as_its_hash(airflow: AirflowServer) -> None:
    status, answer = airflow.ask("POST", "dags/retrain/dagRuns", {"dag_run_id": "a/b", "logical_date": None})
    assert (status, "does not match regex" in answer["detail"]) == (400, True)
    assert sink(airflow).send(message("a/b")) == Delivered()
    assert run_id("a/b") in {run["dag_run_id"] for run in airflow.runs("retrain")}


def test_a_paused_dag_takes_the_run_and_starts_it_later(airflow: AirflowServer) -> None:
    assert sink(airflow, dag="resting").send(message("patient")) == Delivered()
    assert sink(airflow, dag="resting").send(message("patient")) == Delivered()
    assert [run["state"] for run in airflow.runs("resting")] == ["queued"]
    assert airflow.trained("patient") == []
    assert airflow.ask("PATCH", "dags/resting", {"is_paused": False})[0] == 200
    airflow.until(lambda: [run["state"] for run in airflow.runs("resting")] == ["success"])
    assert len(airflow.trained("patient")) == 1


CONFIG = """\
apiVersion: tidegate/v1
registry: {{embedded: true, poll_interval: 200ms}}
alerts:
  sinks:
    airflow:
      airflow: {{url: "{url}", dag: retrain, username: {user}, password: "${{PASSWORD}}", allow: [127.0.0.1]}}
models:
  m: {{retrain: {{on: {{}}, sinks: [airflow]}}}}
"""


def test_a_gateway_asks_and_sees_the_version_that_the_dag_has_published(airflow: AirflowServer, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first, then = (models.affine(tmp_path / f"{scale}.onnx", scale) for scale in (1.0, 2.0))
    cli("registry", "publish", "m", str(first), "--state-dir", str(state), "--alias", "champion")
    publish = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "server", "registry", "publish", "m", str(then)]
    publish += ["--state-dir", str(state), "--description", str(airflow.out / "about.json"), "--alias", "champion"]
    (airflow.out / "publish").write_text(json.dumps(publish))
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(url=airflow.url, user=USER))
    with serving(str(config), "--state-dir", str(state), env={"PASSWORD": PASSWORD}) as server:
        token = (state / "admin-token").read_text().strip()
        ask = ["--url", f"http://{server.admin}", "--token", token, "--json"]
        job = json.loads(cli("retrain", "m", "--reason", "a new season", *ask).stdout)

        def became() -> str:
            (found,) = json.loads(cli("retrain", "m", "--list", *ask).stdout)
            return str(found["state"])

        airflow.until(lambda: became() == "promoted")
    (run,) = airflow.trained(job["trigger_id"])
    assert run["data"]["trigger_id"] == run["id"] == job["trigger_id"]


def test_an_airflow_that_was_down_gets_the_run_and_its_new_key_is_no_trouble(
    airflow: AirflowServer, tmp_path: Path
) -> None:
    to = sink(airflow)
    assert to.send(message("before")) == Delivered()
    airflow.stop()
    with outbox_of(tmp_path, to) as (outbox, _):
        outbox.publish(event("through"))
        waiting = delivery(outbox, lambda one: one.attempts > 2 and bool(one.error))
        assert waiting.error == "no connection: Connection refused"
        airflow.start()
        assert delivery(outbox, lambda one: one.state == "delivered").error == ""
    assert sum(run["dag_run_id"] == "through" for run in airflow.runs("retrain")) == 1
    airflow.until(lambda: airflow.trained("through"))
