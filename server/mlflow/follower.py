"""Two threads that keep a pinned registry true to its origin: one asks, one takes what has to be downloaded.

Asking goes on while a large version is downloaded, so that an alias moved back is seen at once. Neither ever ends of an
error: what cannot be had is tried again, an origin that is silent more and more rarely.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from router.registry.base import RegistryError, StorageFailed
from router.registry.origin import Unreachable
from router.registry.pinned import PinnedRegistry, Settled

log = structlog.get_logger("tidegate.registry")

#: The longest wait between two polls of an origin that cannot be reached.
_MAX_WAIT_S: Final = 60.0
#: Hints wake the poll at most this often: whoever sends many must not be able to drive us.
_BETWEEN_HINTS_S: Final = 1.0
_PRUNE_EVERY_S: Final = 3600.0


class Follower:
    """Polls every ``poll_s``, a tenth more or less; what changed shows in the registry's generation.

    ``keep_unused_s``: bytes that no alias names and nobody used for so long are deleted. ``jitter`` gives numbers in
    0..1. Nothing happens before ``start``.
    """

    def __init__(
        self,
        registry: PinnedRegistry,
        *,
        poll_s: float = 10.0,
        keep_unused_s: float = 7 * 86_400.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._registry = registry
        self._poll_s = poll_s
        self._keep_unused_s = keep_unused_s
        self._jitter = jitter
        self._failures = 0
        self._wake = threading.Condition()
        self._closed = self._hinted = self._polled = False
        self._polled_at = -_BETWEEN_HINTS_S
        self._pruned_at = 0.0
        self._threads = [
            threading.Thread(target=self._ask, name="tidegate-registry-poll", daemon=True),
            threading.Thread(target=self._take, name="tidegate-registry-take", daemon=True),
        ]

    def start(self) -> None:
        """Sweep what dead processes left, look once, take what is wanted, then go on in threads.

        An origin that cannot be reached is logged: what was followed last is served.
        """
        self._guarded(self._registry.sweep)
        self._poll()
        self._settle()
        for thread in self._threads:
            thread.start()

    def hint(self) -> None:
        """Poll soon: something may have changed. Never waits."""
        with self._wake:
            self._hinted = True
            self._wake.notify_all()

    def close(self, timeout_s: float = 5.0) -> None:
        """End both threads. Idempotent. A download that is under way is left behind, and swept at the next start."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))

    # -- threads --------------------------------------------------------------------------------------------------

    def _ask(self) -> None:
        while self._sleep():
            self._poll()
            with self._wake:
                self._polled = True
                self._wake.notify_all()

    def _take(self) -> None:
        while self._wait_for_poll():
            self._settle()
            self._prune()

    def _sleep(self) -> bool:
        """Wait for the next poll; False when it is time to end."""
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._hinted, self._wait_s())
            if self._hinted:
                self._wake.wait_for(lambda: self._closed, self._polled_at + _BETWEEN_HINTS_S - time.monotonic())
            self._hinted = False
            self._polled_at = time.monotonic()
            return not self._closed

    def _wait_s(self) -> float:
        bound = self._poll_s * 2.0 ** min(self._failures, 16)
        return min(max(_MAX_WAIT_S, self._poll_s), bound) * (0.9 + 0.2 * self._jitter())

    def _wait_for_poll(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._closed or self._polled)
            self._polled = False
            return not self._closed

    # -- work -----------------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        error = self._guarded(self._registry.poll)
        if error is not None and not self._failures:
            log.error("registry_unreachable", error=str(error), consequence="what was followed last is served")
        if error is None and self._failures:
            log.info("registry_reachable_again", polls_failed=self._failures)
        self._failures = 0 if error is None else self._failures + 1

    def _settle(self) -> None:
        def settle() -> None:
            for settled in self._registry.settle():
                _log(settled)

        self._guarded(settle)

    def _prune(self) -> None:
        if time.monotonic() - self._pruned_at >= _PRUNE_EVERY_S:
            self._pruned_at = time.monotonic()
            self._guarded(lambda: self._registry.prune(self._keep_unused_s))

    def _guarded(self, work: Callable[[], object]) -> Exception | None:
        """Do it; the error, which was logged unless it is the registry's own."""
        try:
            work()
        except RegistryError as error:
            return error
        except Exception as error:  # the boundary of the threads: the store may refuse, and be back
            log.error("registry_not_followed", error=str(error), exc_info=error)
            return error
        return None


def _log(settled: Settled) -> None:
    if settled.error is None:
        log.info("registry_version_taken", model=settled.model, version=settled.version)
    elif isinstance(settled.error, Unreachable | StorageFailed):
        log.warning("registry_version_waits", model=settled.model, version=settled.version, error=str(settled.error))
    else:
        log.error("registry_version_refused", model=settled.model, version=settled.version, error=str(settled.error))
