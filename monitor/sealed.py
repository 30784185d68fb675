"""One file form for profiles and states: a JSON header, named arrays, and a SHA-256 over their contents.

``magic (8) | header length (4, little endian) | header (canonical JSON) | arrays, each zlib-compressed | digest (32)``.
The digest covers what was stored, not how well it was compressed: equal contents have equal digests everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from monitor.errors import MonitorError
from monitor.types import Array

MAGIC: Final = b"TIDEMON1"
#: Bounds on a file that is read, so that a damaged length cannot ask for all memory.
MAX_HEADER_BYTES: Final = 256 * 1024 * 1024
MAX_ARRAY_BYTES: Final = 8 * 1024**3
_DTYPES: Final = {"u1": "|u1", "i4": "<i4", "i8": "<i8", "f4": "<f4", "f8": "<f8"}


def pack(kind: str, header: Mapping[str, Any], arrays: Mapping[str, Array], dense: Collection[str] = ()) -> bytes:
    """The file's bytes. Arrays are of dtype u1, i4, i8, f4 or f8; NaN in the header is refused.

    ``dense``: those that would hardly become smaller, and are stored as they are.
    """
    raws = {name: _raw(array) for name, array in sorted(arrays.items())}
    shapes = {name: [array.dtype.str[1:], list(array.shape)] for name, array in arrays.items()}
    content = _canonical({"kind": kind, "header": header, "arrays": shapes})
    # Most counts become a tenth of their size; measured values hardly change, at the same cost.
    as_is = {name for name, array in arrays.items() if array.dtype.kind == "f"}.union(dense)
    stored = {name: zlib.compress(raw, 0 if name in as_is else 1) for name, raw in raws.items()}
    sizes = _canonical({name: len(blob) for name, blob in stored.items()})
    head = _canonical([content.decode(), sizes.decode()])
    digest = _digest(content, raws)
    return b"".join([MAGIC, len(head).to_bytes(4, "little"), head, *stored.values(), digest])


def unpack(
    data: bytes, kind: str, error: type[MonitorError], what: str
) -> tuple[dict[str, Any], dict[str, Array], str]:
    """(header, arrays, digest in hex). Raises ``error`` naming ``what`` for anything but an intact file of ``kind``."""

    def refuse(why: str) -> NoReturn:
        raise error(f"{what}: {why}")

    if data[:8] != MAGIC:
        refuse("not a file of this monitor (wrong first bytes)")
    end = 12 + int.from_bytes(data[8:12], "little")
    if end - 12 > MAX_HEADER_BYTES or end + 32 > len(data):
        refuse("the file is cut short or damaged")
    try:
        content, sizes = json.loads(data[12:end])
        described, lengths, content = json.loads(content), json.loads(sizes), content.encode()
        if described["kind"] != kind:
            refuse(f"wanted a {kind}, got a {described['kind']}")
        arrays: dict[str, Array] = {}
        for name in sorted(described["arrays"]):
            code, shape = described["arrays"][name]
            arrays[name] = _restore(data[end : end + lengths[name]], _DTYPES[code], tuple(shape))
            end += lengths[name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error) as failure:
        raise error(f"{what}: the file is damaged ({type(failure).__name__})") from None
    digest = _digest(content, {name: _raw(array) for name, array in arrays.items()})
    if data[end:] != digest:
        refuse("the contents do not match the checksum")
    return described["header"], arrays, digest.hex()


def content_digest(kind: str, header: Mapping[str, Any], arrays: Mapping[str, Array]) -> str:
    """The digest that ``pack`` would write, in hex."""
    shapes = {name: [array.dtype.str[1:], list(array.shape)] for name, array in arrays.items()}
    content = _canonical({"kind": kind, "header": header, "arrays": shapes})
    return _digest(content, {name: _raw(array) for name, array in sorted(arrays.items())}).hex()


def write_file(path: Path, data: bytes) -> None:
    """Write beside, flush to the disk, then put in place: a reader sees the old file or the new one."""
    beside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _raw(array: Array) -> bytes:
    return np.ascontiguousarray(array).astype(_DTYPES[array.dtype.str[1:]], copy=False).tobytes()


def _digest(content: bytes, raws: Mapping[str, bytes]) -> bytes:
    found = hashlib.sha256(content)
    for raw in raws.values():
        found.update(raw)
    return found.digest()


def _restore(blob: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < 0 or size > MAX_ARRAY_BYTES:
        raise ValueError("size")
    raw = zlib.decompressobj().decompress(blob, size + 1)
    return np.frombuffer(raw, dtype).reshape(shape)
