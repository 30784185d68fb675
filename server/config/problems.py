"""A mistake in a configuration and how lists of them are shown. stdlib only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from server.errors import ConfigError, ModelLoadError


@dataclass(slots=True, frozen=True)
class Contradiction:
    """One broken rule. It only holds if ``path`` and every key of ``rests_on`` were read without a mistake."""

    path: tuple[str | int, ...]
    message: str
    rests_on: tuple[tuple[str | int, ...], ...] = ()


@dataclass(slots=True, frozen=True, order=True)
class Problem:
    """One mistake. ``line`` and ``column`` count from 1; 0 means that the mistake has no place in the file.

    ``path`` is the file as the operator named it (or a flag such as ``--http``), ``key`` the dotted key path.
    """

    path: str
    line: int
    column: int
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}:{self.column}" if self.line else self.path
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class InvalidConfig(ConfigError):
    """A ConfigError that carries its mistakes one by one, in the order of the file."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: list[Problem] = sorted(problems)
        super().__init__(render_problems(self.problems))


class UnloadableConfig(ModelLoadError):
    """A ModelLoadError that knows which place of the configuration asked for what could not be loaded."""

    def __init__(self, error: ModelLoadError, problem: Problem) -> None:
        self.problems: list[Problem] = [problem]
        super().__init__(error.message, retry_after_s=error.retry_after_s, model=error.model, version=error.version)


def render_problems(problems: Iterable[Problem], *, as_json: bool = False) -> str:
    """One ``file:line:column: key: message`` line per problem, or a JSON array of objects with these names."""
    if as_json:
        return json.dumps([asdict(problem) for problem in problems], indent=2)
    return "\n".join(str(problem) for problem in problems)
