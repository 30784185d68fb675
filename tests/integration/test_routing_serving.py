"""Routing from outside: splits, stickiness, shadows, experiments and reloads of a live server, over both protocols."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from server._pb import feedback_pb2
from tests.support import models
from tests.support.cli import cli
from tests.support.routed import Place, X, ask, ask_grpc, canary, eventually, shadow_report
from tests.support.server import Server
from tests.support.v2 import call


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_canary_is_sticky_on_both_protocols_and_only_grows(place: Place) -> None:
    place.write(canary("20%"))
    users = [f"user-{n}" for n in range(400)]
    with place.serve() as server, grpc.insecure_channel(server.grpc) as channel:
        first = {user: ask(server, user)[0] for user in users}
        assert {user: ask_grpc(channel, user) for user in users} == first
        share = Counter(first.values())["2"] / len(users)
        assert 0.12 < share < 0.29
        status, answer, _ = place.admin(server, "POST", "config", place.text(canary("50%")).encode())
        assert status == 200, answer
        second = {user: ask(server, user)[0] for user in users}
        assert all(second[user] == "2" for user in users if first[user] == "2")
        assert 0.4 < Counter(second.values())["2"] / len(users) < 0.6
        generation = answer["generation"]
        assert ask(server, "anybody")[2] == generation
    with place.serve() as again:
        assert {user: ask(again, user)[0] for user in users} == first


def test_rules_come_first_and_explain_themselves(place: Place) -> None:
    place.write('    rules:\n      - {name: testers, match: {header: {x-tester: "yes"}}, to: "3"}\n' + canary("1%"))
    with place.serve() as server:
        _, _, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-tester": "yes"})
        assert (headers["x-tidegate-version"], headers["x-tidegate-reason"]) == ("3", "testers")
        _, _, headers = call(server.http, "POST", "/v2/models/m/versions/2/infer", {"inputs": X})
        assert (headers["x-tidegate-version"], headers["x-tidegate-arm"]) == ("2", "pinned")
        assert headers["x-tidegate-reason"] == "version"


def test_changes_need_the_token_and_the_generation(place: Place) -> None:
    place.write(canary("10%"))
    with place.serve() as server:
        text = place.text(canary("11%")).encode()
        assert call(server.admin, "POST", "/admin/v1/config", text)[0] == 401
        assert oct((place.state / "admin-token").stat().st_mode & 0o777) == "0o600"
        status, current, headers = place.admin(server, "GET", "config")
        assert status == 200
        assert current == place.path.read_bytes()
        generation = headers["etag"].strip('"')
        results = [
            place.admin(server, "POST", "config", text, If_Match=generation, x_tidegate_actor=f"op{n}")[0]
            for n in range(2)
        ]
        assert results == [200, 412]
        status, history, _ = place.admin(server, "GET", "config/history")
        assert status == 200
        actors = [row["actor"] for row in history["history"]]
        assert actors[:2] == ["op0", "tidegate"]
        status, plan, _ = place.admin(server, "POST", "config?dry_run=1", place.text(canary("30%")).encode())
        assert status == 200
        assert plan["plan"]["movements"] if "plan" in plan else plan["movements"]
        status, same, _ = place.admin(server, "POST", "config", text)
        assert (status, same["generation"]) == (200, int(generation) + 1)
        before = ask(server, "u")[2]
        status, answer, _ = place.admin(server, "POST", f"config:rollback?to={generation}")
        assert status == 200, answer
        assert ask(server, "u")[2] == answer["generation"] > before
        moved = place.text(canary("10%").replace("r1", "r2")).encode()
        assert place.admin(server, "POST", "config", moved)[0] == 400
        allowed = place.text("    reshuffle: true\n" + canary("10%").replace("r1", "r2")).encode()
        assert place.admin(server, "POST", "config", allowed)[0] == 200
        assert place.admin(server, "POST", f"config:rollback?to={generation}")[0] == 200


BAD = [
    "nonsense: [",
    "apiVersion: tidegate/v1\nmodels: {m: {sorce: x}}\n",
]


def test_good_and_bad_reloads_under_load_lose_nothing(place: Place) -> None:
    place.write(canary("50%"))
    with place.serve() as server:
        seen: list[tuple[str, str, int]] = []
        failures: list[BaseException] = []
        done = threading.Event()

        def caller(number: int) -> None:
            n = 0
            try:
                while not done.is_set():
                    n += 1
                    seen.append(ask(server, f"u{number}-{n % 50}"))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=caller, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        served: dict[int, set[str]] = {ask(server, "first")[2]: {"1", "2"}}
        try:
            for round_ in range(8):
                stable, candidate = ("1", "2") if round_ % 2 else ("3", "1")
                more = canary("50%", candidate).replace("r1", f"r{round_ + 2}")
                text = place.text("    reshuffle: true\n" + more, stable=stable).encode()
                status, answer, _ = place.admin(server, "POST", "config", text)
                assert status == 200, answer
                served[answer["generation"]] = {stable, candidate}
                for bad in [*BAD, place.text(canary("5%")).replace("v2.onnx", "gone.onnx")]:
                    status, answer, _ = place.admin(server, "POST", "config", bad.encode())
                    assert status == 400, answer
        finally:
            done.set()
            for thread in threads:
                thread.join(30)
        assert not failures
        assert len(seen) > 100
        for version, _, generation in seen:
            assert version in served[generation]
        assert len({generation for *_, generation in seen}) > 2


def test_the_file_is_followed_and_a_bad_one_changes_nothing(place: Place) -> None:
    place.write(canary("0%"))
    with place.serve() as server:
        assert ask(server, "u")[0] == "1"
        place.write("", stable="3")
        eventually(lambda: ask(server, "u")[0] == "3")
        place.path.write_text("nonsense: [")
        server.wait_for("reload_refused")
        assert ask(server, "u")[0] == "3"
        os.kill(server.process.pid, signal.SIGHUP)
        assert ask(server, "u")[0] == "3"
        server.terminate()
        assert server.wait() == 0
    with place.serve() as again:
        assert ask(again, "u")[0] == "3"
        assert any("last good" in line for line in again.raw)


def test_a_source_that_is_not_there_is_told_with_its_place(place: Place) -> None:
    place.write("")
    with place.serve() as server:
        text = place.text("").replace("/v2.onnx", "/typo.onnx")
        status, answer, _ = place.admin(server, "POST", "config", text.encode())
        why = "model 'm' version 2: its source 'typo.onnx' cannot be read: No such file or directory"
        assert status == 400
        column = next(line.index("{source") for line in text.splitlines() if "typo" in line) + len("{source: ") + 1
        told = {"line": 6, "column": column, "key": 'models.m.versions."2".source', "message": why}
        assert answer == {"error": why, "problems": [told]}
        server.terminate()
        assert server.wait() == 0
    rows = json.loads(cli("audit", "tail", "--json", "--state-dir", str(place.state)).stdout)
    (row,) = [row for row in rows if row["action"] == "config.rejected"]
    assert [{**told, "path": "config.yaml"}] == row["detail"]["problems"]


def test_a_shadow_is_compared_and_changes_no_answer(place: Place) -> None:
    place.write('    shadow:\n      - {to: "3", sample: 100%, budget: {rps: 10000}}\n')
    with place.serve() as server:
        server.wait_for("shadow_ready")
        for n in range(50):
            assert ask(server, f"u{n}")[0] == "1"
        eventually(lambda: shadow_report(place, server)["comparison"]["pairs"] >= 30)
        report = json.dumps(shadow_report(place, server))
        assert "12.0" in report  # the largest difference: 5 * 4 - 2 * 4
        page = call(server.metrics, "GET", "/metrics")[1].decode()
        assert "tidegate_shadow_pairs_total" in page


def test_an_experiment_hears_of_outcomes(place: Place) -> None:
    place.write(
        "    key: {from: [header:x-user]}\n"
        "    experiment:\n      id: e1\n      coverage: 100%\n"
        '      arms: {control: {to: "1", share: 50%}, b: {to: "2", share: 50%}}\n'
        "      outcome: {name: click, kind: binary, window: 5s}\n"
    )
    with place.serve() as server:
        ids = []
        for n in range(60):
            _, _, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": f"u{n}"})
            ids.append(headers["x-tidegate-id"])
        unknown = {"id": ids[39], "outcome": 1, "name": "clock"}
        some = [{"id": id_, "outcome": 1} for id_ in ids[40:]]
        status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", [*some, unknown])
        assert (status, "got 'clock'" in answer["error"]) == (400, True)
        items = [{"id": id_, "outcome": 1, "name": "click"} for id_ in ids[:10]]
        items += [{"key": "u20", "outcome": "yes"}, {"id": "nobody", "outcome": 1}]
        status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", items)
        assert (status, answer) == (200, {"accepted": 12, "joined": 11})
        assert call(server.http, "POST", "/v2/models/nobody/feedback", items)[0] == 404
        with grpc.insecure_channel(server.grpc) as channel:
            report_rpc = channel.unary_unary(
                "/tidegate.v1.Feedback/Report",
                request_serializer=feedback_pb2.ReportRequest.SerializeToString,
                response_deserializer=feedback_pb2.ReportResponse.FromString,
            )
            request = feedback_pb2.ReportRequest(model_name="m")
            request.outcomes.add(id=ids[30], name="click", value=1)
            request.outcomes.add(key="u31", value=1)
            taken = report_rpc(request, timeout=20)
            assert (taken.accepted, taken.joined) == (2, 2)
            request.outcomes.add(value=1)
            with pytest.raises(grpc.RpcError) as refused:
                report_rpc(request, timeout=20)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        status, report, _ = place.admin(server, "GET", "experiments/e1")
        assert status == 200
        assert {arm["arm"] for arm in report["arms"]} == {"control", "b"}
        server.wait_for("exposure", experiment="e1")
        # A list is taken whole or not at all: of the one that was refused nothing is counted.
        eventually(lambda: sum(units for units, _ in clicks(place, server)) == 60)
        assert round(sum(units * estimate["value"] for units, estimate in clicks(place, server))) == 13


def clicks(place: Place, server: Server) -> list[Any]:
    """By arm: the units whose window has passed, and the share of them of which a click was heard."""
    _, report, _ = place.admin(server, "GET", "experiments/e1")
    return [arm["outcomes"]["click"] for arm in report["arms"]]


@pytest.fixture
def broken(place: Place) -> Place:
    """Version 2 refuses every input of these tests: its lookup table is too small."""
    models.save(
        place.root / "v2.onnx",
        [
            helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
            helper.make_node("Gather", ["table", "i"], ["y"], axis=0),
        ],
        [("x", TensorProto.FLOAT, ["n", 4])],
        [("y", TensorProto.FLOAT, ["n", 4])],
        {"table": np.zeros(1, np.float32)},
    )
    return place


def test_a_fallback_hides_a_candidate_from_users_but_not_from_the_counts(broken: Place) -> None:
    broken.write(canary("50%") + "    resilience: {fallback: stable}\n")
    with broken.serve() as server:
        for n in range(40):
            assert ask(server, f"u{n}")[0] == "1"
        page = call(server.metrics, "GET", "/metrics")[1].decode()
        line = next(
            line for line in page.splitlines()
            if line.startswith("tidegate_attempts_total") and 'version="2"' in line
        )  # fmt: skip
        assert 'code="input_rejected"' in line
        assert float(line.split()[-1]) > 5
