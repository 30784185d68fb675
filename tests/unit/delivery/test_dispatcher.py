"""The dispatcher over a real store: real receivers, trouble with the disk, waking, stopping, taking over."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from server.audit import AuditLog
from server.delivery.backoff import RetryPolicy
from server.delivery.base import Delivered, Failed, Outcome, Refused, Sink
from server.delivery.dispatcher import Dispatcher
from server.delivery.metrics import families
from server.delivery.options import WebhookOptions
from server.delivery.signature import SigningSecret
from server.delivery.targets import AllowList
from server.delivery.webhook import WebhookSink
from server.outbox import NS_PER_S, Event, Limits, Message, Outbox
from server.store.sqlite import SqliteStore
from tests.support.receiver import KEY, SECRET, Answer, Received, Receiver, receiving

QUICK = RetryPolicy(first_s=0.01, cap_s=0.02, max_attempts=50, max_retry_after_s=0.05)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore(tmp_path / "tidegate.db")) as store:
        yield store


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


class Told:
    """A sink that does what it is told and keeps what it got."""

    timeout_s = 1.0

    def __init__(self, name: str, act: Callable[[Message], Outcome] = lambda _: Delivered()) -> None:
        self.name = name
        self._act = act
        self._got: list[Message] = []
        self._changed = threading.Condition()

    def send(self, message: Message) -> Outcome:
        with self._changed:
            self._got.append(message)
            self._changed.notify_all()
        return self._act(message)

    def wait(self, count: int) -> list[Message]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._got) >= count, 30), f"got {len(self._got)}"
            return list(self._got)


def webhook(receiver: Receiver, timeout_s: float = 30.0) -> WebhookSink:
    options = WebhookOptions(receiver.url, (SigningSecret.parse(SECRET),), AllowList.parse(["127.0.0.1"]), timeout_s)
    return WebhookSink("ops", options)


def outbox_of(store: SqliteStore, *sinks: Sink, **limits: int) -> Outbox:
    return Outbox(store, AuditLog(store), sinks=[sink.name for sink in sinks], limits=Limits(**limits))


@contextmanager
def dispatching(
    outbox: Outbox,
    *sinks: Sink,
    retry: RetryPolicy = QUICK,
    poll_s: float = 30.0,
    margin_s: float = 30.0,
    threads: int = 2,
) -> Iterator[Dispatcher]:
    """With so long a poll, what arrives soon arrives because somebody was woken."""
    dispatcher = Dispatcher(
        outbox, sinks, retry=retry, poll_s=poll_s, lease_margin_s=margin_s, threads_per_sink=threads
    )
    dispatcher.start()
    try:
        yield dispatcher
    finally:
        assert dispatcher.stop(20)


def event(key: str) -> Event:
    return Event("io.tidegate.test", "/models/m", "m:1", key)


def settled(outbox: Outbox, timeout_s: float = 30.0) -> dict[str, int]:
    """Deliveries by state, once none is open any more."""
    deadline = time.monotonic() + timeout_s
    while any(state != "dead" for _, state in outbox.census()):
        assert time.monotonic() < deadline, outbox.census()
        time.sleep(0.005)  # the store tells nobody
    return Counter(delivery.state for delivery in outbox.list(1000))


def test_events_are_delivered_signed_and_once(store: SqliteStore, receiver: Receiver) -> None:
    sink = webhook(receiver)
    outbox = outbox_of(store, sink)
    outbox.publish(event("before"))
    with dispatching(outbox, sink):
        for number in range(20):
            outbox.publish(event(f"k{number}"))
        got = receiver.wait(lambda got: len(got) >= 21)
        assert settled(outbox) == {"delivered": 21}
    assert Counter(received.headers["idempotency-key"] for received in got) == Counter(
        ["before", *(f"k{number}" for number in range(20))]
    )
    assert all(received.signed_by(KEY) for received in got)


def test_a_put_inside_a_long_transaction_is_seen_after_its_commit(store: SqliteStore) -> None:
    sink = Told("ops")
    outbox = outbox_of(store, sink)
    with dispatching(outbox, sink):
        with store.transaction() as connection:
            outbox.put(connection, event("a"))
            time.sleep(0.2)  # the dispatcher was told and must wait for the commit, not miss it
        sink.wait(1)


def test_a_flaky_receiver_gets_everything(store: SqliteStore, receiver: Receiver) -> None:
    """Errors, redirects, requests to wait and connections that close: each event needs some attempts of the same id."""
    seen: Counter[str] = Counter()
    lock = threading.Lock()
    troubles = [
        Answer(500),
        Answer(302, {"Location": receiver.url}),
        Answer(hang_up=True),
        Answer(429, {"Retry-After": "3600"}),
        Answer(503, {"Retry-After": "0"}, b"x" * 100_000),
    ]

    def answer(received: Received) -> Answer:
        with lock:
            seen[received.id] += 1
            count = seen[received.id]
        return troubles[count - 1] if count <= len(troubles) else Answer(200)

    receiver.answer = answer
    sink = webhook(receiver)
    outbox = outbox_of(store, sink)
    with dispatching(outbox, sink) as dispatcher:
        events = [event(str(number)) for number in range(10)]
        for each in events:
            outbox.publish(each)
        assert settled(outbox) == {"delivered": 10}
    assert dispatcher.counts["ops"].failed == 50  # written behind the outcome, and all of them once it has stopped
    assert seen == Counter({each.id: 6 for each in events})
    assert {(got.id, got.body) for got in receiver.got} == {(each.id, each.body().encode()) for each in events}


def test_refused_is_dead_at_once_and_exhausted_is_dead_at_last(store: SqliteStore) -> None:
    def act(message: Message) -> Outcome:
        return Refused("answered 410") if message.key == "gone" else Failed("answered 500")

    sink = Told("ops", act)
    outbox = outbox_of(store, sink)
    with dispatching(outbox, sink, retry=RetryPolicy(0.001, 0.001, max_attempts=4)) as dispatcher:
        outbox.publish(event("gone"))
        outbox.publish(event("never"))
        assert settled(outbox) == {"dead": 2}
    assert dispatcher.counts["ops"].dead == 2
    found = {delivery.key: (delivery.attempts, delivery.error) for delivery in outbox.list(10)}
    assert found == {"gone": (1, "answered 410"), "never": (4, "answered 500 (attempt 4 of 4)")}
    assert [row.event.action for row in AuditLog(store).tail(10)] == ["hook.dead", "hook.dead"]


def test_a_retry_from_outside_is_found_by_the_poll(store: SqliteStore) -> None:
    answers: Iterator[Outcome] = iter([Refused("no"), Delivered()])
    sink = Told("ops", lambda _: next(answers))
    outbox = outbox_of(store, sink)
    with dispatching(outbox, sink, poll_s=0.02):
        outbox.publish(event("a"))
        assert settled(outbox) == {"dead": 1}
        outbox_of(store, sink).retry(None, actor="test")  # another object: nobody is woken
        sink.wait(2)
        assert settled(outbox) == {"delivered": 1}


def test_a_sink_that_hangs_holds_up_no_other(store: SqliteStore) -> None:
    release = threading.Event()

    def hang(_: Message) -> Outcome:
        release.wait(20)
        return Delivered()

    stuck, well = Told("stuck", hang), Told("well")
    outbox = outbox_of(store, stuck, well)
    try:
        with dispatching(outbox, stuck, well, threads=2):
            for number in range(10):
                outbox.publish(event(str(number)))
            assert len(well.wait(10)) == 10
            assert len(stuck.wait(2)) == 2  # as many as it has threads
            release.set()
            assert settled(outbox) == {"delivered": 20}
    finally:
        release.set()


def test_a_broken_sink_costs_attempts_not_the_thread(store: SqliteStore) -> None:
    outcomes: Iterator[Exception | None] = iter([ValueError("no"), KeyError("no"), None])

    def act(_: Message) -> Outcome:
        if (error := next(outcomes)) is not None:
            raise error
        return Delivered()

    sink = Told("ops", act)
    outbox = outbox_of(store, sink)
    with capture_logs() as lines, dispatching(outbox, sink):
        outbox.publish(event("a"))
        assert settled(outbox) == {"delivered": 1}
    assert [line["event"] for line in lines].count("sink_broken") == 2


def test_a_mistake_of_our_own_costs_time_not_the_thread(store: SqliteStore) -> None:
    outcomes: Iterator[Outcome] = iter([Failed("no"), Delivered()])
    draws: Iterator[Exception | float] = iter([ZeroDivisionError(), 0.5])

    def draw() -> float:
        if isinstance(drawn := next(draws), Exception):
            raise drawn
        return drawn

    sink = Told("ops", lambda _: next(outcomes))
    outbox = outbox_of(store, sink)
    dispatcher = Dispatcher(outbox, [sink], retry=QUICK, draw=draw)
    with capture_logs() as lines:
        dispatcher.start()
        outbox.publish(event("a"))
        assert settled(outbox) == {"delivered": 1}
        assert dispatcher.stop(10)
    assert "outcome_not_written" in [line["event"] for line in lines]


def test_two_dispatchers_share_the_work(store: SqliteStore, tmp_path: Path) -> None:
    first, second = Told("ops"), Told("ops")
    outbox = outbox_of(store, first)
    with (
        closing(SqliteStore(tmp_path / "tidegate.db")) as other,
        dispatching(outbox, first, poll_s=0.01),
        dispatching(outbox_of(other, second), second, poll_s=0.01),
    ):
        for number in range(60):
            outbox.publish(event(str(number)))
        assert settled(outbox) == {"delivered": 60}
    assert sorted(message.key for message in first.wait(0) + second.wait(0)) == sorted(map(str, range(60)))


def test_an_abandoned_lease_is_taken_over_when_it_ends(store: SqliteStore) -> None:
    sink = Told("ops")
    outbox = outbox_of(store, sink)
    outbox.publish(event("a"))
    dead = outbox.claim("ops", "one that died", 0.3, max_attempts=9)
    assert dead is not None
    with dispatching(outbox, sink, poll_s=0.02):
        (message,) = sink.wait(1)
        assert time.time_ns() >= dead.until_ns
        assert settled(outbox) == {"delivered": 1}
    assert message == dead.message


def test_the_lease_of_a_dead_process_of_this_host_is_taken_over_at_once(store: SqliteStore, tmp_path: Path) -> None:
    sink = Told("ops")
    outbox = outbox_of(store, sink)
    for key in ("a", "b"):
        outbox.publish(event(key))
    code = f"""
