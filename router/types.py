"""The router's nouns: the routes of one public model name.

The router knows versions by name and hands back an opaque ``target`` that its owner put there; it never looks inside.
Shares (weights, coverage, samples) are whole hundredths of a percent: 10,000 is everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

ParameterValue: TypeAlias = bool | int | float | str

STABLE_ARM: Final = "stable"
PINNED_ARM: Final = "pinned"
#: ``Rule.to`` of a rule that lets an explicitly named version through.
REQUESTED: Final = "requested"

#: What was drawn: all requests of a key together, or one request by itself.
Unit: TypeAlias = Literal["key", "request"]

#: Shares are counted in 1/10,000.
FULL_SHARE: Final = 10_000


# --- where requests go ----------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Destination(Generic[T]):
    """A version by its real model name, with what its owner wants back."""

    model: str
    version: str
    target: T


class Choice(NamedTuple, Generic[T]):
    """One possible end of a decision, made when the table is built.

    ``propensity`` is the probability with which the split gives this arm (1.0 where nothing is drawn). ``fallback``
    answers when this choice cannot: None on stable ground and for a version that the caller named.
    """

    arm: str
    model: str
    version: str
    target: T
    propensity: float
    fallback: Choice[T] | None


# --- the routes of one public name, as configured ---------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class ValueTest:
    """What a value must be: one of some texts, or begin with one of some, or just be there.

    Numbers and booleans among request parameters are compared as text: ``1``, ``0.5``, ``true``.
    """

    one_of: frozenset[str] = frozenset()
    prefixes: tuple[str, ...] = ()
    present: bool = False

    def holds(self, value: str) -> bool:
        return self.present or value in self.one_of or value.startswith(self.prefixes)


@dataclass(slots=True, frozen=True)
class Match:
    """Conditions that must all hold. Without ``version``, a request that names a version never matches."""

    header: Mapping[str, ValueTest] = field(default_factory=dict)
    parameter: Mapping[str, ValueTest] = field(default_factory=dict)
    tenant: ValueTest | None = None
    version: ValueTest | None = None


@dataclass(slots=True, frozen=True)
class Rule(Generic[T]):
    """Requests that match go to an arm (by its name, ``stable`` included), to a version, or where they asked to go."""

    name: str
    match: Match
    to: str | Destination[T]


@dataclass(slots=True, frozen=True)
class KeySpec:
    """Where the key of a request is found: ``header:NAME``, ``parameter:NAME`` or ``request:id``, the first present.

    An empty value counts as absent. A request without a key is drawn at random, sent to stable (and not counted), or
    rejected.
    """

    sources: tuple[str, ...] = ()
    missing: Literal["random", "stable", "reject"] = "random"


@dataclass(slots=True, frozen=True)
class Arm(Generic[T]):
    """One non-stable arm. ``control`` names its matched slice of stable's ground, as large as the arm; "" for none."""

    name: str
    to: Destination[T]
    weight: int
    control: str = ""


@dataclass(slots=True, frozen=True)
class RolloutSplit(Generic[T]):
    """Arms beside stable. The number and order of arms are fixed for the life of ``id``, which is the salt."""

    id: str
    arms: tuple[Arm[T], ...]
    secret: bytes = field(default=b"", repr=False)


@dataclass(slots=True, frozen=True)
class ExperimentSplit(Generic[T]):
    """Arms whose weights sum to everything, on a ``coverage`` of the keys that may only grow; the rest is stable."""

    id: str
    arms: tuple[Arm[T], ...]
    coverage: int
    secret: bytes = field(default=b"", repr=False)


@dataclass(slots=True, frozen=True)
class ShadowRoute(Generic[T]):
    """A ``sample`` of requests is copied to a version that nobody waits for. ``id`` is the salt of its sampling."""

    id: str
    to: Destination[T]
    sample: int


@dataclass(slots=True, frozen=True)
class ModelRoutes(Generic[T]):
    """The served versions of one public name, the one that answers by default, and how requests are spread.

    ``versions`` may be asked for by number and belong to ``model`` ("": the public name is the model's own). Arms,
    rules and shadows may lead to versions of other models.
    """

    versions: Mapping[str, T]
    stable: str
    model: str = ""
    tenant_header: str = ""
    key: KeySpec = KeySpec()
    rules: tuple[Rule[T], ...] = ()
    split: RolloutSplit[T] | ExperimentSplit[T] | None = None
    shadows: tuple[ShadowRoute[T], ...] = ()

    def ordered(self) -> tuple[str, ...]:
        """Served versions, lowest number first."""
        return tuple(sorted(self.versions, key=int))
