"""The rules of a version's schema that refuse requests, as the request path asks them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from server.types import Tensor

if TYPE_CHECKING:
    from monitor.schema import SchemaCheck

#: Of a message, whose parts the caller chose: a category, a value.
_MOST_CHARS: Final = 500


class RequestRules:
    """Refuses, and counts what it refused. For the loop's thread."""

    def __init__(self, check: SchemaCheck) -> None:
        self._check = check
        #: Requests refused.
        self.refused = 0

    def refusal(self, inputs: Sequence[Tensor]) -> str | None:
        """What is wrong with a request that fits the model's signature, or None."""
        wrong = self._check.check(inputs)
        if wrong is None:
            return None
        self.refused += 1
        return wrong if len(wrong) <= _MOST_CHARS else f"{wrong[:_MOST_CHARS]}..."
