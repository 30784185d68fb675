"""What the loop claims to have shown: each claim is checked, printed, and counted when it is not so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from rich.markup import escape

from server.demo.report import Reporter

T = TypeVar("T")

_LOOK_EVERY_S: Final = 0.2


class LoopFailed(Exception):
    """Something that all that follows rests on did not happen."""


@dataclass(slots=True)
class Claims:
    """The claims so far; ``failures`` are those that were wrong."""

    reporter: Reporter
    failures: list[str] = field(default_factory=list)

    def check(self, ok: bool, text: str) -> None:
        """Show one claim with whether it holds."""
        mark = "[green]ok[/green]    " if ok else "[bold red]FAILED[/bold red]"
        self.reporter.line(f"  {mark} {escape(text)}")
        if not ok:
            self.failures.append(text)


async def until(look: Callable[[], Awaitable[T | None]], what: str, seconds: float) -> T:
    """Look again and again until something is found. Raises LoopFailed when ``seconds`` have passed without."""
    end = time.monotonic() + seconds
    while True:
        found = await look()
        if found is not None:
            return found
        if time.monotonic() >= end:
            raise LoopFailed(f"within {seconds:.0f} s, {what}")
        await asyncio.sleep(_LOOK_EVERY_S)
