"""kill -9 of concurrent publishers at any moment; command lines that race for one alias."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from router.registry.embedded import EmbeddedRegistry
from router.registry.gc import collect
from server.audit import AuditLog, Verified
from server.store.sqlite import SqliteStore
from tests.faults.test_outbox_kill import go, heard, left, start

WRITERS = 6
SEED = 20261122

OPEN = """
import os, random, sys
from pathlib import Path
from router.registry.base import AliasConflict, VersionRetired
from router.registry.embedded import EmbeddedRegistry
from router.registry.gc import collect
from server.audit import AuditLog
from server.store.sqlite import SqliteStore
root, seed = Path(sys.argv[1]), int(sys.argv[2])
store = SqliteStore(root / "tidegate.db")
registry = EmbeddedRegistry(store, root / "blobs", AuditLog(store).journal)
"""

#: Publishes, promotes, retires, fetches and collects without end; says what it has been told is done. Models of one
#: byte are often there already.
PUBLISHER = (
    OPEN
    + """
chance = random.Random(seed)
source = root / f"source-{seed}"
source.mkdir()
(source / "shared.bin").write_bytes(b"shared" * 1000)
print("ready", flush=True)
sys.stdin.readline()
while True:
    (source / "model.onnx").write_bytes(chance.randbytes(chance.choice((1, 5_000, 300_000))))
    done = registry.publish("m", source, actor=str(seed))
    print(done.version, done.digest, flush=True)
    act = chance.randrange(12)
    try:
        if act < 3:
            registry.promote("m", done.version, actor=str(seed))
        elif act == 3:
            registry.set_alias("m", "shadow", done.version, actor=str(seed))
        elif act == 4:
            registry.retire("m", done.version, actor=str(seed))
        elif act == 5:
            registry.fetch("m", done.version)
        elif act == 6:
            collect(registry, actor=str(seed), grace_s=-1)
    except (AliasConflict, VersionRetired):
        pass
"""
)


def killed_round(root: Path, chance: random.Random) -> list[tuple[int, str]]:
    """Some writers at once, killed one by one at random moments; returns what they were told is done."""
    writers = [start(PUBLISHER, root, str(chance.getrandbits(48))) for _ in range(WRITERS)]
    go(writers)
    first = heard(writers[-1])
    for writer in writers:
        time.sleep(chance.uniform(0, 0.12))  # the moment of the kill is what is tried here
        writer.kill()
    said = [first, *(left(writer) for writer in writers)]
    words = [line.split(" ") for text in said for line in text.splitlines()]
    return [(int(line[0]), line[1]) for line in words if len(line) == 2 and len(line[1]) == 64]


def check(root: Path, said: list[tuple[int, str]]) -> int:
    """Everything that must hold after any kill; returns how many versions there are."""
    with closing(SqliteStore(root / "tidegate.db")) as store:
        audit = AuditLog(store)
        registry = EmbeddedRegistry(store, root / "blobs", audit.journal)
        assert store.problems() == []
        assert isinstance(audit.verify(), Verified)
        versions = registry.versions("m")
        assert [found.version for found in versions] == list(range(1, len(versions) + 1))
        for found in versions:
            if not found.retired:
                registry.verify("m", found.version)
        known = {found.version: found for found in versions}
        for version, digest in said:
            assert known[version].digest == digest
        for version in registry.aliases("m").values():
            assert not known[version].retired
        counts = Counter(row.event.action for row in audit.tail(1_000_000))
        assert counts["registry.publish"] == len(versions)
        retired = counts["registry.retire"] - counts["registry.reinstate"]
        assert retired == sum(found.retired for found in versions)
        return len(versions)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_kill_nine_loses_no_version_and_breaks_nothing(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=14)


def test_kill_nine_short(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=3)


def run_rounds(root: Path, rounds: int) -> None:
    chance = random.Random(SEED)
    said: list[tuple[int, str]] = []
    for _ in range(rounds):
        said += killed_round(root, chance)
        versions = check(root, said)
    assert versions >= len({version for version, _ in said}) > 0
    sweep(root)


def sweep(root: Path) -> None:
    """What the dead left goes; what is named stays."""
    with closing(SqliteStore(root / "tidegate.db")) as store:
        registry = EmbeddedRegistry(store, root / "blobs", AuditLog(store).journal)
        collect(registry, actor="test", grace_s=-1)
        assert list((root / "blobs" / "tmp").iterdir()) == []
        assert list((root / "models" / ".tmp").glob("*")) == []
        live = [registry.version("m", found.version) for found in registry.versions("m") if not found.retired]
        named = {entry.sha256 for found in live if found.manifest for entry in found.manifest.files}
        assert {blob.sha256 for blob in registry.blobs.infos()} == named


#: Tries to win every generation of one alias; says which it won.
RACER = (
    OPEN
    + """
print("ready", flush=True)
sys.stdin.readline()
for generation in range(25):
    while registry.alias("m", "champion").generation < generation:
        pass
    try:
        registry.set_alias("m", "champion", 1 + seed, expected=generation, actor=str(seed))
        print(generation, flush=True)
    except AliasConflict as conflict:
        assert f"expected at generation {generation} and is at generation" in str(conflict), conflict
"""
)


def test_two_command_lines_racing_for_an_alias_have_one_winner_each_time(tmp_path: Path) -> None:
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        audit = AuditLog(store)
        registry = EmbeddedRegistry(store, tmp_path / "blobs", audit.journal)
        for number in (1, 2):
            source = tmp_path / f"{number}.onnx"
            source.write_bytes(bytes([number]))
            registry.publish("m", source, actor="test")
        racers = [start(RACER, tmp_path, str(seed)) for seed in (0, 1)]
        go(racers)
        won = [int(line) for racer in racers for line in racer.communicate(timeout=50)[0].splitlines()]
        assert [racer.returncode for racer in racers] == [0, 0]
        assert sorted(won) == list(range(25))
        assert registry.alias("m", "champion").generation == 25
        moves = [row.event.detail["generation"] for row in audit.tail(99) if row.event.action == "registry.alias"]
        assert moves == list(range(1, 26))
