"""Batch inference: the rows of a file through a model, by the same runtime and the same rules as the server's.

**Answers.** A run is what the server would run for one request of the same rows: the same checks, padding, session and
outputs, so its answers are bit for bit those of the server for that request. Which rows run together is fixed by their
place in the file and ``batch_rows``, never by timing: two jobs of the same settings give the same file.

**Going on.** ``OUT.parts/`` holds ``job.json`` (input, model, settings, by digest) and a part for each finished chunk,
each synced and renamed whole. A job that was killed goes on behind the last of them; with another input, model or
setting it is refused. At the end the parts are joined, ``OUT`` gets its name, ``OUT.json`` says what it was made of,
and the parts are removed. At most one chunk is in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.batching.assemble import Layout
from server.capture.columns import column_names, text
from server.capture.columns import rows_of as output_rows
from server.capture.formats import Array, Table, has_duckdb
from server.checks import fit_inputs
from server.errors import ConfigError, FailedPrecondition, InvalidArgument, TidegateError
from server.offline.chunks import CSV, JSONL, PARQUET, count_rows, format_of, read_chunks
from server.offline.mapping import Source, resolve, rows_of, tensor_of
from server.offline.models import Found
from server.offline.tables import join_parts, publish, write_part
from server.runtime.base import Engine
from server.types import BYTES, Tensor

FORMAT: Final = "tidegate.batch/1"
#: Rows of a chunk, about; made a whole number of runs.
CHUNK_ROWS: Final = 32_768
#: Elements of an output's row that get a column each; a wider one is a column of lists.
MAX_COLUMNS: Final = 256
MODEL_COLUMNS: Final = ("__model", "__version", "__digest")

#: ``progress(done, total)``: rows; total None where nobody knows.
Progress = Callable[[int, int | None], None]


@dataclass(slots=True, frozen=True)
class BatchSettings:
    """``batch_rows`` 0: what the server would gather at most. ``keep``: columns of the input that are copied."""

    places: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    batch_rows: int = 0
    chunk_rows: int = 0


@dataclass(slots=True, frozen=True)
class Job:
    """What makes a job the same job. It is written down when it begins."""

    input: str
    input_sha256: str
    output: str
    model: str
    version: str
    digest: str
    registry_digest: str
    batch_rows: int
    chunk_rows: int
    map: tuple[str, ...]
    keep: tuple[str, ...]

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1).encode()


@dataclass(slots=True, frozen=True)
class BatchReport:
    """``resumed_rows``: answered by an earlier run of the job; all of them when there was nothing left to do."""

    rows: int
    resumed_rows: int
    output: str
    sha256: str
    model: str
    version: str
    digest: str


def run_batch(
    source: Path, target: Path, found: Found, engine: Engine, settings: BatchSettings, progress: Progress
) -> BatchReport:
    """Answer every row of ``source`` into ``target``. Raises InvalidArgument, FailedPrecondition or TidegateError."""
    _check(source, target)
    try:
        with _working_folder(target) as folder:
            job = _job(source, target, found, engine, settings, folder)
            return _Run(job, source, target, folder, found, engine, progress).run()
    except OSError as error:
        raise TidegateError(f"{error.filename or target}: {error.strerror or error}") from error


def _check(source: Path, target: Path) -> None:
    forms = {format_of(source), format_of(target)}
    if PARQUET in forms and not has_duckdb():
        raise ConfigError("Parquet needs duckdb: install tidegate[capture], or use csv, jsonl or npz")
    if target.name.lower().endswith(".gz"):
        raise InvalidArgument(f"{target.name}: compressed CSV is read, not written")
    if not source.is_file():
        raise InvalidArgument(f"there is no input file {source}")
    if source.resolve() == target.resolve():
        raise InvalidArgument("the input and the output are the same file")


@contextmanager
def _working_folder(target: Path) -> Iterator[Path]:
    """The folder of parts, ours alone. One that holds nothing yet does not stay."""
    folder = target.with_name(f"{target.name}.parts")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise FailedPrecondition(f"another process is at work on {target}") from None
    finally:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        os.close(lock)


def _job(source: Path, target: Path, found: Found, engine: Engine, settings: BatchSettings, folder: Path) -> Job:
    """The job that is asked for, agreed with what is written of one that has begun."""
    begun = _begun(folder)
    rows = settings.batch_rows or (begun["batch_rows"] if begun else _learned(engine))
    _check_rows(engine, rows)
    chunk = settings.chunk_rows or (begun["chunk_rows"] if begun else CHUNK_ROWS)
    chunk = max(rows, chunk - chunk % rows)
    job = Job(
        source.name,
        _sha256(source),
        target.name,
        found.name,
        found.version,
        engine.spec.digest,
        "" if found.entry is None else found.entry.digest,
        rows,
        chunk,
        settings.places,
        settings.keep,
    )
    if begun is not None:
        _require_same(job, begun, folder)
    elif (finished := _finished(target)) is not None:
        _require_same(job, finished, target)
    elif target.exists():
        raise FailedPrecondition(f"{target} exists already and is not this job's: it is never overwritten")
    return job


def _begun(folder: Path) -> dict[str, Any] | None:
    return _read_json(folder / "job.json")


def _finished(target: Path) -> dict[str, Any] | None:
    """What a finished job says of its output, if the output is still what it wrote."""
    found = _read_json(_about(target))
    return found if found is not None and target.exists() and found.get("output_sha256") == _sha256(target) else None


def _about(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == FORMAT else None


def _require_same(job: Job, begun: Mapping[str, Any], where: Path) -> None:
    now = json.loads(job.to_json())
    for key, words in (
        ("input_sha256", "the input has changed"),
        ("digest", "the model has changed"),
        ("version", "the model's version is another one"),
    ):
        if now[key] != begun.get(key):
            raise FailedPrecondition(
                f"{where} was begun with another job: {words} ({str(begun.get(key))[:16]} then, {now[key][:16]} now); "
                "remove it, or name another output"
            )
    for key, value in now.items():
        if value != begun.get(key):
            raise FailedPrecondition(
                f"{where} was begun with another job: {key} was {begun.get(key)!r} and is {value!r}; remove it, or "
                "name another output"
            )


def _learned(engine: Engine) -> int:
    return max(1, engine.spec.learned_batch_size)


def _check_rows(engine: Engine, rows: int) -> None:
    most = max(1, engine.spec.max_batch_size)
    if not 1 <= rows <= most:
        raise InvalidArgument(f"batch rows must be 1 to {most} for model '{engine.spec.name}', got {rows}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Run:
    """One start of a job, from its first part that is missing to its end."""

    def __init__(
        self, job: Job, source: Path, target: Path, folder: Path, found: Found, engine: Engine, progress: Progress
    ) -> None:
        self._job = job
        self._source = source
        self._target = target
        self._folder = folder
        self._form = format_of(target)
        self._engine = engine
        self._batched = engine.spec.max_batch_size > 0
        self._layout = Layout(engine.spec, found.request.options.batching)
        self._progress = progress

    def run(self) -> BatchReport:
        finished = self._end_of_earlier()
        if finished is not None:
            return finished
        self._begin()
        done = len(self._parts())
        rows = resumed = done * self._job.chunk_rows
        total = count_rows(self._source)
        self._progress(rows, total)
        sources: list[Source | None] | None = None
        for chunk in read_chunks(self._source, self._job.chunk_rows, resumed):
            sources = sources or resolve(self._engine.spec, list(chunk), self._job.map)
            table = self._answered(chunk, sources)
            write_part(self._folder / f"part-{done:08}.{self._form}", table, self._form)
            done += 1
            rows += _length(chunk)
            self._progress(rows, total)
        if not done:
            raise InvalidArgument(f"{self._source.name} has no rows")
        return self._finish(resumed)

    def _begin(self) -> None:
        path = self._folder / "job.json"
        if not path.exists():
            temp = self._folder / ".job.json.tmp"
            temp.write_bytes(self._job.to_json())
            publish(temp, path)

    def _parts(self) -> list[Path]:
        """The parts that are done, in order, up to the first that is not."""
        found: list[Path] = []
        while (path := self._folder / f"part-{len(found):08}.{self._form}").exists():
            found.append(path)
        return found

    # --- answers -------------------------------------------------------------------------------------------------

    def _answered(self, chunk: Table, sources: Sequence[Source | None]) -> Table:
        """The part of one chunk: what is kept of it, what the model answers, and whose answers they are."""
        unknown = [name for name in self._job.keep if name not in chunk]
        if unknown:
            raise InvalidArgument(f"--keep: the data have no column '{unknown[0]}'")
        table = {name: chunk[name] for name in self._job.keep}
        for name, values in self._outputs(chunk, sources).items():
            if name in table:
                raise InvalidArgument(f"--keep: '{name}' is also a column of the answers")
            table[name] = values
        if self._form in (PARQUET, CSV, JSONL):
            stamp = (self._job.model, self._job.version, self._job.digest)
            table |= {name: _constant(value, _length(chunk)) for name, value in zip(MODEL_COLUMNS, stamp, strict=True)}
        return table

    def _outputs(self, chunk: Table, sources: Sequence[Source | None]) -> Table:
        inputs = [None if source is None else rows_of(source, chunk, self._batched) for source in sources]
        answers = [self._answer(sources, inputs, *span) for span in self._spans(inputs, _length(chunk))]
        columns: Table = {}
        for place, output in enumerate(self._engine.spec.outputs):
            columns |= _columns(output.name, [answer[place] for answer in answers], self._batched)
        return columns

    def _spans(self, inputs: Sequence[Any], rows: int) -> Iterator[tuple[int, int]]:
        """The rows of each run: as many as may be, of one shape."""
        start = 0
        while start < rows:
            stop = start + 1
            most = min(rows, start + self._job.batch_rows)
            ragged = [values for values in inputs if isinstance(values, list)]
            if not ragged:
                stop = most
            while stop < most and all(values[stop].shape == values[start].shape for values in ragged):
                stop += 1
            yield start, stop
            start = stop

    def _answer(self, sources: Sequence[Source | None], inputs: Sequence[Any], start: int, stop: int) -> list[Tensor]:
        tensors = [
            tensor_of(source, values[start:stop], self._batched)
            for source, values in zip(sources, inputs, strict=True)
            if source is not None
        ]
        member, rows = fit_inputs(self._engine.spec, tensors)
        (answer,) = self._layout.split([member], [rows], self._engine.run(0, self._layout.join([member], rows)))
        return answer

    # --- the end -------------------------------------------------------------------------------------------------

    def _end_of_earlier(self) -> BatchReport | None:
        """The report of a job that is finished, or needs only to be tidied up after."""
        if not self._target.exists():
            return None
        sealed = _read_json(self._folder / "done.json")
        if sealed is None or _sha256(self._target) != sealed["output_sha256"]:
            sealed = _finished(self._target)
        if sealed is None:
            raise FailedPrecondition(f"{self._target} exists already and is not this job's: it is never overwritten")
        return self._tidy(sealed, sealed["rows"])

    def _finish(self, resumed: int) -> BatchReport:
        """Join the parts, write down what came of it, and only then give the output its name."""
        temp = self._folder / f".output.{self._form}"
        temp.unlink(missing_ok=True)
        parts = self._parts()
        join_parts(parts, temp, self._form, {"tidegate": self._job.to_json().decode()})
        sealed = {**json.loads(self._job.to_json()), "rows": self._rows(parts), "output_sha256": _sha256(temp)}
        note = self._folder / ".done.json.tmp"
        note.write_bytes(json.dumps(sealed, indent=1).encode())
        publish(note, self._folder / "done.json")
        publish(temp, self._target)
        return self._tidy(sealed, min(resumed, sealed["rows"]))

    def _rows(self, parts: Sequence[Path]) -> int:
        """All parts but the last are full."""
        last = sum(_length(chunk) for chunk in read_chunks(parts[-1], self._job.chunk_rows))
        return (len(parts) - 1) * self._job.chunk_rows + last

    def _tidy(self, sealed: Mapping[str, Any], resumed: int) -> BatchReport:
        about = _about(self._target)
        temp = about.with_name(f".{about.name}.tmp")
        temp.write_bytes(json.dumps(sealed, indent=1).encode())
        publish(temp, about)
        shutil.rmtree(self._folder)
        return self._report(sealed, resumed)

    def _report(self, sealed: Mapping[str, Any], resumed: int) -> BatchReport:
        job = self._job
        return BatchReport(
            sealed["rows"], resumed, str(self._target), sealed["output_sha256"], job.model, job.version, job.digest
        )


def _length(table: Table) -> int:
    return len(next(iter(table.values()), ()))


def _constant(value: str, rows: int) -> Array:
    out = np.empty(rows, object)
    out[:] = value
    return out


def _columns(name: str, answers: Sequence[Tensor], batched: bool) -> Table:
    """An output's rows over all runs as columns: one for each element, or one of lists."""
    parts = [output_rows(tensor, batched) for tensor in answers]
    widths = {part.shape[1] for part in parts}
    if len(widths) == 1 and (width := widths.pop()) <= MAX_COLUMNS:
        joined = np.concatenate(parts)
        return {
            label: _text(joined[:, index]) if answers[0].datatype == BYTES else np.ascontiguousarray(joined[:, index])
            for index, label in enumerate(column_names(name, width))
        }
    rows = [row for part in parts for row in part]
    out = np.empty(len(rows), object)
    for place, row in enumerate(rows):
        out[place] = _text(row).tolist() if answers[0].datatype == BYTES else row
    return {name: out}


def _text(values: Array) -> Array:
    out = np.empty(len(values), object)
    out[:] = [text(value) for value in values]
    return out
