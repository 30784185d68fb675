"""The generated messages: their own pool, the protocol's numbers, and the text form of model configurations."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pool, text_format

from server._pb import health_pb2, inference_pb2, model_config_pb2, reflection_pb2, reflection_v1alpha_pb2

MODULES: list[Any] = [inference_pb2, model_config_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2]


@pytest.mark.parametrize("module", MODULES)
def test_own_pool(module: Any) -> None:
    """Client packages register messages of the same names in the default pool."""
    assert module.DESCRIPTOR.pool is inference_pb2.DESCRIPTOR.pool
    assert module.DESCRIPTOR.pool is not descriptor_pool.Default()
    assert module.DESCRIPTOR.name.startswith("tidegate/")


def numbers(message: Any) -> dict[str, int]:
    return {field.name: field.number for field in message.DESCRIPTOR.fields}


def test_numbers_of_inference_messages() -> None:
    assert numbers(inference_pb2.ModelInferRequest) == {
        "model_name": 1,
        "model_version": 2,
        "id": 3,
        "parameters": 4,
        "inputs": 5,
        "outputs": 6,
        "raw_input_contents": 7,
    }
    assert numbers(inference_pb2.ModelInferResponse)["raw_output_contents"] == 6
    assert numbers(inference_pb2.ModelMetadataResponse)["properties"] == 6
    assert list(numbers(inference_pb2.InferTensorContents).values()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert numbers(inference_pb2.InferParameter)["uint64_param"] == 5


def methods(module: Any, service: str) -> dict[str, tuple[bool, bool]]:
    found = module.DESCRIPTOR.services_by_name[service].methods
    return {method.name: (method.client_streaming, method.server_streaming) for method in found}


def test_services() -> None:
    inference = methods(inference_pb2, "GRPCInferenceService")
    assert len(inference) == 20
    assert {name for name, kind in inference.items() if kind != (False, False)} == {"ModelStreamInfer"}
    assert inference["ModelStreamInfer"] == (True, True)
    health = methods(health_pb2, "Health")
    assert health == {"Check": (False, False), "List": (False, False), "Watch": (False, True)}
    for module in (reflection_pb2, reflection_v1alpha_pb2):
        assert methods(module, "ServerReflection") == {"ServerReflectionInfo": (True, True)}


CONFIG = """
name: "m"
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  { name: "x" data_type: TYPE_FP32 dims: [ 3, -1 ] format: FORMAT_NCHW reshape { shape: [ 3, 1 ] } optional: true }
]
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] label_filename: "labels.txt" }
version_policy: { specific { versions: [ 1, 3 ] } }
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] } ]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  default_queue_policy { timeout_action: DELAY max_queue_size: 16 }
  priority_queue_policy { key: 1 value { default_timeout_microseconds: 5 } }
}
optimization {
  execution_accelerators {
    gpu_execution_accelerator : [ { name : "tensorrt" parameters { key: "precision_mode" value: "FP16" } } ]
  }
  graph { level: 1 }
}
parameters { key: "intra_op_thread_count" value: { string_value: "4" } }
model_warmup [
  { name: "w" batch_size: 1 inputs { key: "x" value: { data_type: TYPE_FP32 dims: [ 3, 4 ] random_data: true } } }
]
"""


def test_model_configuration_text() -> None:
    config = text_format.Parse(CONFIG, model_config_pb2.ModelConfig())
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.input[0].dims == [3, -1]
    assert config.dynamic_batching.priority_queue_policy[1].default_timeout_microseconds == 5
    assert config.model_warmup[0].inputs["x"].WhichOneof("input_data_type") == "random_data"
    assert text_format.Parse(text_format.MessageToString(config), model_config_pb2.ModelConfig()) == config
    with pytest.raises(text_format.ParseError, match="no field named"):
        text_format.Parse("max_batch: 1", model_config_pb2.ModelConfig())
