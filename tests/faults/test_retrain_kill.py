"""kill -9 of triggers and dispatchers over one store, a receiver that fails and loses answers: no request is lost."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import pytest

from server.audit import AuditLog, Verified
from server.outbox import Outbox
from server.retraining import EVENT_TYPE, Facts, Retraining
from server.store.sqlite import SqliteStore
from tests.faults.test_outbox_kill import DISPATCHER, Flaky, deliver_the_rest, go, heard, left, start
from tests.support.receiver import KEY, SECRET, Received, receiving

SEED = 20261123

#: Lets drift come and go, has versions come for the jobs that this leads to, and says which it has been told of.
TRIGGER = """
import sys, time
from pathlib import Path
from monitor.retrain.rules import Champion, RetrainRules, SignalRule
from router.registry.manifest import Lineage
from server.audit import AuditLog
from server.outbox import Limits, Outbox
from server.retraining import Facts, Retraining, RetrainSpec
from server.store.sqlite import SqliteStore
store = SqliteStore(Path(sys.argv[1]) / "tidegate.db")
audit = AuditLog(store)
outbox = Outbox(store, audit, limits=Limits(max_pending=100_000))
rules = RetrainRules("m", drift=SignalRule(), coalesce_ns=0, cooldown_ns=0, clear_after_ns=0, budget=1000)
facts = Facts(Champion("1", "d1"))
retraining = Retraining(store, audit, outbox, {"m": RetrainSpec(rules, ("ops",))}, lambda _: facts)
print("ready", flush=True)
sys.stdin.readline()
for number in range(100_000):
    retraining.alarm("m", "drift", "a", "1", raised=True, numbers={"round": number})
    retraining.tick()
    for job in retraining.list("m"):
        version = job["version"]
        if job["state"] in ("requested", "accepted"):
            print("asked", job["trigger_id"], flush=True)
            version = f"{sys.argv[2]}.{number}"
            retraining.version_registered("m", version, Lineage(trigger_id=job["trigger_id"]))
        elif job["state"] != "registered":  # one that was killed may have got so far
            continue
        retraining.rejected("m", version, "no better")
        print("rejected", job["trigger_id"], flush=True)
    retraining.alarm("m", "drift", "a", "1", raised=False)
    retraining.tick()
"""


def killed_round(root: Path, url: str, chance: random.Random, number: int) -> list[str]:
    """A trigger and two dispatchers, killed one by one at random moments; what the trigger said."""
    processes = [start(TRIGGER, root, f"r{number}")]
    processes += [start(DISPATCHER, root, str(number), url, SECRET) for _ in range(2)]
    go(processes)
    first = heard(processes[0])
    chance.shuffle(order := list(processes))
    for process in order:
        time.sleep(chance.uniform(0.02, 0.3))  # the moment of the kill is what is tried here
        process.kill()
    said = [left(process) for process in processes]
    # The last line may have been cut off.
    return [line for line in (first + said[0]).split("\n")[:-1] if line]


def run_rounds(root: Path, rounds: int) -> None:
    chance = random.Random(SEED)
    said: list[str] = []
    SqliteStore(root / "tidegate.db").close()
    with receiving() as receiver:
        receiver.answer = Flaky(chance)
        for number in range(rounds):
            said += killed_round(root, receiver.url, chance, number)
        with closing(SqliteStore(root / "tidegate.db")) as store:
            deliver_the_rest(store, receiver.url)
            check(store, said, receiver.got)


def check(store: SqliteStore, said: list[str], got: list[Received]) -> None:
    """State, audit, outbox and receiver agree on which trainings were asked for, each once."""
    assert store.problems() == []
    audit = AuditLog(store)
    assert isinstance(audit.verify(), Verified)
    deliveries = Outbox(store, audit).list(100_000)
    assert {delivery.state for delivery in deliveries} == {"delivered"}
    keys = [delivery.key for delivery in deliveries]
    assert len(set(keys)) == len(keys) > 0
    bodies = defaultdict(set)
    for received in got:
        assert received.signed_by(KEY)
        assert received.event["type"] == EVENT_TYPE
        assert received.headers["idempotency-key"] == received.id == received.event["data"]["trigger_id"]
        bodies[received.id].add(received.body)
    assert set(bodies) == set(keys)
    assert all(len(seen) == 1 for seen in bodies.values())
    rows = [row.event for row in audit.tail(100_000)]
    assert [row.detail["trigger_id"] for row in rows if row.action == "retrain.requested"] == keys[::-1]
    rejected = [row.detail["trigger_id"] for row in rows if row.action == "retrain.rejected"]
    assert len(set(rejected)) == len(rejected)
    told: defaultdict[str, set[str]] = defaultdict(set)
    for line in said:
        what, _, trigger_id = line.partition(" ")
        told[what].add(trigger_id)
    assert told["asked"] <= set(keys)
    assert told["rejected"] <= set(rejected)
    jobs = Retraining(store, audit, Outbox(store, audit), {}, lambda _: Facts()).list("m")
    assert {job["trigger_id"] for job in jobs} <= set(keys)


def test_kill_nine_short(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_nine_loses_no_request(tmp_path: Path) -> None:
    run_rounds(tmp_path, rounds=12)
