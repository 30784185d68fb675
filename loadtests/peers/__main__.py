"""``python -m loadtests.peers``: Tidegate beside other model servers, each installed into an environment of its own.

python -m loadtests.peers [--quick] [--peer NAME]... [--rounds N] [--seconds S] [--limit S] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from loadtests import h2load
from loadtests.peers import table
from loadtests.peers.catalog import PEERS, chosen
from loadtests.peers.environments import FOLDER, Unavailable, python_of
from loadtests.peers.paired import Plan, measure, rows_of, say
from loadtests.results import check_folder
from loadtests.servers import ROOT
from server.errors import TidegateError

_LIMIT_S = 560.0


def main() -> int:
    options = _options()
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The generator's gRPC library would speak of every process that is started beside it.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    rounds = (2 if options.quick else 5) if options.rounds is None else options.rounds
    try:
        peers = chosen(options.peer)
        if options.install:
            return _install([peer.name for peer in peers], options.environments)
        check_folder(options.output)
        plan = Plan(peers, rows_of(h2load.path()), rounds, options.seconds, options.limit, options.environments)
        with tempfile.TemporaryDirectory() as folder:
            result = uvloop.run(measure(plan, Path(folder)))
    except (TidegateError, OSError, RuntimeError) as error:
        print(f"peers: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("peers: ended early; every server is stopped", file=sys.stderr)
        return 130
    path = options.output / f"peers-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    result.save(path)
    print(f"\n{table.text(result, plan.rows)}\n\nResult: {path}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="loadtests.peers", description="Tidegate beside other model servers.")
    parser.add_argument("--quick", action="store_true", help="2 rounds instead of 5: wide intervals")
    parser.add_argument(
        "--peer", action="append", default=[], help=f"only this one: {', '.join(p.name for p in PEERS)}"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="length of a cell in a round (h2load: whole seconds)"
    )
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds after which no further round begins")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="where the peers are installed")
    parser.add_argument("--install", action="store_true", help="install them and measure nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "loadtests" / "results", help="folder for the result")
    options = parser.parse_args()
    if (options.rounds is not None and options.rounds < 1) or not 0.05 <= options.seconds <= 600 or options.limit <= 0:
        parser.error("rounds and limit must be positive, and seconds from 0.05 to 600")
    return options


def _install(names: list[str], folder: Path) -> int:
    missing = 0
    for name in names:
        try:
            say(f"{name}: {python_of(name, folder)}")
        except Unavailable as error:
            say(f"{name}: {error}")
            missing = 2
    return missing


if __name__ == "__main__":
    sys.exit(main())
