"""Replays flights against the server, over HTTP and gRPC in turn, and tells it later how they came out."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import orjson

from server.demo import wire
from server.demo.clients import CallFailed, binary_request
from server.demo.data import Array, Flights
from server.demo.loop.rows import MODEL

CALLERS: Final = 4
_TIMEOUT_S: Final = 30.0
#: A caller whose call failed waits so long before the next, so that a broken server is not hammered.
_PAUSE_AFTER_ERROR_S: Final = 0.1
#: So many calls lie between a flight's prediction and the news of its arrival.
_LATE_CALLS: Final = 40
#: Outcomes told at once.
_TOLD_AT_ONCE: Final = 500
_ID: Final = "x-tidegate-id"
_VERSION: Final = "x-tidegate-version"
_METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer: what the gateway calls the request, the version that answered, P(late) of each row."""

    request_id: str
    version: str
    late: Array


class Caller(Protocol):
    """Predicts over one protocol. Raises CallFailed."""

    async def predict(self, flights: Flights) -> Reply: ...


@dataclass(slots=True)
class Book:
    """What callers saw. ``versions`` counts rows by the version that answered; ``told`` outcomes that were taken."""

    calls: Counter[str] = field(default_factory=Counter)
    versions: Counter[str] = field(default_factory=Counter)
    told: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.versions.total()


