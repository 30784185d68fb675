"""Rules: requests that are sent somewhere by what they carry, in order, before any split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from router.decision import RouteQuery
from router.errors import Problem
from router.policy.key import as_text
from router.types import Choice, Match, ParameterValue, Rule, ValueTest

T = TypeVar("T")

#: Reasons of decisions that no rule made; a rule may not take their names.
RESERVED_NAMES: Final = frozenset({"version", "default", "split", "keyless", "fallback"})

#: (look among parameters, name, test): one compiled condition.
Condition: TypeAlias = tuple[bool, str, ValueTest]


class CompiledRule(NamedTuple, Generic[T]):
    """A rule for the hot path, which most requests fail by their first header: it is absent, or not in ``exact``.

    ``header`` "" and ``exact`` None leave it to the conditions. ``choice`` None lets the version through that was
    asked for.
    """

    header: str
    exact: frozenset[str] | None
    conditions: tuple[Condition, ...]
    name: str
    choice: Choice[T] | None


def compile_rule(rule: Rule[T], tenant_header: str, choice: Choice[T] | None) -> CompiledRule[T]:
    """One rule without its condition on the version, which ``first_match`` checks apart."""
    conditions = tuple(_conditions(rule.match, tenant_header))
    header, exact = "", None
    if conditions and not conditions[0][0]:
        _, header, test = conditions[0]
        exact = test.one_of or None
    return CompiledRule(header, exact, conditions, rule.name, choice)


def _conditions(match: Match, tenant_header: str) -> Iterator[Condition]:
    if match.tenant is not None:
        yield (False, tenant_header.lower(), match.tenant)
    for name, test in match.header.items():
        yield (False, name.lower(), test)
    for name, test in match.parameter.items():
        yield (True, name, test)


def first_match(rules: tuple[CompiledRule[T], ...], query: RouteQuery) -> CompiledRule[T] | None:
    """The first rule whose conditions all hold."""
    metadata, parameters = query.metadata, query.parameters
    for rule in rules:
        header, exact, conditions, _, _ = rule
        if header:
            value = metadata.get(header)
            if value is None or (exact is not None and value not in exact):
                continue
        if all_hold(conditions, metadata, parameters):
            return rule
    return None


def all_hold(
    conditions: Iterable[Condition], metadata: Mapping[str, str], parameters: Mapping[str, ParameterValue]
) -> bool:
    """Whether every condition finds its value and the value passes."""
    for in_parameters, name, test in conditions:
        value = parameters.get(name) if in_parameters else metadata.get(name)
        if value is None or not test.holds(as_text(value)):
            return False
    return True


def problems(rules: tuple[Rule[T], ...], tenant_header: str) -> Iterator[Problem]:
    """Every mistake in the rules themselves; where they lead is checked by who knows the arms."""
    seen: set[str] = set()
    for index, rule in enumerate(rules):
        where = ("rules", index)
        if not rule.name or rule.name in RESERVED_NAMES:
            reserved = ", ".join(sorted(RESERVED_NAMES))
            yield Problem((*where, "name"), f"wanted a name that is none of {reserved}; got {rule.name!r}")
        elif rule.name in seen:
            yield Problem((*where, "name"), f"{rule.name!r} names an earlier rule too")
        seen.add(rule.name)
        yield from _match_problems(rule.match, (*where, "match"), tenant_header)


def _match_problems(match: Match, where: tuple[str | int, ...], tenant_header: str) -> Iterator[Problem]:
    tests = dict(_tests(match))
    if not tests:
        yield Problem(where, "wanted at least one of version, header, parameter, tenant; got none")
    if match.tenant is not None and not tenant_header:
        yield Problem((*where, "tenant"), "the header that carries the tenant is not configured")
    for place, test in tests.items():
        if sum(map(bool, (test.one_of, test.prefixes, test.present))) != 1:
            yield Problem((*where, *place), "wanted exactly one of: a value, a list of values, a prefix, present")


def _tests(match: Match) -> Iterator[tuple[tuple[str, ...], ValueTest]]:
    if match.version is not None:
        yield ("version",), match.version
    if match.tenant is not None:
        yield ("tenant",), match.tenant
    for name, test in match.header.items():
        yield ("header", name), test
    for name, test in match.parameter.items():
        yield ("parameter", name), test
