"""Evidence that may be looked at any time: e-processes over counts of events, in log space, a few numbers each.

An e-process starts at 1 and, while its null hypothesis holds, the chance that it ever reaches 1 / alpha is at most
alpha (Ville's inequality), however often one looks and whatever the looks decide. All of them here are mixtures of
likelihood ratios over a grid of alternatives, so a state is one number per alternative.

Two arms (Lindon and Malek, arXiv 2011.03567). Every event is a coin that shows the candidate. When the candidate's rate
is ``bound`` times stable's, and the candidate has the share s of the attempts, it does so with probability
theta_0 = s bound / (s bound + 1 - s); when it is ``r bound`` times, with theta_r. The increment for k events, k_c of
them the candidate's, is k_c log(theta_r / theta_0) + (k - k_c) log((1 - theta_r) / (1 - theta_0)). With odds
o = s bound / (1 - s) that is k_c log r + k (log(1 + o) - log(1 + o r)). The base rate does not occur in it: an
incident that both arms share says nothing. It is valid at every event rate, for attempts that are independent: with
a = theta_r / theta_0 and b = (1 - theta_r) / (1 - theta_0), its expectation (1 + p_c (a - 1))^n_c (1 + p_s (b - 1))^n_s
is at most exp(n_c p_c (a - 1) + n_s p_s (b - 1)), which is 1 for p_c = bound p_s and less on the null's side. Where
events are frequent that bound is loose and the process slow; there the block form takes over.

Block form (Turner, Ly and Grunwald, arXiv 2106.02693). Both arms' counts are judged against alternatives (q_c, q_s)
that earlier data suggest: prod (q/p)^k ((1-q)/(1-p))^(n-k) where (p_c, p_s) is the point of the null nearest to the
alternative. The null is convex, so that is an e-variable for every n_c, n_s.

One arm: the Bernoulli likelihood ratio k log r - n log(1 + p_0 (r - 1)), odds of the alternative r times those of p_0.
It also holds for values in [0, 1] with sum k, by convexity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, log1p, sqrt
from typing import Any, Final

#: Alternatives that say "worse" and alternatives that say "better", as factors of the bound.
WORSE: Final = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0)
BETTER: Final = (0.9, 0.75, 0.6, 0.5, 0.35, 0.2)
#: How much of a mixture is on each that says "worse": most on faults that are neither too small to see soon nor so
#: large that any alternative sees them at once.
WORSE_PRIOR: Final = (0.03, 0.15, 0.21, 0.25, 0.17, 0.09, 0.08, 0.02)

#: Not quite half of a restart mixture starts at once, most of the rest over 60 blocks, and a tail ever more thinly.
BLOCK_NS: Final = 30_000_000_000
BLOCKS: Final = 60
AT_ONCE: Final = 0.45
_TAIL: Final = 0.02

#: Pooled event rate of earlier data from which the block form is used.
FREQUENT: Final = 0.2

#: Ratios at which the likelihood is kept for the interval: 2^(1/4) apart, 1/32 to 32.
_LADDER: Final = tuple(2.0 ** (step / 4) for step in range(-20, 21))
_LADDER_LOGS: Final = tuple(map(log, _LADDER))


@dataclass(slots=True, frozen=True)
class TwoArms:
    """What happened on both arms since the last look: attempts (or distinct keys) and those with the event.

    ``share`` is the probability with which a unit is the candidate's, where that is known (keys: the weight over the
    sum of both arms' weights); attempts may then be left at 0. None: the realised share of the attempts is used, which
    must not depend on how they ended.
    """

    candidate: int
    candidate_events: int
    stable: int
    stable_events: int
    share: float | None = None

    def __post_init__(self) -> None:
        for units, events in ((self.candidate, self.candidate_events), (self.stable, self.stable_events)):
            if units < 0 or events < 0 or (self.share is None and events > units):
                raise ValueError(f"wanted counts with no more events than attempts, got {self}")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share: wanted 0 to 1, got {self.share}")

    @property
    def odds(self) -> float:
        """Of a unit being the candidate's; 0 where one arm has nothing, and so nothing can be compared."""
        if self.share is None:
            return self.candidate / self.stable if self.stable else 0.0
        return self.share / (1 - self.share) if self.share < 1 else 0.0


