"""The ring of predictions: what is found in it, what is saved of it, and what another process makes of that."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest

from monitor.label_memory import KEY_BYTES, GroupCounts, IdHash, Memory, remembered

STABLE, CANARY = GroupCounts("1", "stable", ""), GroupCounts("2", "canary", "eu")


def test_ids_are_numbers_that_only_the_key_tells() -> None:
    one, other = IdHash(), IdHash()
    same = IdHash(one.key)
    assert len(one.key) == KEY_BYTES
    names = [f"id-{n}" for n in range(1000)] + ["", "\ud800", "日本", "x" * 4096]
    assert [one(name) for name in names] == [same(name) for name in names]
    assert len({found(name) for found in (one, other) for name in names}) == 2 * len(names)
    digest = blake2b("日本".encode(), digest_size=8, key=one.key).digest()
    assert one("日本") == int.from_bytes(digest, "little", signed=True)
    assert all(-(2**63) <= one(name) < 2**63 for name in names)


def filled(capacity: int, requests: int, rows: int = 3) -> Memory:
    """Request n has the ids n + 1 and, of every other, 1000 + n; its rows' predictions are n, n + 0.25, n + 0.5."""
    memory = Memory(capacity, 1)
    for n in range(requests):
        while not memory.room(rows):
            memory.forget()
        ids = [n + 1, 1000 + n] if n % 2 else [n + 1]
        values = [n + row / 4 for row in range(rows)]
        memory.add(ids, rows, 10 * n, 2**64 - 1 - n, values, CANARY if n % 3 else STABLE)
    return memory


@pytest.mark.parametrize("capacity", [9, 10, 11, 30, 100])
def test_a_ring_is_saved_from_wherever_it_stands(capacity: int) -> None:
    memory = filled(capacity, 10)
    first = 10 - min(10, capacity // 3)
    memory.label[memory.place(memory.find(9) or 0)] = 1.0
    groups = memory.groups()
    saved = memory.saved(groups, 1000)
    saved.check(len(groups))
    again = Memory(capacity, 1)
    assert again.fits(saved)
    again.restore(saved, groups)
    assert (len(again), again.requests) == (len(memory), memory.requests)
    for n in range(10):
        number = again.find(n + 1)
        assert (number is None) == (n < first)
        assert again.find(1000 + n) == (number if n % 2 else None)
        if number is None:
            continue
        place = again.place(number)
        assert (again.rows(number), again.time[place], again.unit[place]) == (3, 10 * n, 2**64 - 1 - n)
        assert again.group[place] is (CANARY if n % 3 else STABLE)
        assert [again.prediction(number + row) for row in range(3)] == [(n + row / 4,) for row in range(3)]
        assert (again.label[place] == 1.0) == (n == 8)
    while len(again):
        again.forget()
    assert again.requests == 0


def test_only_the_newest_whole_requests_are_saved() -> None:
    memory = filled(100, 10)
    for most, kept in ((0, 0), (2, 0), (3, 1), (8, 2), (30, 10), (99, 10)):
        rows = memory.saved(memory.groups(), most)
        assert rows.requests[:, 1].tolist() == [10 * n for n in range(10 - kept, 10)]
        assert rows.predictions[:, 0].tolist() == [n + row / 4 for n in range(10 - kept, 10) for row in range(3)]


def test_rows_that_are_remembered_and_wait_are_counted_by_group() -> None:
    memory = filled(100, 4)  # of stable, canary, canary, stable
    memory.label[1] = 0.0
    memory.label[5] = 1.0
    saved = memory.saved([CANARY, STABLE], 100)
    assert remembered(saved, 3) == ([6, 6, 0], [5, 5, 0])
    assert remembered(Memory(5, 2).saved([], 100), 1) == ([0], [0])


def test_wider_rows_and_more_than_there_is_room_for_do_not_fit() -> None:
    saved = filled(30, 10).saved([STABLE, CANARY], 1000)
    assert not Memory(29, 1).fits(saved)
    assert not Memory(30, 2).fits(saved)


def test_a_repeated_id_means_the_newest_after_a_restart_too() -> None:
    memory = Memory(10, 1)
    memory.add([5, 7], 1, 0, 0, [0.1], STABLE)
    memory.add([6, 5], 1, 1, 0, [0.2], STABLE)
    again = Memory(10, 1)
    again.restore(memory.saved([STABLE], 10), [STABLE])
    assert [again.find(name) for name in (5, 6, 7)] == [1, 1, 0]
    again.forget()
    assert [again.find(name) for name in (5, 6, 7)] == [1, 1, None]
    assert np.isnan(again.label[1])
