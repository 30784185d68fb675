"""Tables of plain values: heading cells that sort, and rows found in nested results of any shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from server.pages.markup import Html, el, name
from server.pages.numbers import DASH, count, decimal, moment, number

#: Rows of a table at most; the caption says how many there were.
MOST_ROWS: Final = 200
_DEEPEST: Final = 8


@dataclass(slots=True, frozen=True)
class Cell:
    """What is shown, and the number that sorting goes by (None: the text)."""

    shown: object
    value: object = None
    class_: str | None = None

    def markup(self) -> Html:
        # NaN is written as nothing: it sorts last.
        sortable = None if self.value is None else f"{found:.6g}" if (found := number(self.value)) == found else ""
        return el("td", self.shown, class_=self.class_, data_v=sortable)


def table(headings: Sequence[tuple[str, str]], rows: Iterable[Html], *, caption: str = "", class_: str = "") -> Html:
    """``headings``: (text, what it means) each; ``rows`` are ``tr`` elements. Wide ones scroll by themselves."""
    heads = [el("th", head, scope="col", data_sort=True, title=meaning or None) for head, meaning in headings]
    return el(
        "div",
        el(
            "table",
            el("caption", caption) if caption else None,
            el("thead", el("tr", *heads)),
            el("tbody", *rows),
            class_=class_ or None,
        ),
        class_="scroll",
    )


def records(found: Any) -> Html | None:
    """A table of whatever rows are in nested mappings and lists: their path, and a column per scalar; None if none."""
    rows = list(_walk(found, ()))
    if not rows:
        return None
    keys = list(dict.fromkeys([key for _, scalars in rows for key in scalars]))
    named = any(path for path, _ in rows)
    heads = [("of", ""), *[(key.replace("_", " "), "") for key in keys]] if named else [(k, "") for k in keys]
    body = [_row(path if named else None, scalars, keys) for path, scalars in rows[:MOST_ROWS]]
    more = f"{MOST_ROWS} of {len(rows)} rows" if len(rows) > MOST_ROWS else ""
    return table(heads, body, caption=more, class_="records")


def _walk(found: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if len(path) > _DEEPEST:
        return
    if isinstance(found, Mapping):
        scalars = {str(key): value for key, value in found.items() if not isinstance(value, Mapping | list | tuple)}
        if scalars:
            yield path, scalars
        for key, value in found.items():
            if isinstance(value, Mapping | list | tuple):
                yield from _walk(value, (*path, str(key)))
    elif isinstance(found, list | tuple):
        for value in found:
            yield from _walk(value, path)


def _row(path: tuple[str, ...] | None, scalars: Mapping[str, Any], keys: Sequence[str]) -> Html:
    first = [el("td", name(" / ".join(path)))] if path is not None else []
    return el("tr", *first, *[_scalar(key, scalars.get(key)).markup() for key in keys])


def _scalar(key: str, value: Any) -> Cell:
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(moment(value) if key.endswith("_ns") else count(value), value)
    if isinstance(value, float):
        return Cell(decimal(value), value)
    return Cell(name(DASH if value is None else value), class_="t")
