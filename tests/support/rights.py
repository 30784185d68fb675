"""File permissions that hold for the tests too when root runs them: Linux lets root read whatever it wants."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: <linux/capability.h>: _LINUX_CAPABILITY_VERSION_3, CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
_VERSION = 0x20080522
_IGNORES_PERMISSIONS = 1 << 1 | 1 << 2


@contextmanager
def permissions_hold() -> Iterator[None]:
    """What this thread opens in the block, it opens by the permission bits alone. No child is started in it."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; twice, 32 bits each
    _checked(libc.capget(header, sets))
    before = sets[0]
    sets[0] = before & ~_IGNORES_PERMISSIONS
    _checked(libc.capset(header, sets))
    try:
        yield
    finally:
        sets[0] = before
        _checked(libc.capset(header, sets))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
