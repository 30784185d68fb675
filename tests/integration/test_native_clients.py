"""Public clients on the native transport, and what their calls do to each other: cancels, deadlines, drains."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.transport.native.h2 import Http2Settings
from server.types import RequestLimits
from tests.support import pki
from tests.support.echo import Running, running
from tests.support.http2 import INFER, STREAM_INFER
from tests.support.secured import secured

LIMITS = RequestLimits(max_body_bytes=16 * 1024 * 1024)
OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(transport="native", limits=LIMITS, http2=Http2Settings()) as started:
        yield started


def at(server: Running) -> str:
    return f"{server.grpc[0]}:{server.grpc[1]}"


def settled(server: Running) -> bool:
    port = server.port
    return port.wait(lambda: len(port.admitted) == len(port.released)) and len(set(port.released)) == len(port.released)


def message(model: str = "affine", count: int = 2, id: str = "") -> bytes:
    request = pb.ModelInferRequest(model_name=model, id=id)
    request.inputs.add(name="x", datatype="FP32", shape=[1, count])
    request.raw_input_contents.append(np.arange(count, dtype="<f4").tobytes())
    return request.SerializeToString()


def right(raw: bytes, model: str = "affine", count: int = 2) -> bool:
    x = np.arange(count, dtype="<f4")
    got = np.frombuffer(pb.ModelInferResponse.FromString(raw).raw_output_contents[0], "<f4")
    return np.array_equal(got, x if model == "echo" else 2 * x + 1)


def status(error: grpc.RpcError) -> str:
    return str(error.code().name)


# --- grpcio ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 150_000, 1_500_000], ids=["small", "600 kB", "6 MB"])
def test_sizes_both_ways(server: Running, count: int) -> None:
    with grpc.insecure_channel(at(server), OPTIONS) as channel:
        for _ in range(3):
            assert right(channel.unary_unary(INFER)(message("echo", count), timeout=20), "echo", count)
    assert settled(server)


def test_large_messages_side_by_side(server: Running) -> None:
    async def body() -> None:
        async with grpc.aio.insecure_channel(at(server), OPTIONS) as channel:
            call = channel.unary_unary(INFER)
            answers = await asyncio.gather(*(call(message("echo", 75_000), timeout=30) for _ in range(40)))
        assert all(right(answer, "echo", 75_000) for answer in answers)

    asyncio.run(body())
    assert settled(server)


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compression(server: Running, compression: grpc.Compression) -> None:
    with grpc.insecure_channel(at(server), OPTIONS, compression=compression) as channel:
        assert right(channel.unary_unary(INFER)(message("echo", 150_000), timeout=20), "echo", 150_000)
        raws = iter([message("echo", 50_000)] * 5)
        for raw in channel.stream_stream(STREAM_INFER)(raws, timeout=20):
            answer = pb.ModelStreamInferResponse.FromString(raw)
            assert len(answer.infer_response.raw_output_contents[0]) == 200_000


def test_binary_metadata_unknown_methods_and_deadlines(server: Running) -> None:
    with grpc.insecure_channel(at(server), OPTIONS) as channel:
        metadata = (("x-key-bin", bytes(range(256))), ("x-key", "v"))
        assert right(channel.unary_unary(INFER)(message(), timeout=30, metadata=metadata))
        assert server.port.admitted[-1].metadata["x-key"] == "v"
        for path, model, timeout, code in (
            ("/a/B", "affine", 10.0, "UNIMPLEMENTED"),
            (INFER, "nobody", 10.0, "NOT_FOUND"),
            (INFER, "held", 0.05, "DEADLINE_EXCEEDED"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path)(message(model), timeout=timeout)
            assert status(caught.value) == code
    assert settled(server)
    server.port.held.clear()


def test_a_stream_of_a_hundred_aio(server: Running) -> None:
    async def body() -> None:
        async def requests() -> AsyncIterator[bytes]:
            for i in range(100):
                yield message("later", 2 + i % 5, str(i))

        async with grpc.aio.insecure_channel(at(server), OPTIONS) as channel:
            got = [raw async for raw in channel.stream_stream(STREAM_INFER)(requests(), timeout=20)]
        ids = [pb.ModelStreamInferResponse.FromString(raw).infer_response.id for raw in got]
        assert ids == [str(i) for i in range(100)]

    asyncio.run(body())
    assert settled(server)


def test_uploads_that_are_refused_on_arrival_leave_the_connection_whole(server: Running) -> None:
    """Much of each body is on its way when its call is refused; the calls between them are served."""

    async def body() -> None:
        async with grpc.aio.insecure_channel(at(server), OPTIONS) as channel:
            call = channel.unary_unary(INFER)
            large = message("echo", 5_000_000)

            async def refused() -> str:
                try:
                    await call(large, timeout=30)
                except grpc.aio.AioRpcError as error:
                    return status(error)
                return "OK"

            for _ in range(3):
                told = await asyncio.gather(*(refused() for _ in range(8)))
                assert set(told) == {"RESOURCE_EXHAUSTED"}, told
                assert right(await call(message(), timeout=30))

    asyncio.run(body())
    assert settled(server)


# --- neighbours --------------------------------------------------------------------------------------------------


def test_cancelled_calls_never_reach_their_neighbours(server: Running) -> None:
    """200 at once on one connection, every second one cancelled at once, 60 times over."""

    async def body() -> Counter[str]:
        tally: Counter[str] = Counter()
        async with grpc.aio.insecure_channel(at(server), OPTIONS) as channel:
            call = channel.unary_unary(INFER)
            for _ in range(60):
                calls = [call(message("later"), timeout=20) for _ in range(200)]
                for dropped in calls[::2]:
                    dropped.cancel()
                for result in await asyncio.gather(*calls[1::2], return_exceptions=True):
                    tally["ok" if isinstance(result, bytes) and right(result) else repr(result)] += 1
        return tally

    assert asyncio.run(body()) == {"ok": 6000}
    assert settled(server)


def test_expired_deadlines_do_not_cut_an_honest_client_off(server: Running) -> None:
    """3,000 calls whose 100 ms are over before their answer, 300 at a time, beside others on the same connection."""

    async def body() -> Counter[str]:
        tally: Counter[str] = Counter()

        async with grpc.aio.insecure_channel(at(server), [*OPTIONS, ("grpc.enable_retries", 0)]) as channel:
            call = channel.unary_unary(INFER)
            for _ in range(10):
                late = [call(message("held"), timeout=0.1) for _ in range(300)]
                kept = await asyncio.gather(*(call(message(), timeout=20) for _ in range(20)))
                tally["ok"] += sum(map(right, kept))
                for result in await asyncio.gather(*late, return_exceptions=True):
                    tally[status(result) if isinstance(result, grpc.aio.AioRpcError) else repr(result)] += 1
        return tally

    before = len(server.port.admitted)
    assert asyncio.run(body()) == {"ok": 200, "DEADLINE_EXCEEDED": 3000}
    assert settled(server)
    assert len({head.peer for head in server.port.admitted[before:]}) == 1  # on one connection from first to last
    server.port.held.clear()


@pytest.mark.parametrize("kind", ["closed loop", "open loop"])
def test_a_drain_loses_no_call(kind: str) -> None:
    """What was taken is answered; what was not is tried again by the client itself, and then finds nobody."""

    async def body(server: Running) -> Counter[str]:
        tally: Counter[str] = Counter()
        over, warm = asyncio.Event(), asyncio.Event()
        async with grpc.aio.insecure_channel(at(server), OPTIONS) as channel:
            call = channel.unary_unary(INFER)

            async def one() -> None:
                try:
                    tally["ok" if right(await call(message("later"), timeout=20)) else "wrong"] += 1
                except grpc.aio.AioRpcError as error:
                    refused = status(error) == "UNAVAILABLE" and "onnect" in (error.details() or "")
                    tally["refused" if refused else f"{status(error)} {error.details()}"] += 1
                    over.set()
                if tally["ok"] >= 300:
                    warm.set()

            async def loop() -> None:
                while not over.is_set():
                    await one()

            async def spray() -> None:
                async with asyncio.TaskGroup() as calls:
                    while not over.is_set():
                        calls.create_task(one())
                        await asyncio.sleep(0.001)

            workers = [asyncio.create_task(loop() if kind == "closed loop" else spray()) for _ in range(8)]
            await warm.wait()
            drained = asyncio.run_coroutine_threadsafe(server.grpc_server.drain(8), server.loop)
            assert await asyncio.wrap_future(drained)
            await asyncio.gather(*workers)
        return tally

    with running(transport="native", limits=LIMITS) as server:
        tally = asyncio.run(asyncio.wait_for(body(server), 40))
        assert set(tally) <= {"ok", "refused"}, tally
        assert settled(server)


# --- other clients -----------------------------------------------------------------------------------------------

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
needs_nghttp = pytest.mark.skipif(shutil.which("nghttp") is None, reason="nghttp (nghttp2-client) is not installed")
JSON = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}]})


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


@needs_curl
@pytest.mark.parametrize(
    ("flag", "version"),
    [("--http1.1", "1.1"), ("--http1.0", "1.1"), ("--http2", "1.1"), ("--http2-prior-knowledge", "2")],
)
@pytest.mark.parametrize("address", ["http", "grpc"])
def test_curl(server: Running, flag: str, version: str, address: str) -> None:
    """Both addresses speak every protocol; an offer of h2c in a header is not taken."""
    host, port = getattr(server, address)
    out = ("-s", flag, "-w", "\n%{http_code} %{http_version}", "-d", JSON)
    answer, _, code = told("curl", *out, f"http://{host}:{port}/v2/models/affine/infer").rpartition("\n")
    assert code == f"200 {version}"
    assert json.loads(answer)["outputs"][0]["data"] == [3.0, 6.0]


@needs_nghttp
def test_nghttp(server: Running, tmp_path: Path) -> None:
    sent = tmp_path / "body.json"
    sent.write_text(JSON)
    url = f"http://{server.http[0]}:{server.http[1]}/v2/models/affine/infer"
    assert json.loads(told("nghttp", "-d", str(sent), url))["outputs"][0]["data"] == [3.0, 6.0]
    assert "200" in told("nghttp", "-nv", "-m", "5", url.replace("/infer", ""))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pki.usual(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def secret(server: Running, certificates: Path) -> Iterator[str]:
    """An address where both sides show a certificate."""
    with secured(server, certificates) as address:
        yield address


@needs_curl
@pytest.mark.parametrize(("flag", "version"), [("--http1.1", "1.1"), ("--http2", "2")])
def test_curl_over_tls(secret: str, certificates: Path, flag: str, version: str) -> None:
    """ALPN decides."""
    shown = ("--cacert", "ca.pem", "--cert", "client.pem", "--key", "client.key")
    files = [part if part.startswith("--") else str(certificates / part) for part in shown]
    out = ("-s", flag, "-w", "\n%{http_code} %{http_version}", "-d", JSON, *files)
    answer, _, code = told("curl", *out, f"https://{secret}/v2/models/affine/infer").rpartition("\n")
    assert code == f"200 {version}"
    assert json.loads(answer)["outputs"][0]["data"] == [3.0, 6.0]


@needs_nghttp
def test_nghttp_over_tls(secret: str, certificates: Path, tmp_path: Path) -> None:
    sent = tmp_path / "body.json"
    sent.write_text(JSON)
    files = (f"--cert={certificates}/client.pem", f"--key={certificates}/client.key")
    url = f"https://{secret}/v2/models/affine/infer"
    assert json.loads(told("nghttp", *files, "-d", str(sent), url))["outputs"][0]["data"] == [3.0, 6.0]
    assert "The negotiated protocol: h2" in told("nghttp", *files, "-nv", url.replace("/infer", ""))
