"""What the looks of one window said, for plots, and what alarms there were, for lists: the newest ones, bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from monitor.errors import StateError
from monitor.types import Array

#: Values per look and column, float32.
_NAMES: Final = ("psi", "psi_threshold", "ks", "ks_threshold", "log10_p")
_DECIMALS: Final = 6
#: Changes of alarms.
_ALARMS_KEPT: Final = 512
#: By how much a logarithm of 1 may be off.
_ROUNDED: Final = 1e-6

A = TypeVar("A")


class History:
    """``capacity`` looks at ``columns`` columns: 21 bytes per look and column, 24 per look, taken at once."""

    def __init__(self, columns: int, capacity: int) -> None:
        self._capacity = capacity
        self._looks = 0
        #: end of the window in ns, its rows.
        self._facts = np.zeros((capacity, 2), "i8")
        self._level = np.zeros(capacity, "f8")
        self._values = np.zeros((capacity, len(_NAMES), columns), "f4")
        self._alarms = np.zeros((capacity, columns), "u1")

    def add(self, end_ns: int, rows: int, log_level: float, values: Array, alarms: Array) -> None:
        """One look. ``values``: psi, its critical value, ks, its critical value, log10 p, by column."""
        slot = self._looks % self._capacity
        facts = self._facts
        facts[slot, 0], facts[slot, 1] = end_ns, rows  # a fraction of what a tuple takes
        self._level[slot] = log_level
        self._values[slot] = values
        self._alarms[slot] = alarms
        self._looks += 1

    def _slots(self, last: int) -> Array:
        """Ring places of the newest looks, oldest first."""
        held = min(self._looks, self._capacity, last)
        return np.arange(self._looks - held, self._looks) % self._capacity

    def to_dict(self, names: Sequence[str], last: int) -> dict[str, Any]:
        """Lists of equal length, oldest look first; what is undefined is None. ``names``: of the columns to be given,
        in the columns' order, empty for those to be left out."""
        slots = self._slots(last)
        values, alarms = self._values[slots], self._alarms[slots].astype(bool)
        return {
            "time_ns": self._facts[slots, 0].tolist(),
            "rows": self._facts[slots, 1].tolist(),
            "level": np.exp(self._level[slots]).tolist(),
            "columns": {
                name: {
                    **{value: _plain(values[:, place, column]) for place, value in enumerate(_NAMES)},
                    "in_alarm": alarms[:, column].tolist(),
                }
                for column, name in enumerate(names)
                if name
            },
        }

    def state(self) -> dict[str, Array]:
        """Copies for ``restore``."""
        slots = self._slots(self._capacity)
        return {
            "facts": self._facts[slots],
            "level": self._level[slots],
            "values": self._values[slots],
            "alarms": self._alarms[slots],
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Raises StateError when the arrays are not those of as many columns."""
        own = {"facts": self._facts, "level": self._level, "values": self._values, "alarms": self._alarms}
        looks = len(state["facts"]) if "facts" in state else -1
        if any(name not in state or state[name].shape != (looks, *array.shape[1:]) for name, array in own.items()):
            raise StateError("the state's history is of other columns")
        held = min(looks, self._capacity)
        for name, array in own.items():
            array[:held] = state[name][looks - held :]
        self._looks = held


def _plain(values: Array) -> list[float | None]:
    rounded = np.round(values.astype("f8"), _DECIMALS)
    out: list[float | None] = rounded.tolist()
    if np.isfinite(rounded).all():
        return out
    return [value if good else None for value, good in zip(out, np.isfinite(rounded).tolist(), strict=True)]


@dataclass(slots=True, frozen=True, eq=False)
class SavedAlarms:
    """Changes of alarms as plain data, oldest first.

    ``names``: what the ``texts`` of each are, its ``wholes`` (n, k) int64, and its ``numbers`` (n, j) float64, NaN
    where something is undefined.
    """

    names: list[list[str]]
    texts: list[list[str]]
    wholes: Array
    numbers: Array

    def stored(self, at: str, arrays: dict[str, Array]) -> dict[str, Any]:
        """The entry of a sealed file's header; the arrays go into ``arrays``, each name led by ``at``."""
        arrays[f"{at}wholes"], arrays[f"{at}numbers"] = self.wholes, self.numbers
        return {"names": self.names, "texts": self.texts}

    @classmethod
    def of(cls, entry: Mapping[str, Any] | None, at: str, arrays: Mapping[str, Array]) -> SavedAlarms | None:
        """What ``stored`` was given; None where the file has no entry. Raises KeyError or TypeError for others."""
        if entry is None:
            return None
        return cls(entry["names"], entry["texts"], arrays[f"{at}wholes"], arrays[f"{at}numbers"])


class AlarmHistory(Generic[A]):
    """The newest changes of alarms, of the dataclass ``kind``; what it is made of is texts, numbers and truth values.

    Each is taken apart when it comes, so that saving many costs little.
    """

    def __init__(self, kind: type[A], capacity: int = _ALARMS_KEPT) -> None:
        self._kind = kind
        self._leaves = list(_leaves(kind, ""))
        self._names = [[name for name, own in self._leaves if _stored_as(own) is kept] for kept in (str, int, float)]
        self._kept: deque[tuple[A, list[str], list[int], list[float]]] = deque(maxlen=capacity)

    def add(self, alarm: A) -> None:
        """One change."""
        values = dict(_apart(alarm, ""))
        texts, wholes, numbers = self._names
        self._kept.append(
            (
                alarm,
                [values.get(name, "") for name in texts],
                [int(values.get(name, 0)) for name in wholes],
                [values.get(name, 0.0) for name in numbers],
            )
        )

    def alarms(self) -> list[A]:
        """Oldest first."""
        return [alarm for alarm, *_ in self._kept]

    def state(self) -> SavedAlarms:
        """A copy for ``restore``."""
        _, wholes, numbers = self._names
        measured = np.array([row[3] for row in self._kept], "f8").reshape(-1, len(numbers))
        return SavedAlarms(
            self._names,
            [row[1] for row in self._kept],
            np.array([row[2] for row in self._kept], "i8").reshape(-1, len(wholes)),
            np.where(self._unheard_of(measured), np.nan, measured),
        )

    def restore(self, saved: SavedAlarms | None) -> None:
        """Begin with these; with none where they are of a build whose alarms were made of other things.

        Raises StateError when they are damaged, and then keeps what it had.
        """
        found: list[A] = []
        if saved is not None and saved.names == self._names:
            try:
                found = self._read(saved)
            except (KeyError, TypeError, ValueError) as failure:
                raise StateError(f"the state's past alarms are damaged ({failure})") from None
        self._kept.clear()
        for alarm in found:
            self.add(alarm)

    def _read(self, saved: SavedAlarms) -> list[A]:
        rows, arrays = len(saved.texts), (saved.wholes, saved.numbers)
        _, wholes, numbers = self._names
        if [(*array.shape, array.dtype.str[1:]) for array in arrays] != [
            (rows, len(wholes), "i8"),
            (rows, len(numbers), "f8"),
        ]:
            raise ValueError("shape")
        first, last = (saved.wholes[:, wholes.index(name)] for name in ("start_ns", "end_ns"))
        if saved.wholes.min(initial=0) < 0 or (first > last).any():
            raise ValueError("times or counts")
        if self._unheard_of(saved.numbers).any():
            raise ValueError("numbers")
        newest = slice(max(0, rows - (self._kept.maxlen or 0)), rows)
        names = [name for own in self._names for name in own]
        found = zip(saved.texts[newest], saved.wholes[newest].tolist(), saved.numbers[newest].tolist(), strict=True)
        return [self._made(dict(zip(names, [*texts, *some, *more], strict=True))) for texts, some, more in found]

    def _unheard_of(self, numbers: Array) -> Array:
        """Where they are infinite, or the logarithm of a p over 1; that of 0 is none of these."""
        logs = np.array([name.rpartition(".")[2] == "log_p" for name in self._names[2]])
        return np.where(logs, numbers > _ROUNDED, np.isinf(numbers))

    def _made(self, values: Mapping[str, Any]) -> A:
        made: A = _together(self._kind, {name: _checked(values[name], own) for name, own in self._leaves}, "")
        return made


class _Field(NamedTuple):
    """``part``: the dataclass that it holds, if it does, which may be missing where it is ``optional``."""

    name: str
    hint: Any
    part: type | None
    optional: bool


@cache
def _fields(kind: Any) -> list[_Field]:
    hints, found = get_type_hints(kind), []
    for name in [field.name for field in fields(kind)]:
        hint = hints[name]
        part = next((own for own in (hint, *get_args(hint)) if isinstance(own, type) and is_dataclass(own)), None)
        found.append(_Field(name, hint, part, part is not None and part is not hint))
    return found


def _leaves(kind: type, at: str) -> Iterator[tuple[str, Any]]:
    """(name, type) of all that alarms of this class are made of: parts are led by their name, and those that may be
    missing have a bool that says whether they are there."""
    for field in _fields(kind):
        if field.part is None or field.optional:
            yield f"{at}{field.name}", bool if field.optional else field.hint
        if field.part is not None:
            yield from _leaves(field.part, f"{at}{field.name}.")


def _apart(value: Any, at: str) -> Iterator[tuple[str, Any]]:
    """What ``_leaves`` names, as far as it is there."""
    kind: Any = type(value)
    for field in _fields(kind):
        own = getattr(value, field.name)
        if field.part is None:
            yield f"{at}{field.name}", own
        elif own is not None:
            yield f"{at}{field.name}", True
            yield from _apart(own, f"{at}{field.name}.")


def _together(kind: Any, values: Mapping[str, Any], at: str) -> Any:
    """What ``_apart`` took apart."""
    found: dict[str, Any] = {}
    for field in _fields(kind):
        name = f"{at}{field.name}"
        if field.part is None:
            found[field.name] = values[name]
        else:
            there = values[name] if field.optional else True
            found[field.name] = _together(field.part, values, f"{name}.") if there else None
    return kind(**found)


def _stored_as(hint: Any) -> Any:
    """str, int or float."""
    return str if get_origin(hint) is Literal else int if hint is bool else hint


def _checked(value: Any, hint: Any) -> Any:
    """A value that was read. Raises ValueError when it is none of its type."""
    known = (0, 1) if hint is bool else get_args(hint)
    if type(value) is not _stored_as(hint) or (known and value not in known):
        raise ValueError(str(hint))
    return bool(value) if hint is bool else value
