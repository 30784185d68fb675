"""Promotions written back: what is done, and what is left alone because somebody else was there."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from router.registry.base import CHALLENGER, CHAMPION
from router.registry.origin import Unreachable
from server.audit import AuditLog
from server.mlflow.client import MlflowOrigin
from server.mlflow.options import MlflowOptions
from server.mlflow.promotion import MlflowAliases
from tests.support.mlflow_server import Asked, Mlflow, Reply, running
from tests.support.pinned_store import pinned_store


class Place:
    def __init__(self, mlflow: Mlflow, root: Path) -> None:
        self.mlflow, self.lock = mlflow, root / "mlflow" / "writer.lock"
        self.store = pinned_store(root)
        self.audit = AuditLog(self.store)

    def aliases(self, *, promotes: bool = True) -> MlflowAliases:
        origin = MlflowOrigin(MlflowOptions(self.mlflow.url, timeout_s=5))
        return MlflowAliases(origin, self.store, self.audit.journal, self.lock, promotes=promotes)

    def acts(self) -> list[str]:
        return [row.event.action for row in self.audit.tail(100)]

    def now(self) -> dict[str, int]:
        return dict(self.mlflow.models["m"].aliases)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with running() as mlflow:
        for _ in range(3):
            mlflow.add("m", {"model.onnx": b""})
        mlflow.point("m", CHAMPION, 1)
        mlflow.point("m", CHALLENGER, 2)
        found = Place(mlflow, tmp_path)
        yield found
        found.store.close()


def before_write(number: int, act: Callable[[], object]) -> Callable[[Asked], Reply | None]:
    """Do something right before the write with this number (from 1) is carried out."""
    writes = 0

    def trouble(asked: Asked) -> Reply | None:
        nonlocal writes
        if asked.path.endswith("/alias"):
            writes += 1
            if writes == number:
                act()
        return None

    return trouble


def test_the_champion_is_promoted(place: Place) -> None:
    assert place.aliases().move("m", CHAMPION, "1", "2") == ""
    assert place.now() == {"champion": 2, "previous": 1}
    assert place.acts() == ["registry.promote"]


def test_a_challenger_that_is_another_stays(place: Place) -> None:
    assert place.aliases().move("m", CHAMPION, "1", "3") == ""
    assert place.now() == {"champion": 3, "challenger": 2, "previous": 1}


def test_another_alias_is_moved_alone(place: Place) -> None:
    assert place.aliases().move("m", CHALLENGER, "2", "3") == ""
    assert place.now() == {"champion": 1, "challenger": 3}
    assert place.acts() == ["registry.alias"]


def test_whoever_moved_it_before_is_right(place: Place) -> None:
    place.mlflow.point("m", CHAMPION, 3)
    refused = place.aliases().move("m", CHAMPION, "1", "2")
    assert refused == "champion of m was expected to be 1 and is 3: somebody moved it in MLflow"
    assert place.now() == {"champion": 3, "challenger": 2}
    assert place.mlflow.count("/alias") == 0
    assert place.acts() == ["registry.override"]


def test_whoever_moved_it_meanwhile_is_right(place: Place) -> None:
    # While the alias previous is written, which comes first.
    place.mlflow.trouble = before_write(1, lambda: place.mlflow.point("m", CHAMPION, 3))
    assert "is 3: somebody moved it" in place.aliases().move("m", CHAMPION, "1", "2")
    assert place.now()["champion"] == 3


def test_whoever_moved_it_afterwards_is_right(place: Place) -> None:
    # While the challenger is dropped, which comes last.
    place.mlflow.trouble = before_write(3, lambda: place.mlflow.point("m", CHAMPION, 3))
    assert "is 3: somebody moved it" in place.aliases().move("m", CHAMPION, "1", "2")
    assert place.now()["champion"] == 3


def test_a_write_whose_answer_was_lost_counts(place: Place) -> None:
    def lose(asked: Asked) -> Reply | None:
        if asked.path.endswith("/alias") and b"champion" in asked.body:
            place.mlflow.point("m", CHAMPION, 2)
            return 0, b""
        return None

    place.mlflow.trouble = lose
    assert place.aliases().move("m", CHAMPION, "1", "2") == ""
    assert place.now() == {"champion": 2, "previous": 1}


def test_what_was_begun_is_brought_to_its_end(place: Place) -> None:
    place.mlflow.point("m", CHAMPION, 2)
    assert place.aliases().move("m", CHAMPION, "1", "2") == ""
    assert place.now() == {"champion": 2, "previous": 1}


def test_an_outage_is_no_refusal_and_what_it_broke_off_is_brought_to_its_end(place: Place) -> None:
    assert place.aliases().move("m", CHAMPION, "1", "2") == ""
    promoted = {"champion": 2, "previous": 1}
    answers: list[Callable[[Asked], Reply | None]] = [
        lambda _: (503, b""),
        lambda asked: (503, b"") if asked.path.endswith("/alias") else None,
    ]
    for answer in answers:
        place.mlflow.trouble = answer
        with pytest.raises(Unreachable, match="503"):
            place.aliases().move("m", CHAMPION, "2", "1")
        assert place.now() == promoted
    # Broken off between the two writes, the version that traffic is at has an alias: a process that starts loads it.
    for name, left in (("champion", promoted), ("previous", {"champion": 1, "previous": 1})):
        wanted = name.encode()
        place.mlflow.trouble = lambda asked, wanted=wanted: (503, b"") if wanted in asked.body else None  # type: ignore[misc]
        with pytest.raises(Unreachable, match="503"):
            place.aliases().move("m", CHAMPION, "2", "1")
        assert place.now() == left
    assert place.acts() == ["registry.promote"]
    place.mlflow.trouble = lambda _: None
    assert place.aliases().move("m", CHAMPION, "2", "1") == ""
    assert place.now() == {"champion": 1, "previous": 2}
    assert place.acts() == ["registry.promote"] * 2


def test_who_does_not_write_does_not(place: Place) -> None:
    assert "does not write" in place.aliases(promotes=False).move("m", CHAMPION, "1", "2")
    assert place.mlflow.asked == []


def test_one_process_writes_at_a_time(place: Place) -> None:
    place.lock.parent.mkdir()
    with place.lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process" in place.aliases().move("m", CHAMPION, "1", "2")
    assert place.aliases().move("m", CHAMPION, "1", "2") == ""
