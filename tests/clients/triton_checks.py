"""What users of tritonclient do, and what they must see: a script for an interpreter that has tritonclient.

    python -I triton_checks.py '{"http": "HOST:PORT", "grpc": "HOST:PORT"}'

Prints one JSON object: check name -> "" when it held, else its traceback. It imports nothing of ours, for the two
sets of generated code cannot live in one process.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

over_grpc: Any = importlib.import_module("tritonclient.grpc")
over_grpc_aio: Any = importlib.import_module("tritonclient.grpc.aio")
over_http: Any = importlib.import_module("tritonclient.http")
over_http_aio: Any = importlib.import_module("tritonclient.http.aio")
InferenceServerException: Any = importlib.import_module("tritonclient.utils").InferenceServerException

CHECKS: dict[str, Callable[[], Any]] = {}
ADDRESSES: dict[str, str] = {}
PROTOCOLS: dict[str, Any] = {"http": over_http, "grpc": over_grpc}
ASYNC: dict[str, Any] = {"http": over_http_aio, "grpc": over_grpc_aio}
RNG = np.random.default_rng(0)

TEXTS = np.array([[b"", "né".encode(), b"a\x00b", b"x" * 1000]], dtype=object)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "BOOL": np.array([[True, False, True, True]]),
    **{
        np_name.upper(): np.array([[np.iinfo(np_name).min, np.iinfo(np_name).max, 1, 100]], dtype=np_name)
        for np_name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
    "FP16": np.array([[1.5, -65504, np.inf, 0.1]], np.float16),
    "FP32": np.array([[1.1, -np.inf, 3e38, 1e-45]], np.float32),
    "FP64": np.array([[1.1, np.pi, 1.7e308, 5e-324]], np.float64),
    "BYTES": TEXTS,
}


def check(run: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[run.__name__] = run
    return run


def both(run: Callable[[str], Any]) -> Callable[[str], Any]:
    """The check once per protocol."""
    for protocol in PROTOCOLS:
        CHECKS[f"{run.__name__}_{protocol}"] = functools.partial(run, protocol)
    return run


def client(protocol: str, **options: Any) -> Any:
    return PROTOCOLS[protocol].InferenceServerClient(ADDRESSES[protocol], **options)


def tensor(protocol: str, array: np.ndarray[Any, Any], datatype: str, name: str = "x", **options: Any) -> Any:
    built = PROTOCOLS[protocol].InferInput(name, list(array.shape), datatype)
    built.set_data_from_numpy(array, **options)
    return built


def affine(protocol: str, value: float) -> list[Any]:
    return [tensor(protocol, np.full((1, 4), value, np.float32), "FP32")]


def same(got: np.ndarray[Any, Any] | None, wanted: np.ndarray[Any, Any]) -> None:
    assert got is not None, "the output is missing"
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if wanted.dtype == object:
        assert got.tolist() == wanted.tolist(), got
    else:
        assert got.dtype == wanted.dtype, (got.dtype, wanted.dtype)
        assert np.array_equal(got, wanted), (got, wanted)


def same_affine(result: Any, value: float) -> None:
    same(result.as_numpy("y"), np.full((1, 4), 2 * np.float32(value) + 1, np.float32))


def failure(call: Callable[[], Any]) -> Any:
    """The client's error, None when the call went well."""
    try:
        call()
    except InferenceServerException as error:
        return error
    return None


def refused(call: Callable[[], Any], statuses: tuple[str, ...], *words: str) -> None:
    error = failure(call)
    assert error is not None, "it was not refused"
    assert error.status() in statuses, (error.status(), error.message())
    assert [word for word in words if word not in error.message()] == [], error.message()


INVALID = ("400", "StatusCode.INVALID_ARGUMENT")
MISSING = ("404", "StatusCode.NOT_FOUND")
UNREADY = ("503", "StatusCode.UNAVAILABLE")


# --- health, metadata, management -----------------------------------------------------------------------------------


@both
def health(protocol: str) -> None:
    with client(protocol) as c:
        assert c.is_server_live() is True
        assert c.is_server_ready() is True
        assert c.is_model_ready("affine") is True
        assert c.is_model_ready("affine", "1") is True
        assert c.is_model_ready("nobody") is False
        assert c.is_model_ready("affine", "9") is False


