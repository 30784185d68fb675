"""router.breaker: when it opens, what it lets through, and who may close it."""

from __future__ import annotations

import pytest

from router.breaker import REFUSED, Breaker, BreakerPolicy, Outcome, State

S = 1_000_000_000
POLICY = BreakerPolicy(window_ns=10 * S, min_requests=20, open_at=5_000, probes=3, open_ns=10 * S)


def feed(breaker: Breaker, outcomes: str, now_ns: int) -> list[State]:
    """'.' succeeds, 'x' fails, '?' says nothing; the states after each."""
    meaning = {".": Outcome.OK, "x": Outcome.FAILED, "?": Outcome.UNKNOWN}
    states = []
    for letter in outcomes:
        term = breaker.admit(now_ns)
        assert term != REFUSED
        before = breaker.state
        assert breaker.settle(term, meaning[letter], now_ns) == (breaker.state is not before)
        states.append(breaker.state)
    return states


def opened(now_ns: int = 0) -> Breaker:
    breaker = Breaker(POLICY)
    feed(breaker, "x" * 20, now_ns)
    assert breaker.state is State.OPEN
    return breaker


def test_it_opens_at_the_share_but_not_before_enough_have_ended() -> None:
    breaker = Breaker(POLICY)
    assert set(feed(breaker, "x" * 19, 0)) == {State.CLOSED}
    assert feed(breaker, "x", 0) == [State.OPEN]
    assert breaker.admit(0) == REFUSED


def test_just_below_the_share_it_stays_closed() -> None:
    breaker = Breaker(POLICY)
    assert set(feed(breaker, ".x" * 9 + "..", 0)) == {State.CLOSED}
    assert feed(breaker, "x" * 2, 0) == [State.CLOSED, State.OPEN]


def test_unknown_ends_do_not_count() -> None:
    breaker = Breaker(POLICY)
    assert set(feed(breaker, "x" * 19 + "?" * 50, 0)) == {State.CLOSED}
    assert feed(breaker, "x", 0) == [State.OPEN]


def test_old_failures_are_forgotten() -> None:
    breaker = Breaker(POLICY)
    feed(breaker, "x" * 19, 0)
    assert set(feed(breaker, "x" * 19, 12 * S)) == {State.CLOSED}


def test_it_lets_a_few_through_later_and_closes_when_they_succeed() -> None:
    breaker = opened()
    assert breaker.admit(10 * S - 1) == REFUSED
    terms = [breaker.admit(10 * S) for _ in range(4)]
    assert breaker.state is State.HALF_OPEN
    assert terms[3] == REFUSED
    assert [breaker.settle(term, Outcome.OK, 11 * S) for term in terms[:3]] == [False, False, True]
    assert breaker.state is State.CLOSED
    assert set(feed(breaker, "x" * 19, 11 * S)) == {State.CLOSED}


def test_one_failed_probe_opens_it_again_for_the_whole_time() -> None:
    breaker = opened()
    first, second = breaker.admit(10 * S), breaker.admit(10 * S)
    assert breaker.settle(first, Outcome.FAILED, 12 * S)
    assert not breaker.settle(second, Outcome.OK, 12 * S)
    assert breaker.state is State.OPEN
    assert breaker.admit(22 * S - 1) == REFUSED
    assert breaker.admit(22 * S) != REFUSED


def test_attempts_from_before_cannot_close_it() -> None:
    breaker = Breaker(POLICY)
    early = [breaker.admit(0) for _ in range(3)]
    feed(breaker, "x" * 20, 0)
    breaker.admit(10 * S)
    assert not any(breaker.settle(term, Outcome.OK, 10 * S) for term in early)
    assert breaker.state is State.HALF_OPEN


def test_a_probe_without_a_verdict_gives_its_place_back() -> None:
    breaker = opened()
    terms = [breaker.admit(10 * S) for _ in range(3)]
    assert breaker.admit(10 * S) == REFUSED
    breaker.settle(terms[0], Outcome.UNKNOWN, 10 * S)
    assert breaker.admit(10 * S) != REFUSED
    assert breaker.admit(10 * S) == REFUSED


def test_rare_probes_add_up() -> None:
    breaker = opened()
    for n in range(3):
        assert breaker.settle(breaker.admit((10 + 100 * n) * S), Outcome.OK, (11 + 100 * n) * S) == (n == 2)
    assert breaker.state is State.CLOSED


def test_probes_that_never_end_do_not_block_for_ever() -> None:
    breaker = opened()
    for _ in range(3):
        breaker.admit(10 * S)
    assert breaker.admit(20 * S - 1) == REFUSED
    assert [breaker.admit(20 * S) != REFUSED for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    "bad", [{"open_at": 0}, {"open_at": 10_001}, {"probes": 0}, {"min_requests": 0}, {"window_ns": 9}, {"open_ns": 0}]
)
def test_policies_that_make_no_sense(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        BreakerPolicy(**bad)


def test_it_closes_with_clean_counts() -> None:
    breaker = Breaker(BreakerPolicy(window_ns=60 * S, min_requests=20, open_at=5_000, probes=1, open_ns=S))
    feed(breaker, "x" * 20, 0)
    assert feed(breaker, ".", S) == [State.CLOSED]
    assert set(feed(breaker, "x" * 19, S)) == {State.CLOSED}


def test_late_ends_without_a_verdict_make_no_places() -> None:
    breaker = opened()
    late = [breaker.admit(10 * S) for _ in range(3)]
    assert breaker.admit(20 * S) != REFUSED
    for term in late:
        breaker.settle(term, Outcome.UNKNOWN, 20 * S)
    assert [breaker.admit(20 * S) != REFUSED for _ in range(4)] == [True, True, True, False]
