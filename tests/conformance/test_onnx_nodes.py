"""The ONNX project's own node tests, each served and asked over JSON, binary and gRPC, against in-process onnxruntime.

onnx 1.22.0 is the last release that ships the node data. A model takes part when onnxruntime itself loads and runs it
and all its tensors are of a V2 datatype; everything that takes part must come back bit for bit.
"""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from server._pb import inference_pb2 as pb
from tests.support.server import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
SUITES = ("node", "pytorch-converted", "pytorch-operator", "simple")
ORT_TO_V2 = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}
FLOATS = {"FP16", "FP32", "FP64"}
AT_LEAST = 1500


@dataclass
class Case:
    """One test that onnxruntime can run: inputs and the outputs it gives in this process."""

    name: str
    model: Path
    inputs: dict[str, tuple[str, np.ndarray[Any, Any]]]
    expected: dict[str, tuple[str, np.ndarray[Any, Any]]] = field(default_factory=dict)


def session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


def load_case(folder: Path) -> Case | None:
    """The case of one folder, or None when it cannot be served over V2 at all."""
    try:
        session = ort.InferenceSession(
            str(folder / "model.onnx"), session_options(), providers=["CPUExecutionProvider"]
        )
    except Exception:  # whatever onnxruntime cannot load is not ours to serve
        return None
    wanted = session.get_inputs()
    if not wanted or any(i.type not in ORT_TO_V2 for i in [*wanted, *session.get_outputs()]):
        return None
    inputs = {}
    for position, spec in enumerate(wanted):
        stored = onnx.TensorProto()
        path = folder / "test_data_set_0" / f"input_{position}.pb"
        if not path.exists():
            return None
        try:
            stored.ParseFromString(path.read_bytes())
            array = numpy_helper.to_array(stored)
        except Exception:  # a sequence or optional value where a tensor should be
            return None
        if ORT_TO_V2[spec.type] == "BYTES":
            array = np.array([x if isinstance(x, str) else x.decode() for x in array.ravel()], object).reshape(
                array.shape
            )
        inputs[spec.name] = (ORT_TO_V2[spec.type], array)
    names = [o.name for o in session.get_outputs()]
    feed = {name: array for name, (_, array) in inputs.items()}
    try:
        first, second = session.run(names, feed), session.run(names, feed)
    except Exception:
        return None
    case = Case(f"{folder.parent.name}_{folder.name}", folder / "model.onnx", inputs)
    for output, a, b in zip(session.get_outputs(), first, second, strict=True):
        if not isinstance(a, np.ndarray) or encode(ORT_TO_V2[output.type], a) != encode(ORT_TO_V2[output.type], b):
            return None  # random operators
        case.expected[output.name] = (ORT_TO_V2[output.type], a)
    return case if _same_in_a_used_session(session, case) else None


def _same_in_a_used_session(session: ort.InferenceSession, case: Case) -> bool:
    """Some operators draw from a generator that lives on between runs: what they give depends on the runs before."""
    names, feed = list(case.expected), {name: array for name, (_, array) in case.inputs.items()}
    for _ in range(3):
        again = session.run(names, feed)
    pairs = zip(case.expected.values(), again, strict=True)
    return all(encode(datatype, wanted) == encode(datatype, got) for (datatype, wanted), got in pairs)


def encode(datatype: str, array: np.ndarray[Any, Any]) -> bytes:
    if datatype == "BYTES":
        items = [str(x).encode() for x in array.ravel()]
        return b"".join(len(x).to_bytes(4, "little") + x for x in items)
    if array.dtype == ml_dtypes.bfloat16:
        array = array.view(np.uint16)
    return np.ascontiguousarray(array).tobytes()


def as_json(datatype: str, array: np.ndarray[Any, Any]) -> list[Any]:
    if datatype in FLOATS:
        return [float(x) for x in array.astype(np.float64).ravel()]
    return array.ravel().tolist()


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    folders = [folder for suite in SUITES for folder in sorted((DATA / suite).iterdir())]
    found = [load_case(folder) for folder in folders if (folder / "model.onnx").exists()]
    return [case for case in found if case is not None]


