"""Peers as processes: started on free loopback ports, asked until they answer rightly, ended with their children."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests import machine
from loadtests.crew import Crew, Protocol, Way
from loadtests.lanes import OK, WRONG
from loadtests.models import MODEL
from loadtests.peers.catalog import Array, Peer
from loadtests.peers.environments import Unavailable
from loadtests.servers import ROOT, Target

_START_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 20.0
_ASK_AGAIN_S: Final = 0.25
_LOG_TAIL: Final = 1500


@dataclass(slots=True, frozen=True)
class Running:
    target: Target
    process: subprocess.Popen[bytes]
    log: Path

    def failed(self, why: str) -> Unavailable:
        """With the end of what it wrote."""
        said = self.log.read_text(errors="replace")[-_LOG_TAIL:].strip()
        return Unavailable(f"{self.target.label} {why}" + (f"; it wrote:\n{said}" if said else ""))


@contextmanager
def running(peer: Peer, python: Path, model: Path, row: Array, folder: Path, cores: set[int]) -> Iterator[Running]:
    """A peer that serves ``model``, perhaps not ready yet. What it writes goes below ``folder``."""
    http, grpc = _free_port(), _free_port()
    home, log = folder / peer.name, folder / f"{peer.name}.log"
    home.mkdir()
    command = [str(python), "-m", f"loadtests.peers.servers.{peer.name}_server"]
    environment = _environment(python, home, PEER_MODEL=str(model), PEER_HTTP=str(http), PEER_GRPC=str(grpc))
    with log.open("wb") as file, machine.pinned(cores):
        process = subprocess.Popen(
            command, env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        grpc_address = f"127.0.0.1:{grpc}" if "grpc" in peer.protocols else ""
        target = Target(peer.name, f"127.0.0.1:{http}", grpc_address, pid=process.pid, requests=peer.requests(row))
        yield Running(target, process, log)
    finally:
        machine.end_tree(process, _STOP_SECONDS)


def _environment(python: Path, home: Path, **own: str) -> dict[str, str]:
    """One thread to each library, no telemetry, everything that is written below ``home``."""
    return {
        **os.environ,
        **own,
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "DO_NOT_TRACK": "1",
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(home),
        "PYTRITON_HOME": str(home),
    }


def _free_port() -> int:
    """One that was free a moment ago: the peers cannot say which they took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def until_right(peer: Peer, one: Running, row: Array, wanted: Array) -> None:
    """Wait until the right answer comes in every protocol.

    Raises Unavailable when a wrong one comes, none in time, or when the process has ended.
    """
    end = time.monotonic() + _START_SECONDS
    for protocol in peer.protocols:
        outcome = ""
        while outcome != OK:
            if one.process.poll() is not None:
                raise one.failed(f"ended with {one.process.returncode}")
            if outcome == WRONG or time.monotonic() > end:
                raise one.failed(f"gave no right answer by {protocol}: {outcome}")
            await asyncio.sleep(_ASK_AGAIN_S if outcome else 0)
            outcome = await _ask_once(peer, one.target, protocol, row, wanted)


async def _ask_once(peer: Peer, target: Target, protocol: Protocol, row: Array, wanted: Array) -> str:
    """How one short window of single requests ended: the worst of its outcomes."""
    crew = Crew(target, MODEL, Way(protocol, 1), {"x": row}, peer.check(protocol, wanted))
    try:
        sample = await crew.measure(0.02)
    except OSError as error:
        return str(error)
    finally:
        await crew.close()
    return next((outcome for outcome in sample.outcomes if outcome != OK), OK if sample.outcomes else "no answer")
