"""The gateway's side: hands large jobs to the codec process, starts it when it is first wanted, and again when it died.

No request depends on it: whatever is in the way (it starts, is gone, is full, does not answer) raises ``Unavailable``,
and the caller does the job where it is. Started by demand, a gateway that sees no large JSON has no such process.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog

from server.codec.process.link import Link, Unavailable, reap, start
from server.codec.process.messages import Unfit, decode_job, encode_job, request_of
from server.codec.process.shared import CutOffError
from server.codec.process.steps import by_turns
from server.errors import InvalidArgument
from server.telemetry.snapshot import FamilySnapshot, Points
from server.types import Buffer, InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits

_T = TypeVar("_T")

#: Elsewhere there is no anonymous file to share.
SUPPORTED: Final = hasattr(os, "memfd_create")
_REASONS: Final = ("full", "starting", "down", "died", "stalled", "memory", "unfit")


@dataclass(slots=True, frozen=True)
class CodecSettings:
    """Bounds of the codec process. Times in seconds."""

    #: Jobs that wait behind those in its hands; more are done without it.
    max_waiting: int = 32
    #: Longest wait for an answer, and one more second for each MiB that it has been given. Then it is killed.
    stall_s: float = 30.0
    start_s: float = 10.0
    #: From one start that failed, or one death, to the next start; doubled each time until a job is done.
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0


class CodecProcess:
    """One for all listeners of a serving process; everything here is called on its event loop."""

    def __init__(self, settings: CodecSettings | None = None) -> None:
        self._settings = settings or CodecSettings()
        self._log: Any = structlog.get_logger("tidegate.codec")
        self._link: Link | None = None
        self._starting: asyncio.Task[None] | None = None
        self._reaping: set[asyncio.Task[None]] = set()
        self._closed = False
        self._not_before = 0.0
        self._failures = 0
        self._depth = 0
        self._starts = 0
        self._done = {"decode": 0, "encode": 0}
        self._fallbacks = dict.fromkeys(_REASONS, 0)

    @property
    def pid(self) -> int | None:
        """Of the process that takes jobs, if there is one."""
        return None if self._link is None else self._link.process.pid

    async def decode(
        self, body: Buffer, *, model: str, version: str, limits: RequestLimits, json_size: int | None
    ) -> InferenceRequest:
        """As ``server.codec.json.decode_infer``, whose errors it raises; tensors are views on memory of their own.

        Raises Unavailable when the caller is to parse ``body`` itself. Cancelled, it lets go of its place at once.
        """
        job = self._decode(decode_job(json_size, limits), body, model, version)
        return await self._counted("decode", job)

    async def _decode(self, job: dict[str, Any], body: Buffer, model: str, version: str) -> InferenceRequest:
        head, data = await self._running().do(job, [body])
        _check(head)
        return await by_turns(request_of(head, data, model, version))

    async def encode(
        self,
        response: InferenceResponse,
        *,
        outputs: list[RequestedOutput],
        binary_default: bool,
        strict_json: bool = False,
    ) -> tuple[list[Buffer], int | None]:
        """As ``server.codec.json.encode_infer``, whose errors it raises. Raises Unavailable like ``decode``."""
        return await self._counted("encode", self._encode(response, outputs, binary_default, strict_json))

    async def _encode(
        self, response: InferenceResponse, outputs: list[RequestedOutput], binary_default: bool, strict_json: bool
    ) -> tuple[list[Buffer], int | None]:
        link = self._running()
        job, chunks, kept = await by_turns(encode_job(response, outputs, binary_default, strict_json))
        head, data = await link.do(job, chunks)
        _check(head)
        return [data, *kept], head["json_size"]

    async def _counted(self, kind: str, job: Coroutine[Any, Any, _T]) -> _T:
        self._depth += 1
        try:
            result = await job
        except InvalidArgument:
            self._did(kind)
            raise
        except (Unavailable, Unfit, CutOffError) as error:
            reason = error.reason if isinstance(error, Unavailable) else "unfit"
            self._fallbacks[reason] += 1
            raise Unavailable(reason) from error
        finally:
            self._depth -= 1
        self._did(kind)
        return result

    def _did(self, kind: str) -> None:
        self._done[kind] += 1
        self._failures = 0

    # --- start and end ---------------------------------------------------------------------------------------

    def _running(self) -> Link:
        if self._link is not None:
            return self._link
        if self._starting is None and not self._closed and time.monotonic() >= self._not_before:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        raise Unavailable("down" if self._starting is None else "starting")

    async def _start(self) -> None:
        settings = self._settings
        try:
            started = await asyncio.to_thread(start, settings.start_s)
        except Exception as error:  # noqa: BLE001 - the system's refusals, of processes and of threads
            self._log.warning("codec_process_failed", error=str(error), consequence="large JSON is parsed in place")
            self._back_off()
        else:
            self._starts += 1
            self._log.info("codec_process_started", pid=started.process.pid)
            self._link = Link(started, max_waiting=settings.max_waiting, stall_s=settings.stall_s, lost=self._lost)
        finally:
            self._starting = None

    def _lost(self, link: Link, reason: str) -> None:
        self._link = None
        self._back_off()
        task = asyncio.get_running_loop().create_task(self._reap(link, reason))
        self._reaping.add(task)
        task.add_done_callback(self._reaping.discard)

    async def _reap(self, link: Link, reason: str) -> None:
        code = await asyncio.to_thread(reap, link.process)
        if not self._closed:
            self._log.warning("codec_process_lost", pid=link.process.pid, reason=reason, exit_code=code)

    def _back_off(self) -> None:
        settings = self._settings
        wait_s = min(settings.backoff_s * 2**self._failures, settings.max_backoff_s)
        self._not_before = time.monotonic() + wait_s
        self._failures = min(self._failures + 1, 32)

    async def ready(self) -> bool:
        """Have it started, if it can be now; whether it takes jobs."""
        with suppress(Unavailable):
            self._running()
        if self._starting is not None:
            await self._starting
        return self._link is not None

    async def close(self) -> None:
        """End the process. Jobs that it has, and those that come later, are Unavailable."""
        self._closed = True
        if self._starting is not None:
            await self._starting
        if self._link is not None:
            self._link.end("down")
        await asyncio.gather(*self._reaping)

    # --- metrics ---------------------------------------------------------------------------------------------

    def families(self) -> Iterator[FamilySnapshot]:
        """What it did, what others had to do for it, and what is in its hands."""
        jobs: Points = {(kind,): count for kind, count in self._done.items()}
        yield FamilySnapshot(
            "tidegate_codec_jobs_total",
            "Large JSON bodies parsed and answers written in the codec process (kind: decode or encode).",
            "counter",
            ("kind",),
            jobs,
        )
        fallbacks: Points = {(reason,): count for reason, count in self._fallbacks.items()}
        yield FamilySnapshot(
            "tidegate_codec_fallbacks_total",
            f"Such work that was done without the codec process (reason: {', '.join(_REASONS)}).",
            "counter",
            ("reason",),
            fallbacks,
        )
        yield FamilySnapshot(
            "tidegate_codec_queue_depth", "Jobs that the codec process has or will get.", "gauge", (), {(): self._depth}
        )
        yield FamilySnapshot(
            "tidegate_codec_starts_total", "Times the codec process was started.", "counter", (), {(): self._starts}
        )


def _check(head: dict[str, Any]) -> None:
    if "refused" in head:
        raise InvalidArgument(head["refused"])
