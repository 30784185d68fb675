"""What the values of columns must be: rules made ready for a profile, counted in windows or checked in requests.

``compile_rules`` turns rules into checks, one per thing that a rule demands. Checks that count mark rows on the drain
thread (``marks``). Checks that reject are ``SchemaCheck``'s, which looks at one request before it is run: first at all
bounds of a tensor at once, and one by one only when something is wrong there.

Bounds and categories are cast to the column's datatype first, so that a limit of 0.1 allows the FP32 value 0.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from monitor.errors import SettingsError
from monitor.layout import Block, Layout
from monitor.profile import ColumnProfile, carried
from monitor.types import BYTES, DATATYPES, Array, Buffer, Column, ColumnRule

Name: TypeAlias = Literal["min", "max", "missing", "categories", "finite"]
#: Values of a closed set that a message lists.
_LISTED: Final = 8


class TensorLike(Protocol):
    """A request's input. ``data``: a raw little-endian buffer, or a flat list of ``bytes`` for BYTES."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def data(self) -> Buffer | list[bytes]: ...


@dataclass(slots=True, frozen=True, eq=False)
class Check:
    """One demand on one column (at ``place`` of the layout). ``limit``: of min and max. ``allowed``: of categories.

    ``tolerated``: the share of rows that may violate it.
    """

    place: int
    column: Column
    name: Name
    tolerated: float
    limit: float = 0.0
    allowed: frozenset[Any] = frozenset()

    @property
    def wanted(self) -> str:
        """The demand in words."""
        if self.name in ("min", "max"):
            return f"{'at least' if self.name == 'min' else 'at most'} {self.limit:g}"
        if self.name == "categories":
            listed = sorted([_shown(value) for value in self.allowed])
            more = f" or {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            return f"one of {', '.join(listed[:_LISTED])}{more}"
        return "a finite number" if self.name == "finite" else f"at most {self.tolerated:.3g} of the rows missing"

    def violations(self, values: Array | list[bytes]) -> Array:
        """bool per value: floats, or strings of a BYTES column."""
        if isinstance(values, list):
            return self._string_violations(values)
        if self.name == "missing":
            return np.isnan(values)
        if self.name == "finite":
            return ~np.isfinite(values)
        if self.name == "categories":
            return ~(np.isin(values, np.array(sorted(self.allowed), values.dtype)) | np.isnan(values))
        limit = values.dtype.type(self.limit)
        return np.asarray(values < limit if self.name == "min" else values > limit)

    def _string_violations(self, values: list[bytes]) -> Array:
        if self.name == "missing":
            return np.array([not value for value in values], bool)
        return np.array([bool(value) and value not in self.allowed for value in values], bool)


def compile_rules(rules: Sequence[ColumnRule], layout: Layout, action: Literal["count", "reject"]) -> tuple[Check, ...]:
    """The checks of the rules with this action. Raises SettingsError for a rule that cannot be: it names the column."""
    found: list[Check] = []
    for rule in rules:
        if rule.action == action:
            found.extend(_checks(rule, layout))
    seen = [(check.place, check.name) for check in found]
    for check in found:
        if seen.count((check.place, check.name)) > 1:
            raise SettingsError(f"column '{check.column.name}' has the rule {check.name} twice")
    return tuple(found)


def _checks(rule: ColumnRule, layout: Layout) -> list[Check]:
    place = layout.place_of(rule.column)
    profile = layout.columns[place]
    column = profile.column
    if rule.action == "reject" and column.source == "output":
        raise SettingsError(f"rule of '{rule.column}': an output cannot be rejected, only counted")
    full = from_profile(rule, profile) if rule.range else rule
    if column.datatype == BYTES and (full.min is not None or full.max is not None or full.finite):
        raise SettingsError(f"rule of '{rule.column}': strings have no min, max or finite")
    found = []
    if full.min is not None:
        found.append(Check(place, column, "min", full.tolerate, _cast(column, [full.min])[0]))
    if full.max is not None:
        found.append(Check(place, column, "max", full.tolerate, _cast(column, [full.max])[0]))
    if full.finite:
        found.append(Check(place, column, "finite", full.tolerate))
    if full.categories is not None:
        found.append(Check(place, column, "categories", full.tolerate, 0.0, _categories(column, full.categories)))
    if full.missing is not None:
        found.append(Check(place, column, "missing", full.missing))
    if not found:
        raise SettingsError(f"rule of '{rule.column}' demands nothing: give min, max, missing, categories or finite")
    return found


def from_profile(rule: ColumnRule, profile: ColumnProfile) -> ColumnRule:
    """The rule with the reference's range, or for discrete columns its categories, where it says none itself."""
    known = profile.knots
    if profile.column.datatype == BYTES:
        strings = tuple([s.decode("utf-8", "surrogateescape") for s in (*profile.categories, *profile.rare)])
        return replace(rule, categories=rule.categories if rule.categories is not None else strings)
    if profile.column.discrete:
        return replace(rule, categories=rule.categories if rule.categories is not None else tuple(known.tolist()))
    if not len(known):
        return rule
    low, high = float(known[0]), float(known[-1])
    return replace(rule, min=low if rule.min is None else rule.min, max=high if rule.max is None else rule.max)


def _cast(column: Column, values: Sequence[float]) -> list[float]:
    cast: list[float] = carried(np.array(values, "f8"), column).tolist()
    if np.isnan(cast).any():
        raise SettingsError(f"rule of '{column.name}': NaN is no limit")
    return cast


