"""One decorator for every kernel, and the one place where kernels are compiled.

A kernel names the argument types that it is called with. ``compile_all`` compiles them (from the cache on disk when
there is one) and then closes the door: a call with other types is a TypeError and never a compilation, so that no
request ever waits for the compiler.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

from numba import njit, types

Function = TypeVar("Function", bound=Callable[..., Any])
#: The numba types of one call's arguments.
Arguments: TypeAlias = tuple[Any, ...]

_registered: list[tuple[Any, tuple[Arguments, ...]]] = []
_compiling = threading.Lock()


def read_only(element: Any) -> Any:
    """A contiguous vector that is only read: what a received buffer gives. Writable arrays fit as well."""
    return types.Array(element, 1, "C", readonly=True)


def kernel(*signatures: Arguments, brief: bool = False) -> Callable[[Function], Function]:
    """A function of arrays and scalars, run without the GIL. Not callable before ``compile_all`` is done.

    What is divided by must not be 0: nobody looks whether it is, since a loop with that question is no vector loop.

    ``brief``: one of a look that goes through bins or columns, not through rows or cells, and keeps the GIL for its few
    microseconds (some tenths per column). A GIL that is given up is taken by the thread that serves, and to get it back
    may cost both threads more than that.
    """

    def decorate(function: Function) -> Function:
        compiled = _decorated(function, nogil=not brief)
        _registered.append((compiled, signatures))
        return cast("Function", compiled)

    return decorate


def helper(function: Function) -> Function:
    """A part of the kernels of its own module, compiled with each of them. Not to be called from anywhere else: a
    kernel in the cache on disk is made anew when its own file has changed, and no other."""
    return cast("Function", njit(nogil=True, error_model="numpy")(function))


def compile_all() -> None:
    """Compile every kernel of the modules imported so far. Blocks for up to seconds; repeating it costs nothing."""
    with _compiling:
        while _registered:
            compiled, signatures = _registered[-1]
            if hasattr(compiled, "compile"):  # NUMBA_DISABLE_JIT leaves plain functions
                for arguments in signatures:
                    compiled.compile(arguments)
                compiled.disable_compile()
            _registered.pop()


def _decorated(function: Callable[..., Any], *, nogil: bool) -> Any:
    try:
        return njit(nogil=nogil, error_model="numpy", cache=True)(function)
    except RuntimeError:  # no folder on this machine can hold the cache
        return njit(nogil=nogil, error_model="numpy")(function)
