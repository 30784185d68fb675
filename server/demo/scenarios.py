"""From data and models to workloads: which rows are sent, in what sizes, by how many callers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

from server.demo.data import (
    CHUNK,
    SAMPLE_RATE,
    Array,
    Digits,
    Flights,
    LabelledFile,
    MagikaConfig,
    audio_chunks,
    noise,
    synthetic_voice,
)
from server.demo.models import ServedModel, batched_config
from server.demo.workload import Reference, Stream, Workload, ragged_offsets

MAX_BATCH: Final = 256

#: How often one caller of a small model calls: as many as two cores answer, callers included, without falling behind.
_PACE_S: Final = 0.1

#: Seconds of audio per stream, and the pitches of the voices; one more stream is noise.
_STREAM_SECONDS: Final = 2.0
_PITCHES: Final = (110.0, 150.0, 210.0)


@dataclass(slots=True)
class Scenario:
    """Everything the demo serves and sends; ``files`` are magika's inputs in the order of its workload."""

    digits: Digits
    march: Flights
    models: list[ServedModel] = field(default_factory=list)
    workloads: list[Workload] = field(default_factory=list)
    files: list[LabelledFile] = field(default_factory=list)
    magika: MagikaConfig | None = None


def add_digits(scenario: Scenario, versions: Mapping[str, bytes]) -> None:
    """Held-out digits, one or two at a time, for each version."""
    scenario.models.append(ServedModel("digits", versions, batched_config("digits", MAX_BATCH)))
    for version, onnx in versions.items():
        columns = {"pixels": scenario.digits.test_pixels}
        scenario.workloads.append(_independent("digits", version, onnx, columns, (1, 1, 2), callers=3, pace_s=_PACE_S))


def add_flights(scenario: Scenario, onnx: bytes) -> None:
    """Departures of March, in groups of one to four."""
    scenario.models.append(ServedModel("flights", {"1": onnx}, batched_config("flights", MAX_BATCH)))
    columns = {"numbers": scenario.march.numbers[:600], "categories": scenario.march.categories[:600]}
    scenario.workloads.append(_independent("flights", "1", onnx, columns, (1, 1, 2, 4), callers=8, pace_s=_PACE_S))


def add_magika(scenario: Scenario, onnx: bytes, config: MagikaConfig, files: Sequence[LabelledFile]) -> None:
    """One file a call; the model takes ten milliseconds or more a row, so a single caller at a steady pace."""
    scenario.models.append(ServedModel("magika", {"1": onnx}))
    scenario.files, scenario.magika = list(files), config
    columns = {"bytes": np.stack([config.features(file.path.read_bytes()) for file in files])}
    scenario.workloads.append(_independent("magika", "1", onnx, columns, (1,), callers=2, pace_s=0.2))


def add_silero(scenario: Scenario, onnx: bytes) -> None:
    """Live audio: each caller sends one chunk every 32 ms and carries the state into the next call."""
    scenario.models.append(ServedModel("silero_vad", {"1": onnx}))
    chunks = [audio_chunks(sound) for sound in silero_sounds()]
    stream = Stream(
        length=len(chunks[0]), carry={"stateN": "state"}, initial={"state": np.zeros((2, 1, 128), np.float32)}
    )
    columns = {"input": np.concatenate(chunks)}
    offsets = np.arange(len(columns["input"]) + 1)
    fixed = {"sr": np.array(SAMPLE_RATE, np.int64)}
    requests = [{"input": row[None, :], **fixed} for row in columns["input"]]
    expected = Reference(onnx).stream_answers(requests, stream)
    pace_s = CHUNK / SAMPLE_RATE
    workload = Workload("silero_vad", "1", columns, offsets, expected, 2, pace_s, fixed, stream)
    scenario.workloads.append(workload)


def silero_sounds() -> list[Array]:
    """The streams' audio: voices, then noise."""
    voices = [synthetic_voice(pitch, _STREAM_SECONDS, seed) for seed, pitch in enumerate(_PITCHES)]
    return [*voices, noise(_STREAM_SECONDS, seed=len(_PITCHES))]


def _independent(
    model: str,
    version: str,
    onnx: bytes,
    columns: Mapping[str, Array],
    sizes: Sequence[int],
    callers: int,
    pace_s: float = 0.0,
) -> Workload:
    """A workload of independent requests, each answered alone by the reference."""
    offsets = ragged_offsets(len(next(iter(columns.values()))), sizes)
    requests = [{name: values[first:end] for name, values in columns.items()} for first, end in pairwise(offsets)]
    expected = Reference(onnx).answers(requests)
    return Workload(model, version, columns, offsets, expected, callers, pace_s)
