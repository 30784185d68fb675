"""Names for who holds a lease, by which a process of the same host can tell that the holder is no more.

A lease outlasts what its sink may take, for a training hours. When the gateway that holds it was killed, the one that
comes after it on that host need not wait so long. Of holders elsewhere nothing is known, and their leases end by time:
elsewhere is another host, or another namespace of processes, as two containers of one host name have.
"""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path

#: Of ``/proc/PID/stat`` behind the name of the process: its state, and when it was started (field 22).
_STATE, _STARTED = 0, 19
_ENDED = frozenset({"Z", "X"})


def own_name() -> str:
    """``PLACE:PID:START:RANDOM``: the start tells this process from a later one with its number."""
    try:
        started = _started(os.getpid())
    except OSError:
        started = ""
    return f"{_place()}:{os.getpid()}:{started}:{uuid.uuid4().hex[:8]}"


def is_gone(name: str) -> bool:
    """Whether the process that ``own_name`` named has surely ended: it was of this place and does not run here."""
    place, _, rest = name.partition(":")
    parts = rest.split(":")
    if place != _place() or len(parts) != 3 or not (parts[0].isdecimal() and parts[1]):
        return False
    try:
        return _started(int(parts[0])) != parts[1]
    except OSError:  # no descriptor is left, or it may not be read: that says nothing of the process
        return False


def _place() -> str:
    """The host and the namespace of its processes, without which a number names nobody."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}/{namespace}"


def _started(pid: int) -> str:
    """When a process was started, in ticks of its system; "" when none of this number runs. Raises OSError."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[_STATE] in _ENDED else fields[_STARTED]
