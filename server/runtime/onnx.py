"""ONNX Runtime: sessions, and engines over them. The only module that imports onnxruntime.

A model is loaded from its path, never from bytes: ONNX Runtime then refuses external data outside the model's folder.
On the CPU all instances share one session, as runs of a session may overlap and weights are then held once; on a
device each instance has a session, and with it a stream, of its own, so that one copies while another computes.

Known limit: some graphs end the whole process on some input, which no ``except`` can hold. INT32_MIN divided by -1
in an integer ``Div`` raises SIGFPE in the CPU provider. Only a process boundary isolates such a model.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
import structlog

from server.errors import ModelLoadError, RuntimeFailure, TidegateError
from server.runtime import inspection, providers, signature
from server.runtime.arena import ALIGNMENT, Allocator, Bytes, allocate_aligned
from server.runtime.base import Batch, LoadRequest, ModelOptions
from server.runtime.inspection import KNOWN_DOMAINS, Inspection, Supported
from server.runtime.lane import Lane
from server.runtime.messages import clean
from server.runtime.signature import GraphTensor, Signature
from server.runtime.warmup import (
    decide_gathering,
    run_generated_samples,
    run_operator_samples,
    with_gathering,
)
from server.types import ModelSpec, Tensor

_log = structlog.get_logger("tidegate.runtime")

_OPTIMIZATION: Final = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
#: ONNX Runtime's severity "fatal": what it says of errors comes back as exceptions, and is ours to log.
_LOG_FATAL: Final = 4
#: Taken for a model that no made-up input could be timed with: long enough to keep it off an event loop.
_UNKNOWN_RUN_NS: Final = 10_000_000
_MAX_LABEL_FILE_BYTES: Final = 16 * 1024 * 1024

#: ``y = Identity(x)`` over one float, as a serialized ModelProto (IR version 8, opset 13): tries a provider out.
_TINY_MODEL: Final = bytes.fromhex(
    "08083a3a0a100a017812017922084964656e74697479120474696e795a0f0a0178120a0a08"
    "080112040a020801620f0a0179120a0a08080112040a02080142040a00100d"
)

#: Fields of a ModelProto put behind the tiny model, to be told what is too new: the version they end with is 2**31 - 1.
_IR_VERSION_FIELD: Final = b"\x08"
_HUGE: Final = b"\xff\xff\xff\xff\x07"
_NEWEST_IR: Final = re.compile(r"max supported IR version: (\d+)")
_NEWEST_OPSET: Final = re.compile(r"Current official support for domain \S+ is till opset (\d+)")


class OnnxEngine:
    """A loaded and warm version. ``run`` may be called from any thread, one call at a time per instance."""

    def __init__(self, spec: ModelSpec, lanes: list[Lane], inspected: Inspection) -> None:
        self.spec = spec
        #: The files it was loaded from, as they were.
        self.inspection = inspected
        self.instances = len(lanes)
        self.run_ns = _UNKNOWN_RUN_NS
        self.memory_bytes = 0
        self._lanes = lanes

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        if not self._lanes:
            raise RuntimeFailure("The model has been unloaded.")
        outputs = self._lanes[instance].run(batch)
        if self.spec.learned_batch_size > 1:
            _require_rows(outputs, batch.rows)
        return outputs

    def close(self) -> None:
        for lane in self._lanes:
            lane.release()
        self._lanes = []

    def release(self) -> None:
        """Let go of memory that larger runs than are now to come have left behind."""
        for lane in self._lanes:
            lane.release()


class OnnxRuntime:
    """Loads ONNX files.

    ``measure_budget_s`` bounds the measurement of batch sizes at load (0: none, the maximum is taken as declared).
    ``auto_batch`` is the maximum batch of a model that declares none but whose graph batches.
    """

    def __init__(self, *, measure_budget_s: float = 1.5, auto_batch: int = 64) -> None:
        self._measure_budget_s = measure_budget_s
        self._auto_batch = auto_batch
        self._broken: dict[str, str | None] = {}
        self._limits: Supported | None = None
        self._probing = threading.Lock()
        ort.set_default_logger_severity(_LOG_FATAL)

    def load(self, request: LoadRequest) -> OnnxEngine:
        """A warm engine, or ModelLoadError with one sentence."""
        try:
            return self._load(request)
        except TidegateError as error:
            if isinstance(error, ModelLoadError):
                raise
            raise ModelLoadError(error.message) from error
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it holds text that is not UTF-8"
            raise ModelLoadError(f"{request.path.name} cannot be read: {reason}.") from error

    def describe(self) -> Mapping[str, object]:
        """Version, providers compiled in, those that work here, and for the others the reason why not."""
        compiled = [providers.short_name(name) for name in ort.get_available_providers()]
        problems = {name: self._problem(name) for name in compiled if name in providers.ORT_NAMES}
        return {
            "library": "onnxruntime",
            "version": ort.__version__,
            "providers_compiled": compiled,
            "providers_working": [name for name, problem in problems.items() if problem is None],
            "providers_failing": {name: problem for name, problem in problems.items() if problem is not None},
        }

    def _load(self, request: LoadRequest) -> OnnxEngine:
        inspected = inspection.inspect_files(
            request.path,
            request.folder,
            limits=request.limits,
            listed=request.listed,
            supported=self._supported(),
        )
        _check_digest(request, inspected)
        libraries = _libraries(request)
        resident = _resident_bytes()
        plans = self._plans(request, inspected.digest)
        sessions = [_open_session(request, plan, libraries) for plan in plans]
        # From here on nothing reads the files again, but for external data that the CPU provider has mapped.
        inspection.recheck(inspected)
        engine = self._prepare(request, inspected, sessions, plans)
        engine.memory_bytes = max(0, _resident_bytes() - resident)
        return engine

    def _supported(self) -> Supported:
        """What this ONNX Runtime takes, found out by asking it for too much; once."""
        with self._probing:
            if self._limits is None:
                self._limits = Supported(f"onnxruntime {ort.__version__}", _newest_ir_version(), _newest_opsets())
            return self._limits

    def _plans(self, request: LoadRequest, digest: str) -> list[providers.ProviderPlan]:
        """One plan per session: a single one on the CPU, one per instance on a device."""
        options = request.options
        broken = {name: problem for name in providers.ORT_NAMES if (problem := self._wanted_problem(name, options))}
        cache = None if request.state_dir is None else request.state_dir / "tensorrt" / digest
        plan = partial(providers.plan, options.providers, broken, options.allow_provider_fallback)
        first = plan(options.device_ids[0] if options.device_ids else None, cache)
        for note in first.notes:
            _log.warning("provider_fallback", model=request.name, version=request.version, note=note)
        if not first.on_device:
            return [first]
        if cache is not None and any(name == providers.ORT_NAMES["tensorrt"] for name, _ in first.entries):
            cache.mkdir(parents=True, exist_ok=True)
        devices = options.device_ids or (None,)
        return [plan(devices[index % len(devices)], cache) for index in range(max(1, options.instances))]

    def _prepare(
        self, request: LoadRequest, inspected: Inspection, sessions: list[Any], plans: list[providers.ProviderPlan]
    ) -> OnnxEngine:
        """Recognise how the model batches, warm it, and give the engine its final spec."""
        options = request.options
        labels = _labels(request)
        inputs, outputs = _graph(sessions[0], inspected.facts.unranked)
        found = signature.match(inputs, outputs, options, labels, self._auto_batch)
        notes = [*plans[0].notes, *found.notes]
        if options.max_batch_size is None and not found.max_batch_size and found.batch_blocker:
            notes.append(f"the model does not batch: {found.batch_blocker}")
        engine = _engine(request, inspected, found, sessions, plans)
        gathering = decide_gathering(
            partial(engine.run, 0), engine.spec, request, _setting(options, sessions[0]), self._measure_budget_s
        )
        if gathering.refusal and options.max_batch_size is None:
            notes.append(f"the model does not batch: {gathering.refusal}")
            unbatched = signature.match(inputs, outputs, replace(options, max_batch_size=0), labels, 0)
            engine = _engine(request, inspected, unbatched, sessions, plans)
            gathering = replace(gathering, rows=0, refusal="")
        engine.release()
        engine.spec = with_gathering(engine.spec, gathering, tuple(notes))
        self._warm(request, engine)
        _log_batching(request, engine.spec)
        return engine

    def _warm(self, request: LoadRequest, engine: OnnxEngine) -> None:
        for instance in range(engine.instances):
            run = partial(engine.run, instance)
            run_operator_samples(run, engine.spec, request)
            measured = run_generated_samples(run, engine.spec, request)
            engine.run_ns = measured or engine.run_ns

    def _wanted_problem(self, name: str, options: ModelOptions) -> str | None:
        """Providers are tried out only when a model wants them: trying a device takes its memory."""
        wanted = {providers.short_name(provider.name) for provider in options.providers}
        needed = name in wanted or (name == "cuda" and "tensorrt" in wanted)
        return self._problem(name) if needed else None

    def _problem(self, name: str) -> str | None:
        """Why a provider does not work on this machine, or None; tried out once."""
        with self._probing:
            if name not in self._broken:
                self._broken[name] = _probe(name)
            return self._broken[name]


def _engine(
    request: LoadRequest,
    inspected: Inspection,
    found: Signature,
    sessions: list[Any],
    plans: list[providers.ProviderPlan],
) -> OnnxEngine:
    spec = ModelSpec(
        name=request.name,
        version=request.version,
        inputs=tuple(port.spec for port in found.inputs),
        outputs=tuple(port.spec for port in found.outputs),
        max_batch_size=found.max_batch_size,
        digest=inspected.digest,
    )
    on_device = plans[0].on_device
    count = max(1, request.options.instances)
    allocate = _staging_allocator() if on_device else allocate_aligned
    lanes = [
        Lane(sessions[index % len(sessions)], found, rebind=on_device, allocate=allocate) for index in range(count)
    ]
    return OnnxEngine(spec, lanes, inspected)


def _log_batching(request: LoadRequest, spec: ModelSpec) -> None:
    """What an operator may not expect of how rows are gathered."""
    about = {"model": request.name, "version": request.version}
    if spec.batching_note:
        _log.info("model_note", **about, note=spec.batching_note)
    wanted, used = request.options.batching.max_rows, spec.learned_batch_size
    if request.options.batching.enabled and 0 < spec.max_batch_size == used < wanted:
        _log.warning("max_rows_lowered", **about, wanted=wanted, used=used, remedy="give batching.max_batch_size")


def _require_rows(outputs: list[Tensor], rows: int) -> None:
    for output in outputs:
        if output.shape[:1] != (rows,):
            raise RuntimeFailure(f"Output '{output.name}' has shape {list(output.shape)} for a batch of {rows} rows.")


def _check_digest(request: LoadRequest, inspected: Inspection) -> None:
    if request.expected_digest not in {"", inspected.digest}:
        raise ModelLoadError(
            f"{request.path.name}: bytes changed after admission, the digest was {request.expected_digest[:12]} "
            f"and is {inspected.digest[:12]}."
        )


def _libraries(request: LoadRequest) -> dict[Path, str]:
    """The custom-operator libraries to load, with their SHA-256. Raises ModelLoadError for one that is not allowed."""
    libraries = {path: inspection.sha256_of_library(path) for path in request.custom_ops}
    for path, digest in libraries.items():
        if digest not in request.limits.allowed_custom_ops:
            raise ModelLoadError(
                f"Custom-operator library {path.name} has SHA-256 {digest[:12]}, which is not allowed."
            )
    return libraries


def _register(libraries: Mapping[Path, str], options: ort.SessionOptions) -> None:
    """Load libraries into this process. They are the operator's own: only what is written to one meanwhile is seen."""
    for path, digest in libraries.items():
        try:
            options.register_custom_ops_library(str(path.resolve()))
        except Exception as error:
            raise ModelLoadError(
                f"Custom-operator library {path.name} cannot be loaded: {clean(str(error))}"
            ) from error
        if inspection.sha256_of_library(path) != digest:
            raise ModelLoadError(f"Custom-operator library {path.name} was changed while it was loaded.")


