"""Large JSON over real sockets with a codec process: the same answers as without, whatever happens to the process."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import islice
from typing import Any

import httpx
import numpy as np
import pytest

from server.codec.process.client import CodecSettings
from server.transport.answers import HttpSettings
from server.types import RequestLimits
from tests.support import hostile
from tests.support.codec import ALL, TRANSPORTS, Serving, on_loop, serving, tensor_body, until

AFFINE, ECHO = "/v2/models/affine/infer", "/v2/models/echo/infer"
PLAIN = {"accept-encoding": "identity"}
#: Nothing goes to the process: the way of a server without one.
NONE = HttpSettings(offload_bytes=2**40, drain_idle_s=0.05)
AT_ONCE = CodecSettings(backoff_s=0.0)

pytestmark = pytest.mark.parametrize("transport", TRANSPORTS)


def client(server: Serving) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://{server.address}", timeout=20, trust_env=False, headers=PLAIN)


def counts(server: Serving) -> dict[str, Any]:
    return {
        f"{family.name} {key[0]}": value
        for family in server.codec.families()
        for key, value in family.points.items()
        if key and value
    }


def essence(answer: httpx.Response) -> tuple[Any, ...]:
    names = ("content-type", "content-length", "inference-header-content-length", "content-encoding", "connection")
    return (answer.status_code, answer.content, *(answer.headers.get(name) for name in names))


GOOD = {
    "id": "a",
    "inputs": [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]},
        {"name": "s", "shape": [1], "datatype": "BYTES", "data": ["é"]},
    ],
    "outputs": [{"name": "x", "parameters": {"binary_data": False}}, {"name": "s"}],
}


def bodies() -> Iterator[tuple[bytes, dict[str, str]]]:
    documents = [json.dumps(document).encode() for document in hostile.variants(GOOD)]
    yield from ((body, {}) for body in documents[::4])
    rng, whole = random.Random(8), json.dumps(GOOD).encode()
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed), {}
    for body in islice(documents, 0, None, 60):
        packed = gzip.compress(body)
        yield packed, {"content-encoding": "gzip"}
        yield packed[:-3], {"content-encoding": "gzip"}
        yield body, {"inference-header-content-length": str(len(body))}
    yield from ((whole, {}) for _ in range(5))
    yield gzip.compress(bytes(1_000_000)), {"content-encoding": "gzip"}
    yield whole + b"ab", {"inference-header-content-length": str(len(whole))}


def test_the_same_answers_as_without(transport: str) -> None:
    limits = RequestLimits(max_body_bytes=500_000)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(serving(transport, http=http, limits=limits)) for http in (ALL, NONE)
            ]
            clients = [await stack.enter_async_context(client(server)) for server in servers]
            statuses = set()
            for body, headers in bodies():
                with_codec, without = [essence(await one.post(ECHO, content=body, headers=headers)) for one in clients]
                assert with_codec == without, body
                statuses.add(with_codec[0])
            assert statuses == {200, 400, 413}
            done = counts(servers[0])
            assert done["tidegate_codec_jobs_total decode"] > 200
            assert done["tidegate_codec_jobs_total encode"] > 10
            assert not [name for name in done if "fallbacks" in name]
            assert not counts(servers[1])

    on_loop(main)


def test_large_requests_and_answers(transport: str) -> None:
    values = np.random.default_rng(1).normal(size=(1, 60_000)).astype("<f4")

    async def main() -> None:
        async with serving(transport, http=HttpSettings(drain_idle_s=0.05)) as server, client(server) as ask:
            small = await ask.post(AFFINE, content=tensor_body(values[:, :5]))
            assert small.status_code == 200
            assert not counts(server)
            answers = [
                await ask.post(AFFINE, content=tensor_body(values)),
                await ask.post(
                    AFFINE, content=gzip.compress(tensor_body(values), 1), headers={"content-encoding": "gzip"}
                ),
                await ask.post(AFFINE, content=tensor_body(values), headers={"accept-encoding": "gzip"}),
            ]
            for answer in answers:
                assert answer.status_code == 200
                found = np.array(answer.json()["outputs"][0]["data"], dtype="<f4")
                np.testing.assert_array_equal(found, (2 * values + 1).astype("<f4").ravel())
            assert answers[2].headers["content-encoding"] == "gzip"
            expected = {"tidegate_codec_jobs_total decode": 3, "tidegate_codec_jobs_total encode": 3}
            assert counts(server) == expected
            binary = tensor_body(values, parameters={"binary_data_output": True})
            answer = await ask.post(AFFINE, content=binary)
            head = int(answer.headers["inference-header-content-length"])
            assert answer.content[head:] == (2 * values + 1).astype("<f4").tobytes()
            # Nothing is to be written as JSON: the answer's bytes are no work.
            assert counts(server) == expected | {"tidegate_codec_jobs_total decode": 4}

    on_loop(main)


class Killer:
    """Ends the process each time it has taken some more jobs, three times."""

    def __init__(self, server: Serving) -> None:
        self.server, self.kills, self._from = server, 0, 0

    def look(self) -> None:
        done, pid = counts(self.server).get("tidegate_codec_jobs_total decode", 0), self.server.codec.pid
        if self.kills < 3 and done >= self._from + 5 and pid is not None:
            os.kill(pid, signal.SIGKILL)
            self.kills, self._from = self.kills + 1, done

    @property
    def over(self) -> bool:
        """Killed often enough, and in work again since."""
        return self.kills == 3 and counts(self.server)["tidegate_codec_jobs_total decode"] >= self._from + 5


async def wrong_answers(killer: Killer, ask: httpx.AsyncClient, seed: int) -> int:
    """How many requests got anything but their own right answer."""
    rng, wrong = np.random.default_rng(seed), 0
    while not killer.over:
        values = rng.normal(size=(1, 3000)).astype("<f4")
        answer = await ask.post(AFFINE, content=tensor_body(values))
        found = np.array(answer.json()["outputs"][0]["data"], dtype="<f4") if answer.status_code == 200 else None
        wrong += found is None or not np.array_equal(found, (2 * values + 1).astype("<f4").ravel())
        killer.look()
    return wrong


def test_killed_under_load_nothing_is_lost_or_wrong(transport: str) -> None:
    async def main() -> None:
        async with serving(transport, settings=AT_ONCE) as server, client(server) as ask:
            killer = Killer(server)
            assert sum(await asyncio.gather(*(wrong_answers(killer, ask, seed) for seed in range(8)))) == 0
            assert counts(server)["tidegate_codec_fallbacks_total died"] >= 3

    on_loop(main)


def test_killed_in_the_middle_of_a_request(transport: str) -> None:
    values = np.arange(8, dtype="<f4").reshape(1, -1)

    async def main() -> None:
        async with serving(transport) as server, client(server) as ask:
            pid = server.codec.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            answer = asyncio.ensure_future(ask.post(AFFINE, content=tensor_body(values)))
            await until_depth(server, 1)
            os.kill(pid, signal.SIGKILL)
            assert (await answer).json()["outputs"][0]["data"] == (2 * values + 1).ravel().tolist()
            assert counts(server)["tidegate_codec_fallbacks_total died"] == 1

    on_loop(main)


async def until_depth(server: Serving, depth: int) -> None:
    """Until the process has, or will get, so many jobs."""
    await until(lambda: [f.points[()] for f in server.codec.families() if f.name.endswith("queue_depth")] == [depth])


def test_a_deadline_ends_the_wait(transport: str) -> None:
    async def main() -> None:
        async with serving(transport) as server, client(server) as ask:
            assert server.codec.pid is not None
            os.kill(server.codec.pid, signal.SIGSTOP)
            body = tensor_body(np.zeros((1, 4), "<f4"))
            waiting = [ask.post(AFFINE, content=body, headers={"x-tidegate-timeout-ms": "1000"}) for _ in range(3)]
            for answer in await asyncio.gather(*waiting):
                assert answer.status_code == 504
                assert answer.json() == {"error": "the deadline passed before the request body was decoded"}
            await until_depth(server, 0)
            os.kill(server.codec.pid, signal.SIGCONT)
            answers = await asyncio.gather(*(ask.post(AFFINE, content=body) for _ in range(5)))
            assert [answer.status_code for answer in answers] == [200] * 5
            assert len(server.gateway.released) == len(server.gateway.admitted)
            assert not [name for name in counts(server) if "fallbacks" in name]

    on_loop(main)


def test_a_deadline_ends_the_wait_for_an_answer(transport: str) -> None:
    """The request is decoded in place, so that only its answer can be what waits."""
    values = np.arange(8000, dtype="<f4").reshape(1, -1)
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 8000], "parameters": {"binary_data_size": values.nbytes}}
    text = json.dumps({"inputs": [entry]}).encode()
    headers = {"inference-header-content-length": str(len(text))}
    expected = (2 * values + 1).ravel().tolist()

    async def main() -> None:
        http = HttpSettings(offload_bytes=1000, drain_idle_s=0.05)
        async with serving(transport, http=http) as server, client(server) as ask:
            pid = server.codec.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            hurried = {**headers, "x-tidegate-timeout-ms": "2000"}  # time to see all of them wait
            waiting = [
                asyncio.ensure_future(ask.post(AFFINE, content=text + values.tobytes(), headers=hurried))
                for _ in range(3)
            ]
            await until_depth(server, 3)
            for answer in await asyncio.gather(*waiting):
                assert answer.status_code == 504
                assert answer.json() == {"error": "the deadline passed before the answer was written"}
            await until_depth(server, 0)
            assert len(server.gateway.released) == len(server.gateway.admitted)
            os.kill(pid, signal.SIGCONT)
            for _ in range(5):
                answer = await ask.post(AFFINE, content=text + values.tobytes(), headers=headers)
                assert answer.json()["outputs"][0]["data"] == expected
            # Those that were given up were not done, none fell back, and the process is the same.
            assert counts(server) == {"tidegate_codec_jobs_total encode": 5}
            assert server.codec.pid == pid

    on_loop(main)


def test_a_client_that_leaves_frees_its_place(transport: str) -> None:
    body = tensor_body(np.zeros((1, 4), "<f4"))
    head = f"POST {AFFINE} HTTP/1.1\r\nHost: t\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def main() -> None:
        async with serving(transport) as server, client(server) as ask:
            assert server.codec.pid is not None
            os.kill(server.codec.pid, signal.SIGSTOP)
            writers = []
            for _ in range(4):
                _, writer = await asyncio.open_connection(server.host, server.port)
                writer.write(head + body)
                writers.append(writer)
            await until_depth(server, 4)
            for writer in writers:
                writer.close()
            await until_depth(server, 0)
            os.kill(server.codec.pid, signal.SIGCONT)
            answers = await asyncio.gather(*(ask.post(AFFINE, content=body) for _ in range(5)))
            assert [answer.status_code for answer in answers] == [200] * 5
            assert len(server.gateway.released) == len(server.gateway.admitted)

    on_loop(main)


def test_a_full_queue_is_no_refusal(transport: str) -> None:
    async def main() -> None:
        async with serving(transport, settings=CodecSettings(max_waiting=1)) as server, client(server) as ask:
            assert server.codec.pid is not None
            os.kill(server.codec.pid, signal.SIGSTOP)
            body = tensor_body(np.ones((1, 4), "<f4"))
            held = [asyncio.ensure_future(ask.post(AFFINE, content=body)) for _ in range(3)]
            await until_depth(server, 3)
            assert (await ask.post(AFFINE, content=body)).json()["outputs"][0]["data"] == [3.0] * 4
            # The answer found no place either.
            assert counts(server) == {"tidegate_codec_fallbacks_total full": 2}
            os.kill(server.codec.pid, signal.SIGCONT)
            assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 3

    on_loop(main)
