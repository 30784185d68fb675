"""Aliases moved for rollouts: by compare and set, and asked again after a crash."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from router.registry.base import CHALLENGER, CHAMPION, PREVIOUS
from router.registry.embedded import EmbeddedRegistry
from server.audit import AuditLog
from server.control.rollouts.aliases import Aliases
from server.store.sqlite import SqliteStore
from tests.support import models

ACTOR = "al"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[EmbeddedRegistry]:
    """Versions 1 to 3 of a model; 1 is champion and 2 challenger."""
    with closing(SqliteStore(tmp_path / "state" / "tidegate.db")) as store:
        made = EmbeddedRegistry(store, tmp_path / "state" / "blobs", AuditLog(store).journal)
        for number in (1, 2, 3):
            models.affine(tmp_path / str(number) / "model.onnx", scale=number)
            made.publish("m", tmp_path / str(number), actor=ACTOR)
        made.set_alias("m", CHAMPION, 1, actor=ACTOR)
        made.set_alias("m", CHALLENGER, 2, actor=ACTOR)
        yield made


def where(registry: EmbeddedRegistry) -> list[int | None]:
    return [registry.alias("m", alias).version for alias in (CHAMPION, PREVIOUS, CHALLENGER)]


def test_a_promotion(registry: EmbeddedRegistry) -> None:
    assert Aliases(registry).move("m", CHAMPION, "1", "2") == ""
    assert where(registry) == [2, 1, None]


@pytest.mark.parametrize("alias", [CHAMPION, "canary"])
def test_a_move_that_was_made_before_the_process_died(registry: EmbeddedRegistry, alias: str) -> None:
    registry.set_alias("m", alias, 1, actor=ACTOR)
    assert Aliases(registry).move("m", alias, "1", "2") == ""
    before = where(registry), registry.alias("m", alias)
    assert Aliases(registry).move("m", alias, "1", "2") == ""
    assert (where(registry), registry.alias("m", alias)) == before


@pytest.mark.parametrize("alias", [CHAMPION, "canary"])
def test_an_alias_that_somebody_else_moved(registry: EmbeddedRegistry, alias: str) -> None:
    registry.set_alias("m", alias, 3, actor=ACTOR)
    before = where(registry), registry.alias("m", alias)
    assert "3" in Aliases(registry).move("m", alias, "1", "2")
    assert (where(registry), registry.alias("m", alias)) == before
