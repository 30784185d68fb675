"""One floor as a process: ``python -m loadtests.floors NAME FOLDER``. Ends with SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvicorn
import uvloop

from loadtests.floors import bare, grpc_echo, native_echo, ngh2_echo, usual_grpc, usual_http

#: Keeps its servers alive, and gives their addresses.
Start = Callable[[Path], Awaitable[tuple[object, dict[str, str]]]]


def say_ready(addresses: dict[str, str]) -> None:
    print(json.dumps(addresses), flush=True)


async def start_grpc_echo(folder: Path) -> tuple[object, dict[str, str]]:
    server, address = await grpc_echo.start(folder)
    return server, {"grpc": address}


async def start_usual_grpc(folder: Path) -> tuple[object, dict[str, str]]:
    server, address = await usual_grpc.start(folder)
    return server, {"grpc": address}


class _Server(uvicorn.Server):
    """Says where it listens."""

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        host, port = self.servers[0].sockets[0].getsockname()
        say_ready({"http": f"{host}:{port}"})


async def serve_usual_http(folder: Path) -> None:
    """Under uvicorn's own signal handling."""
    config = uvicorn.Config(usual_http.app(folder), port=0, loop="none", log_level="error", access_log=False)
    await _Server(config).serve()


async def serve(start: Start, folder: Path) -> None:
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    _servers, addresses = await start(folder)
    say_ready(addresses)
    await over.wait()


#: Name -> how it starts, and whether it runs on uvloop. The usual gRPC stack and its echo run on asyncio, as in
#: grpcio's documentation; uvicorn takes uvloop by itself when it is there.
FLOORS: dict[str, tuple[Start, bool]] = {
    "ngh2": (ngh2_echo.start, True),
    "bare": (bare.start, True),
    "native-echo": (native_echo.start, True),
    "grpc-echo": (start_grpc_echo, False),
    "usual-grpc": (start_usual_grpc, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one floor until SIGTERM.")
    parser.add_argument("name", choices=[*FLOORS, "usual-http"])
    parser.add_argument("folder", type=Path, help="folder with .onnx files")
    options = parser.parse_args()
    if options.name == "usual-http":
        uvloop.run(serve_usual_http(options.folder))
        return
    start, fast = FLOORS[options.name]
    (uvloop.run if fast else asyncio.run)(serve(start, options.folder))


if __name__ == "__main__":
    main()
