"""DAG runs over real sockets, against a server that behaves like Airflow 3's."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from server.audit import AuditLog
from server.delivery.airflow import PATIENCE_S, AirflowOptions, AirflowSink, run_id
from server.delivery.base import Delivered, Failed, Refused
from server.delivery.exchange import Endpoint
from server.delivery.targets import AllowList
from server.errors import ConfigError
from server.outbox import NS_PER_S, Event, Outbox
from server.store.sqlite import SqliteStore
from tests.contracts.sink_contract import Case, SinkContract, message
from tests.support.receiver import Answer, Received, Receiver, receiving, scripted

LOOPBACK = AllowList.parse(["127.0.0.0/8"])
USER, PASSWORD = "tidegate", 'pa"ss\u0436'


class Airflow:
    """Users, tokens that end, DAGs and their runs, as far as a client that starts runs sees them."""

    def __init__(self, *dags: str) -> None:
        self.dags = set(dags or ("retrain",))
        self.runs: dict[str, dict[str, object]] = {}
        self.logins = 0
        self.valid: set[str] = set()
        self.stranger = 401, b'{"detail":"Token Expired"}'
        self._numbers = count(1)
        self._lock = threading.Lock()

    def expire(self) -> None:
        """The time of all tokens is over."""
        self.valid.clear()

    def restart(self) -> None:
        """With a new key: tokens that were signed by the old one are not even old."""
        self.valid.clear()
        self.stranger = 403, b'{"detail":"Invalid JWT token"}'

    def __call__(self, got: Received) -> Answer:
        with self._lock:
            if got.path == "/airflow/auth/token":
                return self._login(json.loads(got.body))
            return self._start(got)

    def _login(self, body: dict[str, str]) -> Answer:
        self.logins += 1
        if body != {"username": USER, "password": PASSWORD}:
            return Answer(401, body=b'{"detail":"Invalid credentials"}')
        token = f"jwt-{next(self._numbers)}"
        self.valid.add(token)
        return Answer(201, body=json.dumps({"access_token": token}).encode())

    def _start(self, got: Received) -> Answer:
        if got.headers.get("authorization", "").removeprefix("Bearer ") not in self.valid:
            status, body = self.stranger
            return Answer(status, body=body)
        found = re.fullmatch("/airflow/api/v2/dags/([^/]+)/dagRuns", got.path)
        if found is None or found[1] not in self.dags:
            return Answer(404, body=b'{"detail":"DAG not found"}')
        body = json.loads(got.body)
        if "logical_date" not in body or body["logical_date"] is not None:
            return Answer(422, body=b'{"detail":[{"type":"missing","loc":["body","logical_date"]}]}')
        if body["dag_run_id"] in self.runs:
            return Answer(409, body=b'{"detail":{"reason":"Unique constraint violation"}}')
        self.runs[body["dag_run_id"]] = body["conf"]
        return Answer(200, body=json.dumps({"dag_run_id": body["dag_run_id"], "state": "queued"}).encode())


def sink(url: str, *, dag: str = "retrain", password: str = PASSWORD, timeout_s: float = 5.0) -> AirflowSink:
    return AirflowSink("ops", AirflowOptions(Endpoint(url, LOOPBACK, timeout_s), dag, USER, password))


@contextmanager
def serving(airflow: Airflow) -> Iterator[tuple[Receiver, str]]:
    with receiving() as receiver:
        receiver.answer = airflow
        yield receiver, receiver.url.replace("/hooks/a?b=c", "/airflow/")


@pytest.fixture
def airflow() -> Airflow:
    return Airflow()


@pytest.fixture
def url(airflow: Airflow) -> Iterator[str]:
    with serving(airflow) as (_, address):
        yield address


def _silent(peer: socket.socket) -> None:
    while peer.recv(65_536):
        pass


class TestAirflowSink(SinkContract):
    @contextmanager
    def case(self) -> Iterator[Case]:
        airflow = Airflow()

        def passed_on() -> list[str]:
            return [str(conf["id"]) for conf in airflow.runs.values()]

        with serving(airflow) as (_, url), scripted(_silent) as deaf:
            broken = (sink(deaf, timeout_s=0.2), sink(url, dag="nobody"), sink(url, password="wrong"))
            yield Case(sink(url), passed_on, broken)


def test_a_run_has_the_key_for_its_id_and_the_event_for_its_conf(airflow: Airflow, url: str) -> None:
    sent = message("0123abcd", psi=0.3)
    assert sink(url).send(sent) == Delivered()
    assert airflow.runs == {"0123abcd": json.loads(sent.body)}


def test_five_deliveries_are_one_run(airflow: Airflow, url: str) -> None:
    to = sink(url)
    assert [to.send(message("k")) for _ in range(5)] == [Delivered()] * 5
    assert list(airflow.runs) == ["k"]
    assert airflow.logins == 1


@pytest.mark.parametrize("end", [Airflow.expire, Airflow.restart])
def test_a_token_that_is_not_taken_any_more_is_replaced_once(
    airflow: Airflow, url: str, end: Callable[[Airflow], None]
) -> None:
    to = sink(url)
    assert to.send(message("a")) == Delivered()
    end(airflow)
    assert to.send(message("b")) == Delivered()
    assert airflow.logins == 2
    assert list(airflow.runs) == ["a", "b"]


def test_threads_that_need_a_token_at_once_ask_for_one(airflow: Airflow, url: str) -> None:
    to, barrier = sink(url), threading.Barrier(8)

    def send(number: int) -> object:
        barrier.wait()
        return to.send(message(str(number)))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(send, range(8))) == [Delivered()] * 8
    assert airflow.logins == 1
    assert len(airflow.runs) == 8


def test_a_server_that_takes_no_token_is_asked_twice_and_no_more() -> None:
    with receiving() as receiver:
        receiver.answer = lambda got: (
            Answer(201, body=b'{"access_token":"t"}') if got.path.endswith("/auth/token") else Answer(401)
        )
        to = sink(receiver.url.partition("?")[0])
        assert to.send(message()) == Failed("answered 401")
        assert to.send(message()) == Failed("answered 401")
        assert [got.path.rpartition("/")[2] for got in receiver.got] == [
            "token",
            "dagRuns",
            "dagRuns",
            "token",
            "dagRuns",
        ]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(400), Refused("answered 400: Airflow does not take the request")),
        (Answer(422), Refused("answered 422: Airflow does not take the request")),
        (
            Answer(400, body=b'{"detail":"it has import errors"}'),
            Refused("answered 400: Airflow does not take the request (it has import errors)"),
        ),
        (
            Answer(422, body=b'{"detail":[{"loc":["body"]}]}'),
            Refused("answered 422: Airflow does not take the request"),
        ),
        (Answer(400, body=b"[" * 60_000), Refused("answered 400: Airflow does not take the request")),
        (Answer(403), Failed("answered 403: user tidegate may not run DAG retrain")),
        (Answer(404), Failed("answered 404: there is no DAG retrain")),
        (Answer(500), Failed("answered 500")),
        (Answer(302, {"Location": "http://elsewhere/"}), Failed("answered 302")),
        (Answer(429, {"Retry-After": "9"}), Failed("answered 429", 9.0)),
    ],
)
def test_answers(answer: Answer, outcome: object) -> None:
    with receiving() as receiver:
        token = Answer(201, body=b'{"access_token":"t"}')
        receiver.answer = lambda got: token if got.path.endswith("/auth/token") else answer
        assert sink(receiver.url.partition("?")[0]).send(message()) == outcome


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Answer(401), Refused("no token: answered 401 to user tidegate and the password")),
        (Answer(403), Refused("no token: answered 403 to user tidegate and the password")),
        (Answer(422), Refused("no token: answered 422 to user tidegate and the password")),
        (Answer(404), Failed("no token: answered 404: no Airflow 3 whose users have passwords is at this address")),
        (Answer(503, {"Retry-After": "3"}), Failed("no token: answered 503", 3.0)),
        (Answer(201), Failed("no token: the answer holds none")),
        (Answer(201, body=b"[" * 60_000), Failed("no token: the answer holds none")),
        (Answer(201, body=b'{"access_token":7}'), Failed("no token: the answer holds none")),
        (Answer(201, body=b'{"access_token":"a\\r\\nX-Evil: 1"}'), Failed("no token: the answer holds none")),
    ],
)
def test_no_token(answer: Answer, outcome: object) -> None:
    with receiving() as receiver:
        receiver.answer = lambda _: answer
        assert sink(receiver.url.partition("?")[0]).send(message()) == outcome


@pytest.mark.parametrize("status", [403, 404])
def test_what_may_yet_come_is_waited_for_so_long_and_no_longer(status: int) -> None:
    with receiving() as receiver:
        token = Answer(201, body=b'{"access_token":"t"}')
        receiver.answer = lambda got: token if got.path.endswith("/auth/token") else Answer(status)
        options = AirflowOptions(Endpoint(receiver.url.partition("?")[0], LOOPBACK), "retrain", USER, PASSWORD)
        sent = message()
        for age_s, outcome in ((-60.0, Failed), (PATIENCE_S - 1, Failed), (PATIENCE_S, Refused)):
            now = sent.since_ns / NS_PER_S + age_s
            to = AirflowSink("ops", options, clock=partial(float, now))
            assert type(to.send(sent)) is outcome


def test_an_old_event_that_is_tried_again_has_its_patience_again(url: str, tmp_path: Path) -> None:
    options = AirflowOptions(Endpoint(url, LOOPBACK), "nobody", USER, PASSWORD)
    now = [time.time_ns()]
    to = AirflowSink("ops", options, clock=lambda: now[0] / NS_PER_S)
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        outbox = Outbox(store, AuditLog(store), sinks=["ops"], clock=lambda: now[0])
        outbox.publish(Event("io.tidegate.test", "/models/m", "m:1", "k"))

        def outcome(age_s: float) -> type:
            now[0] += int(age_s * NS_PER_S)
            lease = outbox.claim("ops", "me", 30.0, max_attempts=9)
            assert lease is not None
            found = to.send(lease.message)
            if isinstance(found, Refused):
                outbox.dead(lease, "given up")
            else:
                outbox.failed(lease, "again", 0.0)
            return type(found)

        assert [outcome(0), outcome(PATIENCE_S)] == [Failed, Refused]
        now[0] += 7 * 86_400 * NS_PER_S
        assert outbox.retry(None, actor="ann") == 1
        assert [outcome(0), outcome(PATIENCE_S - 1), outcome(1)] == [Failed, Failed, Refused]


def test_reasons_hold_no_secret(url: str) -> None:
    outcome = sink(url, password="hunter2").send(message())
    assert isinstance(outcome, Refused)
    assert "hunter2" not in outcome.reason
    assert "hunter2" not in repr(AirflowOptions(Endpoint(url, LOOPBACK), "d", "u", "hunter2"))


@pytest.mark.parametrize("key", ["fraud:7/p/stable/amount/1", "x" * 251, "a b"])
def test_keys_that_are_no_run_ids_are_hashed(key: str) -> None:
    assert re.fullmatch("[0-9a-f]{64}", run_id(key))
    assert run_id(key) == run_id(key)


@pytest.mark.parametrize("dag", ["", "a/b", "a b", "x" * 251, "\u0436"])
def test_ids_that_no_dag_has(dag: str) -> None:
    with pytest.raises(ConfigError, match="DAG"):
        AirflowOptions(Endpoint("https://airflow.example.com"), dag, "u", "p")


@pytest.mark.parametrize("rest", ["/?a=b", "/api/v2", "/team/api/v2/", "/api/v1"])
def test_addresses_that_are_not_that_of_the_page(rest: str) -> None:
    with pytest.raises(ConfigError, match=r"without /api/v2 and without a query"):
        AirflowOptions(Endpoint("https://airflow.example.com" + rest), "d", "u", "p")
