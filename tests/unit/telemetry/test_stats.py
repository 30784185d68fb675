"""Triton's statistics: what each number counts, its JSON shape, and the metrics read from it."""

from __future__ import annotations

import json
import pickle
import time

import pytest

from server.telemetry.stats import ModelStats, failure_reason, nv_families


def busy() -> ModelStats:
    """Two requests of 1 and 3 rows in one batch of 4, one alone, one refused, one broken."""
    stats = ModelStats("m", "2")
    stats.batch_done(4, 10_000, 200_000, 30_000)
    stats.request_done(True, 1_000_000, 500_000, 10_000, 200_000, 30_000, 1)
    stats.request_done(True, 2_000_000, 700_000, 10_000, 200_000, 30_000, 3)
    stats.batch_done(1, 1_000, 90_000, 2_000)
    stats.request_done(True, 400_000, 0, 1_000, 90_000, 2_000, 1)
    stats.request_done(False, 60_000, 50_000, 0, 0, 0, 2, "queue_full")
    stats.request_done(False, 70_000, 0, 5, 6, 7, 2, "runtime_failure")
    return stats


def test_the_json_entry_has_tritons_shape_and_meaning() -> None:
    before_ms = time.time_ns() // 1_000_000
    entry = json.loads(json.dumps(busy().as_dict()))
    assert before_ms <= entry.pop("last_inference") <= time.time_ns() // 1_000_000
    assert entry == {
        "name": "m",
        "version": "2",
        "inference_count": 5,
        "execution_count": 2,
        "inference_stats": {
            "success": {"count": 3, "ns": 3_400_000},
            "fail": {"count": 2, "ns": 130_000},
            "queue": {"count": 3, "ns": 1_200_000},
            "compute_input": {"count": 3, "ns": 21_000},
            "compute_infer": {"count": 3, "ns": 490_000},
            "compute_output": {"count": 3, "ns": 62_000},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [
            {
                "batch_size": 1,
                "compute_input": {"count": 1, "ns": 1_000},
                "compute_infer": {"count": 1, "ns": 90_000},
                "compute_output": {"count": 1, "ns": 2_000},
            },
            {
                "batch_size": 4,
                "compute_input": {"count": 1, "ns": 10_000},
                "compute_infer": {"count": 1, "ns": 200_000},
                "compute_output": {"count": 1, "ns": 30_000},
            },
        ],
    }


def test_nothing_done_is_all_zero() -> None:
    entry = ModelStats("m", "1").as_dict()
    assert (entry["last_inference"], entry["inference_count"], entry["batch_stats"]) == (0, 0, [])


def test_nv_metrics_are_read_from_the_statistics() -> None:
    stats = busy()
    stats.pending = lambda: 9
    families = {family.name: family for family in nv_families([stats, ModelStats("idle", "1")])}
    labels = ("m", "2")
    values = {name: family.points[labels] for name, family in families.items() if labels in family.points}
    assert values == {
        "nv_inference_request_success": 3,
        "nv_inference_count": 5,
        "nv_inference_exec_count": 2,
        "nv_inference_request_duration_us": 3_400,
        "nv_inference_queue_duration_us": 1_200,
        "nv_inference_compute_input_duration_us": 21,
        "nv_inference_compute_infer_duration_us": 490,
        "nv_inference_compute_output_duration_us": 62,
        "nv_inference_pending_request_count": 9,
        "tidegate_pending_requests": 9,
    }
    failures = families["nv_inference_request_failure"]
    assert failures.label_names == ("model", "version", "reason")
    assert {key[2]: value for key, value in failures.points.items() if key[:2] == labels} == {
        "REJECTED": 1,
        "CANCELED": 0,
        "BACKEND": 1,
        "OTHER": 0,
    }
    assert families["nv_inference_count"].points["idle", "1"] == 0
    assert families["nv_inference_pending_request_count"].points["idle", "1"] == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("queue_full", "REJECTED"),
        ("queue_timeout", "REJECTED"),
        ("deadline_exceeded", "CANCELED"),
        ("cancelled", "CANCELED"),
        ("out_of_memory", "BACKEND"),
        ("invalid_argument", "OTHER"),
        ("internal", "OTHER"),
    ],
)
def test_failure_reasons_are_tritons(code: str, reason: str) -> None:
    assert failure_reason(code) == reason


def test_two_processes_add_up() -> None:
    one, two = busy(), busy()
    two.batch_done(8, 1, 2, 3)
    merged = one.snapshot()
    merged.add(two)
    assert one.execution_count == 2, "a snapshot is detached"
    assert one.batches[4].count == 1
    assert (merged.inference_count, merged.execution_count, merged.success_ns) == (10, 5, 6_800_000)
    assert merged.failures == {"REJECTED": 2, "BACKEND": 2}
    assert (merged.batches[4].count, merged.batches[4].infer_ns, merged.batches[8].count) == (2, 400_000, 1)
    assert merged.last_inference_ms == max(one.last_inference_ms, two.last_inference_ms)


def test_a_snapshot_travels_between_processes() -> None:
    stats = busy()
    stats.pending = lambda: 1
    copy = pickle.loads(pickle.dumps(stats.snapshot()))  # noqa: S301 - our own bytes
    assert copy.as_dict() == stats.as_dict()