@dataclass(slots=True, frozen=True)
class OneArm:
    """The candidate alone: units, and the sum of their values in [0, 1] (for an event: how many have it)."""

    units: int
    total: float

    def __post_init__(self) -> None:
        if not 0 <= self.total <= self.units:
            raise ValueError(f"wanted a total from 0 to the number of units, got {self}")


# --- increments -------------------------------------------------------------------------------------------------------


def label_increments(row: TwoArms, bound: float, factors: Sequence[float]) -> list[float]:
    """Log likelihood ratios of each alternative ratio ``factor * bound`` against ``bound``."""
    odds = row.odds * bound
    events = row.candidate_events + row.stable_events
    if not odds or not events:
        return [0.0] * len(factors)
    base = log1p(odds)
    return [row.candidate_events * log(factor) + events * (base - log1p(odds * factor)) for factor in factors]


def block_increments(row: TwoArms, bound: float, factors: Sequence[float], rate: float) -> list[float]:
    """The same from both arms' full counts; ``rate`` is the pooled event rate that earlier data suggest."""
    if not row.candidate or not row.stable:
        return [0.0] * len(factors)
    return [_block_increment(row, bound, factor, rate) for factor in factors]


def _block_increment(row: TwoArms, bound: float, factor: float, rate: float) -> float:
    n_c, n_s = row.candidate, row.stable
    share = n_c / (n_c + n_s)
    stable = rate / (share * bound * factor + 1 - share)
    candidate = min(bound * factor * stable, 0.99)
    stable = min(max((rate - share * candidate) / (1 - share), 0.001), 0.99)
    if (candidate - bound * stable) * (factor - 1) <= 0:
        return 0.0
    null = _nearest_null(n_c, n_s, candidate, stable, bound)
    return (
        row.candidate_events * log(candidate / (bound * null))
        + (n_c - row.candidate_events) * (log1p(-candidate) - log1p(-bound * null))
        + row.stable_events * log(stable / null)
        + (n_s - row.stable_events) * (log1p(-stable) - log1p(-null))
    )


def _nearest_null(n_c: int, n_s: int, q_c: float, q_s: float, bound: float) -> float:
    """The rate m for which (bound m, m) is nearest to (q_c, q_s) by n_c KL(q_c, bound m) + n_s KL(q_s, m).

    Its derivative vanishes where n_c (q_c - bound m)(1 - m) + n_s (q_s - m)(1 - bound m) = 0: the smaller root.
    """
    square = bound * (n_c + n_s)
    linear = n_c * (q_c + bound) + n_s * (1 + bound * q_s)
    constant = n_c * q_c + n_s * q_s
    return 2 * constant / (linear + sqrt(max(linear * linear - 4 * square * constant, 0.0)))


def rate_increments(row: OneArm, bound: float, factors: Sequence[float]) -> list[float]:
    """Log likelihood ratios of a rate whose odds are ``factor`` times those of ``bound``, against ``bound``."""
    return [row.total * log(factor) - row.units * log1p(bound * (factor - 1)) for factor in factors]


# --- processes --------------------------------------------------------------------------------------------------------


def log_add(first: float, second: float) -> float:
    """log(e^first + e^second), for any finite numbers and minus infinity."""
    if first < second:
        first, second = second, first
    return first if second == -inf else first + log1p(exp(second - first))


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + log(sum(exp(value - top) for value in logs))


def _log_mean(logs: Sequence[float]) -> float:
    return _log_sum(logs) - log(len(logs))


def unstarted(blocks: int) -> float:
    """The weight of a restart mixture that has not started when ``blocks`` blocks have begun, after the first.

    It falls evenly from 0.55 to 0.02 over 60 blocks, and as 1.2 / blocks from there, so that it never runs out.
    """
    if blocks >= BLOCKS:
        return _TAIL * BLOCKS / blocks
    return 1 - AT_ONCE - (1 - AT_ONCE - _TAIL) * blocks / BLOCKS


