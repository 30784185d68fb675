"""What two versions answered to the same requests: agreement, distances, scores, compute time. One per shadow.

Holds counts, maxima, a bounded sample of score pairs and the names of the worst pairs; never a payload beyond the call
that brings it. Counts add up over processes (``merge``). Sending requests, budgets and metrics belong to the owner.

The kernels stand on numba, whose import alone takes over half a second: they are loaded by ``prepare``, which a process
without shadows never calls.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_BYTES: Final = "BYTES"
_INTEGERS: Final = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")
#: V2 datatype -> how its bytes are read. BF16 is read as the upper halves of floats.
_READ_AS: Final[dict[str, np.dtype[Any]]] = {
    **{name: np.dtype(name.lower()).newbyteorder("<") for name in _INTEGERS if name != "BOOL"},
    "BOOL": np.dtype("u1"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
#: Score pairs kept of each column, and columns sampled one by one; wider outputs are sampled as one column.
SAMPLED_PAIRS: Final = 2048
SAMPLED_COLUMNS: Final = 8
#: Batch sizes whose compute times are kept apart; rarer ones that come later are left out.
_MAX_BATCH_SIZES: Final = 256
#: numpy draws a hypergeometric number up to here; of more elements the expected share is taken.
_MAX_DRAWN: Final = 10**9

#: Why a pair disagrees. ``missing``: only one version gave that output.
KINDS: Final = ("missing", "datatype", "shape", "tolerance", "argmax")


class Output(Protocol):
    """A named tensor: a little-endian row-major buffer, or for BYTES a flat list of ``bytes``."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def data(self) -> Any: ...


@dataclass(slots=True, frozen=True)
class CompareSpec:
    """What is compared. ``outputs`` empty: all. Floats differ when ``|p - s| > abs_tol + rel_tol * |p|``; integers and
    BYTES when they are unequal. ``keep_worst``: how many of the worst pairs are named."""

    outputs: tuple[str, ...] = ()
    abs_tol: float = 1e-6
    rel_tol: float = 1e-5
    argmax: bool = True
    ks: bool = True
    keep_worst: int = 100


@dataclass(slots=True)
class Pair:
    """Two answers to one request. ``batched``: dim 0 of the outputs is the batch. ``*_batch_rows``: rows of the batch
    that the answer was computed in; ``*_ns``: compute time of that batch."""

    id: str
    primary: Sequence[Output]
    shadow: Sequence[Output]
    batched: bool = True
    primary_ns: int = 0
    primary_batch_rows: int = 0
    shadow_ns: int = 0
    shadow_batch_rows: int = 0


@dataclass(slots=True, frozen=True)
class Verdict:
    """One pair's outcome. ``kinds``: every reason of KINDS for which it disagrees, none when it agrees.

    ``max_abs`` is over finite differences; ``latency_ratio`` is that of all pairs so far (None: nothing comparable).
    """

    kinds: tuple[str, ...]
    max_abs: float
    nonfinite: int
    latency_ratio: float | None


@dataclass(slots=True)
class _Difference:
    """What comparing one output of one pair found."""

    kinds: tuple[str, ...] = ()
    elements: int = 0
    over: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    rows: int = 0
    agreeing: int = 0


