"""The watcher of the configuration file on real files, changed the ways that editors and clusters change them.

Looks at the file are the only work that a watcher gives to threads, so a thread pool that takes a step of the test
before each look puts every change between two looks that are known.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import structlog

from server.config.load import MAX_BYTES
from server.watching import ConfigWatcher, read_config

Step = Callable[[], object]


def nothing() -> None:
    """A look at what is there anyway."""


class Looks(ThreadPoolExecutor):
    """One thread that takes the next of ``steps`` before each look; ``times`` are those of the looks, in seconds."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__(max_workers=1)
        self._steps = itertools.chain(steps, itertools.repeat(nothing))
        self.times: list[float] = []

    def submit(self, look: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def step_and_look() -> Any:
            next(self._steps)()
            self.times.append(time.monotonic())
            return look(*args, **kwargs)

        return super().submit(step_and_look)


def watch(
    path: Path,
    *steps: Step,
    count: int = 1,
    seen: bytes | None = b"one",
    debounce_s: float = 0.0,
    interval_s: float = 0.0,
) -> tuple[list[bytes], list[float]]:
    """The first ``count`` contents told while ``steps`` are taken, one before each look, and the times of looks."""
    looks = Looks(steps)

    async def telling() -> list[bytes]:
        asyncio.get_running_loop().set_default_executor(looks)
        told: list[bytes] = []
        async with aclosing(ConfigWatcher(path, debounce_s, interval_s=interval_s, seen=seen).changes()) as changes:
            while len(told) < count:
                told.append(await asyncio.wait_for(anext(changes), 20))
        return told

    return asyncio.run(telling()), looks.times


def told(path: Path, *steps: Step, **options: Any) -> list[bytes]:
    return watch(path, *steps, **options)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tidegate.yaml"
    file.write_bytes(b"one")
    return file


def write(path: Path, content: bytes) -> Step:
    return lambda: path.write_bytes(content)


def replace(path: Path, content: bytes) -> Step:
    def step() -> None:
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)

    return step


@pytest.mark.parametrize("change", [write, replace])
def test_each_change_is_told_once(path: Path, change: Callable[[Path, bytes], Step]) -> None:
    contents = [b"two", b"six", b"one", b"two"]
    steps = [step for content in contents for step in (nothing, change(path, content), nothing, nothing)]
    assert told(path, *steps, change(path, b"end"), count=5) == [*contents, b"end"]


def test_a_change_before_watching_began_is_told(path: Path) -> None:
    assert told(path, seen=b"zero") == [b"one"]


def test_what_is_there_when_watching_begins_is_not_told(path: Path) -> None:
    assert told(path, nothing, nothing, write(path, b"two"), seen=None) == [b"two"]


def test_a_file_that_appears_after_the_start_is_told(path: Path) -> None:
    path.unlink()
    assert told(path, nothing, nothing, write(path, b"one"), seen=None) == [b"one"]


def test_a_swap_of_the_links_of_a_config_map_is_told(tmp_path: Path) -> None:
    for name, content in (("..v1", b"one"), ("..v2", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_bytes(content)
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "c.yaml").symlink_to("..data/c.yaml")

    def swap() -> None:
        (tmp_path / "..data_tmp").symlink_to("..v2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")

    assert told(tmp_path / "c.yaml", nothing, swap) == [b"two"]


def test_equal_size_and_time_do_not_hide_a_change(path: Path) -> None:
    before = path.stat()

    def step() -> None:
        path.write_bytes(b"eno")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert told(path, nothing, step) == [b"eno"]


def test_equal_content_in_a_new_file_is_nothing_new(path: Path) -> None:
    assert told(path, replace(path, b"one"), path.touch, replace(path, b"one"), write(path, b"two")) == [b"two"]


def test_a_change_undone_within_the_debounce_is_none(path: Path) -> None:
    assert told(path, write(path, b"two"), write(path, b"one"), nothing, write(path, b"six")) == [b"six"]


def test_a_file_that_is_being_written_is_waited_for(path: Path) -> None:
    def more() -> None:
        with path.open("ab") as file:
            file.write(b" more")

    assert told(path, write(path, b""), *[more] * 20) == [b" more" * 20]


def test_a_missing_file_is_waited_for_and_logged_once(path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        assert told(path, path.unlink, *[nothing] * 5, write(path, b"two")) == [b"two"]
    assert [entry["event"] for entry in logs] == ["config_unreadable", "config_readable"]
    assert (logs[0]["path"], logs[0]["error"]) == (str(path), "No such file or directory")


def test_a_file_that_vanishes_and_comes_back_the_same_is_nothing_new(path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        steps = (path.unlink, write(path, b"one"), nothing, path.unlink, nothing, write(path, b"two"))
        assert told(path, *steps) == [b"two"]
    assert [entry["event"] for entry in logs] == ["config_unreadable", "config_readable"] * 2


def test_looks_keep_their_distance(path: Path) -> None:
    _, times = watch(path, *[nothing] * 3, write(path, b"two"), debounce_s=0.06, interval_s=0.02)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) == 4
    assert all(gap >= 0.019 for gap in gaps[:3])
    assert gaps[3] >= 0.059


def test_a_watcher_ends_when_cancelled(path: Path) -> None:
    async def cancelled() -> None:
        async with aclosing(ConfigWatcher(path).changes()) as changes:
            waiting = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(asyncio.wait_for(cancelled(), 10))


def test_the_largest_file_is_read_and_a_larger_one_refused(path: Path) -> None:
    path.write_bytes(b"x" * MAX_BYTES)
    assert len(read_config(path)) == MAX_BYTES
    path.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(OSError, match=f"over {MAX_BYTES} bytes"):
        read_config(path)


def test_the_log_says_why_a_file_cannot_be_read(path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        assert told(path, write(path, b"x" * (MAX_BYTES + 1)), write(path, b"two")) == [b"two"]
    assert logs[0]["error"] == f"is over {MAX_BYTES} bytes, the most a configuration may have"


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_config(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        read_config(tmp_path)
