"""MLServer with its adaptive batching. ``parallel_workers`` 0: the model runs in the server's process, faster here."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from mlserver.cli import main as mlserver  # type: ignore[import-not-found]

from loadtests.peers.servers.served import DELAY_MS, HOST, MOST_ROWS, NAME, grpc_port, http_port


def main() -> None:
    settings = {
        "host": HOST,
        "http_port": http_port(),
        "grpc_port": grpc_port(),
        "metrics_endpoint": None,
        "debug": False,
        "parallel_workers": 0,
    }
    model = {
        "name": NAME,
        "implementation": "loadtests.peers.servers.mlserver_model.Rows",
        "max_batch_size": MOST_ROWS,
        "max_batch_time": DELAY_MS / 1000,
    }
    with tempfile.TemporaryDirectory() as name:
        for file, content in (("settings.json", settings), ("model-settings.json", model)):
            (Path(name) / file).write_text(json.dumps(content))
        sys.argv[1:] = ["start", name]
        mlserver()


if __name__ == "__main__":
    main()
