"""Where the aliases of a model lead while what they name is still being loaded, or cannot be."""

from __future__ import annotations

from collections.abc import Container, Mapping

from server.control.sources import ModelPlan


class AliasTargets:
    """By model: what the plan that was applied last said, and where aliases led when last looked at."""

    def __init__(self) -> None:
        self._applied: dict[str, Mapping[str, str]] = {}
        self._led: dict[str, Mapping[str, str]] = {}

    def follow(self, model: str, plan: ModelPlan | None) -> None:
        """A plan is being applied, or its model goes. One that makes no sense says nothing of aliases."""
        if plan is None:
            self._applied.pop(model, None)
            self._led.pop(model, None)
        elif not plan.error:
            self._applied[model] = plan.aliases

    def of(self, model: str, plan: ModelPlan | None, ready: Container[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The versions that aliases lead to, and for those that do not lead to what they name yet, what they name.

        An alias whose version is not ``ready`` stays where it last led to one that is. A newer plan may be known than
        the one that is being applied: then what that one says is nearer than nothing.
        """
        applied, before = self._applied.get(model, {}), self._led.get(model, {})
        wanted = {} if plan is None else applied if plan.error else plan.aliases
        found: dict[str, str] = {}
        for alias, number in wanted.items():
            nearest = (number, applied.get(alias, ""), before.get(alias, ""))
            found[alias] = next((one for one in nearest if one in ready), number)
        self._led[model] = found
        return found, {alias: number for alias, number in wanted.items() if found[alias] != number}
