"""What the process does with a job is what the gateway would have done, to the byte."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from server.codec.json import decode_infer, encode_infer
from server.codec.process import messages, worker
from server.codec.process.link import reap, start
from server.codec.process.messages import HELLO, NOTICE_BYTES, Notice, packed_head
from server.codec.process.shared import SharedFile
from server.codec.process.steps import at_once
from server.errors import InvalidArgument
from server.types import Buffer, InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor
from tests.support import hostile

LIMITS = RequestLimits(max_json_depth=8, max_id_bytes=8, max_parameters=3)
GOOD = {
    "id": "a",
    "parameters": {"p": 1, "binary_data_output": False},
    "inputs": [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]},
        {"name": "i", "shape": [2], "datatype": "INT64", "data": [3, 4.0]},
        {"name": "s", "shape": [2], "datatype": "BYTES", "data": ["é", ""]},
    ],
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}


def work(head: dict[str, Any], chunks: list[Buffer]) -> tuple[dict[str, Any], memoryview]:
    """One job as it goes over: heads and bytes only."""
    result, parts = worker.work(json.loads(packed_head(head)), memoryview(b"".join(chunks)))
    return json.loads(packed_head(result)), memoryview(b"".join(parts))


def elsewhere(body: bytes, json_size: int | None) -> InferenceRequest:
    head, data = work(messages.decode_job(json_size, LIMITS), [body])
    assert "unfit" not in head, head
    if "refused" in head:
        raise InvalidArgument(head["refused"])
    return at_once(messages.request_of(head, data, "m", "1"))


def here(body: bytes, json_size: int | None) -> InferenceRequest:
    return decode_infer(body, model="m", version="1", limits=LIMITS, json_size=json_size)


def outcome(decode: Callable[[bytes, int | None], InferenceRequest], body: bytes, json_size: int | None) -> str:
    """The request or the refusal, as text: NaN parameters are equal then."""
    try:
        request = decode(body, json_size)
    except InvalidArgument as error:
        return f"refused: {error.message}"
    for tensor in request.inputs:
        tensor.data = tensor.data if isinstance(tensor.data, list) else bytes(tensor.data)
    return repr(request)


def bodies() -> Iterator[bytes]:
    yield from (json.dumps(document).encode() for document in hostile.variants(GOOD))
    rng, whole = random.Random(8), json.dumps(GOOD).encode()
    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed)
    yield from (whole[:size] for size in range(len(whole)))
    yield b"[" * 100_000


def test_requests_and_refusals_are_the_same() -> None:
    seen = set()
    for body in bodies():
        expected = outcome(here, body, None)
        assert outcome(elsewhere, body, None) == expected, body
        seen.add(expected.startswith("refused"))
    assert seen == {True, False}


def test_binary_contents_behind_the_json() -> None:
    size = {"binary_data_size": 4}
    document = {
        "inputs": [
            {"name": "x", "shape": [4], "datatype": "INT8", "parameters": size},
            {"name": "y", "shape": [1], "datatype": "INT8", "data": [5]},
            {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}},
        ]
    }
    text = json.dumps(document).encode()
    tail = b"\xff\xfe\xfd\xfc" + b"\x02\0\0\0hi"
    for body in (text + tail, text + tail[:-1], text + tail + b"x", text):
        assert outcome(elsewhere, body, len(text)) == outcome(here, body, len(text))


def test_binary_elements_that_are_no_text_stay_with_the_gateway() -> None:
    entry = {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}}
    text = json.dumps({"inputs": [entry]}).encode()
    head, _ = work(messages.decode_job(len(text), LIMITS), [text + b"\x01\0\0\0\xff"])
    assert head.keys() == {"unfit"}


ANSWERS = [
    Tensor("y", "FP32", (2, 2), np.float32([1.5, np.nan, -np.inf, 3e-9]).tobytes()),
    Tensor("h", "FP16", (2,), np.float16([0.1, 2]).tobytes()),
    Tensor("i", "UINT64", (1,), np.uint64([2**64 - 1]).tobytes()),
    Tensor("b", "BOOL", (2,), b"\1\0"),
    Tensor("s", "BYTES", (2,), ["é".encode(), b""]),
    Tensor("e", "FP32", (0,), b""),
]


@pytest.mark.parametrize("strict_json", [False, True])
@pytest.mark.parametrize("binary_default", [False, True])
@pytest.mark.parametrize("outputs", [[], [RequestedOutput("y", True), RequestedOutput("s", False)]])
def test_answers_are_the_same(outputs: list[RequestedOutput], binary_default: bool, strict_json: bool) -> None:
    response = InferenceResponse("m", "1", "é", ANSWERS, {"p": 1.5})
    options: dict[str, Any] = {"outputs": outputs, "binary_default": binary_default, "strict_json": strict_json}
    job, sent, kept = at_once(messages.encode_job(response, outputs, binary_default, strict_json))
    head, data = work(job, sent)
    expected: tuple[dict[str, Any], list[bytes]]
    try:
        chunks, json_size = encode_infer(response, **options)
    except InvalidArgument as error:
        expected = {"refused": error.message}, [b""]
        kept = []
    else:
        expected = {"json_size": json_size}, [bytes(chunk) for chunk in chunks]
    assert (head, [bytes(chunk) for chunk in (data, *kept)]) == expected


def test_contents_that_are_no_json_stay_with_the_gateway() -> None:
    response = InferenceResponse(
        "m", "1", "", [Tensor("y", "INT8", (9000,), bytes(9000)), Tensor("z", "BYTES", (1,), [b"\xff"]), ANSWERS[2]]
    )
    outputs = [RequestedOutput("y", True), RequestedOutput("z", True)]
    _, sent, kept = at_once(messages.encode_job(response, outputs, False, False))
    assert kept == [bytes(9000), b"\x01\0\0\0\xff"]
    assert b"".join(sent) == bytes(response.outputs[2].data).ljust(16, b"\0")  # type: ignore[arg-type]


def test_what_goes_wrong_unexpectedly_is_the_gateways_to_meet() -> None:
    response = InferenceResponse("m", "1", "\ud800", ANSWERS)
    with pytest.raises(TypeError):
        encode_infer(response, outputs=[], binary_default=False)
    job, sent, _ = at_once(messages.encode_job(response, [], False, False))
    head, data = work(job, sent)
    assert head.keys() == {"unfit"}
    assert not data


@pytest.fixture
def served() -> Iterator[tuple[socket.socket, list[SharedFile]]]:
    """The loop of the process, in a thread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    files = [SharedFile.create() for _ in range(2)]
    thread = threading.Thread(target=worker.serve, args=(theirs, files))
    thread.start()
    ours.settimeout(10)
    assert ours.recv(NOTICE_BYTES) == HELLO
    yield ours, files
    ours.close()
    thread.join(10)
    assert not thread.is_alive()
    theirs.close()
    for file in files:
        file.close()


