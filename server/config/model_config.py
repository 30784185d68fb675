"""``ModelOptions`` and a loaded version's signature -> Triton's ``ModelConfig``, as message and as JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import orjson
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor

from server._pb import model_config_pb2 as pb
from server.config.pbtxt import DATATYPES, GPU_PROVIDERS, GRAPH_LEVELS
from server.runtime.base import BatchingOptions, DeclaredTensor, ModelOptions, QueuePolicy, WarmupSample
from server.types import ModelSpec, TensorSpec

_DATA_TYPES: Final = {name: number for number, name in DATATYPES.items()}
_LEVEL_OF_GRAPH: Final = {name: level for level, name in GRAPH_LEVELS.items()}
_INTEGERS_64: Final = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)


def options_to_model_config(spec: ModelSpec, options: ModelOptions) -> pb.ModelConfig:
    """The complete configuration of one loaded version, whether or not it has a config.pbtxt.

    ``dims`` stand without the batch axis when the model batches; a tensor that has no other axis is declared as
    ``dims: [1]`` with an empty reshape, as the format asks for.
    """
    config = pb.ModelConfig(
        name=spec.name,
        platform=spec.platform,
        backend=spec.backend,
        max_batch_size=spec.max_batch_size,
        default_model_filename=options.filename,
        version_policy=_policy_message(options.version_policy),
        instance_group=_group_messages(spec.name, options),
        optimization=_optimization_message(options),
        model_warmup=map(_warmup_message, options.warmup),
    )
    batched = spec.max_batch_size > 0
    declared = {tensor.name: tensor for tensor in (*options.inputs, *options.outputs)}
    for tensor in spec.inputs:
        _tensor_message(config.input.add(optional=tensor.optional), tensor, batched, declared.get(tensor.name))
    for tensor in spec.outputs:
        message = config.output.add()
        _tensor_message(message, tensor, batched, declared.get(tensor.name))
        if tensor.name in declared:
            message.label_filename = declared[tensor.name].label_filename
    for key, text in _parameter_texts(options).items():
        config.parameters[key].string_value = text
    if batched and options.batching.enabled:
        config.dynamic_batching.CopyFrom(_batching_message(options.batching))
    return config


def _tensor_message(message: Any, tensor: TensorSpec, batched: bool, declared: DeclaredTensor | None) -> None:
    dims = tensor.shape[1:] if batched else tensor.shape
    message.name = tensor.name
    message.data_type = _DATA_TYPES[tensor.datatype]
    message.dims.extend(dims or (1,))
    if declared is not None and declared.reshape is not None:
        message.reshape.shape.extend(declared.reshape)
    if not dims or (declared is not None and declared.reshape is not None):
        message.reshape.SetInParent()


def _policy_message(policy: tuple[str, ...]) -> pb.ModelVersionPolicy:
    match policy:
        case ("latest", count):
            return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=int(count)))
        case ("specific", *versions):
            return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=map(int, versions)))
    return pb.ModelVersionPolicy(all=pb.ModelVersionPolicy.All())


def _group_messages(name: str, options: ModelOptions) -> list[pb.ModelInstanceGroup]:
    """Instances take the devices in turn; devices with equally many share a group."""
    if not _on_gpu(options):
        return [pb.ModelInstanceGroup(name=f"{name}_0", kind="KIND_CPU", count=options.instances)]
    if not options.device_ids:
        return [pb.ModelInstanceGroup(name=f"{name}_0", kind="KIND_GPU", count=options.instances)]
    devices = options.device_ids
    per_device = Counter(devices[index % len(devices)] for index in range(options.instances))
    gpus_of: dict[int, list[int]] = {}
    for device, count in per_device.items():
        gpus_of.setdefault(count, []).append(device)
    return [
        pb.ModelInstanceGroup(name=f"{name}_{index}", kind="KIND_GPU", count=count, gpus=gpus)
        for index, (count, gpus) in enumerate(gpus_of.items())
    ]


def _on_gpu(options: ModelOptions) -> bool:
    return any(provider.name in GPU_PROVIDERS for provider in options.providers)


def _optimization_message(options: ModelOptions) -> pb.ModelOptimizationPolicy | None:
    """The graph level and the providers' options, as far as they differ from what a reader would assume."""
    message = pb.ModelOptimizationPolicy()
    if options.graph_optimization != "all":
        message.graph.level = _LEVEL_OF_GRAPH[options.graph_optimization]
    accelerators = message.execution_accelerators
    for provider in options.providers:
        if provider.name == "tensorrt" or provider.options:
            on_gpu = provider.name in GPU_PROVIDERS
            where = accelerators.gpu_execution_accelerator if on_gpu else accelerators.cpu_execution_accelerator
            where.add(name=provider.name, parameters=dict(provider.options))
    return message if message.ByteSize() else None


