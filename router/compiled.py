"""The routes of one public name, compiled: everything that a decision needs, looked up or computed beforehand.

A decision is: an explicit version, else the first rule that matches, else the split by key or by chance, else stable.
No lock, no float arithmetic, no formatting; what is not asked for (a split, shadows) is not paid for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Final, Generic, TypeAlias, TypeVar

from router.decision import RouteDecision, RouteQuery
from router.errors import BadRoutes, BadVersion, KeyMissing, Problem, UnknownVersion
from router.policy import key, rules, split
from router.policy.base import SPACE, Span, positions
from router.policy.key import compile_sources, extract
from router.policy.rules import CompiledRule, compile_rule, first_match
from router.policy.sticky import position, redraw, seed_of
from router.types import (
    FULL_SHARE,
    PINNED_ARM,
    REQUESTED,
    STABLE_ARM,
    Choice,
    Destination,
    ModelRoutes,
    Rule,
    ShadowRoute,
    Unit,
    ValueTest,
)

T = TypeVar("T")

_VERSION_DIGITS: Final = 18

#: (seed, first position that is not sampled, route)
_Sampler: TypeAlias = tuple[int, int, ShadowRoute[T]]


class CompiledRoutes(Generic[T]):
    """One public name's routes, ready to decide. Never changed after it is built."""

    __slots__ = (
        "_choices", "_edges", "_plain", "_reject", "_rules", "_samplers", "_seed", "_sources", "_split", "_stable",
        "_to_stable", "_version_rules", "arms", "model", "name", "routes", "spans",
    )  # fmt: skip

    def __init__(self, name: str, routes: ModelRoutes[T]) -> None:
        """Raises BadRoutes naming every mistake."""
        found = tuple(check(routes))
        if found:
            raise BadRoutes(name, found)
        self.name = name
        self.routes = routes
        self.model = routes.model or name
        self.spans: tuple[Span, ...] = split.layout(routes.split)
        #: Every arm of the split by its name, with stable.
        self.arms: dict[str, Choice[T]] = self._arms()
        self._stable = self.arms[STABLE_ARM]
        self._compile_split()
        self._compile_rules()
        self._samplers: tuple[_Sampler[T], ...] = tuple(
            (seed_of(shadow.id), positions(shadow.sample), shadow) for shadow in routes.shadows
        )
        asks = self._rules or self._split or self._samplers
        #: The decision of routes where nothing of a request matters but its version, for the newest generation asked.
        self._plain: RouteDecision[T] | None = None if asks else self._default(0)

    # -- building -----------------------------------------------------------------------------------------------

    def _arms(self) -> dict[str, Choice[T]]:
        routes, held = self.routes, split.widths(self.spans)
        share = {arm: width / SPACE for arm, width in held.items()}
        number = routes.stable
        stable = Choice(STABLE_ARM, self.model, number, routes.versions[number], share.get(STABLE_ARM, 0.0), None)
        arms = {STABLE_ARM: stable}
        for arm in () if routes.split is None else routes.split.arms:
            to = arm.to
            fallback = None if same_version(to, stable) else stable
            arms[arm.name] = Choice(arm.name, to.model, to.version, to.target, share.get(arm.name, 0.0), fallback)
            if arm.control:
                arms[arm.control] = stable._replace(arm=arm.control, propensity=share.get(arm.control, 0.0))
        return arms

    def _compile_split(self) -> None:
        routes = self.routes
        self._split = routes.split is not None
        self._seed = 0 if routes.split is None else seed_of(routes.split.id, routes.split.secret)
        self._edges = [span.end for span in self.spans[:-1]]
        self._choices = [self.arms[span.arm] for span in self.spans]
        self._sources = compile_sources(routes.key)
        self._reject = routes.key.missing == "reject"
        self._to_stable = routes.key.missing == "stable"

    def _compile_rules(self) -> None:
        tenant = self.routes.tenant_header
        plain = [rule for rule in self.routes.rules if rule.match.version is None]
        self._rules: tuple[CompiledRule[T], ...] = tuple(
            compile_rule(rule, tenant, self._rule_choice(rule)) for rule in plain
        )
        self._version_rules: tuple[tuple[ValueTest, CompiledRule[T]], ...] = tuple(
            (rule.match.version, compile_rule(rule, tenant, self._rule_choice(rule)))
            for rule in self.routes.rules
            if rule.match.version is not None
        )

    def _rule_choice(self, rule: Rule[T]) -> Choice[T] | None:
        to = rule.to
        if isinstance(to, Destination):
            return Choice(PINNED_ARM, to.model, to.version, to.target, 1.0, None)
        return None if to == REQUESTED else self.arms[to]._replace(propensity=1.0)

    # -- deciding -----------------------------------------------------------------------------------------------

    def decide(self, query: RouteQuery, draw: int, generation: int) -> RouteDecision[T]:
        """Where one request goes. Raises UnknownVersion, BadVersion or KeyMissing."""
        if query.version:
            return self._explicit(query, generation)
        known = self.plain(generation)
        if known is not None:
            return known
        if self._rules:
            rule = first_match(self._rules, query)
            if rule is not None and rule.choice is not None:
                return self._named(rule.choice, rule.name, generation)
        key_hash = 0
        unit: Unit = "request"
        reason, counted = "default", True
        choice = self._stable
        if self._split:
            reason = "split"
            text = extract(self._sources, query)
            if text:
                unit = "key"
                key_hash = position(text, self._seed)
                choice = self._choices[bisect_right(self._edges, key_hash)]
            elif self._to_stable:
                reason, counted = "keyless", False
            elif self._reject:
                raise KeyMissing(self.name, self.routes.key.sources)
            else:
                choice = self._choices[bisect_right(self._edges, draw)]
        shadows = self._sampled(choice, draw) if self._samplers else ()
        arm, model, version, target, propensity, fallback = choice
        return RouteDecision(
            model, version, arm, reason, generation, target, self.name, counted,
            propensity if counted else 1.0, unit, key_hash, fallback, shadows,
        )  # fmt: skip

    def plain(self, generation: int) -> RouteDecision[T] | None:
        """The one decision of routes that ask nothing; None where something is asked."""
        known = self._plain
        if known is not None and known.generation != generation:
            known = self._plain = self._default(generation)
        return known

    def _default(self, generation: int) -> RouteDecision[T]:
        """The decision of routes that ask nothing: one object for all requests of a generation, never changed."""
        arm, model, version, target, _, fallback = self._stable
        return RouteDecision(
            model, version, arm, "default", generation, target, self.name, True,
            self._stable.propensity, "request", 0, fallback, (),
        )  # fmt: skip

    def _sampled(self, choice: Choice[T], draw: int) -> tuple[ShadowRoute[T], ...]:
        """Shadows drawn for this request, each by itself, but never the version that answers."""
        found: tuple[ShadowRoute[T], ...] = ()
        for seed, edge, shadow in self._samplers:
            if redraw(draw, seed) < edge and not same_version(shadow.to, choice):
                found += (shadow,)
        return found

    def _explicit(self, query: RouteQuery, generation: int) -> RouteDecision[T]:
        """A version that the caller named: only rules that speak of versions come before it."""
        for test, rule in self._version_rules:
            if test.holds(query.version) and first_match((rule,), query) is not None:
                return self._named(rule.choice or self.pinned(query.version), rule.name, generation)
        return self._named(self.pinned(query.version), "version", generation)

    def pinned(self, version: str) -> Choice[T]:
        """The choice of an explicitly named version. Raises UnknownVersion or BadVersion."""
        target = self.routes.versions.get(version)
        if target is not None:
            return Choice(PINNED_ARM, self.model, version, target, 1.0, None)
        if not is_version(version):
            raise BadVersion(self.name, version)
        raise UnknownVersion(self.name, version, self.routes.ordered())

    def spoken_of(self, version: str) -> bool:
        """Whether a rule may send requests for this version, served or not, elsewhere."""
        return any(test.holds(version) for test, _ in self._version_rules)

    def _named(self, choice: Choice[T], reason: str, generation: int) -> RouteDecision[T]:
        """A decision in which nothing was drawn: it enters no statistics, and no shadow sees the request."""
        return RouteDecision(
            choice.model, choice.version, choice.arm, reason, generation, choice.target, self.name,
            False, 1.0, "request", 0, choice.fallback, (),
        )  # fmt: skip

    # -- explaining ---------------------------------------------------------------------------------------------

    def explain(self, query: RouteQuery, draw: int | None = None) -> Iterator[str]:
        """Why a request goes where it goes, step by step. Without ``draw``, what chance decides is left open.

        Raises what ``decide`` raises.
        """
        yield f"model '{self.name}': stable is {self.model} version {self.routes.stable}"
        if query.version:
            yield from self._explain_explicit(query)
            return
        for rule in self._rules:
            matched = first_match((rule,), query) is not None
            yield f"rule '{rule.name}': {self._explain_conditions(rule, query)}"
            if matched and rule.choice is not None:
                yield self._conclusion(rule.choice, f"rule '{rule.name}' matches; not counted")
                return
        yield from self._explain_split(query, draw)

    def _explain_explicit(self, query: RouteQuery) -> Iterator[str]:
        decision = self._explicit(query, 0)
        yield f"the request names version '{query.version}'"
        choice = Choice(decision.arm, decision.model, decision.version, decision.target, 1.0, None)
        if decision.reason == "version":
            yield self._conclusion(choice, "a named version bypasses rules and split; not counted")
        else:
            yield self._conclusion(choice, f"rule '{decision.reason}' matches; not counted")

    def _explain_conditions(self, rule: CompiledRule[T], query: RouteQuery) -> str:
        return " and ".join(_explain_condition(condition, query) for condition in rule.conditions)

    def _explain_split(self, query: RouteQuery, draw: int | None) -> Iterator[str]:
        text = extract(self._sources, query)
        if not self._split:
            yield self._conclusion(self._stable, "nothing is split")
        elif text:
            key_hash = position(text, self._seed)
            yield f"key '{text}' from {self._source(query)}"
            yield from self._explain_position(key_hash)
        elif self._reject:
            raise KeyMissing(self.name, self.routes.key.sources)
        elif self._to_stable:
            yield self._conclusion(self._stable, "the request has no key, such requests go to stable; not counted")
        elif draw is not None:
            yield "no key: drawn at random"
            yield from self._explain_position(draw)
        else:
            shares = ", ".join(f"{arm} {choice.propensity:.2%}" for arm, choice in self.arms.items())
            yield f"no key: drawn at random among {shares}"
        for shadow in self.routes.shadows:
            yield f"shadow: {shadow.to.model} version {shadow.to.version} gets {split.percent(shadow.sample)} of these"

    def _source(self, query: RouteQuery) -> str:
        found = (
            spec for spec, one in zip(self.routes.key.sources, self._sources, strict=True) if extract((one,), query)
        )
        return next(found)

    def _explain_position(self, place: int) -> Iterator[str]:
        span = self.spans[bisect_right(self._edges, place)]
        split_id = "" if self.routes.split is None else self.routes.split.id
        yield (
            f"position {place / SPACE:.6f} under '{split_id}' lies in "
            f"[{span.start / SPACE:.6f}, {span.end / SPACE:.6f}) of arm '{span.arm}'"
        )
        yield self._conclusion(self.arms[span.arm], f"split; {self.arms[span.arm].propensity:.2%} of keys go there")

    def _conclusion(self, choice: Choice[T], why: str) -> str:
        return f"-> {choice.model} version {choice.version} as arm '{choice.arm}' ({why})"


