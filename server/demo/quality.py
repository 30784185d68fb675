"""Are the served models any good? Labels are compared with answers that came through the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from server.demo.data import Array, Digits, Flights, LabelledFile, MagikaConfig
from server.demo.scenarios import MAX_BATCH, Scenario
from server.demo.workload import Workload

#: (model, version, inputs) -> outputs, through the server.
Infer: TypeAlias = Callable[[str, str, Mapping[str, Array]], Awaitable[dict[str, Array]]]

MIN_DIGIT_ACCURACY: Final = 0.93
MIN_FLIGHT_AUC: Final = 0.85
MIN_PYTHON_SHARE: Final = 0.9


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the quality report; ``ok`` False fails the demo."""

    model: str
    text: str
    ok: bool


async def judge(scenario: Scenario, infer: Infer) -> list[Finding]:
    """Every served model on data with known answers."""
    findings = []
    for workload in scenario.workloads:
        if workload.model == "digits":
            findings.append(await _digits(scenario.digits, workload.version, infer))
        elif workload.model == "flights":
            findings.append(await _flights(scenario.march, infer))
        elif workload.model == "magika" and scenario.magika is not None:
            findings.append(await _magika(scenario.files, workload, scenario.magika, infer))
        elif workload.model == "silero_vad":
            findings.append(await _silero(workload, infer))
    return findings


async def _in_chunks(infer: Infer, model: str, version: str, inputs: Mapping[str, Array], output: str) -> Array:
    """One output for all rows, asked for in the largest requests the models take."""
    rows = len(next(iter(inputs.values())))
    parts = []
    for first in range(0, rows, MAX_BATCH):
        chunk = {name: values[first : first + MAX_BATCH] for name, values in inputs.items()}
        parts.append((await infer(model, version, chunk))[output])
    return np.concatenate(parts)


async def _digits(digits: Digits, version: str, infer: Infer) -> Finding:
    label = await _in_chunks(infer, "digits", version, {"pixels": digits.test_pixels}, "label")
    accuracy = float(np.mean(label == digits.test_digit))
    text = f"accuracy {accuracy:.3f} on {len(label)} held-out digits"
    return Finding(f"digits:{version}", text, accuracy >= MIN_DIGIT_ACCURACY)


async def _flights(march: Flights, infer: Infer) -> Finding:
    from sklearn.metrics import roc_auc_score

    inputs = {"numbers": march.numbers, "categories": march.categories}
    late = (await _in_chunks(infer, "flights", "1", inputs, "probabilities"))[:, 1]
    auc = float(roc_auc_score(march.late, late))
    text = (
        f"AUC {auc:.3f} on {len(late):,} flights of March ({march.late.mean():.1%} late), trained on January-February"
    )
    return Finding("flights:1", text, auc >= MIN_FLIGHT_AUC)


async def _magika(files: list[LabelledFile], workload: Workload, config: MagikaConfig, infer: Infer) -> Finding:
    """Each file alone; python's own sources must come out as python."""
    answers = [(await infer("magika", "1", workload.inputs(i)))["target_label"] for i in range(len(files))]
    labels = [config.labels[int(np.argmax(answer))] for answer in answers]
    right = [label == file.label for label, file in zip(labels, files, strict=True)]
    python = [ok for ok, file in zip(right, files, strict=True) if file.label == "python"]
    text = (
        f"{sum(right)} of {len(files)} files of this Python classed as their names say, .py {sum(python)}/{len(python)}"
    )
    return Finding("magika:1", text, sum(python) >= MIN_PYTHON_SHARE * len(python))


async def _silero(workload: Workload, infer: Infer) -> Finding:
    """Every stream from its start, state carried from answer to call."""
    assert workload.stream is not None  # noqa: S101 - silero is nothing but streams
    stream, speech = workload.stream, []
    state: Mapping[str, Array] = {}
    for index in range(len(workload)):
        state = state if index % stream.length else stream.initial
        answer = await infer("silero_vad", "1", {**workload.inputs(index), **state})
        state = {target: answer[source] for source, target in stream.carry.items()}
        speech.append(float(answer["output"][0, 0]))
    means = np.asarray(speech).reshape(-1, stream.length).mean(axis=1)
    voices, noise = float(means[:-1].mean()), float(means[-1])
    text = f"speech probability {voices:.2f} on synthetic voices, {noise:.2f} on noise"
    text += f"; state carried through {stream.length} calls"
    return Finding("silero_vad:1", text, voices > noise + 0.1)
