"""server.demo.loop.claims: what is not so is counted, what does not come is a failure."""

from __future__ import annotations

import asyncio
import io

import pytest
from rich.console import Console

from server.demo.loop.claims import Claims, LoopFailed, until
from server.demo.report import Reporter


def test_wrong_claims_are_shown_and_counted() -> None:
    page = io.StringIO()
    claims = Claims(Reporter(plain=True, console=Console(file=page)))
    claims.check(True, "water is wet [really]")
    claims.check(False, "pigs fly")
    assert claims.failures == ["pigs fly"]
    lines = page.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "FAILED"]
    assert "wet [really]" in lines[0]


def test_until_takes_the_first_thing_found() -> None:
    looks = iter([None, None, 0])

    async def look() -> int | None:
        return next(looks)

    assert asyncio.run(until(look, "nothing came", 20)) == 0
    assert not list(looks)


def test_until_says_what_did_not_come() -> None:
    async def look() -> None:
        return None

    with pytest.raises(LoopFailed, match="within 0 s, nothing came"):
        asyncio.run(until(look, "nothing came", 0))
