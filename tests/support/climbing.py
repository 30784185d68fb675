"""Rollouts on a live server: short sections, callers in the background, and what the admin address says."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

from tests.support.routed import Place, X
from tests.support.server import Server
from tests.support.upstream import Upstream
from tests.support.v2 import call

#: Climbs as soon as a few hundred requests were answered: certified is a rate of errors, as there are none to compare.
STEPS = "[{weight: 30%, certify: {ceiling: 5%}}, {weight: 60%, certify: {ceiling: 5%}}]"
#: Stays where it is: what it wants is not shown by the traffic of a test.
STANDING = "[{weight: 50%, certify: {ceiling: 0.01%}}, {weight: 100%}]"
GATES = "{errors: {event: error, worse_than: 1.2}, ceiling: {event: error, max_rate: 10%}}"


def section(steps: str = STEPS, gates: str = GATES, more: str = "", candidate: str = '"2"', name: str = "r1") -> str:
    extra = f", {more}" if more else ""
    return (
        "    key: {from: [header:x-user]}\n"
        f"    rollout: {{id: {name}, candidate: {candidate}, steps: {steps}, gates: {gates}{extra}}}\n"
    )


def defaults(alpha: float = 0.05) -> str:
    return f"defaults: {{gates: {{alpha: {alpha}, evaluate_every: 100ms}}}}\n"


def write(place: Place, more: str, **fields: str) -> str:
    """Put the file of a place with one rollout there; its text."""
    text = place.text(more, **fields).replace("models:", defaults() + "models:", 1)
    place.path.write_text(text)
    return text


def write_with_upstream(place: Place, other: Upstream, more: str) -> str:
    """The same, where version 2 is another server's."""
    text = write(place, more, versions="13")
    mine = f'"3": {{source: {place.root}/v3.onnx}}'
    assert mine in text
    text = text.replace(mine, f'"2": {{upstream: {{url: "http://{other.address}", model: m}}}}')
    place.path.write_text(text)
    return text


class Callers:
    """Threads that ask without pause, a different user each time unless ``users`` bounds them."""

    def __init__(self, server: Server, headers: dict[str, str] | None = None, threads: int = 2) -> None:
        self.server = server
        self.headers = headers or {}
        self.versions: Counter[str] = Counter()
        self.failures: list[Any] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]

    def _run(self, number: int) -> None:
        count = 0
        while not self._done.is_set():
            count += 1
            user = f"u{number}-{count}"
            given = {"x-user": user, **self.headers}
            try:
                status, body, headers = call(self.server.http, "POST", "/v2/models/m/infer", {"inputs": X}, given)
            except (OSError, HTTPException) as error:  # killed before, or in the middle of, its answer
                self.failures.append(error)
                return
            if status == 200 and "x-tidegate-version" in headers:  # else it ended in the middle of the head
                self.versions[headers["x-tidegate-version"]] += 1
            else:
                self.failures.append((status, body))

    def start(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(30)


@contextmanager
def traffic(server: Server, threads: int = 2, **headers: str) -> Iterator[Callers]:
    callers = Callers(server, headers, threads).start()
    try:
        yield callers
    finally:
        callers.stop()


def status_of(place: Place, server: Server, rollout: str = "r1") -> dict[str, Any]:
    status, body, _ = place.admin(server, "GET", f"rollouts/{rollout}")
    return dict(body) if status == 200 else {"state": "", "error": body}


def reaches(place: Place, server: Server, *states: str, rollout: str = "r1", seconds: float = 60) -> dict[str, Any]:
    """The status once a rollout is in one of some states, and its table in force.

    A step is recorded before its table is published, and after a restart it stands there until the candidate is loaded.
    """
    until = time.monotonic() + seconds
    while True:
        found = status_of(place, server, rollout)
        if found["state"] in states and (found["state"] not in ("step", "awaiting") or found["weight"]):
            return found
        assert time.monotonic() < until, found
        time.sleep(0.02)


def recorded(place: Place, server: Server, action: str, seconds: float = 60) -> None:
    """Wait until a rollout's ``action`` is in the audit, and so the state with it on disk: what is shown goes ahead."""
    until = time.monotonic() + seconds
    while not any(event["action"] == f"rollout.{action}" for event in audited(place, server)):
        assert time.monotonic() < until, f"no rollout.{action} in the audit"
        time.sleep(0.02)


def order(place: Place, server: Server, word: str, rollout: str = "r1", **headers: str) -> tuple[int, Any]:
    status, body, _ = place.admin(server, "POST", f"rollouts/{rollout}:{word}", **headers)
    return status, body


def audited(place: Place, server: Server, prefix: str = "rollout.") -> list[dict[str, Any]]:
    _, body, _ = place.admin(server, "GET", "audit?limit=1000")
    return [event for event in body["events"] if event["action"].startswith(prefix)]
