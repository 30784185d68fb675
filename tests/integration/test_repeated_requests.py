"""A head that the server has read before is not parsed again: everything else about a request stays as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from tests.support import models
from tests.support.metrics import wait_total
from tests.support.server import Server, serving
from tests.support.wire import Answer, Wire, post

PATH = "/v2/models/affine/infer"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    state = str(tmp_path_factory.mktemp("state"))
    with serving("--model-repository", str(root), "--state-dir", state, "--transport", "native") as running:
        yield running
        assert not [line for line in running.lines if line.get("event") == "request_failed"]


@pytest.fixture
def wire(server: Server) -> Iterator[Wire]:
    with Wire(server.http) as connection:
        yield connection
    wait_total(server, "tidegate_pending_requests", 0)


def body(first: int, id: str = "aaaa") -> bytes:
    """Bodies of one length, so that their heads are the same."""
    data = [first, 2, 3, 4]
    return json.dumps({"id": id, "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": data}]}).encode()


def check(answer: Answer | None, first: int, id: str = "aaaa") -> None:
    """``y = 2 x + 1``."""
    assert answer is not None
    assert answer.status == 200, answer.body
    assert (answer.body["id"], answer.body["outputs"][0]["data"]) == (id, [2.0 * first + 1, 5.0, 7.0, 9.0])


def settle(wire: Wire, headers: dict[str, str] | None = None) -> None:
    """Have the head known: it was read, and it came again."""
    for first in (1, 2, 3):
        wire.send(post(PATH, body(first), headers))
        check(wire.answer(), first)


def test_each_request_is_answered_from_its_own_body(wire: Wire, server: Server) -> None:
    settle(wire)
    tidegate_ids = set()
    for first in range(1, 9):
        wire.send(post(PATH, body(first, f"id-{first}")))
        answer = wire.answer()
        check(answer, first, f"id-{first}")
        assert answer is not None
        tidegate_ids.add(answer.headers["x-tidegate-id"])
    assert len(tidegate_ids) == 8
    with Wire(server.http) as other:  # what is known is known to all connections, from their first request on
        other.send(post(PATH, body(5)))
        check(other.answer(), 5)


@pytest.mark.parametrize("cut", [1, 10, 60, -1, -20])
def test_a_request_in_two_pieces(wire: Wire, cut: int) -> None:
    settle(wire)
    request = post(PATH, body(7))
    for piece in (request[:cut], request[cut:]):
        wire.send(piece)
        # The pieces are to arrive apart: an answer on another connection says that the loop has been round.
        with Wire("{}:{}".format(*wire.socket.getpeername())) as other:
            other.send(post(PATH, body(1)))
            check(other.answer(), 1)
    check(wire.answer(), 7)
    wire.send(request)
    check(wire.answer(), 7)


def test_requests_behind_each_other_in_one_piece(wire: Wire) -> None:
    settle(wire)
    wire.send(b"".join([post(PATH, body(first)) for first in range(1, 6)]))
    for first in range(1, 6):
        check(wire.answer(), first)
    wire.send(post(PATH, body(8)) + post(PATH, body(9))[:30])
    check(wire.answer(), 8)
    wire.send(post(PATH, body(9))[30:])
    check(wire.answer(), 9)


def test_what_follows_a_body_is_no_part_of_it(wire: Wire) -> None:
    settle(wire)
    wire.send(post(PATH, body(6)) + b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n" + post(PATH, body(7)))
    check(wire.answer(), 6)
    live = wire.answer()
    assert live is not None
    assert live.status == 200
    check(wire.answer(), 7)
    wire.send(post(PATH, body(6)) + b"\r\n")
    check(wire.answer(), 6)
    wire.send(b"\r\n" + post(PATH, body(6)))
    check(wire.answer(), 6)
    wire.send(post(PATH, body(6)) + b"SMUGGLED\r\n\r\n")
    check(wire.answer(), 6)
    refused = wire.answer()
    assert refused is not None
    assert refused.status == 400


def test_a_head_of_other_line_ends_is_read_every_time(wire: Wire) -> None:
    """Its end is not where an empty line of the usual form is: here that stands in the body."""
    text = body(7) + b" " * 40 + b"\r\n\r\n"
    text += b" " * (200 - len(text))
    head = b"POST %b HTTP/1.1\nHost: test\nContent-Length: 200\n\n" % PATH.encode()
    after = b"\r\n" * ((200 - len(text[text.index(b"\r\n\r\n") + 4 :])) // 2)
    for _ in range(3):
        wire.send(head + text + after)
        answer = wire.answer()
        assert answer is not None
        if answer.status == 400:
            return  # the parser takes no such line ends
        check(answer, 7)
    wire.send(head + text + post(PATH, body(8)))
    check(wire.answer(), 7)
    check(wire.answer(), 8)


def test_a_wrong_body_under_a_known_head(wire: Wire) -> None:
    settle(wire)
    good = body(1)
    for wrong in (b"x" * len(good), good.replace(b'"x"', b'"z"'), good.replace(b"FP32", b"FP64")):
        wire.send(post(PATH, wrong))
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 400
        assert answer.body["error"]
        wire.send(post(PATH, good))
        check(wire.answer(), 1)


def test_heads_that_say_how_a_connection_ends(server: Server) -> None:
    for headers, version in (({"Connection": "close"}, "1.1"), ({}, "1.0")):
        for _ in range(4):
            with Wire(server.http) as wire:
                wire.send(post(PATH, body(3), headers, version=version))
                check(wire.answer(), 3)
                assert wire.closed()


def test_heads_that_ask_for_more_are_read_every_time(wire: Wire) -> None:
    for first in (1, 2, 3, 4):
        request = post(PATH, body(first), {"Expect": "100-continue"})
        head, _, rest = request.partition(b"\r\n\r\n")
        wire.send(head + b"\r\n\r\n")
        interim = wire.answer()
        assert interim is not None
        assert interim.status == 100
        wire.send(rest)
        check(wire.answer(), first)


def test_a_deadline_counts_from_its_own_request(wire: Wire) -> None:
    headers = {"x-tidegate-timeout-ms": "60000"}
    settle(wire, headers)
    for first in range(1, 5):
        wire.send(post(PATH, body(first), headers))
        check(wire.answer(), first)


def test_metadata_belong_to_their_head(wire: Wire) -> None:
    """The request of another user has another head, however alike."""
    for user in ("a", "b"):
        settle(wire, {"x-user": user})
    for trace in range(1, 4):
        parent = f"00-{trace:032x}-{trace:016x}-01"
        wire.send(post(PATH, body(trace), {"traceparent": parent}))
        check(wire.answer(), trace)


def test_binary_contents_under_a_known_head(wire: Wire) -> None:
    text = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    for first in range(1, 7):
        x = np.array([first, 2, 3, 4], "<f4")
        wire.send(post(PATH, text + x.tobytes(), {"Inference-Header-Content-Length": str(len(text))}))
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 200
        size = int(answer.headers["inference-header-content-length"])
        assert np.frombuffer(answer.body[size:], "<f4").tolist() == (2 * x + 1).tolist()


def test_a_client_that_leaves_loses_only_its_own(server: Server) -> None:
    with Wire(server.http) as stays:
        settle(stays)
        for _ in range(20):
            with Wire(server.http) as leaves:
                leaves.send(post(PATH, body(4)))
        stays.send(post(PATH, body(5)))
        check(stays.answer(), 5)
    wait_total(server, "tidegate_pending_requests", 0)


def test_a_drain_ends_connections_after_their_answer(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("repository")
    models.affine(root / "affine" / "1" / "model.onnx")
    state = str(tmp_path_factory.mktemp("state"))
    options = ("--model-repository", str(root), "--state-dir", state, "--transport", "native")
    with serving(*options) as running, Wire(running.http) as idle, Wire(running.http) as busy:
        settle(idle)
        settle(busy)
        busy.send(post(PATH, body(9))[:-5])
        wait_total(running, "tidegate_requests_in_flight", 1)
        running.process.terminate()
        running.wait_for("draining")
        busy.send(post(PATH, body(9))[-5:])
        answer = busy.answer()
        check(answer, 9)
        assert answer is not None
        assert answer.headers["connection"] == "close"
        assert busy.closed()
        assert idle.closed()


def test_many_different_heads_are_no_burden(wire: Wire) -> None:
    for number in range(1200):
        wire.send(post(PATH, body(2), {"x-number": str(number)}))
        check(wire.answer(), 2)
    settle(wire)
