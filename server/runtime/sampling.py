"""Input data made up for a signature: what a model is proved, measured and warmed up with before it serves."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.errors import ModelLoadError
from server.runtime.base import Batch, WarmupInput, WarmupSample
from server.types import BYTES, DATATYPES, Buffer, ModelSpec, TensorSpec, element_count

_LETTERS: Final = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
#: Sizes tried for free dimensions, likeliest first: short sequences, a single item, then sizes that images have.
_FREE_SIZES: Final = (8, 1, 32, 224)
#: Integers are drawn below this: first a small range of ids, then flags (and digits for strings).
_INTEGER_BOUNDS: Final = (8, 2)
_MAX_SAMPLE_ELEMENTS: Final = 16_000_000
_MAX_WARMUP_FILE_BYTES: Final = 1 << 30


@dataclass(slots=True, frozen=True)
class Domain:
    """What values are drawn from. ``shapes`` gives whole row shapes for inputs that the operator warmed up with."""

    free_size: int
    integer_bound: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def row_shape(self, spec: TensorSpec, batched: bool) -> tuple[int, ...]:
        """Shape of one row (without the batch axis), or of the whole input when the model does not batch."""
        if spec.name in self.shapes:
            return self.shapes[spec.name]
        return tuple(self.free_size if dim == -1 else dim for dim in spec.shape[1 if batched else 0 :])


def domains(spec: ModelSpec, warmup: tuple[WarmupSample, ...] = ()) -> Iterator[Domain]:
    """Domains to try in turn until the graph takes one; the shapes of the operator's own samples come first."""
    free = any(-1 in tensor.shape[1 if spec.max_batch_size else 0 :] for tensor in spec.inputs)
    bounded = any(tensor.datatype == BYTES or "INT" in tensor.datatype for tensor in spec.inputs)
    bounds = _INTEGER_BOUNDS if bounded else _INTEGER_BOUNDS[:1]
    for sample in warmup:
        shapes = {name: entry.dims for name, entry in sample.inputs.items()}
        yield from (Domain(1, bound, shapes) for bound in bounds)
    for size in _FREE_SIZES if free else _FREE_SIZES[:1]:
        for bound in bounds:
            domain = Domain(size, bound)
            if sum(element_count(domain.row_shape(t, spec.max_batch_size > 0)) for t in spec.inputs) <= (
                _MAX_SAMPLE_ELEMENTS
            ):
                yield domain


def random_rows(spec: ModelSpec, domain: Domain, rows: int, rng: np.random.Generator) -> list[Batch]:
    """``rows`` batches of one row each, with values of their own."""
    return [_single(spec, domain, rng) for _ in range(rows)]


def join(rows: list[Batch]) -> Batch:
    """The batch that gathers single-row batches in order."""
    shapes = [(len(rows), *shape[1:]) for shape in rows[0].shapes]
    parts: list[list[Buffer | list[bytes]] | None] = []
    for index, first in enumerate(rows[0].parts):
        parts.append(None if first is None else [part for row in rows for part in row.parts[index] or ()])
    return Batch(len(rows), shapes, parts)


def random_batch(spec: ModelSpec, domain: Domain, rows: int, rng: np.random.Generator) -> Batch:
    """One batch of ``rows`` rows (of the whole inputs when the model does not batch)."""
    return join(random_rows(spec, domain, rows, rng)) if spec.max_batch_size else _single(spec, domain, rng)


def operator_batch(spec: ModelSpec, sample: WarmupSample, folder: Path | None, rng: np.random.Generator) -> Batch:
    """The batch that a warm-up sample of the configuration describes. Raises ModelLoadError naming what is wrong."""
    known = {tensor.name for tensor in spec.inputs}
    if strangers := sorted(set(sample.inputs) - known):
        raise ModelLoadError(f"Warm-up sample '{sample.name}': the model has no input '{strangers[0]}'.")
    rows = max(1, sample.batch_size)
    if spec.max_batch_size and rows > spec.max_batch_size:
        raise ModelLoadError(
            f"Warm-up sample '{sample.name}': batch_size {rows} is over max_batch_size {spec.max_batch_size}."
        )
    shapes: list[tuple[int, ...]] = []
    parts: list[list[Buffer | list[bytes]] | None] = []
    for tensor in spec.inputs:
        entry = sample.inputs.get(tensor.name)
        if entry is None and not tensor.optional:
            raise ModelLoadError(f"Warm-up sample '{sample.name}': input '{tensor.name}' is missing.")
        if entry is None:
            shapes.append(())
            parts.append(None)
            continue
        where = f"Warm-up sample '{sample.name}', input '{tensor.name}'"
        shape = (rows, *entry.dims) if spec.max_batch_size else entry.dims
        _check_entry(where, entry, tensor, shape)
        shapes.append(shape)
        parts.append(_operator_parts(where, entry, tensor.datatype, rows if spec.max_batch_size else 1, folder, rng))
    return Batch(rows, shapes, parts)


