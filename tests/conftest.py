"""What every test starts from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import structlog

# Hundreds of processes import the product. What the first one compiles is kept for the others, here too, even where the
# environment (a container's) says otherwise: it is a third of their start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that are run in the tests' own process set up logging for all of it."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
