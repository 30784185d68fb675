"""Holdout data: files, checked by digest, as columns, labels and groups. Blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from monitor.loaders import TEXT_FILES
from server.config.gates import GatePolicy
from server.errors import InvalidArgument
from server.gates.scores import as_text
from server.tabular import Tabular, arrange, input_rows, read_tables
from server.types import BYTES, ModelSpec

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_CHUNK: Final = 1 << 20
#: More groups than this are no groups: a name or a number that nobody cut into bins.
MOST_GROUPS: Final = 200


@dataclass(slots=True, frozen=True)
class Holdout:
    """``table``: (rows,) or (rows, ...) per column. ``total``: rows of the files; ``sha256``: of their bytes.

    ``groups``: (rows,) texts of columns of text files whose values make groups, "" for a row without.
    """

    table: dict[str, Array]
    rows: int
    total: int
    sha256: str
    groups: dict[str, Array] = field(default_factory=dict)

    def told(self) -> dict[str, object]:
        """What an audit keeps of it."""
        return {"sha256": self.sha256, "rows": self.rows, "of": self.total}


def digest_files(paths: Sequence[Path]) -> str:
    """SHA-256 (hex) of the files' bytes, one after the other. Raises InvalidArgument."""
    found = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    found.update(chunk)
        except OSError as error:
            raise InvalidArgument(f"holdout {path.name} cannot be read: {error.strerror or error}") from error
    return found.hexdigest()


def read_holdout(policy: GatePolicy, sha256: str) -> Holdout:
    """The rows that the policy looks at; ``sha256``: of the files as they are. Raises InvalidArgument."""
    if policy.holdout.sha256 not in (None, sha256):
        raise InvalidArgument(f"the holdout's SHA-256 is {sha256}, the policy wants {policy.holdout.sha256}")
    table = read_tables(policy.paths())
    lengths = {len(values) for values in table.values()}
    if len(lengths) != 1:
        raise InvalidArgument(f"the holdout's columns have different lengths: {sorted(lengths)[:5]}")
    total = lengths.pop()
    picked = _sample(total, policy.holdout.max_rows, policy.seed)
    kept = table if picked is None else {name: values[picked] for name, values in table.items()}
    found = Holdout(kept, total if picked is None else len(picked), total, sha256)
    return replace(found, groups=_group_texts(found, policy))


def _group_texts(holdout: Holdout, policy: GatePolicy) -> dict[str, Array]:
    """The values of groups in text files, where ``007`` was taken for a number: it is a code, and not ``7``."""
    names = {part.column for part in policy.slices if not part.bins}
    names |= {part.column for part in policy.fairness if not part.bins}
    found = {}
    for name, values in _as_written(sorted(names & holdout.table.keys()), holdout, policy).items():
        plain, written = as_text(holdout.table[name]), np.char.strip(as_text(values))
        found[name] = np.where(np.char.isdigit(written), written, plain)
    return found


def _sample(total: int, most: int, seed: int) -> Array | None:
    """Places of a sample in their order; None for all."""
    if total <= most:
        return None
    return np.sort(np.random.default_rng(seed).choice(total, most, replace=False))


def arranged(holdout: Holdout, policy: GatePolicy, spec: ModelSpec) -> Tabular:
    """The columns that are inputs of a model; strings as the files have them. Raises InvalidArgument."""
    return _with_texts(_inputs(holdout, policy, spec), holdout, policy)


def _inputs(holdout: Holdout, policy: GatePolicy, spec: ModelSpec) -> Tabular:
    about = policy.holdout
    if about.columns:
        absent = [name for name in about.columns if name not in holdout.table]
        if absent:
            raise InvalidArgument(f"the holdout has no column '{absent[0]}'; it has {_some(holdout.table)}")
        return arrange({name: holdout.table[name] for name in about.columns}, spec, about.map)
    if about.map:
        return arrange(holdout.table, spec, about.map)
    aside = _only_named(policy, holdout.table, spec)
    return arrange({name: values for name, values in holdout.table.items() if name not in aside}, spec)


def _with_texts(found: Tabular, holdout: Holdout, policy: GatePolicy) -> Tabular:
    """``007`` in a text file was taken for a number, as long as nobody knew that the model takes a string there."""
    names = [column.name for column in found.columns if column.datatype == BYTES]
    return Tabular(found.columns, {**found.table, **_as_written(names, holdout, policy)})


