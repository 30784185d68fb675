"""One evaluation: two models, a policy and its data, to findings. Blocks, in bounded memory, until its pace says stop.

A gate that lacks its data, its time or a policy that fits is undecided; a candidate that cannot run failed; a champion
that cannot run is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from router.rollout.quality import Finding, Status, within
from server.admission import Admission, admit
from server.config.gates import GatePolicy
from server.errors import InputRejected, InvalidArgument, TidegateError
from server.gates.holdout import Holdout, arranged, input_tensors
from server.gates.judging import (
    Case,
    Labelled,
    Side,
    is_labels,
    judge_fairness,
    judge_quality,
    judge_slices,
    labelled,
    main_output,
    probabilities,
    values_of,
)
from server.gates.running import OutOfTime, Pace, outputs
from server.gates.stress import judge_bad_values, judge_bounds, judge_direction, judge_latency, judge_noise
from server.runtime.base import Engine, WarmupSample
from server.types import ModelSpec

#: Told which gate is being looked at.
Progress: TypeAlias = Callable[[str], None]

_RUN: Final = "run"


@dataclass(slots=True, frozen=True)
class Contest:
    """Who is compared. ``champion`` None: nobody, ``why`` says what there is none of.

    ``declared``: the signature that the candidate was published with; ``warmup`` and ``folder`` are those of its load.
    """

    candidate: Engine
    champion: Engine | None
    why: str = "champion"
    declared: ModelSpec | None = None
    warmup: tuple[WarmupSample, ...] = ()
    folder: Path | None = None


class _Broken(Exception):
    """The candidate cannot do what every gate needs of it."""


def judge(contest: Contest, policy: GatePolicy, holdout: Holdout, pace: Pace, progress: Progress) -> list[Finding]:
    """All findings, in a fixed order."""
    findings = list(_gate("admission", partial(_admission, contest), progress))
    try:
        progress("predictions")
        case = _case(contest, policy, holdout, pace)
    except _Broken as broken:
        return [*findings, Finding(_RUN, Status.FAILED, str(broken))]
    except (InvalidArgument, OutOfTime) as error:
        return [*findings, _undecided(_RUN, error)]
    known: Labelled | None = None
    try:
        known = labelled(case)
    except InvalidArgument as error:
        findings.append(_undecided("labels", error))
    for name, gate in _gates(case, known):
        findings += _gate(name, gate, progress)
    return findings


def _gates(case: Case, known: Labelled | None) -> Iterator[tuple[str, Callable[[], Iterable[Finding]]]]:
    """Each gate by itself, so that one which cannot be decided hides no other."""
    policy = case.policy
    yield "outputs", partial(_finite, case)
    yield "quality", partial(judge_quality, case, known)
    for part in policy.slices:
        yield f"slices of {part.column}", partial(judge_slices, case, known, part)
    for group in policy.fairness:
        yield f"fairness of {group.column}", partial(judge_fairness, case, known, group)
    if policy.robustness is not None:
        yield "noise", partial(judge_noise, case, policy.robustness)
        if policy.robustness.probes:
            yield "bad values", partial(judge_bad_values, case, policy.robustness)
    for bounds in policy.rules.bounds:
        yield f"bounds of {bounds.output or case.output}", partial(judge_bounds, case, bounds)
    for rule in policy.rules.monotone:
        yield f"direction of {rule.column}", partial(judge_direction, case, rule)
    if policy.latency is not None:
        for rows in policy.latency.batch_sizes:
            yield f"latency in batches of {rows}", partial(judge_latency, case, policy.latency, rows)


def _gate(name: str, gate: Callable[[], Iterable[Finding]], progress: Progress) -> Iterator[Finding]:
    """A gate's findings up to where it could go on, and why it could not."""
    progress(name)
    try:
        yield from gate()
    except InputRejected as error:
        yield Finding(name, Status.FAILED, error.message)
    except (InvalidArgument, OutOfTime) as error:
        yield _undecided(name, error)
    except TidegateError as error:
        yield Finding(name, Status.FAILED, error.message)


def _undecided(name: str, error: InvalidArgument | OutOfTime) -> Finding:
    return Finding(name, Status.UNDECIDED, f"not decidable: {error}")


def _admission(contest: Contest) -> Iterator[Finding]:
    """What admission says of the candidate; of a backend without files of ours it says nothing."""
    inspection = getattr(contest.candidate, "inspection", None)
    if inspection is None:
        return
    champion = None if contest.champion is None else contest.champion.spec
    found: Admission = admit(
        contest.candidate,
        inspection,
        declared_signature=contest.declared,
        champion=champion,
        warmup=contest.warmup,
        folder=contest.folder,
    )
    status = Status.PASSED if found.admitted else Status.FAILED
    checks = {check.name: {"ok": check.ok, "detail": check.detail} for check in found.report.checks}
    yield Finding("admission", status, found.refusal or "files, signature and answers are as they should be", checks)


def _case(contest: Contest, policy: GatePolicy, holdout: Holdout, pace: Pace) -> Case:
    """Both models run on the holdout. Raises _Broken, InvalidArgument when data or policy do not fit, OutOfTime."""
    output = main_output(policy, contest.candidate.spec)
    wanted = {output} | {bounds.output for bounds in policy.rules.bounds}
    champion, why = _champion(contest, policy, holdout, output, pace)
    candidate = _side(contest.candidate, policy, holdout)
    try:
        _predict(candidate, policy, output, wanted, pace)
    except TidegateError as error:
        # What the champion does on the same data cannot be asked too much of the candidate.
        fits = champion is not None or isinstance(error, InputRejected) or not isinstance(error, InvalidArgument)
        if not fits:
            raise
        raise _Broken(f"the candidate cannot be judged on the holdout: {error.message}") from error
    return Case(policy, holdout, output, candidate, champion, pace, why)


def _champion(
    contest: Contest, policy: GatePolicy, holdout: Holdout, output: str, pace: Pace
) -> tuple[Side | None, str]:
    """The champion on the holdout; or what there is none of."""
    if contest.champion is None:
        return None, contest.why
    try:
        side = _side(contest.champion, policy, holdout)
        _predict(side, policy, output, {output}, pace)
    except TidegateError as error:
        return None, f"champion to compare with: {error.message}"
    return side, ""


def _side(engine: Engine, policy: GatePolicy, holdout: Holdout) -> Side:
    columns = arranged(holdout, policy, engine.spec)
    return Side(engine, columns, input_tensors(columns, engine.spec), {})


def _predict(side: Side, policy: GatePolicy, output: str, wanted: Collection[str], pace: Pace) -> None:
    """Run the model over all rows, and look whether its answers can be what the policy takes them for."""
    if output not in {tensor.name for tensor in side.engine.spec.outputs}:
        raise InvalidArgument(f"the model has no output '{output}'")
    side.outputs.update(outputs(side.engine, side.tensors, wanted, pace))
    answers = side.outputs[output]
    if policy.task == "regression":
        values_of(answers)
    elif not is_labels(answers):
        probabilities(answers)


def _finite(case: Case) -> Iterator[Finding]:
    answers = case.candidate.outputs[case.output]
    if answers.dtype.kind not in "fiu":
        yield Finding("outputs", Status.PASSED, "labels, one for every row", {"values": answers.size})
    else:
        yield replace(within(answers), gate="outputs")
