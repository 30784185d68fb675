"""kill -9 of triggers and dispatchers over one store, a receiver that fails and loses answers: nothing is lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from server.audit import AuditLog, Verified
from server.delivery.backoff import RetryPolicy
from server.delivery.dispatcher import Dispatcher
from server.delivery.options import WebhookOptions
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
from server.delivery.webhook import WebhookSink
from server.outbox import Outbox
from server.store.sqlite import SqliteStore, get_meta
from tests.support.receiver import KEY, SECRET, Answer, Received, receiving

SEED = 20261122

OPEN = """
import sys, time
from pathlib import Path
import structlog
from server.audit import AuditLog
from server.delivery.backoff import RetryPolicy
from server.delivery.dispatcher import Dispatcher
from server.delivery.options import WebhookOptions
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
from server.delivery.webhook import WebhookSink
from server.outbox import Event, Limits, Outbox
from server.store.sqlite import SqliteStore, put_meta
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))  # what it says to us is on the other
store = SqliteStore(Path(sys.argv[1]) / "tidegate.db")
outbox = Outbox(store, AuditLog(store), sinks=["ops"], limits=Limits(max_pending=100_000))
"""

#: Writes a fact and its event in one transaction, without end; says which keys it has been told are written.
TRIGGER = (
    OPEN
    + """
print("ready", flush=True)
sys.stdin.readline()
for number in range(100_000):
    key = f"{sys.argv[2]}-{number}"
    with store.transaction() as connection:
        put_meta(connection, "fact:" + key, "done")
        outbox.put(connection, Event("io.tidegate.test", "/models/m", "m:1", key, {"number": number}))
    print(key, flush=True)
    time.sleep(0.002)
"""
)

DISPATCHER = (
    OPEN
    + """
options = WebhookOptions(sys.argv[3], (SigningSecret.parse(sys.argv[4]),), AllowList.parse(["127.0.0.1"]), 2.0)
retry = RetryPolicy(0.01, 0.1, max_attempts=1000)
sink = WebhookSink("ops", options)
print("ready", flush=True)
sys.stdin.readline()
Dispatcher(outbox, [sink], retry=retry, poll_s=0.02, lease_margin_s=-1.5).start()
time.sleep(600)
"""
)


def start(code: str, root: Path, *arguments: str) -> subprocess.Popen[str]:
    """A process that says "ready" when it is, and does nothing before it is told to go."""
    command = [sys.executable, "-c", code, str(root), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(processes: Sequence[subprocess.Popen[str]]) -> None:
    """All of them at once: none works while the others still start, however long that takes."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    """The next line that it says."""
    assert process.stdout is not None
    return process.stdout.readline()


def left(process: subprocess.Popen[str]) -> str:
    """What a killed process had said beside what was heard of it: ``communicate`` would miss what was read ahead."""
    with process:
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    return said


class Flaky:
    """Fails the first call and a tenth of the others, and loses the answers to a tenth."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._fails = 1.0
        self._lock = threading.Lock()

    def __call__(self, _: Received) -> Answer:
        with self._lock:
            draw, fails, self._fails = self._chance.random(), self._fails, 0.1
        return Answer(503) if draw < fails else Answer(hang_up=True) if draw < 0.2 else Answer()


def killed_round(root: Path, url: str, chance: random.Random, number: int) -> list[str]:
    """A trigger and two dispatchers, killed one by one at random moments; the keys that the trigger was told of."""
    processes = [start(TRIGGER, root, f"r{number}")]
    processes += [start(DISPATCHER, root, str(number), url, SECRET) for _ in range(2)]
    go(processes)
    first = heard(processes[0])
    chance.shuffle(order := list(processes))
    for process in order:
        time.sleep(chance.uniform(0.02, 0.25))  # the moment of the kill is what is tried here
        process.kill()
    said = [left(process) for process in processes]
    # The last line may have been cut off.
    return [line for line in (first + said[0]).split("\n")[:-1] if line]


def run_rounds(root: Path, rounds: int) -> None:
    chance = random.Random(SEED)
    told: list[str] = []
    with receiving() as receiver:
        receiver.answer = Flaky(chance)
        for number in range(rounds):
            told += killed_round(root, receiver.url, chance, number)
        with closing(SqliteStore(root / "tidegate.db")) as store:
            deliver_the_rest(store, receiver.url)
            check(store, told, receiver.got)


def deliver_the_rest(store: SqliteStore, url: str) -> None:
    outbox = Outbox(store, AuditLog(store), sinks=["ops"])
    options = WebhookOptions(url, (SigningSecret(KEY),), AllowList.parse(["127.0.0.1"]), 5.0)
    # Attempts of the dead count: with the usual delays, the unlucky ones would wait for minutes by now.
    retry = RetryPolicy(0.01, 0.1, max_attempts=1000)
    dispatcher = Dispatcher(outbox, [WebhookSink("ops", options)], retry=retry, poll_s=0.02)
    dispatcher.start()
    deadline = time.monotonic() + 60
    while outbox.census():
        assert time.monotonic() < deadline, outbox.census()
        time.sleep(0.01)  # the store tells nobody
    assert dispatcher.stop(10)


def check(store: SqliteStore, told: list[str], got: list[Received]) -> None:
    """Nothing lost, nothing made up, and a duplicate is a duplicate by its id."""
    assert store.problems() == []
    assert isinstance(AuditLog(store).verify(), Verified)
    deliveries = Outbox(store, AuditLog(store)).list(100_000)
    assert {delivery.state for delivery in deliveries} == {"delivered"}
    ids, bodies = defaultdict(set), defaultdict(set)
    for received in got:
        assert received.signed_by(KEY)
        ids[received.headers["idempotency-key"]].add(received.id)
        bodies[received.id].add(received.body)
    written = {delivery.key: delivery.event_id for delivery in deliveries}
    assert set(told) <= written.keys()
    assert ids == {key: {event_id} for key, event_id in written.items()}
    assert all(len(seen) == 1 for seen in bodies.values())
    with store.reading() as connection:
        assert all(get_meta(connection, f"fact:{key}") == "done" for key in written)
        assert connection.execute("SELECT count(*) FROM meta WHERE key LIKE 'fact:%'").fetchone() == (len(written),)
    assert max(Counter(received.id for received in got).values()) > 1  # the trouble was real


def test_kill_nine_short(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_nine_loses_no_event(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=12)