from pathlib import Path
from server.audit import AuditLog
from server.delivery.owners import own_name
from server.outbox import Outbox
from server.store.sqlite import SqliteStore
store = SqliteStore(Path({str(tmp_path / "tidegate.db")!r}))
assert Outbox(store, AuditLog(store)).claim("ops", own_name(), 36000.0, max_attempts=9)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert outbox.claim("ops", "elsewhere:1:2:3", 36000.0, max_attempts=9) is not None
    with dispatching(outbox, sink, margin_s=36000.0):
        assert [message.key for message in sink.wait(1)] == ["a"]
        until_delivered(outbox, "a")
        states = {delivery.key: (delivery.state, delivery.attempts) for delivery in outbox.list(9)}
        assert states == {"a": ("delivered", 2), "b": ("leased", 1)}


def until_delivered(outbox: Outbox, key: str) -> None:
    deadline = time.monotonic() + 30
    while ("delivered", key) not in {(delivery.state, delivery.key) for delivery in outbox.list(9)}:
        assert time.monotonic() < deadline, outbox.list(9)
        time.sleep(0.005)  # the store tells nobody


def test_a_clock_that_was_set_back_a_few_hours_holds_nothing_up(store: SqliteStore) -> None:
    sink, ahead_s = Told("ops"), [5 * 3600]

    def clock() -> int:
        return time.time_ns() + ahead_s[0] * NS_PER_S

    outbox = Outbox(store, AuditLog(store), sinks=["ops"], clock=clock)
    outbox.publish(event("a"))
    lease = outbox.claim("ops", "me", 30.0, max_attempts=9)
    assert lease is not None
    outbox.failed(lease, "no", 60.0)
    ahead_s[0] = 0
    with dispatching(outbox, sink, poll_s=0.02):
        sink.wait(1)
        assert settled(outbox) == {"delivered": 1}


