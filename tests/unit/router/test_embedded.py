"""The embedded registry: the contract, publishing, aliases, the serving cache, tampering, garbage collection."""

from __future__ import annotations

import itertools
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from router.registry.base import (
    TRIGGERED,
    Alias,
    AliasConflict,
    Damaged,
    InvalidName,
    NotInRegistry,
    PublishRefused,
    StorageFailed,
    VersionRetired,
)
from router.registry.embedded import EmbeddedRegistry, Published
from router.registry.gc import Collected, collect
from router.registry.manifest import Description, Lineage, Manifest, Metric
from server.audit import AuditLog, Verified
from server.store.sqlite import SqliteStore
from tests.contracts.registry_contract import Case, Files, RegistryContract, model_files


def put(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def manifest_of(registry: EmbeddedRegistry, version: int) -> Manifest:
    manifest = registry.version("m", version).manifest
    assert manifest is not None
    return manifest


class House:
    """A state folder with its store, trail and registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = SqliteStore(root / "state" / "tidegate.db")
        self.audit = AuditLog(self.store)
        self.registry = EmbeddedRegistry(self.store, root / "state" / "blobs", self.audit.journal)
        self._sources = itertools.count()

    def source(self, files: Files) -> Path:
        return put(self.root / "sources" / str(next(self._sources)), files)

    def publish(self, seed: int = 0, model: str = "m", **options: object) -> Published:
        return self.registry.publish(model, self.source(model_files(seed)), actor="alice", **options)

    def actions(self) -> list[tuple[str, str]]:
        return [(row.event.action, row.event.subject) for row in self.audit.tail(1000)]

    def tamper(self, statement: str, *values: object) -> None:
        with closing(sqlite3.connect(self.store.path)) as raw:
            for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                raw.execute(f"DROP TRIGGER {name}")
            raw.execute(statement, values)
            raw.commit()

    def blobs(self) -> int:
        return len(list(self.registry.blobs.infos()))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    yield house
    assert house.store.problems() == []
    assert isinstance(house.audit.verify(), Verified)
    assert list((tmp_path / "state/blobs/tmp").glob("*")) == []
    house.store.close()


class TestContract(RegistryContract):
    def case(self, folder: Path) -> Case:
        house = House(folder)
        return Case(
            house.registry,
            lambda model, files: house.registry.publish(model, house.source(files), actor="alice").version,
            house.store.close,
        )


# --- publishing ---


def test_publish(house: House) -> None:
    description = Description(metrics=(Metric("test", "auc", 0.9, 10),), publisher="ci")
    published = house.registry.publish("m", house.source(model_files()), description, actor="alice")
    assert (published.model, published.version, published.created) == ("m", 1, True)
    found = house.registry.version("m", 1)
    assert found.manifest is not None
    assert found.manifest.description == description
    assert found.manifest.digest() == found.digest == published.digest
    assert [(entry.path, entry.role) for entry in found.manifest.files] == [
        ("model.onnx", "model"),
        ("weights.bin", "data"),
    ]
    assert house.registry.verify("m", 1) == found
    (row,) = house.audit.tail(9)
    assert (row.event.actor, row.event.action, row.event.subject) == ("alice", "registry.publish", "m:1")
    assert row.event.detail == {"digest": found.digest, "files": 2, "bytes": 1006}


def test_publishing_the_same_again_is_the_same_version(house: House) -> None:
    first, other = house.publish(1), house.publish(2)
    generation = house.registry.generation()
    again = house.publish(1)
    assert again == Published("m", first.version, first.digest, created=False)
    assert [first.version, other.version] == [1, 2]
    assert house.registry.generation() == generation
    assert house.publish(1, model="other").version == 1
    assert house.actions() == [("registry.publish", f"{name}") for name in ("m:1", "m:2", "other:1")]


def test_another_description_is_another_version(house: House) -> None:
    assert house.publish(1).version == 1
    assert house.publish(1, description=Description(publisher="x")).version == 2
    assert house.blobs() == 2


def test_files_of_equal_bytes_are_one_blob(house: House) -> None:
    source = house.source({"model.onnx": b"same", "a.bin": b"same", "b/c.bin": b"same"})
    house.registry.publish("m", source, actor="alice")
    assert house.blobs() == 1
    folder = house.registry.fetch("m", 1).folder
    assert (folder / "b/c.bin").read_bytes() == (folder / "a.bin").read_bytes() == b"same"


def test_publishing_with_an_alias(house: House) -> None:
    house.publish(1, alias="champion")
    house.publish(2, alias="challenger")
    assert house.registry.aliases("m") == {"champion": 1, "challenger": 2}
    house.publish(2, alias="champion")
    assert house.registry.aliases("m") == {"champion": 2, "previous": 1}
    actions = len(house.actions())
    house.publish(2, alias="champion")
    house.publish(1, alias="previous")
    assert len(house.actions()) == actions


def test_names_are_checked(house: House) -> None:
    for name in ("", ".", "..", "../m", "a/b", "a b", "é", "x" * 256, "a\0"):
        with pytest.raises(InvalidName):
            house.publish(model=name)
    for alias in ("", "@champion", "Champion", "1", "a b", "x" * 64):
        with pytest.raises(InvalidName):
            house.publish(alias=alias)
    house.publish()
    with pytest.raises(InvalidName):
        house.registry.set_alias("m", "A", 1, actor="alice")
    assert house.actions() == [("registry.publish", "m:1")]


def test_what_is_refused_leaves_nothing(house: House) -> None:
    source = house.source(model_files())
    (source / "link.bin").symlink_to("/etc/hostname")
    with pytest.raises(PublishRefused, match=r"link\.bin is a symbolic link"):
        house.registry.publish("m", source, actor="alice")
    bad = Description(metrics=(Metric("t", "auc", float("nan")),))
    with pytest.raises(PublishRefused, match="finite"):
        house.publish(description=bad)
    small = EmbeddedRegistry(house.store, house.root / "state/blobs", house.audit.journal, max_file_bytes=100)
    with pytest.raises(PublishRefused, match=r"weights\.bin has 1000 bytes; at most 100"):
        small.publish("m", house.source(model_files()), actor="alice")
    with pytest.raises(PublishRefused, match="wanted model"):
        house.registry.publish("m", house.source({"readme.txt": b""}), actor="alice")
    assert (house.registry.models(), house.blobs(), house.actions()) == ((), 0, [])


def test_a_journal_that_fails_undoes_the_change(house: House) -> None:
    house.publish(1)

    def refuse(*_: object) -> None:
        raise RuntimeError("no journal, no change")

    mute = EmbeddedRegistry(house.store, house.root / "state/blobs", refuse)
    for change in (
        lambda: mute.publish("m", house.source(model_files(2)), actor="a"),
        lambda: mute.set_alias("m", "champion", 1, actor="a"),
        lambda: mute.promote("m", 1, actor="a"),
        lambda: mute.retire("m", 1, actor="a"),
    ):
        with pytest.raises(RuntimeError, match="no journal"):
            change()
    assert [found.version for found in house.registry.versions("m")] == [1]
    assert house.registry.aliases("m") == {}
    assert not house.registry.version("m", 1).retired
    assert house.registry.generation() == 1


# --- aliases ---


def test_alias_generations(house: House) -> None:
    for seed in range(3):
        house.publish(seed)
    registry = house.registry
    assert registry.alias("m", "shadow") == Alias("shadow", None, 0)
    assert registry.set_alias("m", "shadow", 1, expected=0, actor="a") == Alias("shadow", 1, 1)
    assert registry.set_alias("m", "shadow", 1, actor="a") == Alias("shadow", 1, 1)
    assert registry.set_alias("m", "shadow", 1, expected=1, actor="a") == Alias("shadow", 1, 2)
    assert registry.set_alias("m", "shadow", 3, expected=2, actor="a") == Alias("shadow", 3, 3)
    with pytest.raises(
        AliasConflict, match="shadow of m was expected at generation 2 and is at generation 3, version 3"
    ):
        registry.set_alias("m", "shadow", 2, expected=2, actor="a")
    assert registry.resolve("m", "@shadow").version == 3
    with pytest.raises(AliasConflict):
        registry.drop_alias("m", "shadow", expected=1, actor="a")
    assert registry.drop_alias("m", "shadow", expected=3, actor="a") == Alias("shadow", None, 4)
    assert registry.drop_alias("m", "shadow", actor="a") == Alias("shadow", None, 4)
    assert registry.aliases("m") == {}
    with pytest.raises(NotInRegistry, match="no alias 'shadow'"):
        registry.resolve("m", "@shadow")
    with pytest.raises(AliasConflict, match="no version"):
        registry.set_alias("m", "shadow", 1, expected=0, actor="a")
    details = [row.event.detail for row in house.audit.tail(99) if row.event.action == "registry.alias"]
    assert details == [
        {"from": None, "to": 1, "generation": 1},
        {"from": 1, "to": 1, "generation": 2},
        {"from": 1, "to": 3, "generation": 3},
        {"from": 3, "to": None, "generation": 4},
    ]


def test_alias_of_what_is_not_there(house: House) -> None:
    house.publish()
    with pytest.raises(NotInRegistry, match="no version 2"):
        house.registry.set_alias("m", "champion", 2, actor="a")
    with pytest.raises(NotInRegistry, match="no model 'n'"):
        house.registry.set_alias("n", "champion", 1, actor="a")
    with pytest.raises(NotInRegistry):
        house.registry.alias("n", "champion")


def test_promotion_is_one_step(house: House) -> None:
    for seed in range(3):
        house.publish(seed)
    registry = house.registry
    registry.promote("m", 1, expected_champion=0, actor="a")
    assert registry.aliases("m") == {"champion": 1}
    registry.set_alias("m", "challenger", 2, actor="a")
    with pytest.raises(AliasConflict, match="expected to be version 3 and is version 1"):
        registry.promote("m", 2, expected_champion=3, actor="a")
    with pytest.raises(AliasConflict, match="expected to be no version and is version 1"):
        registry.promote("m", 2, expected_champion=0, actor="a")
    registry.promote("m", 2, expected_champion=1, actor="a")
    assert registry.aliases("m") == {"champion": 2, "previous": 1}
    registry.set_alias("m", "challenger", 1, actor="a")
    registry.promote("m", 3, actor="a")
    assert registry.aliases("m") == {"champion": 3, "previous": 2, "challenger": 1}
    generation = registry.generation()
    registry.promote("m", 3, actor="a")
    assert registry.generation() == generation
    row = [row for row in house.audit.tail(99) if row.event.action == "registry.promote"][1]
    assert (row.event.actor, row.event.subject) == ("a", "m:2")
    assert row.event.detail == {
        "champion": {"from": 1, "to": 2, "generation": 2},
        "previous": {"from": None, "to": 1, "generation": 1},
        "challenger": {"from": 2, "to": None, "generation": 2},
    }


def test_one_winner_per_generation_among_threads(house: House) -> None:
    for seed in range(2):
        house.publish(seed)
    won: list[int] = []

    def race(version: int) -> None:
        for generation in range(20):
            while house.registry.alias("m", "champion").generation < generation:
                pass
            try:
                house.registry.set_alias("m", "champion", version, expected=generation, actor=str(version))
                won.append(generation)
            except AliasConflict:
                pass

    threads = [threading.Thread(target=race, args=(version,)) for version in (1, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(20))
    assert house.registry.alias("m", "champion").generation == 20


def test_another_process_sees_the_change_by_its_generation(house: House, tmp_path: Path) -> None:
    house.publish(1)
    other = House(tmp_path)
    cursor = other.registry.changes(0)
    assert cursor.models == {"m"}
    house.registry.set_alias("m", "champion", 1, actor="a")
    house.publish(1, model="n")
    assert other.registry.generation() > cursor.generation
    assert other.registry.changes(cursor.generation).models == {"m", "n"}
    assert other.registry.resolve("m", "@champion").version == 1
    other.store.close()


# --- the database refuses by itself ---

OTHER = "FROM registry_version WHERE version = 2"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE registry_version SET digest = 'x'",
        "UPDATE registry_version SET version = 7 WHERE version = 2",
        "DELETE FROM registry_version",
        f"INSERT OR REPLACE INTO registry_version SELECT model, 1, printf('%064d', 5), '{{}}', created {OTHER}",
        f"INSERT OR REPLACE INTO registry_version SELECT model, 3, digest, '{{}}', created {OTHER}",
        f"INSERT INTO registry_version SELECT model, 4, printf('%064d', 5), '{{}}', created {OTHER}",
        "DELETE FROM registry_alias",
        "UPDATE registry_alias SET version = 2",
        "UPDATE registry_alias SET version = 2, generation = generation + 2",
        "UPDATE registry_alias SET version = 9, generation = generation + 1",
        "INSERT OR REPLACE INTO registry_alias VALUES ('m', 'champion', 2, 1)",
        "INSERT INTO registry_alias VALUES ('m', 'new', 2, 7)",
        "INSERT INTO registry_retired VALUES ('m', 1, '')",
        "UPDATE registry_state SET generation = generation - 1",
    ],
)
def test_rules_hold_whoever_writes(house: House, statement: str) -> None:
    house.publish(1, alias="champion")
    house.publish(2)
    with closing(sqlite3.connect(house.store.path)) as raw:
        raw.execute("PRAGMA foreign_keys = ON")
        with pytest.raises(sqlite3.IntegrityError):
            raw.execute(statement)
    assert [house.registry.verify("m", number).version for number in (1, 2)] == [1, 2]


# --- tampering ---


def test_a_manifest_changed_behind_our_back_is_found(house: House) -> None:
    house.publish(1)
    house.publish(2)
    manifest = json.loads(manifest_of(house.registry, 1).canonical())
    manifest["publisher"] = "eve"
    house.tamper("UPDATE registry_version SET manifest = ? WHERE version = 1", json.dumps(manifest))
    for look in (house.registry.version, house.registry.verify, house.registry.fetch):
        with pytest.raises(Damaged, match="manifest of m:1 was changed"):
            look("m", 1)
    with pytest.raises(Damaged):
        house.registry.set_alias("m", "champion", 1, actor="a")
    with pytest.raises(Damaged):
        collect(house.registry, actor="a", grace_s=-1)
    assert house.registry.verify("m", 2).version == 2
    house.tamper("UPDATE registry_version SET manifest = ? WHERE version = 2", b"\x00")
    with pytest.raises(Damaged, match="m:2"):
        house.registry.version("m", 2)


def blob_of(house: House, path: str) -> Path:
    files = manifest_of(house.registry, 1).files
    return next(house.registry.blobs.path(entry.sha256) for entry in files if entry.path == path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def test_triggers_are_those_of_the_newest_versions_and_read_when_something_changed(house: House) -> None:
    def publish(number: int, trigger_id: str) -> None:
        about = Description(lineage=Lineage(trigger_id=trigger_id))
        house.registry.publish("m", house.source({"model.onnx": bytes([number])}), about, actor="test")

    publish(0, "old")
    assert dict(house.registry.triggered("m")) == {"old": 1}
    known = house.registry.triggered("m")
    assert house.registry.triggered("m") is known
    for number in range(1, TRIGGERED + 1):
        publish(number, "again" if number % 2 else "")
    assert dict(house.registry.triggered("m")) == {"again": TRIGGERED}


def test_a_blob_changed_or_lost_is_named_and_mended_by_publishing_again(house: House) -> None:
    house.publish(1)
    blob = blob_of(house, "weights.bin")
    flip(blob)
    for look in (house.registry.verify, house.registry.fetch):
        with pytest.raises(Damaged, match=f"blob {blob.name} was changed"):
            look("m", 1)
    with pytest.raises(Damaged, match=r"m:1: weights\.bin: "):
        house.registry.verify("m", 1)
    blob.unlink()
    with pytest.raises(Damaged, match="missing"):
        house.registry.fetch("m", 1)
    assert not list((house.root / "state/models").glob("*/*"))
    assert not house.publish(1).created
    house.registry.verify("m", 1)
    assert house.registry.fetch("m", 1).healed == ()


# --- the serving cache ---


def stat_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_ctime_ns) for path in folder.glob("[!.]*")}


def test_fetching_again_copies_nothing(house: House) -> None:
    house.publish(1)
    first = house.registry.fetch("m", 1)
    assert first.folder == house.root / "state/models/m" / first.digest
    before = stat_of(first.folder)
    assert before
    assert house.registry.fetch("m", 1) == first
    assert stat_of(first.folder) == before
    assert all((first.folder / entry.path).stat().st_nlink == 1 for entry in first.files)


def changed(folder: Path) -> None:
    flip(folder / "weights.bin")


def changed_in_secret(folder: Path) -> None:
    info = (folder / "weights.bin").stat()
    flip(folder / "weights.bin")
    os.utime(folder / "weights.bin", ns=(info.st_atime_ns, info.st_mtime_ns))


def truncated(folder: Path) -> None:
    (folder / "weights.bin").chmod(0o644)
    os.truncate(folder / "weights.bin", 10)


def lost(folder: Path) -> None:
    (folder / "weights.bin").unlink()


def linked(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "elsewhere")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere")


def hard_linked(folder: Path) -> None:
    os.link(folder / "weights.bin", folder.parent / "elsewhere")


@pytest.mark.parametrize("spoil", [changed, changed_in_secret, truncated, lost, linked, hard_linked])
def test_a_spoilt_copy_is_replaced_and_told(house: House, spoil: Callable[[Path], None]) -> None:
    house.publish(1)
    folder = house.registry.fetch("m", 1).folder
    spoil(folder)
    again = house.registry.fetch("m", 1)
    assert again.healed == ("weights.bin",)
    assert (folder / "weights.bin").read_bytes() == model_files(1)["weights.bin"]
    assert (folder / "weights.bin").stat().st_nlink == 1
    assert not (folder / "weights.bin").is_symlink()
    assert house.registry.fetch("m", 1).healed == ()


def test_what_was_slipped_in_is_thrown_out(house: House) -> None:
    house.publish(1)
    folder = house.registry.fetch("m", 1).folder
    (folder / "config.pbtxt").write_text("evil")
    (folder / "more").symlink_to("/etc")
    assert house.registry.fetch("m", 1).healed == ("config.pbtxt", "more")
    assert sorted(os.listdir(folder)) == [".tidegate.json", "model.onnx", "weights.bin"]


def test_a_lost_or_senseless_stamp_costs_a_look_only(house: House) -> None:
    house.publish(1)
    folder = house.registry.fetch("m", 1).folder
    before = stat_of(folder)
    for text in (None, "{", "[]", "{}"):
        (folder / ".tidegate.json").unlink()
        if text is not None:
            (folder / ".tidegate.json").write_text(text)
        assert house.registry.fetch("m", 1).healed == ()
        assert stat_of(folder) == before


def test_many_fetch_at_once(house: House) -> None:
    house.publish(1)
    folder = house.registry.fetch("m", 1).folder
    failures: list[object] = []

    def fetch() -> None:
        for _ in range(10):
            try:
                assert (house.registry.fetch("m", 1).folder / "model.onnx").read_bytes() == model_files(1)["model.onnx"]
            except BaseException as error:
                failures.append(error)

    flip(folder / "weights.bin")
    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert house.registry.fetch("m", 1).healed == ()
    # The one moment in which a spoilt folder is swapped may be seen; nothing else may go wrong.
    assert all(isinstance(failure, FileNotFoundError) for failure in failures)
    assert len(failures) <= 6


def test_fetching_into_a_folder(house: House) -> None:
    house.publish(1)
    target = house.root / "export" / "m"
    fetched = house.registry.fetch("m", 1, target)
    assert fetched.folder == target
    assert sorted(path.name for path in target.iterdir()) == ["model.onnx", "weights.bin"]
    assert sorted(os.listdir(target.parent)) == ["m"]
    with pytest.raises(StorageFailed, match="folder m could not be made"):
        house.registry.fetch("m", 1, target)
    flip(blob_of(house, "weights.bin"))
    with pytest.raises(Damaged):
        house.registry.fetch("m", 1, target.with_name("other"))
    assert sorted(os.listdir(target.parent)) == ["m"]


# --- retiring and garbage collection ---


def test_a_retired_version_is_not_served(house: House) -> None:
    house.publish(1, alias="champion")
    house.publish(2)
    house.registry.retire("m", 2, actor="a")
    house.registry.retire("m", 2, actor="a")
    assert [found.retired for found in house.registry.versions("m")] == [False, True]
    for act in (
        lambda: house.registry.fetch("m", 2),
        lambda: house.registry.set_alias("m", "shadow", 2, actor="a"),
        lambda: house.registry.promote("m", 2, actor="a"),
    ):
        with pytest.raises(VersionRetired, match="m:2 was retired"):
            act()
    with pytest.raises(AliasConflict, match="m:1 is champion"):
        house.registry.retire("m", 1, actor="a")
    assert house.actions()[-1] == ("registry.retire", "m:2")
    assert len(house.actions()) == 4


def test_publishing_again_ends_retirement(house: House) -> None:
    house.publish(1)
    house.registry.retire("m", 1, actor="a")
    collect(house.registry, actor="a", grace_s=-1)
    assert house.blobs() == 0
    assert house.publish(1, alias="champion") == Published("m", 1, house.registry.version("m", 1).digest, created=False)
    house.registry.verify("m", 1)
    assert ("registry.reinstate", "m:1") in house.actions()


def test_collection_takes_what_nobody_needs_and_nothing_else(house: House) -> None:
    shared = {"model.onnx": b"graph", "weights.bin": b"shared"}
    for number, alias in enumerate(("champion", "champion", "shadow", None, None), 1):
        files = {**shared, "own.bin": bytes([number])}
        house.registry.publish("m", house.source(files), alias=alias, actor="alice")
    assert house.registry.aliases("m") == {"champion": 2, "previous": 1, "shadow": 3}
    assert collect(house.registry, actor="gc", grace_s=-1) == Collected(0, 0, 0, 0)
    house.registry.retire("m", 4, actor="a")
    assert collect(house.registry, actor="gc") == Collected(0, 0, 0, 0)  # too young
    assert house.blobs() == 7
    assert collect(house.registry, actor="gc", grace_s=-1) == Collected(0, 1, 1, 0)
    for number in (1, 2, 3, 5):
        house.registry.verify("m", number)
    with pytest.raises(Damaged, match=r"m:4: own\.bin: .* missing"):
        house.registry.verify("m", 4)
    (row,) = house.audit.tail(1)
    assert (row.event.action, row.event.detail) == ("registry.collect", {"blobs": 1, "bytes": 1})


def test_collection_of_cached_folders(house: House) -> None:
    for seed, alias in ((1, "champion"), (2, None)):
        house.publish(seed, alias=alias)
        house.registry.fetch("m", seed)
    kept = house.registry.fetch("m", 1).folder
    unused = house.registry.fetch("m", 2).folder
    assert collect(house.registry, actor="gc").folders == 0
    long_ago = time.time() - 4000
    for folder in (kept, unused):
        os.utime(folder / ".tidegate.json", (long_ago, long_ago))
    assert collect(house.registry, actor="gc").folders == 1
    assert (kept.exists(), unused.exists()) == (True, False)
    assert house.registry.fetch("m", 2).folder == unused


def test_collection_beside_publishers(house: House) -> None:
    """With no grace at all: nothing that was published may lose a blob."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def gather() -> None:
        while not stop.is_set():
            try:
                collect(house.registry, actor="gc", grace_s=-1)
            except BaseException as error:
                errors.append(error)

    def publish(start: int) -> None:
        for seed in range(start, start + 12):
            house.registry.publish("m", house.source(model_files(seed)), actor="alice")

    sources = [model_files(seed) for seed in range(36)]
    assert len({str(files) for files in sources}) == 36
    collector = threading.Thread(target=gather)
    publishers = [threading.Thread(target=publish, args=(start,)) for start in (0, 12, 24)]
    for thread in (collector, *publishers):
        thread.start()
    for thread in publishers:
        thread.join()
    stop.set()
    collector.join()
    assert errors == []
    assert [house.registry.verify("m", number).version for number in range(1, 37)] == list(range(1, 37))
