"""Whether a version that is loaded and warm may serve: its signature, its fit with the champion, what it answers.

The files have been looked at before the load (``server.runtime.inspection``); this is the rest, and the report of it
all. A version is refused with one sentence; nothing here starts or stops serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog

from server.errors import TidegateError
from server.runtime.base import Engine, WarmupSample
from server.runtime.inspection import Inspection
from server.runtime.modelfile import quoted
from server.runtime.warmup import sample_outputs
from server.types import ModelSpec, Tensor, TensorSpec

log = structlog.get_logger("tidegate.admission")

_FLOATS: Final = frozenset({"FP16", "FP32", "FP64"})
_BF16_EXPONENT: Final = 0x7F80


@dataclass(slots=True, frozen=True)
class Check:
    """One thing looked at. ``detail``: one sentence, why not when it is not ``ok``."""

    name: str
    ok: bool
    detail: str


@dataclass(slots=True, frozen=True)
class AdmissionReport:
    """What was found of one version, for the registry and the audit trail.

    ``memory_bytes``: resident bytes gained by the load; ``run_ns``: median time of one row; ``batch``: rows that the
    batcher may gather (0: the model does not batch).
    """

    model: str
    version: str
    digest: str
    checks: tuple[Check, ...]
    memory_bytes: int
    run_ns: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, text, numbers and booleans."""
        return {**asdict(self), "checks": [asdict(check) for check in self.checks]}


@dataclass(slots=True, frozen=True)
class Admission:
    """The verdict. ``refusal``: one sentence, empty when the version is admitted."""

    report: AdmissionReport
    refusal: str = ""

    @property
    def admitted(self) -> bool:
        return not self.refusal


def admit(
    engine: Engine,
    inspection: Inspection,
    *,
    declared_signature: ModelSpec | None = None,
    champion: ModelSpec | None = None,
    warmup: tuple[WarmupSample, ...] = (),
    folder: Path | None = None,
    advisory: bool = False,
) -> Admission:
    """Judge a loaded, warm engine that does not serve yet. Blocking: it runs warm-up samples.

    ``declared_signature``: what the manifest promises; ``champion``: what callers are used to; None: nothing to compare
    with. ``warmup`` and ``folder`` are those of the load. ``advisory``: what speaks against the version is logged and
    reported but does not refuse it, as for a plain directory that nobody published to.
    """
    spec = engine.spec
    checks = (
        _files(spec, inspection),
        _compared("signature", _differences(declared_signature, spec), declared_signature),
        _compared("champion", _incompatibilities(champion, spec), champion),
        _finite(engine, warmup, folder),
        _batch(spec),
    )
    report = AdmissionReport(
        model=spec.name,
        version=spec.version,
        digest=inspection.digest,
        checks=checks,
        memory_bytes=engine.memory_bytes,
        run_ns=engine.run_ns,
        batch=spec.learned_batch_size,
    )
    failed = [check.detail for check in checks if not check.ok]
    if advisory and failed:
        log.warning("admission_note", model=spec.name, version=spec.version, notes=failed)
        failed = []
    return Admission(report, failed[0] if failed else "")


def _files(spec: ModelSpec, inspection: Inspection) -> Check:
    same = spec.digest == inspection.digest
    found = f"{len(inspection.files)} files, {inspection.total_bytes} bytes in all."
    loaded = f"The model was loaded from digest {spec.digest[:12]}, inspected was {inspection.digest[:12]}."
    return Check("files", same, found if same else loaded)


def _compared(name: str, differences: Iterator[str], reference: ModelSpec | None) -> Check:
    if reference is None:
        return Check(name, True, "There is nothing to compare with.")
    difference = next(differences, "")
    return Check(name, not difference, difference or "Names, datatypes and dimensions agree.")


def _batch(spec: ModelSpec) -> Check:
    rows = spec.learned_batch_size
    gathers = f"Up to {rows} rows are gathered" if rows else "Rows are not gathered"
    return Check("batch", True, f"{gathers}: {spec.batching_note}." if spec.batching_note else f"{gathers}.")


# --- signatures ------------------------------------------------------------------------------------------------------