def _explain_condition(condition: rules.Condition, query: RouteQuery) -> str:
    in_parameters, name, test = condition
    value = query.parameters.get(name) if in_parameters else query.metadata.get(name)
    place = f"{'parameter' if in_parameters else 'header'} {name}"
    if value is None:
        return f"{place} is absent"
    text = key.as_text(value)
    return f"{place} is '{text}', which {'matches' if test.holds(text) else 'does not match'}"


def same_version(a: Destination[Any] | Choice[Any], b: Destination[Any] | Choice[Any]) -> bool:
    """Whether both lead to the same version of the same model."""
    return a.version == b.version and a.model == b.model


def is_version(text: str) -> bool:
    """A version is a positive decimal integer without sign, spaces or leading zeros, of at most 18 digits."""
    return text.isascii() and text.isdigit() and len(text) <= _VERSION_DIGITS and text[0] != "0"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def check(routes: ModelRoutes[Any]) -> Iterator[Problem]:
    """Every mistake in the routes of a model, for a configuration to report at once."""
    if routes.stable not in routes.versions:
        versions = ", ".join(routes.versions) or "none"
        yield Problem(("stable",), f"wanted one of the model's versions ({versions}), got {routes.stable!r}")
    yield from key.problems(routes.key)
    yield from rules.problems(routes.rules, routes.tenant_header)
    yield from _end_problems(routes)
    if routes.split is not None:
        yield from split.problems(routes.split)
    yield from _shadow_problems(routes)


def _end_problems(routes: ModelRoutes[Any]) -> Iterator[Problem]:
    """Rules that lead nowhere."""
    arms = () if routes.split is None else routes.split.arms
    names = [STABLE_ARM, *(name for arm in arms for name in (arm.name, arm.control) if name)]
    for index, rule in enumerate(routes.rules):
        if isinstance(rule.to, Destination):
            continue
        where = ("rules", index, "to")
        if rule.to == REQUESTED:
            if rule.match.version is None:
                yield Problem(where, "'requested' wants a match on version beside it")
        elif rule.to not in names:
            yield Problem(where, f"wanted a version or one of {', '.join(names)}; got {rule.to!r}")


def _shadow_problems(routes: ModelRoutes[Any]) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, shadow in enumerate(routes.shadows):
        where = ("shadow", index)
        if not shadow.id or shadow.id in seen:
            yield Problem((*where, "id"), f"wanted a name that no other shadow has, got {shadow.id!r}")
        seen.add(shadow.id)
        if not 0 <= shadow.sample <= FULL_SHARE:
            yield Problem((*where, "sample"), f"wanted 0% to 100%, got {split.percent(shadow.sample)}")
