"""The state folder may lie inside the folder of a model."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.cli import cli
from tests.support.routed import Place


def test_another_process_leaves_the_log_of_a_live_server_alone(tmp_path: Path) -> None:
    """Were the database opened and closed by whoever looks at the model's folder, SQLite's locks on it would be gone,
    and the next process to read it would delete the write-ahead log under the server."""
    place = Place(tmp_path)
    place.write("", versions="1")
    with place.serve() as server:
        log = place.state / "tidegate.db-wal"
        inode = log.stat().st_ino
        for versions in ("12", "123"):
            place.apply(server, place.text("", versions=versions))
            rows = json.loads(cli("audit", "tail", "--state-dir", str(place.state), "--json").stdout)
            assert "config.applied" in [row["action"] for row in rows]
            assert log.exists()
            assert log.stat().st_ino == inode
