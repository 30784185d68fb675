"""server.gateway and who records its requests: what is offered, after the answer, once per request that was tried."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from server.errors import ModelNotFound, RuntimeFailure
from server.gateway import ModelPolicy
from server.runtime.fake import Script
from server.types import Decision, ModelSpec, Tensor
from tests.unit.test_gateway import Answer, Rig, blocked, run


@dataclass
class Notes:
    """Remembers what it is offered, and how the reply stood then."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def offer(
        self, model: str, client_id: str, tidegate_id: str, decision: Decision, spec: ModelSpec,
        inputs: Sequence[Tensor | None], outputs: Sequence[Tensor] | None, status: str, latency_ns: int,
    ) -> None:  # fmt: skip
        shown = [None if tensor is None else tensor.array()[0, 0] for tensor in inputs]
        found = None if outputs is None else [tensor.array()[0, 0] for tensor in outputs]
        self.rows.append(
            {"model": model, "id": client_id, "own": tidegate_id, "arm": decision.arm, "version": spec.version,
             "inputs": shown, "outputs": found, "status": status, "took": latency_ns}
        )  # fmt: skip

    def last(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.rows[-1][name] for name in names)


def rig_with(script: Script | None = None) -> tuple[Rig, Notes]:
    rig, notes = Rig(script), Notes()
    rig.gateway.capture = notes
    return rig, notes


async def ended(answer: Answer) -> str:
    error = await answer.error()
    return "ok" if error is None else error.code


def test_an_answer_is_offered_with_what_went_in_and_what_came_out() -> None:
    async def body() -> None:
        rig, notes = rig_with()
        answer, _, permit = rig.ask(3.0)
        assert await ended(answer) == "ok"
        assert notes.last("model", "id", "own", "arm", "version") == ("m", "i", permit.tidegate_id, "stable", "1")
        assert notes.last("inputs", "outputs", "status") == ([3.0], [7.0], "ok")
        assert 0 < notes.rows[0]["took"] < 30e9
        rig.gateway.policies = {"m": ModelPolicy(entry="entry")}
        await ended(rig.ask(4.0)[0])
        assert notes.last("model", "inputs") == ("entry", [4.0])
        assert len(notes.rows) == 2
        await rig.close()

    run(body)


def test_a_failure_has_its_inputs_and_a_refusal_has_none() -> None:
    async def body() -> None:
        rig, notes = rig_with(Script(scale=2.0, offset=1.0, width=4, faults={0: RuntimeFailure("broken")}))
        assert await ended(rig.ask(3.0)[0]) == "runtime_failure"
        assert notes.last("inputs", "outputs", "status") == ([3.0], None, "runtime_failure")
        assert await ended(rig.ask(request={"inputs": []})[0]) == "invalid_argument"
        assert notes.last("inputs", "outputs", "status") == ([], None, "invalid_argument")
        assert len(notes.rows) == 2
        await rig.close()

    run(body)


def test_what_no_version_tried_and_what_nobody_waits_for_is_not_offered() -> None:
    async def body() -> None:
        release, started = threading.Event(), threading.Event()
        rig, notes = rig_with(blocked(release, started))
        with pytest.raises(ModelNotFound):
            rig.admit(model="nobody")
        assert await ended(rig.ask(request={"model": "nobody"})[0]) == "model_not_found"
        assert await ended(rig.ask(deadline_ns=1)[0]) == "deadline_exceeded"
        _, ticket, _ = rig.ask()
        ticket.cancel()
        assert notes.rows == []
        late = rig.ask(5.0, deadline_ns=time.monotonic_ns() + 20_000_000)[0]
        assert await ended(late) == "deadline_exceeded"
        assert notes.last("inputs", "outputs", "status") == ([5.0], None, "deadline_exceeded")
        release.set()
        await rig.close()

    run(body)
