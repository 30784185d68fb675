from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.runtime.learned import SLACK, Learned, LearnedStore, choose, measure, median_run_ns

SECOND = 1_000_000_000


class Bench:
    """A model whose batch of n rows takes ``cost(n)`` ns on a clock of its own."""

    def __init__(self, cost: Callable[[int], int]) -> None:
        self.now = 0
        self.ran: list[int] = []
        self._cost = cost

    def run(self, rows: int) -> None:
        self.ran.append(rows)
        self.now += self._cost(rows)

    def measure(self, limit: int = 64, budget_ns: int = SECOND) -> dict[int, int]:
        return measure(self.run, limit, budget_ns, lambda: self.now)


def test_fixed_cost_per_run_makes_the_largest_size_best() -> None:
    measured = Bench(lambda rows: 100_000 + rows * 1000).measure()
    assert list(measured) == [1, 2, 4, 8, 16, 32, 64]
    assert choose(measured) == 64


def test_rows_that_get_dearer_stop_the_growth() -> None:
    measured = Bench(lambda rows: rows * (1000 if rows <= 4 else 1300)).measure()
    assert choose(measured) == 4


def test_a_model_that_batching_slows_down_is_not_batched() -> None:
    assert choose(Bench(lambda rows: int(1000 * rows**1.3)).measure()) == 1


def test_the_limit_itself_is_measured() -> None:
    assert list(Bench(lambda rows: 100_000).measure(limit=24)) == [1, 2, 4, 8, 16, 24]


def test_hopeless_sizes_are_not_run() -> None:
    bench = Bench(lambda rows: rows**3 * 1000)
    bench.measure()
    assert max(bench.ran) <= 4


def test_slow_models_are_compared_only_as_far_as_the_budget_goes() -> None:
    bench = Bench(lambda rows: rows * SECOND // 20)
    assert list(bench.measure()) == [1, 2]
    assert bench.now < 2 * SECOND
    bench = Bench(lambda rows: rows * SECOND * 5)
    assert list(bench.measure()) == [1]


def test_a_single_disturbance_does_not_count() -> None:
    def cost(rows: int) -> int:
        disturbed = rows == 64 and bench.ran.count(64) == 2
        return 50_000_000 if disturbed else 100_000 + rows * 1000

    bench = Bench(cost)
    assert choose(bench.measure()) == 64


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(1, 10**9), min_size=1))
def test_the_chosen_size_is_no_dearer_than_any_smaller(costs: dict[int, int]) -> None:
    chosen = choose(costs)
    smaller = [cost for rows, cost in costs.items() if rows < chosen]
    assert not smaller or costs[chosen] <= min(smaller) * SLACK
    larger = [rows for rows in costs if rows > chosen]
    assert all(costs[rows] > min(c for r, c in costs.items() if r < rows) * SLACK for rows in larger)


def test_nothing_measured_means_one_row() -> None:
    assert choose({}) == 1


def test_the_median_is_of_at_most_so_many_runs() -> None:
    bench = Bench(lambda rows: (5, 100, 7, 6, 8)[len(bench.ran) % 5])
    assert median_run_ns(lambda: bench.run(1), lambda: bench.now, runs=5) == 7
    slow = Bench(lambda rows: SECOND)
    assert median_run_ns(lambda: slow.run(1), lambda: slow.now) == SECOND
    assert len(slow.ran) == 1


SETTING = {"threads": [1, 0], "providers": [("cpu", {})]}
DIGEST = "ab" * 32


def test_what_was_learned_comes_back(tmp_path: Path) -> None:
    learned = Learned(16, "", {1: 100, 16: 50})
    LearnedStore(tmp_path).put(DIGEST, SETTING, learned)
    assert LearnedStore(tmp_path).get(DIGEST, SETTING) == learned


def test_another_file_or_setting_has_learned_nothing(tmp_path: Path) -> None:
    store = LearnedStore(tmp_path)
    store.put(DIGEST, SETTING, Learned(16))
    assert store.get("cd" * 32, SETTING) is None
    assert store.get(DIGEST, {**SETTING, "threads": [2, 0]}) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"format": 1}',
        b'{"format": 1, "digest": "D", "setting": {}, "learned": {"rows": 0, "refusal": "", "per_row_ns": null}}',
        b'{"format": 1, "digest": "D", "setting": {}, "learned": {"rows": "9", "refusal": "", "per_row_ns": null}}',
        b'{"format": 1, "digest": "D", "setting": {}, "learned": []}',
        b'{"format": 2, "digest": "D", "setting": {}, "learned": {"rows": 9, "refusal": "", "per_row_ns": null}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    store = LearnedStore(tmp_path)
    store.put(DIGEST, {}, Learned(9))
    (file,) = (tmp_path / "learned").iterdir()
    file.write_bytes(content.replace(b"D", DIGEST.encode()))
    assert store.get(DIGEST, {}) is None
    store.put(DIGEST, {}, Learned(7))
    assert store.get(DIGEST, {}) == Learned(7)


def test_an_unwritable_place_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "learned").write_bytes(b"a file where the folder should be")
    store = LearnedStore(tmp_path)
    store.put(DIGEST, SETTING, Learned(16))
    assert store.get(DIGEST, SETTING) is None


def test_nowhere_to_keep_is_no_error() -> None:
    store = LearnedStore(None)
    store.put(DIGEST, SETTING, Learned(16))
    assert store.get(DIGEST, SETTING) is None


def test_no_temporary_files_stay(tmp_path: Path) -> None:
    LearnedStore(tmp_path).put(DIGEST, SETTING, Learned(16))
    assert [file.suffix for file in (tmp_path / "learned").iterdir()] == [".json"]
