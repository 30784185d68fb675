"""One process and its jobs: bounds, and what becomes of jobs when the caller, or the process, goes away."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from server.codec.process.link import Link, Unavailable, reap, start
from server.codec.process.messages import decode_job
from server.types import RequestLimits
from tests.support.codec import on_loop

JOB = decode_job(None, RequestLimits())
BODY = b'{"inputs":[{"name":"x","datatype":"INT8","shape":[2],"data":[1,2]}]}'


@dataclass
class Rig:
    """A link; ``lost`` has what it said when it ended."""

    link: Link = field(init=False)
    lost: list[str] = field(default_factory=list)

    async def do(self, body: bytes = BODY) -> bytes:
        """The contents of the one tensor."""
        head, data = await self.link.do(JOB, [body])
        ((_, _, _, (size,)),) = head["inputs"]
        return bytes(data[:size])

    def job(self, body: bytes = BODY) -> asyncio.Task[bytes]:
        return asyncio.get_running_loop().create_task(self.do(body))

    def signal(self, number: int) -> None:
        self.link.process.send_signal(number)


def open_files() -> set[str]:
    """What this process has open, by what it is."""
    gc.collect()  # what earlier tests left is not to be closed between two looks
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile, as is what listed it
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


@asynccontextmanager
async def linked(max_waiting: int = 4, stall_s: float = 30) -> AsyncIterator[Rig]:
    rig = Rig()
    rig.link = Link(
        await asyncio.to_thread(start, 20),
        max_waiting=max_waiting,
        stall_s=stall_s,
        lost=lambda _, reason: rig.lost.append(reason),
    )
    try:
        yield rig
        if not rig.lost:
            await all_places_are_free(rig, max_waiting)
    finally:
        rig.link.end("down")
        await asyncio.to_thread(reap, rig.link.process)
        for _ in range(3):  # what was in its hands lets go
            await asyncio.sleep(0)
    assert not [name for name in open_files() if "tidegate-codec" in name]


async def all_places_are_free(rig: Rig, max_waiting: int) -> None:
    assert await rig.do() == b"\1\2"  # behind what the process still had
    rig.signal(signal.SIGSTOP)
    jobs = [rig.job() for _ in range(2 + max_waiting)]
    await until_asked(rig, *jobs)
    rig.signal(signal.SIGCONT)
    assert await asyncio.gather(*jobs) == [b"\1\2"] * len(jobs)


def held(rig: Rig) -> int:
    """Bytes of memory that the shared files have."""
    return sum(os.fstat(file.fd).st_blocks for file in rig.link._files) * 512


async def reason_of(job: asyncio.Task[bytes]) -> str:
    with pytest.raises(Unavailable) as caught:
        await job
    return caught.value.reason


async def until_asked(rig: Rig, *jobs: asyncio.Task[bytes]) -> None:
    """Small jobs are in the process's hands, or wait for it, after a turn of the loop."""
    await asyncio.sleep(0)
    assert not any(job.done() for job in jobs)


def test_more_jobs_than_places() -> None:
    async def main() -> None:
        async with linked(max_waiting=20) as rig:
            bodies = [BODY.replace(b"[1,2]", b"[%d,%d]" % (i, i + 1)) for i in range(20)]
            assert await asyncio.gather(*map(rig.do, bodies)) == [bytes([i, i + 1]) for i in range(20)]

    on_loop(main)


def test_a_full_queue_takes_no_more() -> None:
    async def main() -> None:
        async with linked(max_waiting=1) as rig:
            rig.signal(signal.SIGSTOP)
            jobs = [rig.job() for _ in range(3)]
            await until_asked(rig, *jobs)
            assert await reason_of(rig.job()) == "full"
            rig.signal(signal.SIGCONT)
            assert await asyncio.gather(*jobs) == [b"\1\2"] * 3

    on_loop(main)


def test_who_waits_and_leaves_makes_room() -> None:
    async def main() -> None:
        async with linked(max_waiting=1) as rig:
            rig.signal(signal.SIGSTOP)
            jobs = [rig.job() for _ in range(3)]
            await until_asked(rig, *jobs)
            jobs[2].cancel()
            await asyncio.wait([jobs[2]])
            last = rig.job()
            await until_asked(rig, last)
            rig.signal(signal.SIGCONT)
            assert await asyncio.gather(*jobs[:2], last) == [b"\1\2"] * 3

    on_loop(main)


def test_who_leaves_in_work_gives_the_place_back() -> None:
    async def main() -> None:
        async with linked() as rig:
            for _ in range(3):
                rig.signal(signal.SIGSTOP)
                jobs = [rig.job(), rig.job()]
                await until_asked(rig, *jobs)
                for job in jobs:
                    job.cancel()
                waiting = [rig.job(), rig.job()]  # both places are the process's until it says so
                await until_asked(rig, *waiting)
                rig.signal(signal.SIGCONT)
                assert await asyncio.gather(*waiting) == [b"\1\2"] * 2
            assert not rig.lost

    on_loop(main)