def test_stop_lets_what_is_being_sent_end(store: SqliteStore) -> None:
    sending, release = threading.Event(), threading.Event()

    def act(_: Message) -> Outcome:
        sending.set()
        release.wait(10)
        return Delivered()

    sink = Told("ops", act)
    outbox = outbox_of(store, sink)
    dispatcher = Dispatcher(outbox, [sink], retry=QUICK, threads_per_sink=1)
    dispatcher.start()
    outbox.publish(event("a"))
    outbox.publish(event("b"))
    assert sending.wait(10)
    with capture_logs() as lines:
        assert dispatcher.stop(0.05) is False
    assert [line["event"] for line in lines] == ["delivery_cut_off"]
    release.set()
    assert dispatcher.stop(10) is True
    assert Counter(delivery.state for delivery in outbox.list(9)) == {"delivered": 1, "pending": 1}
    assert len(sink.wait(1)) == 1


def test_stop_is_quick_when_nothing_is_sent(store: SqliteStore) -> None:
    sink = Told("ops")
    outbox = outbox_of(store, sink)
    began = time.monotonic()
    with dispatching(outbox, sink):
        pass
    assert time.monotonic() - began < 15  # half of its poll
    outbox.publish(event("a"))  # nobody listens any more
    assert sink.wait(0) == []


