"""The callers: plain HTTP (JSON and binary) on this process's loop, gRPC through tritonclient in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from server.demo import wire
from server.demo.data import Array
from server.demo.workload import CallLog, Workload

if TYPE_CHECKING:
    import httpx

_CALL_TIMEOUT_S: Final = 30.0
#: Over the load's length: what the worker may take to connect, to finish its last calls and to write its files.
_WORKER_GRACE_S: Final = 60.0
#: A caller whose call failed waits so long before the next, so that a broken server is not hammered.
_PAUSE_AFTER_ERROR_S: Final = 0.1

JSON: Final = "JSON"
BINARY: Final = "binary"
GRPC: Final = "gRPC"


class CallFailed(Exception):
    """The server refused a call, or answered with what is not V2."""


class HttpClient:
    """One caller's kept connection to one address.

    Each caller has its own: an httpx pool searches all its connections for every request, which at 40 of them costs
    more than the call. Proxy settings of the environment are not for loopback, and no certificate needs loading.
    """

    def __init__(self, address: str) -> None:
        import httpx

        self._http = httpx.AsyncClient(
            base_url=f"http://{address}",
            timeout=_CALL_TIMEOUT_S,
            limits=httpx.Limits(max_connections=1),
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            trust_env=False,
        )

    async def infer(self, model: str, version: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One call in binary form. Raises CallFailed."""
        return await self.send(infer_path(model, version), *binary_request(inputs))

    async def send(self, path: str, body: bytes, headers: Mapping[str, str]) -> dict[str, Array]:
        """Post a ready-made body; the outputs by name. Raises CallFailed."""
        import httpx

        try:
            answer = await self._http.post(path, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise CallFailed(f"{type(error).__name__}: {error}") from error
        return _outputs(answer)

    async def get(self, path: str) -> Any:
        """A JSON document. Raises CallFailed."""
        import httpx

        try:
            answer = await self._http.get(path)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise CallFailed(f"GET {path}: {error}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._http.aclose()


def _outputs(answer: httpx.Response) -> dict[str, Array]:
    if answer.status_code != 200:
        raise CallFailed(f"HTTP {answer.status_code}: {answer.text[:300]}")
    length = answer.headers.get(wire.LENGTH_HEADER)
    try:
        return wire.parse_answer(answer.content, None if length is None else int(length))
    except (ValueError, KeyError, TypeError) as error:
        raise CallFailed(f"the answer is not V2: {type(error).__name__}: {error}") from error


def infer_path(model: str, version: str) -> str:
    return f"/v2/models/{model}/versions/{version}/infer"


def json_request(inputs: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    return wire.json_body(inputs), {"content-type": "application/json"}


def binary_request(inputs: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
    body, header_length = wire.binary_body(inputs)
    return body, {"content-type": "application/octet-stream", wire.LENGTH_HEADER: str(header_length)}


async def _http_caller(address: str, log: CallLog, caller: int, wait_s: float, end: float) -> None:
    await asyncio.sleep(wait_s)
    async with HttpClient(address) as client:
        await _call_until(end, client, log, caller)


async def _call_until(end: float, client: HttpClient, log: CallLog, caller: int) -> None:
    """Call until ``end`` (monotonic seconds); an error starts the stream anew."""
    workload, encode = log.workload, json_request if log.protocol == JSON else binary_request
    path = infer_path(workload.model, workload.version)
    state: Mapping[str, Array] = {}
    failed = False
    for index, fresh in workload.turns(caller):
        begun = time.monotonic()
        if begun >= end:
            return
        if failed and not fresh:
            continue
        if workload.stream and fresh:
            state = workload.stream.initial
        body, headers = encode({**workload.inputs(index), **state})
        started = time.perf_counter_ns()
        try:
            answer = await client.send(path, body, headers)
            latency_ns = time.perf_counter_ns() - started
            carry = workload.stream.carry if workload.stream else {}
            state = {target: answer.pop(source) for source, target in carry.items()}
            log.add(index, latency_ns, answer)
            failed = False
        except (CallFailed, KeyError) as error:
            log.errors.append(f"{type(error).__name__}: {error}"[:300])
            failed = True
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
        await asyncio.sleep(max(0.0, begun + workload.pace_s - time.monotonic()))


@dataclass(frozen=True, slots=True)
class Count:
    """What one workload's callers over one protocol have seen so far."""

    requests: int
    errors: int
    median_ms: float


@dataclass(slots=True)
class Load:
    """All callers of one run: every workload over every protocol, at the same time."""

    workloads: Sequence[Workload]
    http_address: str
    grpc_address: str
    seconds: float
    #: Where the worker's plan, arrays and findings lie.
    folder: Path
    #: Interpreter with tritonclient; None leaves gRPC out.
    clients_python: Path | None
    logs: list[CallLog] = field(default_factory=list)
    #: From the first call to the last answer.
    took_s: float = 0.0
    _grpc_counts: dict[str, Count] = field(default_factory=dict)

    def callers(self) -> int:
        """How many call at once, over all protocols."""
        return sum(workload.callers for workload in self.workloads) * (3 if self.clients_python else 2)

    def counts(self) -> dict[tuple[str, str], Count]:
        """(workload, protocol) -> counts, for the live display."""
        counts = {(log.workload.name, log.protocol): _count(log) for log in self.logs if log.protocol != GRPC}
        return counts | {(name, GRPC): count for name, count in self._grpc_counts.items()}

    async def run(self, tick: Callable[[], None]) -> None:
        """Call for ``seconds``, with ``tick`` twice a second from the start of the calls; then ``logs`` is complete.

        Raises CallFailed when the worker process fails.
        """
        self.logs = [CallLog(workload, protocol) for workload in self.workloads for protocol in (JSON, BINARY)]
        async with contextlib.AsyncExitStack() as stack:
            worker = None
            if self.clients_python is not None:
                worker = await stack.enter_async_context(_worker(self.clients_python, self._write_plan()))
                await worker.expect_ready()
            ticker = asyncio.create_task(_tick_forever(tick))
            stack.callback(ticker.cancel)
            await self._call(worker)
        if worker is not None:
            self.logs += [self._grpc_log(number, workload) for number, workload in enumerate(self.workloads)]

    async def _call(self, worker: _Worker | None) -> None:
        following = []
        if worker is not None:
            worker.go()
            following.append(asyncio.create_task(self._follow(worker)))
        begun = time.monotonic()
        end = begun + self.seconds
        callers = [
            asyncio.create_task(_http_caller(self.http_address, log, caller, self._wait_s(log.workload, number), end))
            for number, log in enumerate(self.logs)
            for caller in range(log.workload.callers)
        ]
        try:
            await asyncio.gather(*callers, *following)
            self.took_s = time.monotonic() - begun
        finally:
            for task in [*callers, *following]:
                task.cancel()

    def _wait_s(self, workload: Workload, number: int) -> float:
        """The callers of one log start together, which makes batches; the logs start spread over their pace."""
        return workload.pace_s * number / len(self.logs)

    async def _follow(self, worker: _Worker) -> None:
        """Take the worker's counts until it is done."""
        try:
            async with asyncio.timeout(self.seconds + _WORKER_GRACE_S):
                async for message in worker.messages():
                    self._grpc_counts = {name: Count(**count) for name, count in message["workloads"].items()}
                    if message["event"] == "done":
                        return
        except TimeoutError:
            raise CallFailed(f"the gRPC worker did not end: {worker.stderr()}") from None
        raise CallFailed(f"the gRPC worker ended early: {worker.stderr()}")

    def _write_plan(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        plans = []
        for number, workload in enumerate(self.workloads):
            initial = workload.stream.initial if workload.stream else {}
            groups = {"column": workload.columns, "fixed": workload.fixed, "initial": initial}
            arrays = {f"{group}.{name}": a for group, values in groups.items() for name, a in values.items()}
            np.savez(self.folder / f"{number}.npz", offsets=workload.offsets, **arrays)  # type: ignore[arg-type]
            plans.append(_worker_plan(workload, str(number)))
        path = self.folder / "plan.json"
        plan = {"address": self.grpc_address, "seconds": self.seconds, "workloads": plans}
        path.write_text(json.dumps(plan), encoding="utf-8")
        return path

    def _grpc_log(self, number: int, workload: Workload) -> CallLog:
        log = CallLog(workload, GRPC)
        log.errors = json.loads((self.folder / f"{number}.errors.json").read_text(encoding="utf-8"))
        with np.load(self.folder / f"{number}.calls.npz") as saved:
            requests, latencies = saved["request"], saved["latency_ns"]
            outputs = {name.removeprefix("output."): saved[name] for name in saved.files if name.startswith("output.")}
        first = 0
        for request, latency_ns in zip(requests.tolist(), latencies.tolist(), strict=True):
            end = first + workload.rows(request)
            log.add(request, latency_ns, {name: values[first:end] for name, values in outputs.items()})
            first = end
        return log


def _worker_plan(workload: Workload, file: str) -> dict[str, Any]:
    return {
        "name": workload.name,
        "model": workload.model,
        "version": workload.version,
        "file": file,
        "outputs": list(workload.expected),
        "callers": workload.callers,
        "pace_s": workload.pace_s,
        "stream_length": workload.stream.length if workload.stream else 1,
        "carry": dict(workload.stream.carry) if workload.stream else {},
    }


def _count(log: CallLog) -> Count:
    recent = log.latencies_ns[-500:]
    return Count(len(log.requests), len(log.errors), float(np.median(recent)) / 1e6 if recent else 0.0)


async def _tick_forever(tick: Callable[[], None]) -> None:
    while True:
        tick()
        await asyncio.sleep(0.5)


# --- The worker process ---------------------------------------------------------------------------------------------


class _Worker:
    """The running ``triton_worker.py``: JSON lines out, one line in."""

    def __init__(self, process: asyncio.subprocess.Process, stderr: Path) -> None:
        assert process.stdin is not None  # noqa: S101 - asked for with PIPE
        assert process.stdout is not None  # noqa: S101
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, stderr

    async def messages(self) -> AsyncIterator[dict[str, Any]]:
        async for line in self._stdout:
            yield json.loads(line)

    async def expect_ready(self) -> None:
        """Wait until it has loaded its arrays and reached the server. Raises CallFailed."""
        try:
            line = await asyncio.wait_for(self._stdout.readline(), _WORKER_GRACE_S)
        except TimeoutError:
            line = b""
        if not line or json.loads(line)["event"] != "ready":
            raise CallFailed(f"the gRPC worker did not start: {self.stderr()}")

    def go(self) -> None:
        self._stdin.write(b"go\n")

    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8", errors="replace")[-2000:].strip()


@contextlib.asynccontextmanager
async def _worker(python: Path, plan: Path) -> AsyncIterator[_Worker]:
    script, log = Path(__file__).with_name("triton_worker.py"), plan.with_name("worker.log")
    pipe, limit = asyncio.subprocess.PIPE, 16 * 1024 * 1024
    with log.open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            str(python), "-I", str(script), str(plan), stdin=pipe, stdout=pipe, stderr=stderr, limit=limit
        )
    try:
        yield _Worker(process, log)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its work done, the worker ends by itself; else it is killed."""
    try:
        await asyncio.wait_for(process.wait(), 2)
    except TimeoutError:
        process.kill()
        await process.wait()
