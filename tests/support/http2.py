"""HTTP/2 at the level of frames, for tests that send what no client library would."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Self

from hpack import Decoder

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE: Final = 4
INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER: Final = "/inference.GRPCInferenceService/ModelStreamInfer"
#: Longest wait for anything the server owes; past it the server hangs.
PATIENCE_S: Final = 30.0

Fields = Iterable[tuple[str, str]]


def frame(kind: int, flags: int = 0, stream_id: int = 0, payload: bytes = b"") -> bytes:
    """One frame, whatever it says."""
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream_id) + payload


def settings(values: dict[int, int] | None = None) -> bytes:
    return frame(SETTINGS, payload=b"".join(struct.pack(">HI", *item) for item in (values or {}).items()))


def reset(stream_id: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream_id, struct.pack(">I", code))


def window(stream_id: int, size: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, struct.pack(">I", size))


def block(fields: Fields) -> bytes:
    """Header fields as literals that no table keeps."""
    return b"".join(
        b"\x00" + b"".join(length(len(text)) + text for text in (name.encode("latin-1"), value.encode("latin-1")))
        for name, value in fields
    )


def length(size: int) -> bytes:
    """A string's length in front of it, not Huffman-coded."""
    if size < 127:
        return bytes([size])
    coded, size = b"\x7f", size - 127
    while size >= 128:
        coded, size = coded + bytes([size % 128 + 128]), size // 128
    return coded + bytes([size])


def request(path: str = INFER, *more: tuple[str, str], method: str = "POST", grpc: bool = True) -> bytes:
    """The header block of a request; a gRPC call unless said otherwise."""
    fields = [(":method", method), (":scheme", "http"), (":path", path), (":authority", "test")]
    if grpc:
        fields += [("te", "trailers"), ("content-type", "application/grpc")]
    return block([*fields, *more])


def opened(stream_id: int, *more: tuple[str, str], path: str = INFER, end: bool = False, **options: Any) -> bytes:
    """HEADERS that open a stream."""
    return frame(HEADERS, END_HEADERS | end, stream_id, request(path, *more, **options))


def grpc_message(message: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(message)) + message


@dataclass(slots=True)
class Answer:
    """What came on one stream until it ended or was reset; trailers are among the headers."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> str:
        """``grpc-status``, or else the status of HTTP."""
        return self.headers.get("grpc-status") or self.headers.get(":status", "")


class Http2Wire:
    """One connection in clear. Reads time out after ``PATIENCE_S``, so a hang is an error and not a stuck test."""

    def __init__(
        self,
        address: str | tuple[str, int],
        own: dict[int, int] | None = None,
        *,
        receive_buffer: int = 0,
        greet: bool = True,
        generous: bool = True,
        settle: bool = True,
        alive: bool = True,
    ) -> None:
        host, port = address.rsplit(":", 1) if isinstance(address, str) else address
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.answers: dict[int, Answer] = {}
        self.goaway: tuple[int, int] | None = None  # (last stream, code)
        self.own_settings: dict[int, int] = {}
        self.windows: dict[int, int] = {}  # what the server gave back, by stream; 0: the connection
        self._spent: dict[int, int] = {}
        self.pings = 0
        self.ended = False  # the server has closed its side
        self.was_reset = False  # not by closing, but by cutting it
        self._alive = alive  # answer PINGs
        self._generous = generous  # give windows back as they are used
        self._held = b""
        self._decoder = Decoder(max_header_list_size=1 << 20)
        if greet:
            self.send(PREFACE + settings(own))
            if settle:
                self.settled()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send everything; False when the server has closed the connection."""
        try:
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def upload(self, stream_id: int, raw: bytes, *, end: bool = True) -> None:
        """A body as an honest client sends it: within the windows, reading while it waits for them."""
        for start in range(0, len(raw), 16_384):
            part = raw[start : start + 16_384]
            while min(self._room(0), self._room(stream_id)) < len(part):
                assert self.read_frame() is not None, self.goaway
            for each in (0, stream_id):
                self._spent[each] = self._spent.get(each, 0) + len(part)
            assert self.send(frame(DATA, end and start + len(part) == len(raw), stream_id, part)), self.goaway

    def _room(self, stream_id: int) -> int:
        initial = self.own_settings.get(INITIAL_WINDOW_SIZE, 65_535) if stream_id else 65_535
        return initial + self.windows.get(stream_id, 0) - self._spent.get(stream_id, 0)

    def read_frame(self) -> tuple[int, int, int, bytes] | None:
        """The next frame (kind, flags, stream, payload); None at the end of the connection."""
        head = self._take(9)
        if head is None:
            return None
        high, low, kind, flags, stream_id = struct.unpack(">HBBBI", head)
        payload = self._take(high << 8 | low)
        if payload is None:
            return None
        self._note(kind, flags, stream_id, payload)
        return kind, flags, stream_id, payload

    def answer(self, stream_id: int) -> Answer:
        """All of one stream's answer."""
        answer = self.answers.setdefault(stream_id, Answer())
        while not answer.ended and answer.reset is None:
            if self.read_frame() is None:
                raise AssertionError(f"the connection ended: {self.goaway}, {answer}")
        return answer

    def call(self, stream_id: int, message: bytes, path: str = INFER, *more: tuple[str, str]) -> Answer:
        """A unary call and its answer."""
        self.send(opened(stream_id, *more, path=path) + frame(DATA, END_STREAM, stream_id, grpc_message(message)))
        return self.answer(stream_id)

    def closed(self) -> tuple[int, int] | None:
        """Wait until the server ends the connection; its last GOAWAY."""
        while self.read_frame() is not None:
            pass
        return self.goaway

    def settled(self) -> None:
        """Everything sent until now was handled, and what could be said to it has come."""
        for _ in range(2):  # the answer to a PING overtakes others
            before = self.pings
            self.send(frame(PING, 0, 0, b"settled?"))
            while self.pings == before:
                assert self.read_frame() is not None, self.goaway

    def _note(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == HEADERS:
            answer = self.answers.setdefault(stream_id, Answer())
            answer.headers.update({str(name): str(value) for name, value in self._decoder.decode(payload)})
            answer.ended = bool(flags & END_STREAM)
        elif kind == DATA:
            answer = self.answers.setdefault(stream_id, Answer())
            answer.body += payload
            answer.ended = bool(flags & END_STREAM)
            if payload and self._generous:
                self.send(window(0, len(payload)) + (b"" if answer.ended else window(stream_id, len(payload))))
        elif kind == RST_STREAM:
            self.answers.setdefault(stream_id, Answer()).reset = int.from_bytes(payload)
        elif kind == GOAWAY:
            self.goaway = struct.unpack_from(">II", payload)
        elif kind == SETTINGS and not flags & ACK:
            self.own_settings.update(struct.iter_unpack(">HI", payload))
            self.send(frame(SETTINGS, ACK))
        elif kind == WINDOW_UPDATE:
            self.windows[stream_id] = self.windows.get(stream_id, 0) + int.from_bytes(payload)
        elif kind == PING and flags & ACK:
            self.pings += 1
        elif kind == PING and self._alive:
            self.send(frame(PING, ACK, 0, payload))

    def _take(self, size: int) -> bytes | None:
        while len(self._held) < size:
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionResetError:
                data, self.was_reset = b"", True
            if not data:
                self.ended = True
                return None
            self._held += data
        taken, self._held = self._held[:size], self._held[size:]
        return taken