def put(file: SharedFile, number: int, body: bytes) -> Notice:
    head = packed_head(messages.decode_job(None, LIMITS))
    return Notice(number, len(head), at_once(file.write([head, body])))


def test_jobs_are_answered_in_turn_where_they_lay(served: tuple[socket.socket, list[SharedFile]]) -> None:
    gateway, files = served
    bodies = [json.dumps(GOOD).encode(), b"[]"]
    for notice in [put(file, number, bodies[number]) for number, file in enumerate(files)]:
        gateway.send(notice.packed())
    for number, file in enumerate(files):
        notice = Notice.unpacked(gateway.recv(NOTICE_BYTES))
        assert notice.file == number
        head, _ = messages.parted(notice, at_once(file.read(notice.size)))
        assert ("inputs" in head, "refused" in head) == (number == 0, number == 1)


def test_a_job_that_was_given_up_is_not_done(served: tuple[socket.socket, list[SharedFile]]) -> None:
    gateway, files = served
    notice = put(files[0], 0, json.dumps(GOOD).encode())
    files[0].empty()
    gateway.send(notice.packed())
    answer = Notice.unpacked(gateway.recv(NOTICE_BYTES))
    assert messages.parted(answer, at_once(files[0].read(answer.size)))[0] == {"unfit": "given up"}


def ended(pid: int, timeout_s: float = 20) -> bool:
    """Whether a process comes to its end."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def test_the_process_outlives_signals_and_ends_with_the_gateway() -> None:
    started = start(20)
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            started.process.send_signal(number)
        started.socket.settimeout(10)
        started.socket.send(put(started.files[1], 1, b"{}").packed())
        assert Notice.unpacked(started.socket.recv(NOTICE_BYTES)).file == 1
        started.socket.close()
        assert ended(started.process.pid)
        assert started.process.wait(10) == 0
    finally:
        reap(started.process)
        for file in started.files:
            file.close()