def _open_session(request: LoadRequest, plan: providers.ProviderPlan, libraries: Mapping[Path, str]) -> Any:
    path = request.path
    options = _session_options(request.options)
    _register(libraries, options)
    try:
        session = ort.InferenceSession(str(path), options, providers=list(plan.entries), enable_fallback=0)
    except Exception as error:
        raise ModelLoadError(f"{path.name} cannot be loaded: {clean(str(error))}") from error
    session.disable_fallback()
    got = [providers.short_name(name) for name in session.get_providers()]
    if missing := [name for name in plan.required if name not in got]:
        wanted = ", ".join(plan.required)
        raise ModelLoadError(
            f"Execution providers {wanted} are wanted, the session got {', '.join(got)}: no {missing[0]}."
        )
    return session


def _session_options(options: ModelOptions) -> ort.SessionOptions:
    level = _OPTIMIZATION.get(options.graph_optimization)
    if level is None:
        raise ModelLoadError(
            f"Unknown graph optimization '{options.graph_optimization}': known are {', '.join(_OPTIMIZATION)}."
        )
    chosen = ort.SessionOptions()
    chosen.graph_optimization_level = level
    chosen.intra_op_num_threads = options.intra_op_threads
    chosen.inter_op_num_threads = options.inter_op_threads
    if options.parallel_execution:
        chosen.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    chosen.log_severity_level = _LOG_FATAL
    spinning = "1" if options.allow_spinning else "0"
    chosen.add_session_config_entry("session.intra_op.allow_spinning", spinning)
    chosen.add_session_config_entry("session.inter_op.allow_spinning", spinning)
    for key, value in options.session_config:
        chosen.add_session_config_entry(key, value)
    return chosen


