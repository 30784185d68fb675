"""The drain thread: takes what the taps hold, again and again, until it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable


class DrainThread:
    """Calls ``drain`` every ``interval_s`` seconds, and at once after ``wake``. ``drain`` runs on this thread only.

    An exception of ``drain`` goes to ``on_error`` and the thread goes on: the monitor may fail, serving may not.
    """

    def __init__(
        self,
        drain: Callable[[], object],
        *,
        interval_s: float = 0.05,
        on_error: Callable[[Exception], None],
        name: str = "tidegate-monitor",
    ) -> None:
        self._drain = drain
        self._interval_s = interval_s
        self._on_error = on_error
        self._stopping = False
        self._event = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Drain soon. Costs next to nothing when that was said already; may be called from any thread."""
        if not self._event.is_set():
            self._event.set()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Drain once more and end; True when the thread has ended within ``timeout_s``."""
        self._stopping = True
        self._event.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping:
            self._event.wait(self._interval_s)
            self._event.clear()
            self._drain_once()
        self._drain_once()

    def _drain_once(self) -> None:
        try:
            self._drain()
        except Exception as error:  # noqa: BLE001 - the thread's boundary
            self._on_error(error)
