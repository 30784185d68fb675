"""The configuration that clients are shown, as message and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from server._pb import model_config_pb2 as pb
from server.config.model_config import config_to_json, options_to_model_config
from server.config.pbtxt import parse_pbtxt
from server.runtime.base import BatchingOptions, ModelOptions, Provider, QueuePolicy, WarmupInput, WarmupSample
from server.types import ALL_DATATYPES, ModelSpec, TensorSpec

SPEC = ModelSpec(
    name="digits",
    version="3",
    inputs=(TensorSpec("x", "FP32", (-1, 64)), TensorSpec("flag", "BOOL", (-1,), optional=True)),
    outputs=(TensorSpec("label", "INT64", (-1,)), TensorSpec("scores", "FP32", (-1, 10))),
    max_batch_size=32,
)


def test_of_a_model_without_a_configuration() -> None:
    config = options_to_model_config(SPEC, ModelOptions())
    assert (config.name, config.platform, config.backend) == ("digits", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 32
    assert [(t.name, t.data_type, list(t.dims), t.optional) for t in config.input] == [
        ("x", pb.TYPE_FP32, [64], False),
        ("flag", pb.TYPE_BOOL, [1], True),
    ]
    assert [(t.name, t.data_type, list(t.dims)) for t in config.output] == [
        ("label", pb.TYPE_INT64, [1]),
        ("scores", pb.TYPE_FP32, [10]),
    ]
    assert [t.HasField("reshape") for t in (*config.input, *config.output)] == [False, True, True, False]
    assert config.version_policy.latest.num_versions == 1
    assert config.default_model_filename == "model.onnx"
    (group,) = config.instance_group
    assert (group.name, group.kind, group.count) == ("digits_0", pb.ModelInstanceGroup.KIND_CPU, 1)
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


@pytest.mark.parametrize(
    ("max_batch_size", "enabled", "shown"), [(0, True, False), (8, False, False), (8, True, True), (1, True, True)]
)
def test_a_dynamic_batcher_is_shown_where_there_is_one(max_batch_size: int, enabled: bool, shown: bool) -> None:
    options = ModelOptions(batching=BatchingOptions(enabled=enabled))
    config = options_to_model_config(replace(SPEC, max_batch_size=max_batch_size), options)
    assert config.HasField("dynamic_batching") == shown


def test_shapes_are_whole_when_the_model_does_not_batch() -> None:
    spec = replace(SPEC, max_batch_size=0, inputs=(TensorSpec("x", "FP32", (-1, 64)), TensorSpec("s", "INT8", ())))
    config = options_to_model_config(spec, ModelOptions())
    assert [list(tensor.dims) for tensor in config.input] == [[-1, 64], [1]]
    assert config.input[1].HasField("reshape")


def test_labels_and_reshapes_come_from_the_declaration() -> None:
    text = "output { name: 'scores' dims: [ 2, 5 ] label_filename: 'l.txt' reshape { shape: 10 } }"
    spec = replace(SPEC, outputs=(TensorSpec("scores", "FP32", (-1, 2, 5)),))
    config = options_to_model_config(spec, parse_pbtxt("max_batch_size: 32 " + text, model="digits"))
    (output,) = config.output
    assert (list(output.dims), list(output.reshape.shape), output.label_filename) == ([2, 5], [10], "l.txt")


@pytest.mark.parametrize(
    ("instances", "devices", "groups"),
    [
        (2, (), [(2, [])]),
        (4, (0, 1), [(2, [0, 1])]),
        (3, (0, 1), [(2, [0]), (1, [1])]),
        (1, (5, 6), [(1, [5])]),
    ],
)
def test_instances_on_devices(instances: int, devices: tuple[int, ...], groups: list[tuple[int, list[int]]]) -> None:
    options = ModelOptions(providers=(Provider("cuda"),), instances=instances, device_ids=devices)
    found = options_to_model_config(SPEC, options).instance_group
    assert [(group.count, list(group.gpus)) for group in found] == groups
    assert {group.kind for group in found} == {pb.ModelInstanceGroup.KIND_GPU}


@pytest.mark.parametrize("datatype", sorted(ALL_DATATYPES))
def test_every_datatype_has_a_name(datatype: str) -> None:
    spec = replace(SPEC, inputs=(TensorSpec("x", datatype, (-1, 1)),))
    (tensor,) = json.loads(config_to_json(options_to_model_config(spec, ModelOptions())))["input"]
    assert tensor["data_type"] == "TYPE_" + ("STRING" if datatype == "BYTES" else datatype)


def test_json_form() -> None:
    batching = BatchingOptions(
        max_queue_delay_us=500,
        priority_levels=2,
        default_priority_level=1,
        default_queue_policy=QueuePolicy("DELAY", 7, True, 3),
        priority_queue_policy={2: QueuePolicy(default_timeout_us=2**40)},
    )
    warmup = (WarmupSample("w", 1, {"x": WarmupInput("FP32", (64,), "random")}, 2),)
    options = ModelOptions(batching=batching, warmup=warmup, version_policy=("specific", "9007199254740993"))
    shown = json.loads(config_to_json(options_to_model_config(SPEC, options)))
    assert shown["name"] == "digits"
    assert shown["max_batch_size"] == 32
    assert shown["input"][0] == {
        "name": "x",
        "data_type": "TYPE_FP32",
        "format": "FORMAT_NONE",
        "dims": [64],
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": False,
        "is_non_linear_format_io": False,
    }
    assert shown["output"][0]["reshape"] == {"shape": []}
    assert shown["version_policy"] == {"specific": {"versions": [9007199254740993]}}
    dynamic = shown["dynamic_batching"]
    assert dynamic["max_queue_delay_microseconds"] == 500
    assert dynamic["default_queue_policy"] == {
        "timeout_action": "DELAY",
        "default_timeout_microseconds": 7,
        "allow_timeout_override": True,
        "max_queue_size": 3,
    }
    assert dynamic["priority_queue_policy"]["2"]["default_timeout_microseconds"] == 2**40
    assert shown["model_warmup"][0]["inputs"]["x"]["dims"] == [64]
    assert shown["instance_group"][0]["kind"] == "KIND_CPU"
    assert shown["parameters"] == {}
    assert "ensemble_scheduling" not in shown


_POLICIES = st.builds(
    QueuePolicy, st.sampled_from(["REJECT", "DELAY"]), st.integers(0, 10**9), st.booleans(), st.integers(0, 1000)
)
_BATCHING = st.builds(
    BatchingOptions,
    preferred_batch_sizes=st.sets(st.integers(1, 32)).map(sorted).map(tuple),
    max_queue_delay_us=st.integers(0, 10**9),
    preserve_ordering=st.booleans(),
    priority_levels=st.just(3),
    default_priority_level=st.integers(1, 3),
    default_queue_policy=_POLICIES,
    priority_queue_policy=st.dictionaries(st.integers(1, 3), _POLICIES),
)
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
_OPTIONS = st.builds(
    ModelOptions,
    max_batch_size=st.just(32),
    providers=st.sampled_from(
        [
            (Provider("cpu"),),
            (Provider("cpu", (("arena", "1"),)),),
            (Provider("cuda", (("gpu_mem_limit", "5"),)), Provider("cpu")),
            (Provider("tensorrt", (("trt_fp16_enable", "1"),)), Provider("cuda"), Provider("cpu")),
        ]
    ),
    instances=st.integers(1, 5),
    graph_optimization=st.sampled_from(["disable", "basic", "extended", "all"]),
    batching=_BATCHING,
    version_policy=st.sampled_from([("all",), ("latest", "2"), ("specific", "1", "4")]),
    parameters=st.dictionaries(_TEXT.map("user_{}".format), _TEXT),
    filename=st.sampled_from(["model.onnx", "net.onnx"]),
)


@given(_OPTIONS)
def test_what_is_shown_reads_back_as_the_same_options(options: ModelOptions) -> None:
    """Message -> config.pbtxt -> options is the identity on everything the format can say."""
    text = text_format.MessageToString(options_to_model_config(SPEC, options))
    found = parse_pbtxt(text, model="digits")
    assert [tensor.name for tensor in found.inputs] == ["x", "flag"]
    assert replace(found, inputs=(), outputs=()) == options


def test_threads_and_session_entries_are_parameters() -> None:
    options = ModelOptions(
        intra_op_threads=4, inter_op_threads=2, parallel_execution=True, session_config=(("session.x", "1"),)
    )
    config = options_to_model_config(SPEC, options)
    texts = {key: value.string_value for key, value in config.parameters.items()}
    assert texts == {
        "intra_op_thread_count": "4", "inter_op_thread_count": "2", "execution_mode": "1", "session.x": "1",
    }  # fmt: skip
    found = parse_pbtxt(text_format.MessageToString(config), model="digits")
    assert (found.intra_op_threads, found.inter_op_threads, found.parallel_execution) == (4, 2, True)
    assert found.session_config == options.session_config
