"""The watcher of the configuration file on real files, written the ways that editors and clusters write them."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import structlog

from server.config.load import MAX_BYTES
from server.watching import ConfigWatcher, read_config

#: Much shorter than in earnest; tests await what the watcher tells, never a time.
DEBOUNCE_S, INTERVAL_S = 0.03, 0.01


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tidegate.yaml"
    file.write_bytes(b"one")
    return file


@asynccontextmanager
async def watching(path: Path, seen: bytes | None = b"one") -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
    async with aclosing(ConfigWatcher(path, DEBOUNCE_S, interval_s=INTERVAL_S, seen=seen).changes()) as changes:
        yield changes


@in_loop
async def test_a_write_in_place_is_told(path: Path) -> None:
    async with watching(path) as changes:
        path.write_bytes(b"two")
        assert await anext(changes) == b"two"


@in_loop
async def test_a_change_before_watching_began_is_told(path: Path) -> None:
    async with watching(path, seen=b"zero") as changes:
        assert await anext(changes) == b"one"


@in_loop
async def test_a_file_replaced_by_an_editor_is_told_each_time(path: Path) -> None:
    async with watching(path) as changes:
        for content in (b"two", b"six", b"one", b"two"):
            path.with_suffix(".new").write_bytes(content)
            path.with_suffix(".new").replace(path)
            assert await anext(changes) == content


@in_loop
async def test_a_swap_of_the_links_of_a_config_map_is_told(tmp_path: Path) -> None:
    for name, content in (("..v1", b"one"), ("..v2", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c.yaml").write_bytes(content)
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "c.yaml").symlink_to("..data/c.yaml")
    async with watching(tmp_path / "c.yaml") as changes:
        (tmp_path / "..data_tmp").symlink_to("..v2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        assert await anext(changes) == b"two"


@in_loop
async def test_same_size_and_time_do_not_hide_a_change(path: Path) -> None:
    status = path.stat()
    async with watching(path) as changes:
        path.write_bytes(b"eno")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert await anext(changes) == b"eno"


@in_loop
async def test_the_same_content_again_is_nothing_new(path: Path) -> None:
    async with watching(path) as changes:
        telling = asyncio.ensure_future(anext(changes))
        for _ in range(5):
            path.write_bytes(b"one")
            path.touch()
            await asyncio.sleep(2 * INTERVAL_S)
        assert not telling.done()
        path.write_bytes(b"two")
        assert await telling == b"two"


@in_loop
async def test_a_file_that_is_being_written_is_waited_for(path: Path) -> None:
    """The writer never pauses for the debounce time, so only what it leaves at the end may be told."""
    async with watching(path) as changes:
        telling = asyncio.ensure_future(anext(changes))
        written = b""
        with path.open("wb", buffering=0) as file:
            for _ in range(40):
                file.write(b"line\n")
                written += b"line\n"
                await asyncio.sleep(0)
        assert not telling.done()
        assert await telling == written


@in_loop
async def test_a_missing_file_is_waited_for_and_told_once(path: Path) -> None:
    with structlog.testing.capture_logs() as logs:
        path.unlink()
        async with watching(path) as changes:
            telling = asyncio.ensure_future(anext(changes))
            while not logs:
                await asyncio.sleep(INTERVAL_S)
            await asyncio.sleep(5 * INTERVAL_S)
            assert len(logs) == 1
            path.write_bytes(b"two")
            assert await telling == b"two"
    assert [entry["event"] for entry in logs] == ["config_unreadable", "config_readable"]
    assert logs[0]["error"] == "No such file or directory"


@in_loop
async def test_a_file_that_appears_after_the_start_is_told(path: Path) -> None:
    path.unlink()
    async with watching(path, seen=None) as changes:
        telling = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(3 * INTERVAL_S)
        path.write_bytes(b"one")
        assert await telling == b"one"


@in_loop
async def test_what_is_there_at_the_start_is_not_told(path: Path) -> None:
    async with watching(path, seen=None) as changes:
        telling = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(3 * INTERVAL_S)
        path.write_bytes(b"two")
        assert await telling == b"two"


@in_loop
async def test_a_watcher_ends_when_cancelled(path: Path) -> None:
    async with watching(path) as changes:
        telling = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        telling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await telling


def test_the_largest_file_is_read_and_a_larger_one_refused(path: Path) -> None:
    path.write_bytes(b"x" * MAX_BYTES)
    assert len(read_config(path)) == MAX_BYTES
    path.write_bytes(b"x" * (MAX_BYTES + 1))
    with pytest.raises(OSError, match=f"over {MAX_BYTES} bytes"):
        read_config(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_config(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        read_config(tmp_path)
