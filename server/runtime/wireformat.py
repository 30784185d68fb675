"""Protobuf's wire format, walked in a file without parsing it: a jump over every field that nobody asks for.

The file may be hostile. Work is bounded by a budget of fields, memory by one window of the file, and nothing is mapped:
a mapped file that somebody truncates meanwhile would end the process with SIGBUS.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Final

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}
_MAX_TAG: Final = 2**32 - 1
_MAX_VARINT_BYTES: Final = 10
_MAX_TEXT_BYTES: Final = 8192
_WINDOW_BYTES: Final = 65_536

#: Any number of numeric fields with a one-byte tag: trees and scalers hold millions of them, one by one. Each byte can
#: be matched in one way only, so nothing is ever tried twice; possessive forms match wrongly before Python 3.11.5.
_NUMERIC_FIELDS: Final = re.compile(
    rb"(?s:[\x08\x10\x18\x20\x28\x30\x38\x40\x48\x50\x58\x60\x68\x70\x78][\x80-\xff]{0,9}[\x00-\x7f]"
    rb"|[\x0d\x15\x1d\x25\x2d\x35\x3d\x45\x4d\x55\x5d\x65\x6d\x75\x7d].{4}"
    rb"|[\x09\x11\x19\x21\x29\x31\x39\x41\x49\x51\x59\x61\x69\x71\x79].{8})+"
)
#: So many bytes of text kept, or of numeric fields skipped at once, count as one field.
_BYTES_PER_FIELD: Final = 64


class Malformed(Exception):
    """The bytes are not protobuf wire format; the text goes behind "its bytes are no ONNX file: "."""


class TooLarge(Exception):
    """Over a bound on what is looked at; the text goes behind the file's name."""


class WireFile:
    """A file of one protobuf message, opened by the caller. ``max_fields`` bounds the fields looked at in all."""

    def __init__(self, descriptor: int, size: int, max_fields: int) -> None:
        self.size = size
        self._descriptor = descriptor
        self._max_fields = max_fields
        self._left = max_fields
        self._window = b""
        self._base = 0

    def fields(
        self, start: int, end: int, wanted: frozenset[int], numbers: dict[int, int] | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Field number, start and end of each wanted length-delimited field of the message at ``start:end``.

        ``numbers``: varint fields to look for, with their defaults; the last value of each (unsigned, 64 bits) is put
        there once the iteration ends, as protobuf has it. Raises Malformed or TooLarge.
        """
        position = start
        while position < end:
            self._spend(1)
            field = position
            tag, position = self._varint(position, end)
            number, kind = tag >> 3, tag & 7
            if tag > _MAX_TAG or number == 0:
                raise Malformed(f"there is no valid field at byte {field}")
            if kind == _BYTES:
                length, position = self._varint(position, end)
                if length > end - position:
                    raise Malformed(f"the field at byte {field} claims {length} bytes, {end - position} are left")
                if number in wanted:
                    yield number, position, position + length
                position += length
            elif numbers is None:
                position = self._after_numbers(field, position, end, kind)
            elif kind == _VARINT:
                value, position = self._varint(position, end)
                if number in numbers:
                    numbers[number] = value
            else:
                position = self._after_fixed(field, position, end, kind)

    def text(self, start: int, end: int) -> str:
        """A string field. Raises Malformed unless it is UTF-8, TooLarge when it is longer than any name."""
        if end - start > _MAX_TEXT_BYTES:
            raise TooLarge(f"holds a name of {end - start} bytes, at most {_MAX_TEXT_BYTES} are taken")
        self._spend((end - start) // _BYTES_PER_FIELD)
        if start < self._base or end > self._base + len(self._window):
            self._fill(start)
        raw = self._window[start - self._base : end - self._base]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise Malformed(f"the text at byte {start} is not UTF-8") from None

    def _spend(self, fields: int) -> None:
        self._left -= fields
        if self._left < 0:
            raise TooLarge(f"has more than {self._max_fields} fields to look at")

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        index = position - self._base
        if not 0 <= index <= len(self._window) - _MAX_VARINT_BYTES:
            self._fill(position)
            index = 0
        window = self._window
        if position < end and window[index] < 0x80:
            return window[index], position + 1
        value = 0
        for count in range(min(end - position, _MAX_VARINT_BYTES)):
            byte = window[index + count]
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position + count + 1
        raise Malformed(f"the number at byte {position} does not end")

    def _after_fixed(self, field: int, position: int, end: int, kind: int) -> int:
        size = _FIXED_BYTES.get(kind)
        if size is None:
            raise Malformed(f"the field at byte {field} has wire type {kind}")
        if size > end - position:
            raise Malformed(f"the field at byte {field} ends outside its message")
        return position + size

    def _after_numbers(self, field: int, position: int, end: int, kind: int) -> int:
        """Past the numeric field whose tag ends at ``position``, and past those right behind it."""
        if kind == _VARINT:
            position = self._varint(position, end)[1]
        else:
            position = self._after_fixed(field, position, end, kind)
        index = position - self._base
        match = _NUMERIC_FIELDS.match(self._window, index, end - self._base) if index >= 0 else None
        if match is None:
            return position
        skipped = match.end() - index
        self._spend(skipped // _BYTES_PER_FIELD)
        return position + skipped

    def _fill(self, position: int) -> None:
        wanted = min(_WINDOW_BYTES, self.size - position)
        self._window = os.pread(self._descriptor, wanted, position)
        self._base = position
        if len(self._window) < wanted:
            raise Malformed("the file became shorter while it was read")