@dataclass(slots=True)
class _Sample:
    """Uniform reservoirs of score pairs, one per column."""

    primary: Array
    shadow: Array
    seen: Array
    state: Array = field(default_factory=lambda: np.array([0x9E3779B97F4A7C15], np.uint64))

    @classmethod
    def of_columns(cls, columns: int) -> _Sample:
        shape = (columns, SAMPLED_PAIRS)
        return cls(np.zeros(shape), np.zeros(shape), np.zeros(columns, np.int64))

    def statistic(self) -> float:
        """The largest two-sample Kolmogorov-Smirnov distance of any column."""
        return max(self._column_statistic(column) for column in range(len(self.seen)))

    def _column_statistic(self, column: int) -> float:
        kept = self.kept(column)
        first, second = np.sort(self.primary[column, :kept]), np.sort(self.shadow[column, :kept])
        return float(_kernels().ks_two_sample(first, second))

    def kept(self, column: int) -> int:
        return min(int(self.seen[column]), SAMPLED_PAIRS)

    def merge(self, other: _Sample) -> None:
        """Become a uniform sample of both; samples of other widths are left out."""
        if self.seen.shape != other.seen.shape:
            return
        random = np.random.default_rng(int(self.state[0]))
        for column in range(len(self.seen)):
            self._merge_column(other, column, random)
        self.seen += other.seen

    def _merge_column(self, other: _Sample, column: int, random: np.random.Generator) -> None:
        mine, theirs = int(self.seen[column]), int(other.seen[column])
        total = min(mine + theirs, SAMPLED_PAIRS)
        take = round(total * mine / max(mine + theirs, 1))
        if mine > 0 and theirs > 0 and mine + theirs < _MAX_DRAWN:
            take = int(random.hypergeometric(mine, theirs, total))
        chosen = random.permutation(self.kept(column))[:take]
        joined = random.permutation(other.kept(column))[: total - take]
        for own, foreign in ((self.primary, other.primary), (self.shadow, other.shadow)):
            own[column, :total] = np.concatenate((own[column, chosen], foreign[column, joined]))


@dataclass(slots=True)
class _OutputTotals:
    """Everything that is known of one output."""

    pairs: int = 0
    kinds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    elements: int = 0
    over: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    rows: int = 0
    agreeing: int = 0
    sample: _Sample | None = None

    def add(self, found: _Difference) -> None:
        self.pairs += 1
        for kind in found.kinds:
            self.kinds[kind] += 1
        self._sum(found)

    def merge(self, other: _OutputTotals) -> None:
        self.pairs += other.pairs
        for kind, count in other.kinds.items():
            self.kinds[kind] += count
        self._sum(other)
        if self.sample is None:
            self.sample = other.sample
        elif other.sample is not None:
            self.sample.merge(other.sample)

    def _sum(self, other: _Difference | _OutputTotals) -> None:
        self.elements += other.elements
        self.over += other.over
        self.nonfinite += other.nonfinite
        self.max_abs = max(self.max_abs, other.max_abs)
        self.max_rel = max(self.max_rel, other.max_rel)
        self.rows += other.rows
        self.agreeing += other.agreeing

    def report(self) -> dict[str, Any]:
        return {
            "pairs": self.pairs,
            "disagreements": dict(self.kinds),
            "elements": self.elements,
            "over_tolerance": self.over,
            "over_tolerance_share": _share(self.over, self.elements),
            "nonfinite": self.nonfinite,
            "max_abs_diff": self.max_abs,
            "max_rel_diff": self.max_rel,
            "argmax_rows": self.rows,
            "argmax_agreeing": self.agreeing,
            "argmax_agreement": _share(self.agreeing, self.rows),
            "ks": None if self.sample is None else self.sample.statistic(),
            "ks_pairs": 0 if self.sample is None else int(self.sample.seen.max()),
        }


class _Latency:
    """Compute times of both versions by batch size. A single pair says little: they ran in batches of other sizes."""

    def __init__(self) -> None:
        #: Batch rows -> [primary count, primary ns, shadow count, shadow ns].
        self._sizes: dict[int, list[int]] = {}

    def add(self, pair: Pair) -> None:
        self._count(pair.primary_batch_rows, 0, 1, pair.primary_ns)
        self._count(pair.shadow_batch_rows, 2, 1, pair.shadow_ns)

    def _count(self, rows: int, place: int, count: int, total_ns: int) -> None:
        if not total_ns or (rows not in self._sizes and len(self._sizes) >= _MAX_BATCH_SIZES):
            return
        cell = self._sizes.setdefault(rows, [0, 0, 0, 0])
        cell[place] += count
        cell[place + 1] += total_ns

    def merge(self, other: _Latency) -> None:
        for rows, (primaries, primary_ns, shadows, shadow_ns) in other._sizes.items():
            self._count(rows, 0, primaries, primary_ns)
            self._count(rows, 2, shadows, shadow_ns)

    def means(self) -> tuple[int, float, float]:
        """(answers compared, primary's mean ns, shadow's mean ns), each size weighted by its rarer side."""
        answers, primary_total, shadow_total = 0, 0.0, 0.0
        for primaries, primary_ns, shadows, shadow_ns in self._sizes.values():
            weight = min(primaries, shadows)
            if weight:
                answers += weight
                primary_total += weight * primary_ns / primaries
                shadow_total += weight * shadow_ns / shadows
        return answers, primary_total / max(answers, 1), shadow_total / max(answers, 1)

    def ratio(self) -> float | None:
        answers, primary, shadow = self.means()
        return shadow / primary if answers else None

    def report(self) -> dict[str, Any]:
        answers, primary, shadow = self.means()
        return {
            "answers_at_equal_batch_rows": answers,
            "primary_mean_us": primary / 1000 if answers else None,
            "shadow_mean_us": shadow / 1000 if answers else None,
            "ratio": self.ratio(),
        }


