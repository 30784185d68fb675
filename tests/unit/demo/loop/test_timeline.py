"""server.demo.loop.timeline: which rows of the trail are told, when, and how briefly."""

from __future__ import annotations

from typing import Any

from server.demo.loop.timeline import timeline


def row(second: float, action: str, **detail: Any) -> dict[str, Any]:
    stamp = f"2030-01-01T00:00:{second:09.6f}Z"
    return {"ts": stamp, "action": action, "subject": "flights:1", "actor": "tidegate", "detail": detail}


def test_what_tells_the_story_in_its_order_and_seconds_since_the_first() -> None:
    moments = timeline(
        [
            row(1, "model.ready"),
            row(2, "registry.publish"),
            row(3.5, "drift.raised", feature="origin", psi=4.987, arm="candidate"),
            row(4, "retrain.requested", reasons=[{"kind": "labels", "name": "auc"}, {"kind": "labels", "name": "mae"}]),
            row(4, "rollout.gated", status="passed"),
            row(5, "rollout.step", reason="certified", weight=1000),
        ]
    )
    assert [(moment.at_s, moment.action, moment.detail) for moment in moments] == [
        (0, "registry.publish", ""),
        (1.5, "drift.raised", "candidate, origin, psi 4.99"),
        (2, "retrain.requested", "labels: auc and labels: mae"),
        (3, "rollout.step", "certified, 10 % of the traffic"),
    ]


def test_details_are_cut_to_a_line() -> None:
    (moment,) = timeline([row(1, "gate.failed", reason="x" * 500, name="y" * 500)])
    assert len(moment.detail) == 64
    assert moment.detail.endswith("...")


def test_an_empty_trail_is_an_empty_timeline() -> None:
    assert timeline([]) == []
    assert timeline([row(1, "model.ready")]) == []
