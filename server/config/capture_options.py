"""What the ``capture`` section compiles to: plain frozen values, for the part of the server that records payloads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

Action: TypeAlias = Literal["keep", "drop", "hmac", "bucket"]


@dataclass(slots=True, frozen=True)
class ColumnRule:
    """What becomes of a column: kept, left out, hashed with the secret, or replaced by the number of its bucket.

    ``edges`` of ``bucket``: ascending; bucket i holds ``edges[i - 1] <= value < edges[i]``, NaN is -1.
    """

    action: Action = "keep"
    edges: tuple[float, ...] = ()


@dataclass(slots=True, frozen=True)
class CaptureSpec:
    """What is captured of one model. ``sample``: in 1/10,000 of the requests.

    ``rules``: by column (``tensor[3]``), by tensor, or ``__client_id``; a column's own goes first. Numbers without a
    rule are kept, strings without one are left out. A tensor has a column for each element of a row up to
    ``max_columns`` of them, one column of lists up to ``max_elements`` or where the model leaves its shape free, and is
    left out above.
    """

    sample: int = 0
    rules: Mapping[str, ColumnRule] = field(default_factory=dict)
    max_columns: int = 64
    max_elements: int = 4096


@dataclass(slots=True, frozen=True)
class EventOptions:
    """Where captured requests go as CloudEvents, and how they name this gateway (see KServe's payload logger)."""

    url: str = field(repr=False)
    namespace: str = "default"
    timeout_s: float = 5.0
    ca_file: str = ""


@dataclass(slots=True, frozen=True)
class CaptureSettings:
    """Of all models. ``specs`` by the name of the models entry; ``default`` for every other one.

    ``folder`` None: ``capture`` in the state folder. A segment ends at any of its three limits. ``max_requests`` and
    ``max_bytes`` bound what waits in memory, ``max_disk_bytes`` and ``max_segments`` what is kept on disk: the oldest
    segments go first. ``secret`` keys the hashes of ``hmac``. ``shadows``: what shadows answered to the sampled
    requests is captured too.
    """

    default: CaptureSpec = CaptureSpec()
    specs: Mapping[str, CaptureSpec] = field(default_factory=dict)
    folder: Path | None = None
    format: Literal["auto", "parquet", "jsonl"] = "auto"
    segment_rows: int = 50_000
    segment_bytes: int = 16 * 2**20
    segment_age_s: float = 60.0
    max_requests: int = 65_536
    max_bytes: int = 64 * 2**20
    max_disk_bytes: int = 2**30
    max_segments: int = 10_000
    secret: str = field(default="", repr=False)
    events: EventOptions | None = None
    shadows: bool = False

    def of(self, model: str) -> CaptureSpec:
        return self.specs.get(model, self.default)