def metadata_of(protocol: str, method: str, *args: Any) -> Any:
    with client(protocol) as c:
        more = {"as_json": True} if protocol == "grpc" else {}
        return getattr(c, method)(*args, **more)


@both
def server_metadata(protocol: str) -> None:
    found = metadata_of(protocol, "get_server_metadata")
    assert found["name"] == "tidegate", found
    assert found["version"]
    assert "binary_tensor_data" in found["extensions"]


@both
def model_metadata(protocol: str) -> None:
    found = metadata_of(protocol, "get_model_metadata", "affine", "1")
    assert (found["name"], found["versions"], found["platform"]) == ("affine", ["1"], "onnxruntime_onnx")
    (x,), (y,) = found["inputs"], found["outputs"]
    assert (x["name"], x["datatype"], [int(d) for d in x["shape"]]) == ("x", "FP32", [-1, 4])
    assert (y["name"], y["datatype"]) == ("y", "FP32")


@both
def model_config(protocol: str) -> None:
    found = metadata_of(protocol, "get_model_config", "labelled")
    found = found.get("config", found)
    assert found["name"] == "labelled"
    assert found["max_batch_size"] == 8
    (x,) = found["input"]
    assert (x["name"], x["data_type"], [int(d) for d in x["dims"]]) == ("x", "TYPE_FP32", [4])


@both
def statistics(protocol: str) -> None:
    def count() -> int:
        (entry,) = metadata_of(protocol, "get_inference_statistics", "affine")["model_stats"]
        assert int(entry["inference_stats"]["success"]["count"]) >= int(entry["execution_count"]) > 0
        assert int(entry["inference_stats"]["compute_infer"]["ns"]) > 0
        return int(entry["inference_count"])

    with client(protocol) as c:
        c.infer("affine", affine(protocol, 1))
        before = count()
        for _ in range(3):
            c.infer("affine", affine(protocol, 1))
        assert count() - before == 3
    assert len(metadata_of(protocol, "get_inference_statistics")["model_stats"]) > 10


@both
def repository_and_model_control(protocol: str) -> None:
    def state(name: str) -> str:
        index = metadata_of(protocol, "get_model_repository_index")
        rows = index if isinstance(index, list) else index["models"]
        return next(row.get("state", "") for row in rows if row["name"] == name)

    with client(protocol) as c:
        assert state("spare") == "READY"
        c.unload_model("spare")
        assert state("spare") != "READY"
        assert c.is_model_ready("spare") is False
        refused(lambda: c.infer("spare", affine(protocol, 1)), UNREADY, "spare")
        c.load_model("spare")
        assert c.is_model_ready("spare") is True
        same_affine(c.infer("spare", affine(protocol, 1)), 1)
        refused(lambda: c.load_model("nobody"), MISSING, "nobody")
        refused(lambda: c.load_model(".."), INVALID)
        refused(lambda: c.unload_model("nobody"), MISSING, "nobody")
        refused(lambda: c.load_model("spare", config="{}"), INVALID)


@both
def trace_settings(protocol: str) -> None:
    def rate(answer: Any) -> str:
        value = answer.get("settings", answer)["trace_rate"]
        return value["value"][0] if isinstance(value, dict) else value

    with client(protocol) as c:
        more = {"as_json": True} if protocol == "grpc" else {}
        before = rate(c.get_trace_settings(**more))
        assert rate(c.update_trace_settings(settings={"trace_rate": "7"}, **more)) == "7"
        assert rate(c.get_trace_settings(model_name="affine", **more)) == "7"
        c.update_trace_settings(model_name="affine", settings={"trace_level": ["TIMESTAMPS"], "trace_rate": "3"})
        assert rate(c.get_trace_settings(model_name="affine", **more)) == "3"
        assert rate(c.get_trace_settings(**more)) == "7"
        c.update_trace_settings(settings={"trace_rate": None})
        c.update_trace_settings(model_name="affine", settings={"trace_rate": None, "trace_level": None})
        assert rate(c.get_trace_settings(model_name="affine", **more)) == before
        refused(lambda: c.update_trace_settings(settings={"trace_file": "/etc/x"}), INVALID, "trace_file")
        refused(lambda: c.get_trace_settings(model_name="nobody"), MISSING)


