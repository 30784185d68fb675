"""One contender of ``loadtests.drift_figures``, in a process and an environment of its own.

    python loadtests/drift_contenders.py NAME COLUMNS REFERENCE_ROWS

Needs numpy and what NAME needs, and nothing else of this project but for ``tidegate``. Says ``ready`` or ``absent:
why``, then for each line with a number of rows the CPU seconds of one run over a window of so many rows, all threads
together. What can be prepared without the window, and the form in which a contender likes its rows, is not timed.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
#: (rows into the form that is liked best, the run that is timed).
Contender: TypeAlias = tuple[Callable[[Array], Any], Callable[[Any], object]]


def table(rows: int, columns: int, seed: int) -> Array:
    """float32: normal, log-normal, rounded and few-valued columns, as a table of features has."""
    rng = np.random.default_rng(seed)
    out = rng.standard_normal((rows, columns)).astype("f4")
    third = columns // 3
    out[:, third : 2 * third] = np.exp(out[:, third : 2 * third])
    out[:, -5:-2] = np.round(out[:, -5:-2] * 3)
    out[:, -2:] = rng.integers(0, 5, (rows, 2))
    return out


def in_columns(rows: Array) -> list[Array]:
    return [np.ascontiguousarray(column) for column in rows.T]


def in_frame(rows: Array) -> Any:
    names = [f"f{i}" for i in range(rows.shape[1])]
    return import_module("pandas").DataFrame(rows.astype("f8"), columns=names)


def tidegate(reference: Array) -> Contender:
    """PSI and KS with their p-values, from raw rows."""
    sys.path.insert(0, ".")
    calibration, base = import_module("monitor.calibration"), import_module("monitor.drift.base")
    judge, profile = import_module("monitor.drift.judge"), import_module("monitor.profile")
    layout = import_module("monitor.layout").Layout(profile.ReferenceProfile.from_arrays({"x": reference}))
    rules, none = import_module("monitor.types").AlarmRules(), calibration.Calibration.none(layout)

    def run(rows: Array) -> object:
        counts = np.zeros(layout.cells, "i4")
        layout.count([rows], counts)
        return judge.judge(base.Pair(layout, layout.reference, counts), rules, -15.0, none)

    return (lambda rows: rows), run


def scipy_ks(reference: Array) -> Contender:
    """KS alone."""
    ks, own = import_module("scipy.stats").ks_2samp, in_columns(reference)
    return in_columns, lambda window: [ks(a, b, method="asymp") for a, b in zip(own, window, strict=True)]


def numpy_psi(reference: Array) -> Contender:
    """PSI over deciles alone, by searchsorted."""
    edges = [np.unique(np.quantile(column, np.arange(1, 10) / 10)) for column in in_columns(reference)]

    def shares(column: Array, own: Array) -> Array:
        counts = np.bincount(np.searchsorted(own, column), minlength=len(own) + 1) + 0.5
        return np.asarray(counts / counts.sum())

    expected = [shares(column, own) for column, own in zip(in_columns(reference), edges, strict=True)]

    def psi(column: Array, own: Array, p: Array) -> float:
        q = shares(column, own)
        return float(((q - p) * np.log(q / p)).sum())

    return in_columns, lambda window: [psi(*each) for each in zip(window, edges, expected, strict=True)]


def alibi_detect(reference: Array) -> Contender:
    """KSDrift."""
    return (lambda rows: rows), import_module("alibi_detect.cd").KSDrift(reference, p_val=0.05).predict


def nannyml(reference: Array) -> Contender:
    """KS (binned for a reference of this size) and Jensen-Shannon."""
    frame = in_frame(reference)
    calculator = import_module("nannyml").UnivariateDriftCalculator(
        column_names=list(frame.columns), continuous_methods=["kolmogorov_smirnov", "jensen_shannon"], chunk_number=1
    )
    return in_frame, calculator.fit(frame).calculate


def datasketches(reference: Array) -> Contender:
    """A KLL sketch per column, k = 200, and its KS test (yes or no)."""
    library = import_module("datasketches")

    def sketch(column: Array) -> Any:
        made = library.kll_floats_sketch(200)
        made.update(column)
        return made

    own = [sketch(column) for column in in_columns(reference)]
    return in_columns, lambda window: [library.ks_test(a, sketch(b), 0.05) for a, b in zip(own, window, strict=True)]


def evidently(reference: Array) -> Contender:
    """The drift preset with KS."""
    library, presets = import_module("evidently"), import_module("evidently.presets")
    schema = library.DataDefinition(numerical_columns=list(in_frame(reference).columns))

    def prepare(rows: Array) -> Any:
        return library.Dataset.from_pandas(in_frame(rows), data_definition=schema)

    own = prepare(reference)
    return prepare, lambda window: library.Report([presets.DataDriftPreset(num_method="ks")]).run(window, own).dict()


CONTENDERS: dict[str, Callable[[Array], Contender]] = {
    "tidegate": tidegate,
    "scipy": scipy_ks,
    "numpy": numpy_psi,
    "alibi-detect": alibi_detect,
    "nannyml": nannyml,
    "datasketches": datasketches,
    "evidently": evidently,
}


def main(name: str, columns: int, reference_rows: int) -> None:
    warnings.simplefilter("ignore")
    try:
        prepare, run = CONTENDERS[name](table(reference_rows, columns, 1))
        run(prepare(table(1000, columns, 2)))  # what is loaded or compiled at the first call is not timed
    except ImportError as error:
        print(f"absent: {error}", flush=True)
        return
    print("ready", flush=True)
    windows: dict[int, Any] = {}
    for line in sys.stdin:
        rows = int(line)
        if rows not in windows:
            windows[rows] = prepare(table(rows, columns, rows))
        began = time.process_time_ns()
        run(windows[rows])
        print((time.process_time_ns() - began) / 1e9, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
