"""How falsely and how fast a rollout's gates speak: simulated canaries, the shipped evidence, gates and machine.

    python -m loadtests.gate_simulation [--quick] [--only TABLE ...] [--output FILE.json]

1,000 requests per second, a base error rate of 0.5 %, a look each second, 30 minutes, unless a table says otherwise.
Cells are "rolled back / median s / 90 % s". Each is compared with what it must reach; the exit code is 1 when one does
not. Counts only, no clocks: the load of the machine does not matter, and a seed gives the same numbers everywhere.

The two tables with thousands of runs replay the evidence for all runs at once (`Replay`), in the same arithmetic as
``router.rollout.evidence``, to which a test compares it; all others go through the gates themselves.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf, log, sqrt
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from router.rollout.events import Accepted, Loaded, Order, Ordered, State, Tick
from router.rollout.evidence import AT_ONCE, BETTER, BLOCK_NS, WORSE, WORSE_PRIOR, TwoArms, unstarted
from router.rollout.first_events import FirstEvents, Placing
from router.rollout.gates import Keys, MismatchEvidence, RatioEvidence
from router.rollout.machine import Rollout
from router.rollout.plan import Traffic, certificate_times
from router.rollout.spec import NS_PER_S, MismatchGate, RateGate, RatioGate, RolloutSpec, StepSpec

Array: TypeAlias = np.ndarray[Any, Any]

RPS, BASE, HORIZON, ALPHA, TOLERATED = 1_000, 0.005, 1_800, 0.05, 1.2
SHARES = (0.01, 0.02, 0.05, 0.10)


@dataclass
class Cell:
    """One number of a table: what was found, and the most (or, ``least``, the least) that it may be."""

    table: str
    row: str
    column: str
    found: float
    bound: float | None = None
    least: bool = False

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return True
        return self.found >= self.bound if self.least else self.found <= self.bound


def within(bound: float, quick: bool) -> float:
    """A bound on a median; with few runs a median is known to a sixth only."""
    return bound * 1.15 if quick else bound


def at_most(chance: float, runs: int) -> float:
    """A bound on a part of ``runs`` whose chance is ``chance`` at most: two standard errors more."""
    return chance + 2 * sqrt(chance * (1 - chance) / runs)


# --- traffic and the replay of many runs ------------------------------------------------------------------------------


@dataclass
class Counts:
    """Attempts and errors per run and second of both arms, (runs, seconds) each."""

    candidate: Array
    candidate_events: Array
    stable: Array
    stable_events: Array


def traffic(rng: np.random.Generator, runs: int, share: float, candidate: Array, stable: Array) -> Counts:
    """``candidate`` and ``stable``: error rates per second."""
    ours = rng.binomial(RPS, share, size=(runs, len(candidate)))
    return Counts(ours, rng.binomial(ours, candidate), RPS - ours, rng.binomial(RPS - ours, stable))


def steady(rng: np.random.Generator, runs: int, share: float, ratio: float, seconds: int = HORIZON) -> Counts:
    """A candidate that is ``ratio`` times as bad as stable, all the time."""
    return traffic(rng, runs, share, np.full(seconds, BASE * ratio), np.full(seconds, BASE))


class Replay:
    """The label e-process for all runs at once: ``against`` with restarts, ``certificate`` without. Log evidence."""

    def __init__(self, counts: Counts) -> None:
        self._odds = counts.candidate / np.maximum(counts.stable, 1) * (counts.stable > 0)
        # A second in which one arm had nothing compares nothing.
        both = self._odds > 0
        self._ours = counts.candidate_events * both
        self._events = self._ours + counts.stable_events * both

    def against(self, bound: float) -> Array:
        runs, seconds = self._ours.shape
        prior = np.log(np.array(WORSE_PRIOR))[:, None]
        logs = np.repeat(prior + log(AT_ONCE), runs, axis=1)
        found = np.empty((runs, seconds))
        before = unstarted(0)
        for second in range(seconds):
            left = unstarted((second + 1) * NS_PER_S // BLOCK_NS)
            if before > left:
                logs = np.logaddexp(logs, prior + log(before - left))
            before = left
            logs += self._increments(second, bound, WORSE)
            found[:, second] = np.logaddexp(_log_sum(logs), log(left))
        return found

    def certificate(self, margin: float) -> Array:
        steps = [self._increments(second, margin, BETTER) for second in range(self._ours.shape[1])]
        return _log_sum(np.cumsum(np.stack(steps, axis=2), axis=2)) - log(len(BETTER))

    def _increments(self, second: int, bound: float, factors: Sequence[float]) -> Array:
        odds = self._odds[:, second] * bound
        grid = np.array(factors)[:, None]
        gain: Array = np.log1p(odds) - np.log1p(odds * grid)
        return np.asarray(self._ours[:, second] * np.log(grid) + self._events[:, second] * gain)


def _log_sum(logs: Array) -> Array:
    top = logs.max(axis=0)
    return np.asarray(top + np.log(np.exp(logs - top).sum(axis=0)))


def first_second(hit: Array) -> Array:
    """When each run first hit, in seconds from 1; infinite for never."""
    return np.asarray(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1.0, inf))


def quantile(times: Array, chance: float) -> float:
    return float(np.quantile(times, chance, method="higher"))


def shares_of(times: Array) -> tuple[float, float, float]:
    """(part that ended, median, 90 %)."""
    return float(np.isfinite(times).mean()), quantile(times, 0.5), quantile(times, 0.9)


# --- tables -----------------------------------------------------------------------------------------------------------

#: The most seconds that half of the canaries may take to be found, by their ratio, at shares 1, 2, 5 and 10 %.
MEDIANS = {2.0: (400, 200, 90, 50), 4.0: (45, 25, 10, 6), 10.0: (9, 6, 3, 2)}
MEDIANS_OF_FOUR = (560, 290, 130, 75)


def detection(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """One gate at alpha 0.05: false rollbacks, also just at the tolerated ratio, and how soon sick ones are found."""
    runs = 250 if quick else 1_000
    for place, share in enumerate(SHARES):
        for ratio in (1.0, TOLERATED, *MEDIANS):
            evidence = Replay(steady(rng, runs, share, ratio)).against(TOLERATED)
            rolled, median, late = shares_of(first_second(evidence >= -log(ALPHA)))
            row = f"{share:.0%}, {ratio:g}x"
            if ratio <= TOLERATED:
                yield Cell("one gate", row, "rolled back", rolled, 0.05)
                continue
            yield Cell("one gate", row, "rolled back", rolled, 0.99, least=True)
            yield Cell("one gate", row, "median s", median, within(MEDIANS[ratio][place], quick))
            yield Cell("one gate", row, "90% s", late)
            if ratio == 2.0:
                shared = shares_of(first_second(evidence >= -log(ALPHA / 4)))
                yield Cell("a gate of four", row, "of four: median s", shared[1], within(MEDIANS_OF_FOUR[place], quick))
                yield Cell("a gate of four", row, "of four: 90% s", shared[2])


def four_gates(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """Four gates on independent events share alpha: how often any of them rolls a canary back that is tolerable."""
    runs = 100 if quick else 400
    for share in (0.01, 0.10) if quick else SHARES:
        for ratio in (1.0, TOLERATED):
            evidence = Replay(steady(rng, 4 * runs, share, ratio)).against(TOLERATED)
            any_of_four = (evidence.max(axis=1) >= -log(ALPHA / 4)).reshape(4, runs).any(axis=0)
            yield Cell("four gates", f"{share:.0%}, {ratio:g}x", "rolled back", float(any_of_four.mean()), 0.05)


def shared_incident(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """S1. Both arms go from 0.5 % to 3 % errors after 300 s; the candidate is as good as stable throughout."""
    rates = np.where(np.arange(900) < 300, BASE, 0.03)
    for share in (0.01, 0.05, 0.10):
        for bound in (1.0, TOLERATED):
            evidence = Replay(traffic(rng, 150 if quick else 400, share, rates, rates)).against(bound)
            rolled = float((evidence.max(axis=1) >= -log(ALPHA)).mean())
            yield Cell("S1 shared incident", f"{share:.0%}, tolerated {bound:g}x", "rolled back", rolled, 0.05)


def late_regression(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """S2. The candidate is equal for 20 minutes, then fails four times as often."""
    rates = np.where(np.arange(HORIZON) < 1_200, BASE, 0.02)
    for share, bound in ((0.01, 75), (0.05, 20)):
        counts = traffic(rng, 200 if quick else 1_500, share, rates, np.full(HORIZON, BASE))
        times = first_second(Replay(counts).against(TOLERATED) >= -log(ALPHA))
        early = times <= 1_200
        found, median, late = shares_of(times[~early] - 1_200)
        row = f"{share:.0%}"
        yield Cell("S2 late regression", row, "rolled back before", float(early.mean()), 0.05)
        yield Cell("S2 late regression", row, "rolled back after", found, 0.99, least=True)
        yield Cell("S2 late regression", row, "median s", median, within(bound, quick))
        yield Cell("S2 late regression", row, "90% s", late)


def sticky_users(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """S3. 2 % of the users fail a quarter of their requests, and users differ widely in traffic. 300 s of 1,000 rps."""
    runs = 40 if quick else 200
    for label, shares in (("5%", (0.05,)), ("1% > 5% > 25%", (0.01, 0.05, 0.25))):
        healthy = [_sticky_run(rng, shares, 0.02) for _ in range(runs)]
        sick = [_sticky_run(rng, shares, 0.06) for _ in range(runs)]
        requests, keys = np.mean(healthy, axis=0)
        yield Cell("S3 sticky users", f"{label}, unit request", "rolled back", float(requests))
        yield Cell("S3 sticky users", f"{label}, unit key", "rolled back", float(keys), 0.05)
        yield Cell(
            "S3 sticky users", f"{label}, unit key, 6% fail", "rolled back", float(np.mean(sick, axis=0)[1]), 0.8, True
        )


def _sticky_run(rng: np.random.Generator, shares: Sequence[float], sick: float) -> tuple[bool, bool]:
    """Whether the candidate is rolled back when requests are the unit, and when keys are. Tolerated: 1x."""
    users, requests = 20_000, 300_000
    weight = rng.pareto(1.2, users) + 0.05
    who = np.minimum(np.searchsorted(np.cumsum(weight / weight.sum()), rng.random(requests)), users - 1)
    position = rng.random(users)
    own = rng.random(users)
    gates = [RatioEvidence(name, RatioGate("error", 1.0), ALPHA, ALPHA) for name in ("requests", "keys")]
    firsts, placing = FirstEvents(), Placing()
    worse = [False, False]
    for number, piece in enumerate(np.array_split(who, 300)):
        share = shares[number * len(shares) // 300]
        if share != placing.share:
            placing = Placing(placing.step + 1, share)
        ours = position[piece] < share
        chance = np.where(own[piece] < np.where(ours, sick, 0.02), 0.25, 0.0005)
        failed = rng.random(len(piece)) < chance
        for user in np.flatnonzero(failed):
            firsts.add(int(piece[user]), bool(ours[user]), placing)
        counted = [int(count) for count in (ours.sum(), (ours & failed).sum(), (~ours).sum(), (~ours & failed).sum())]
        gates[0].take(TwoArms(*counted), NS_PER_S)
        gates[1].take(firsts.take(), NS_PER_S)
        worse = [before or gate.verdict().worse for before, gate in zip(worse, gates, strict=True)]
    return worse[0], worse[1]


def certificates(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """S4. Certifying "under twice stable's rate": how long for an equal candidate, how often for one that is not."""
    runs = 150 if quick else 1_000
    for share in (0.01, 0.02, 0.05, 0.10, 0.25, 0.50):
        planned = certificate_times(RatioGate("error"), "errors", 2.0, share, Traffic(RPS, {"errors": BASE}), ALPHA)
        for ratio in (1.0, 1.5, 2.0, 4.0):
            evidence = Replay(steady(rng, runs, share, ratio)).certificate(2.0)
            found, median, slow = shares_of(first_second(evidence >= -log(ALPHA)))
            row = f"{share:.0%}, {ratio:g}x"
            if ratio >= 2:
                yield Cell("S4 certificates", row, "certified", found, at_most(0.05, runs))
                continue
            yield Cell("S4 certificates", row, "certified", found, 0.99 if ratio == 1 else None, least=True)
            yield Cell("S4 certificates", row, "median s", median)
            yield Cell("S4 certificates", row, "90% s", slow)
            if ratio == 1 and planned is not None:
                yield Cell("S4 certificates", row, "planned 90% s", planned[1])
                yield Cell("S4 certificates", row, "off by", abs(log(planned[1] / slow)), log(1.35))


def frequent_events(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """Events of 40 % of the requests (the block form), 20 rps, 600 s: false rollbacks at the edge, and detection."""
    runs, base = (60 if quick else 300), 0.4
    for share in (0.1, 0.5):
        for ratio, bound in ((1.0, 0.05), (TOLERATED, 0.05), (1.6, None)):
            times = np.array([_frequent_run(rng, share, base, ratio) for _ in range(runs)])
            found, median, _ = shares_of(times)
            row = f"{share:.0%}, {ratio:g}x"
            yield Cell("frequent events", row, "rolled back", found, bound or 0.99, least=bound is None)
            yield Cell("frequent events", row, "median s", median)


def _frequent_run(rng: np.random.Generator, share: float, base: float, ratio: float) -> float:
    gate = RatioEvidence("flags", RatioGate("flag", TOLERATED), ALPHA, ALPHA)
    for second in range(600):
        ours = int(rng.binomial(20, share))
        events = int(rng.binomial(ours, base * ratio)), int(rng.binomial(20 - ours, base))
        gate.take(TwoArms(ours, events[0], 20 - ours, events[1]), NS_PER_S)
        if gate.verdict().worse:
            return second + 1.0
    return inf


def mismatch(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """Distinct keys until it is noticed that an arm meant to hold 10 % of them loses some. Looked at each 500 keys."""
    for lost, bound in ((0.0, None), (0.05, None), (0.10, 35_000)):
        share = 0.1 * (1 - lost) / (0.1 * (1 - lost) + 0.9)
        keys = np.array([_mismatch_run(rng, share) for _ in range(100 if quick else 1_000)])
        found, median, late = shares_of(keys)
        row = f"{lost:.0%} lost"
        yield Cell("sample ratio", row, "noticed", found, 0.001 if lost == 0 else 0.99, least=lost > 0)
        yield Cell("sample ratio", row, "median keys", median, 80_000 if lost == 0.05 else None)
        yield Cell("sample ratio", row, "90% keys", late, bound)


def _mismatch_run(rng: np.random.Generator, share: float) -> float:
    gate = MismatchEvidence("keys", MismatchGate())
    for look in range(600):
        ours = int(rng.binomial(500, share))
        gate.take(Keys(ours, 500 - ours, 0.1), NS_PER_S)
        if gate.verdict().worse:
            return 500.0 * (look + 1)
    return inf


# --- whole rollouts through the machine -------------------------------------------------------------------------------


def rollout_spec(weights: Iterable[int]) -> RolloutSpec:
    """Errors against stable and against a ceiling; each step certifies a smaller ratio."""
    margins = {100: 4.0, 500: 2.0, 2_500: 1.5}
    steps = [StepSpec(weight, 60 * NS_PER_S, (("errors", margins.get(weight, 1.5)),)) for weight in weights]
    gates = (("errors", RatioGate("error")), ("ceiling", RateGate("error", 0.02)))
    return RolloutSpec("replay", "m", "1", "2", "sha256:2", (*steps, StepSpec(10_000)), gates)


def drive(
    spec: RolloutSpec, rng: np.random.Generator, ratio: float, seconds: int, paused: bool = False
) -> tuple[Rollout, int]:
    """One rollout until it is promoted, rolled back or out of time; with the second at which that was."""
    rollout = Rollout(spec, "replay")
    for event in (Accepted(), Loaded()):
        rollout.handle(event, 0)
    if paused:
        rollout.handle(Ordered(Order.PAUSE, "someone"), 0)
    for second in range(1, seconds + 1):
        ours = int(rng.binomial(RPS, rollout.weight / 10_000))
        bad = int(rng.binomial(ours, BASE * ratio)), int(rng.binomial(RPS - ours, BASE))
        row = TwoArms(ours, bad[0], RPS - ours, bad[1])
        rollout.handle(Tick({"errors": row}, ours), second * NS_PER_S)
        if rollout.state in {State.PROMOTING, State.ROLLING_BACK}:
            return rollout, second
    return rollout, seconds


def whole_rollouts(rng: np.random.Generator, quick: bool) -> Iterator[Cell]:
    """Rollouts 1 % > 5 % > 25 % through the machine, and ones paused at 1 and 5 %, where the gates go on."""
    runs = 15 if quick else 200
    for ratio, column, bound in (
        (1.0, State.ROLLING_BACK, 0.05),
        (1.0, State.PROMOTING, 0.9),
        (4.0, State.ROLLING_BACK, 0.99),
    ):
        ends = [drive(rollout_spec((100, 500, 2_500)), rng, ratio, HORIZON) for _ in range(runs)]
        part = float(np.mean([rollout.state is column for rollout, _ in ends]))
        yield Cell("machine, 1% > 5% > 25%", f"{ratio:g}x", column.value, part, bound, least=bound > 0.5)
        yield Cell("machine, 1% > 5% > 25%", f"{ratio:g}x", "median s", quantile(np.array([at for _, at in ends]), 0.5))
    for weight in (100, 500):
        ends = [drive(rollout_spec((weight,)), rng, 1.0, HORIZON, paused=True) for _ in range(runs)]
        part = float(np.mean([rollout.state is State.ROLLING_BACK for rollout, _ in ends]))
        yield Cell("machine, paused", f"{weight / 100:g}%, 1x", "rolled back", part, 0.05)
        ends = [drive(rollout_spec((weight,)), rng, 4.0, HORIZON, paused=True) for _ in range(runs)]
        part = float(np.mean([rollout.state is State.ROLLING_BACK for rollout, _ in ends]))
        yield Cell("machine, paused", f"{weight / 100:g}%, 4x", "rolled back", part, 0.99, least=True)


TABLES: dict[str, Callable[[np.random.Generator, bool], Iterator[Cell]]] = {
    table.__name__: table
    for table in (
        detection, four_gates, shared_incident, late_regression, sticky_users, certificates, frequent_events, mismatch,
        whole_rollouts,
    )
}  # fmt: skip


def show(cells: Iterable[Cell]) -> None:
    """Rows of one table: found values with what they must reach."""
    for cell in cells:
        must = "" if cell.bound is None else f"{'>=' if cell.least else '<='} {cell.bound:g}"
        mark = "" if cell.bound is None else "pass" if cell.passed else "FAIL"
        print(f"  {cell.row:28} {cell.column:22} {cell.found:12.4g}  {must:12} {mark}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="fewer runs per cell")
    parser.add_argument("--only", nargs="+", choices=sorted(TABLES), default=list(TABLES))
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args(arguments)
    cells: list[Cell] = []
    for place, (name, table) in enumerate(TABLES.items()):
        if name in chosen.only:
            # Each table has a stream of its own: it gives the same numbers alone and among the others.
            found = list(table(np.random.default_rng((20_260_101, place)), chosen.quick))
            print(f"{name}: {table.__doc__}", flush=True)
            show(found)
            cells += found
    failed = [cell for cell in cells if not cell.passed]
    print(f"{sum(cell.bound is not None for cell in cells)} cells with a bound, {len(failed)} failed")
    if chosen.output:
        chosen.output.write_text(
            json.dumps([asdict(cell) | {"passed": cell.passed} for cell in cells], indent=1) + "\n"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