@both
def log_settings(protocol: str) -> None:
    with client(protocol) as c:
        more = {"as_json": True} if protocol == "grpc" else {}
        found = c.update_log_settings({"log_verbose_level": 1, "log_info": True}, **more)
        found = found.get("settings", found)["log_verbose_level"]
        assert (found["uint32_param"] if isinstance(found, dict) else found) == 1
        c.update_log_settings({"log_verbose_level": 0})
        refused(lambda: c.update_log_settings({"log_file": "/etc/x"}), INVALID, "log_file")
        assert c.get_log_settings(**more)


@both
def shared_memory_is_refused_clearly(protocol: str) -> None:
    with client(protocol) as c:
        statuses = ("404", "501", "400", "StatusCode.UNIMPLEMENTED")
        refused(lambda: c.register_system_shared_memory("r", "/r", 64), statuses)


# --- inference ------------------------------------------------------------------------------------------------------


@both
def every_datatype(protocol: str) -> None:
    with client(protocol) as c:
        for datatype, array in ARRAYS.items():
            result = c.infer(f"identity_{datatype.lower()}", [tensor(protocol, array, datatype)])
            same(result.as_numpy("x" if result.as_numpy("y") is None else "y"), array)


@both
def bf16(protocol: str) -> None:
    """numpy has no bfloat16: the client takes float32 and cuts it, and gives float32 back."""
    array = np.array([[1.0, -2.5, 3e38, 0.0078125]], np.float32)
    wanted = (array.view(np.uint32) & 0xFFFF0000).view(np.float32)
    with client(protocol) as c:
        given = PROTOCOLS[protocol].InferInput("x", [1, 4], "BF16")
        try:
            given.set_data_from_numpy(array)
        except InferenceServerException:
            import ml_dtypes

            given.set_data_from_numpy(array.astype(ml_dtypes.bfloat16))
            wanted = array.astype(ml_dtypes.bfloat16).astype(np.float32)
        got = c.infer("identity_bf16", [given]).as_numpy("y")
        assert np.array_equal(got.astype(np.float32), wanted), got


@check
def json_in_and_out() -> None:
    """Without the binary extension, in each of the four mixes."""
    with client("http") as c:
        for datatype, array in ARRAYS.items():
            if datatype == "FP16":
                continue  # the client has no JSON form for it
            if datatype == "BYTES":
                array = np.array([[b"", "né".encode(), b"a\tb", b"x" * 1000]], dtype=object)
            if datatype == "FP32":
                array = np.array([[1.1, -2.5, 3e38, 1e-45]], np.float32)  # the client writes no infinities
            for binary_in in (True, False):
                for binary_out in (True, False):
                    given = tensor("http", array, datatype, binary_data=binary_in)
                    wanted = over_http.InferRequestedOutput("y", binary_data=binary_out)
                    got = c.infer(f"identity_{datatype.lower()}", [given], outputs=[wanted]).as_numpy("y")
                    if datatype == "BYTES":
                        got = np.array([[t.encode() if isinstance(t, str) else t for t in got[0]]], dtype=object)
                    same(got, array)


@both
def texts_that_are_not_utf8(protocol: str) -> None:
    """The runtime's texts are UTF-8: others are refused by name, and never changed."""
    with client(protocol) as c:
        array = np.array([[b"a", b"\xff\xfe", b"", b"b"]], dtype=object)
        refused(lambda: c.infer("identity_bytes", [tensor(protocol, array, "BYTES")]), INVALID, "'x'", "UTF-8")


@both
def requested_outputs(protocol: str) -> None:
    module = PROTOCOLS[protocol]
    a, b = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 3, np.int32)
    given = [tensor(protocol, b, "INT32", "INPUT1"), tensor(protocol, a, "INT32", "INPUT0")]
    with client(protocol) as c:
        whole = c.infer("simple", given)
        same(whole.as_numpy("OUTPUT0"), a + b)
        same(whole.as_numpy("OUTPUT1"), a - b)
        part = c.infer("simple", given, outputs=[module.InferRequestedOutput("OUTPUT1")])
        same(part.as_numpy("OUTPUT1"), a - b)
        assert part.as_numpy("OUTPUT0") is None
        unknown = module.InferRequestedOutput("OUTPUT7")
        refused(lambda: c.infer("simple", given, outputs=[unknown]), INVALID, "OUTPUT7", "simple")
        refused(lambda: c.infer("simple", given[:1]), INVALID, "INPUT0")


