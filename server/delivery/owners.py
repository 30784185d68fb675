"""Names for who holds a lease, by which a process of the same host can tell that the holder is no more.

A lease outlasts what its sink may take, for a training hours. When the gateway that holds it was killed, the one that
comes after it on that host need not wait so long. Of holders elsewhere nothing is known, and their leases end by time.

Containers that share a state folder and the name of a host, but not its processes, take each other for dead. An event
is then sent twice, with the same key; a command is not run twice, as its lock is in the folder.
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
    """``HOST:PID:START:RANDOM``: the start tells this process from a later one with its number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{uuid.uuid4().hex[:8]}"


def is_gone(name: str) -> bool:
    """Whether the process that ``own_name`` named has surely ended: it was of this host and does not run here."""
    host, _, rest = name.partition(":")
    parts = rest.split(":")
    if host != socket.gethostname() or len(parts) != 3 or not (parts[0].isdecimal() and parts[1]):
        return False
    return _started(int(parts[0])) != parts[1]


def _started(pid: int) -> str:
    """When a process was started, in ticks of its system; "" when none of this number runs."""
    try:
        # The name in parentheses may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode("ascii").split()
        return "" if fields[_STATE] in _ENDED else fields[_STARTED]
    except (OSError, IndexError):
        return ""
