"""What callers send to one model version, what in-process ONNX Runtime answers to it, and how the two are compared.

A workload's rows lie in columns, one array per input; a request is a range of rows. Strings are fixed-width bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from server.demo.data import Array

#: FP32 answers whose bits differ (another batch composition) must agree so far. Integers must always be equal.
RELATIVE_TOLERANCE: Final = 1e-4
ABSOLUTE_TOLERANCE: Final = 1e-5


@dataclass(frozen=True, slots=True)
class Stream:
    """Calls that depend on each other: after each answer, ``carry`` maps its outputs to inputs of the next call.

    The workload's requests are cut into streams of ``length``; each starts with the ``initial`` inputs.
    """

    length: int
    carry: Mapping[str, str]
    initial: Mapping[str, Array]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The requests for one model version, each with its expected answer.

    ``columns`` and ``expected``: name -> array [rows, ...]. Request ``i`` has rows ``offsets[i]`` to ``offsets[i+1]``.
    ``fixed``: inputs that are the same in every request. ``callers`` call at once per protocol, each at most once in
    ``pace_s`` seconds (0: as fast as answers come).
    """

    model: str
    version: str
    columns: Mapping[str, Array]
    offsets: Array
    expected: Mapping[str, Array]
    callers: int
    pace_s: float = 0.0
    fixed: Mapping[str, Array] = field(default_factory=dict)
    stream: Stream | None = None

    @property
    def name(self) -> str:
        return f"{self.model}:{self.version}"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def rows(self, index: int) -> int:
        return int(self.offsets[index + 1] - self.offsets[index])

    def inputs(self, index: int) -> dict[str, Array]:
        """Request ``index`` without a stream's carried inputs."""
        return {**self._cut(self.columns, index), **self.fixed}

    def answer(self, index: int) -> dict[str, Array]:
        return self._cut(self.expected, index)

    def _cut(self, columns: Mapping[str, Array], index: int) -> dict[str, Array]:
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return {name: values[rows] for name, values in columns.items()}

    def turns(self, caller: int) -> Iterator[tuple[int, bool]]:
        """Endlessly: the next request of this caller, and whether it starts a stream. Callers take turns."""
        length = self.stream.length if self.stream else 1
        blocks = len(self) // length
        block = caller
        while True:
            for step in range(length):
                yield block % blocks * length + step, step == 0
            block += self.callers


def ragged_offsets(rows: int, sizes: Sequence[int]) -> Array:
    """Offsets that cut ``rows`` rows into requests of the given sizes in turn; what is left over is dropped."""
    ends = [0]
    while ends[-1] + sizes[(len(ends) - 1) % len(sizes)] <= rows:
        ends.append(ends[-1] + sizes[(len(ends) - 1) % len(sizes)])
    return np.asarray(ends)


class Reference:
    """ONNX Runtime in this process, on one thread: what an answer is compared with."""

    def __init__(self, onnx: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: value.astype(str) if value.dtype.kind == "S" else value for name, value in inputs.items()}
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def answers(self, requests: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """All outputs of independent requests, joined along the rows."""
        answers = [self.run(request) for request in requests]
        return {name: np.concatenate([answer[name] for answer in answers]) for name in self._outputs}

    def stream_answers(self, requests: Sequence[Mapping[str, Array]], stream: Stream) -> dict[str, Array]:
        """The outputs that are not carried, of requests that form streams, joined along the rows."""
        answers: list[dict[str, Array]] = []
        state: Mapping[str, Array] = stream.initial
        for index, request in enumerate(requests):
            state = state if index % stream.length else stream.initial
            answer = self.run({**request, **state})
            state = {target: answer.pop(source) for source, target in stream.carry.items()}
            answers.append(answer)
        return {name: np.concatenate([answer[name] for answer in answers]) for name in answers[0]}


@dataclass(slots=True)
class CallLog:
    """What the callers of one workload over one protocol saw: one entry per answered call, in order of completion."""

    workload: Workload
    protocol: str
    requests: list[int] = field(default_factory=list)
    latencies_ns: list[int] = field(default_factory=list)
    answers: list[dict[str, Array]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, request: int, latency_ns: int, answer: dict[str, Array]) -> None:
        self.requests.append(request)
        self.latencies_ns.append(latency_ns)
        self.answers.append(answer)

    @property
    def rows(self) -> int:
        return sum(self.workload.rows(index) for index in self.requests)


@dataclass(slots=True)
class Comparison:
    """Answers compared with in-process ONNX Runtime: equal bit for bit, within tolerance, or wrong."""

    exact: int = 0
    close: int = 0
    wrong: int = 0
    #: Largest absolute difference seen among the close ones.
    largest_difference: float = 0.0

    @property
    def checked(self) -> int:
        return self.exact + self.close + self.wrong


def compare(log: CallLog) -> Comparison:
    """Compare every answer in the log."""
    result = Comparison()
    for index, answer in zip(log.requests, log.answers, strict=True):
        _compare_one(log.workload.answer(index), answer, result)
    return result


def _compare_one(expected: Mapping[str, Array], got: Mapping[str, Array], result: Comparison) -> None:
    pairs: list[tuple[Array, Any]] = [(value, got.get(name)) for name, value in expected.items()]
    if any(b is None or a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        result.wrong += 1
    elif all(np.array_equal(a, b) for a, b in pairs):
        result.exact += 1
    elif all(_close(a, b) for a, b in pairs):
        result.close += 1
        gaps = [float(np.max(np.abs(a - b))) for a, b in pairs]
        result.largest_difference = max(result.largest_difference, *gaps)
    else:
        result.wrong += 1


def _close(a: Array, b: Array) -> bool:
    if a.dtype.kind != "f":
        return np.array_equal(a, b)
    return np.allclose(a, b, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE)
