"""Arithmetic of the datatypes that neither JSON nor numpy knows by itself: integer ranges and BF16."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from server.types import DATATYPES

INTEGERS: Final = frozenset({"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"})
FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})

#: Smallest and largest value of each integer datatype.
INTEGER_RANGES: Final[dict[str, tuple[int, int]]] = {
    name: (int(np.iinfo(DATATYPES[name][0]).min), int(np.iinfo(DATATYPES[name][0]).max)) for name in sorted(INTEGERS)
}
#: Largest finite value of each floating-point datatype.
FLOAT_LIMITS: Final[dict[str, float]] = {
    "FP16": float(np.finfo(np.float16).max),
    "BF16": float.fromhex("0x1.fep127"),
    "FP32": float(np.finfo(np.float32).max),
    "FP64": float(np.finfo(np.float64).max),
}


def bfloat16_bits(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """BF16 bit patterns of doubles, rounded once, to nearest with ties to even. Over the range gives infinity.

    Going through float32 would round twice. So the step to float32 rounds to odd: the value is cut towards zero and
    its last bit set when something was cut off, which keeps ties apart from values just beside them.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = (single != values) & ~np.isnan(values)
    away_from_zero = inexact & (np.abs(single) > np.abs(values))
    bits = (bits - away_from_zero) | inexact
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN's payload into the sign, or lose it: NaN keeps its sign and becomes a quiet one.
    result: NDArray[np.uint16] = np.where(np.isnan(values), (bits >> 16) | 0x7FC0, rounded).astype(np.uint16)
    return result


def bfloat16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The exact float32 value of each BF16 bit pattern."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
