"""A candidate that fails everything: callers are answered, every attempt counts, and retries stay within their budget.

The candidate is on an upstream of the test's own, which sees each attempt: a request carries its number in ``x``.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.support import metrics
from tests.support.fast import ask_grpc_all, ask_http, by_user
from tests.support.routed import Place, eventually
from tests.support.server import Server
from tests.support.upstream import Upstream, refusing, scaled, upstream
from tests.support.v2 import call, tensor

BUDGET_WINDOW_S = 10.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def configured(place: Place, candidate: Upstream, weight: str, resilience: str, more: str = "") -> str:
    """Version 1 is a file and stable, version 2 the upstream's and the candidate."""
    return (
        "apiVersion: tidegate/v1\nmodels:\n  m:\n    versions:\n"
        f'      "1": {{source: {place.root}/v1.onnx}}\n'
        f'      "2": {{upstream: {{url: "http://{candidate.address}", timeout: 5s}}}}\n'
        '    stable: "1"\n    key: {from: [header:x-user]}\n'
        f'    rollout: {{id: r1, candidate: "2", weight: {weight}}}\n'
        f"    resilience: {{{resilience}}}\n{more}"
    )


@contextmanager
def served(place: Place, text: str) -> Iterator[Server]:
    place.path.write_text(text)
    with place.serve() as server:
        yield server


def attempts(server: Server, version: str) -> dict[str, float]:
    """Attempts of one version by how they ended."""
    found: dict[str, float] = {}
    for labels, ended in metrics.samples(server, "tidegate_attempts_total").items():
        if f'version="{version}"' in labels:
            code = labels.partition('code="')[2].partition('"')[0]
            found[code] = found.get(code, 0) + ended
    return found


class Numbered:
    """A caller on one connection whose requests carry numbers of their own. ``sent``: (monotonic seconds, number)."""

    def __init__(self, server: Server, model: str = "m") -> None:
        host, _, port = server.http.rpartition(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=30)
        self._path = f"/v2/models/{model}/infer"

    def ask(self, number: int) -> int:
        """The status of one request."""
        body = json.dumps({"inputs": [tensor("x", "FP32", [1, 4], [number, 0, 0, 0])]}).encode()
        self._connection.request("POST", self._path, body, {"x-user": f"u{number}"})
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def close(self) -> None:
        self._connection.close()


def run_numbered(server: Server, seconds: float, threads: int) -> tuple[list[float], list[int]]:
    """Ask for so long: when each request began, by its number, and the statuses."""
    began: dict[int, float] = {}
    statuses: list[int] = []
    until = time.monotonic() + seconds

    def caller(first: int) -> None:
        with closing(Numbered(server)) as asking:
            for number in count(first, threads):
                if time.monotonic() >= until:
                    return
                began[number] = time.monotonic()
                statuses.append(asking.ask(number))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(caller, range(threads)))
    return [began[number] for number in sorted(began)], statuses


def retries_of(candidate: Upstream) -> list[float]:
    """When each request was tried again: every time after the first that its number was seen."""
    seen: set[float] = set()
    again = []
    for at, rows in list(candidate.asked):
        number = float(rows[0, 0])
        if number in seen:
            again.append(at)
        seen.add(number)
    return again


def check_budget(began: list[float], again: list[float], share: float, floor: int) -> None:
    """In every window that ends with a retry, retries are within ``share`` of its requests, or ``floor``.

    Requests are timed by their callers and retries where they arrive, so windows of requests are taken generously.
    """
    slack_s = 1.0
    for last in again:
        retries = sum(last - BUDGET_WINDOW_S < at <= last for at in again)
        requests = sum(last - BUDGET_WINDOW_S - slack_s < at <= last for at in began)
        assert retries <= max(floor, share * requests), (retries, requests)


@pytest.mark.parametrize("status", [500, 503])
def test_with_a_fallback_every_caller_is_answered_and_every_attempt_counted(place: Place, status: int) -> None:
    retry = "retry: {on: [unavailable, runtime_failure], max: 3, budget: 10%, min_concurrency: 3}"
    users = [f"user-{n}" for n in range(600)]
    with (
        upstream(scaled(3)) as candidate,
        served(place, configured(place, candidate, "50%", f"fallback: stable, {retry}")) as server,
    ):
        theirs = [went.version == "2" for went in ask_http(server, by_user(users))]
        assert attempts(server, "2") == {"ok": sum(theirs)}
        healthy = len(candidate.asked)
        candidate.behave = refusing(status)
        for went in (ask_http(server, by_user(users)), ask_grpc_all(server, by_user(users))):
            assert {one.version for one in went} == {"1"}
            assert [one.reason == "fallback" for one in went] == theirs
        code = {500: "runtime_failure", 503: "upstream_unavailable"}[status]
        assert attempts(server, "2") == {"ok": sum(theirs), code: 2 * sum(theirs)}
        assert len(candidate.asked) - healthy == 2 * sum(theirs), "a fallback makes no retries"
        requests = metrics.samples(server, "tidegate_request_duration_seconds_count")
        assert all('code="ok"' in labels for labels, ended in requests.items() if ended)