@both
def classification(protocol: str) -> None:
    module = PROTOCOLS[protocol]
    array = np.array([[1, 9, 3, 4], [8, 1, 2, 3]], np.float32)
    with client(protocol) as c:
        outputs = [module.InferRequestedOutput("y", class_count=2)]
        rows = c.infer("labelled", [tensor(protocol, array, "FP32")], outputs=outputs).as_numpy("y")
        found = [[t if isinstance(t, str) else t.decode() for t in row] for row in rows]
        assert [[t.split(":")[1:] for t in row] for row in found] == [
            [["1", "dog"], ["3", "fish"]],
            [["0", "cat"], ["3", "fish"]],
        ], found
        assert float(found[0][0].split(":")[0]) == 19
        texts = [tensor(protocol, TEXTS, "BYTES")]
        refused(lambda: c.infer("identity_bytes", texts, outputs=outputs), INVALID)


@both
def ids_versions_and_parameters(protocol: str) -> None:
    with client(protocol) as c:
        result = c.infer(
            "affine", affine(protocol, 2), request_id="né-7", model_version="1", priority=1, timeout=5_000_000,
            parameters={"custom": "a", "number": 5, "flag": True}, headers={"x-custom": "1"},
        )  # fmt: skip
        answer = result.get_response()
        found = answer if isinstance(answer, dict) else {"id": answer.id, "model_version": answer.model_version}
        assert (found["id"], found["model_version"]) == ("né-7", "1"), found
        same_affine(result, 2)


@both
def timeouts(protocol: str) -> None:
    """The queue's timeout is the server's, ``client_timeout`` and ``network_timeout`` the client's own."""
    one = [tensor(protocol, np.ones((1, 1), np.float32), "FP32")]
    busy = threading.Thread(target=lambda: [client(protocol).infer("slow", one) for _ in range(3)])
    if protocol == "grpc":
        with client(protocol) as c:
            refused(lambda: c.infer("slow", one, client_timeout=0.005), ("StatusCode.DEADLINE_EXCEEDED",))
            same(c.infer("slow", one, client_timeout=20).as_numpy("y"), np.ones((1, 1), np.float32))
        return
    busy.start()
    try:
        with client(protocol, network_timeout=0.005) as c:
            try:
                c.infer("slow", one)
            except InferenceServerException as error:
                raise AssertionError(error) from None
            except OSError:
                pass
            else:
                raise AssertionError("no timeout")
    finally:
        busy.join()
    with client(protocol) as c:
        same(c.infer("slow", one).as_numpy("y"), np.ones((1, 1), np.float32))