def test_a_place_that_came_to_somebody_who_left_goes_on() -> None:
    async def main() -> None:
        async with linked() as rig:
            jobs = [rig.job() for _ in range(3)]
            await until_asked(rig, *jobs)
            while not (jobs[0].done() or jobs[1].done()):  # noqa: ASYNC110 - the very turn in which it is given
                await asyncio.sleep(0)
            jobs[2].cancel()
            await asyncio.wait(jobs)
            assert jobs[2].cancelled()

    on_loop(main)


def test_leaving_in_the_turn_of_the_answer() -> None:
    async def main() -> None:
        async with linked() as rig:
            job = rig.job()
            await until_asked(rig, job)
            while rig.link._jobs:  # noqa: ASYNC110 - the very turn in which the answer comes
                await asyncio.sleep(0)
            assert not job.done()
            job.cancel()
            await asyncio.wait([job])
            assert job.cancelled()

    on_loop(main)


def test_leaving_in_the_turn_in_which_the_process_dies() -> None:
    async def main() -> None:
        async with linked() as rig:
            rig.signal(signal.SIGSTOP)
            job = rig.job()
            await until_asked(rig, job)
            job.cancel()
            rig.link.end("died")
            await asyncio.wait([job])
            assert job.cancelled()

    on_loop(main)


def test_the_process_dies_while_a_job_is_put_in_place() -> None:
    async def main() -> None:
        async with linked() as rig:
            job = rig.job(bytes(3 * 1024 * 1024))
            await until_asked(rig, job)
            rig.link.end("died")
            assert await reason_of(job) == "died"
            assert await reason_of(rig.job()) == "died"

    on_loop(main)


def test_a_job_that_nobody_waits_for_keeps_no_memory() -> None:
    async def main() -> None:
        async with linked() as rig:
            rig.signal(signal.SIGSTOP)
            job = rig.job(bytes(500_000))
            await until_asked(rig, job)

            assert held(rig) > 500_000
            job.cancel()
            await asyncio.wait([job])
            assert held(rig) == 0
            rig.signal(signal.SIGCONT)

    on_loop(main)


def test_a_large_job_that_was_never_quite_there_keeps_no_memory() -> None:
    async def main() -> None:
        async with linked() as rig:
            job = rig.job(bytes(9 * 1024 * 1024))
            while held(rig) < 6 * 1024 * 1024:  # noqa: ASYNC110 - between two steps
                await asyncio.sleep(0)
            job.cancel()
            await asyncio.wait([job])
            assert held(rig) <= 4 * 1024 * 1024

    on_loop(main)


@pytest.mark.parametrize("turns", range(12))
def test_leaving_at_any_moment(turns: int) -> None:
    """A large body is put in place and fetched over several turns of the loop."""
    data = ",".join(["7"] * 1_500_000)
    body = f'{{"inputs":[{{"name":"x","datatype":"INT8","shape":[1500000],"data":[{data}]}}]}}'.encode()

    async def main() -> None:
        async with linked() as rig:
            jobs = [rig.job(body) for _ in range(3)]
            for _ in range(turns):
                await asyncio.sleep(0)
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
            assert await asyncio.gather(rig.do(), rig.do()) == [b"\1\2"] * 2

    on_loop(main)


def test_a_killed_process_has_no_jobs() -> None:
    async def main() -> None:
        async with linked(max_waiting=1) as rig:
            rig.signal(signal.SIGSTOP)
            jobs = [rig.job() for _ in range(3)]
            await until_asked(rig, *jobs)
            left = rig.job()
            assert await reason_of(left) == "full"
            jobs[0].cancel()
            rig.signal(signal.SIGKILL)
            assert [await reason_of(job) for job in jobs[1:]] == ["died"] * 2
            assert rig.lost == ["died"]

    on_loop(main)


def test_a_process_that_does_not_answer_is_given_up() -> None:
    async def main() -> None:
        async with linked(stall_s=1.5) as rig:
            assert await rig.do() == b"\1\2"
            rig.signal(signal.SIGSTOP)
            jobs = [rig.job() for _ in range(3)]
            assert [await reason_of(job) for job in jobs] == ["stalled"] * 3
            assert rig.lost == ["stalled"]

    on_loop(main)


def test_idleness_is_no_stall() -> None:
    async def main() -> None:
        async with linked(stall_s=1.0) as rig:
            assert await rig.do() == b"\1\2"
            over = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_later(2.0, over.set_result, None)
            await over
            assert await rig.do() == b"\1\2"
            assert not rig.lost

    on_loop(main)


def test_what_the_process_cannot_do() -> None:
    async def main() -> None:
        async with linked() as rig:
            with pytest.raises(Unavailable) as caught:
                await rig.link.do({"job": "encode"}, [])
            assert caught.value.reason == "unfit"
            assert await rig.do() == b"\1\2"

    on_loop(main)


def test_memory_that_is_not_there() -> None:
    async def main() -> None:
        async with linked() as rig:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
            try:
                job = rig.job()
                assert await reason_of(job) == "memory"
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert await asyncio.gather(rig.do(), rig.do(), rig.do()) == [b"\1\2"] * 3

    on_loop(main)


def test_a_start_that_fails_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    with pytest.raises(TimeoutError):
        start(0.000_001)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        start(20)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="ended before it was ready, exit code 1"):
        start(20)
    assert open_files() == before
