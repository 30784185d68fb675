"""What users of the KServe SDK do, over REST and gRPC: a script for an interpreter that has kserve.

    python -I kserve_checks.py '{"http": "HOST:PORT", "grpc": "HOST:PORT"}'

Prints one JSON object: check name -> "" when it held, else its traceback. It imports nothing of ours.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import numpy as np

kserve: Any = importlib.import_module("kserve")
RESTConfig: Any = importlib.import_module("kserve.inference_client").RESTConfig

ADDRESSES: dict[str, str] = {}
CHECKS: dict[str, Callable[[], Awaitable[None]]] = {}


def check(run: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    CHECKS[run.__name__] = run
    return run


def rest() -> Any:
    return kserve.InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=20))


def rpc() -> Any:
    return kserve.InferenceGRPCClient(url=ADDRESSES["grpc"], timeout=20)


def request(model: str, array: np.ndarray[Any, Any], datatype: str, *, binary: bool, name: str = "x") -> Any:
    given = kserve.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return kserve.InferRequest(model_name=model, infer_inputs=[given], request_id="k-1")


def values(answer: Any) -> np.ndarray[Any, Any]:
    return np.asarray(answer.outputs[0].as_numpy())


ARRAYS = {
    "BOOL": np.array([[True, False, True, True]]),
    "INT32": np.array([[1, -(2**31), 2**31 - 1, 0]], np.int32),
    "INT64": np.array([[2**63 - 1, -(2**63), 2**53 + 1, 0]]),
    "UINT8": np.array([[0, 1, 128, 255]], np.uint8),
    "FP32": np.array([[1.1, -2.5, 3e38, 0]], np.float32),
    "FP64": np.array([[1.1, np.pi, 1.7e308, 0]]),
}


@check
async def rest_health() -> None:
    client = rest()
    base = f"http://{ADDRESSES['http']}"
    assert await client.is_server_live(base) is True
    assert await client.is_server_ready(base) is True
    assert await client.is_model_ready(base, "affine") is True
    assert await client.is_model_ready(base, "nobody") is False
    await client.close()


@check
async def grpc_health() -> None:
    async with rpc() as client:
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is True
        assert await client.is_model_ready("affine") is True
        assert await client.is_model_ready("nobody") is False


@check
async def rest_every_datatype() -> None:
    client = rest()
    base = f"http://{ADDRESSES['http']}"
    for binary in (False, True):
        for datatype, array in ARRAYS.items():
            model = f"identity_{datatype.lower()}"
            answer = await client.infer(base, request(model, array, datatype, binary=binary), model_name=model)
            assert (answer.model_name, answer.id) == (model, "k-1")
            assert np.array_equal(values(answer), array), (datatype, binary, values(answer))
    await client.close()


@check
async def grpc_every_datatype() -> None:
    async with rpc() as client:
        for binary in (False, True):
            for datatype, array in ARRAYS.items():
                model = f"identity_{datatype.lower()}"
                answer = await client.infer(request(model, array, datatype, binary=binary))
                assert (answer.model_name, answer.id) == (model, "k-1")
                assert np.array_equal(values(answer), array), (datatype, binary, values(answer))


@check
async def texts() -> None:
    array = np.array([["a", "", "né", "x" * 300]], dtype=object)
    packed = np.array([[t.encode() for t in array[0]]], dtype=object)
    client = rest()
    asked = request("identity_bytes", packed, "BYTES", binary=True)
    answer = await client.infer(f"http://{ADDRESSES['http']}", asked, model_name="identity_bytes")
    await client.close()
    found = [t.decode() if isinstance(t, bytes) else t for t in values(answer).reshape(-1)]
    assert found == array[0].tolist(), found
    async with rpc() as over_grpc:
        answer = await over_grpc.infer(asked)
    found = [t.decode() if isinstance(t, bytes) else t for t in values(answer).reshape(-1)]
    assert found == array[0].tolist(), found


@check
async def many_at_once() -> None:
    client = rest()

    async def one(i: int) -> None:
        array = np.full((1, 4), i, np.float32)
        asked = request("affine", array, "FP32", binary=i % 2 == 0)
        if i % 3:
            answer = await client.infer(f"http://{ADDRESSES['http']}", asked, model_name="affine")
        else:
            answer = await over_grpc.infer(asked)
        assert np.array_equal(values(answer), 2 * array + 1), i

    async with rpc() as over_grpc:
        await asyncio.gather(*(one(i) for i in range(64)))
    await client.close()


@check
async def errors() -> None:
    client = rest()
    array = np.zeros((1, 5), np.float32)
    base = f"http://{ADDRESSES['http']}"
    for model, status, code, word in (
        ("nobody", 404, grpc.StatusCode.NOT_FOUND, "nobody"),
        ("affine", 400, grpc.StatusCode.INVALID_ARGUMENT, "'x'"),
    ):
        asked = request(model, array, "FP32", binary=False)
        async with rpc() as over_grpc:
            calls = client.infer(base, asked, model_name=model), over_grpc.infer(asked)
            answers: Any = await asyncio.gather(*calls, return_exceptions=True)
        over_http, over_rpc = answers
        assert isinstance(over_http, httpx.HTTPStatusError), over_http
        assert over_http.response.status_code == status
        assert word in over_http.response.json()["error"]
        assert isinstance(over_rpc, grpc.aio.AioRpcError), over_rpc
        assert over_rpc.code() is code
        assert word in str(over_rpc.details())
    await client.close()


def held(run: Callable[[], Awaitable[None]]) -> str:
    async def awaited() -> None:
        await run()

    try:
        asyncio.run(awaited())
    except Exception:
        return traceback.format_exc()
    return ""


def main() -> None:
    if sys.argv[1] == "--list":
        print(json.dumps(sorted(CHECKS)))
        return
    ADDRESSES.update(json.loads(sys.argv[1]))
    print(json.dumps({name: held(run) for name, run in CHECKS.items()}))


if __name__ == "__main__":
    main()
