"""What is counted on the request path of a rollout."""

from __future__ import annotations

import json

import pytest

from router.rollout.evidence import OneArm, TwoArms
from router.rollout.spec import SLOW
from server.batching.batcher import Work
from server.gateway.rollouts import RolloutBooks


def books(share: float = 0.5) -> RolloutBooks:
    made = RolloutBooks("control")
    made.enter("candidate", "control", share)
    return made


def took(compute_ns: int, rows: int = 1) -> Work:
    work = Work([], 1, lambda _: None)
    work.assembled_ns, work.computed_ns, work.batch_rows = 1, 1 + compute_ns, rows
    return work


def test_requests_without_a_key_count_one_by_one() -> None:
    counted = books()
    for code in ("ok", "ok", "runtime_failure", "version_timeout"):
        counted.attempt("candidate", 0, code, None)
    counted.attempt("control", 0, "ok", None)
    counted.attempt("stable", 0, "runtime_failure", None)  # no part of the comparison
    taken = counted.take()
    assert (taken.attempts, taken.compared) == (4, 1)
    assert taken.rows["error"] == (TwoArms(4, 2, 1, 0),)
    assert taken.rows["timeout"] == (TwoArms(4, 1, 1, 0),)
    assert taken.alone["error"] == OneArm(4, 2.0)
    assert counted.take().rows["error"] == ()


@pytest.mark.parametrize(("code", "error", "late"), [
    ("invalid_argument", 0, 0), ("cancelled", 0, 1), ("input_rejected", 1, 0), ("deadline_exceeded", 1, 1),
    ("queue_full", 1, 0), ("queue_timeout", 1, 1),
])  # fmt: skip
def test_whose_fault_an_end_is(code: str, error: int, late: int) -> None:
    counted = books()
    counted.attempt("candidate", 0, code, None)
    counted.attempt("candidate", 0, "draining", None)
    alone = counted.take().alone
    assert (alone["error"], alone["timeout"]) == (OneArm(1, error), OneArm(1, late))


def test_a_key_counts_once_a_step_with_its_event_and_once_for_the_spread() -> None:
    counted = books(0.5)
    for _ in range(5):
        counted.attempt("candidate", 11, "runtime_failure", None)
        counted.attempt("control", 22, "ok", None)
    taken = counted.take()
    assert taken.rows["error"] == (TwoArms(0, 1, 0, 0, 0.5),)
    assert (taken.keys.candidate, taken.keys.stable, taken.keys.share) == (1, 1, 0.5)
    assert taken.alone["error"] == OneArm(5, 5.0)
    counted.attempt("candidate", 11, "runtime_failure", None)
    assert counted.take().keys.candidate == 0
    counted.enter("candidate", "control", 0.6)
    counted.attempt("candidate", 11, "ok", None)
    assert counted.take().keys.candidate == 1


def test_slow_is_what_stable_was_not_for_batches_of_that_size() -> None:
    counted = books()
    for _ in range(1_000):
        counted.attempt("control", 0, "ok", took(1_000_000))
    assert counted.take().rows[SLOW] == ()  # nothing was known before
    counted.attempt("candidate", 0, "ok", took(1_000_000))
    counted.attempt("candidate", 0, "ok", took(9_000_000))
    counted.attempt("candidate", 0, "ok", took(9_000_000, rows=64))  # stable never ran such batches
    counted.attempt("control", 0, "ok", took(1_000_000))
    assert counted.take().rows[SLOW] == (TwoArms(2, 1, 1, 0),)
    again = books()
    again.restore(counted.to_dict())
    again.attempt("candidate", 0, "ok", took(9_000_000))
    assert again.take().alone[SLOW] == OneArm(1, 1.0)


def test_only_the_control_slice_is_batched_by_itself() -> None:
    assert [books().lane(arm) for arm in ("control", "candidate", "stable")] == ["control", "", ""]


def test_outcomes_are_those_of_answers_of_the_arms_that_are_compared() -> None:
    counted = RolloutBooks("control", ["click"])
    counted.enter("candidate", "control", 0.5)
    counted.answered("candidate", "t-1", "mine", 11)
    counted.answered("control", "t-2", "", 22)
    counted.answered("pinned", "t-3", "", 33)
    counted.enter("candidate", "control", 0.25)
    assert counted.hear("mine", "", 1.0)
    assert counted.hear("t-2", "click", 1.0)
    assert not counted.hear("t-3", "click", 1.0)
    click = counted.take().outcomes["click"]
    assert click.rows == (TwoArms(0, 1, 0, 1, 0.5),)  # by the share when they were answered
    assert click.alone == OneArm(1, 1.0)
    assert not books().hear("t-1", "click", 1.0)


def test_after_a_restart_no_key_counts_again() -> None:
    counted, again = RolloutBooks("control", ["click"]), RolloutBooks("control", ["click"])
    counted.enter("candidate", "control", 0.5)
    counted.answered("candidate", "t-1", "", 11)
    counted.hear("t-1", "click", 1.0)
    counted.attempt("candidate", 11, "runtime_failure", None)
    counted.take()
    again.restore(json.loads(json.dumps(counted.to_dict())))
    again.enter("candidate", "control", 0.5)
    again.answered("candidate", "t-2", "", 11)
    again.hear("t-2", "click", 1.0)
    again.attempt("candidate", 11, "runtime_failure", None)
    taken = again.take()
    assert (taken.outcomes["click"].rows, taken.outcomes["click"].alone) == ((), OneArm(0, 0.0))
    assert taken.rows["error"] == ()
