"""The drain thread: it drains, it survives errors, it ends."""

from __future__ import annotations

import threading

from monitor.worker import DrainThread


def test_drains_when_woken_and_once_more_at_the_end() -> None:
    drained = threading.Semaphore(0)
    errors: list[Exception] = []
    thread = DrainThread(drained.release, interval_s=60, on_error=errors.append)
    thread.start()
    thread.wake()
    assert drained.acquire(timeout=30)
    assert thread.stop()
    assert drained.acquire(timeout=30)
    assert errors == []


def test_drains_by_itself() -> None:
    drained = threading.Semaphore(0)
    thread = DrainThread(drained.release, interval_s=0.001, on_error=lambda error: None)
    thread.start()
    assert all(drained.acquire(timeout=30) for _ in range(3))
    assert thread.stop()


def test_an_error_does_not_end_it() -> None:
    failed = threading.Semaphore(0)
    errors: list[Exception] = []

    def on_error(error: Exception) -> None:
        errors.append(error)
        failed.release()

    thread = DrainThread(lambda: 1 // 0, interval_s=0.001, on_error=on_error)
    thread.start()
    assert all(failed.acquire(timeout=30) for _ in range(2))
    assert thread.stop()
    assert all(isinstance(error, ZeroDivisionError) for error in errors)


def test_stopping_one_that_was_never_started() -> None:
    assert DrainThread(lambda: None, on_error=lambda error: None).stop()