def _categories(column: Column, values: Sequence[str | float]) -> frozenset[Any]:
    texts = [value for value in values if isinstance(value, str)]
    if len(texts) != (len(values) if column.datatype == BYTES else 0):
        raise SettingsError(f"rule of '{column.name}': categories must fit {column.datatype}, got {list(values)}")
    if column.datatype == BYTES:
        return frozenset([text.encode("utf-8", "surrogateescape") for text in texts])
    return frozenset(_cast(column, [value for value in values if not isinstance(value, str)]))


def marks(checks: Sequence[Check], block: Block) -> Array:
    """bool (rows, checks): which rows violate what."""
    out = np.empty((block.rows, len(checks)), bool)
    for which, check in enumerate(checks):
        out[:, which] = check.violations(block.column(check.place))
    return out


# --- requests --------------------------------------------------------------------------------------------------------


class SchemaCheck:
    """The rejecting rules of one model version. Immutable; ``check`` may be called from any thread.

    Raises SettingsError, as ``compile_rules`` does.
    """

    def __init__(self, rules: Sequence[ColumnRule], layout: Layout) -> None:
        checks = compile_rules(rules, layout, "reject")
        tensors = dict.fromkeys([check.column.tensor for check in checks])
        self._tensors = [
            _TensorChecks(name, [check for check in checks if check.column.tensor == name]) for name in tensors
        ]

    def __bool__(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._tensors)

    def check(self, inputs: Iterable[TensorLike]) -> str | None:
        """What is wrong with one request's inputs, or None: the column, the rule, what was wanted and got.

        An input that is absent is one whose values are all missing.
        """
        given = {tensor.name: tensor for tensor in inputs}
        for own in self._tensors:
            tensor = given.get(own.name)
            wrong = own.absent() if tensor is None else own.check(tensor)
            if wrong is not None:
                return wrong
        return None


class _TensorChecks:
    """The checks of one input tensor."""

    def __init__(self, name: str, checks: Sequence[Check]) -> None:
        first = checks[0].column
        self.name, self._datatype, self._width = name, first.datatype, first.width
        self._checks = checks
        self._dtype = DATATYPES[first.datatype][0]
        self._columns = sorted({check.column.index for check in checks})
        self._low = self._bounds("min", first.carrier)
        self._high = self._bounds("max", first.carrier)
        #: Checks that the bounds do not cover, so that they are always looked at.
        self._others = [check for check in checks if check.name not in ("min", "max")]

    def _bounds(self, name: Name, carrier: np.dtype[Any]) -> Array:
        out = np.full(len(self._columns), -np.inf if name == "min" else np.inf, carrier)
        for check in self._checks:
            if check.name == name:
                out[self._columns.index(check.column.index)] = check.limit
        return out

    def absent(self) -> str | None:
        for check in self._checks:
            if check.name == "finite" or (check.name == "missing" and check.tolerated < 1):
                return self._message(check, "no such input")
        return None

    def check(self, tensor: TensorLike) -> str | None:
        if tensor.datatype != self._datatype:
            return f"input '{self.name}': the schema is of datatype {self._datatype}, got {tensor.datatype}"
        if isinstance(tensor.data, list):
            return self._check_strings(tensor.data)
        return self._check_numbers(tensor.data)

    def _check_strings(self, values: list[bytes]) -> str | None:
        if len(values) % self._width:
            return self._size_message(len(values))
        for check in self._checks:
            own = values[check.column.index :: self._width]
            wrong = self._verdict(check, check.violations(own), own)
            if wrong is not None:
                return wrong
        return None

    def _check_numbers(self, data: Buffer) -> str | None:
        elements = memoryview(data).nbytes / self._dtype.itemsize
        if elements % self._width:
            return self._size_message(elements)
        read = np.frombuffer(data, self._dtype).reshape(-1, self._width)
        values = self._carried(read if len(self._columns) == self._width else read[:, self._columns])
        outside = bool(((values < self._low) | (values > self._high)).any())
        for check in self._checks if outside else self._others:
            own = values[:, self._columns.index(check.column.index)]
            wrong = self._verdict(check, check.violations(own), own)
            if wrong is not None:
                return wrong
        return None

    def _carried(self, picked: Array) -> Array:
        if self._datatype == "BF16":
            return (picked.astype("u4") << 16).view("f4")
        return picked.astype(DATATYPES[self._datatype][1], copy=False)

    def _verdict(self, check: Check, wrong: Array, values: Array | list[bytes]) -> str | None:
        count = int(wrong.sum())
        if not count:
            return None
        if check.name == "missing":
            if count <= check.tolerated * len(wrong):
                return None
            return self._message(check, f"{count} of {len(wrong)} rows missing")
        row = int(wrong.argmax())
        return self._message(check, f"{_shown(values[row])} in row {row} ({count} of {len(wrong)} rows)")

    def _message(self, check: Check, got: str) -> str:
        where = f"input '{self.name}'" if self._width == 1 else f"input '{self.name}', element {check.column.index}"
        return f"column '{check.column.name}' ({where}): rule {check.name}: wanted {check.wanted}, got {got}"

    def _size_message(self, elements: float) -> str:
        return f"input '{self.name}': wanted {self._width} elements per row, got {elements:g} elements"


def _shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    if isinstance(value, bytes):
        return repr(value[:40].decode("utf-8", "backslashreplace"))
    return f"{float(value):g}"