def _single(spec: ModelSpec, domain: Domain, rng: np.random.Generator) -> Batch:
    batched = spec.max_batch_size > 0
    shapes: list[tuple[int, ...]] = []
    parts: list[list[Buffer | list[bytes]] | None] = []
    for tensor in spec.inputs:
        shape = domain.row_shape(tensor, batched)
        shapes.append((1, *shape) if batched else shape)
        parts.append(None if tensor.optional else [_random(tensor.datatype, shape, domain.integer_bound, rng)])
    return Batch(1, shapes, parts)


def _random(datatype: str, shape: tuple[int, ...], bound: int, rng: np.random.Generator) -> Buffer | list[bytes]:
    count = element_count(shape)
    if datatype == BYTES:
        return _random_strings(count, bound, rng)
    if datatype == "BF16":
        return (rng.random(count, dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    dtype = DATATYPES[datatype][0]
    values: np.ndarray[Any, np.dtype[Any]]
    if dtype.kind == "f":
        values = rng.random(count)
    else:
        values = rng.integers(0, 2 if dtype.kind == "b" else bound, count)
    return values.astype(dtype).tobytes()


def _random_strings(count: int, bound: int, rng: np.random.Generator) -> list[bytes]:
    if bound == min(_INTEGER_BOUNDS):
        return [b"%d" % value for value in rng.integers(0, 10, count)]
    return [rng.choice(_LETTERS, length).tobytes() for length in rng.integers(1, 7, count)]


def _check_entry(where: str, entry: WarmupInput, tensor: TensorSpec, shape: tuple[int, ...]) -> None:
    if entry.datatype and entry.datatype != tensor.datatype:
        raise ModelLoadError(f"{where}: datatype {entry.datatype} is given, the model has {tensor.datatype}.")
    if any(dim < 0 for dim in shape):
        raise ModelLoadError(f"{where}: dims {list(entry.dims)} must not have free dimensions.")
    fits = len(shape) == len(tensor.shape) and all(
        want in {-1, got} for want, got in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ModelLoadError(f"{where}: shape {list(shape)} is given, the model has {list(tensor.shape)}.")


def _operator_parts(
    where: str, entry: WarmupInput, datatype: str, rows: int, folder: Path | None, rng: np.random.Generator
) -> list[Buffer | list[bytes]]:
    count = element_count(entry.dims)
    size = 1 if datatype == BYTES else DATATYPES[datatype][1]
    if count * rows * size > _MAX_WARMUP_FILE_BYTES:
        raise ModelLoadError(f"{where}: {count * rows} elements are more than a warm-up sample may have.")
    if entry.source == "random":
        return [_random(datatype, entry.dims, max(_INTEGER_BOUNDS), rng) for _ in range(rows)]
    if entry.source == "zero":
        return [[b""] * count if datatype == BYTES else bytes(count * size)] * rows
    raw = _warmup_file(where, entry.source, folder)
    if datatype == BYTES:
        return _repeated(where, _split_strings(where, raw), count, rows)
    return _repeated(where, raw, count * size, rows)


def _repeated(where: str, content: Buffer | list[bytes], one_row: int, rows: int) -> list[Buffer | list[bytes]]:
    """A file holds one row, used for every row of the sample, or all of them."""
    if len(content) == one_row * rows:
        return [content]
    if len(content) == one_row:
        return [content] * rows
    unit = "elements" if isinstance(content, list) else "bytes"
    raise ModelLoadError(f"{where}: the file has {len(content)} {unit}, one row has {one_row}.")


def _warmup_file(where: str, name: str, folder: Path | None) -> bytes:
    if folder is None:
        raise ModelLoadError(f"{where}: there is no model folder to read '{name}' from.")
    home = (folder / "warmup").resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home) or not path.is_file():
        raise ModelLoadError(f"{where}: there is no file '{name}' in the model's warmup folder.")
    if path.stat().st_size > _MAX_WARMUP_FILE_BYTES:
        raise ModelLoadError(f"{where}: the file is larger than {_MAX_WARMUP_FILE_BYTES} bytes.")
    return path.read_bytes()


def _split_strings(where: str, raw: bytes) -> list[bytes]:
    """V2's raw form of BYTES: each element behind its length in four little-endian bytes."""
    out: list[bytes] = []
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise ModelLoadError(f"{where}: the file ends inside the length of element {len(out)}.")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if length > len(raw) - position:
            raise ModelLoadError(f"{where}: element {len(out)} is longer than the rest of the file.")
        out.append(raw[position : position + length])
        position += length
    return out
