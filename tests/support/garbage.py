"""What is let go of only by the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def cycles() -> Iterator[Callable[[type], list[object]]]:
    """Within the block the collector does not run. Called in it with a type: those of its objects that hold themselves.

    Whoever is still used is none of them.
    """

    def found(kind: type) -> list[object]:
        gc.collect()
        return [item for item in gc.garbage if isinstance(item, kind)]

    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
