"""From the port's callbacks to a coroutine that waits. Used by the reference transports only.

The port stays synchronous: a reply that arrives before ``handle`` returns costs no switch to another task.
"""

from __future__ import annotations

import asyncio

from server.errors import TidegateError, Unimplemented
from server.transport.faults import Internal
from server.types import Decision, InferenceRequest, InferenceResponse, Permit, Port


class SingleReply:
    """Reply of a call that has exactly one answer. ``done`` resolves at ``finish`` or ``abandon``."""

    __slots__ = ("_answers", "decision", "done", "error", "response")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.done: asyncio.Future[None] = loop.create_future()
        self.response: InferenceResponse | None = None
        self.decision: Decision | None = None
        self.error: TidegateError | None = None
        self._answers = 0

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.response, self.decision = response, decision
        self._answers += 1

    def finish(self, error: TidegateError | None) -> None:
        self._settle(error)

    def abandon(self, error: TidegateError) -> None:
        """Stop waiting: the caller went away and nothing more will be replied."""
        self._settle(error)

    def _settle(self, error: TidegateError | None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)

    def result(self, permit: Permit) -> InferenceResponse:
        """The one answer, or the error raised. Only after ``done``."""
        if self.error is not None:
            raise self.error
        if self._answers > 1:
            raise Unimplemented("this model gave several answers to one request: call it with ModelStreamInfer")
        if self.response is None:
            raise Internal(permit.tidegate_id)
        return self.response


async def infer(port: Port, permit: Permit, request: InferenceRequest, reply: SingleReply) -> None:
    """Run one request to its end; cancelling this coroutine cancels the request."""
    ticket = port.handle(permit, request, reply)
    if reply.done.done():
        return
    try:
        await reply.done
    except asyncio.CancelledError:
        ticket.cancel()
        raise
