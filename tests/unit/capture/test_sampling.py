"""server.capture.sampling: a share of the ids, the same for everybody, now and later."""

from __future__ import annotations

import pytest

from server.capture.sampling import drawn, edge_of, sample_id


@pytest.mark.parametrize("share", [1, 100, 5_000, 9_999])
def test_the_share_of_ids_is_the_one_asked_for(share: int) -> None:
    count = 20_000
    hits = sum(drawn(f"id-{number}", edge_of(share)) for number in range(count))
    p = share / 10_000
    assert abs(hits - count * p) <= 5 * (count * p * (1 - p)) ** 0.5 + 1


def test_none_and_all_are_exact() -> None:
    ids = [f"id-{number}" for number in range(2_000)]
    assert not any(drawn(one, edge_of(0)) for one in ids)
    assert all(drawn(one, edge_of(10_000)) for one in ids)


def test_a_larger_share_holds_every_id_of_a_smaller_one() -> None:
    ids = [f"id-{number}" for number in range(5_000)]
    small = {one for one in ids if drawn(one, edge_of(500))}
    assert small < {one for one in ids if drawn(one, edge_of(2_000))}


def test_the_draw_never_changes() -> None:
    """Other replicas and later versions draw alike: these ids are in the first tenth for good."""
    assert [number for number in range(40) if drawn(f"id-{number}", edge_of(1_000))] == DRAWN


DRAWN = [3, 12, 20, 22, 23]


def test_the_clients_id_counts_where_there_is_one() -> None:
    assert sample_id("mine", "gateway") == "mine"
    assert sample_id("", "gateway") == "gateway"


def test_text_that_is_no_unicode_can_be_an_id() -> None:
    assert drawn("\ud800", edge_of(10_000))