def _graph(session: Any, unranked: frozenset[str]) -> tuple[list[GraphTensor], list[GraphTensor]]:
    """The session's inputs (overridable initializers last) and outputs. ``unranked``: those that declare no shape."""

    def tensor(argument: Any, overridable: bool = False) -> GraphTensor:
        dims = None if not argument.shape and argument.name in unranked else tuple(argument.shape)
        return GraphTensor(argument.name, argument.type, dims, overridable)

    inputs = [tensor(argument) for argument in session.get_inputs()]
    inputs += [tensor(argument, True) for argument in session.get_overridable_initializers()]
    return inputs, [tensor(argument) for argument in session.get_outputs()]


def _setting(options: ModelOptions, session: Any) -> dict[str, object]:
    """Everything but the file that what is learned of a model depends on."""
    return {
        "onnxruntime": ort.__version__,
        "machine": f"{platform.machine()} x{os.cpu_count()}",
        "providers": [[name, session.get_provider_options().get(name, {})] for name in session.get_providers()],
        "threads": [options.intra_op_threads, options.inter_op_threads, options.parallel_execution],
        "optimization": options.graph_optimization,
        "session_config": [list(entry) for entry in options.session_config],
        "warmup": [{name: list(entry.dims) for name, entry in sample.inputs.items()} for sample in options.warmup],
    }


