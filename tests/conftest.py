"""What every test starts from."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

# Hundreds of processes import the product. What the first one compiles is kept for the others, here too, even where the
# environment (a container's) says otherwise: it is a third of their start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# The same examples in every run, however slow the machine is; pytest's --hypothesis-profile=default tries others.
settings.register_profile(
    "the same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("the same")


# What is logged in this process ends in plain tracebacks, as the product's own logs do. structlog's default draws every
# frame with all that is in it: seconds for each, on the loop that logs, when the machine is busy.
_PLAIN = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _PLAIN])


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Commands that are run in the tests' own process set up logging for all of it.

    What stayed of that would write to descriptors that are somebody else's by then.
    """
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
