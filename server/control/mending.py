"""When upstreams that could not be reached are tried again: soon, then more and more rarely."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

#: Between tries: the first wait, the longest, and how many times as long as a try took it is at least, for loads wait
#: for it.
_FIRST_TRY_S: Final = 1.0
_LAST_TRY_S: Final = 60.0
_WAIT_PER_TRY: Final = 10.0


class Mending:
    """Tries models again while some are ``unreached``. ``try_again`` tells how many seconds it took."""

    def __init__(self, unreached: Callable[[], list[str]], try_again: Callable[[list[str]], Awaitable[float]]) -> None:
        self._unreached = unreached
        self._try_again = try_again
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Some upstream could not be reached."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            wait_s = _FIRST_TRY_S
            while models := self._unreached():
                await asyncio.sleep(wait_s)
                took_s = await self._try_again(models)
                wait_s = min(max(2 * wait_s, _WAIT_PER_TRY * took_s), _LAST_TRY_S)
