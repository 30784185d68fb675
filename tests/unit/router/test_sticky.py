"""router.policy.sticky: positions are fixed for ever, even, and independent under other salts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from router.policy.base import SPACE
from router.policy.sticky import position, redraw, seed_of

ROOT = Path(__file__).resolve().parents[3]


def test_positions_are_what_is_documented() -> None:
    """These numbers are part of the product: another value would put every user on another arm."""
    seed = xxhash.xxh3_64_intdigest(b"fraud-8")
    assert seed_of("fraud-8") == seed
    assert position("user-1", seed) == xxhash.xxh3_64_intdigest(b"user-1", seed)
    assert (seed, position("user-1", seed)) == (9654986701697318995, 2920791638500816746)


@pytest.mark.parametrize("hash_seed", ["0", "1", "4242"])
def test_another_process_finds_the_same_positions(hash_seed: str) -> None:
    code = (
        "from router.policy.sticky import position, seed_of\n"
        "print([position(f'user-{i}', seed_of('fraud-8', b'secret')) for i in range(200)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    seed = seed_of("fraud-8", b"secret")
    assert out.strip() == str([position(f"user-{i}", seed) for i in range(200)])


def test_salt_and_secret_are_kept_apart() -> None:
    seeds = {seed_of("a"), seed_of("b"), seed_of("a", b"b"), seed_of("ab"), seed_of("a", b"c"), seed_of("", b"ab")}
    assert len(seeds) == 6


def test_any_text_has_a_position() -> None:
    for text in ("", "é", "\U0001f600", "\udc80lone surrogate", "x" * 100_000):
        assert 0 <= position(text, 7) < SPACE


def test_a_redraw_is_even_and_independent_of_the_draw() -> None:
    """All draws come from the lowest tenth: their redraws cover everything all the same."""
    seed = seed_of("shadow")
    found = [redraw(draw, seed) for draw in range(0, SPACE // 10, SPACE // 10 // 20_000)]
    below = sum(value < SPACE // 4 for value in found) / len(found)
    assert abs(below - 0.25) < 4 * (0.25 * 0.75 / len(found)) ** 0.5
    assert redraw(SPACE - 1, seed) == redraw(SPACE - 1, seed)
