"""What every test starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that are run in the tests' own process set up logging for all of it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