def test_retries_stay_within_their_budget_in_a_burst(place: Place) -> None:
    retry = "retry: {on: [unavailable], max: 3, budget: 10%, min_concurrency: 3}"
    with (
        upstream(refusing(503)) as candidate,
        served(place, configured(place, candidate, "100%", f"fallback: none, {retry}")) as server,
    ):
        began, statuses = run_numbered(server, 3, 4)
        again = retries_of(candidate)
        assert set(statuses) == {503}
        assert len(candidate.asked) == len(began) + len(again) == sum(attempts(server, "2").values())
        assert 0.08 * len(began) <= len(again) <= max(3, 0.1 * len(began)), (len(began), len(again))
        check_budget(began, again, 0.1, 3)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_retries_stay_within_their_budget_in_any_ten_seconds(place: Place) -> None:
    """Load that comes and goes: a busy time must not be borrowed from by the quiet one after it."""
    retry = "retry: {on: [unavailable], max: 10, budget: 10%, min_concurrency: 3}"
    with (
        upstream(refusing(503)) as candidate,
        served(place, configured(place, candidate, "100%", f"fallback: none, {retry}")) as server,
    ):
        began: list[float] = []
        start, pause = time.monotonic(), threading.Event()
        with closing(Numbered(server)) as asking:
            while (passed := time.monotonic() - start) < 32:
                began.append(time.monotonic())
                asking.ask(len(began))
                pause.wait(0.002 if int(passed) // 4 % 2 == 0 else 0.2)
        again = retries_of(candidate)
        assert len(candidate.asked) == len(began) + len(again)
        assert len(again) > 30
        check_budget(began, again, 0.1, 3)


def test_a_quiet_model_may_retry_as_often_as_is_said(place: Place) -> None:
    retry = "retry: {on: [unavailable], max: 10, budget: 10%, min_concurrency: 3}"
    with (
        upstream(refusing(503)) as candidate,
        served(place, configured(place, candidate, "100%", f"fallback: none, {retry}")) as server,
    ):
        with closing(Numbered(server)) as asking:
            assert [asking.ask(number) for number in range(5)] == [503] * 5
        assert len(retries_of(candidate)) == 3
        assert len(candidate.asked) == 8


def test_a_batch_that_an_upstream_refuses_is_not_multiplied(place: Place) -> None:
    """Requests that are batched for an overloaded upstream cost it no more exchanges than there are requests."""
    with (
        upstream(refusing(503), max_batch_size=32) as candidate,
        served(place, configured(place, candidate, "100%", "fallback: none")) as server,
    ):
        start = threading.Barrier(32)

        def ask(number: int) -> list[int]:
            with closing(Numbered(server)) as caller:
                start.wait(20)
                return [caller.ask(number) for _ in range(10)]

        with ThreadPoolExecutor(32) as pool:
            statuses = [status for some in pool.map(ask, range(32)) for status in some]
        assert statuses == [503] * 320
        assert sum(attempts(server, "2").values()) == 320
        assert max(len(rows) for _, rows in candidate.asked) > 1, "nothing was batched"
        assert len(candidate.asked) <= 320


# -- breakers --------------------------------------------------------------------------------------------------------

BREAKER = "fallback: stable, breaker: {window: 10s, min: 5, open_at: 50%, open_for: 60s, half_open: 1}"


def test_an_open_breaker_keeps_a_failing_candidate_alone(place: Place) -> None:
    users = [f"user-{n}" for n in range(200)]
    with upstream(refusing(500)) as candidate, served(place, configured(place, candidate, "50%", BREAKER)) as server:
        went = ask_http(server, by_user(users))
        assert {one.version for one in went} == {"1"}
        assert len(candidate.asked) == 5 == sum(attempts(server, "2").values())


def test_another_name_for_the_same_versions_leaves_their_breaker_alone(place: Place) -> None:
    users = [f"user-{n}" for n in range(100)]
    other = "  search:\n    model: m\n    key: {from: [header:x-user]}\n"
    with (
        upstream(refusing(500)) as candidate,
        served(place, configured(place, candidate, "50%", BREAKER, other)) as server,
    ):
        assert {one.version for one in ask_http(server, by_user(users))} == {"1"}
        assert len(candidate.asked) == 5, "the breaker of m stays m's, whatever search says"


def test_a_reload_of_something_else_leaves_an_open_breaker_open(place: Place) -> None:
    users = [f"user-{n}" for n in range(100)]
    with upstream(refusing(500)) as candidate:
        text = configured(place, candidate, "50%", BREAKER)
        with served(place, text) as server:
            ask_http(server, by_user(users))
            assert len(candidate.asked) == 5
            place.apply(server, text + f"  n:\n    source: {place.root}/v3.onnx\n")
            assert {one.version for one in ask_http(server, by_user(users))} == {"1"}
            assert len(candidate.asked) == 5


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_candidate_that_hangs_costs_its_callers_one_attempts_time(place: Place) -> None:
    """Each attempt is bounded, its late answer is thrown away, and it counts as the candidate's failure."""
    go = threading.Event()

    def hang(x: object) -> bytes:
        go.wait(30)
        return b""

    resilience = "timeout: 100ms, fallback: stable, breaker: {window: 10s, min: 5, open_at: 50%, open_for: 60s}"
    with upstream(hang) as candidate, served(place, configured(place, candidate, "100%", resilience)) as server:
        for n in range(12):
            status, body, headers = call(
                server.http, "POST", "/v2/models/m/infer", {"inputs": [tensor("x", "FP32", [1, 4], [n, 0, 0, 0])]}
            )
            assert (status, headers["x-tidegate-reason"]) == (200, "fallback"), body
            assert body["outputs"][0]["data"][0] == 2.0 * n
        assert attempts(server, "2") == {"version_timeout": 5}
        eventually(lambda: attempts(server, "1") == {"ok": 12})
        go.set()
