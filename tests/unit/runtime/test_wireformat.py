from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.runtime.wireformat import Malformed, TooLarge, WireFile

ALL = frozenset(range(1, 100))


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def blob(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


class Files:
    """Opens contents as wire files; everything is closed at the end of the test."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "file"
        self._open: list[int] = []

    def __call__(self, content: bytes, max_fields: int = 1000) -> WireFile:
        self._path.unlink(missing_ok=True)
        self._path.write_bytes(content)
        self._open.append(os.open(self._path, os.O_RDONLY))
        return WireFile(self._open[-1], len(content), max_fields)

    def close(self) -> None:
        for descriptor in self._open:
            os.close(descriptor)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    opened = Files(tmp_path)
    yield opened
    opened.close()


def walk(file: WireFile, numbers: dict[int, int] | None = None) -> list[tuple[int, int, int]]:
    return list(file.fields(0, file.size, ALL, numbers))


def test_only_wanted_fields_of_the_message_are_given(files: Files) -> None:
    content = blob(1, b"abc") + number(2, 300) + blob(3, b"") + b"\x2d1234" + b"\x3112345678" + blob(1, b"d")
    file = files(content)
    found = list(file.fields(0, file.size, frozenset({1})))
    assert [(n, content[a:b]) for n, a, b in found] == [(1, b"abc"), (1, b"d")]
    assert [n for n, _, _ in walk(files(content))] == [1, 3, 1]


def test_the_last_number_counts_and_keeps_64_bits(files: Files) -> None:
    numbers = {2: 7, 3: 8}
    walk(files(number(2, 1) + number(4, 9) + number(2, 2**64 - 1) + b"\x2d1234"), numbers)
    assert numbers == {2: 2**64 - 1, 3: 8}


def test_padded_tags_and_lengths_are_read_as_protobuf_reads_them(files: Files) -> None:
    assert walk(files(b"\x8a\x80\x00" + b"\x83\x80\x00" + b"abc")) == [(1, 6, 9)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x0a", "does not end"),
        (b"\x0a\x05abc", "the field at byte 0 claims 5 bytes, 3 are left"),
        (b"\x0a\xff\xff\xff\xff\x07", "claims 2147483647 bytes, 0 are left"),
        (b"\x0a" + b"\xff" * 9 + b"\x01", "claims 18446744073709551615 bytes"),
        (b"\x08" + b"\xff" * 20, "the number at byte 1 does not end"),
        (b"\xff" * 40, "the number at byte 0 does not end"),
        (b"\x02\x00", "no valid field at byte 0"),
        (b"\x80\x80\x80\x80\x80\x01\x00", "no valid field at byte 0"),
        (b"\x0b\x0c", "has wire type 3"),
        (b"\x0f", "has wire type 7"),
        (b"\x0d123", "ends outside its message"),
        (b"\x08", "does not end"),
        (b"\x08\x01\x09" + b"1234567", "ends outside its message"),
    ],
)
@pytest.mark.parametrize("numbered", [False, True])
def test_malformed_bytes_say_where(files: Files, content: bytes, reason: str, numbered: bool) -> None:
    with pytest.raises(Malformed, match=reason):
        walk(files(content), {50: 0} if numbered else None)


def test_work_is_bounded(files: Files) -> None:
    assert len(walk(files(blob(1, b"") * 1000))) == 1000
    with pytest.raises(TooLarge, match="has more than 1000 fields to look at"):
        walk(files(blob(1, b"") * 1001))
    with pytest.raises(TooLarge):
        walk(files(number(1, 5) * 50_000))


def test_runs_of_numbers_cost_little(files: Files) -> None:
    run = b"".join(b"\x3d" + struct.pack("<f", i) + number(8, i) + b"\x09" + b"\xff" * 8 for i in range(20_000))
    assert walk(files(run + blob(2, b"end"), max_fields=12_000)) == [(2, len(run) + 2, len(run) + 5)]


def test_text_is_utf_8_and_of_bounded_length(files: Files) -> None:
    file = files("é".encode() * 4000 + b"\xff")
    assert file.text(0, 8000) == "é" * 4000
    assert file.text(2, 2) == ""
    with pytest.raises(Malformed, match="not UTF-8"):
        file.text(7998, 8001)
    long = files(b"a" * 9000)
    with pytest.raises(TooLarge, match="a name of 9000 bytes"):
        long.text(0, 9000)


def test_a_file_that_shrinks_meanwhile_is_an_error_and_no_crash(files: Files, tmp_path: Path) -> None:
    file = files(blob(1, b"x" * 100_000) + blob(2, b"y" * 100_000))
    fields = file.fields(0, file.size, ALL)
    assert next(fields)[0] == 1
    os.truncate(tmp_path / "file", 50_000)
    with pytest.raises(Malformed, match="became shorter"):
        next(fields)


fields_of_any_kind = st.lists(
    st.one_of(
        st.builds(blob, st.integers(1, 99), st.binary(max_size=200)),
        st.builds(number, st.integers(1, 99), st.integers(0, 2**64 - 1)),
        st.binary(min_size=4, max_size=4).map(lambda content: b"\x2d" + content),
        st.binary(min_size=8, max_size=8).map(lambda content: b"\x31" + content),
    ),
    max_size=60,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(message=fields_of_any_kind)
def test_a_well_formed_message_gives_back_its_fields(files: Files, message: list[bytes]) -> None:
    content = b"".join(message)
    wanted = [field for field in message if field and _kind(field) == 2]
    got = walk(files(content))
    assert [blob(n, content[a:b]) for n, a, b in got] == wanted


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=400), numbered=st.booleans())
def test_any_bytes_end_in_fields_or_in_a_refusal(files: Files, content: bytes, numbered: bool) -> None:
    try:
        got = walk(files(content), {5: 0} if numbered else None)
    except (Malformed, TooLarge):
        return
    assert all(0 < a <= b <= len(content) for _, a, b in got)


def _kind(field: bytes) -> int:
    return field[0] & 7