@both
def queue_timeout(protocol: str) -> None:
    """``timeout`` is in microseconds of waiting: behind a busy engine it passes."""
    one = [tensor(protocol, np.ones((1, 1), np.float32), "FP32")]
    over = threading.Event()

    def occupy() -> None:
        with client(protocol) as c:
            while not over.is_set():
                c.infer("impatient", one)

    threads = [threading.Thread(target=occupy) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        with client(protocol) as c:
            until = time.monotonic() + 10
            while time.monotonic() < until:
                error = failure(lambda: c.infer("impatient", one, timeout=1))
                if error is not None:
                    assert error.status() in UNREADY, error
                    assert "timeout" in error.message(), error
                    return
            raise AssertionError("no request ever waited longer than a microsecond")
    finally:
        over.set()
        for thread in threads:
            thread.join()


@both
def compression(protocol: str) -> None:
    array = np.tile(np.arange(4, dtype=np.float32), (2000, 1))
    with client(protocol) as c:
        for algorithm in ("gzip", "deflate"):
            if protocol == "grpc":
                result = c.infer("identity_fp32", [tensor(protocol, array, "FP32")], compression_algorithm=algorithm)
                same(result.as_numpy("y"), array)
                continue
            for binary in (True, False):
                result = c.infer(
                    "identity_fp32",
                    [tensor(protocol, array, "FP32", binary_data=binary)],
                    outputs=[over_http.InferRequestedOutput("y", binary_data=binary)],
                    request_compression_algorithm=algorithm,
                    response_compression_algorithm=algorithm,
                )
                same(result.as_numpy("y"), array)


@both
def large_tensors(protocol: str) -> None:
    array = RNG.random((1_250_000, 4), dtype=np.float32)  # 20 MB
    with client(protocol) as c:
        same(c.infer("identity_fp32", [tensor(protocol, array, "FP32")]).as_numpy("y"), array)


@both
def errors(protocol: str) -> None:
    module = PROTOCOLS[protocol]
    with client(protocol) as c:
        good = affine(protocol, 1)
        refused(lambda: c.infer("nobody", good), MISSING, "Request for unknown model", "nobody")
        refused(lambda: c.infer("affine", good, model_version="9"), MISSING, "9")
        refused(lambda: c.infer("affine", good, model_version="x"), INVALID, "x")
        refused(lambda: c.infer("affine", good * 2), INVALID, "x")
        for shape, datatype in (([1, 5], "FP32"), ([4], "FP32"), ([1, 4], "INT32"), ([0, 4], "FP32")):
            array = np.zeros(shape, np.int32 if datatype == "INT32" else np.float32)
            given = [tensor(protocol, array, datatype)]
            refused(functools.partial(c.infer, "affine", given), INVALID, "'x'", "affine")
        other = [tensor(protocol, np.ones((1, 4), np.float32), "FP32", "z")]
        refused(lambda: c.infer("affine", other), INVALID, "'z'", "'x'")
        nine = [tensor(protocol, np.ones((9, 4), np.float32), "FP32")]
        refused(lambda: c.infer("labelled", nine), INVALID, "8", "9")
        bad_row = [tensor(protocol, np.array([[99]], np.int64), "INT64")]
        refused(lambda: c.infer("lookup", bad_row), INVALID)
        twice = [module.InferRequestedOutput("y")] * 2
        refused(lambda: c.infer("affine", good, outputs=twice), INVALID, "y")
        refused(lambda: c.get_model_metadata("nobody"), MISSING, "nobody")
        refused(lambda: c.get_model_config("nobody"), MISSING, "nobody")
        refused(lambda: c.get_inference_statistics("nobody"), MISSING, "nobody")
        same_affine(c.infer("affine", good), 1)


# --- many at once ---------------------------------------------------------------------------------------------------


@check
def async_infer_http() -> None:
    with client("http", concurrency=64) as c:
        for _ in range(3):
            asked = [(i, c.async_infer("affine", affine("http", i), request_id=str(i))) for i in range(64)]
            for i, handle in asked:
                result = handle.get_result()
                assert result.get_response()["id"] == str(i)
                same_affine(result, i)


@check
def async_infer_grpc() -> None:
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with client("grpc") as c:
        for i in range(192):
            c.async_infer("affine", affine("grpc", i), lambda result, error, i=i: answers.put((i, result, error)))
        seen = set()
        for _ in range(192):
            i, result, error = answers.get(timeout=20)
            assert error is None, error
            same_affine(result, i)
            seen.add(i)
        assert seen == set(range(192))
        c.async_infer("nobody", affine("grpc", 1), lambda result, error: answers.put((0, result, error)))
        _, result, error = answers.get(timeout=20)
        assert result is None
        assert error.status() == "StatusCode.NOT_FOUND"


@check
def threads_of_both_protocols() -> None:
    failures: list[str] = []

    def work(protocol: str, first: int) -> None:
        try:
            with client(protocol) as c:
                for i in range(first, first + 40):
                    rows = 1 + i % 5
                    array = np.full((rows, 4), i, np.float32)
                    got = c.infer("affine", [tensor(protocol, array, "FP32")]).as_numpy("y")
                    same(got, 2 * array + 1)
        except Exception:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(("http", "grpc")[i % 2], 1000 * i)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def asyncio_client(protocol: str) -> None:
    module = ASYNC[protocol]

    async def one(c: Any, i: int) -> None:
        given = module.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.full((1, 4), i, np.float32))
        same_affine(await c.infer("affine", [given], request_id=str(i)), i)

    async def main() -> None:
        async with module.InferenceServerClient(ADDRESSES[protocol]) as c:
            assert await c.is_server_live()
            assert await c.is_server_ready()
            assert await c.is_model_ready("affine")
            assert not await c.is_model_ready("nobody")
            await asyncio.gather(*(one(c, i) for i in range(64)))
            error: Any
            [error] = await asyncio.gather(c.infer("nobody", []), return_exceptions=True)
            assert isinstance(error, InferenceServerException)
            assert error.status() in MISSING, error
            task = asyncio.ensure_future(one(c, 5))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await one(c, 6)

    asyncio.run(main())


