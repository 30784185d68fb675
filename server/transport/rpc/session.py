"""One ``ModelStreamInfer`` call: many requests under one permit, answered in the order they came.

The reader hands each message to the port as soon as it comes, up to bounds in flight by number and by bytes; the writer
sends what is finished, first in first out. The error of one request is one message and does not end the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import structlog

from server.codec import pieces, protobuf
from server.codec.process.steps import Turns
from server.errors import TidegateError
from server.transport.faults import Internal, check_version
from server.transport.status import safe_text
from server.types import Decision, InferenceResponse, Permit, Port, Ticket

_EMPTY_FINAL: Final = "triton_enable_empty_final_response"
_FINAL: Final = "triton_final_response"


class _Slot:
    """Reply of one message: the answers still to be sent, and whether more may come.

    Of an error it has code and text. The error itself has a traceback, and that has the frames that know the slot and
    the message: all of it would wait for the collector.
    """

    __slots__ = ("_keep", "_wake", "answers", "empty_final", "final_sent", "finished", "id", "model", "refusal", "size",
                 "ticket")  # fmt: skip

    def __init__(self, wake: Callable[[], None], keep: Callable[[int], None]) -> None:
        self._wake = wake
        self._keep = keep
        self.size = 0  # bytes of the message, until it is answered
        self.id = self.model = ""
        self.empty_final = False
        self.answers: deque[InferenceResponse] = deque()
        self.refusal: tuple[str, str] | None = None
        self.finished = self.final_sent = False
        self.ticket: Ticket | None = None

    def message(self, response: InferenceResponse, decision: Decision) -> None:
        """The decision is dropped: a stream's one set of headers went out before anything was decided."""
        if self.refusal is not None:
            return
        try:
            self._keep(_size(response))
        except TidegateError as error:
            self.refusal = _said(error)
        else:
            self.answers.append(response)
            self._wake()

    def finish(self, error: TidegateError | None) -> str | None:
        unkept = self.refusal
        if unkept is None and error is not None:
            self.refusal = _said(error)
        self.finished = True
        self.ticket = None  # it refers to this reply: apart, both go with the last reference
        self._keep(-self.size)
        self._wake()
        return None if unkept is None else unkept[0]


def _said(error: TidegateError) -> tuple[str, str]:
    return error.code, safe_text(error.message)


def _size(response: InferenceResponse) -> int:
    """Bytes of what its outputs contain."""
    contents = [tensor.data for tensor in response.outputs]
    return sum([sum(map(len, data)) if isinstance(data, list) else len(data) for data in contents])


class StreamSession:
    """Takes messages from ``read`` (None: no more) and gives answers to ``write`` until every one is out.

    ``hold`` is told how many bytes of messages and answers are in flight whenever that changes. It raises TidegateError
    where there is no room for another: that one request is answered so. It is the permit's own, unless more is to be
    counted with them. ``turns``: of what takes long to read or write, here and wherever else they were given to.
    """

    def __init__(
        self,
        port: Port,
        permit: Permit,
        read: Callable[[], Awaitable[bytes | None]],
        write: Callable[[bytes], Awaitable[None]],
        *,
        max_in_flight: int,
        hold: Callable[[int], None] | None = None,
        turns: Turns | None = None,
    ) -> None:
        self._port = port
        self._permit = permit
        self._read = read
        self._write = write
        self._max_in_flight = max_in_flight
        self._hold = hold or permit.hold
        self._turns = turns or Turns()
        self._max_bytes = port.limits.max_body_bytes
        self._slots: deque[_Slot] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._log = structlog.get_logger("tidegate.grpc")

    async def run(self) -> None:
        """Cancelling this coroutine cancels every request in flight."""
        reading = asyncio.create_task(self._read_all())
        reading.add_done_callback(lambda _: self._changed.set())
        try:
            await self._write_all(reading)
            await reading
        finally:
            reading.cancel()
            for slot in self._slots:
                if slot.ticket is not None:
                    slot.ticket.cancel()
                    slot.ticket = None
            self._slots.clear()

    async def _read_all(self) -> None:
        while (raw := await self._read()) is not None:
            await self._take(raw)
            del raw
            while len(self._slots) >= self._max_in_flight or self._bytes >= self._max_bytes:
                self._room.clear()
                await self._room.wait()

    async def _take(self, raw: bytes) -> None:
        received_ns = time.monotonic_ns()
        slot = _Slot(self._changed.set, self._keep)
        self._slots.append(slot)
        try:
            self._keep(len(raw))
            slot.size = len(raw)
            large = len(raw) > pieces.SMALL_BODY_BYTES
            request = protobuf.decode_infer(raw, self._port.limits, whole=not large)
            slot.id, slot.model = request.id, request.model
            check_version(request.version)
            if large and pieces.unfinished(request):
                await self._turns.take(pieces.finish(request))
            slot.empty_final = request.parameters.pop(_EMPTY_FINAL, False) is True
            ticket = self._port.handle(self._permit, request, slot, received_ns)
            if not slot.finished:
                slot.ticket = ticket
        except TidegateError as error:
            slot.finish(self._port.refuse(error))
        except Exception as error:  # noqa: BLE001 - the boundary of one request: logged here, no text to the client
            self._log.error("request_failed", id=self._permit.tidegate_id, protocol="grpc", exc_info=error)
            slot.finish(self._port.refuse(Internal(self._permit.tidegate_id)))

    def _keep(self, size: int) -> None:
        """So many bytes more are in flight, or less. Raises TidegateError where there is no room for more."""
        self._hold(self._bytes + size)
        self._bytes += size
        if size < 0:
            self._room.set()

    async def _write_all(self, reading: asyncio.Task[None]) -> None:
        while self._slots or not reading.done():
            if self._slots and await self._write_slot(self._slots[0]):
                self._slots.popleft()
                self._room.set()
            else:
                await self._changed.wait()
                self._changed.clear()

    async def _write_slot(self, slot: _Slot) -> bool:
        """Send what the slot has; True when nothing more can come of it."""
        while slot.answers:
            response = slot.answers.popleft()
            slot.final_sent = slot.finished and slot.refusal is None and not slot.answers
            size = _size(response)
            if pieces.has_many(response):
                response = await self._turns.take(pieces.wired(response))
            marked = replace(response, parameters={**response.parameters, _FINAL: slot.final_sent})
            await self._write(protobuf.encode_stream_infer(marked))
            self._keep(-size)
        if not slot.finished:
            return False
        if slot.refusal is not None:
            await self._write(protobuf.encode_stream_error(slot.refusal[1], slot.id))
        elif slot.empty_final and not slot.final_sent:
            empty = InferenceResponse(slot.model, "", slot.id, [], {_FINAL: True})
            await self._write(protobuf.encode_stream_infer(empty))
        return True
