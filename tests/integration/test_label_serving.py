"""Labels, alerts and request rules on live traffic: real servers, real sockets, a real receiver of webhooks."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from monitor.label_state import SavedLabels
from monitor.profile import ReferenceProfile
from server._pb import feedback_pb2, inference_pb2
from tests.support import models
from tests.support.cli import cli
from tests.support.metrics import samples, total
from tests.support.receiver import KEY, SECRET, Receiver, receiving
from tests.support.server import Server, serving
from tests.support.v2 import call, infer, tensor


def eventually(check: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, what
        time.sleep(0.05)


class Place:
    """A folder with version 1 of ``m``, which answers ``y = x`` of two columns, and its configuration."""

    def __init__(self, root: Path) -> None:
        self.root, self.state, self.path = root, root / "state", root / "config.yaml"
        models.identity(root / "m.onnx", width=2)

    def serve(self, monitor: str, more: str = "") -> Any:
        self.path.write_text(
            "apiVersion: tidegate/v1\nmodels:\n  m:\n"
            f'    versions: {{"1": {{source: {self.root}/m.onnx}}}}\n    monitor: {monitor}\n{more}'
        )
        return serving(str(self.path), "--state-dir", str(self.state), env={"HOOK_SECRET": SECRET})

    def admin(self, server: Server, path: str) -> tuple[int, Any]:
        status, answer, _ = call(server.admin, "GET", f"/admin/v1/{path}")
        return status, answer

    def performance(self, server: Server) -> dict[str, Any]:
        status, answer = self.admin(server, "monitors/m/1")
        assert status == 200, answer
        return dict(answer["performance"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ask(server: Server, rows: Sequence[Sequence[float]], request_id: str = "") -> str:
    """One answered request; its ``x-tidegate-id``."""
    flat = [value for row in rows for value in row]
    body: dict[str, Any] = {"inputs": [tensor("x", "FP32", [len(rows), 2], flat)]}
    if request_id:
        body["id"] = request_id
    status, answer, headers = call(server.http, "POST", "/v2/models/m/infer", body)
    assert status == 200, answer
    return headers["x-tidegate-id"]


def tell(server: Server, items: list[dict[str, Any]]) -> dict[str, Any]:
    status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", items)
    assert status == 200, answer
    return dict(answer)


@pytest.fixture
def stream() -> Any:
    return np.random.default_rng(5)


def test_labels_late_twice_early_and_of_nobody_over_both_protocols(place: Place, stream: Any) -> None:
    scores = stream.random(420).astype("f4")
    truth = (stream.random(420) < scores).astype(int)
    labels = "{labels: {task: binary, output: y, windows: [200], slice: 'x[1]', classes: [bad, good]}}"
    with place.serve(labels) as server, grpc.insecure_channel(server.grpc) as channel:
        report = channel.unary_unary(
            "/tidegate.v1.Feedback/Report",
            request_serializer=feedback_pb2.ReportRequest.SerializeToString,
            response_deserializer=feedback_pb2.ReportResponse.FromString,
        )
        early = [{"id": "late-0", "row": row, "outcome": int(truth[row])} for row in range(20)]
        assert tell(server, early) == {"accepted": 20, "joined": 20}
        ids = []
        for n in range(0, 400, 20):  # the first one's labels wait for it
            part = scores[n : n + 20]
            ids.append(ask(server, [[float(score), n // 20 % 2] for score in part], f"late-{n}"))
        order = stream.permutation(np.arange(20, 400)).tolist()
        halves = order[:190], order[190:]
        items = [
            {"id": ids[n // 20], "row": n % 20, "outcome": "good" if truth[n] else "bad",
             "time": "2026-01-02T03:04:05Z"} for n in halves[0]
        ]  # fmt: skip
        tell(server, items)
        tell(server, items[:30])  # again
        tell(server, [{**items[0], "outcome": 1 - int(truth[halves[0][0]])}])  # otherwise
        assert tell(server, [{"id": "nobody", "outcome": 1}, {"id": ids[3], "row": 99, "outcome": 1}])["accepted"] == 2
        request = feedback_pb2.ReportRequest(model_name="m")
        for n in halves[1]:
            request.outcomes.add(id=f"late-{n // 20 * 20}", row=n % 20, text="good" if truth[n] else "bad")
        assert report(request, timeout=20).joined == 190
        request = feedback_pb2.ReportRequest(model_name="m")
        request.outcomes.add(id=ids[0], row=1, value=float(truth[1]))
        report(request, timeout=20)
        request.outcomes.add(id=ids[0], row=2, value=float("nan"))
        with pytest.raises(grpc.RpcError, match="item 1: 'value' must be a finite number, got nan"):
            report(request, timeout=20)
        assert tell(server, [{"id": ids[0], "row": 3, "outcome": 2}]) == {"accepted": 1, "joined": 0}  # of no class

        eventually(
            lambda: (
                place.performance(server)["join"]["groups"] != []
                and sum(group["joined"] for group in place.performance(server)["join"]["groups"]) == 400
                and sum(group["duplicate"] for group in place.performance(server)["join"]["groups"]) == 31
            ),
            "not all labels were joined",
        )
        found = place.performance(server)
        groups = {group["slice"]: group for group in found["join"]["groups"]}
        assert {name: group["joined"] for name, group in groups.items()} == {"0": 200, "1": 200}
        assert sum(group["conflicting"] for group in groups.values()) == 1
        assert found["join"]["unknown_labels"] == 1  # a row that the request has not; "nobody" still waits
        assert found["join"]["held_labels"] == 1
        (window,) = [entry for entry in found["windows"] if entry["slice"] == ""]
        joined = [*range(20), *order]  # early labels joined as their prediction came, before all others
        last = joined[-window["rows"] :]
        y, p = truth[last], scores[last].astype("f8")
        assert window["rows"] == 200
        metrics = window["metrics"]
        assert metrics["accuracy"] == pytest.approx(accuracy_score(y, p >= 0.5), abs=1e-9)
        assert metrics["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-9)
        assert metrics["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-9)
        assert metrics["log_loss"] == pytest.approx(log_loss(y, p), abs=1e-9)

        label = '{model="m",version="1",arm="stable",window="200rows",metric="accuracy"}'
        eventually(
            lambda: samples(server, "tidegate_performance").get(label) == pytest.approx(metrics["accuracy"]),
            "the gauge does not show the accuracy",
        )
        assert total(server, "tidegate_label_unknown_labels_total") == 1
        status, page = place.admin(server, "monitors/m/1?format=html")
        assert status == 200
        assert b"Performance, from labels" in page


def test_windows_of_time_hold_the_outcomes_that_were_in_them(place: Place) -> None:
    """Told by HTTP and gRPC: of now, of the future, of before the prediction, and of nobody's time."""
    labels = "{labels: {task: binary, output: y, windows: [1h]}}"
    with place.serve(labels) as server, grpc.insecure_channel(server.grpc) as channel:
        report = channel.unary_unary(
            "/tidegate.v1.Feedback/Report",
            request_serializer=feedback_pb2.ReportRequest.SerializeToString,
            response_deserializer=feedback_pb2.ReportResponse.FromString,
        )
        name = ask(server, [[0.9, 0.0]] * 5)
        times = ["2001-01-01T00:00:00Z", "2999-01-01T00:00:00+01:00", "9999-12-31T23:59:59-12:00"]
        tell(server, [{"id": name, "row": row, "outcome": 1, "time": time} for row, time in enumerate(times)])
        request = feedback_pb2.ReportRequest(model_name="m")
        request.outcomes.add(id=name, row=3, value=1.0, time="0001-01-01T00:00:00+14:00")
        request.outcomes.add(id=name, row=4, value=1.0)
        report(request, timeout=20)
        (window,) = joined(place, server, 5)["windows"]
        assert window["outdated"] == 0
        status, answer, _ = call(
            server.http, "POST", "/v2/models/m/feedback", {"id": name, "outcome": 1, "time": "2026-01-02T03:04:05"}
        )
        assert status == 400
        assert "with its offset" in answer["error"]
        request.outcomes[0].time = "yesterday"
        with pytest.raises(grpc.RpcError) as refused:
            report(request, timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_text_that_nobody_knows_is_refused(place: Place) -> None:
    with place.serve("{}") as server:
        name = ask(server, [[0.5, 0]])
        status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", {"id": name, "outcome": "setosa"})
        assert status == 400
        assert "got 'setosa'" in answer["error"]
        assert tell(server, [{"id": name, "outcome": 1}]) == {"accepted": 1, "joined": 0}


def test_memory_is_bounded_under_requests_without_labels(place: Place) -> None:
    labels = "{labels: {task: binary, output: y, capacity: 500}}"
    with place.serve(labels) as server:
        rows = [[0.5, 0.0]] * 50
        for _ in range(40):
            ask(server, rows)

        def settled() -> bool:
            groups = place.performance(server)["join"]["groups"]
            return [group["predicted"] for group in groups] == [2000]

        eventually(lambda: place.admin(server, "monitors/m/1")[0] == 200 and settled(), "not all were remembered")
        join = place.performance(server)["join"]
        assert join["remembered_rows"] == 500
        assert join["remembered_ids"] == 10
        assert join["groups"][0]["expired"] == 1500


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def hook(receiver: Receiver) -> str:
    return (
        f"alerts:\n  sinks:\n    ops: {{webhook: {{url: '{receiver.url}', secrets: ['${{HOOK_SECRET}}'], "
        "allow: [127.0.0.1]}}\n"
    )


def test_a_flapping_signal_is_one_signed_alert(place: Place, receiver: Receiver) -> None:
    labels = (
        "{labels: {task: binary, form: class, output: y, windows: [200], learn_rows: 400, persistence: 1 of 1, "
        "expected_run: 1k}}"
    )
    with place.serve(labels, hook(receiver)) as server:

        def rows(right: bool, batches: int) -> None:
            for _ in range(batches):
                name = ask(server, [[n % 2, 0] for n in range(50)])
                tell(server, [{"id": name, "row": n, "outcome": n % 2 if right else 1 - n % 2} for n in range(50)])

        rows(True, 12)
        rows(False, 4)
        got = receiver.wait(lambda got: len(got) >= 1)
        for _ in range(4):  # over and under again and again: never calm for long enough to end
            rows(True, 2)
            rows(False, 2)
        rows(True, 20)
        got = receiver.wait(lambda got: len(got) >= 2)
        raised, cleared = (one.event for one in got)
        assert raised["type"] == "io.tidegate.alert.performance.raised"
        assert cleared["type"] == "io.tidegate.alert.performance.cleared"
        assert raised["subject"] == "m:1"
        assert raised["data"]["name"] == "accuracy"
        assert raised["data"]["key"] == cleared["data"]["key"]
        assert all(one.signed_by(KEY) for one in got)
        server.wait_for("performance_raised", name="accuracy")
        status, hooks = place.admin(server, "hooks?limit=10")
        assert status == 200
        assert [row["type"] for row in hooks["hooks"]] == [cleared["type"], raised["type"]]
        assert {row["sink"] for row in hooks["hooks"]} == {"ops"}
        _, document = place.admin(server, "monitors/m/1")
        assert [alarm["state"] for alarm in document["alarms"]] == ["raised", "cleared"]
        # The receiver has the last one a moment before the dispatcher has written that down.
        eventually(lambda: total(server, "tidegate_outbox_delivered_total") == 2, "deliveries are counted")
    assert len(receiver.got) == 2


def uniform(rows: int, seed: int) -> Any:
    return np.random.default_rng(seed).random((rows, 2)).astype("f4")


def test_rules_refuse_and_count_and_the_sample_makes_a_profile(place: Place, receiver: Receiver) -> None:
    ReferenceProfile.from_arrays({"x": uniform(20_000, 1)}).save(place.root / "p.tgp")
    rules = (
        f"{{profile: {place.root}/p.tgp, sample: {{rows: 500}}, history: 32, schema: ["
        "{column: 'x[0]', min: 0, max: 1, action: reject}, {column: 'x[1]', max: 0.5, tolerate: 1%}]}"
    )
    with place.serve(rules, hook(receiver)) as server, grpc.insecure_channel(server.grpc) as channel:
        good = uniform(3000, 2)
        for start in range(0, 3000, 50):
            ask(server, good[start : start + 50].tolist())
        status, answer = infer(server.http, "m", [tensor("x", "FP32", [2, 2], [0.5, 0.5, 7, 0.5])])
        assert status == 400
        assert "x[0]" in answer["error"]
        assert "rule max" in answer["error"]
        rpc = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )
        request = inference_pb2.ModelInferRequest(model_name="m")
        request.inputs.add(name="x", datatype="FP32", shape=[1, 2]).contents.fp32_contents.extend([-1.0, 0.5])
        with pytest.raises(grpc.RpcError) as refused:
            rpc(request, timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert total(server, "tidegate_monitor_requests_rejected_total") == 2
        got = receiver.wait(lambda got: len(got) >= 1)
        event = got[0].event
        assert event["type"] == "io.tidegate.alert.quality.raised"
        assert (event["data"]["check"], event["data"]["feature"]) == ("rule max", "x[1]")
        assert event["data"]["count"] > 0.4 * event["data"]["rows"]
        assert event["data"]["allowed"] == 0.01

        eventually(
            lambda: place.admin(server, "monitors/m/1")[1]["report"]["counted"] == {"stable": 3000},
            "not all rows were counted",
        )
        _, document = place.admin(server, "monitors/m/1")
        checks = [check for window in document["report"]["windows"] for check in window["quality"]]
        assert any((check["check"], check["in_alarm"]) == ("rule max", True) for check in checks)
        assert len(document["distributions"]) == 2
        assert document["history"]["windows"]
        assert document["alarms"][0]["check"] == "rule max"
        assert json.loads(json.dumps(document, allow_nan=False)) == document
        status, page = place.admin(server, "monitors/m/1?format=html")
        assert status == 200
        assert b"<svg" in page
        status, kept = place.admin(server, "monitors/m/1?format=npz")
        assert status == 200
        np.testing.assert_array_equal(np.load(io.BytesIO(kept))["x[0]"], good[-500:, 0])
        assert place.admin(server, "monitors/m/7")[0] == 404
        assert place.admin(server, "monitors")[1]["monitors"][0]["model"] == "m"
        (place.root / "kept.npz").write_bytes(kept)
    made = place.root / "made.tgp"
    cli("monitor", "profile", str(place.root / "kept.npz"), "--model", str(place.root / "m.onnx"), "-o", str(made))
    assert ReferenceProfile.load(made).rows == 500


# --- over a restart ---

SAFE = (
    "{labels: {task: binary, output: y, form: class, windows: [100], learn_rows: 200, expected_run: 100000, "
    "persistence: 1 of 1}}"
)


def outcomes(server: Server, rows: int, right: bool) -> None:
    """Rows with a class each, and what became of them."""
    for _ in range(rows // 50):
        said = [[float(row % 2), 0.0] for row in range(50)]
        name = ask(server, said)
        tell(server, [{"id": name, "row": row, "outcome": row % 2 if right else 1 - row % 2} for row in range(50)])


def joined(place: Place, server: Server, count: int) -> dict[str, Any]:
    """The performance once so many rows have their label."""
    found: dict[str, Any] = {}

    def there() -> bool:
        found.update(place.performance(server))
        return bool(found["join"]["groups"]) and found["join"]["groups"][0]["joined"] == count

    eventually(there, f"not {count} labels were joined")
    return found


def test_labels_outlive_a_clean_stop_and_a_kill(place: Place, receiver: Receiver) -> None:
    """The reference, the alarm and the counts stay; after a kill, what came since the alarm was saved is lost."""
    with place.serve(SAFE, hook(receiver)) as server:
        outcomes(server, 300, right=True)
        joined(place, server, 300)
        server.terminate()
        server.wait()
    with place.serve(SAFE, hook(receiver)) as server:
        found = joined(place, server, 300)
        assert found["learning"] == []
        assert [window["rows"] for window in found["windows"]] == [100]
        outcomes(server, 100, right=False)
        receiver.wait(lambda got: len(got) >= 1)
        (path,) = (place.state / "monitors" / "m").glob("*.labels")
        eventually(
            lambda: '"active":[true]' in path.read_text(errors="replace").replace("\\", ""), "the alarm was not saved"
        )
        server.process.kill()
        server.wait()
    with place.serve(SAFE, hook(receiver)) as server:
        count = place.performance(server)["join"]["groups"][0]["joined"]
        assert 300 < count <= 400
        assert place.admin(server, "monitors")[1]["monitors"] == [
            {"model": "m", "version": "1", "profile": "", "windows": ["100rows"], "alarms": {"stable": ["accuracy"]}}
        ]
        outcomes(server, 200, right=False)  # decayed from the first row on: neither news nor the norm
        found = joined(place, server, count + 200)
        assert found["windows"][0]["in_alarm"] == ["accuracy"]
        assert found["windows"][0]["signals"][0]["reference"] == 1.0
        past = place.admin(server, "monitors/m/1")[1]["alarms"]
        assert [(alarm["state"], alarm["column"]) for alarm in past] == [("raised", "accuracy")]
        outcomes(server, 1000, right=True)
        got = receiver.wait(lambda got: got[-1].event["type"].endswith(".cleared"))
    # The kill may have come between a delivery and the note of it: then that very event is sent again.
    told = list({one.event["id"]: one.event for one in got}.values())
    assert [event["type"].rpartition(".")[2] for event in told] == ["raised", "cleared"]
    assert told[0]["data"]["key"] == told[1]["data"]["key"]


def decided(server: Server, name: str, rows: int) -> None:
    tell(server, [{"id": name, "row": row, "outcome": row % 2} for row in range(rows)])


def waiting(place: Place, server: Server) -> int:
    """Rows that wait for their label."""
    return sum(group["waiting"] for group in place.performance(server)["join"]["groups"])


def test_predictions_that_wait_outlive_a_clean_stop_and_a_kill(place: Place) -> None:
    """Labels find them in the next process; after a kill, those since the last snapshot are lost, and told apart."""
    said = [[float(row % 2), 0.0] for row in range(30)]
    with place.serve(SAFE) as server:
        outcomes(server, 300, right=True)
        names = [ask(server, said), ask(server, said, "mine")]
        tell(server, [{"id": "soon", "row": row, "outcome": 1 - row % 2} for row in range(10)])
        joined(place, server, 300)
        server.terminate()  # what the queue holds is taken first
        server.wait()
    with place.serve(SAFE) as server:
        join = place.performance(server)["join"]
        assert (waiting(place, server), join["held_labels"], join["remembered_rows"]) == (60, 10, 360)
        assert join["groups"][0]["expired"] == join["unknown_labels"] == 0
        decided(server, names[0], 20)
        ask(server, said, "soon")
        joined(place, server, 330)
        outcomes(server, 100, right=False)
        (path,) = (place.state / "monitors" / "m").glob("*.labels")

        def saved() -> SavedLabels:
            return SavedLabels.from_bytes(path.read_bytes(), 10_000)

        eventually(lambda: saved().groups[0].alarms["active"] == [True], "the alarm was not saved")
        lost = ask(server, said)
        eventually(lambda: place.performance(server)["join"]["groups"][0]["predicted"] == 520, "not remembered")
        server.process.kill()
        server.wait()
    before = saved().join.groups[0]
    with place.serve(SAFE) as server:
        assert waiting(place, server) == before.waiting >= 60
        decided(server, names[0], 30)
        decided(server, "mine", 30)
        decided(server, lost, 30)
        found = joined(place, server, before.joined + 40)["join"]
        assert found["groups"][0]["duplicate"] == 20
        assert (found["groups"][0]["waiting"], found["held_labels"]) == (before.waiting - 40, 30)


def test_other_settings_start_anew_and_say_so(place: Place) -> None:
    with place.serve(SAFE) as server:
        outcomes(server, 50, right=True)
        joined(place, server, 50)
        server.terminate()
        server.wait()
    with place.serve(SAFE.replace("[100]", "[200]")) as server:
        server.wait_for("labels_start_anew", model="m")
        assert place.performance(server)["join"]["groups"] == []


def test_a_list_with_text_that_is_no_class_is_refused_whole(place: Place) -> None:
    labels = "{labels: {task: binary, output: y, windows: [200], classes: [bad, good], name: fate}}"
    with place.serve(labels) as server, grpc.insecure_channel(server.grpc) as channel:
        name = ask(server, [[0.5, 0.0], [0.6, 0.0], [0.7, 0.0]])
        items = [{"id": name, "row": 0, "outcome": 1}, {"id": name, "row": 1, "outcome": "fine"}]
        for bad in (items, [items[0], {"id": name, "row": 1, "outcome": "good", "name": "other"}]):
            status, answer, _ = call(server.http, "POST", "/v2/models/m/feedback", bad)
            assert status == 400
            assert "'outcome' as text must be" in answer["error"]
        report = channel.unary_unary(
            "/tidegate.v1.Feedback/Report",
            request_serializer=feedback_pb2.ReportRequest.SerializeToString,
            response_deserializer=feedback_pb2.ReportResponse.FromString,
        )
        request = feedback_pb2.ReportRequest(model_name="m")
        request.outcomes.add(id=name, row=0, value=1.0)
        request.outcomes.add(id=name, row=1, text="fine")
        with pytest.raises(grpc.RpcError) as refused:
            report(request, timeout=20)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert tell(server, [{"id": name, "row": 2, "outcome": "good"}])["joined"] == 1
        joined(place, server, 1)


def test_the_reference_of_the_profile_is_used_from_the_first_label_on(place: Place, stream: Any) -> None:
    scores = stream.random((4000, 2)).astype("f4")
    truth = (stream.random(4000) < scores[:, 0]).astype(int)
    data, made = place.root / "valid.npz", place.root / "p.tgp"
    np.savez(data, x=scores, fate=truth)
    cli(
        "monitor", "profile", str(data), "--model", str(place.root / "m.onnx"), "--run", "-o", str(made),
        "--label", "fate", "--predict", "y[0]",
    )  # fmt: skip
    with place.serve(f"{{profile: {made}, labels: {{task: binary, output: y, windows: [500]}}}}") as server:
        for start in range(0, 1000, 50):
            part = slice(start, start + 50)
            name = ask(server, scores[part].tolist())
            tell(server, [{"id": name, "row": row, "outcome": 1 - int(truth[start + row])} for row in range(50)])
        found = joined(place, server, 1000)
        assert found["learning"] == []
        (window,) = found["windows"]
        known = {signal["name"]: signal["reference"] for signal in window["signals"]}
        assert known["log_loss"] == pytest.approx(log_loss(truth, scores[:, 0]), rel=1e-6)
        assert known["auc"] == pytest.approx(roc_auc_score(truth, scores[:, 0]), abs=1e-3)
        assert {"accuracy", "auc", "log_loss"} <= set(window["in_alarm"])
