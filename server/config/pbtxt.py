"""Triton's model configuration, config.pbtxt -> ``ModelOptions``. ``model_config`` has the way back.

What this server honours is read; what would change answers or scheduling and is not offered is refused by name; what
only tunes another server is passed over and listed. Reading a text never fails in any other way than ConfigError.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from google.protobuf import text_format

from server._pb import model_config_pb2 as pb
from server.config.problems import InvalidConfig, Problem
from server.config.units import show
from server.runtime.base import (
    BatchingOptions,
    DeclaredTensor,
    ModelOptions,
    Provider,
    QueuePolicy,
    WarmupInput,
    WarmupSample,
)

FILENAME: Final = "config.pbtxt"
PLATFORM: Final = "onnxruntime_onnx"
BACKEND: Final = "onnxruntime"
MAX_CHARACTERS: Final = 4 * 1024 * 1024

_MAX_INSTANCES: Final = 1024
_MAX_PRIORITY_LEVELS: Final = 1024
_MAX_WARMUP_COUNT: Final = 10_000
_MAX_MICROSECONDS: Final = 24 * 3600 * 1_000_000
GPU_PROVIDERS: Final = ("tensorrt", "cuda")

#: The format's data types -> V2 datatypes.
DATATYPES: Final = {
    pb.TYPE_BOOL: "BOOL",
    pb.TYPE_UINT8: "UINT8",
    pb.TYPE_UINT16: "UINT16",
    pb.TYPE_UINT32: "UINT32",
    pb.TYPE_UINT64: "UINT64",
    pb.TYPE_INT8: "INT8",
    pb.TYPE_INT16: "INT16",
    pb.TYPE_INT32: "INT32",
    pb.TYPE_INT64: "INT64",
    pb.TYPE_FP16: "FP16",
    pb.TYPE_FP32: "FP32",
    pb.TYPE_FP64: "FP64",
    pb.TYPE_STRING: "BYTES",
    pb.TYPE_BF16: "BF16",
}

#: optimization.graph.level -> our name. 0 is proto3's "not given".
GRAPH_LEVELS: Final = {0: "all", -1: "basic", 1: "extended", 2: "disable"}

#: Names of TensorRT options in the model configuration -> in ONNX Runtime. Others have the same name in both.
_TENSORRT_OPTIONS: Final = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_PRECISIONS: Final[Mapping[str, dict[str, str]]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}

#: CUDA options that may also stand among the parameters, with the names of their numbered values.
_CUDA_PARAMETERS: Final[Mapping[str, dict[str, str]]] = {
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "gpu_mem_limit": {},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
    "do_copy_in_default_stream": {},
}

#: Parts of a configuration that other servers act on and this one does not offer: field -> what it asks for.
_UNSUPPORTED: Final = {
    "batch_input": "inputs made from the batch",
    "batch_output": "outputs scattered over the batch",
    "sequence_batching": "stateful sequences",
    "ensemble_scheduling": "ensembles",
    "cc_model_filenames": "a model file for each compute capability",
    "model_operations": "operator libraries",
    "model_repository_agents": "repository agents",
}
_PASSED_OVER: Final = ("runtime", "metric_tags", "response_cache", "model_metrics")
_OPTIMIZATION_PASSED_OVER: Final = (
    "priority",
    "input_pinned_memory",
    "output_pinned_memory",
    "gather_kernel_buffer_threshold",
    "eager_batching",
)
_GROUP_PASSED_OVER: Final = ("rate_limiter", "profile", "host_policy")

_SAFE_FILENAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", re.ASCII)
_STRING_OR_COMMENT: Final = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*')
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPES: Final = frozenset("abfnrtv\\'\"01234567xuU")
_MAX_BATCH_SIZE: Final = re.compile(r"\bmax_batch_size\s*:")


@dataclass(slots=True, frozen=True)
class ParsedConfig:
    """A config.pbtxt as read: what it asks for, the message itself, and the fields that have no effect here."""

    options: ModelOptions
    message: pb.ModelConfig
    ignored: tuple[str, ...] = ()


def parse_pbtxt(text: str, *, model: str, base: ModelOptions | None = None) -> ModelOptions:
    """The options that a config.pbtxt asks for, over ``base``. ``model`` is the folder's name.

    Raises InvalidConfig: for syntax the first mistake with its line and column, otherwise every mistake.
    """
    return read_pbtxt(text, model=model, base=base).options


def read_pbtxt(text: str, *, model: str, base: ModelOptions | None = None) -> ParsedConfig:
    """``parse_pbtxt`` with the message and the names of the fields that were passed over."""
    reader = _Reader(_message(text), _gives_max_batch_size(text))
    options = reader.options(model, base or ModelOptions())
    if reader.problems:
        raise InvalidConfig(reader.problems)
    return ParsedConfig(options, reader.config, tuple(sorted(set(reader.ignored))))


def default_filename(text: str, *, model: str) -> str:
    """The name of the model file in each version folder. Raises InvalidConfig like ``parse_pbtxt``."""
    return parse_pbtxt(text, model=model).filename


def _message(text: str) -> pb.ModelConfig:
    if len(text) > MAX_CHARACTERS:
        raise InvalidConfig([Problem(FILENAME, 0, 0, "", f"is over {MAX_CHARACTERS} characters")])
    _check_escapes(text)
    message = pb.ModelConfig()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        reason = re.sub(r"^\d+:\d+ : ", "", str(error))
        place = error.GetLine() or 0, error.GetColumn() or 0
        raise InvalidConfig([Problem(FILENAME, *place, "", f"syntax: {reason}")]) from error
    except (ValueError, RecursionError) as error:
        raise InvalidConfig([Problem(FILENAME, 0, 0, "", "syntax: the text cannot be read")]) from error
    return message


def _check_escapes(text: str) -> None:
    """The parser passes unknown escapes with a warning to whoever runs the server; who wrote them is to know."""
    for token in _STRING_OR_COMMENT.finditer(text):
        if token[0][0] == "#":
            continue
        for escape in _ESCAPE.finditer(token[0]):
            if escape[1] not in _ESCAPES:
                before = text[: token.start() + escape.start()]
                place = before.count("\n") + 1, len(before) - before.rfind("\n")
                reason = f"syntax: {escape[0]!r} is no escape; a backslash itself is written twice"
                raise InvalidConfig([Problem(FILENAME, *place, "", reason)])


def _gives_max_batch_size(text: str) -> bool:
    """proto3 cannot tell "max_batch_size: 0" from nothing, but the two mean different things here."""
    return _MAX_BATCH_SIZE.search(_STRING_OR_COMMENT.sub(" ", text)) is not None


class _Reader:
    """Reads one message into options. Mistakes and fields without effect are collected on the way."""

    def __init__(self, config: pb.ModelConfig, batch_size_given: bool) -> None:
        self.config = config
        self.batch_size_given = batch_size_given
        self.problems: list[Problem] = []
        self.ignored: list[str] = []

    def refuse(self, key: str, message: str) -> None:
        self.problems.append(Problem(FILENAME, 0, 0, key, message))

    def options(self, model: str, base: ModelOptions) -> ModelOptions:
        """``base`` with what the message asks for put over it."""
        config = self.config
        self.identity(model)
        self.unsupported()
        limit = self.max_batch_size(base)
        return replace(
            base,
            max_batch_size=limit,
            inputs=self.tensors("input", config.input) or base.inputs,
            outputs=self.tensors("output", config.output) or base.outputs,
            batching=self.batching(base.batching, limit),
            warmup=tuple(self.warmup(limit)) or base.warmup,
            version_policy=self.version_policy(base.version_policy),
            filename=self.filename("default_model_filename", config.default_model_filename) or base.filename,
            **self.instances(base),
            **self.graph(),
            **self.parameters(base),
        )

    # -- what it is ---------------------------------------------------------------------------------------------

    def identity(self, model: str) -> None:
        config = self.config
        if config.name and config.name != model:
            self.refuse("name", f"wanted '{model[:128]}' like the model's folder, got {show(config.name)}")
        if config.platform not in {"", PLATFORM}:
            self.refuse("platform", f"wanted {PLATFORM}, the only one served here, got {show(config.platform)}")
        if config.backend not in {"", BACKEND}:
            self.refuse("backend", f"wanted {BACKEND}, the only one served here, got {show(config.backend)}")

    def unsupported(self) -> None:
        given = {descriptor.name for descriptor, _ in self.config.ListFields()}
        for name in sorted(given & set(_UNSUPPORTED)):
            self.refuse(name, f"not supported: {_UNSUPPORTED[name]}")
        if self.config.model_transaction_policy.decoupled:
            self.refuse("model_transaction_policy.decoupled", "not supported: decoupled answers")
        self.ignored += sorted(given & set(_PASSED_OVER))

    def filename(self, key: str, name: str) -> str:
        if name and not _SAFE_FILENAME.fullmatch(name):
            self.refuse(key, f"wanted the plain name of a file in the folder, got {show(name)}")
            return ""
        return name

    def version_policy(self, base: tuple[str, ...]) -> tuple[str, ...]:
        policy = self.config.version_policy
        match policy.WhichOneof("policy_choice"):
            case "latest":
                if not policy.latest.num_versions:
                    self.refuse("version_policy.latest.num_versions", "wanted at least 1, got number 0")
                return ("latest", str(policy.latest.num_versions))
            case "all":
                return ("all",)
            case "specific":
                versions = policy.specific.versions
                if not versions or min(versions) < 1:
                    self.refuse("version_policy.specific.versions", f"wanted positive versions, got {list(versions)}")
                return ("specific", *map(str, versions))
        return base

    # -- inputs and outputs -------------------------------------------------------------------------------------

    def max_batch_size(self, base: ModelOptions) -> int | None:
        """Given: that. Not given beside declared tensors: 0, their dims are whole shapes. Else: open."""
        size = self.config.max_batch_size
        if size < 0:
            self.refuse("max_batch_size", f"wanted at least 0, got number {size}")
        if self.batch_size_given:
            return size
        declared = any(t.dims for t in self.config.input) or any(t.dims for t in self.config.output)
        return 0 if declared else base.max_batch_size

    def tensors(self, kind: str, tensors: Iterable[Any]) -> tuple[DeclaredTensor, ...]:
        found: dict[str, DeclaredTensor] = {}
        for index, tensor in enumerate(tensors):
            key = f"{kind}[{index}]"
            if not tensor.name:
                self.refuse(f"{key}.name", "required field is missing")
            elif tensor.name in found:
                self.refuse(f"{key}.name", f"{kind} {show(tensor.name)} is declared twice")
            found[tensor.name] = self.tensor(key, tensor)
        return tuple(found.values())

    def tensor(self, key: str, tensor: Any) -> DeclaredTensor:
        for flag in ("is_shape_tensor", "allow_ragged_batch", "is_non_linear_format_io"):
            if getattr(tensor, flag, False):
                self.refuse(f"{key}.{flag}", f"not supported: {flag}")
        if getattr(tensor, "format", 0):
            self.ignored.append("input.format")
        self.dims(f"{key}.dims", tensor.dims)
        return DeclaredTensor(
            name=tensor.name,
            datatype=DATATYPES.get(tensor.data_type, ""),
            dims=tuple(tensor.dims),
            reshape=self.reshape(key, tensor),
            label_filename=self.filename(f"{key}.label_filename", getattr(tensor, "label_filename", "")),
            optional=getattr(tensor, "optional", False),
        )

    def dims(self, key: str, dims: Iterable[int]) -> None:
        for dim in dims:
            if dim < 1 and dim != -1:
                self.refuse(key, f"wanted -1 or at least 1 in every place, got {dim}")

    def reshape(self, key: str, tensor: Any) -> tuple[int, ...] | None:
        if not tensor.HasField("reshape"):
            return None
        self.dims(f"{key}.reshape.shape", tensor.reshape.shape)
        return tuple(tensor.reshape.shape)

    # -- how it runs --------------------------------------------------------------------------------------------

    def instances(self, base: ModelOptions) -> dict[str, Any]:
        """How many instances, on which devices, by which providers. A group's count is per device it names."""
        groups = self.config.instance_group
        devices: list[int] = []
        count = 0
        for index, group in enumerate(groups):
            size = self.group(f"instance_group[{index}]", group)
            count += size * max(1, len(group.gpus))
            devices += list(group.gpus) * size
        if count > _MAX_INSTANCES:
            self.refuse("instance_group", f"wanted at most {_MAX_INSTANCES} instances in all, got {count}")
        return {
            "instances": count or base.instances,
            "device_ids": tuple(devices[:_MAX_INSTANCES]) or base.device_ids,
            "providers": self.providers(base.providers),
        }

    def group(self, key: str, group: Any) -> int:
        """The number of instances on each device of one group, at least 1."""
        if group.count < 0:
            self.refuse(f"{key}.count", f"wanted at least 1, got number {group.count}")
        if group.passive or group.secondary_devices:
            self.refuse(key, "passive instances and secondary devices are not supported")
        if group.gpus and group.kind == pb.ModelInstanceGroup.KIND_CPU:
            self.refuse(f"{key}.gpus", "an instance on CPU has no GPUs")
        if any(not 0 <= device < 1024 for device in group.gpus):
            self.refuse(f"{key}.gpus", f"wanted device numbers from 0, got {list(group.gpus)[:8]}")
        given = {descriptor.name for descriptor, _ in group.ListFields()}
        self.ignored += [f"instance_group.{name}" for name in _GROUP_PASSED_OVER if name in given]
        return min(max(1, int(group.count)), _MAX_INSTANCES + 1)

    def providers(self, base: tuple[Provider, ...]) -> tuple[Provider, ...]:
        """GPU instances or GPU accelerators ask for CUDA (and TensorRT); KIND_AUTO alone takes what ``base`` says."""
        accelerators = self.config.optimization.execution_accelerators
        gpu = self.accelerators("gpu_execution_accelerator", accelerators.gpu_execution_accelerator, GPU_PROVIDERS)
        cpu = self.accelerators("cpu_execution_accelerator", accelerators.cpu_execution_accelerator, ("cpu",))
        on_cpu = Provider("cpu", tuple(cpu.get("cpu", {}).items()))
        if self.on("KIND_CPU") and (self.on("KIND_GPU") or self.any_gpus()):
            self.refuse("instance_group", "instances of one model on GPU and on CPU at once are not supported")
        if self.on("KIND_CPU"):
            self.ignored += ["optimization.execution_accelerators.gpu_execution_accelerator"] if gpu else []
            return (on_cpu,)
        if gpu or self.on("KIND_GPU") or self.any_gpus():
            tensorrt = {"tensorrt": _tensorrt_options(gpu["tensorrt"], self)} if "tensorrt" in gpu else {}
            chosen = tensorrt | {"cuda": self.cuda_options() | gpu.get("cuda", {})}
            return (*(Provider(name, tuple(options.items())) for name, options in chosen.items()), on_cpu)
        return (on_cpu,) if cpu else base

    def on(self, kind: str) -> bool:
        return any(pb.ModelInstanceGroup.Kind.Name(group.kind) == kind for group in self.config.instance_group)

    def any_gpus(self) -> bool:
        return any(group.gpus and group.kind != pb.ModelInstanceGroup.KIND_CPU for group in self.config.instance_group)

    def accelerators(self, field: str, given: Iterable[Any], known: tuple[str, ...]) -> dict[str, dict[str, str]]:
        """Execution accelerators by name with their options."""
        found: dict[str, dict[str, str]] = {}
        for index, accelerator in enumerate(given):
            key = f"optimization.execution_accelerators.{field}[{index}].name"
            if accelerator.name not in known or accelerator.name in found:
                self.refuse(key, f"wanted {' or '.join(known)}, once each, got {show(accelerator.name)}")
            found[accelerator.name] = dict(sorted(accelerator.parameters.items()))
        return found

    def cuda_options(self) -> dict[str, str]:
        """CUDA options given as parameters (the older way), and CUDA graphs."""
        options = {}
        for key, values in _CUDA_PARAMETERS.items():
            if key in self.config.parameters:
                value = self.config.parameters[key].string_value
                options[key] = values.get(value, value)
        if self.config.optimization.cuda.graphs:
            options["enable_cuda_graph"] = "1"
        return options

    def graph(self) -> dict[str, Any]:
        """optimization.graph.level, and what else of ``optimization`` is passed over."""
        optimization = self.config.optimization
        given = {descriptor.name for descriptor, _ in optimization.ListFields()}
        self.ignored += [f"optimization.{name}" for name in _OPTIMIZATION_PASSED_OVER if name in given]
        cuda = {descriptor.name for descriptor, _ in optimization.cuda.ListFields()} - {"graphs"}
        self.ignored += [f"optimization.cuda.{name}" for name in cuda]
        if "graph" not in given:
            return {}
        level = optimization.graph.level
        if level not in GRAPH_LEVELS:
            self.refuse("optimization.graph.level", f"wanted -1, 0, 1 or 2, got number {level}")
        return {"graph_optimization": GRAPH_LEVELS.get(level, "all")}

    def parameters(self, base: ModelOptions) -> dict[str, Any]:
        """Threads, execution mode and session entries; every parameter is kept by its name as well."""
        texts = {key: self.config.parameters[key].string_value for key in sorted(self.config.parameters)}
        options: dict[str, Any] = {"parameters": {**base.parameters, **texts}}
        for key, name in (("intra_op_thread_count", "intra_op_threads"), ("inter_op_thread_count", "inter_op_threads")):
            if key in texts:
                options[name] = self.number(f"parameters[{key}]", texts[key], 1024)
        if "execution_mode" in texts:
            options["parallel_execution"] = self.number("parameters[execution_mode]", texts["execution_mode"], 1) == 1
        session = {key: text for key, text in texts.items() if key.startswith("session.")}
        options["session_config"] = tuple((dict(base.session_config) | session).items())
        return options

    def number(self, key: str, text: str, highest: int) -> int:
        if re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) and int(text) <= highest:
            return int(text)
        self.refuse(key, f"wanted a number from 0 to {highest}, got {show(text)}")
        return 0

    # -- batching -----------------------------------------------------------------------------------------------

    def batching(self, base: BatchingOptions, limit: int | None) -> BatchingOptions:
        """``limit`` is the model's max_batch_size. One that is declared without a dynamic batcher is not combined."""
        if self.config.WhichOneof("scheduling_choice") != "dynamic_batching":
            return replace(base, enabled=False) if limit and self.batch_size_given else base
        if limit == 0:
            self.ignored.append("dynamic_batching")
            return base
        batching = self.config.dynamic_batching
        for size in batching.preferred_batch_size:
            if size < 1 or (limit is not None and size > limit):
                wanted = "at least 1" if limit is None else f"1 to {limit} (max_batch_size)"
                self.refuse("dynamic_batching.preferred_batch_size", f"wanted {wanted}, got number {size}")
        self.priority_levels(batching)
        return replace(
            base,
            enabled=True,
            preferred_batch_sizes=tuple(sorted(set(batching.preferred_batch_size))),
            max_queue_delay_us=self.microseconds(
                "dynamic_batching.max_queue_delay_microseconds", batching.max_queue_delay_microseconds
            ),
            preserve_ordering=batching.preserve_ordering,
            priority_levels=batching.priority_levels,
            default_priority_level=batching.default_priority_level,
            default_queue_policy=self.queue_policy("default_queue_policy", batching.default_queue_policy),
            priority_queue_policy={
                level: self.queue_policy(f"priority_queue_policy[{level}]", batching.priority_queue_policy[level])
                for level in sorted(batching.priority_queue_policy)
            },
        )

    def priority_levels(self, batching: Any) -> None:
        levels, default = batching.priority_levels, batching.default_priority_level
        if levels > _MAX_PRIORITY_LEVELS:
            self.refuse("dynamic_batching.priority_levels", f"wanted at most {_MAX_PRIORITY_LEVELS}, got {levels}")
        if not min(1, levels) <= default <= levels:
            text = f"wanted a level from {min(1, levels)} to priority_levels ({levels}), got {default}"
            self.refuse("dynamic_batching.default_priority_level", text)
        for level in sorted(batching.priority_queue_policy):
            if not 1 <= level <= levels:
                text = f"wanted levels from 1 to priority_levels ({levels}), got {level}"
                self.refuse("dynamic_batching.priority_queue_policy", text)

    def queue_policy(self, key: str, policy: Any) -> QueuePolicy:
        timeout = self.microseconds(
            f"dynamic_batching.{key}.default_timeout_microseconds", policy.default_timeout_microseconds
        )
        action = pb.ModelQueuePolicy.TimeoutAction.Name(policy.timeout_action)
        return QueuePolicy(action, timeout, policy.allow_timeout_override, policy.max_queue_size)

    def microseconds(self, key: str, amount: int) -> int:
        if amount > _MAX_MICROSECONDS:
            self.refuse(key, f"wanted at most {_MAX_MICROSECONDS} (a day), got {amount}")
        return amount

    # -- warm-up ------------------------------------------------------------------------------------------------

    def warmup(self, limit: int | None) -> Iterator[WarmupSample]:
        for index, sample in enumerate(self.config.model_warmup):
            key = f"model_warmup[{index}]"
            if limit is not None and sample.batch_size > limit:
                text = f"wanted at most max_batch_size ({limit}), got {sample.batch_size}"
                self.refuse(f"{key}.batch_size", text)
            if not sample.inputs:
                self.refuse(f"{key}.inputs", "required field is missing")
            if sample.count > _MAX_WARMUP_COUNT:
                self.refuse(f"{key}.count", f"wanted at most {_MAX_WARMUP_COUNT}, got {sample.count}")
            inputs = {name: self.warmup_input(f"{key}.inputs[{name}]", sample.inputs[name]) for name in sample.inputs}
            yield WarmupSample(sample.name or f"warmup_{index}", sample.batch_size, inputs, max(1, sample.count))

    def warmup_input(self, key: str, tensor: Any) -> WarmupInput:
        if tensor.data_type not in DATATYPES:
            self.refuse(f"{key}.data_type", "required field is missing")
        if any(dim < 1 for dim in tensor.dims):
            self.refuse(f"{key}.dims", f"wanted at least 1 in every place, got {list(tensor.dims)}")
        source = tensor.WhichOneof("input_data_type")
        if source is None:
            self.refuse(key, "wanted one of zero_data, random_data and input_data_file")
        if source == "input_data_file":
            name = self.filename(f"{key}.input_data_file", tensor.input_data_file)
        else:
            name = "random" if source == "random_data" else "zero"
        return WarmupInput(DATATYPES.get(tensor.data_type, ""), tuple(tensor.dims), name)


def _tensorrt_options(given: Mapping[str, str], reader: _Reader) -> dict[str, str]:
    """TensorRT options by ONNX Runtime's names."""
    options = {_TENSORRT_OPTIONS.get(key, key): value for key, value in given.items() if key != "precision_mode"}
    precision = given.get("precision_mode", "FP32")
    if precision not in _PRECISIONS:
        key = "optimization.execution_accelerators.gpu_execution_accelerator"
        reader.refuse(key, f"wanted precision_mode FP32, FP16 or INT8, got {show(precision)}")
    return _PRECISIONS.get(precision, {}) | options
