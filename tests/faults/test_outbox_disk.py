"""A full disk: events are refused whole, nothing is sent that cannot be leased, and all goes on when there is room."""

from __future__ import annotations

from pathlib import Path

from tests.faults.test_store_disk import on_small_disk

PARTS = """
import threading, time
from server.delivery.base import Delivered
from server.delivery.dispatcher import Dispatcher
from server.outbox import Event, Outbox
outbox = Outbox(store, audit, sinks=["ops"])

class Sink:
    name, timeout_s = "ops", 1.0
    def __init__(self):
        self.got = []
        self.answering = threading.Event()
        self.answering.set()
    def send(self, message):
        self.got.append(message.key)
        self.answering.wait(20)
        return Delivered()

def event(key, **data):
    return Event("io.tidegate.test", "/models/m", "m:1", key, data)

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, outbox.list(9)
        time.sleep(0.01)

sink = Sink()
dispatcher = Dispatcher(outbox, [sink], poll_s=0.02, threads_per_sink=1)
"""


def test_an_event_that_finds_no_room_on_the_disk_takes_what_it_tells_of_with_it(tmp_path: Path) -> None:
    on_small_disk(
        PARTS
        + """
outbox.publish(event("before"))
fill()
def promote():
    with store.transaction() as connection:
        put_meta(connection, "rollout", "x" * 200_000)
        outbox.put(connection, event("promoted", text="x" * 60_000))
text = raises(StoreError, promote)
assert "no space is left on the disk" in text, text
assert read("rollout") is None
assert [delivery.key for delivery in outbox.list(9)] == ["before"]
(disk / "ballast").unlink()
promote()
dispatcher.start()
until(lambda: sink.got == ["before", "promoted"] and not outbox.census())
assert dispatcher.stop(10)
""",
        tmp_path,
    )


def test_with_a_full_disk_nothing_is_sent_again_and_again(tmp_path: Path) -> None:
    on_small_disk(
        PARTS
        + """
sink.answering.clear()
outbox.publish(event("sent"))
dispatcher.start()
until(lambda: sink.got == ["sent"])
outbox.publish(event("waits"))
# Merges what lies in the log into the file, so that the next commit needs room.
import sqlite3
side = sqlite3.connect(disk / "tidegate.db")
side.execute("PRAGMA wal_checkpoint(TRUNCATE)")
side.close()
fill()
sink.answering.set()
time.sleep(0.5)  # time to do wrong: the outcome cannot be written, and nothing else can be leased
assert sink.got == ["sent"], sink.got
assert {delivery.key: delivery.state for delivery in outbox.list(9)} == {"sent": "leased", "waits": "pending"}
(disk / "ballast").unlink()
until(lambda: not outbox.census())
assert sink.got == ["sent", "waits"], sink.got
assert dispatcher.stop(10)
""",
        tmp_path,
    )
