"""What the inputs and outputs of an ONNX graph are called, read from its file without building anything.

Field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from server.runtime.wireformat import Malformed, TooLarge, WireFile

_MODEL_GRAPH: Final = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_ENDS: Final = frozenset({_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT})
#: Where the name is, in a tensor and in a value.
_NAME: Final = {_GRAPH_INITIALIZER: 8, _GRAPH_INPUT: 1, _GRAPH_OUTPUT: 1}
#: Far over any real model, whose nodes are passed over whole.
_MAX_FIELDS: Final = 2_000_000


def graph_ends(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Names of the inputs that a caller must give, and of the outputs; None for a file that cannot be read so.

    Inputs that an initializer gives a value are left out, as a caller need not.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = _read(WireFile(file, os.fstat(file).st_size, _MAX_FIELDS))
    except (OSError, Malformed, TooLarge):
        return None
    finally:
        os.close(file)
    given = set(found[_GRAPH_INITIALIZER])
    return tuple([name for name in found[_GRAPH_INPUT] if name not in given]), tuple(found[_GRAPH_OUTPUT])


def _read(file: WireFile) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {field: [] for field in _ENDS}
    for _, start, end in file.fields(0, file.size, frozenset({_MODEL_GRAPH})):
        for field, first, last in file.fields(start, end, _ENDS):
            found[field].append(_name(file, first, last, _NAME[field]))
    return found


def _name(file: WireFile, start: int, end: int, number: int) -> str:
    name = ""
    for _, first, last in file.fields(start, end, frozenset({number})):
        name = file.text(first, last)
    return name