class Replay:
    """Callers of both protocols, and the arrivals that are still to be told. On one loop; enter before use."""

    def __init__(self, http: str, grpc: str) -> None:
        self._addresses = http, grpc
        self._stack = contextlib.AsyncExitStack()
        self._callers: list[tuple[str, Caller]] = []
        self._arrivals: deque[tuple[str, Array]] = deque()
        self.book = Book()

    async def __aenter__(self) -> Replay:
        http, grpc = self._addresses
        for number in range(CALLERS):
            name, opened = ("gRPC", _grpc(grpc)) if number % 2 else ("HTTP", _http(http))
            self._callers.append((name, await self._stack.enter_async_context(opened)))
        self._feedback = await self._stack.enter_async_context(_client(http))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def send(
        self, flights: Flights, rows: int, *, arrivals: bool = True, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        """Every flight once, ``rows`` a call; with ``arrivals`` the outcomes follow, all of them when it returns."""
        await self._send(flights, rows, arrivals, progress, asyncio.Event())

    async def _send(
        self, flights: Flights, rows: int, arrivals: bool, progress: Callable[[str], None], enough: asyncio.Event
    ) -> None:
        """The same until ``enough`` is set. No call is cut off: its connection could not be used again."""
        total = len(flights.late)
        turns = iter(range(0, total, rows))

        async def work(name: str, caller: Caller) -> None:
            for first in turns:
                if enough.is_set():
                    return
                await self._call(name, caller, flights.rows(slice(first, first + rows)), arrivals)
                progress(f"{min(first + rows, total):,} of {total:,} flights")

        async with asyncio.TaskGroup() as group:
            for name, caller in self._callers:
                group.create_task(work(name, caller))
        await self._tell(0)

    async def _call(self, name: str, caller: Caller, flights: Flights, arrivals: bool) -> None:
        self.book.calls[name] += 1
        try:
            reply = await caller.predict(flights)
        except CallFailed as error:
            self.book.errors.append(str(error))
            await asyncio.sleep(_PAUSE_AFTER_ERROR_S)
            return
        self.book.versions[reply.version] += len(flights.late)
        if arrivals:
            self._arrivals.append((reply.request_id, flights.late))
            await self._tell(_LATE_CALLS)

    async def _tell(self, but: int) -> None:
        """Tell the arrivals of all calls but the last ``but`` ones."""
        while len(self._arrivals) > but:
            items: list[dict[str, Any]] = []
            while len(self._arrivals) > but and len(items) < _TOLD_AT_ONCE:
                request_id, late = self._arrivals.popleft()
                items += [{"id": request_id, "row": row, "outcome": one} for row, one in enumerate(late.tolist())]
            await self._post(items)

    async def _post(self, items: Sequence[Mapping[str, Any]]) -> None:
        try:
            answer = await _answered(self._feedback.post(f"/v2/models/{MODEL}/feedback", content=orjson.dumps(items)))
            self.book.told += int(answer.json()["joined"])
        except CallFailed as error:
            self.book.errors.append(str(error))

    @contextlib.asynccontextmanager
    async def going_on(self, flights: Flights, rows: int, *, arrivals: bool = True) -> AsyncIterator[None]:
        """Replay the flights over and over while the block runs, and end it with no call or arrival left open."""
        enough = asyncio.Event()

        async def forever() -> None:
            while not enough.is_set():
                await self._send(flights, rows, arrivals, lambda _: None, enough)

        task = asyncio.create_task(forever())
        try:
            yield
        finally:
            enough.set()
            await task


def _reply(told: Mapping[str, str], outputs: Callable[[], Mapping[str, Array]]) -> Reply:
    """What headers and outputs say. Raises CallFailed when they are not V2."""
    try:
        return Reply(told[_ID], told[_VERSION], outputs()["probabilities"][:, 1])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CallFailed(f"the answer is not V2: {type(error).__name__}: {error}") from error


# --- HTTP ----------------------------------------------------------------------------------------------------------


def _client(address: str) -> Any:
    import httpx

    return httpx.AsyncClient(
        base_url=f"http://{address}",
        timeout=_TIMEOUT_S,
        limits=httpx.Limits(max_connections=1),
        verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        trust_env=False,
    )


async def _answered(posting: Any) -> Any:
    """The answer of a request that must succeed. Raises CallFailed."""
    import httpx

    try:
        answer = await posting
    except httpx.HTTPError as error:
        raise CallFailed(f"{type(error).__name__}: {error}") from error
    if answer.status_code != 200:
        raise CallFailed(f"HTTP {answer.status_code}: {answer.text[:300]}")
    return answer


@dataclass(frozen=True, slots=True)
class _Http:
    """Binary tensors over HTTP."""

    client: Any

    async def predict(self, flights: Flights) -> Reply:
        body, headers = binary_request(_inputs(flights))
        answer = await _answered(self.client.post(f"/v2/models/{MODEL}/infer", content=body, headers=headers))
        length = answer.headers.get(wire.LENGTH_HEADER)
        return _reply(
            answer.headers, lambda: wire.parse_answer(answer.content, None if length is None else int(length))
        )


@contextlib.asynccontextmanager
async def _http(address: str) -> AsyncIterator[Caller]:
    async with _client(address) as client:
        yield _Http(client)


def _inputs(flights: Flights) -> dict[str, Array]:
    return {"numbers": flights.numbers, "categories": flights.categories}


# --- gRPC ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Grpc:
    """Raw tensors over gRPC."""

    call: Any

    async def predict(self, flights: Flights) -> Reply:
        import grpc

        calling = self.call(_request(flights), timeout=_TIMEOUT_S)
        try:
            answer = await calling
            metadata = dict(iter(await calling.initial_metadata()))
        except grpc.aio.AioRpcError as error:
            raise CallFailed(f"gRPC {error.code().name}: {error.details()}") from error
        return _reply(metadata, lambda: dict(_outputs(answer)))


@contextlib.asynccontextmanager
async def _grpc(address: str) -> AsyncIterator[Caller]:
    import grpc

    from server._pb import inference_pb2 as pb

    async with grpc.aio.insecure_channel(address) as channel:
        yield _Grpc(
            channel.unary_unary(
                _METHOD,
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
        )


def _request(flights: Flights) -> Any:
    from server._pb import inference_pb2 as pb

    request = pb.ModelInferRequest(model_name=MODEL)
    for name, values in _inputs(flights).items():
        request.inputs.add(name=name, datatype=wire.datatype(values), shape=list(values.shape))
        request.raw_input_contents.append(wire.raw(values))
    return request


def _outputs(answer: Any) -> Iterator[tuple[str, Array]]:
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        dtype = np.float32 if output.datatype == "FP32" else np.int64
        yield output.name, np.frombuffer(raw, dtype).reshape(tuple(output.shape))
