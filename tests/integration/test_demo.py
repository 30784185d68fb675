"""The demo's parts on real data, and the whole of it against a real server process."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from server.demo import data, train, wire
from server.demo.clients import CallFailed, Load
from server.demo.installer import ClientsUnavailable, clients_python
from server.demo.models import ServedModel, batched_config, write_repository
from server.demo.options import Act
from server.demo.process import ServerFailed, ServerProcess, kept_server
from server.demo.report import percentiles
from server.demo.run import DemoOptions, run_demo
from server.demo.statistics import Served
from server.demo.verdict import Row, count_failures, row_failures
from server.demo.wheels import WheelFile, WheelMismatch, WheelUnavailable, read_wheel_file
from server.demo.workload import CallLog, Reference, Stream, Workload, compare, ragged_offsets
from tests.support.server import PRODUCT_PATH

ROOT = Path(__file__).resolve().parents[2]


def workload(rows: int = 6, stream: Stream | None = None, callers: int = 2) -> Workload:
    x = np.arange(rows, dtype=np.float32)[:, None]
    offsets = np.arange(rows + 1)
    expected = {"label": np.arange(rows), "score": x / 3}
    return Workload("m", "1", {"x": x}, offsets, expected, callers, stream=stream)


def log_of(*answers: tuple[int, dict[str, np.ndarray]]) -> CallLog:
    log = CallLog(workload(), "JSON")
    for index, answer in answers:
        log.add(index, 1_000_000, answer)
    return log


# --- Data ----------------------------------------------------------------------------------------------------------


MAGIKA = data.MagikaConfig(beg_size=4, end_size=3, block_size=8, padding_token=256, labels=("a", "b"))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (b"  abcdefghij  \n", [*b"abcd", *b"hij"]),
        (b"ab", [*b"ab", 256, 256, 256, *b"ab"]),
        (b"         late", [256, 256, 256, 256, *b"ate"]),
        (b"   ", [256] * 7),
    ],
)
def test_magika_features_strip_cut_and_pad_towards_the_middle(content: bytes, row: list[int]) -> None:
    features = MAGIKA.features(content)
    assert features.dtype == np.int32
    assert features.tolist() == row


def test_audio_chunks_repeat_the_last_samples_of_the_chunk_before() -> None:
    sound = np.arange(1, 1300, dtype=np.float32)
    chunks = data.audio_chunks(sound)
    assert chunks.shape == (2, data.CONTEXT + data.CHUNK)
    assert not chunks[0, : data.CONTEXT].any()
    assert np.array_equal(chunks[0, data.CONTEXT :], sound[: data.CHUNK])
    assert np.array_equal(chunks[1, : data.CONTEXT], chunks[0, -data.CONTEXT :])


def test_flights_are_the_ones_that_arrived() -> None:
    flights = data.load_flights()
    march = flights.months(3, 3)
    assert len(flights.late) == 327_346
    assert set(march.month.tolist()) == {3}
    assert march.numbers.dtype == np.float32
    assert march.numbers.shape == (len(march.late), len(data.FLIGHT_NUMBERS))
    assert np.isfinite(march.numbers).all()
    assert set(march.categories[:, 0].tolist()) == {b"EWR", b"JFK", b"LGA"}
    assert 0.1 < march.late.mean() < 0.4


def test_python_files_are_there_and_the_same_every_time() -> None:
    files = data.python_files()
    assert files == data.python_files()
    assert sum(file.label == "python" for file in files) >= 20
    assert all(file.path.stat().st_size >= 1024 for file in files)


# --- Training ------------------------------------------------------------------------------------------------------


def test_every_digits_version_reads_digits_it_has_not_seen() -> None:
    digits = data.load_digits()
    models = {version: train.train_digits(digits, version) for version in train.DIGIT_VERSIONS}
    assert len({hashlib.sha256(onnx).digest() for onnx in models.values()}) == len(models) >= 3
    for onnx in models.values():
        answer = Reference(onnx).run({"pixels": digits.test_pixels})
        assert np.mean(answer["label"] == digits.test_digit) > 0.93
        assert answer["probabilities"].shape == (len(digits.test_digit), 10)


def test_flights_model_takes_a_carrier_it_has_never_seen() -> None:
    some = data.load_flights().months(1, 1)
    onnx = train.train_flights(some, trees=4, depth=6)
    categories = np.array([[b"JFK", b"AA"], [b"JFK", b"??"]])
    answer = Reference(onnx).run({"numbers": some.numbers[:2], "categories": categories})
    assert answer["probabilities"].shape == (2, 2)
    assert np.allclose(answer["probabilities"].sum(axis=1), 1)


# --- Wheels and environments ---------------------------------------------------------------------------------------


def wheel(folder: Path, content: bytes) -> WheelFile:
    with zipfile.ZipFile(folder / "some_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("some_model/model.onnx", content)
    return WheelFile("some-model", "1.0", "some_model/model.onnx", hashlib.sha256(b"the graph").hexdigest())


def test_a_cached_wheel_gives_its_file(tmp_path: Path) -> None:
    file = wheel(tmp_path, b"the graph")
    assert read_wheel_file(file, tmp_path, offline=True, progress=print) == b"the graph"


def test_other_content_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    file = wheel(tmp_path, b"another graph")
    with pytest.raises(WheelMismatch, match="SHA-256"):
        read_wheel_file(file, tmp_path, offline=True, progress=print)


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    file = wheel(tmp_path, b"the graph")
    next(tmp_path.glob("*.whl")).write_bytes(b"PK, but no more")
    with pytest.raises(WheelMismatch, match="damaged"):
        read_wheel_file(file, tmp_path, offline=True, progress=print)


def test_offline_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WheelUnavailable, match=r"some-model 1\.0"):
        read_wheel_file(WheelFile("some-model", "1.0", "x", ""), tmp_path, offline=True, progress=print)
    with pytest.raises(ClientsUnavailable, match="tritonclient"):
        clients_python(tmp_path / "venv", offline=True, progress=print)


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ClientsUnavailable, match="no virtual environment"):
        clients_python(tmp_path, offline=False, progress=print)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_the_repository_holds_exactly_the_models(tmp_path: Path) -> None:
    root = tmp_path / "repository"
    write_repository(root, [ServedModel("old", {"1": b"x"})])
    write_repository(root, [ServedModel("new", {"1": b"a", "2": b"b"}, batched_config("new", 8))])
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()) == [
        "new/1/model.onnx",
        "new/2/model.onnx",
        "new/config.pbtxt",
    ]
    assert "max_batch_size: 8" in (root / "new" / "config.pbtxt").read_text()


# --- Workloads and comparison --------------------------------------------------------------------------------------


def test_ragged_offsets_repeat_the_sizes_and_drop_the_rest() -> None:
    assert ragged_offsets(9, (1, 3)).tolist() == [0, 1, 4, 5, 8, 9]
    assert ragged_offsets(8, (3,)).tolist() == [0, 3, 6]


def test_callers_take_turns_and_cover_every_request() -> None:
    turns = [list(islice(workload(rows=6).turns(caller), 3)) for caller in (0, 1)]
    assert [[index for index, _ in turn] for turn in turns] == [[0, 2, 4], [1, 3, 5]]
    assert all(fresh for turn in turns for _, fresh in turn)


def test_a_caller_walks_whole_streams_in_order() -> None:
    stream = Stream(3, {"next": "state"}, {"state": np.zeros(1, np.float32)})
    turns = list(islice(workload(rows=6, stream=stream, callers=1).turns(1), 6))
    assert turns == [(3, True), (4, False), (5, False), (0, True), (1, False), (2, False)]


def test_answers_are_exact_close_or_wrong() -> None:
    good = workload().answer(3)
    nudged = {**good, "score": good["score"] + np.float32(1e-6)}
    far = {**good, "score": good["score"] + np.float32(1e-2)}
    other_label = {**good, "label": good["label"] + 1}
    other_type = {**good, "score": good["score"].astype(np.float64)}
    other_shape = {**good, "score": good["score"][0]}
    missing = {"label": good["label"]}
    nan = {**good, "score": good["score"] * np.float32("nan")}
    wrong = [far, other_label, other_type, other_shape, missing, nan]
    result = compare(log_of(*((3, answer) for answer in [good, nudged, *wrong])))
    assert (result.exact, result.close, result.wrong) == (1, 1, len(wrong))
    assert result.checked == 2 + len(wrong)
    assert 0 < result.largest_difference < 1e-5


def row_of(log: CallLog, counted_rows: int) -> Row:
    return Row(log, compare(log), Served(counted_rows, counted_rows, {1: counted_rows}))


def test_errors_wrong_answers_and_silence_are_failures() -> None:
    good = workload().answer(0)
    fine = row_of(log_of((0, good)), 1)
    assert row_failures(fine) == []
    assert "not one answer" in row_failures(row_of(log_of(), 0))[0]
    assert "1 of 1 answers are wrong" in row_failures(row_of(log_of((1, good)), 1))[0]
    refused = log_of((0, good))
    refused.errors.append("HTTP 500: no")
    assert "HTTP 500" in row_failures(row_of(refused, 1))[0]


def test_rows_the_server_did_not_count_are_a_failure() -> None:
    log = log_of((0, workload().answer(0)), (1, workload().answer(1)))
    assert count_failures([row_of(log, 2)]) == []
    assert "the server counted 3" in count_failures([row_of(log, 3)])[0]


def test_statistics_since_subtracts_the_counts_before() -> None:
    before, after = Served(5, 3, {1: 2, 3: 1}), Served(15, 6, {1: 2, 3: 2, 4: 1, 5: 1})
    added = after.since(before)
    assert added == Served(10, 3, {3: 1, 4: 1, 5: 1})
    assert added.largest_batch == 5
    assert added.mean_batch == pytest.approx(10 / 3)
    assert Served(0, 0, {}).mean_batch == 0


def test_percentiles_are_milliseconds() -> None:
    assert percentiles([ms * 1_000_000 for ms in range(1, 101)]) == ["50.5", "95.0", "99.0"]
    assert percentiles([]) == ["-", "-", "-"]


# --- Wire ----------------------------------------------------------------------------------------------------------


INPUTS = {"x": np.array([[0.5, 2]], np.float32), "s": np.array([[b"AA", b"B"]]), "n": np.array(16000, np.int64)}


def test_json_body_is_v2() -> None:
    assert json.loads(wire.json_body(INPUTS))["inputs"] == [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [0.5, 2]},
        {"name": "s", "shape": [1, 2], "datatype": "BYTES", "data": ["AA", "B"]},
        {"name": "n", "shape": [], "datatype": "INT64", "data": [16000]},
    ]


def test_binary_body_is_v2() -> None:
    body, length = wire.binary_body(INPUTS)
    sizes = [one["parameters"]["binary_data_size"] for one in json.loads(body[:length])["inputs"]]
    assert sizes == [8, 11, 8]
    assert body[length:] == struct.pack("<ff", 0.5, 2) + b"\2\0\0\0AA\1\0\0\0B" + struct.pack("<q", 16000)


def test_answers_are_read_from_json_and_from_binary() -> None:
    head = {"name": "y", "datatype": "FP32", "shape": [2, 1]}
    plain = json.dumps({"outputs": [{**head, "data": [0.1, 3]}]}).encode()
    mixed = {"outputs": [{**head, "parameters": {"binary_data_size": 8}}, {**head, "name": "z", "data": [0.1, 3]}]}
    header = json.dumps(mixed).encode()
    want = np.array([[0.1], [3]], np.float32)
    assert np.array_equal(wire.parse_answer(plain, None)["y"], want)
    answer = wire.parse_answer(header + want.tobytes(), len(header))
    assert np.array_equal(answer["y"], want)
    assert np.array_equal(answer["z"], want)


# --- Callers -------------------------------------------------------------------------------------------------------


def load(tmp_path: Path, clients: Path | None) -> Load:
    return Load([workload()], "127.0.0.1:1", "127.0.0.1:1", 1.0, tmp_path, clients)


def test_calls_that_nobody_answers_are_errors() -> None:
    unanswered = load(Path(), None)
    asyncio.run(unanswered.run(lambda: None))
    assert [log.protocol for log in unanswered.logs] == ["JSON", "binary"]
    assert all(log.errors and not log.requests for log in unanswered.logs)
    assert "ConnectError" in unanswered.logs[0].errors[0]


def test_a_worker_that_cannot_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(CallFailed, match=r"(?s)did not start: .*Error"):
        asyncio.run(load(tmp_path, Path(sys.executable)).run(lambda: None))


# --- The whole -----------------------------------------------------------------------------------------------------


def demo(tmp_path: Path, act: Act = "serve", **told: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}
    options = {"state_dir": tmp_path / "state", "plain": True, "act": act, **told}
    code = (
        "import sys\nfrom pathlib import Path, PosixPath\nfrom server.demo.run import DemoOptions, run_demo\n"
        f"sys.exit(run_demo(DemoOptions(**{options!r})))"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_importing_the_entry_point_is_cheap() -> None:
    heavy = "{'sklearn', 'rich', 'httpx', 'numpy', 'onnx', 'pandas', 'onnxruntime'}"
    code = (
        f"import sys, server.demo.run; sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['rich'] = sys.modules['sklearn'] = None\n"
        "from server.demo.run import DemoOptions, run_demo; sys.exit(run_demo(DemoOptions()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "The demo needs rich, scikit-learn: pip install 'tidegate[demo]'\n"


@pytest.mark.parametrize("seconds", [0.0, -1.0, 601.0, float("nan")])
def test_a_load_of_no_length_is_wrong_usage(seconds: float, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(DemoOptions(seconds=seconds)) == 2
    assert "--seconds" in capsys.readouterr().err


def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "nothing-here", tmp_path / "state", tmp_path / "server.log")
    try:
        with pytest.raises(ServerFailed, match=r"(?s)before it was ready.*server\.log"):
            server.wait_ready()
    finally:
        server.kill()


def test_no_kept_server_where_none_answers(tmp_path: Path) -> None:
    path = tmp_path / "kept-server.json"
    assert kept_server(path) is None
    path.write_text('{"pid": 1, "http": "127.0.0.1:1"}')
    assert kept_server(path) is None
    path.write_text("[]")
    assert kept_server(path) is None


def test_offline_with_nothing_cached_serves_the_trained_models(tmp_path: Path) -> None:
    process = demo(tmp_path, offline=True, seconds=2)
    output, _ = process.communicate(timeout=55)
    assert process.returncode == 0, output
    assert "skipped: magika, silero_vad, gRPC callers" in output
    assert "digits:3" in output
    assert "flights:1" in output
    assert "0 errors" in output
    assert "0 wrong" in output
    assert "all good" in output


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_all_of_it_then_kept_up_then_refused(tmp_path: Path) -> None:
    process = demo(tmp_path, seconds=4, keep=True)
    output, _ = process.communicate(timeout=200)
    kept = json.loads((tmp_path / "state" / "kept-server.json").read_text())
    try:
        assert process.returncode == 0, output
        assert "skipped" not in output
        for name in ("digits:1", "digits:2", "digits:3", "flights:1", "magika:1", "silero_vad:1"):
            assert name in output
        assert "over 3 protocols" in output
        assert "all good" in output
        assert f"kill {kept['pid']}" in output
        again = demo(tmp_path, seconds=1)
        refusal, _ = again.communicate(timeout=60)
        assert again.returncode == 1
        assert f"pid {kept['pid']}" in refusal
    finally:
        os.kill(kept["pid"], signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sigterm_in_mid_load_takes_the_server_down(tmp_path: Path) -> None:
    process = demo(tmp_path, offline=True, seconds=60)
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if "ready: HTTP" in line:
            address = line.split("HTTP ")[1].split(",")[0]
        if "of 60 s" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    record = tmp_path / "kept-server.json"
    record.write_text(json.dumps({"pid": 0, "http": address}))
    assert kept_server(record) is None


CLAIMED = (
    "no alarm in March",
    "origin ranks first",
    "no input differs from January-February",
    "names the trigger in its lineage",
    "quality gates passed",
    "got copies of the traffic, then 10 %, 50 %, 100 % of it",
    "champion is 2, previous is 1",
    "the job of the training is promoted",
    "refused by its gates, 0 flights",
    "rolled back by itself: worse by drift",
    "the chain holds",
    "the loop is closed",
)


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_the_loop_closes_and_again_beside_nothing_of_the_first(tmp_path: Path) -> None:
    """The second time its server stays up, so that a third one is refused."""
    loop(tmp_path, keep=False)
    output = loop(tmp_path, keep=True)
    kept = json.loads((tmp_path / "state" / "kept-server.json").read_text())
    try:
        assert f"kill {kept['pid']}" in output
        refused = demo(tmp_path, "loop")
        refusal, _ = refused.communicate(timeout=60)
        assert (refused.returncode, f"pid {kept['pid']}" in refusal) == (1, True)
        for page in ("drift-report.html", "model-card.html"):
            assert "<html" in (tmp_path / "state" / "loop" / page).read_text()
    finally:
        os.kill(kept["pid"], signal.SIGTERM)


def loop(tmp_path: Path, *, keep: bool) -> str:
    """What the second act prints, when all that it claims is so."""
    process = demo(tmp_path, "loop", keep=keep, offline=True)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert [claim for claim in CLAIMED if claim not in output] == []
    assert "FAILED" not in output
    assert output.index("drift.raised") < output.index("retrain.requested") < output.index("rollout.rolled_back")
    return output


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sigterm_in_the_loop_takes_its_server_down(tmp_path: Path) -> None:
    process = demo(tmp_path, "loop", offline=True)
    assert process.stdout is not None
    address = ""
    for line in process.stdout:
        if "ready: HTTP" in line:
            address = line.split("HTTP ")[1].split(",")[0]
        if "no alarm in March" in line:
            break
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    record = tmp_path / "kept-server.json"
    record.write_text(json.dumps({"pid": 0, "http": address}))
    assert kept_server(record) is None
