"""Port numbers for programs that take nothing else: ones that nobody is given meanwhile.

A port that was free a moment ago may be somebody else's by the time a program binds it: systems give the ports of one
range (from 32,768 on, on Linux) to whoever asks for any, listeners and clients. These are from below that range, and
each is one caller's only.
"""

from __future__ import annotations

import socket
from typing import Final

_PORTS: Final = range(15_000, 32_000)

#: Names that are taken as long as this process lives, one for each port that was handed out: all processes see them.
_taken: list[socket.socket] = []


def reserved_port() -> int:
    """A loopback port that nobody listens on; no other test process is given it while this one lives."""
    for port in _PORTS:
        name = socket.socket(socket.AF_UNIX)
        try:
            name.bind(f"\0tidegate-tests-port-{port}")
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            name.close()
            continue
        _taken.append(name)
        return port
    raise RuntimeError(f"none of {_PORTS} is free")
