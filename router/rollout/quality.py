"""Gates before a rollout: what the candidate does on holdout data beside the champion. Arrays in, findings out.

A gate passes when the data show that the candidate is within its limit, fails when they show that it is not, and is
*undecided* when they show neither, or are not there. Undecided is not passed: a person is asked. Nothing is loaded or
run here; predictions, losses and timings come from outside, row for row on the same data.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

#: Fewer rows than this say nothing about a whole model.
MIN_ROWS: Final = 30
#: Fewer rows than this say nothing about a slice.
MIN_SLICE: Final = 200
#: A 99th percentile wants ten timings beyond it.
MIN_TIMINGS: Final = 1_000
_DRAWS: Final = 2_000
#: Rows drawn at once, times draws: bounds the memory of a bootstrap to some 64 MB.
_AT_ONCE: Final = 4_000_000


class Status(enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    UNDECIDED = "undecided"


@dataclass(slots=True, frozen=True)
class Finding:
    """What one gate found, why, and on what numbers."""

    gate: str
    status: Status
    reason: str
    evidence: dict[str, Any] = field(default_factory=dict)


def overall(findings: Sequence[Finding]) -> Status:
    """Failed when one is, else undecided when one is or when there are none, else passed."""
    statuses = {finding.status for finding in findings}
    if Status.FAILED in statuses:
        return Status.FAILED
    return Status.PASSED if statuses == {Status.PASSED} else Status.UNDECIDED


def missing(gate: str, what: str) -> Finding:
    """A gate whose data are not there."""
    return Finding(gate, Status.UNDECIDED, f"not decidable: there is no {what}")


def _bounded(gate: str, low: float, high: float, limit: float, evidence: dict[str, Any]) -> Finding:
    """By an interval and what it may not exceed."""
    told = evidence | {"low": low, "high": high, "limit": limit}
    if high <= limit:
        return Finding(gate, Status.PASSED, f"at most {high:.6g}, allowed are {limit:.6g}", told)
    if low > limit:
        return Finding(gate, Status.FAILED, f"at least {low:.6g}, allowed are {limit:.6g}", told)
    return Finding(gate, Status.UNDECIDED, f"between {low:.6g} and {high:.6g}, allowed are {limit:.6g}", told)


def _pair(first: Array, second: Array) -> tuple[Array, Array]:
    ours, theirs = np.asarray(first, float), np.asarray(second, float)
    if ours.ndim != 1 or ours.shape != theirs.shape:
        raise ValueError(f"wanted one value per row of both models, got shapes {ours.shape} and {theirs.shape}")
    return ours, theirs


def _bootstrap(
    rows: int, statistic: Callable[[Array], Array], alpha: float, seed: int, low_alpha: float | None = None
) -> tuple[float, float]:
    """Quantiles of a statistic of resampled rows: ``low_alpha`` (None: alpha) and 1 - alpha.

    The statistic gets indexes, (draws, rows), and gives one value per draw.
    """
    rng = np.random.default_rng(seed)
    step = max(_AT_ONCE // rows, 1)
    found = [statistic(rng.integers(rows, size=(min(step, _DRAWS - at), rows))) for at in range(0, _DRAWS, step)]
    low, high = np.quantile(np.concatenate(found), [alpha if low_alpha is None else low_alpha, 1 - alpha])
    return float(low), float(high)


def non_inferior(
    candidate: Array, champion: Array, margin: float = 0.001, alpha: float = 0.05, seed: int = 0
) -> Finding:
    """Losses per row: the mean difference may be at most ``margin`` times the champion's mean loss.

    Paired percentile bootstrap; each end of the interval holds with 1 - alpha.
    """
    found = _compared(candidate, champion, alpha, seed)
    if isinstance(found, Finding):
        return found
    low, high, told = found
    return _bounded("quality", low, high, margin * abs(told["champion"]), told)


def superior(candidate: Array, champion: Array, alpha: float = 0.05, seed: int = 0) -> Finding:
    """Losses per row: the mean difference must be under zero. As ``non_inferior``, but being as good is not enough."""
    found = _compared(candidate, champion, alpha, seed)
    if isinstance(found, Finding):
        return found
    low, high, told = found
    evidence = told | {"low": low, "high": high, "limit": 0.0}
    if high < 0:
        return Finding("quality", Status.PASSED, f"the loss is lower by at least {-high:.6g}", evidence)
    if low >= 0:
        return Finding("quality", Status.FAILED, f"the loss is not lower: at least {low:.6g} over", evidence)
    reason = f"between {low:.6g} and {high:.6g}, wanted is under zero"
    return Finding("quality", Status.UNDECIDED, reason, evidence)


def _compared(
    candidate: Array, champion: Array, alpha: float, seed: int
) -> tuple[float, float, dict[str, Any]] | Finding:
    """The interval of the mean paired difference of losses, and numbers to tell; or why there is none."""
    ours, theirs = _pair(candidate, champion)
    if len(ours) < MIN_ROWS:
        return missing("quality", f"holdout of {MIN_ROWS} rows, only {len(ours)}")
    if not np.isfinite(theirs).all():
        return missing("quality", "champion with a finite loss in every row")
    difference = ours - theirs
    if not np.isfinite(difference).all():
        return Finding("quality", Status.FAILED, "the candidate's loss is not finite in every row")
    low, high = _bootstrap(len(difference), partial(_mean_of, difference), alpha, seed)
    return low, high, {"rows": len(ours), "candidate": float(ours.mean()), "champion": float(theirs.mean())}


def slices_not_worse(
    candidate: Array,
    champion: Array,
    groups: Sequence[Any] | Array,
    margin: float = 0.05,
    alpha: float = 0.05,
    min_rows: int = MIN_SLICE,
    seed: int = 0,
) -> Finding:
    """Losses per row: in no group may the mean difference be over ``margin`` times the champion's mean loss there.

    Paired percentile bootstrap per group. That all groups pass holds with 1 - alpha without correction, as each of
    them must; that one fails holds with 1 - alpha because each is looked at with alpha over the number of groups.
    """
    ours, theirs = _pair(candidate, champion)
    labels = np.asarray(groups).astype(str)
    if labels.shape != ours.shape:
        raise ValueError(f"wanted one loss and one group per row, got shapes {ours.shape} and {labels.shape}")
    names, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    large = np.flatnonzero(counts >= max(min_rows, 2))
    if not large.size:
        return missing("slices", f"group of {min_rows} rows")
    found = {
        str(names[place]): _in_group(ours[places == place], theirs[places == place], margin, alpha, len(large), seed)
        for place in large
    }
    left_out = [str(name) for name in np.delete(names, large)]
    return _least_passed(found, left_out)


def _in_group(ours: Array, theirs: Array, margin: float, alpha: float, groups: int, seed: int) -> Finding:
    difference = ours - theirs
    if not np.isfinite(theirs).all():
        return missing("slices", "champion with a finite loss in every row")
    if not np.isfinite(difference).all():
        return Finding("slices", Status.FAILED, "the candidate's loss is not finite in every row")
    low, high = _bootstrap(len(difference), partial(_mean_of, difference), alpha, seed, low_alpha=alpha / groups)
    told = {"rows": len(ours), "candidate": float(ours.mean()), "champion": float(theirs.mean())}
    return _bounded("slices", low, high, margin * abs(float(theirs.mean())), told)


def _mean_of(values: Array, picked: Array) -> Array:
    return np.asarray(values[picked].mean(axis=1))


def _least_passed(found: dict[str, Finding], left_out: list[str]) -> Finding:
    """One finding of one per group."""
    status = overall(list(found.values()))
    told = {"groups": {name: {"status": f.status.value, **f.evidence} for name, f in found.items()}}
    evidence = told | {"left_out": left_out}
    if status is Status.PASSED and left_out:
        return Finding("slices", Status.UNDECIDED, f"too few rows in {', '.join(left_out)}", evidence)
    if status is Status.PASSED:
        return Finding("slices", status, f"no group of {len(found)} is worse than allowed", evidence)
    name, worst = next((name, one) for name, one in found.items() if one.status is status)
    return Finding("slices", status, f"{name}: {worst.reason}", evidence)


def slices(
    scores: Array,
    groups: Sequence[Any] | Array,
    min_score: float | None = None,
    max_gap: float | None = None,
    rows: Array | None = None,
    min_rows: int = MIN_SLICE,
) -> Finding:
    """The mean score of each group: the least may be at least ``min_score``, most less least at most ``max_gap``.

    ``rows`` (bool per row) restricts it: scores 1 for predicted yes give the selection rate over all rows, and the true
    positive rate over those whose label is yes. Groups of fewer than ``min_rows`` are named and left out.
    """
    values, labels = np.asarray(scores, float), np.asarray(groups).astype(str)
    if values.ndim != 1 or labels.shape != values.shape:
        raise ValueError(f"wanted one score and one group per row, got shapes {values.shape} and {labels.shape}")
    kept = np.ones(len(values), bool) if rows is None else np.asarray(rows, bool)
    names, places = np.unique(labels, return_inverse=True)
    counts = np.bincount(places[kept], minlength=len(names))
    sums = np.bincount(places[kept], values[kept], minlength=len(names))
    large = counts >= max(min_rows, 1)
    if not large.any():
        return missing("slices", f"group of {min_rows} rows")
    means = {
        str(name): float(total / count)
        for name, total, count in zip(names[large], sums[large], counts[large], strict=True)
    }
    least, gap = min(means.values()), max(means.values()) - min(means.values())
    left_out = [str(name) for name in names[~large]]
    told = {"groups": means, "rows": dict(zip(means, counts[large].tolist(), strict=True)), "min": least, "gap": gap}
    told |= {"left_out": left_out}
    if not np.isfinite(gap):
        return Finding("slices", Status.FAILED, "a score is not finite", told)
    if min_score is not None and least < min_score:
        return Finding("slices", Status.FAILED, f"a group has {least:.6g}, wanted are {min_score:.6g}", told)
    if max_gap is not None and gap > max_gap:
        return Finding("slices", Status.FAILED, f"groups are {gap:.6g} apart, allowed are {max_gap:.6g}", told)
    if left_out:
        return Finding("slices", Status.UNDECIDED, f"too few rows in {', '.join(left_out)}", told)
    return Finding("slices", Status.PASSED, f"the least is {least:.6g}, the gap {gap:.6g}", told)


def flips(clean: Array, noisy: Array, max_rate: float = 0.01, alpha: float = 0.05) -> Finding:
    """Decisions (classes) on rows and on the same rows with noise: at most ``max_rate`` may differ.

    Exact one-sided binomial bounds (Clopper and Pearson), each of which holds with 1 - alpha.
    """
    before, after = np.asarray(clean), np.asarray(noisy)
    if before.ndim != 1 or before.shape != after.shape:
        raise ValueError(f"wanted one decision per row, got shapes {before.shape} and {after.shape}")
    rows, differ = len(before), int((before != after).sum())
    if rows < MIN_ROWS:
        return missing("robustness", f"sample of {MIN_ROWS} rows, only {rows}")
    low = _binomial_bound(differ, rows, alpha, upper=False)
    high = _binomial_bound(differ, rows, alpha, upper=True)
    return _bounded("robustness", low, high, max_rate, {"rows": rows, "flips": differ})


def _binomial_bound(hits: int, rows: int, alpha: float, *, upper: bool) -> float:
    """The rate at which so few (``upper``) or so many hits have the chance alpha, by bisection."""
    if (hits == 0 and not upper) or (hits == rows and upper):
        return float(upper)
    counts = np.arange(hits + 1) if upper else np.arange(hits)
    below, above = 0.0, 1.0
    for _ in range(50):
        middle = (below + above) / 2
        # The chance of few hits falls with the rate: of at most ``hits`` above, of fewer than ``hits`` below.
        few = float(np.exp(_log_binomial(counts, rows, middle)).sum())
        below, above = (middle, above) if few > (alpha if upper else 1 - alpha) else (below, middle)
    return (below + above) / 2


def _log_binomial(counts: Array, rows: int, rate: float) -> Array:
    logs = np.concatenate([[0.0], np.log(np.arange(1, rows + 1))]).cumsum()
    ways = logs[rows] - logs[counts] - logs[rows - counts]
    return np.asarray(ways + counts * np.log(rate) + (rows - counts) * np.log1p(-rate))


def within(outputs: Array, low: float = -np.inf, high: float = np.inf) -> Finding:
    """Outputs, also those on missing and extreme inputs: all must be finite and from ``low`` to ``high``."""
    values = np.asarray(outputs, float)
    if not values.size:
        return missing("bounds", "output")
    wrong = ~(np.isfinite(values) & (values >= low) & (values <= high))
    told = {"values": values.size, "wrong": int(wrong.sum()), "first": np.argwhere(wrong)[:5].tolist()}
    if wrong.any():
        return Finding(
            "bounds", Status.FAILED, f"{told['wrong']} of {values.size} values are outside or not finite", told
        )
    return Finding("bounds", Status.PASSED, f"all {values.size} values are inside", told)


def monotonic(base: Array, raised: Array, increasing: bool = True, tolerance: float = 1e-9) -> Finding:
    """Outputs on rows, and on the same rows with one input raised: none may go against the direction."""
    before, after = _pair(base, raised)
    if not len(before):
        return missing("monotonicity", "row")
    change = after - before if increasing else before - after
    wrong = ~(change >= -tolerance)
    told = {"rows": len(before), "wrong": int(wrong.sum()), "first": np.flatnonzero(wrong)[:5].tolist()}
    if wrong.any():
        return Finding("monotonicity", Status.FAILED, f"{told['wrong']} of {len(before)} rows go the other way", told)
    return Finding("monotonicity", Status.PASSED, f"all {len(before)} rows go the right way", told)


def latency(
    candidate: Array,
    champion: Array,
    max_ratio: float = 1.2,
    quantile: float = 0.99,
    alpha: float = 0.05,
    seed: int = 0,
) -> Finding:
    """Timings of interleaved runs, pair by pair: the ratio of a quantile of both may be at most ``max_ratio``.

    Pairs are resampled together, so that what disturbs the machine disturbs both.
    """
    ours, theirs = _pair(candidate, champion)
    if len(ours) < MIN_TIMINGS:
        return missing("latency", f"{MIN_TIMINGS} interleaved timings, only {len(ours)}")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all() and (theirs > 0).all()):
        return missing("latency", "finite, positive timing in every run")

    def ratio(picked: Array) -> Array:
        return np.asarray(np.quantile(ours[picked], quantile, axis=1) / np.quantile(theirs[picked], quantile, axis=1))

    low, high = _bootstrap(len(ours), ratio, alpha, seed)
    told = {"timings": len(ours), "ratio": float(np.quantile(ours, quantile) / np.quantile(theirs, quantile))}
    return _bounded("latency", low, high, max_ratio, told)
