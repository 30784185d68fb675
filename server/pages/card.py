"""A model card, from plain values: the same sections as Markdown for a repository and as a page for people.

The document is what ``tidegate registry card --json`` prints. Keys: ``model``, ``version``, ``digest``, ``created``,
``state``, ``aliases``; ``description`` as published, ``files``; ``gates`` (outcomes with ``ts`` and ``actor``, newest
first), ``history`` (audit rows), ``drift`` (a report, counts that were saved, or a reason why there is neither).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from server.pages.markup import Html, el, name
from server.pages.numbers import DASH, decimal, moment, number
from server.pages.records import MOST_ROWS, Cell, table
from server.pages.shell import page

Document: TypeAlias = Mapping[str, Any]

_MARKS: Final = re.compile(r"([\\`*_{}\[\]<>|#~])")
_SPACES: Final = re.compile(r"\s+")
_STRONGEST: Final = 10
_SHOWN_NUMBERS: Final = (
    "rows",
    "candidate",
    "champion",
    "low",
    "high",
    "limit",
    "min",
    "gap",
    "ratio",
    "flips",
    "timings",
)
_BRIEF: Final = 160


@dataclass(slots=True, frozen=True)
class Part:
    """One section: facts as pairs, one table, and sentences under it. Cells are texts and numbers."""

    title: str
    facts: Sequence[tuple[str, object]] = ()
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    notes: Sequence[str] = ()


def card_markdown(document: Document) -> str:
    """The card as Markdown; whatever others have written in it is text."""
    lines = [f"# {_safe(_title(document))}", ""]
    for part in _parts(document):
        lines += [f"## {_safe(part.title)}", ""]
        if part.facts:
            lines += [*[f"- {_safe(key)}: {_safe(_shown(value))}" for key, value in part.facts], ""]
        if part.rows:
            lines += [_line(part.headings), _line(["---"] * len(part.headings), plain=True)]
            lines += [*[_line([_shown(cell) for cell in row]) for row in part.rows], ""]
        lines += [text for note in part.notes for text in (_safe(note), "")]
    return "\n".join(lines).rstrip() + "\n"


def card_page(document: Document) -> str:
    """The card as one page without anything from elsewhere."""
    sections = [
        el(
            "section",
            el("h2", part.title),
            _facts(part.facts) if part.facts else None,
            _table(part) if part.rows else None,
            *[el("p", note) for note in part.notes],
        )
        for part in _parts(document)
    ]
    return page(_title(document), el("header", el("h1", "Model card of ", name(_name(document)))), *sections)


def _facts(facts: Sequence[tuple[str, object]]) -> Html:
    return el("dl", *[el("div", el("dt", key), el("dd", _shown(value))) for key, value in facts])


def _table(part: Part) -> Html:
    rows = [el("tr", *[_cell(cell).markup() for cell in row]) for row in part.rows[:MOST_ROWS]]
    more = f"{MOST_ROWS} of {len(part.rows)} rows" if len(part.rows) > MOST_ROWS else ""
    return table([(heading, "") for heading in part.headings], rows, caption=more, class_="records")


def _cell(value: object) -> Cell:
    measured = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(_shown(value), value if measured else None, None if measured else "t")


def _line(cells: Iterable[object], *, plain: bool = False) -> str:
    return f"| {' | '.join([str(cell) if plain else _safe(cell) for cell in cells])} |"


def _safe(value: object) -> str:
    """Text on one line that means nothing in Markdown or HTML."""
    return _MARKS.sub(r"\\\1", _SPACES.sub(" ", str(value))).replace("&", "&amp;")


def _shown(value: object) -> str:
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return decimal(value) if isinstance(value, float) else str(value)


# --- sections --------------------------------------------------------------------------------------------------------


def _name(document: Document) -> str:
    return f"{document.get('model', '')}:{document.get('version', '')}"


def _title(document: Document) -> str:
    return f"Model card of {_name(document)}"


def _parts(document: Document) -> Iterator[Part]:
    about = document.get("description") or {}
    yield _identity(document, about)
    yield from _signature(about.get("signature") or {})
    yield _lineage(about.get("lineage") or {}, about.get("params") or {})
    yield _metrics(about.get("metrics") or ())
    gates = document.get("gates") or ()
    yield from _gates(gates[0]) if gates else [Part("Quality gates", notes=["No gate was looked at."])]
    history = document.get("history") or ()
    rollouts = [row for row in history if str(row.get("action", "")).startswith("rollout.")]
    yield _history("Rollouts and decisions", rollouts, "It was never rolled out.")
    yield _drift(document.get("drift") or {})
    others = [row for row in history if row not in rollouts and not str(row.get("action", "")).startswith("gate.")]
    yield _history("History", others, "Nothing was recorded.")
    files = [[f.get("path"), f.get("role"), f.get("size"), f.get("sha256")] for f in document.get("files") or ()]
    yield Part("Files", headings=("file", "role", "bytes", "SHA-256"), rows=files)


def _identity(document: Document, about: Document) -> Part:
    facts = [
        ("digest", document.get("digest")),
        ("published", document.get("created")),
        ("publisher", about.get("publisher")),
        ("licence", about.get("licence")),
        ("aliases", ", ".join(document.get("aliases") or ())),
        ("state", document.get("state")),
    ]
    return Part("Version", facts, notes=[about["card"]] if about.get("card") else ())


def _signature(signature: Document) -> Iterator[Part]:
    rows = [
        [side, tensor.get("name"), tensor.get("datatype"), " x ".join([str(dim) for dim in tensor.get("shape") or ()])]
        for side in ("inputs", "outputs")
        for tensor in signature.get(side) or ()
    ]
    if rows:
        yield Part("Signature", headings=("side", "tensor", "datatype", "shape"), rows=rows)


def _lineage(lineage: Document, params: Document) -> Part:
    facts = [
        (f"{key} {inner}", _listed(value))
        for key, found in lineage.items()
        if isinstance(found, Mapping)
        for inner, value in found.items()
    ]
    facts += [(key, value) for key, value in lineage.items() if not isinstance(value, Mapping)]
    facts += [(f"parameter {key}", value) for key, value in params.items()]
    return Part("Lineage", facts, notes=() if facts else ["Its publisher said nothing of where it comes from."])


def _listed(value: object) -> object:
    return " to ".join([str(item) for item in value]) if isinstance(value, list | tuple) else value


def _metrics(metrics: Sequence[Document]) -> Part:
    rows = [[m.get("dataset"), m.get("name"), m.get("value"), m.get("n")] for m in metrics]
    notes = () if rows else ["Its publisher gave none."]
    return Part("Published metrics", headings=("data set", "metric", "value", "n"), rows=rows, notes=notes)


def _gates(outcome: Document) -> Iterator[Part]:
    """The newest outcome: its findings with their numbers, metrics of both models, and groups."""
    data = outcome.get("data") or {}
    facts = [
        ("verdict", outcome.get("status")),
        ("looked at", outcome.get("ts")),
        ("by", outcome.get("actor")),
        ("beside version", outcome.get("against")),
        ("holdout rows", data.get("rows")),
        ("holdout SHA-256", data.get("sha256")),
        ("policy", outcome.get("policy")),
    ]
    findings = outcome.get("findings") or ()
    rows = [[f.get("gate"), f.get("status"), f.get("reason"), _numbers(f.get("evidence") or {})] for f in findings]
    yield Part("Quality gates", facts, ("gate", "status", "finding", "numbers"), rows)
    evidence = [(str(f.get("gate", "")), f.get("evidence") or {}) for f in findings]
    metrics = [
        [metric, *[(found.get(side) or {}).get(metric) for side in ("candidate", "champion")]]
        for _, numbers in evidence
        if (found := numbers.get("metrics"))
        for metric in found.get("candidate") or {}
    ]
    if metrics:
        yield Part("Metrics on the holdout", headings=("metric", "this version", "beside"), rows=metrics)
    groups = [[gate, *row] for gate, numbers in evidence for row in _groups(numbers)]
    if groups:
        yield Part("Slices", headings=("gate", "group", "rows", "value", "beside"), rows=groups)


def _numbers(evidence: Document) -> str:
    found = [(key, evidence[key]) for key in _SHOWN_NUMBERS if isinstance(evidence.get(key), int | float)]
    return ", ".join([f"{key} {_shown(value)}" for key, value in found])


def _groups(evidence: Document) -> Iterator[list[object]]:
    """(group, rows, value, champion's value) of one finding, or of the rates in it."""
    groups, rows = evidence.get("groups") or {}, evidence.get("rows") or {}
    for group, value in groups.items():
        if isinstance(value, Mapping):
            yield [group, value.get("rows"), value.get("candidate"), value.get("champion")]
        else:
            yield [group, rows.get(group) if isinstance(rows, Mapping) else None, value, None]
    for rate, inner in evidence.items():
        if isinstance(inner, Mapping) and "groups" in inner and "gap" in inner:
            yield from ([f"{group}, {rate}", *row] for group, *row in _groups(inner))


def _history(title: str, rows: Sequence[Document], nothing: str) -> Part:
    cells = [[r.get("ts"), r.get("action"), r.get("actor"), _brief(r.get("detail") or {})] for r in rows]
    return Part(title, headings=("time", "what", "who", "detail"), rows=cells, notes=() if cells else [nothing])


def _brief(detail: Document) -> str:
    text = ", ".join([f"{key} {_shown(value)}" for key, value in _scalars(detail) if value not in (None, "")])
    return text if len(text) <= _BRIEF else f"{text[: _BRIEF - 1]}…"


def _scalars(detail: Document) -> Iterator[tuple[str, object]]:
    """What fits on a line: values, and those one mapping further down."""
    for key, value in detail.items():
        if isinstance(value, Mapping):
            yield from [(f"{key} {inner}", v) for inner, v in value.items() if not isinstance(v, Mapping | list)]
        elif not isinstance(value, list | tuple):
            yield key, value


def _drift(drift: Document) -> Part:
    title = "Drift since launch"
    if reason := drift.get("reason"):
        return Part(title, notes=[str(reason)])
    if "report" not in drift:
        rows = [[a.get("arm"), a.get("rows"), a.get("dropped"), a.get("in_alarm")] for a in drift.get("arms") or ()]
        return Part(title, [("saved", drift.get("saved"))], ("arm", "rows", "dropped", "columns in alarm"), rows)
    report = drift["report"]
    facts = [("profile", report.get("profile"))]
    facts += [(f"rows of {arm}", rows) for arm, rows in (report.get("counted") or {}).items()]
    rows = [row for window in report.get("windows") or () for row in _window(window)]
    headings = ("arm", "window", "until", "column", "PSI", "KS at least", "in alarm")
    return Part(title, facts, headings, rows, [str(warning) for warning in report.get("warnings") or ()])


def _window(window: Document) -> Iterator[list[object]]:
    """The columns of a window with the strongest evidence."""
    alarms = window.get("in_alarm") or ()
    for score in (window.get("scores") or ())[:_STRONGEST]:
        column = score.get("column")
        psi, least = number(score.get("psi")), number(score.get("ks_low"))
        yield [
            window.get("arm"),
            window.get("window"),
            moment(window.get("end_ns")),
            column,
            psi,
            least,
            column in alarms,
        ]
