"""The demo's server as a part of the show: started, used, then drained and ended, or left up for the reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.demo.process import Addresses, ServerFailed, ServerProcess, kept_server, remember
from server.demo.report import Reporter


@dataclass(frozen=True, slots=True)
class Server:
    """What is to be served, where its state and its log lie, and whether it stays up at the end."""

    target: Path
    state_dir: Path
    log: Path
    #: Where a server that stays up is written down; None stops it.
    kept_file: Path | None


@contextmanager
def serving(server: Server, reporter: Reporter) -> Iterator[Addresses]:
    """A server that is ready. It is killed when the block fails. Raises ServerFailed."""
    process = ServerProcess(server.target, server.state_dir, server.log)
    try:
        with reporter.step("tidegate serve") as step:
            addresses = process.wait_ready()
            step.detail = f"ready: HTTP {addresses.http}, gRPC {addresses.grpc}, metrics {addresses.metrics}"
        yield addresses
        if server.kept_file is not None:
            remember(server.kept_file, process, addresses)
            process.leave_up()
            _tell_kept(process, addresses, reporter)
            return
        with reporter.step("SIGTERM: drained and ended"):
            process.stop()
    except BaseException:
        process.kill()
        raise


def _tell_kept(process: ServerProcess, addresses: Addresses, reporter: Reporter) -> None:
    reporter.line(
        f"\nThe server stays up (pid {process.pid}; log {process.log}): HTTP {addresses.http}, "
        f"gRPC {addresses.grpc}, metrics {addresses.metrics}, admin {addresses.admin}\n"
        f"  curl http://{addresses.http}/v2/models/flights\n"
        f"  kill {process.pid}"
    )


def refuse_beside_a_kept_server(kept_file: Path) -> None:
    """Raises ServerFailed while a server that an earlier demo left up still answers."""
    kept = kept_server(kept_file)
    if kept is not None:
        raise ServerFailed(
            f"the server that an earlier demo left up (pid {kept.pid}, http://{kept.http}) uses {kept_file.parent}: "
            f"end it with 'kill {kept.pid}', or choose another --state-dir"
        )
