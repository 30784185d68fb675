"""What one routing decision costs: ``python -m loadtests.route_cost``.

Four cases, in a table of one model and in a table of a thousand: two rules that do not match, a key, a split and a
shadow sample (the ordinary rollout); the same with a rule that matches; without a key; and a model on which nothing is
configured. Each decision is made from a fresh query with a fresh random draw, by another user each time.

Rounds of all cases and both tables are interleaved, so that a slow spell of the machine hits all alike. Read the
medians, and the ratio of the large table to the small one with its spread over the rounds. Single decisions are timed
one by one, and the cost of an empty timing (the clock itself) is taken off.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random, getrandbits

from router.decision import RouteQuery
from router.table import RoutingTable
from router.types import Arm, Destination, KeySpec, Match, ModelRoutes, RolloutSplit, Rule, ShadowRoute, ValueTest

SIZES = (1, 1_000)
TARGET_P50_NS = 2_000
TARGET_RATIO = 1.05
BROWSER = {"host": "localhost:8000", "accept": "*/*", "content-type": "application/json", "user-agent": "bench"}

Case = Callable[[str], RouteQuery]


def model(name: str) -> ModelRoutes[str]:
    """Two rules, a key, a candidate with its control, and one shadow."""
    versions = {number: f"{name}:{number}" for number in "789"}

    def to(number: str) -> Destination[str]:
        return Destination(name, number, versions[number])

    return ModelRoutes(
        versions,
        "7",
        tenant_header="x-tenant",
        key=KeySpec(("header:x-user-id", "parameter:user_id", "request:id")),
        rules=(
            Rule("partners", Match(tenant=ValueTest(frozenset({"acme", "beta"}))), to("7")),
            Rule("testers", Match(header={"x-canary": ValueTest(frozenset({"always"}))}), "candidate"),
        ),
        split=RolloutSplit(f"{name}-8", (Arm("candidate", to("8"), 1_000, "control"),)),
        shadows=(ShadowRoute(f"{name}-9", to("9"), 500),),
    )


def table(size: int) -> RoutingTable[str]:
    models = {f"m{number}": model(f"m{number}") for number in range(size)}
    models["plain"] = ModelRoutes({"1": "plain:1"}, "1")
    return RoutingTable(models, 1)


def rollout_case(user: str) -> RouteQuery:
    return RouteQuery("m0", "", {**BROWSER, "x-tenant": "gamma", "x-user-id": user}, {}, "")


def rule_case(user: str) -> RouteQuery:
    return RouteQuery("m0", "", {**BROWSER, "x-tenant": "acme", "x-user-id": user}, {}, "")


def keyless_case(_: str) -> RouteQuery:
    return RouteQuery("m0", "", BROWSER, {}, "")


def plain_case(user: str) -> RouteQuery:
    return RouteQuery("plain", "", {**BROWSER, "x-user-id": user}, {}, "")


CASES: dict[str, Case] = {
    "2 rules, key, split, shadow": rollout_case,
    "rule matches": rule_case,
    "no key: random": keyless_case,
    "nothing configured": plain_case,
}


@dataclass
class Measured:
    """Nanoseconds per decision: every single one, and the median of each round."""

    singles: list[int] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


@dataclass
class Row:
    case: str
    models: int
    p50_ns: float
    p99_ns: float


def once(routing: RoutingTable[str], queries: list[RouteQuery]) -> list[int]:
    """Time each decision by itself, drawing included."""
    clock, resolve, took = time.perf_counter_ns, routing.resolve, []
    for query in queries:
        start = clock()
        resolve(query, getrandbits(64))
        took.append(clock() - start)
    return took


def empty(count: int) -> float:
    """What the clock itself costs."""
    clock, took = time.perf_counter_ns, []
    for _ in range(count):
        start = clock()
        took.append(clock() - start)
    return statistics.median(took)


def measure(rounds: int, per_round: int) -> dict[tuple[str, int], Measured]:
    tables = {size: table(size) for size in SIZES}
    rng = Random(11)
    found = {(case, size): Measured() for case in CASES for size in SIZES}
    for number in range(rounds + 1):
        clock_ns = empty(per_round)
        users = [f"tenant-7/user-{rng.randrange(10**6):06d}" for _ in range(per_round)]
        for case, make in CASES.items():
            queries = [make(user) for user in users]
            for size in SIZES if number % 2 else reversed(SIZES):
                took = [ns - clock_ns for ns in once(tables[size], queries)]
                if number:  # the first round warms the interpreter up
                    found[case, size].singles += map(round, took)
                    found[case, size].rounds.append(statistics.median(took))
    return found


def rows(found: dict[tuple[str, int], Measured]) -> list[Row]:
    out = []
    for (case, size), measured in found.items():
        cuts = statistics.quantiles(measured.singles, n=100)
        out.append(Row(case, size, cuts[49], cuts[98]))
    return out


def ratios(found: dict[tuple[str, int], Measured], case: str) -> list[float]:
    """Large table to small table, one ratio a round, in order of size."""
    small, large = (found[case, size].rounds for size in SIZES)
    return sorted(b / a for a, b in zip(small, large, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Cost of one routing decision.")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of each case and table")
    parser.add_argument("--per-round", type=int, default=2_000, help="decisions in a round")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    options = parser.parse_args()
    if options.rounds < 1 or options.per_round < 2:
        parser.error("rounds must be positive, and per-round at least 2")
    found = measure(options.rounds, options.per_round)
    table_rows = rows(found)
    spreads = {case: ratios(found, case) for case in CASES}
    if options.json:
        facts = {"python": platform.python_version(), "machine": platform.machine()}
        print(json.dumps({"facts": facts, "rows": [asdict(row) for row in table_rows], "ratios": spreads}))
    else:
        show(table_rows, spreads)
    slow = [row for row in table_rows if row.p50_ns > TARGET_P50_NS]
    grown = [case for case, spread in spreads.items() if statistics.median(spread) > TARGET_RATIO]
    return 1 if slow or grown else 0


def show(table_rows: list[Row], spreads: dict[str, list[float]]) -> None:
    print(f"{'case':<30}{'models':>8}{'p50 ns':>10}{'p99 ns':>10}")
    for row in table_rows:
        print(f"{row.case:<30}{row.models:>8}{row.p50_ns:>10.0f}{row.p99_ns:>10.0f}")
    print(f"\n{SIZES[1]} models to {SIZES[0]}: median ratio (10th to 90th percentile of rounds)")
    for case, spread in spreads.items():
        low, high = spread[len(spread) // 10], spread[-1 - len(spread) // 10]
        print(f"{case:<30}{statistics.median(spread):>8.3f}  ({low:.3f} to {high:.3f})")
    print(f"\ntargets: p50 <= {TARGET_P50_NS} ns, median ratio <= {TARGET_RATIO}")


if __name__ == "__main__":
    sys.exit(main())