def _labels(request: LoadRequest) -> dict[str, tuple[str, ...]]:
    """Class labels of the outputs that name a file in the model's folder, one label a line."""
    return {
        tensor.name: _label_lines(tensor.label_filename, request.folder)
        for tensor in request.options.outputs
        if tensor.label_filename
    }


def _label_lines(name: str, folder: Path | None) -> tuple[str, ...]:
    if folder is None:
        raise ModelLoadError(f"Label file '{name}': there is no model folder to read it from.")
    home = folder.resolve()
    path = (home / name).resolve()
    if not path.is_relative_to(home) or not path.is_file():
        raise ModelLoadError(f"There is no label file '{name}' in the model's folder.")
    if path.stat().st_size > _MAX_LABEL_FILE_BYTES:
        raise ModelLoadError(f"Label file '{name}' is larger than {_MAX_LABEL_FILE_BYTES} bytes.")
    return tuple(path.read_text(encoding="utf-8").splitlines())


def _newest_ir_version() -> int | None:
    """From the refusal of a model with the last IR version there can be; None when it does not say."""
    return _number_in_refusal(_IR_VERSION_FIELD + _HUGE, _NEWEST_IR)


def _newest_opsets() -> dict[str, int]:
    """Domain -> newest operator set, for every built-in domain that has a newest one."""
    found = {domain: _number_in_refusal(_opset_import(domain) + _HUGE, _NEWEST_OPSET) for domain in KNOWN_DOMAINS}
    return {domain: newest for domain, newest in found.items() if newest is not None}


