"""server.control.registry: the plans of a registry that cannot be read for a while."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import structlog

from server.control.registry import RegistryPlans, RegistrySource
from server.runtime.base import ModelOptions
from server.state import open_state
from tests.support import models


def test_a_registry_that_cannot_be_read_keeps_its_plans_and_is_logged_once(tmp_path: Path) -> None:
    state = open_state(tmp_path / "state")
    try:
        for name in ("first", "second"):
            path = models.affine(tmp_path / f"{name}.onnx", 1.0, 0.0, width=1)
            state.registry.publish(name, {"model.onnx": path}, alias="champion", actor="test")
        source = RegistrySource(RegistryPlans(state.registry, tmp_path / "state", lambda *_: None), ModelOptions())
        plans = source.scan()
        assert sorted(plans) == ["first", "second"]
        database = tmp_path / "state" / "tidegate.db"
        with structlog.testing.capture_logs() as logs:
            rename(database, "registry_state", "elsewhere")
            assert [source.scan() for _ in range(3)] == [plans] * 3
            rename(database, "elsewhere", "registry_state")
            assert [source.scan() for _ in range(2)] == [plans] * 2
            rename(database, "registry_state", "elsewhere")
            assert source.scan() == plans
        told = [line["event"] for line in logs]
        assert told == ["registry_unreadable", "registry_readable_again", "registry_unreadable"]
        assert logs[1]["failed"] == logs[0]["error"]
    finally:
        state.close()


def rename(database: Path, table: str, name: str) -> None:
    connection = sqlite3.connect(database)
    connection.execute(f"ALTER TABLE {table} RENAME TO {name}")
    connection.close()