for _protocol in ASYNC:
    CHECKS[f"asyncio_{_protocol}"] = functools.partial(asyncio_client, _protocol)


# --- streams --------------------------------------------------------------------------------------------------------


@check
def stream() -> None:
    """An error in the middle is one answer and does not end the stream; order is kept."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with client("grpc") as c:
        c.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(100):
            model = "nobody" if i == 30 else "affine"
            given = [tensor("grpc", np.ones((1, 5), np.float32), "FP32")] if i == 60 else affine("grpc", i)
            c.async_stream_infer(model, given, request_id=str(i))
        for i in range(100):
            result, error = answers.get(timeout=20)
            if i in (30, 60):
                assert result is None
                assert ("nobody" if i == 30 else "'x'") in error.message(), error
            else:
                assert error is None, (i, error)
                assert result.get_response().id == str(i)
                same_affine(result, i)
        c.stop_stream()
        assert answers.empty()
        c.start_stream(lambda result, error: answers.put((result, error)))
        c.async_stream_infer("affine", affine("grpc", 1), enable_empty_final_response=True)
        result, error = answers.get(timeout=20)
        assert error is None
        same_affine(result, 1)
        assert result.get_response().parameters["triton_final_response"].bool_param is True
        c.stop_stream()


@check
def stream_with_a_timeout() -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with client("grpc") as c:
        c.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=0.3)
        one = [tensor("grpc", np.ones((1, 1), np.float32), "FP32")]
        for _ in range(60):
            c.async_stream_infer("slow", one)
        while True:
            _, error = answers.get(timeout=20)
            if error is not None:
                # The server may see the deadline first: its answer to the message then says so.
                assert error.status() == "StatusCode.DEADLINE_EXCEEDED" or "deadline passed" in error.message(), error
                break


@check
def stream_cancelled() -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with client("grpc") as c:
        c.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(20):
            c.async_stream_infer("slow", [tensor("grpc", np.full((1, 1), i, np.float32), "FP32")])
        c.stop_stream(cancel_requests=True)
        same_affine(c.infer("affine", affine("grpc", 4)), 4)


@check
def stream_asyncio() -> None:
    async def asked() -> Any:
        for i in range(50):
            given = over_grpc.InferInput("x", [1, 4], "FP32")
            given.set_data_from_numpy(np.full((1, 4), i, np.float32))
            yield {"model_name": "nobody" if i == 20 else "affine", "inputs": [given], "request_id": str(i)}

    async def main() -> None:
        async with over_grpc_aio.InferenceServerClient(ADDRESSES["grpc"]) as c:
            i = 0
            async for result, error in c.stream_infer(asked()):
                if i == 20:
                    assert error is not None
                else:
                    assert error is None, error
                    same_affine(result, i)
                i += 1
            assert i == 50

    asyncio.run(main())


@check
def cancelled_calls() -> None:
    """``async_infer`` gives a handle that can be cancelled; the others' answers stay right."""
    answers: queue.Queue[tuple[int, Any, Any]] = queue.Queue()
    with client("grpc") as c:
        handles = []
        for i in range(40):
            given = [tensor("grpc", np.full((1, 1), i, np.float32), "FP32")]
            handles.append(c.async_infer("slow", given, lambda result, error, i=i: answers.put((i, result, error))))
        for handle in handles[1::2]:
            handle.cancel()
        for _ in range(40):
            i, result, error = answers.get(timeout=30)
            if i % 2 == 0:
                assert error is None, error
                same(result.as_numpy("y"), np.full((1, 1), i, np.float32))
            elif error is not None:
                assert "CANCELLED" in str(error.status()), error


def held(run: Callable[[], Any]) -> str:
    try:
        run()
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> None:
    if sys.argv[1] == "--list":
        print(json.dumps(sorted(CHECKS)))
        return
    ADDRESSES.update(json.loads(sys.argv[1]))
    only = sys.argv[2:]
    print(json.dumps({name: held(run) for name, run in CHECKS.items() if not only or name in only}))


if __name__ == "__main__":
    main()
