"""The hot path's own matching, compared with what a router would do, the deadline header, and callers who leave."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.codec.process.steps import Steps
from server.errors import Cancelled, InvalidArgument
from server.transport.answers import HttpSettings
from server.transport.http_infer import InferApp, deadline_of, match_infer
from server.transport.status import StatusTable
from server.types import RequestLimits
from tests.support.echo import EchoCatalog, EchoPort

ROUTE = re.compile(rb"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer", re.DOTALL)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"/v2/models/m/infer", (b"m", b"")),
        (b"/v2/models/m/versions/3/infer", (b"m", b"3")),
        (b"/v2/models/versions/infer", (b"versions", b"")),
        (b"/v2/models/versions/versions/infer/infer", (b"versions", b"infer")),
        (b"/v2/models/%2e%2e/infer", (b"%2e%2e", b"")),
        (b"/v2/models/infer", None),
        (b"/v2/models//infer", None),
        (b"/v2/models/m/versions//infer", None),
        (b"/v2/models//versions/1/infer", None),
        (b"/v2/models/m/version/1/infer", None),
        (b"/v2/models/m/infer/", None),
        (b"/v2/models/m/Infer", None),
        (b"/v2/models/../x/infer", None),
        (b"/v2/models/", None),
        (b"", None),
    ],
)
def test_match(path: bytes, target: tuple[bytes, bytes] | None) -> None:
    assert match_infer(path) == target


@given(st.lists(st.sampled_from([b"v2", b"models", b"m", b"versions", b"1", b"infer", b""]), max_size=8))
def test_match_agrees_with_the_route(parts: list[bytes]) -> None:
    path = b"/" + b"/".join(parts)
    expected = ROUTE.fullmatch(path)
    assert match_infer(path) == (expected and (expected[1], expected[2] or b""))


def test_deadline() -> None:
    assert deadline_of({}, 5) == 0
    assert deadline_of({"x-tidegate-timeout-ms": "20"}, 5) == 20_000_005
    assert deadline_of({"x-tidegate-timeout-ms": "9" * 12}, 5) == (10**12 - 1) * 1_000_000 + 5
    for text in ("", "0", "-1", "1.5", "1e3", "9" * 13, "9" * 5000, "\u0663", "x"):
        with pytest.raises(InvalidArgument, match="whole number of milliseconds from 1 to 999999999999, got"):
            deadline_of({"x-tidegate-timeout-ms": text}, 5)


def test_a_client_who_leaves_while_the_answer_is_written_has_cancelled() -> None:
    port = EchoPort(RequestLimits())
    app = InferApp(port, EchoCatalog(), unused, statuses=StatusTable(), settings=HttpSettings())
    x = {"name": "x", "datatype": "BYTES", "shape": [100_000], "data": ["a"] * 100_000}
    body = json.dumps({"inputs": [x], "parameters": {"binary_data_output": True}}).encode()
    came: list[dict[str, Any]] = [
        {"type": "http.disconnect"},  # whenever it is looked for once the body is there
        {"type": "http.request", "body": body, "more_body": False},
    ]
    sent: list[Any] = []
    others = True

    def of_others() -> Steps[None]:
        while others:
            yield

    async def receive() -> dict[str, Any]:
        return came.pop()

    async def send(message: Any) -> None:
        sent.append(message)

    async def whole() -> None:
        nonlocal others
        holding = asyncio.create_task(app.turns.take(of_others()))
        await asyncio.sleep(0)
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "raw_path": b"/v2/models/echo/infer",
            "headers": [],
            "client": None,
        }
        await asyncio.wait_for(app(scope, receive, send), 20)
        others = False
        await holding

    asyncio.run(whole())
    assert port.written == ["cancelled"]
    assert len(port.released) == 1
    assert sent[0]["status"] == StatusTable().of(Cancelled("")).http


async def unused(*_: object) -> None:
    raise AssertionError
