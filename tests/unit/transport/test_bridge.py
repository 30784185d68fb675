"""From callbacks to one awaited answer."""

from __future__ import annotations

import asyncio

import pytest

from server.errors import Cancelled, QueueFull, TidegateError, Unimplemented
from server.transport.bridge import Owed, SingleReply, infer
from server.transport.faults import Internal
from server.types import Decision, InferenceRequest, InferenceResponse, RequestHead, RequestLimits, Tensor
from tests.support.echo import EchoPermit, EchoPort, floats


def request(model: str) -> InferenceRequest:
    return InferenceRequest(model, "", "i", [Tensor("x", "FP32", (1, 1), floats(3).tobytes())])


def permit_of(port: EchoPort) -> EchoPermit:
    return EchoPermit(RequestHead("grpc", "", "", {}, 0), "p", port)


async def answered(model: str) -> tuple[SingleReply, EchoPort, EchoPermit]:
    port = EchoPort(RequestLimits())
    permit, reply = permit_of(port), SingleReply(asyncio.get_running_loop())
    await infer(port, permit, request(model), reply)
    return reply, port, permit


@pytest.mark.parametrize("model", ["affine", "later"])
def test_one_answer_now_or_later(model: str) -> None:
    async def run() -> None:
        reply, _, permit = await answered(model)
        assert reply.result(permit).outputs[0].array().tolist() == [[7.0]]
        assert reply.decision is not None
        assert reply.decision.arm == "stable"

    asyncio.run(run())


@pytest.mark.parametrize(("model", "error"), [("full", QueueFull), ("many", Unimplemented), ("none", Internal)])
def test_anything_but_one_answer_is_an_error(model: str, error: type[TidegateError]) -> None:
    async def run() -> None:
        reply, _, permit = await answered(model)
        with pytest.raises(error):
            reply.result(permit)

    asyncio.run(run())


def test_cancelling_the_waiter_cancels_the_request() -> None:
    async def run() -> None:
        port = EchoPort(RequestLimits())
        reply = SingleReply(asyncio.get_running_loop())
        waiting = asyncio.ensure_future(infer(port, permit_of(port), request("held"), reply))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert port.cancelled == ["i"]

    asyncio.run(run())


def test_first_end_counts() -> None:
    async def run() -> None:
        reply = SingleReply(asyncio.get_running_loop())
        reply.abandon(Cancelled("gone"))
        reply.finish(None)
        with pytest.raises(Cancelled):
            reply.result(permit_of(EchoPort(RequestLimits())))

    asyncio.run(run())


@pytest.mark.parametrize("answers", [(), (50,), (100,), (50, 50), (101,), (300, 300)])
def test_what_is_owed_is_told_once_and_ends_at_nothing(answers: tuple[int, ...]) -> None:
    told: list[int] = []
    owed = Owed(told.append)
    owed.settle()
    assert told == []
    owed.owe(100)
    for size in answers:
        owed.handed(size)
    assert sum(told) == max(0, 100 - sum(answers))
    owed.settle()
    owed.settle()
    assert sum(told) == 0
    assert told[0] == 100
    assert 0 not in told


def test_only_large_answers_are_told_of() -> None:
    async def run() -> None:
        told: list[int] = []
        reply = SingleReply(asyncio.get_running_loop(), told.append)
        for size in (1, 64 * 1024, 64 * 1024 + 4):
            output = Tensor("y", "FP32", (1, size // 4), bytes(size))
            reply.message(InferenceResponse("m", "1", "", [output]), Decision("m", "1", "stable", 1))
        assert told == [64 * 1024 + 4]
        for size in (64 * 1024 - 8, 64 * 1024):  # two elements
            output = Tensor("y", "BYTES", (2,), [b"", bytes(size)])
            reply.message(InferenceResponse("m", "1", "", [output]), Decision("m", "1", "stable", 1))
        assert told == [64 * 1024 + 4, 64 * 1024 + 8]

    asyncio.run(run())