def _opset_import(domain: str) -> bytes:
    """An OperatorSetIdProto field of a ModelProto, without the bytes of its version."""
    name = domain.encode()
    body = (b"\x0a" + bytes([len(name)]) + name if name else b"") + b"\x10"
    return b"\x42" + bytes([len(body) + len(_HUGE)]) + body


def _number_in_refusal(fields: bytes, number: re.Pattern[str]) -> int | None:
    """The number in what is said of the tiny model with ``fields`` on top; None when it is taken or nothing is said."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    try:
        ort.InferenceSession(_TINY_MODEL + fields, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - whatever is raised, only its text is of use
        match = number.search(str(error))
        return None if match is None else int(match[1])
    return None


def _probe(name: str) -> str | None:
    """Open a one-node session on a provider; the reason when that does not work."""
    ort_name = providers.ORT_NAMES[name]
    if ort_name not in ort.get_available_providers():
        return f"this build of onnxruntime {ort.__version__} does not have it"
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    try:
        session = ort.InferenceSession(_TINY_MODEL, options, providers=[ort_name], enable_fallback=0)
        session.disable_fallback()
        if ort_name in session.get_providers():
            session.run(None, {"x": np.zeros(1, dtype=np.float32)})
            return None
    except Exception as error:  # noqa: BLE001 - any failure means that the provider does not work
        return _missing_library(name) or clean(str(error)).rstrip(".")
    return _missing_library(name) or "it finds no usable device or driver"


def _missing_library(name: str) -> str:
    """The shared library that a provider's own library lacks, which ONNX Runtime only writes to its log."""
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    if not library.exists():
        return ""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        text = str(error)
        return text if "cannot open shared object file" in text else ""
    return ""


def _staging_allocator() -> Allocator:
    """Page-locked host memory, which a device copies from and to without a detour; plain memory where there is none."""
    info = _host_accessible_memory()
    if info is None:
        return allocate_aligned
    try:
        allocate_from(info, 1)
    except RuntimeError as error:
        _log.info("no_pinned_memory", reason=clean(str(error)))
        return allocate_aligned
    return partial(allocate_from, info)


def allocate_from(info: Any, size: int) -> Bytes:
    """``size`` bytes from the allocator that an ``OrtMemoryInfo`` names, aligned to ALIGNMENT."""
    value = ort.OrtValue.ortvalue_from_shape_and_type([size + ALIGNMENT], np.uint8, memory_info=info)
    block = (ctypes.c_uint8 * (size + ALIGNMENT)).from_address(value.data_ptr())
    # The array refers to the block, and the block to the value that owns the memory.
    block.owner = value  # type: ignore[attr-defined]
    offset = -value.data_ptr() % ALIGNMENT
    return np.frombuffer(memoryview(block), dtype=np.uint8)[offset : offset + size]


def _host_accessible_memory() -> Any:
    list_devices: Callable[[], list[Any]] | None = getattr(ort, "get_ep_devices", None)
    if list_devices is None:
        return None
    kind = ort.OrtDeviceMemoryType.HOST_ACCESSIBLE
    found = (device.memory_info(kind) for device in list_devices() if device.ep_name == providers.ORT_NAMES["cuda"])
    return next((info for info in found if info is not None), None)


def _resident_bytes() -> int:
    """Resident set size of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
