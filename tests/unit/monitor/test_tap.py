"""The tap: it copies, it counts exactly, it drops instead of waiting, and it never raises."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import monitor.tap
from monitor.tap import Batches, Tap

COMPILED = not (monitor.tap.__file__ or "").endswith(".py")


@dataclass
class Output:
    data: Any


def tap(**bounds: int) -> Tap:
    return Tap([("x", 1, False)], [("y", 0, False)], **{"max_rows": 100, "max_bytes": 1 << 20, **bounds})


def test_contents_are_copied_in_order() -> None:
    one = tap()
    first, second = bytearray(b"abcd"), bytearray(b"efgh")
    assert one.offer(2, [None, [first, memoryview(second)]], [Output(b"yy")], 7, "canary")
    first[:] = b"...."
    assert one.take(10) == Batches([7], ["canary"], [2], [10], [[b"abcdefgh"], [b"yy"]])
    assert one.keys == (("input", "x"), ("output", "y"))


def test_absent_input_and_unbatched_model() -> None:
    one = tap()
    assert one.offer(0, [[b"?"], None], [Output(b"y")], 0)
    assert one.take(10) == Batches([0], ["stable"], [1], [1], [[None], [b"y"]])


def test_strings_are_referred_to_and_weighed() -> None:
    one = Tap([("s", 0, True), ("x", 1, False)], [("t", 0, True)], max_rows=100, max_bytes=10_000)
    strings = [b"a" * 3000, b"b"]
    assert one.offer(2, [[strings], [b"12345678"]], [Output([b"c", b"d"])], 0)
    taken = one.take(10)
    assert taken.data == [[[strings]], [b"12345678"], [[[b"c", b"d"]]]]
    assert 3000 < taken.sizes[0] < 3400


def test_a_full_ring_drops_whole_batches_and_counts_them() -> None:
    one = tap()
    taken = [one.offer(30, [None, [b"x"]], [Output(b"y")], 0, arm) for arm in ("stable", "stable", "stable", "canary")]
    assert taken == [True, True, True, False]
    assert (one.offered, one.dropped, one.waiting) == (120, 30, 90)
    assert one.dropped_by_arm == {"canary": 30}
    assert sum(one.take(1000).rows) == 90
    assert one.offer(30, [None, [b"x"]], [Output(b"y")], 0)
    assert (one.offered, one.taken, one.dropped, one.waiting) == (150, 90, 30, 30)


def test_bytes_are_bounded_too() -> None:
    one = tap(max_bytes=1000)
    assert one.offer(1, [None, [b"x" * 2000]], [Output(b"")], 0)
    assert not one.offer(1, [None, [b"x"]], [Output(b"")], 0)
    one.take(1)
    assert one.offer(1, [None, [b"x"]], [Output(b"")], 0)


def test_strange_batches_are_refused_not_raised() -> None:
    one = tap()
    for inputs, outputs in [([], [Output(b"")]), ([None, [b""]], []), ([None, ["text"]], [Output(b"")]), (None, None)]:
        assert not one.offer(5, inputs, outputs, 0)
    assert (one.offered, one.refused, one.waiting) == (20, 20, 0)
    assert one.take(10) == Batches([], [], [], [], [[], []])


class Rows(int):
    """Counts how often rows are added up."""

    added = 0

    def __radd__(self, other: int) -> int:
        Rows.added += 1
        return int(other) + int(self)

    __add__ = __radd__


@pytest.mark.skipif(COMPILED, reason="compiled, a number has no class that could count")
def test_a_long_queue_is_not_gone_through_for_a_few_batches() -> None:
    one = tap(max_rows=10_000)
    for _ in range(5000):
        one.offer(Rows(1), [None, [b"x"]], [Output(b"y")], 0)
    Rows.added = 0
    assert one.take(10).rows == [1] * 10
    assert 0 < Rows.added < 50


def test_take_stops_after_enough_rows() -> None:
    one = tap()
    for _ in range(5):
        one.offer(4, [None, [b"x"]], [Output(b"y")], 0)
    assert one.take(5).rows == [4, 4]
    assert one.waiting == 12
    assert one.take(12).rows == [4, 4, 4]
    assert one.take(12).rows == []


def test_a_batch_larger_than_asked_for_is_taken_whole() -> None:
    one = tap()
    one.offer(40, [None, [b"x"]], [Output(b"y")], 1)
    one.offer(1, [None, [b"z"]], [Output(b"y")], 2)
    assert one.take(5) == Batches([1], ["stable"], [40], [2], [[b"x"], [b"y"]])
    assert one.take(5).times == [2]


def test_a_batch_that_is_refused_midway_leaves_nothing_behind() -> None:
    one = Tap([("x", 0, False)], [("y", 0, False), ("z", 1, False)], max_rows=100, max_bytes=1000)
    assert not one.offer(1, [[b"x"]], [Output(b"y")], 1)
    assert one.offer(1, [[b"X"]], [Output(b"Y"), Output(b"Z")], 2)
    assert one.take(5) == Batches([2], ["stable"], [1], [3], [[b"X"], [b"Y"], [b"Z"]])


def test_a_batch_of_which_not_all_is_there_yet_waits() -> None:
    one = Tap([("x", 0, False)], [], max_rows=100, max_bytes=1000)
    assert one.offer(1, [[b"x"]], [], 1)
    one._queue.extend([2, "canary"])
    assert one.take(5) == Batches([1], ["stable"], [1], [1], [[b"x"]])
    assert one.take(5).rows == []
    one._queue.extend([3, b"y"])
    assert one.take(5) == Batches([2], ["canary"], [3], [1], [[b"y"]])


def test_batches_in_parts() -> None:
    some = Batches([1, 2, 3], ["a", "b", "a"], [4, 5, 6], [7, 8, 9], [[b"p", None, b"q"]])
    assert some.part(1, 3) == Batches([2, 3], ["b", "a"], [5, 6], [8, 9], [[None, b"q"]])
    assert some.without("a") == Batches([2], ["b"], [5], [8], [[None]])
    assert some.without("c") is some


def test_wakes_when_half_full() -> None:
    woken: list[int] = []
    one = Tap([("x", 0, False)], [], max_rows=100, max_bytes=1000, wake=lambda: woken.append(one.waiting))
    for _ in range(8):
        one.offer(10, [[b""]], [], 0)
    assert woken == [60, 70, 80]


def test_wakes_when_half_full_of_bytes() -> None:
    woken: list[int] = []
    bounds: dict[str, int] = {"max_rows": 100, "max_bytes": 1000, "wake_bytes": 500}
    one = Tap([("x", 0, False)], [], **bounds, wake=lambda: woken.append(one.waiting))
    for _ in range(13):
        one.offer(1, [[b"x" * 100]], [], 0)
    assert woken == [6, 7, 8, 9, 10, 11]
    assert one.dropped == 2
    one.take(8)
    one.offer(1, [[b"x" * 100]], [], 0)
    assert len(woken) == 6


def test_what_cannot_be_taken_stays() -> None:
    one = Tap([("s", 0, True)], [], max_rows=100, max_bytes=1000)
    strings: list[Any] = [b"a", b"b"]
    assert one.offer(2, [[strings]], [], 0)
    strings[1] = None
    with pytest.raises(TypeError):
        one.take(5)
    assert (one.waiting, one.taken) == (2, 0)
    strings[1] = b"b"
    assert one.take(5).data == [[[[b"a", b"b"]]]]
    assert (one.waiting, one.taken) == (0, 2)


@pytest.mark.parametrize("only", [True, False], ids=["one input", "more tensors"])
def test_room_and_wakes_are_by_what_waits_at_each_offer(only: bool) -> None:
    """However much comes and goes between: also a batch larger than all room, and one whose input is absent."""
    rng = np.random.default_rng(11)
    woken: list[int] = []
    outputs = [] if only else [("y", 0, False)]
    one = Tap([("x", 0, False)], outputs, max_rows=40, max_bytes=900, wake=lambda: woken.append(one.offered))
    queue: list[tuple[int, int]] = []
    offered, wanted, dropped, refused = 0, [], 0, 0
    for step in range(4000):
        rows, size = int(rng.integers(1, 12)) + 60 * (step % 97 == 0), int(rng.choice([0, 30, 300]))
        waits, held = sum(own for own, _ in queue), sum(own for _, own in queue)
        room = waits + rows <= 40 and held <= 900
        strange = room and step % 89 == 0
        content: Any = None if step % 13 == 0 else [b"x" * size]
        given = one.offer(rows, [] if strange else [content], [Output(b"")], step)
        assert given == (room and not strange)
        offered += rows
        if given:
            queue.append((rows, 0 if content is None else size))
            if waits + rows > 20:
                wanted.append(offered)
        else:
            dropped, refused = dropped + rows * (not room), refused + rows * strange
        if rng.random() < 0.2:
            taken = one.take(int(rng.integers(1, 50)))
            assert list(zip(taken.rows, taken.sizes, strict=True)) == queue[: len(taken.rows)]
            del queue[: len(taken.rows)]
        assert (one.offered, one.dropped, one.refused) == (offered, dropped, refused)
        assert one.waiting == sum(own for own, _ in queue)
    assert woken == wanted
    assert min(dropped, refused, len(woken)) > 0


@pytest.mark.parametrize("only", [True, False], ids=["one input", "more tensors"])
def test_counters_are_exact_with_a_consumer_beside(only: bool) -> None:
    one = Tap([("x", 1, False)], [] if only else [("y", 0, False)], max_rows=64, max_bytes=1 << 20)
    done = threading.Event()
    seen: list[int] = []

    def consume() -> None:
        while not done.is_set() or one.waiting:
            seen.extend(
                int(np.frombuffer(found, "i8")[0]) for found in one.take(16).data[0] if isinstance(found, bytes)
            )

    thread = threading.Thread(target=consume)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # also between two fields of one batch
    try:
        thread.start()
        accepted = [i for i in range(20_000) if one.offer(1, [None, [np.int64(i).tobytes()]], [Output(b"")], i)]
        done.set()
        thread.join(30)
    finally:
        done.set()
        sys.setswitchinterval(usual)
    assert seen == accepted
    assert one.offered == 20_000
    assert one.taken == len(accepted)
    assert one.dropped == 20_000 - len(accepted)
