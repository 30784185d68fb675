"""The champion of the embedded registry, moved by compare and set: one transaction, or nothing."""

from __future__ import annotations

from router.registry.base import CHAMPION, AliasConflict, RegistryError
from router.registry.embedded import EmbeddedRegistry
from server.control.rollouts.run import GATEWAY
from server.store.base import StoreError


class Aliases:
    """Moves aliases for rollouts. Blocks."""

    def __init__(self, registry: EmbeddedRegistry) -> None:
        self._registry = registry

    def move(self, entry: str, alias: str, was: str, to: str) -> str:
        """Point an alias at ``to`` if it is at ``was``; why not, or "". Raises StoreError.

        The champion is promoted: what was champion is previous, and ``to`` no longer challenges it. An alias that is
        at ``to`` already is no refusal: a process may die between the move and the record of it, and asks again.
        """
        try:
            if alias == CHAMPION:
                self._promote(entry, int(was), int(to))
                return ""
            now = self._registry.alias(entry, alias)
            if str(now.version) == to:
                return ""
            if str(now.version) != was:
                return f"{alias} of {entry} was expected to be {was} and is {now.version}"
            self._registry.set_alias(entry, alias, int(to), expected=now.generation, actor=GATEWAY)
        except StoreError:
            raise
        except RegistryError as error:
            return str(error)
        return ""

    def _promote(self, entry: str, was: int, to: int) -> None:
        try:
            self._registry.promote(entry, to, expected_champion=was, actor=GATEWAY)
        except AliasConflict:
            if self._registry.alias(entry, CHAMPION).version != to:
                raise
