"""From the port's callbacks to a coroutine that waits. Used by the reference transports, and by the native one for
answers that take long to write.

The port stays synchronous: a reply that arrives before ``handle`` returns costs no switch to another task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from server.codec import pieces
from server.errors import TidegateError, Unimplemented
from server.transport.faults import Internal
from server.types import WRITING, Decision, InferenceRequest, InferenceResponse, Permit, Port, Ticket

#: Where an ASGI scope's ``extensions`` say what is to be called with the size of a large answer once there is one:
#: it counts as unsent while it is written down, however long its task takes to come round to that.
OWED: Final = "tidegate.owed"
#: Answers that are no larger are not told.
_LARGE_BYTES: Final = 64 * 1024


class Owed:
    """Bytes of one answer that is being written down: ``count`` is told of so many more, or fewer if negative.

    Whoever writes it says how many are left, and settles it at its end, whichever that is.
    """

    __slots__ = ("_count", "_size")

    def __init__(self, count: Callable[[int], None]) -> None:
        self._count = count
        self._size = 0

    def owe(self, size: int) -> None:
        """So many are to be handed on."""
        if size != self._size:
            before, self._size = self._size, size
            self._count(size - before)

    def handed(self, size: int) -> None:
        """So many were, of which some may not have been known of: an answer as JSON is longer than its tensors."""
        self.owe(max(0, self._size - size))

    def settle(self, _task: object = None) -> None:
        """None are any more. As a callback of the task that writes it, too."""
        self.owe(0)


class SingleReply:
    """Reply of a call that has exactly one answer. ``done`` resolves at ``finish`` or ``abandon``.

    Whoever waits for it writes the answer, and tells the port (``telling``). ``owe``: see ``OWED``.
    """

    __slots__ = ("_answers", "_owe", "decision", "done", "error", "response")

    def __init__(self, loop: asyncio.AbstractEventLoop, owe: Callable[[int], None] | None = None) -> None:
        self._owe = owe
        self.done: asyncio.Future[None] = loop.create_future()
        self.response: InferenceResponse | None = None
        self.decision: Decision | None = None
        self.error: TidegateError | None = None
        self._answers = 0

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        self.response, self.decision = response, decision
        self._answers += 1
        if self._owe is not None:
            size = pieces.wire_bytes(response.outputs)
            if size > _LARGE_BYTES:
                self._owe(size)

    def finish(self, error: TidegateError | None) -> str | None:
        self._settle(error)
        return WRITING if error is None else None

    def abandon(self, error: TidegateError) -> None:
        """Stop waiting: the caller went away and nothing more will be replied."""
        self._settle(error)

    def _settle(self, error: TidegateError | None) -> None:
        if not self.done.done():
            self.error = error
            self.done.set_result(None)

    def result(self, permit: Permit) -> InferenceResponse:
        """The one answer, or the error raised. Only after ``done``, and once."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # it would be held by its own traceback, and with it the callers' frames and the request
        if self._answers > 1:
            raise Unimplemented("this model gave several answers to one request: call it with ModelStreamInfer")
        if self.response is None:
            raise Internal(permit.tidegate_id)
        return self.response


@contextmanager
def telling(ticket: Ticket | None) -> Iterator[None]:
    """Tell the port what becomes of an answer that is written within. None: the request was over before."""
    code = "cancelled"
    try:
        yield
        code = "ok"
    except TidegateError as error:
        code = error.code
        raise
    except Exception:
        code = Internal.code
        raise
    finally:
        if ticket is not None:
            ticket.written(code)


async def infer(port: Port, permit: Permit, request: InferenceRequest, reply: SingleReply) -> Ticket:
    """Run one request until it is answered; cancelling this coroutine cancels the request."""
    ticket = port.handle(permit, request, reply)
    if not reply.done.done():
        try:
            await reply.done
        except asyncio.CancelledError:
            ticket.cancel()
            raise
    return ticket
