"""Full and read-only disks: real ones, mounted in a namespace of their own; skipped where that is not permitted."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: Each script runs with ``sys.argv[1]``, an empty file system of 4 MiB that nobody else sees.
OPEN = """
import os, subprocess, sys
from pathlib import Path
from router.registry.base import StorageFailed
from router.registry.embedded import EmbeddedRegistry
from router.registry.gc import collect
from server.audit import AuditEvent, AuditLog, DeferredAudit, Verified
from server.store.base import StoreError
from server.store.sqlite import SqliteStore, get_meta, put_meta
disk = Path(sys.argv[1])
outside = Path(sys.argv[2])

def open_all():
    global store, audit, registry
    store = SqliteStore(disk / "tidegate.db")
    audit = AuditLog(store)
    registry = EmbeddedRegistry(store, disk / "blobs", audit.journal)

def source(name, size):
    folder = outside / name
    folder.mkdir()
    (folder / "model.onnx").write_bytes(os.urandom(size))
    return folder

def fill():
    with open(disk / "ballast", "wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass

def remount(how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)

def raises(error, call):
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")

def write(key, value):
    with store.transaction() as connection:
        put_meta(connection, key, value)

def read(key):
    with store.reading() as connection:
        return get_meta(connection, key)

open_all()
"""


@functools.cache
def may_mount() -> bool:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    return subprocess.run([*namespace(), "mount", "-t", "tmpfs", "none", "/mnt"], check=False).returncode == 0


def namespace() -> list[str]:
    rights = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-root-user"]
    return ["unshare", *rights]


def on_small_disk(script: str, folder: Path) -> None:
    if not may_mount():
        pytest.skip("mounting a file system in a namespace of one's own is not permitted here")
    disk, outside, code = folder / "disk", folder / "outside", folder / "script.py"
    disk.mkdir()
    outside.mkdir()
    code.write_text(OPEN + script)
    # The disk is in memory and small; leaving the namespace takes it away.
    shell = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" "$3" "$1" "$4"'
    command = [*namespace(), "sh", "-c", shell, "sh", str(disk), sys.executable, str(code), str(outside)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONDONTWRITEBYTECODE": "1"}
    # Some scripts start a server and several commands; a machine that is busy elsewhere takes its time for them.
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr


def test_a_publish_that_fills_the_disk_leaves_nothing(tmp_path: Path) -> None:
    on_small_disk(
        """
first = registry.publish("m", source("a", 100_000), actor="test")
text = raises(StorageFailed, lambda: registry.publish("m", source("b", 8_000_000), actor="test"))
assert text == "model.onnx could not be copied into the registry: no space is left on the disk", text
assert list((disk / "blobs/tmp").iterdir()) == []
assert len(list(registry.blobs.infos())) == 1
registry.verify("m", 1)
assert registry.publish("m", source("c", 100_000), actor="test").version == 2
assert isinstance(audit.verify(), Verified)
""",
        tmp_path,
    )


def test_a_fetch_that_fills_the_disk_leaves_nothing(tmp_path: Path) -> None:
    on_small_disk(
        """
registry.publish("m", source("a", 1_500_000), actor="test")
fill()
text = raises(StorageFailed, lambda: registry.fetch("m", 1))
assert "no space is left on the disk" in text, text
assert not list((disk / "models").glob("*/*"))
(disk / "ballast").unlink()
assert registry.fetch("m", 1).healed == ()
""",
        tmp_path,
    )


def test_a_full_disk_stops_writing_but_not_reading(tmp_path: Path) -> None:
    on_small_disk(
        """
registry.publish("m", source("a", 1000), alias="champion", actor="test")
write("k", "before")
fill()
text = raises(StoreError, lambda: write("big", "x" * 3_000_000))
assert text == "the state store tidegate.db cannot be used: no space is left on the disk", text
assert read("k") == "before"
assert read("big") is None
assert registry.resolve("m", "@champion").version == 1
registry.verify("m", 1)
(disk / "ballast").unlink()
write("k", "after")
assert read("k") == "after"
assert store.problems() == []
assert isinstance(audit.verify(), Verified)
""",
        tmp_path,
    )


def test_deferred_events_wait_for_space(tmp_path: Path) -> None:
    on_small_disk(
        """
deferred = DeferredAudit(audit, store)
fill()
for number in range(300):
    deferred.record(AuditEvent("test", "act", str(number), {"text": "x" * 5000}))
assert not deferred.flush(0.5)
assert deferred.pending > 0
(disk / "ballast").unlink()
assert deferred.flush(20)
assert deferred.close() == 0
assert [row.event.subject for row in audit.tail(1000)] == [str(number) for number in range(300)]
assert isinstance(audit.verify(), Verified)
""",
        tmp_path,
    )


def test_a_disk_that_turns_read_only_is_still_read(tmp_path: Path) -> None:
    on_small_disk(
        """
registry.publish("m", source("a", 1000), alias="champion", actor="test")
folder = registry.fetch("m", 1).folder
write("k", "before")
store.close()
remount("ro")
open_all()
assert read("k") == "before"
assert "read-only" in raises(StoreError, lambda: write("k", "x"))
assert registry.fetch("m", 1).folder == folder
assert registry.resolve("m", "@champion").version == 1
assert isinstance(audit.verify(), Verified)
text = raises(StorageFailed, lambda: registry.publish("m", source("b", 10), actor="test"))
assert text == "no temporary folder could be made: the disk is read-only", text
assert "read-only" in raises(StoreError, lambda: registry.set_alias("m", "shadow", 1, actor="test"))
remount("rw")
write("k", "after")
assert read("k") == "after"
""",
        tmp_path,
    )


def test_commits_that_lie_in_the_log_of_a_read_only_disk_are_seen(tmp_path: Path) -> None:
    on_small_disk(
        """
write("k", "in the log")
code = (
    "import os, sys; from pathlib import Path; from server.store.sqlite import SqliteStore, put_meta\\n"
    "store = SqliteStore(Path(sys.argv[1]))\\n"
    "with store.transaction() as connection:\\n"
    "    put_meta(connection, 'k', 'of the dead')\\n"
    "os._exit(0)"
)
store.close()
subprocess.run([sys.executable, "-c", code, str(disk / "tidegate.db")], check=True)
assert (disk / "tidegate.db-wal").stat().st_size > 0
remount("ro")
open_all()
assert read("k") == "of the dead"
""",
        tmp_path,
    )


def test_a_new_store_on_a_read_only_disk_is_refused(tmp_path: Path) -> None:
    on_small_disk(
        """
remount("ro")
text = raises(StoreError, lambda: SqliteStore(disk / "new.db"))
assert "the disk or the file is read-only" in text, text
text = raises(StoreError, lambda: SqliteStore(disk / "new" / "new.db"))
assert "the disk or the file is read-only" in text, text
""",
        tmp_path,
    )


LIMITED = """
import resource, sys
from pathlib import Path
from router.registry.base import StorageFailed
from router.registry.blobs import BlobStore
from router.registry.sources import each_file
blobs = BlobStore(Path(sys.argv[1]) / "blobs")
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
with blobs.staging() as folder:
    try:
        each_file(Path(sys.argv[1]) / "m.onnx", lambda path, file: blobs.stage(file, path, folder))
    except StorageFailed as error:
        print(error)
"""


def test_a_limit_on_file_size_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(bytes(3_000_000))
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.stdout, result.returncode) == (
        "model.onnx could not be copied into the registry: the file is larger than the system allows\n",
        0,
    ), result.stderr
    assert list((tmp_path / "blobs" / "tmp").iterdir()) == []
