"""The codec process: one job after the other, until the gateway is gone. It keeps nothing between two jobs.

Started by ``client`` with the socket's and the shared files' descriptors as arguments.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, Final

from server.codec.json import decode_infer, encode_infer
from server.codec.process.messages import (
    HELLO,
    NOTICE_BYTES,
    Notice,
    decoded,
    limits_of,
    packed_head,
    parted,
    response_of,
    unpacked_outputs,
)
from server.codec.process.shared import CutOffError, SharedFile
from server.codec.process.steps import at_once
from server.errors import InvalidArgument
from server.types import Buffer

#: A tenth of the share that the gateway gets, when both want the same processor.
_NICE: Final = 10


def main(arguments: list[str]) -> None:
    """Serve the socket ``arguments[0]`` over the files in the rest."""
    # A signal to the whole group is the gateway's affair: it drains, and this process ends when it does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Where processors are short, small requests of the gateway go first: who sent a large body waits anyway.
    os.nice(_NICE)
    descriptors = [int(argument) for argument in arguments]
    with socket.socket(fileno=descriptors[0]) as gateway:
        serve(gateway, [SharedFile(fd) for fd in descriptors[1:]])


def serve(gateway: socket.socket, files: list[SharedFile]) -> None:
    """Until the other end is closed."""
    try:
        gateway.send(HELLO)
        while data := gateway.recv(NOTICE_BYTES):
            notice = Notice.unpacked(data)
            gateway.send(_answer(notice, files[notice.file]).packed())
    except ConnectionError:
        return


def _answer(notice: Notice, file: SharedFile) -> Notice:
    try:
        head, data = parted(notice, at_once(file.read(notice.size)))
    except CutOffError:
        result: dict[str, Any] = {"unfit": "given up"}
        chunks: list[Buffer] = []
    else:
        result, chunks = work(head, data)
    try:
        return _written(notice.file, file, result, chunks)
    except OSError:  # no memory for the result
        file.empty()
        return _written(notice.file, file, {"unfit": "memory"}, [])


def _written(number: int, file: SharedFile, result: dict[str, Any], chunks: list[Buffer]) -> Notice:
    text = packed_head(result)
    return Notice(number, len(text), at_once(file.write([text, *chunks])))


def work(head: dict[str, Any], data: memoryview) -> tuple[dict[str, Any], list[Buffer]]:
    """One job's result: its own, ``refused`` with the error's text, or ``unfit`` where the gateway is to do it."""
    try:
        return _decode(head, data) if head["job"] == "decode" else _encode(head, data)
    except InvalidArgument as error:
        return {"refused": error.message}, []
    except Exception as error:  # noqa: BLE001 - the gateway does it again, and meets whatever this is itself
        return {"unfit": repr(error)[:200]}, []


def _decode(head: dict[str, Any], data: memoryview) -> tuple[dict[str, Any], list[Buffer]]:
    request = decode_infer(data, model="", version="", limits=limits_of(head), json_size=head["json_size"])
    return at_once(decoded(request))


def _encode(head: dict[str, Any], data: memoryview) -> tuple[dict[str, Any], list[Buffer]]:
    chunks, json_size = encode_infer(
        at_once(response_of(head, data)),
        outputs=unpacked_outputs(head["outputs"]),
        binary_default=head["binary_default"],
        strict_json=head["strict_json"],
    )
    return {"json_size": json_size}, chunks[:1]  # what follows the JSON is elsewhere


if __name__ == "__main__":
    main(sys.argv[1:])
