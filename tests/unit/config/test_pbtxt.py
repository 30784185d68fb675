"""config.pbtxt: what is honoured, refused and passed over."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config.pbtxt import MAX_CHARACTERS, default_filename, parse_pbtxt, read_pbtxt
from server.config.problems import InvalidConfig, Problem
from server.runtime.base import BatchingOptions, DeclaredTensor, ModelOptions, Provider, QueuePolicy, WarmupInput

FULL = """
# A comment that mentions max_batch_size: 99
name: "resnet"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [
  { name: "image" data_type: TYPE_FP32 dims: [ 3, -1, -1 ] },
  { name: "mask" data_type: TYPE_BOOL dims: [ 1 ] reshape: { shape: [] } optional: true }
]
output { name: "scores" data_type: TYPE_FP32 dims: 1000 label_filename: "labels.txt" }
version_policy: { specific: { versions: [ 1, 3 ] } }
instance_group [ { kind: KIND_GPU count: 2 gpus: [ 0, 1 ] } ]
optimization {
  graph { level: 1 }
  cuda { graphs: true busy_wait_events: true }
  execution_accelerators {
    gpu_execution_accelerator : [ {
      name: "tensorrt"
      parameters { key: "precision_mode" value: "FP16" }
      parameters { key: "max_workspace_size_bytes" value: "1073741824" }
      parameters { key: "trt_engine_cache_enable" value: "1" }
    } ]
  }
  input_pinned_memory { enable: true }
}
dynamic_batching {
  preferred_batch_size: [ 8, 4, 8 ]
  max_queue_delay_microseconds: 500
  preserve_ordering: true
  priority_levels: 2
  default_priority_level: 2
  default_queue_policy {
    timeout_action: DELAY default_timeout_microseconds: 1000 allow_timeout_override: true max_queue_size: 10
  }
  priority_queue_policy { key: 1 value { max_queue_size: 5 } }
}
parameters { key: "intra_op_thread_count" value: { string_value: "4" } }
parameters { key: "inter_op_thread_count" value: { string_value: "0" } }
parameters { key: "execution_mode" value: { string_value: "1" } }
parameters { key: "session.use_env_allocators" value: { string_value: "1" } }
parameters { key: "gpu_mem_limit" value: { string_value: "4294967200" } }
parameters { key: "arena_extend_strategy" value: { string_value: "1" } }
parameters { key: "owner" value: { string_value: "vision" } }
model_warmup [ {
  name: "zeros" batch_size: 4
  inputs { key: "image" value: { data_type: TYPE_FP32 dims: [ 3, 8, 8 ] zero_data: true } }
  inputs { key: "mask" value: { data_type: TYPE_BOOL dims: [ 1 ] input_data_file: "mask.raw" } }
} ]
default_model_filename: "net.onnx"
metric_tags { key: "a" value: "b" }
"""


def test_everything_that_is_honoured() -> None:
    parsed = read_pbtxt(FULL, model="resnet")
    options = parsed.options
    assert options.max_batch_size == 16
    assert options.inputs == (
        DeclaredTensor("image", "FP32", (3, -1, -1)),
        DeclaredTensor("mask", "BOOL", (1,), reshape=(), optional=True),
    )
    assert options.outputs == (DeclaredTensor("scores", "FP32", (1000,), label_filename="labels.txt"),)
    assert options.version_policy == ("specific", "1", "3")
    assert (options.instances, options.device_ids) == (4, (0, 1, 0, 1))
    assert options.graph_optimization == "extended"
    tensorrt = {"trt_fp16_enable": "1", "trt_max_workspace_size": "1073741824", "trt_engine_cache_enable": "1"}
    cuda = {"gpu_mem_limit": "4294967200", "arena_extend_strategy": "kSameAsRequested", "enable_cuda_graph": "1"}
    assert [(provider.name, dict(provider.options)) for provider in options.providers] == [
        ("tensorrt", tensorrt),
        ("cuda", cuda),
        ("cpu", {}),
    ]
    assert options.batching == BatchingOptions(
        preferred_batch_sizes=(4, 8),
        max_queue_delay_us=500,
        preserve_ordering=True,
        priority_levels=2,
        default_priority_level=2,
        default_queue_policy=QueuePolicy("DELAY", 1000, True, 10),
        priority_queue_policy={1: QueuePolicy(max_queue_size=5)},
    )
    assert (options.intra_op_threads, options.inter_op_threads, options.parallel_execution) == (4, 0, True)
    assert options.session_config == (("session.use_env_allocators", "1"),)
    assert options.parameters["owner"] == "vision"
    (sample,) = options.warmup
    assert (sample.name, sample.batch_size, sample.count) == ("zeros", 4, 1)
    assert sample.inputs == {
        "image": WarmupInput("FP32", (3, 8, 8)),
        "mask": WarmupInput("BOOL", (1,), "mask.raw"),
    }
    assert options.filename == default_filename(FULL, model="resnet") == "net.onnx"
    assert parsed.message.name == "resnet"
    assert parsed.ignored == ("metric_tags", "optimization.cuda.busy_wait_events", "optimization.input_pinned_memory")


def test_an_empty_text_changes_nothing() -> None:
    assert parse_pbtxt("", model="m") == ModelOptions()
    assert parse_pbtxt("# nothing\n", model="m") == ModelOptions()
    base = ModelOptions(max_batch_size=3, instances=7, providers=(Provider("cuda"),), version_policy=("all",))
    assert parse_pbtxt("name: 'm'", model="m", base=base) == base


@pytest.mark.parametrize(
    ("text", "max_batch_size", "enabled"),
    [
        ("", None, True),
        ("instance_group { count: 2 }", None, True),
        ("dynamic_batching {}", None, True),
        ("max_batch_size: 8", 8, False),
        ("max_batch_size : 8 dynamic_batching {}", 8, True),
        ("max_batch_size: 0", 0, True),
        ("max_batch_size: 0 dynamic_batching { max_queue_delay_microseconds: 5 }", 0, True),
        ('input { name: "max_batch_size: 8" dims: 1 }', 0, True),
        ("input { name: 'x' }  # max_batch_size: 8", None, True),
    ],
)
def test_when_requests_are_combined(text: str, max_batch_size: int | None, enabled: bool) -> None:
    options = parse_pbtxt(text, model="m")
    assert options.max_batch_size == max_batch_size
    assert options.batching.enabled == enabled
    assert options.batching.max_queue_delay_us == 0


def test_a_dynamic_batcher_of_a_model_that_does_not_batch_is_listed() -> None:
    assert read_pbtxt("max_batch_size: 0 dynamic_batching {}", model="m").ignored == ("dynamic_batching",)


@pytest.mark.parametrize(
    ("group", "instances", "devices", "providers"),
    [
        ("{}", 1, (), ["cpu"]),
        ("{ count: 3 }", 3, (), ["cpu"]),
        ("{ count: 3 kind: KIND_CPU }", 3, (), ["cpu"]),
        ("{ kind: KIND_MODEL }", 1, (), ["cpu"]),
        ("{ kind: KIND_GPU }", 1, (), ["cuda", "cpu"]),
        ("{ gpus: [1, 0] }", 2, (1, 0), ["cuda", "cpu"]),
        ("[ { count: 1 gpus: 0 }, { count: 2 gpus: 1 } ]", 3, (0, 1, 1), ["cuda", "cpu"]),
    ],
)
def test_instance_groups(group: str, instances: int, devices: tuple[int, ...], providers: list[str]) -> None:
    options = parse_pbtxt(f"instance_group {group}", model="m")
    assert (options.instances, options.device_ids) == (instances, devices)
    assert [provider.name for provider in options.providers] == providers


@pytest.mark.parametrize(("level", "name"), [(-1, "basic"), (0, "all"), (1, "extended"), (2, "disable")])
def test_graph_levels(level: int, name: str) -> None:
    base = ModelOptions(graph_optimization="basic")
    text = f"optimization {{ graph {{ level: {level} }} }}"
    assert parse_pbtxt(text, model="m", base=base).graph_optimization == name
    assert parse_pbtxt("", model="m", base=base).graph_optimization == "basic"


@pytest.mark.parametrize(
    ("policy", "compiled"),
    [
        ("{ latest { num_versions: 2 } }", ("latest", "2")),
        ("{ all {} }", ("all",)),
        ("{ specific { versions: 4 } }", ("specific", "4")),
    ],
)
def test_version_policies(policy: str, compiled: tuple[str, ...]) -> None:
    assert parse_pbtxt(f"version_policy {policy}", model="m").version_policy == compiled


@pytest.mark.parametrize("backend", ['backend: "onnxruntime"', 'platform: "onnxruntime_onnx"', ""])
def test_the_one_backend(backend: str) -> None:
    parse_pbtxt(backend, model="m")


def refused(text: str) -> list[Problem]:
    with pytest.raises(InvalidConfig) as caught:
        parse_pbtxt(text, model="m")
    return caught.value.problems


_WARM = 'model_warmup {{ name: "w" inputs {{ key: "x" value {{ {} }} }} }}'

_WARM_3 = _WARM.replace('name: "w"', "batch_size: 3")
_GPU = "optimization {{ execution_accelerators {{ gpu_execution_accelerator {} }} }}"


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ('name: "other"', "name", "wanted 'm' like the model's folder, got text 'other'"),
        ('platform: "tensorflow_savedmodel"', "platform", "wanted onnxruntime_onnx"),
        ('backend: "python"', "backend", "wanted onnxruntime"),
        ("max_batch_size: -1", "max_batch_size", "wanted at least 0"),
        ("sequence_batching {}", "sequence_batching", "not supported: stateful sequences"),
        ("ensemble_scheduling {}", "ensemble_scheduling", "not supported: ensembles"),
        ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled", "not supported"),
        ("batch_input {}", "batch_input", "not supported"),
        ("batch_output {}", "batch_output", "not supported"),
        ("model_operations { op_library_filename: 'x.so' }", "model_operations", "not supported"),
        ("model_repository_agents { agents { name: 'x' } }", "model_repository_agents", "not supported"),
        ("cc_model_filenames { key: '7.5' value: 'x' }", "cc_model_filenames", "not supported"),
        ("default_model_filename: '../x.onnx'", "default_model_filename", "plain name of a file"),
        ("output { name: 'x' label_filename: '/etc/passwd' }", "output[0].label_filename", "plain name of a file"),
        ("input { dims: 1 }", "input[0].name", "required field is missing"),
        ("input [ { name: 'x' }, { name: 'x' } ]", "input[1].name", "declared twice"),
        ("input { name: 'x' dims: [ 1, 0 ] }", "input[0].dims", "-1 or at least 1 in every place, got 0"),
        ("output { name: 'x' dims: -2 }", "output[0].dims", "got -2"),
        ("output { name: 'x' dims: 1 reshape { shape: 0 } }", "output[0].reshape.shape", "got 0"),
        ("input { name: 'x' allow_ragged_batch: true }", "input[0].allow_ragged_batch", "not supported"),
        ("input { name: 'x' is_shape_tensor: true }", "input[0].is_shape_tensor", "not supported"),
        ("version_policy { latest { } }", "version_policy.latest.num_versions", "wanted at least 1"),
        ("version_policy { specific { } }", "version_policy.specific.versions", "wanted positive versions, got []"),
        ("version_policy { specific { versions: -1 } }", "version_policy.specific.versions", "positive versions"),
        ("instance_group { count: -1 }", "instance_group[0].count", "wanted at least 1"),
        ("instance_group { count: 99999999 gpus: [0, 1] }", "instance_group", "wanted at most 1024 instances"),
        ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus", "no GPUs"),
        ("instance_group { gpus: -1 }", "instance_group[0].gpus", "device numbers from 0"),
        ("instance_group { passive: true }", "instance_group[0]", "passive"),
        ("instance_group [ { kind: KIND_CPU }, { kind: KIND_GPU } ]", "instance_group", "at once are not supported"),
        ("optimization { graph { level: 3 } }", "optimization.graph.level", "wanted -1, 0, 1 or 2"),
        (
            "optimization { execution_accelerators { cpu_execution_accelerator { name: 'openvino' } } }",
            "optimization.execution_accelerators.cpu_execution_accelerator[0].name",
            "wanted cpu, once each, got text 'openvino'",
        ),
        (
            _GPU.format("[ { name: 'cuda' }, { name: 'cuda' } ]"),
            "optimization.execution_accelerators.gpu_execution_accelerator[1].name",
            "wanted tensorrt or cuda, once each",
        ),
        (
            _GPU.format("{ name: 'tensorrt' parameters { key: 'precision_mode' value: 'FP8' } }"),
            "optimization.execution_accelerators.gpu_execution_accelerator",
            "wanted precision_mode FP32, FP16 or INT8, got text 'FP8'",
        ),
        (
            "parameters { key: 'intra_op_thread_count' value { string_value: 'many' } }",
            "parameters[intra_op_thread_count]",
            "wanted a number from 0 to 1024",
        ),
        (
            "parameters { key: 'execution_mode' value { string_value: '2' } }",
            "parameters[execution_mode]",
            "wanted a number from 0 to 1",
        ),
        (
            "max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }",
            "dynamic_batching.preferred_batch_size",
            "wanted 1 to 4 (max_batch_size), got number 8",
        ),
        (
            "dynamic_batching { preferred_batch_size: 0 }",
            "dynamic_batching.preferred_batch_size",
            "wanted at least 1, got",
        ),
        (
            "dynamic_batching { priority_levels: 2 }",
            "dynamic_batching.default_priority_level",
            "wanted a level from 1 to",
        ),
        (
            "dynamic_batching { default_priority_level: 1 }",
            "dynamic_batching.default_priority_level",
            "wanted a level from 0 to priority_levels (0), got 1",
        ),
        (
            "dynamic_batching { priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 } }",
            "dynamic_batching.priority_queue_policy",
            "wanted levels from 1 to priority_levels (2), got 3",
        ),
        (
            "dynamic_batching { priority_levels: 9999999 default_priority_level: 1 }",
            "dynamic_batching.priority_levels",
            "wanted at most 1024",
        ),
        (
            "dynamic_batching { max_queue_delay_microseconds: 18446744073709551615 }",
            "dynamic_batching.max_queue_delay_microseconds",
            "wanted at most 86400000000",
        ),
        ("model_warmup { name: 'w' }", "model_warmup[0].inputs", "required field is missing"),
        (_WARM.format("data_type: TYPE_FP32 dims: 1"), "model_warmup[0].inputs[x]", "wanted one of zero_data"),
        (_WARM.format("dims: 1 zero_data: true"), "model_warmup[0].inputs[x].data_type", "required field is missing"),
        (_WARM.format("data_type: TYPE_FP32 dims: -1 zero_data: true"), "model_warmup[0].inputs[x].dims", "at least 1"),
        (
            _WARM.format("data_type: TYPE_FP32 dims: 1 input_data_file: '../x'"),
            "model_warmup[0].inputs[x].input_data_file",
            "plain name of a file",
        ),
        (
            "max_batch_size: 2 " + _WARM_3.format("data_type: TYPE_FP32 dims: 1 zero_data: true"),
            "model_warmup[0].batch_size",
            "wanted at most max_batch_size (2), got 3",
        ),
    ],
)
def test_what_is_refused(text: str, key: str, reason: str) -> None:
    (problem,) = refused(text)
    assert problem.key == key
    assert reason in problem.message
    assert problem.path == "config.pbtxt"


def test_all_mistakes_are_told_at_once() -> None:
    found = refused(
        'name: "x" backend: "y" max_batch_size: -1 sequence_batching {} optimization { graph { level: 9 } }'
    )
    assert {p.key for p in found} == {
        "name",
        "backend",
        "max_batch_size",
        "sequence_batching",
        "optimization.graph.level",
    }


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("max_batch_size 8", (1, 16)),
        ("name: 'm'\nbatch_sise: 8\n", (2, 1)),
        ("name: 'm'\ninput {\n  name: 'x'\n  data_type: TYPE_FLOAT\n}\n", (4, 14)),
        ("max_batch_size: 99999999999999", (1, 17)),
        ("max_batch_size: 'x'", (1, 17)),
        ("max_batch_size: 1\nmax_batch_size: 2", (2, 17)),
        ("name: 'm", (1, 7)),
        ("dynamic_batching {} sequence_batching {}", (1, 21)),
    ],
)
def test_syntax_errors_have_a_place(text: str, place: tuple[int, int]) -> None:
    (problem,) = refused(text)
    assert problem.message.startswith("syntax: ")
    assert (problem.line, problem.column) == place


def test_a_text_that_is_too_long() -> None:
    (problem,) = refused("#" * (MAX_CHARACTERS + 1))
    assert problem.message == "is over 4194304 characters"


_PIECES = st.sampled_from(
    [*"{}[]:,<>'\\\"#\n -10xé\0", "1e9", "inf", "nan", "\\377", "[a.b/c]", "name", "input", "dims", "key", "value",
     "true", "max_batch_size", "dynamic_batching", "parameters", "TYPE_FP32", "instance_group", "gpus"]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=30).map("".join) | st.text(max_size=40))
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(InvalidConfig):
        parse_pbtxt(text, model="m")


@given(st.integers(0, len(FULL) - 1), st.integers(0, 40), _PIECES)
def test_no_damaged_text_raises_anything_else(at: int, length: int, piece: str) -> None:
    with contextlib.suppress(InvalidConfig):
        parse_pbtxt(FULL[:at] + piece + FULL[at + length :], model="resnet")


@pytest.mark.parametrize(
    ("text", "place"), [('# "\\m"\nname: "a\\mb"', (2, 9)), ("name: 'x' platform: '\\\\\\q'", (1, 24))]
)
def test_an_unknown_escape_is_a_mistake_in_its_place(text: str, place: tuple[int, int]) -> None:
    with pytest.raises(InvalidConfig, match="is no escape") as caught:
        parse_pbtxt(text, model="m")
    (problem,) = caught.value.problems
    assert (problem.line, problem.column) == place


def test_known_escapes_are_taken() -> None:
    assert parse_pbtxt(r'default_model_filename: "a\x62\143.onnx" # "\m"', model="m").filename == "abc.onnx"
