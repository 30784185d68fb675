"""A foreign registry, pinned: the contract, and what only pins do. The origin is a real one in memory."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from router.registry.base import NotInRegistry
from router.registry.manifest import DATA, MODEL, Description, Signature, TensorEntry
from router.registry.origin import BytesChanged, Intent, Offer, OfferedFile, Unreachable, Unusable
from router.registry.pinned import PinnedRegistry, Settled
from router.registry.pins import PINS_1
from router.registry.taking import Ends, Limits
from tests.contracts.registry_contract import Case, Files, RegistryContract, model_files

A, B = model_files(1), model_files(2)


class Memory:
    """An origin in memory. ``silent``: it cannot be reached; ``patchy``: its files cannot."""

    name = "memory:"

    def __init__(self) -> None:
        self.files: dict[str, dict[int, Files]] = {}
        self.pointers: dict[str, dict[str, int]] = {}
        self.identity = ""
        self.signature: Signature | None = None
        self.triggers: Mapping[str, int] = {}
        self.lie: Callable[[str, int], Offer] | None = None
        self.silent = self.patchy = False
        self.reads = 0
        self.before_read: Callable[[], object] = lambda: None

    def add(self, model: str, files: Files) -> int:
        versions = self.files.setdefault(model, {})
        number = max(versions, default=0) + 1
        versions[number] = files
        return number

    def point(self, model: str, **aliases: int) -> None:
        self.pointers[model] = {**self.pointers.get(model, {}), **aliases}

    def intents(self) -> Mapping[str, Intent]:
        self._answer()
        return {m: Intent(dict(self.pointers.get(m, {})), max(versions)) for m, versions in self.files.items()}

    def versions(self, model: str) -> tuple[int, ...]:
        self._answer()
        return tuple(sorted(self.files[model]))

    def triggered(self, model: str) -> Mapping[str, int]:
        self._answer()
        return self.triggers

    def offer(self, model: str, version: int) -> Offer:
        return self.told(model, version) if self.lie is None else self.lie(model, version)

    def told(self, model: str, version: int) -> Offer:
        self._answer()
        if version not in self.files[model]:
            raise NotInRegistry(f"model {model!r} has no version {version}")
        files = self.files[model][version].items()
        roles = {"model.onnx": MODEL}
        offered = [OfferedFile(p, f"{model}/{version}/{p}", len(c), roles.get(p, DATA)) for p, c in files]
        return Offer(tuple(offered), Description(signature=self.signature), self.identity)

    def read(self, file: OfferedFile, target: int, limit: int) -> None:
        self._answer()
        if self.patchy:
            raise Unreachable("the files are away")
        self.reads += 1
        self.before_read()
        model, version, path = file.location.split("/", 2)
        content = self.files[model][int(version)][path]
        if len(content) > limit:
            raise Unusable("too many bytes")
        os.write(target, content)

    def _answer(self) -> None:
        if self.silent:
            raise Unreachable("nobody answers")


class Rows:
    """A database of one connection with the tables, and the journal as a list."""

    def __init__(self, path: Path | str = ":memory:") -> None:
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("PRAGMA foreign_keys = ON")
        self.told: list[tuple[str, str, Mapping[str, object]]] = []
        for statement in PINS_1:
            self.connection.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
        except BaseException:
            self.connection.execute("ROLLBACK")
            raise
        self.connection.execute("COMMIT")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        yield self.connection

    def journal(
        self, connection: sqlite3.Connection, action: str, subject: str, detail: Mapping[str, object], actor: str
    ) -> None:
        assert connection.in_transaction
        self.told.append((action, subject, detail))

    def acts(self, action: str) -> list[str]:
        return [subject for act, subject, _ in self.told if act == action]


class Place:
    """An origin, rows, a folder and a clock; ``registry`` may be opened again, as by a process that starts anew."""

    def __init__(self, root: Path, limits: Limits | None = None) -> None:
        self.root, self.limits = root / "pinned", limits
        self.origin, self.rows, self.now = Memory(), Rows(), 1000.0
        self.registry = self.open()

    def open(self, ends: Ends | None = None) -> PinnedRegistry:
        self.registry = PinnedRegistry(
            self.origin, self.rows, self.root, self.rows.journal, limits=self.limits, ends=ends, clock=lambda: self.now
        )
        return self.registry

    def look(self) -> list[Settled]:
        self.registry.poll()
        return list(self.registry.settle())

    def bytes_of(self, version: int) -> bytes:
        return (self.registry.fetch("m", version).folder / "model.onnx").read_bytes()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.rows.connection.close()


@pytest.fixture
def serving(place: Place) -> Place:
    """Version 1 is champion and followed; version 2 is there."""
    place.origin.add("m", A)
    place.origin.add("m", B)
    place.origin.point("m", champion=1)
    assert place.look() == [Settled("m", 1)]
    return place


class TestContract(RegistryContract):
    def case(self, folder: Path) -> Case:
        place = Place(folder)

        def add(model: str, files: Files) -> int:
            version = place.origin.add(model, files)
            place.look()
            return version

        return Case(place.registry, add, place.rows.connection.close)


def test_an_alias_is_followed_once_its_bytes_are_here(place: Place) -> None:
    place.origin.add("m", A)
    place.origin.point("m", champion=1)
    place.registry.poll()
    assert dict(place.registry.aliases("m")) == {}
    assert dict(place.registry.intended("m")) == {"champion": 1}
    generation = place.registry.generation()
    assert list(place.registry.settle()) == [Settled("m", 1)]
    assert dict(place.registry.aliases("m")) == {"champion": 1}
    assert place.registry.generation() > generation
    assert place.registry.resolve("m", "@champion").version == 1
    assert place.rows.acts("registry.pin") == ["m:1"]
    assert place.rows.acts("registry.follow") == ["m@champion"]
    assert list(place.registry.settle()) == []


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        ((("x",), ("y",)), ("x", "y")),
        ((("x", "z"), ("y",)), None),
        ((("x",), ("y", "z")), None),
        (((), ("y",)), None),
        (None, None),
    ],
)
def test_a_tensor_alone_is_named_by_the_graph(
    place: Place, ends: tuple[tuple[str, ...], tuple[str, ...]] | None, names: tuple[str, str] | None
) -> None:
    place.origin.signature = Signature((TensorEntry("", "FP32", (-1, 4)),), (TensorEntry("", "INT64", (-1,)),))
    read: list[bytes] = []

    def read_ends(graph: Path) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        read.append(graph.read_bytes())
        return ends

    place.origin.add("m", A)
    place.origin.point("m", champion=1)
    place.open(read_ends)
    assert place.look() == [Settled("m", 1)]
    manifest = place.registry.version("m", 1).manifest
    assert manifest is not None
    wanted = names and Signature((TensorEntry(names[0], "FP32", (-1, 4)),), (TensorEntry(names[1], "INT64", (-1,)),))
    assert manifest.description.signature == wanted
    assert read == [A["model.onnx"]]


def test_aliases_that_are_not_served_are_followed_without_their_bytes(place: Place) -> None:
    place.origin.add("m", A)
    place.origin.point("m", archived=1)
    assert place.look() == []
    assert dict(place.registry.aliases("m")) == {"archived": 1}
    assert place.origin.reads == 0


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({**B, "model.onnx": b"other"}, "model.onnx has 5 bytes and had 6"),
        ({**B, "model.onnx": b"graph!"}, "model.onnx has SHA-256"),
        ({**B, "extra.bin": b""}, "extra.bin is new"),
        ({"model.onnx": B["model.onnx"]}, "weights.bin is gone"),
    ],
)
def test_bytes_that_changed_are_refused_and_the_old_version_stays(serving: Place, files: Files, reason: str) -> None:
    serving.origin.point("m", challenger=2)
    serving.look()
    serving.origin.files["m"][2] = files
    serving.origin.point("m", champion=2)
    (settled,) = serving.look()
    assert isinstance(settled.error, BytesChanged)
    assert reason in str(settled.error)
    # The alias that it had stays: what it names are the bytes that were taken.
    assert dict(serving.registry.aliases("m")) == {"challenger": 2, "champion": 1}
    assert serving.bytes_of(2) == B["model.onnx"]
    assert reason in serving.registry.refused("m")[2]
    assert serving.rows.acts("registry.bytes_changed") == ["m:2"]


def test_changed_bytes_are_told_once_and_over_restarts_until_they_are_back(serving: Place) -> None:
    serving.origin.point("m", challenger=2)
    serving.look()
    serving.origin.files["m"][2] = A
    serving.origin.point("m", champion=2)
    serving.look()
    serving.now += 40
    assert len(serving.look()) == 1
    serving.open()
    assert 2 in serving.registry.refused("m")
    assert dict(serving.registry.aliases("m")) == {"challenger": 2, "champion": 1}
    serving.look()
    assert dict(serving.registry.aliases("m")) == {"challenger": 2, "champion": 1}
    assert serving.rows.acts("registry.bytes_changed") == ["m:2"]
    serving.origin.files["m"][2] = B
    serving.now += 4000
    assert serving.look() == [Settled("m", 2)]
    assert dict(serving.registry.aliases("m")) == {"challenger": 2, "champion": 2}
    assert serving.registry.refused("m") == {}
    assert serving.rows.acts("registry.bytes_restored") == ["m:2"]


def test_another_description_of_the_same_files_is_a_change(serving: Place) -> None:
    serving.origin.identity = "other"
    serving.origin.point("m", shadow=1)
    (settled,) = serving.look()
    assert "its description is another" in str(settled.error)
    assert dict(serving.registry.aliases("m")) == {"champion": 1}


def test_what_serves_is_compared_now_and_then_and_stays_when_it_changed(serving: Place) -> None:
    serving.origin.files["m"][1] = B
    assert serving.look() == []
    serving.now += 86_401
    (settled,) = serving.look()
    assert isinstance(settled.error, BytesChanged)
    assert dict(serving.registry.aliases("m")) == {"champion": 1}
    assert serving.bytes_of(1) == A["model.onnx"]


def test_an_outage_takes_nothing_from_service(serving: Place) -> None:
    serving.origin.silent = True
    with pytest.raises(Unreachable):
        serving.registry.poll()
    registry = serving.open()
    assert registry.models() == ("m",)
    assert dict(registry.aliases("m")) == {"champion": 1}
    assert registry.version("m", 1).manifest is not None
    assert [found.version for found in registry.versions("m")] == [1]
    assert serving.bytes_of(1) == A["model.onnx"]
    with pytest.raises(Unreachable):
        registry.poll()
    assert (registry.standing().error, registry.standing().reachable) == ("nobody answers", False)
    serving.origin.silent = False
    serving.look()
    assert registry.standing().reachable


def test_pinned_bytes_serve_while_the_files_cannot_be_had(serving: Place) -> None:
    serving.origin.point("m", challenger=2)
    serving.look()
    serving.origin.patchy = True
    serving.origin.point("m", champion=2)
    assert serving.look() == [Settled("m", 2)]
    assert dict(serving.registry.aliases("m"))["champion"] == 2


def test_a_version_that_cannot_be_had_waits_and_moving_the_alias_tries_at_once(serving: Place) -> None:
    serving.origin.patchy = True
    serving.origin.point("m", champion=2)
    (settled,) = serving.look()
    assert isinstance(settled.error, Unreachable)
    assert dict(serving.registry.aliases("m")) == {"champion": 1}
    assert serving.look() == []  # it waits
    serving.origin.patchy = False
    serving.origin.point("m", challenger=2)
    assert serving.look() == [Settled("m", 2)]
    assert dict(serving.registry.aliases("m")) == {"challenger": 2, "champion": 2}
    assert serving.rows.acts("registry.refused") == []


def test_what_is_lost_here_is_taken_again_only_as_it_was(serving: Place) -> None:
    shutil.rmtree(serving.root)
    assert serving.bytes_of(1) == A["model.onnx"]
    shutil.rmtree(serving.root)
    serving.origin.files["m"][1] = B
    with pytest.raises(BytesChanged):
        serving.registry.fetch("m", 1)


def test_a_pin_that_is_forgotten_lets_other_bytes_in(serving: Place) -> None:
    serving.origin.files["m"][1] = B
    serving.registry.forget("m", 1, actor="olga")
    with pytest.raises(NotInRegistry):
        serving.registry.forget("m", 1, actor="olga")
    assert serving.look() == [Settled("m", 1)]
    assert serving.bytes_of(1) == B["model.onnx"]
    assert serving.rows.acts("registry.forget") == ["m:1"]


def test_a_model_that_went_goes(serving: Place) -> None:
    cursor = serving.registry.generation()
    del serving.origin.files["m"]
    serving.look()
    assert serving.registry.models() == ()
    assert serving.registry.changes(cursor).models == {"m"}
    assert serving.open().models() == ()


@pytest.mark.parametrize("path", ["../x", "/x", "a/../x", ".hidden", "a\\b", "a//b", "x\0"])
def test_paths_that_lead_elsewhere_are_refused(place: Place, path: str) -> None:
    place.origin.add("m", {"model.onnx": b"", path: b"x"})
    place.origin.point("m", champion=1)
    (settled,) = place.look()
    assert isinstance(settled.error, Unusable)
    assert "file path" in str(settled.error)
    assert place.origin.reads == 0
    assert place.rows.acts("registry.refused") == ["m:1"]


def test_a_file_that_comes_with_another_size_than_listed_is_refused(place: Place) -> None:
    place.origin.add("m", A)
    place.origin.point("m", champion=1)
    listed = place.origin.told

    def longer(model: str, version: int) -> Offer:
        offer = listed(model, version)
        return replace(offer, files=tuple(replace(file, size=(file.size or 0) + 1) for file in offer.files))

    place.origin.lie = longer
    (settled,) = place.look()
    assert isinstance(settled.error, Unusable)
    assert "was listed with 7 bytes and came with 6" in str(settled.error)
    assert place.rows.acts("registry.refused") == ["m:1"]
    assert dict(place.registry.aliases("m")) == {}
    place.origin.lie = None
    place.now += 31
    assert place.look() == [Settled("m", 1)]


def test_sizes_are_limited(tmp_path: Path) -> None:
    place = Place(tmp_path, Limits(file_bytes=2000, version_bytes=2500))
    place.origin.add("big", {"model.onnx": bytes(2001)})
    place.origin.add("many", {"model.onnx": bytes(2000), "weights.bin": bytes(501)})
    for model in ("big", "many"):
        place.origin.point(model, champion=1)
    reasons = [str(settled.error) for settled in place.look()]
    assert reasons == [
        "model.onnx has 2001 bytes; at most 2000 are taken",
        "the version has 2501 bytes; at most 2500 are taken",
    ]
    place.rows.connection.close()


def test_bytes_that_nobody_names_are_deleted_and_come_back(serving: Place) -> None:
    serving.origin.point("m", challenger=2)
    serving.look()
    serving.bytes_of(2)
    serving.origin.point("m", challenger=1)
    serving.look()
    registry = serving.open()
    assert registry.prune(3600) == 0
    for path in serving.root.rglob("*"):
        os.utime(path, (0, 0))
    assert registry.prune(3600) == len(B)
    assert len(list((serving.root / "models").glob("m/*"))) == 0
    assert serving.bytes_of(1) == A["model.onnx"]
    assert serving.bytes_of(2) == B["model.onnx"]


def test_triggers_are_told_by_polls_while_somebody_asks(serving: Place) -> None:
    serving.origin.triggers = {"t-1": 2}
    serving.look()
    assert serving.registry.triggered("m") == {}
    serving.look()
    assert serving.registry.triggered("m") == {"t-1": 2}
    serving.origin.triggers = {"t-1": 2, "t-2": 3}  # a tag, set on a version that nothing else tells of
    serving.look()
    assert serving.registry.triggered("m") == {"t-1": 2, "t-2": 3}
    serving.origin.silent = True
    with pytest.raises(Unreachable):
        serving.look()
    assert serving.registry.triggered("m") == {"t-1": 2, "t-2": 3}
    serving.origin.silent = False
    serving.now += 61
    serving.look()
    assert serving.registry.triggered("m") == {}
    with pytest.raises(NotInRegistry):
        serving.registry.triggered("nobody")


def test_the_rows_of_a_pin_cannot_be_changed(serving: Place) -> None:
    for statement in (
        "UPDATE registry_pin SET digest = digest",
        "INSERT OR REPLACE INTO registry_pin SELECT * FROM registry_pin",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            serving.rows.connection.execute(statement)


@pytest.mark.parametrize(("second", "error"), [(A, None), (B, BytesChanged)])
def test_of_two_processes_the_first_pins(place: Place, second: Files, error: type[Exception] | None) -> None:
    place.origin.add("m", A)
    place.origin.point("m", champion=1)
    first, other = place.registry, place.open()

    def meanwhile() -> None:
        place.origin.before_read = lambda: None
        first.poll()
        assert list(first.settle()) == [Settled("m", 1)]
        place.origin.files["m"][1] = second

    place.origin.before_read = meanwhile
    other.poll()
    (settled,) = other.settle()
    assert type(settled.error) is (error or type(None))
    assert place.rows.acts("registry.pin") == ["m:1"]
    assert dict(first.aliases("m")) == {"champion": 1}