def _as_written(names: Sequence[str], holdout: Holdout, policy: GatePolicy) -> dict[str, Array]:
    """Columns of text files as the texts themselves, None for empty ones; nothing where there are no such files."""
    paths = policy.paths()
    if not names or not any(path.name.lower().endswith(TEXT_FILES) for path in paths):
        return {}
    table = read_tables(paths, names, texts=True)
    if any(len(values) != holdout.total for values in table.values()):
        raise InvalidArgument(f"the holdout's files have changed: they had {holdout.total} rows")
    picked = _sample(holdout.total, policy.holdout.max_rows, policy.seed)
    return table if picked is None else {name: values[picked] for name, values in table.items()}


def _only_named(policy: GatePolicy, table: dict[str, Array], spec: ModelSpec) -> set[str]:
    """Columns that are there for the gates: the label always, groups when the inputs are complete without them."""
    label = {policy.holdout.label} if policy.holdout.label is not None else set()
    groups = ({part.column for part in policy.slices} | {part.column for part in policy.fairness}) & table.keys()
    width = None
    if len(spec.inputs) == 1 and all(dim >= 0 for dim in spec.inputs[0].shape[1:]):
        width = int(np.prod(spec.inputs[0].shape[1:], dtype=int))
    # A group may be an input too: then the input would be too narrow without it.
    return label if width is not None and len(table.keys() - label) <= width else label | groups


def input_tensors(found: Tabular, spec: ModelSpec) -> list[Array]:
    """(rows, elements) per input, in the type that the model takes. Raises InvalidArgument."""
    return [input_rows(found, tensor) for tensor in spec.inputs]


def label_texts(holdout: Holdout, policy: GatePolicy, names: Collection[str] = ()) -> Array | None:
    """(rows,) labels as texts, "" for a row without; None when there is no label at all. Raises InvalidArgument.

    Numbers are written alike, but for those of text files that stand there as one of ``names``, those of the classes.
    """
    values = _label_column(holdout, policy)
    if values is None:
        return None
    texts = as_text(values)
    label = policy.holdout.label
    if names and label is not None:
        written = as_text(_as_written([label], holdout, policy).get(label, texts))
        texts = np.where((texts != "") & np.isin(written, list(names)), written, texts)
    return texts if (texts != "").any() else None


def label_numbers(holdout: Holdout, policy: GatePolicy) -> Array | None:
    """(rows,) labels as numbers, NaN for a row without; None when there is no label at all. Raises InvalidArgument."""
    values = _label_column(holdout, policy)
    if values is None:
        return None
    try:
        numbers = values.astype("f8")
    except (ValueError, TypeError):
        raise InvalidArgument(f"the label '{policy.holdout.label}' is not all numbers") from None
    return numbers if np.isfinite(numbers).any() else None


def _label_column(holdout: Holdout, policy: GatePolicy) -> Array | None:
    name = policy.holdout.label
    if name is None or name not in holdout.table:
        return None
    return one_column(holdout, name)


def one_column(holdout: Holdout, name: str) -> Array:
    """(rows,) of a column, also of one that is (rows, 1). Raises InvalidArgument."""
    if name not in holdout.table:
        raise InvalidArgument(f"the holdout has no column '{name}'; it has {_some(holdout.table)}")
    values = holdout.table[name]
    if values.size != holdout.rows:
        raise InvalidArgument(f"column '{name}' has {values.size} values in {holdout.rows} rows, wanted one a row")
    return values.reshape(holdout.rows)


def groups_of(holdout: Holdout, name: str, bins: Sequence[float]) -> Array:
    """(rows,) the name of each row's group: the column's value, or the bin that it lies in. Raises InvalidArgument.

    Numbers are written alike, but for whole numbers of text files, which stand as they do there.
    """
    values = one_column(holdout, name)
    if not bins:
        texts = holdout.groups.get(name)
        texts = as_text(values) if texts is None else texts
        found = np.unique(texts)
        if len(found) > MOST_GROUPS:
            raise InvalidArgument(
                f"column '{name}' has {len(found)} values; groups are at most {MOST_GROUPS}: use bins"
            )
        return np.where(texts == "", "missing", texts)
    try:
        numbers = values.astype("f8")
    except (ValueError, TypeError):
        raise InvalidArgument(f"column '{name}' is not all numbers, which bins are of") from None
    edges = [f"{edge:g}" for edge in bins]
    names = [f"under {edges[0]}", *[f"{a} to {b}" for a, b in pairwise(edges)], f"from {edges[-1]}"]
    placed = np.array(names, dtype=object)[np.searchsorted(np.asarray(bins), numbers, side="right")]
    placed[np.isnan(numbers)] = "missing"
    return placed.astype(str)


def _some(table: dict[str, Array]) -> str:
    more = f" and {len(table) - 10} more" if len(table) > 10 else ""
    return (", ".join(list(table)[:10]) or "none") + more
