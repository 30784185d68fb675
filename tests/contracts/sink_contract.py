"""What every ``server.delivery.base.Sink`` owes its dispatcher, as tests to inherit.

Subclass ``SinkContract`` in a test module and implement ``case``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest

from server.delivery.base import Delivered, Failed, Refused, Sink
from server.outbox import Event, Message

#: A sink that was cut off has to give up after its timeout, give or take a busy machine.
SLACK_S = 5.0


@dataclass(frozen=True)
class Case:
    """A sink named ``ops`` that works, what it has passed on so far (event ids), and ways to have it fail."""

    sink: Sink
    passed_on: Callable[[], list[str]]
    #: Sinks whose other side is broken, silent or gone; none when nothing can go wrong.
    broken: tuple[Sink, ...] = ()


def message(key: str = "k", **data: object) -> Message:
    event = Event("io.tidegate.test", "/models/m", "m:1", key, data)
    return Message(event.id, event.key, event.type, event.subject, time.time_ns(), event.body().encode())


class SinkContract:
    def case(self) -> AbstractContextManager[Case]:
        raise NotImplementedError

    @pytest.fixture
    def subject(self) -> Iterator[Case]:
        with self.case() as case:
            yield case

    def test_has_a_name_and_a_bound_on_time(self, subject: Case) -> None:
        assert subject.sink.name == "ops"
        assert 0 < subject.sink.timeout_s <= 3600

    def test_passes_an_event_on(self, subject: Case) -> None:
        sent = message(text="ключ", number=1.5, inside={"a": [1, None]})
        assert subject.sink.send(sent) == Delivered()
        assert subject.passed_on() == [sent.id]

    def test_passes_an_event_on_again_when_asked_again(self, subject: Case) -> None:
        sent = message()
        assert [subject.sink.send(sent), subject.sink.send(sent)] == [Delivered(), Delivered()]
        assert set(subject.passed_on()) == {sent.id}

    def test_takes_the_largest_event(self, subject: Case) -> None:
        sent = message(text="x" * 65_000)
        assert len(sent.body) > 65_000
        assert subject.sink.send(sent) == Delivered()

    def test_is_called_from_several_threads_at_once(self, subject: Case) -> None:
        events = [message(str(number)) for number in range(8)]
        barrier = threading.Barrier(len(events))

        def send(event: Message) -> object:
            barrier.wait()
            return subject.sink.send(event)

        with ThreadPoolExecutor(len(events)) as pool:
            assert list(pool.map(send, events)) == [Delivered()] * len(events)
        assert sorted(subject.passed_on()) == sorted(event.id for event in events)

    def test_tells_failures_in_time_and_without_raising(self, subject: Case) -> None:
        for sink in subject.broken:
            began = time.monotonic()
            outcome = sink.send(message())
            assert time.monotonic() - began < sink.timeout_s + SLACK_S
            assert isinstance(outcome, Failed | Refused)
            assert outcome.reason
            assert json.dumps(outcome.reason)