class RestartMixture:
    """An e-process that begins anew: M_r <- (M_r + pi_r w_t) LR_r(t), E = sum of M_r + what has not begun.

    pi is the mixture's prior over its alternatives. Beginning anew costs little against beginning once, and a fault
    that comes late need not first outweigh the good record. Time is that in which there was something to look at.
    """

    __slots__ = ("_logs", "_time_ns")

    def __init__(self) -> None:
        self._logs = [log(AT_ONCE * part) for part in WORSE_PRIOR]
        self._time_ns = 0

    @property
    def log_e(self) -> float:
        return log_add(_log_sum(self._logs), log(unstarted(self._time_ns // BLOCK_NS)))

    def add(self, increments: Sequence[float], elapsed_ns: int) -> None:
        """One look; ``elapsed_ns`` since the one before. What starts in that time does so before the look's counts."""
        before = unstarted(self._time_ns // BLOCK_NS)
        self._time_ns += elapsed_ns
        begun = before - unstarted(self._time_ns // BLOCK_NS)
        if begun > 0:
            self._logs = [
                log_add(value, log(begun * part)) for value, part in zip(self._logs, WORSE_PRIOR, strict=True)
            ]
        self._logs = [value + increment for value, increment in zip(self._logs, increments, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {"logs": list(self._logs), "time_ns": self._time_ns}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._logs = finite_floats(found["logs"], len(WORSE_PRIOR))
        self._time_ns = max(int(found["time_ns"]), 0)


class Mixture:
    """An e-process that begins once: E = mean of prod LR_r over the alternatives that say "better"."""

    __slots__ = ("_logs",)

    def __init__(self) -> None:
        self._logs = [0.0] * len(BETTER)

    @property
    def log_e(self) -> float:
        return _log_mean(self._logs)

    def add(self, increments: Sequence[float]) -> None:
        self._logs = [value + increment for value, increment in zip(self._logs, increments, strict=True)]

    def to_list(self) -> list[float]:
        return list(self._logs)

    def restore(self, found: Sequence[Any]) -> None:
        self._logs = finite_floats(found, len(BETTER))


def finite_floats(found: Sequence[Any], size: int) -> list[float]:
    """``size`` finite numbers, or ValueError."""
    values = [float(value) for value in found]
    if len(values) != size or not all(map(isfinite, values)):
        raise ValueError(f"wanted {size} finite numbers, got {len(values)}")
    return values


class RatioInterval:
    """The ratio of two rates: where the data put it, and an interval that holds it all the time with 1 - alpha.

    The interval is what the mixture over a ladder of ratios does not reject, each tested against all the others:
    tau is out when mean_rho exp(l(rho) - l(tau)) >= 1 / alpha, with l the log likelihood of the labels. Its ends are
    steps of the ladder (2^(1/4)), rounded outward; 0 and infinity (None) where the ladder ends.
    """

    __slots__ = ("_likelihood",)

    def __init__(self) -> None:
        self._likelihood = [0.0] * len(_LADDER)

    def add(self, row: TwoArms) -> None:
        odds, k_c = row.odds, row.candidate_events
        events = k_c + row.stable_events
        if odds and events:
            self._likelihood = [
                value + k_c * step - events * log1p(odds * ratio)
                for value, step, ratio in zip(self._likelihood, _LADDER_LOGS, _LADDER, strict=True)
            ]

    def interval(self, alpha: float) -> tuple[float, float | None]:
        """(low, high)."""
        floor = _log_mean(self._likelihood) + log(alpha)
        kept = [step for step, value in enumerate(self._likelihood) if value > floor]
        low = _LADDER[kept[0] - 1] if kept[0] else 0.0
        return low, _LADDER[kept[-1] + 1] if kept[-1] + 1 < len(_LADDER) else None

    def to_list(self) -> list[float]:
        return list(self._likelihood)

    def restore(self, found: Sequence[Any]) -> None:
        self._likelihood = finite_floats(found, len(_LADDER))