def _differences(declared: ModelSpec | None, found: ModelSpec) -> Iterator[str]:
    """What the model has otherwise than the manifest declares, a sentence each."""
    if declared is None:
        return
    for kind, wanted, got in _sides(declared, found):
        yield from _missing(kind, wanted, got, "is declared")
        for name, tensor in got.items():
            if name not in wanted and not tensor.optional:
                yield f"{kind} {quoted(name)} of the model is not declared."
        yield from _unlike(kind, wanted, got, "is declared as", _dims_agree)


def _incompatibilities(champion: ModelSpec | None, found: ModelSpec) -> Iterator[str]:
    """What callers of the champion would trip over, a sentence each.

    An input must take every shape that the champion's takes; a dimension of an output may be free on either side.
    """
    if champion is None:
        return
    for kind, wanted, got in _sides(champion, found):
        yield from _missing(kind, wanted, got, "the champion has")
        is_input = kind == "Input"
        for name, tensor in got.items():
            if name not in wanted and not (is_input and tensor.optional):
                rule = "; a new input must be optional" if is_input else ""
                yield f"{kind} {quoted(name)} is new, the champion has none of that name{rule}."
            elif is_input and name in wanted and wanted[name].optional and not tensor.optional:
                yield f"Input {quoted(name)} is optional for the champion, this version requires it."
        yield from _unlike(kind, wanted, got, "of the champion is", _dims_taken if is_input else _dims_agree)


_Tensors = dict[str, TensorSpec]


def _sides(wanted: ModelSpec, got: ModelSpec) -> Iterator[tuple[str, _Tensors, _Tensors]]:
    for kind, first, second in (("Input", wanted.inputs, got.inputs), ("Output", wanted.outputs, got.outputs)):
        yield kind, {tensor.name: tensor for tensor in first}, {tensor.name: tensor for tensor in second}


def _missing(kind: str, wanted: _Tensors, got: _Tensors, whose: str) -> Iterator[str]:
    for name in wanted:
        if name not in got:
            has = ", ".join(quoted(other) for other in got) or "none"
            yield f"{kind} {quoted(name)}, which {whose}, is missing: this version has {has}."


def _unlike(
    kind: str,
    wanted: _Tensors,
    got: _Tensors,
    whose: str,
    dims_fit: Callable[[tuple[int, ...], tuple[int, ...]], bool],
) -> Iterator[str]:
    for name, want in wanted.items():
        have = got.get(name, want)
        if want.datatype != have.datatype or not dims_fit(want.shape, have.shape):
            yield f"{kind} {quoted(name)} {whose} {_type(want)}, this version has {_type(have)}."


def _type(tensor: TensorSpec) -> str:
    return f"{tensor.datatype}{list(tensor.shape)}"


def _dims_agree(wanted: tuple[int, ...], got: tuple[int, ...]) -> bool:
    return len(wanted) == len(got) and all(a == b or -1 in {a, b} for a, b in zip(wanted, got, strict=True))


def _dims_taken(wanted: tuple[int, ...], got: tuple[int, ...]) -> bool:
    return len(wanted) == len(got) and all(b in {a, -1} for a, b in zip(wanted, got, strict=True))


# --- answers ---------------------------------------------------------------------------------------------------------


def _finite(engine: Engine, warmup: tuple[WarmupSample, ...], folder: Path | None) -> Check:
    try:
        answers = sample_outputs(partial(engine.run, 0), engine.spec, warmup, folder)
    except TidegateError as error:
        return Check("finite", False, error.message)
    if not answers:
        return Check("finite", True, "The model takes no made-up input: give it a warm-up sample to have this checked.")
    for sample, outputs in answers:
        for tensor in outputs:
            if bad := _non_finite(tensor):
                return Check(
                    "finite",
                    False,
                    f"Output {quoted(tensor.name)} holds {bad} values that are NaN or infinite for {sample}.",
                )
    return Check("finite", True, "No output of a warm-up sample holds a NaN or an infinite value.")


def _non_finite(tensor: Tensor) -> int:
    """How many elements are NaN or infinite; 0 for datatypes that have neither."""
    if tensor.datatype == "BF16":
        return int(np.count_nonzero((tensor.array() & _BF16_EXPONENT) == _BF16_EXPONENT))
    if tensor.datatype in _FLOATS:
        return int(tensor.array().size - np.count_nonzero(np.isfinite(tensor.array())))
    return 0
