from __future__ import annotations

import pytest

from server.runtime.arena import ALIGNMENT, Arena, allocate_aligned


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 1 << 20])
def test_memory_starts_on_a_cache_line(size: int) -> None:
    block = allocate_aligned(size)
    assert block.nbytes == size
    assert block.ctypes.data % ALIGNMENT == 0


def test_regions_are_aligned_and_do_not_overlap() -> None:
    regions, _ = Arena().regions([3, 0, 130, 64, 1])
    assert [region.nbytes for region in regions] == [3, 0, 130, 64, 1]
    assert all(region.ctypes.data % ALIGNMENT == 0 for region in regions)
    for index, region in enumerate(regions):
        region[:] = index
    assert [set(region.tolist()) for region in regions] == [{0}, set(), {2}, {3}, {4}]


def test_the_buffer_moves_only_to_grow() -> None:
    arena = Arena()
    assert arena.regions([100])[1]
    assert not arena.regions([100, 200])[1]
    assert arena.regions([arena.size + 1])[1]
    assert not arena.regions([100])[1]


def test_growth_ends_at_the_bound() -> None:
    arena = Arena(max_bytes=6400)
    assert arena.fits([6400])
    assert not arena.fits([6400, 1])
    arena.regions([6400])
    assert arena.size == 6400
    assert [region.nbytes for region in arena.separate([6400, 1])] == [6400, 1]
    assert arena.size == 6400


def test_release_lets_go() -> None:
    arena = Arena()
    arena.regions([5000])
    arena.release()
    assert arena.size == 0
    assert arena.regions([1])[1]