def test_a_store_that_is_held_by_another_is_waited_for(tmp_path: Path) -> None:
    """An outcome that cannot be written at once is written later, and the event is not sent a second time for it."""
    answered = threading.Event()

    def act(_: Message) -> Outcome:
        answered.wait(10)
        return Delivered()

    sink = Told("ops", act)
    path = tmp_path / "tidegate.db"
    with closing(SqliteStore(path, busy_timeout_s=0.05)) as store, closing(SqliteStore(path)) as holder:
        outbox = outbox_of(store, sink)
        with capture_logs() as lines, dispatching(outbox, sink, poll_s=0.05):
            outbox.publish(event("a"))
            sink.wait(1)
            with holder.transaction():
                answered.set()
                deadline = time.monotonic() + 30
                while not any(line["event"] == "outcome_not_written" for line in lines):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            assert settled(outbox) == {"delivered": 1}
        assert len(sink.wait(1)) == 1


def test_the_metrics(store: SqliteStore) -> None:
    sink = Told("ops", lambda message: Refused("no") if message.key == "dead" else Delivered())
    outbox = outbox_of(store, sink, max_pending=1)
    with dispatching(outbox, sink) as dispatcher:
        outbox.publish(event("dead"))
        settled(outbox)
        outbox.publish(event("a"))
        settled(outbox)
    assert outbox.publish(event("waits"))
    with pytest.raises(Exception, match="1 events wait"):
        outbox.publish(event("refused"))
    dispatcher.census = outbox.census()
    values = {family.name: dict(family.points) for family in families(dispatcher)}
    assert values == {
        "tidegate_outbox_pending": {("ops",): 1},
        "tidegate_outbox_dead": {("ops",): 1},
        "tidegate_outbox_delivered_total": {("ops",): 1},
        "tidegate_outbox_failed_attempts_total": {("ops",): 1},
        "tidegate_outbox_given_up_total": {("ops",): 1},
        "tidegate_outbox_refused_total": {(): 1},
    }


def test_the_census_is_taken_by_the_dispatcher_itself(store: SqliteStore) -> None:
    sink = Told("ops")
    outbox = outbox_of(store, sink)
    outbox.publish(event("a"), sinks=["elsewhere"])
    with dispatching(outbox, sink) as dispatcher:
        deadline = time.monotonic() + 30
        while not dispatcher.census:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert dispatcher.census == {("elsewhere", "pending"): 1}