class PairedComparison:
    """Accumulates pairs. ``add`` computes and may be called from any thread, like everything here.

    Needs ``prepare`` to have been called.
    """

    def __init__(self, spec: CompareSpec) -> None:
        self.spec = spec
        self._lock = threading.Lock()
        self._outputs: dict[str, _OutputTotals] = {}
        self._latency = _Latency()
        self._pairs = 0
        self._disagreeing = 0
        self._entries = 0
        #: A heap of (how bad, minus the number of the entry, what is reported): the mildest on top.
        self._worst: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, pair: Pair) -> Verdict:
        """Compare one pair and count it. Wrong shapes, datatypes and sizes are findings, not errors."""
        with self._lock:
            found = {name: self._compare(name, *sides, pair.batched) for name, sides in self._matched(pair)}
            kinds = tuple(kind for kind in KINDS if any(kind in one.kinds for one in found.values()))
            self._pairs += 1
            self._disagreeing += bool(kinds)
            self._latency.add(pair)
            for name, one in found.items():
                self._keep(pair.id, name, one)
            return Verdict(
                kinds,
                max((one.max_abs for one in found.values()), default=0.0),
                sum(one.nonfinite for one in found.values()),
                self._latency.ratio(),
            )

    def merge(self, other: PairedComparison) -> None:
        """Add what another process's comparison of the same versions has found; ``other`` is not to be used on."""
        with self._lock, other._lock:
            for name, totals in other._outputs.items():
                self._outputs.setdefault(name, _OutputTotals()).merge(totals)
            self._latency.merge(other._latency)
            self._pairs += other._pairs
            self._disagreeing += other._disagreeing
            for badness, _, entry in other._worst:
                self._push(badness, entry)

    def report(self) -> dict[str, Any]:
        """Plain numbers, text, lists and dicts; every number is finite."""
        with self._lock:
            return {
                "pairs": self._pairs,
                "disagreeing": self._disagreeing,
                "agreement": _share(self._pairs - self._disagreeing, self._pairs),
                "outputs": {name: totals.report() for name, totals in sorted(self._outputs.items())},
                "latency": self._latency.report(),
                "worst": [entry for *_, entry in sorted(self._worst, key=lambda item: (-item[0], -item[1]))],
            }

    def _matched(self, pair: Pair) -> Iterator[tuple[str, tuple[Output | None, Output | None]]]:
        primary = {output.name: output for output in pair.primary}
        shadow = {output.name: output for output in pair.shadow}
        for name in self.spec.outputs or sorted(primary | shadow):
            yield name, (primary.get(name), shadow.get(name))

    def _compare(self, name: str, primary: Output | None, shadow: Output | None, batched: bool) -> _Difference:
        totals = self._outputs.setdefault(name, _OutputTotals())
        if primary is None or shadow is None:
            found = _Difference(("missing",))
        else:
            found = self._compare_present(totals, primary, shadow, batched)
        totals.add(found)
        return found

    def _compare_present(self, totals: _OutputTotals, primary: Output, shadow: Output, batched: bool) -> _Difference:
        if primary.datatype != shadow.datatype:
            return _Difference(("datatype",))
        if primary.shape != shadow.shape:
            return _Difference(("shape",))
        if primary.datatype == _BYTES:
            return _strings(primary.data, shadow.data)
        first, second = _numbers(primary), _numbers(shadow)
        if first is None or second is None:
            return _Difference(("shape",))  # its bytes are not what its shape says
        width = _row_width(primary.shape, batched)
        found = self._distances(first, second)
        if self.spec.argmax and width > 1 and first.size:
            found.rows = first.size // width
            found.agreeing = int(_kernels().argmax_agreement(first, second, width))
        if self.spec.ks and first.dtype.kind == "f" and first.size:
            self._sample(totals, first, second, width)
        found.kinds = tuple(
            kind for kind, is_so in (("tolerance", found.over), ("argmax", found.agreeing < found.rows)) if is_so
        )
        return found

    def _distances(self, first: Array, second: Array) -> _Difference:
        if first.dtype.kind != "f":
            unequal, largest = _kernels().integer_differences(first, second)
            return _Difference(elements=first.size, over=int(unequal), max_abs=float(largest))
        over, nonfinite, largest, relative = _kernels().float_differences(
            first, second, self.spec.abs_tol, self.spec.rel_tol
        )
        return _Difference((), first.size, int(over), int(nonfinite), float(largest), float(relative))

    @staticmethod
    def _sample(totals: _OutputTotals, first: Array, second: Array, width: int) -> None:
        columns = width if width <= SAMPLED_COLUMNS else 1
        if totals.sample is None:
            totals.sample = _Sample.of_columns(columns)
        sample = totals.sample
        if len(sample.seen) == columns:  # a free last dimension can give rows of several widths
            _kernels().sample_pairs(first, second, sample.primary, sample.shadow, sample.seen, sample.state)

    def _keep(self, pair_id: str, name: str, found: _Difference) -> None:
        """Remember an output that disagrees, if it is among the worst: what has no distance is worse than any."""
        if not found.kinds:
            return
        distant = found.nonfinite or found.kinds[0] in ("missing", "datatype", "shape")
        badness = float("inf") if distant else found.max_abs
        entry = {
            "id": pair_id,
            "output": name,
            "disagreements": list(found.kinds),
            "max_abs_diff": found.max_abs,
            "nonfinite": found.nonfinite,
            "over_tolerance": found.over,
        }
        self._push(badness, entry)

    def _push(self, badness: float, entry: dict[str, Any]) -> None:
        self._entries += 1
        item = (badness, -self._entries, entry)  # of equally bad ones the first stay
        if len(self._worst) < self.spec.keep_worst:
            heapq.heappush(self._worst, item)
        elif self._worst and item > self._worst[0]:
            heapq.heapreplace(self._worst, item)


