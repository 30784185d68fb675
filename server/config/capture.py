"""The ``capture`` section: which requests are recorded, what of them, and how much of that is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from server.config import units
from server.config.capture_options import CaptureSettings, CaptureSpec, ColumnRule, EventOptions
from server.config.kinds import (
    DURATION_SCHEMA,
    SIZE_SCHEMA,
    FilePath,
    Many,
    ModelName,
    PositiveInt,
    Secret,
    Share,
    Text,
    bounded_duration,
    bounded_size,
    default,
    parse_share,
)
from server.config.problems import Contradiction
from server.config.section import Section

_ACTIONS: Final = ("keep", "drop", "hmac")
_URL_PATTERN: Final = r"https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[!-~]*)?"
_URL: Final = re.compile(_URL_PATTERN, re.ASCII)
_MIN_SECRET: Final = 16


class Column(Section):
    """What becomes of a column. In the file ``keep``, ``drop`` and ``hmac`` are plain words.

    ``bucket``: ascending edges; the column then says which bucket the value lies in, from 0 to the number of edges.
    """

    action: Literal["keep", "drop", "hmac"] = "keep"
    bucket: Annotated[Many[float], Field(min_length=1, max_length=1000)] | None = None

    def rule(self) -> ColumnRule:
        return ColumnRule(self.action) if self.bucket is None else ColumnRule("bucket", self.bucket)


def _column(value: object) -> object:
    if isinstance(value, str) and value in _ACTIONS:
        return {"action": value}
    if not isinstance(value, dict) or set(value) != {"bucket"}:
        raise ValueError(f"wanted keep, drop, hmac or {{bucket: [EDGE, ...]}}, got {units.show(value)}")
    return value


def _ascending(column: Column) -> Column:
    if column.bucket is not None and any(low >= high for low, high in pairwise(column.bucket)):
        raise ValueError(f"edges of buckets must ascend, got {list(column.bucket)}")
    return column


_COLUMN_SCHEMA: Final = {
    "anyOf": [
        {"enum": list(_ACTIONS)},
        {
            "type": "object",
            "properties": {"bucket": {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": 1000}},
            "required": ["bucket"],
            "additionalProperties": False,
        },
    ]
}
ColumnChoice = Annotated[Column, BeforeValidator(_column), AfterValidator(_ascending), WithJsonSchema(_COLUMN_SCHEMA)]


def _events_url(value: str) -> str:
    if not _URL.fullmatch(value):
        raise ValueError("wanted http://HOST or https://HOST, perhaps with port and path; the value is not shown")
    return value


def _long_enough(value: str) -> str:
    if len(value) < _MIN_SECRET:
        raise ValueError(f"wanted a secret of at least {_MIN_SECRET} characters (not shown here)")
    return value


SegmentSize = Annotated[int, bounded_size("64KiB", "1GiB"), SIZE_SCHEMA]
DiskSize = Annotated[int, bounded_size("1MiB", "1024GiB"), SIZE_SCHEMA]
SegmentAge = Annotated[int, bounded_duration("100ms", "1d"), DURATION_SCHEMA]
SendTime = Annotated[int, bounded_duration("100ms", "1m"), DURATION_SCHEMA]
#: Keys the hashes of ``hmac``.
HashSecret = Annotated[Secret, AfterValidator(_long_enough)]
EventsUrl = Annotated[
    Text, AfterValidator(_events_url), WithJsonSchema({"type": "string", "pattern": f"^{_URL_PATTERN}$"})
]


class Segment(Section):
    """When a segment is written: at so many rows, so many bytes in memory, or so old; whichever is first."""

    #: Rows of a segment.
    rows: Annotated[int, Field(ge=1, le=10_000_000)] = 50_000
    #: Bytes in memory.
    size: SegmentSize = default("16MiB", units.parse_size)
    #: Since its first row.
    age: SegmentAge = default("1m", units.parse_duration)


class Buffer(Section):
    """What may be held in memory until it is written; over it requests are not captured, and that is counted."""

    #: Requests that wait to be written.
    requests: PositiveInt = 65_536
    #: Their bytes.
    size: SegmentSize = default("64MiB", units.parse_size)


class Events(Section):
    """Captured requests and answers as CloudEvents in KServe's shape, posted in batches; what fails is not repeated.

    ``ca_file``: PEM file of the authorities that are trusted for https.
    """

    #: Where they are posted.
    url: EventsUrl = Field(repr=False)
    #: The namespace that they bear.
    namespace: Annotated[Text, Field(min_length=1, max_length=253)] = "default"
    #: Of one post.
    timeout: SendTime = default("5s", units.parse_duration)
    ca_file: FilePath | None = None


class ModelCapture(Section):
    """What is captured of one model; what is left out is as in the ``capture`` section itself."""

    #: The share of its requests that is recorded.
    sample: Share | None = None
    #: What becomes of its columns.
    columns: dict[Text, ColumnChoice] = Field(default_factory=dict)
    #: As in the section itself.
    max_columns: Annotated[int, Field(ge=1, le=4096)] | None = None
    #: As in the section itself.
    max_elements: PositiveInt | None = None


class Capture(Section):
    """A sample of requests and answers, recorded in segments below ``folder``.

    ``sample`` and ``columns`` hold for every model; ``models`` say otherwise for some, their columns on top of these.
    Columns are named like tensors (``x``: all its elements), their elements (``x[3]``), or ``__client_id``. Strings are
    left out unless a column says keep or hmac. ``format`` auto: Parquet where duckdb is installed, else JSON lines.
    ``max_disk`` and ``max_segments``: the oldest segments are removed to keep within them. ``shadows``: what shadows
    answered to the sampled requests is recorded too.
    """

    #: The share of requests that is recorded.
    sample: Share = default("0%", parse_share)
    #: What becomes of columns, by name.
    columns: dict[Text, ColumnChoice] = Field(default_factory=dict)
    #: Elements of a row up to which each is a column of its own.
    max_columns: Annotated[int, Field(ge=1, le=4096)] = 64
    #: Elements of a row up to which a tensor is one column of lists; a larger one is left out.
    max_elements: PositiveInt = 4096
    #: What is different for single models, by name.
    models: dict[ModelName, ModelCapture] = Field(
        default_factory=dict, json_schema_extra={"additionalProperties": False}
    )
    #: Keys the hashes of ``hmac``; at least 16 characters.
    secret: HashSecret | None = Field(default=None, repr=False)
    #: Where segments lie; left out, ``capture`` in the state folder.
    folder: FilePath | None = None
    format: Literal["auto", "parquet", "jsonl"] = "auto"
    segment: Segment = Field(default_factory=Segment)
    buffer: Buffer = Field(default_factory=Buffer)
    max_disk: DiskSize = default("1GiB", units.parse_size)
    max_segments: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    events: Events | None = None
    shadows: bool = False

    @property
    def wanted(self) -> bool:
        """Is anything captured at all?"""
        return self.sample > 0 or any(model.sample for model in self.models.values())


def compile_capture(section: Capture | None) -> CaptureSettings | None:
    """What the section says; None when nothing is to be captured."""
    if section is None or not section.wanted:
        return None
    events = section.events
    return CaptureSettings(
        default=CaptureSpec(section.sample, _rules(section.columns), section.max_columns, section.max_elements),
        specs={name: _spec(section, model) for name, model in section.models.items()},
        folder=section.folder,
        format=section.format,
        segment_rows=section.segment.rows,
        segment_bytes=section.segment.size,
        segment_age_s=section.segment.age / units.NS_PER_S,
        max_requests=section.buffer.requests,
        max_bytes=section.buffer.size,
        max_disk_bytes=section.max_disk,
        max_segments=section.max_segments,
        secret=section.secret or "",
        events=None if events is None else _events(events),
        shadows=section.shadows,
    )


def _rules(columns: Mapping[str, Column]) -> dict[str, ColumnRule]:
    return {name: column.rule() for name, column in columns.items()}


def _spec(section: Capture, model: ModelCapture) -> CaptureSpec:
    return CaptureSpec(
        section.sample if model.sample is None else model.sample,
        _rules({**section.columns, **model.columns}),
        model.max_columns or section.max_columns,
        model.max_elements or section.max_elements,
    )


def _events(events: Events) -> EventOptions:
    ca_file = "" if events.ca_file is None else str(events.ca_file)
    return EventOptions(events.url, events.namespace, events.timeout / units.NS_PER_S, ca_file)


def capture_contradictions(section: Capture | None, models: Mapping[str, object]) -> Iterator[Contradiction]:
    """Every broken rule that spans several keys. ``models``: the names of the file's models."""
    if section is None:
        return
    if section.segment.size > section.buffer.size:
        text = "a segment is gathered in the buffer, which must be at least as large"
        yield Contradiction(("capture", "segment", "size"), text, (("capture", "buffer", "size"),))
    for name, model in section.models.items():
        if models and name not in models:
            yield Contradiction(("capture", "models", name), f"model '{name}' is none of the file's models")
        yield from _unkeyed(section, ("capture", "models", name, "columns"), model.columns)
    yield from _unkeyed(section, ("capture", "columns"), section.columns)


def _unkeyed(section: Capture, path: tuple[str, ...], columns: Mapping[str, Column]) -> Iterator[Contradiction]:
    for name, column in columns.items():
        if section.secret is None and column.bucket is None and column.action == "hmac":
            yield Contradiction((*path, name), "hmac needs a key: give capture.secret")
