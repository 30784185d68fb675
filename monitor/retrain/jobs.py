"""What became of a request to train: a small state machine, told by whoever sees versions come, be judged and serve.

    requested -> accepted -> registered -> gated -> promoted
        |            |           |  \\________|____-> rejected
        +------------+-----------+-- (silence) --> lost

A sink that has taken the event makes it accepted. One that was lost because no sink took it is requested again when a
person has the event tried again and no other job is open. A version whose lineage names the trigger makes it
registered, also when the job was given up as lost, or when an earlier version of the same job was rejected. A person
may promote what was rejected; a promoted version that is rolled back makes it rejected. What does not fit is ignored:
hints may come late, twice and in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

JobState: TypeAlias = Literal["requested", "accepted", "registered", "gated", "promoted", "rejected", "lost"]
OPEN: Final[frozenset[JobState]] = frozenset({"requested", "accepted", "registered", "gated"})
_HAS_VERSION: Final[frozenset[JobState]] = frozenset({"registered", "gated"})


@dataclass(slots=True, frozen=True)
class Job:
    """One request. ``of``: the champion's version then; ``version``: what came of it, "" so far; ``kinds``: why."""

    trigger_id: str
    of: str
    kinds: tuple[str, ...]
    requested_ns: int
    state: JobState
    state_ns: int
    version: str = ""
    detail: str = ""

    @property
    def open(self) -> bool:
        """Something is still to be expected of it."""
        return self.state in OPEN

    @property
    def judged_now(self) -> bool:
        """It has a version, which gates or a rollout look at."""
        return self.state in _HAS_VERSION


def accepted(job: Job, sink: str, now_ns: int) -> Job:
    """A sink has the event."""
    return _moved(job, "accepted", now_ns, sink) if job.state == "requested" else job


def undelivered(job: Job, reason: str, now_ns: int) -> Job:
    """No sink will ever have the event."""
    return _moved(job, "lost", now_ns, reason) if job.state == "requested" else job


def retried(job: Job, now_ns: int) -> Job:
    """Its event, which no sink took, is on its way again."""
    return _moved(job, "requested", now_ns) if job.state == "lost" and not job.version else job


def registered(job: Job, version: str, now_ns: int) -> Job:
    """A version came whose lineage names the trigger; a further one takes the place of the one before."""
    if job.state == "promoted" or job.version == version:
        return job
    return _moved(replace(job, version=version), "registered", now_ns)


def gated(job: Job, passed: bool | None, detail: str, now_ns: int) -> Job:
    """The gates' verdict on its version; None: they could not decide and ask for approval."""
    if job.state not in _HAS_VERSION:
        return job
    if passed is None:
        return replace(job, detail=detail)
    return _moved(job, "gated" if passed else "rejected", now_ns, detail)


def promoted(job: Job, now_ns: int) -> Job:
    """Its version is the champion, whatever was thought of it before."""
    return _moved(job, "promoted", now_ns) if job.version else job


def rejected(job: Job, reason: str, now_ns: int) -> Job:
    """Its version was refused, aborted or rolled back."""
    return _moved(job, "rejected", now_ns, reason) if job.judged_now or job.state == "promoted" else job


def overdue(job: Job, rollout: bool, lost_after_ns: int, now_ns: int) -> Job:
    """The job, lost when nothing was heard of it for too long. A rollout may take its time."""
    silent = job.open and now_ns - job.state_ns >= lost_after_ns and not (rollout and job.judged_now)
    return _moved(job, "lost", now_ns, f"nothing was heard of it since it was {job.state}") if silent else job


def _moved(job: Job, state: JobState, now_ns: int, detail: str = "") -> Job:
    if (job.state, job.detail) == (state, detail) and state != "registered":
        return job
    return replace(job, state=state, state_ns=now_ns, detail=detail)
