"""router.policy.base: spans, overlays, merging."""

from __future__ import annotations

from router.policy.base import SPACE, Overlap, Span, merged, overlay, positions


def test_positions_of_shares() -> None:
    assert positions(0) == 0
    assert positions(10_000) == SPACE
    assert positions(5_000) == SPACE // 2
    assert positions(1) == SPACE // 10_000


def test_overlay_cuts_at_every_edge_of_both() -> None:
    old = (Span(0, 10, "a"), Span(10, SPACE, "b"))
    new = (Span(0, 4, "x"), Span(4, 20, "y"), Span(20, SPACE, "z"))
    assert list(overlay(old, new)) == [
        Overlap(0, 4, "a", "x"),
        Overlap(4, 10, "a", "y"),
        Overlap(10, 20, "b", "y"),
        Overlap(20, SPACE, "b", "z"),
    ]


def test_overlay_with_common_edges_has_no_empty_pieces() -> None:
    same = (Span(0, 10, "a"), Span(10, SPACE, "b"))
    assert list(overlay(same, same)) == [Overlap(0, 10, "a", "a"), Overlap(10, SPACE, "b", "b")]


def test_merged_joins_neighbours_and_drops_empty_spans() -> None:
    spans = [Span(0, 5, "a"), Span(5, 5, "b"), Span(5, 9, "a"), Span(9, 12, "b")]
    assert merged(spans) == (Span(0, 9, "a"), Span(9, 12, "b"))
