"""A job's states: what moves it, and what does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from monitor.retrain import jobs
from monitor.retrain.jobs import OPEN, Job

JOB = Job("t", "7", ("drift",), 100, "requested", 100)
EIGHT = replace(JOB, state="registered", version="8")


def test_requested_to_promoted() -> None:
    job = jobs.accepted(JOB, "train", 200)
    assert (job.state, job.detail, job.state_ns, job.requested_ns) == ("accepted", "train", 200, 100)
    job = jobs.registered(job, "8", 300)
    assert (job.state, job.version, job.detail) == ("registered", "8", "")
    job = jobs.gated(job, True, "5 rules", 400)
    assert (job.state, job.detail) == ("gated", "5 rules")
    job = jobs.promoted(job, 500)
    assert (job.state, job.open) == ("promoted", False)


def test_verdicts() -> None:
    assert jobs.gated(EIGHT, False, "auc", 300).state == "rejected"
    undecided = jobs.gated(EIGHT, None, "no labels", 300)
    assert (undecided.state, undecided.state_ns, undecided.detail) == ("registered", 100, "no labels")
    assert jobs.gated(JOB, True, "", 300) == JOB


@pytest.mark.parametrize("state", ["requested", "accepted", "lost", "rejected"])
def test_a_version_may_come_late_and_again(state: jobs.JobState) -> None:
    assert jobs.registered(replace(JOB, state=state), "8", 300).state == "registered"
    assert jobs.registered(replace(EIGHT, state=state), "8", 300).state == state
    assert jobs.registered(replace(EIGHT, state=state), "9", 300).version == "9"


def test_a_promoted_version_stays_until_it_is_rolled_back() -> None:
    promoted = jobs.promoted(EIGHT, 300)
    assert jobs.registered(promoted, "9", 400) == promoted
    assert jobs.gated(promoted, False, "", 400) == promoted
    assert jobs.overdue(promoted, rollout=False, lost_after_ns=1, now_ns=10**9) == promoted
    rolled_back = jobs.rejected(promoted, "latency", 400)
    assert (rolled_back.state, rolled_back.detail) == ("rejected", "latency")


def test_a_person_may_promote_what_was_rejected() -> None:
    assert jobs.promoted(jobs.rejected(EIGHT, "auc", 300), 400).state == "promoted"
    assert jobs.promoted(JOB, 400) == JOB


def test_only_what_waits_can_be_taken_or_given_up() -> None:
    assert jobs.accepted(EIGHT, "train", 300) == EIGHT
    assert jobs.undelivered(EIGHT, "dead", 300) == EIGHT
    assert jobs.undelivered(JOB, "dead", 300).state == "lost"
    assert jobs.rejected(JOB, "", 300) == JOB


@pytest.mark.parametrize("state", sorted(OPEN))
def test_silence_loses_a_job_but_a_rollout_may_take_its_time(state: jobs.JobState) -> None:
    job = replace(JOB, state=state, version="8")
    assert jobs.overdue(job, rollout=False, lost_after_ns=50, now_ns=149) == job
    lost = jobs.overdue(job, rollout=False, lost_after_ns=50, now_ns=150)
    assert lost.state == "lost"
    assert state in lost.detail
    judged = state in ("registered", "gated")
    assert jobs.overdue(job, rollout=True, lost_after_ns=50, now_ns=150) == (job if judged else lost)


def test_saying_it_twice_changes_nothing() -> None:
    passed = jobs.gated(EIGHT, True, "ok", 300)
    assert jobs.gated(passed, True, "ok", 400) == passed
    promoted = jobs.promoted(passed, 500)
    assert jobs.promoted(promoted, 600) == promoted
