"""The codec process as the gateway has it: started by demand, started again, counted, and never needed."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import server
from server.codec.json import decode_infer, encode_infer
from server.codec.process.client import CodecProcess, CodecSettings
from server.codec.process.link import Unavailable
from server.errors import InvalidArgument
from server.types import InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor
from tests.support.codec import codec_process, on_loop, tensor_body

LIMITS = RequestLimits()
VALUES = np.arange(40_000, dtype="<f4").reshape(1, -1) / 7
BODY = tensor_body(VALUES)
AT_ONCE = CodecSettings(backoff_s=0.0)


async def decode(codec: CodecProcess, body: bytes = BODY) -> InferenceRequest:
    return await codec.decode(body, model="m", version="2", limits=LIMITS, json_size=None)


async def reason(codec: CodecProcess, body: bytes = BODY) -> str:
    with pytest.raises(Unavailable) as caught:
        await decode(codec, body)
    return caught.value.reason


def numbers(codec: CodecProcess) -> dict[str, float]:
    """Metrics that are not 0, by name and label."""
    found: dict[str, Any] = {}
    for family in codec.families():
        found |= {" ".join([family.name.removeprefix("tidegate_codec_"), *key]): v for key, v in family.points.items()}
    return {name: value for name, value in found.items() if value}


@asynccontextmanager
async def not_started(settings: CodecSettings = AT_ONCE) -> AsyncIterator[CodecProcess]:
    codec = CodecProcess(settings)
    try:
        yield codec
    finally:
        await codec.close()


def test_requests_and_answers_are_those_of_the_codec() -> None:
    response = InferenceResponse("m", "2", "a", [Tensor("y", "FP32", (1, 40_000), VALUES.tobytes())])

    async def main() -> None:
        async with codec_process() as codec:
            request = await decode(codec)
            expected = decode_infer(BODY, model="m", version="2", limits=LIMITS, json_size=None)
            request.inputs[0].data = bytes(request.inputs[0].data)  # type: ignore[arg-type]
            assert request == expected
            chunks, json_size = await codec.encode(response, outputs=[], binary_default=False)
            assert ([bytes(chunk) for chunk in chunks], json_size) == encode_infer(
                response, outputs=[], binary_default=False
            )
            chunks, json_size = await codec.encode(response, outputs=[], binary_default=True)
            assert ([bytes(chunk) for chunk in chunks], json_size) == encode_infer(
                response, outputs=[], binary_default=True
            )
            assert numbers(codec) == {"jobs_total decode": 1, "jobs_total encode": 2, "starts_total": 1}

    on_loop(main)


def test_refusals_count_as_done() -> None:
    response = InferenceResponse("m", "2", "a", [Tensor("y", "FP32", (1,), np.float32(np.nan).tobytes())])

    async def main() -> None:
        async with codec_process() as codec:
            with pytest.raises(InvalidArgument, match="the request must be a JSON object, got an empty list"):
                await decode(codec, b"[]")
            with pytest.raises(InvalidArgument, match="NaN or infinite"):
                await codec.encode(response, outputs=[], binary_default=False, strict_json=True)
            assert numbers(codec) == {"jobs_total decode": 1, "jobs_total encode": 1, "starts_total": 1}

    on_loop(main)


def test_bytes_that_json_cannot_carry_stay_here() -> None:
    response = InferenceResponse("m", "2", "a", [Tensor("y", "BYTES", (1,), [b"\xff"])])

    async def main() -> None:
        async with codec_process() as codec:
            with pytest.raises(Unavailable):
                await codec.encode(response, outputs=[], binary_default=False)
            assert numbers(codec) == {"fallbacks_total unfit": 1, "starts_total": 1}
            assert (await decode(codec)).id == "a"

    on_loop(main)


def test_bytes_that_follow_the_json_may_be_anything() -> None:
    tensors = [Tensor("y", "BYTES", (1,), [b"\xff"]), Tensor("z", "FP32", (1, 40_000), VALUES.tobytes())]
    response = InferenceResponse("m", "2", "a", tensors)
    options: dict[str, Any] = {"outputs": [RequestedOutput("y", True)], "binary_default": False}

    async def main() -> None:
        async with codec_process() as codec:
            chunks, json_size = await codec.encode(response, **options)
            assert ([bytes(chunk) for chunk in chunks], json_size) == encode_infer(response, **options)
            assert numbers(codec) == {"jobs_total encode": 1, "starts_total": 1}

    on_loop(main)


def test_the_first_job_starts_it() -> None:
    async def main() -> None:
        async with not_started() as codec:
            assert codec.pid is None
            assert [await reason(codec) for _ in range(3)] == ["starting"] * 3
            assert await codec.ready()
            assert (await decode(codec)).version == "2"
            assert numbers(codec) == {"fallbacks_total starting": 3, "jobs_total decode": 1, "starts_total": 1}

    on_loop(main)


def test_a_killed_process_is_replaced() -> None:
    async def main() -> None:
        async with codec_process(AT_ONCE) as codec:
            for deaths in range(1, 4):
                pid = codec.pid
                assert pid is not None
                os.kill(pid, signal.SIGSTOP)
                job = asyncio.ensure_future(reason(codec))
                await asyncio.sleep(0)
                assert numbers(codec)["queue_depth"] == 1
                os.kill(pid, signal.SIGKILL)
                assert await job == "died"
                assert codec.pid is None
                assert "queue_depth" not in numbers(codec)
                assert await codec.ready()
                assert codec.pid != pid
                assert (await decode(codec)).id == "a"
                assert numbers(codec)["starts_total"] == deaths + 1

    on_loop(main)


def test_starts_are_spaced_out_until_a_job_is_done() -> None:
    async def main() -> None:
        async with codec_process(CodecSettings(backoff_s=60, max_backoff_s=90)) as codec:
            assert codec.pid is not None
            os.kill(codec.pid, signal.SIGKILL)
            assert await reason(codec) == "died"
            assert await reason(codec) == "down"
            assert not await codec.ready()
            assert numbers(codec) == {"fallbacks_total died": 1, "fallbacks_total down": 1, "starts_total": 1}

    on_loop(main)


def test_a_job_that_is_done_ends_the_spacing_out() -> None:
    async def main() -> None:
        async with codec_process(AT_ONCE) as codec:
            for failures in (1, 2):
                assert codec.pid is not None
                os.kill(codec.pid, signal.SIGKILL)
                assert await reason(codec) == "died"
                assert codec._failures == failures
                assert await codec.ready()
            await decode(codec)
            assert codec._failures == 0

    on_loop(main)


def test_without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    async def main() -> None:
        async with not_started(CodecSettings(backoff_s=60)) as codec:
            assert await reason(codec) == "starting"
            assert not await codec.ready()
            assert await reason(codec) == "down"

    on_loop(main)


def test_closed_while_it_has_jobs_and_while_it_starts() -> None:
    async def main() -> None:
        async with codec_process() as codec:
            assert codec.pid is not None
            os.kill(codec.pid, signal.SIGSTOP)
            descriptor = os.pidfd_open(codec.pid)
            job = asyncio.ensure_future(reason(codec))
            await asyncio.sleep(0)
            await codec.close()
            assert await job == "down"
            assert select.select([descriptor], [], [], 20)[0]
            os.close(descriptor)
            assert await reason(codec) == "down"
        async with not_started() as codec:
            assert await reason(codec) == "starting"
            await codec.close()
            assert codec.pid is None
            assert numbers(codec)["starts_total"] == 1

    on_loop(main)


OWNER = """\
import asyncio, sys
from server.codec.process.client import CodecProcess

async def main():
    codec = CodecProcess()
    assert await codec.ready()
    print("pid", codec.pid, flush=True)
    sys.stdin.read()

asyncio.run(main())
"""


def test_a_killed_gateway_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("raise SystemExit('the working directory was imported from')")
    environment = os.environ | {"PYTHONPATH": str(Path(server.__file__).parents[1])}
    arguments = [sys.executable, "-P", "-c", OWNER]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as owner:
        assert owner.stdout is not None
        try:
            said = next(line for line in owner.stdout if line.startswith(b"pid "))
            descriptor = os.pidfd_open(int(said.split()[1]))
        finally:
            owner.kill()
    ended = bool(select.select([descriptor], [], [], 20)[0])
    os.close(descriptor)
    assert ended
