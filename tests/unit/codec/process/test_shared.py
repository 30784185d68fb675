"""Files in memory that two sides read and write."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from server.codec.process.shared import CutOffError, SharedFile
from server.codec.process.steps import at_once

MIB = 1024 * 1024


@pytest.fixture
def file() -> Iterator[SharedFile]:
    shared = SharedFile.create()
    yield shared
    shared.close()


def held(file: SharedFile) -> int:
    """Bytes of memory behind it."""
    return os.fstat(file.fd).st_blocks * 512


def test_chunks_lie_one_behind_the_other(file: SharedFile) -> None:
    assert at_once(file.write([b"ab", b"", bytearray(b"cd"), memoryview(b"xefx")[1:3]])) == 6
    assert at_once(file.read(6)) == b"abcdef"
    assert at_once(file.write([b"zz"])) == 2
    assert at_once(file.read(2)) == b"zz"
    assert at_once(file.read(0)) == b""


def test_what_is_read_is_a_copy_that_nobody_changes(file: SharedFile) -> None:
    at_once(file.write([b"before"]))
    message = at_once(file.read(6))
    at_once(file.write([b"behind"]))
    assert message == b"before"
    assert message.readonly


def test_large_messages_take_a_step_for_each_mib(file: SharedFile) -> None:
    whole = os.urandom(2 * MIB + 5)
    chunks = [whole[:10], whole[10 : MIB + 20], whole[MIB + 20 :]]
    steps = file.write(chunks)
    assert sum(1 for _ in steps) == 2
    steps_of_read = file.read(len(whole))
    assert sum(1 for _ in steps_of_read) == 2
    assert at_once(file.read(len(whole))) == whole


def test_less_than_promised(file: SharedFile) -> None:
    at_once(file.write([b"abc"]))
    with pytest.raises(CutOffError, match="3 of 4 bytes"):
        at_once(file.read(4))
    file.empty()
    with pytest.raises(CutOffError, match="0 of 3 bytes"):
        at_once(file.read(3))
    assert held(file) == 0


def test_memory_of_large_messages_is_given_back(file: SharedFile) -> None:
    size = at_once(file.write([bytes(9 * MIB)]))
    assert held(file) >= 9 * MIB
    file.trim(1000)
    assert held(file) >= 9 * MIB
    file.trim(size)
    assert held(file) == 4 * MIB