@pytest.fixture(scope="module")
def server(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = tmp_path_factory.mktemp("nodes")
    for case in cases:
        target = repository / case.name / "1"
        target.mkdir(parents=True)
        shutil.copy(case.model, target / "model.onnx")
    state = tmp_path_factory.mktemp("state")
    with serving("--model-repository", str(repository), "--state-dir", str(state), ready_seconds=400) as running:
        yield running


def test_enough_cases_take_part(cases: list[Case]) -> None:
    assert len(cases) >= AT_LEAST


def test_every_model_is_ready(server: Server, cases: list[Case]) -> None:
    body, _ = post(server, "/v2/repository/index", b"{}")
    ready = {row["name"] for row in json.loads(body) if row["state"] == "READY"}
    missing = {case.name for case in cases} - ready
    assert not missing


def post(server: Server, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[bytes, dict[str, str]]:
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    try:
        connection.request("POST", path, body, headers or {})
        response = connection.getresponse()
        data = response.read()
        assert response.status == 200, f"{path}: {response.status} {data[:400]!r}"
        return data, {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def differences(cases: list[Case], ask: Any) -> list[str]:
    wrong = []
    for case in cases:
        try:
            got = ask(case)
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
            continue
        for name, (datatype, array) in case.expected.items():
            shape, raw = got[name]
            if tuple(shape) != array.shape or not same(datatype, raw, encode(datatype, array)):
                wrong.append(f"{case.name}.{name}: {datatype}{list(array.shape)} differs, got {list(shape)}")
    return wrong


def same(datatype: str, got: bytes, wanted: bytes) -> bool:
    """Bit for bit, but that a NaN may be any NaN (JSON carries no payload bits)."""
    if got == wanted:
        return True
    if datatype not in FLOATS or len(got) != len(wanted):
        return False
    kind = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64}[datatype]
    a, b = np.frombuffer(got, kind), np.frombuffer(wanted, kind)
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}"))))


def test_json(server: Server, cases: list[Case]) -> None:
    def ask(case: Case) -> dict[str, tuple[list[int], bytes]]:
        inputs = [
            {"name": name, "datatype": datatype, "shape": list(array.shape), "data": as_json(datatype, array)}
            for name, (datatype, array) in case.inputs.items()
        ]
        body, _ = post(server, f"/v2/models/{case.name}/infer", json.dumps({"inputs": inputs}).encode())
        answer = json.loads(body)
        return {o["name"]: (o["shape"], from_json(o["datatype"], o["data"])) for o in answer["outputs"]}

    assert differences(cases, ask) == []


def from_json(datatype: str, data: list[Any]) -> bytes:
    if datatype == "BYTES":
        return encode(datatype, np.array(data, object))
    kinds = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "BOOL": np.bool_}
    kind = kinds.get(datatype) or np.dtype(datatype.lower())
    return np.array(data, dtype=kind).tobytes()


def test_binary(server: Server, cases: list[Case]) -> None:
    def ask(case: Case) -> dict[str, tuple[list[int], bytes]]:
        inputs, chunks = [], []
        for name, (datatype, array) in case.inputs.items():
            raw = encode(datatype, array)
            chunks.append(raw)
            inputs.append(
                {
                    "name": name,
                    "datatype": datatype,
                    "shape": list(array.shape),
                    "parameters": {"binary_data_size": len(raw)},
                }
            )
        head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
        body, headers = post(
            server,
            f"/v2/models/{case.name}/infer",
            head + b"".join(chunks),
            {"Inference-Header-Content-Length": str(len(head))},
        )
        size = int(headers["inference-header-content-length"])
        answer, at = json.loads(body[:size]), size
        found = {}
        for output in answer["outputs"]:
            length = output["parameters"]["binary_data_size"]
            found[output["name"]] = (output["shape"], body[at : at + length])
            at += length
        assert at == len(body)
        return found

    assert differences(cases, ask) == []


def test_grpc(server: Server, cases: list[Case]) -> None:
    with grpc.insecure_channel(server.grpc, options=[("grpc.max_receive_message_length", -1)]) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )

        def ask(case: Case) -> dict[str, tuple[list[int], bytes]]:
            request = pb.ModelInferRequest(model_name=case.name, id=case.name)
            for name, (datatype, array) in case.inputs.items():
                request.inputs.add(name=name, datatype=datatype, shape=array.shape)
                request.raw_input_contents.append(encode(datatype, array))
            try:
                answer = infer(request, timeout=60)
            except grpc.RpcError as error:
                raise AssertionError(str(error.details())) from None
            assert answer.id == case.name
            pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
            return {output.name: (list(output.shape), raw) for output, raw in pairs}

        assert differences(cases, ask) == []