def _parameter_texts(options: ModelOptions) -> dict[str, str]:
    """The model's own parameters, and session settings where they are not the defaults."""
    default = ModelOptions()
    texts = {key: str(value) for key, value in options.parameters.items()} | dict(options.session_config)
    if options.intra_op_threads != default.intra_op_threads:
        texts["intra_op_thread_count"] = str(options.intra_op_threads)
    if options.inter_op_threads != default.inter_op_threads:
        texts["inter_op_thread_count"] = str(options.inter_op_threads)
    if options.parallel_execution:
        texts["execution_mode"] = "1"
    return dict(sorted(texts.items()))


def _batching_message(batching: BatchingOptions) -> pb.ModelDynamicBatching:
    message = pb.ModelDynamicBatching(
        preferred_batch_size=batching.preferred_batch_sizes,
        max_queue_delay_microseconds=batching.max_queue_delay_us,
        preserve_ordering=batching.preserve_ordering,
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
    )
    if batching.default_queue_policy != QueuePolicy():
        message.default_queue_policy.CopyFrom(_queue_message(batching.default_queue_policy))
    for level, policy in batching.priority_queue_policy.items():
        message.priority_queue_policy[level].CopyFrom(_queue_message(policy))
    return message


def _queue_message(policy: QueuePolicy) -> pb.ModelQueuePolicy:
    return pb.ModelQueuePolicy(
        timeout_action=policy.timeout_action,
        default_timeout_microseconds=policy.default_timeout_us,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


def _warmup_message(sample: WarmupSample) -> pb.ModelWarmup:
    message = pb.ModelWarmup(name=sample.name, batch_size=sample.batch_size, count=sample.count)
    for name, tensor in sample.inputs.items():
        entry = message.inputs[name]
        entry.data_type = _DATA_TYPES[tensor.datatype]
        entry.dims.extend(tensor.dims)
        if tensor.source in {"zero", "random"}:
            setattr(entry, f"{tensor.source}_data", True)
        else:
            entry.input_data_file = tensor.source
    return message


# --- JSON -----------------------------------------------------------------------------------------------------------


def config_to_json(config: pb.ModelConfig) -> bytes:
    """The JSON form clients of the configuration endpoint know.

    Field names as in the message, enums by name, every scalar, list and map present, 64-bit integers as numbers.
    """
    body = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return orjson.dumps(_with_numbers(config.DESCRIPTOR, body))


def _with_numbers(descriptor: Any, body: dict[str, Any]) -> dict[str, Any]:
    """``body`` with the texts that stand for 64-bit integers turned into numbers."""
    fields = descriptor.fields_by_name
    return {name: _value_with_numbers(fields[name], value) for name, value in body.items()}


def _value_with_numbers(field: Any, value: Any) -> Any:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        inner = message.fields_by_name["value"]
        return {key: _value_with_numbers(inner, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_value_with_numbers(field, entry) for entry in value]
    if message is not None:
        return _with_numbers(message, value)
    return int(value) if field.cpp_type in _INTEGERS_64 else value
