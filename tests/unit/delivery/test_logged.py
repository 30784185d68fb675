"""The log as a sink: the contract, and the line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from structlog.testing import capture_logs

from server.delivery.logged import LogSink
from tests.contracts.sink_contract import Case, SinkContract, message


class TestLogSink(SinkContract):
    @contextmanager
    def case(self) -> Iterator[Case]:
        with capture_logs() as lines:
            yield Case(LogSink("ops"), lambda: [line["id"] for line in lines])


def test_the_level_is_a_choice() -> None:
    with capture_logs() as lines:
        LogSink("ops", "error").send(message())
    assert [line["log_level"] for line in lines] == ["error"]


def test_the_line_has_the_event_in_it() -> None:
    sent = message("key-1", psi=0.3)
    with capture_logs() as lines:
        LogSink("ops").send(sent)
    (line,) = lines
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "outbox_event",
        "log_level": "warning",
        "sink": "ops",
        "id": sent.id,
        "type": "io.tidegate.test",
        "subject": "m:1",
        "idempotency_key": "key-1",
        "data": {"psi": 0.3},
    }