def prepare() -> None:
    """Load and compile the kernels: under a second from the cache, several without. Call it off the loop."""
    from monitor.kernels import _jit

    _kernels()
    _jit.compile_all()


def _kernels() -> ModuleType:
    from monitor.kernels import compare

    return compare


def _numbers(output: Output) -> Array | None:
    """The elements as float32, float64, int64 or uint64, aligned; None when there are not as many as the shape says."""
    read_as = _READ_AS.get(output.datatype)
    count = 1
    for dim in output.shape:
        count *= dim
    data = output.data
    if read_as is None or isinstance(data, list) or memoryview(data).nbytes != count * read_as.itemsize:
        return None
    found = np.frombuffer(data, dtype=read_as)
    if output.datatype == "BF16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    wanted = {"f": np.float64 if read_as.itemsize == 8 else np.float32, "i": np.int64, "u": np.int64}[read_as.kind]
    return np.require(found, np.uint64 if output.datatype == "UINT64" else wanted, ["C", "A"])


def _strings(first: Sequence[bytes], second: Sequence[bytes]) -> _Difference:
    if len(first) != len(second):
        return _Difference(("shape",))
    unequal = sum(map(bytes.__ne__, first, second))
    return _Difference(("tolerance",) if unequal else (), elements=len(first), over=unequal)


def _row_width(shape: tuple[int, ...], batched: bool) -> int:
    """Elements of the last axis, which the largest is sought along; 1 when the only axis is the batch."""
    return shape[-1] if len(shape) > batched else 1


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
