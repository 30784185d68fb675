"""loadtests.floors.ngh2_echo at the level of frames: all of unary gRPC, so that its cost is that of a whole echo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loadtests.models import MODEL, write_model
from loadtests.servers import floor
from server._pb import inference_pb2 as pb
from tests.support.http2 import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    Http2Wire,
    block,
    frame,
    grpc_message,
    opened,
    reset,
    window,
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / f"{MODEL}.onnx")
    with floor("ngh2", folder) as target:
        yield target.grpc


def right(body: bytes) -> bool:
    """One uncompressed message, which is the model's answer."""
    return (
        body[:5] == b"\0" + (len(body) - 5).to_bytes(4)
        and pb.ModelInferResponse.FromString(body[5:]).model_name == MODEL
    )


def test_calls_are_answered_whatever_their_pieces(address: str) -> None:
    message = grpc_message(bytes(20_000))
    with Http2Wire(address) as wire:
        one = wire.call(1, b"question")
        assert (one.status, one.headers["content-type"]) == ("0", "application/grpc")
        assert right(one.body)
        wire.send(opened(3) + frame(DATA, 0, 3, message[:2]) + opened(5) + frame(DATA, 0, 3, message[2:9000]))
        wire.send(frame(DATA, END_STREAM, 5, grpc_message(b"")))
        assert right(wire.answer(5).body)
        wire.send(frame(DATA, 0, 3, message[9000:]) + frame(DATA, END_STREAM, 3))
        assert right(wire.answer(3).body)
        wire.send(opened(7) + frame(DATA, 0, 7, message[:9000]) + frame(DATA, 0, 7, message[9000:]))
        wire.send(frame(HEADERS, END_HEADERS | END_STREAM, 7, block([("x-last", "word")])))  # ended by trailers
        assert right(wire.answer(7).body)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (opened(1, end=True), "13"),
        (opened(1) + frame(DATA, END_STREAM, 1, b"\0\0"), "13"),
        (opened(1) + frame(DATA, END_STREAM, 1, b"\0\0\0\0\2x"), "13"),
        (opened(1) + frame(DATA, END_STREAM, 1, grpc_message(b"x") * 2), "13"),
        (opened(1) + frame(DATA, END_STREAM, 1, grpc_message(b"x", 1)), "12"),
        (opened(1, path="/inference.GRPCInferenceService/Other") + frame(DATA, END_STREAM, 1, b"anything"), "12"),
    ],
)
def test_what_is_no_call_has_its_status(address: str, sent: bytes, status: str) -> None:
    with Http2Wire(address) as wire:
        wire.send(sent)
        assert wire.answer(1).status == status
        assert wire.call(3, b"question").status == "0"


def test_a_call_that_is_reset_leaves_its_neighbours(address: str) -> None:
    whole = frame(DATA, END_STREAM, 3, grpc_message(b"x"))
    with Http2Wire(address) as wire:
        # Before its end, and in the same read as its end.
        wire.send(opened(1) + reset(1) + opened(3) + whole + reset(3) + opened(5))
        wire.send(frame(DATA, END_STREAM, 5, grpc_message(b"x")))
        assert wire.answer(5).status == "0"
        assert wire.call(7, b"question").status == "0"


def test_windows_are_kept_and_given_back(address: str) -> None:
    with Http2Wire(address) as wire:
        wire.send(opened(1))
        wire.upload(1, grpc_message(bytes(20_000_000)))  # more than the windows of stream and connection
        assert wire.answer(1).status == "0"
    with Http2Wire(address, own={4: 10}, generous=False) as slow:
        slow.send(opened(1) + frame(DATA, END_STREAM, 1, grpc_message(b"x")))
        slow.settled()
        assert len(slow.answers[1].body) == 10
        slow.send(window(1, 100_000))
        assert right(slow.answer(1).body)


def test_what_breaks_the_protocol_ends_the_connection(address: str) -> None:
    with Http2Wire(address) as wire:
        wire.send(frame(DATA, 0, 0, b"on no stream"))
        assert wire.closed() is not None
    with Http2Wire(address) as other:
        assert other.call(1, b"question").status == "0"
