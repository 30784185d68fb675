"""Outcomes of answered requests: joined by id, counted by key where traffic is sticky, bounded."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from router.errors import BadRolloutState
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.first_events import Placing
from router.rollout.gates import Gate, MeanEvidence, RateEvidence, RatioEvidence
from router.rollout.spec import NS_PER_S, MeanGate, RateGate, RatioGate
from server.gateway.rollout_outcomes import OutcomeBooks

HALF = Placing(1, 0.5)


def told(books: OutcomeBooks, id_: str, value: float, *, ours: bool, key: int = 0, placing: Placing = HALF) -> None:
    books.answered([id_], ours, key, placing)
    assert books.hear(id_, "", value)


def test_requests_without_a_key_count_one_by_one() -> None:
    books = OutcomeBooks(["click"])
    for number in range(4):
        told(books, f"c{number}", number % 2, ours=True)
    told(books, "s", 0.0, ours=False)
    found = books.take()["click"]
    assert found.rows == (TwoArms(4, 2, 1, 0),)
    assert found.alone == OneArm(4, 2.0)
    assert (found.means.candidate.mean, found.means.stable.count) == (0.5, 1)
    assert books.take()["click"].rows == ()


def test_a_key_counts_once() -> None:
    """For a ratio with its first outcome that is so, for rates and means with its first one."""
    books = OutcomeBooks(["click"])
    for number, value in enumerate((0.0, 1.0, 1.0)):
        told(books, f"c{number}", value, ours=True, key=11)
        told(books, f"s{number}", 1.0, ours=False, key=22)
    found = books.take()["click"]
    assert found.rows == (TwoArms(0, 1, 0, 1, 0.5),)
    assert found.alone == OneArm(1, 0.0)
    assert (found.means.candidate.count, found.means.stable.count) == (1, 1)


def test_a_key_that_moves_counts_on_either_arm_with_the_chance_to_have_moved() -> None:
    books = OutcomeBooks(["click"])
    told(books, "a", 1.0, ours=False, key=11, placing=Placing(1, 0.1))
    told(books, "b", 1.0, ours=True, key=11, placing=Placing(2, 0.4))
    told(books, "c", 1.0, ours=True, key=11, placing=Placing(3, 0.5))
    found = books.take()["click"]
    assert [(row.candidate_events, row.stable_events) for row in found.rows] == [(0, 1), (1, 0)]
    assert [row.share for row in found.rows] == [0.1, pytest.approx(1 / 3)]
    assert (found.alone, found.means.stable.count) == (OneArm(1, 1.0), 1)


def test_what_nobody_can_join_is_refused() -> None:
    books = OutcomeBooks(["click", "bought"])
    books.answered(["t-1", ""], True, 0, HALF)
    assert books.hear("t-1", "click", 1.0)
    assert books.hear("t-1", "click", 1.0)  # heard, and counted once
    refused = [("t-1", "other", 1.0), ("t-1", "", 1.0), ("t-2", "click", 1.0), ("", "click", 1.0)]
    assert not any(books.hear(*outcome) for outcome in refused)
    assert not books.hear("t-1", "bought", float("nan"))
    found = books.take()
    assert (found["click"].alone, found["bought"].alone) == (OneArm(1, 1.0), OneArm(0, 0.0))


def test_the_oldest_answers_are_forgotten_and_keys_are_bounded() -> None:
    books = OutcomeBooks(["click"], max_answered=4, max_keys=3)
    for number in range(9):
        books.answered([f"t-{number}"], True, 100 + number, HALF)
    assert [books.hear(f"t-{number}", "click", 1.0) for number in range(9)] == [False] * 5 + [True] * 4
    assert books.take()["click"].alone == OneArm(3, 3.0)
    assert books.unplaced == 1


def test_what_is_stored_goes_on_alike() -> None:
    books, again = OutcomeBooks(["click"]), OutcomeBooks(["click"])
    told(books, "a", 1.0, ours=True, key=2**64 - 1)
    told(books, "b", 0.0, ours=False, key=5)
    books.take()
    again.restore(json.loads(json.dumps(books.to_dict())) | {"gone": {}})
    for one in (books, again):
        told(one, "c", 1.0, ours=True, key=2**64 - 1)
        told(one, "d", 1.0, ours=False, key=5)
    assert again.take() == books.take()
    assert again.to_dict() == books.to_dict()


@pytest.mark.parametrize("damage", [{"told": [[1]]}, {"told": [[], []]}, {"told": [["x"], []], "first": {}}])
def test_a_damaged_state_is_named_so(damage: dict[str, Any]) -> None:
    with pytest.raises(BadRolloutState):
        OutcomeBooks(["click"]).restore({"click": damage})


# --- users who share their luck ---------------------------------------------------------------------------------------

USERS, REQUESTS, LOOKS = 400, 4_000, 20


def verdicts(seed: int, *, keyed: bool, sick: float = 0.1) -> tuple[bool, bool, bool]:
    """Whether gates on the ratio, the candidate's own rate and the mean say "worse" at any of 20 looks.

    A half of the users is the candidate's. Of its users ``sick``, of stable's a tenth, have a bad outcome nine times in
    ten; a few users send most of the requests.
    """
    rng = np.random.default_rng(seed)
    weight = rng.pareto(1.2, USERS) + 0.05
    who = rng.choice(USERS, REQUESTS, p=weight / weight.sum())
    ours = rng.random(USERS) < 0.5
    bad = rng.random(USERS) < np.where(ours, sick, 0.1)
    outcomes = (rng.random(REQUESTS) < np.where(bad[who], 0.9, 0.01)).astype(float)
    books = OutcomeBooks(["bad"])
    gates: tuple[Gate, ...] = (
        RatioEvidence("ratio", RatioGate("bad", 1.0), 0.05, 0.05),
        RateEvidence("rate", RateGate("bad", 0.1 * 0.9 + 0.9 * 0.01), 0.05, 0.05),
        MeanEvidence("mean", MeanGate("bad", 0.0, higher_is_better=False), 0.05, 0.05),
    )
    worse = [False] * 3
    for piece in np.array_split(np.arange(REQUESTS), LOOKS):
        for request in piece:
            user = int(who[request])
            told(books, str(request), outcomes[request], ours=bool(ours[user]), key=user + 1 if keyed else 0)
        heard = books.take()["bad"]
        for gate, evidence in zip(gates, (heard.rows, heard.alone, heard.means), strict=True):
            gate.take(evidence, NS_PER_S)
        worse = [before or gate.verdict().worse for before, gate in zip(worse, gates, strict=True)]
    return worse[0], worse[1], worse[2]


def test_clustered_outcomes_of_sticky_users_take_no_equal_candidate_back() -> None:
    """Counted by request they would, with every kind of gate."""
    runs = 40
    by_key = np.sum([verdicts(seed, keyed=True) for seed in range(runs)], axis=0)
    by_request = np.sum([verdicts(seed, keyed=False) for seed in range(runs)], axis=0)
    assert (by_key <= 2).all(), by_key  # a level of 5 %
    assert (by_request >= 4).all(), by_request  # twice that, and more


def test_users_whom_the_candidate_treats_worse_are_noticed() -> None:
    assert np.sum([verdicts(seed, keyed=True, sick=0.5) for seed in range(5)], axis=0).min() >= 4
