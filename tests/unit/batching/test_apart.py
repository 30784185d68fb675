"""A part of the traffic that is measured by itself is batched by itself."""

from __future__ import annotations

from server.batching.batcher import Work
from tests.unit.batching.engines import DoublingEngine, check_answer, manual_batcher, work_of


def test_marked_requests_share_batches_with_their_like_only() -> None:
    engine = DoublingEngine()
    answered: list[Work] = []
    loop, batcher = manual_batcher(engine)
    works = [work_of(float(number), answered.append) for number in range(6)]
    for number, work in enumerate(works):
        work.apart = "control" if number % 3 == 0 else ""
        batcher.submit(work)
    loop.settle()
    assert sorted(batch.rows for batch in engine.batches) == [2, 4]
    assert len(answered) == 6
    for number, work in enumerate(works):
        check_answer(work, float(number))
        assert work.batch_rows == (2 if work.apart else 4)
