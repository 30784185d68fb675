from __future__ import annotations

import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from server.errors import InputRejected, OutOfMemory, RuntimeFailure
from server.runtime.messages import MAX_CHARS, clean, run_error

_NODE = "Non-zero status code returned while running"
_ADD = (
    f"[ONNXRuntimeError] : 1 : FAIL : {_NODE} Add node. Name:'add' Status Message: /onnxruntime_src/onnxruntime/core/"
    "providers/cpu/math/element_wise_ops.h:563 void onnxruntime::BroadcastIterator::Init(ptrdiff_t, ptrdiff_t) "
    "axis == 1 || axis == largest was false. Attempting to broadcast by 3 by 4\n"
)
_GATHER = f"Error in execution: {_NODE} Gather node. Name:'g' Status Message: indices element out of data bounds, idx=9"


_OUTPUT = "virtual OrtValue* onnxruntime::OpKernelContext::OutputMLValue(int, const onnxruntime::TensorShape&)"
_LOCALE = "onnxruntime::StringNormalizer::Locale::Locale(const std::string&)::<lambda()>"
_INPUT = "const T* onnxruntime::OpKernelContext::Input(int) const [with T = onnxruntime::Tensor]"
_OVERFLOW = "static void SafeIntExceptionHandler<onnxruntime::OnnxRuntimeException>::SafeIntOnOverflow()"
_EXPAND = (
    f"{_NODE} Expand node. Name:'' Status Message: /b/op_kernel.cc:87 {_OUTPUT} [ONNXRuntimeError] : 1 : FAIL : "
    "tensor.cc:57 CalculateTensorStorageSize Tensor shape.Size() must be >= 0\n"
)
_RELU = f"Error in execution: {_NODE} Relu node. Name:'' Status Message: /b/context.h:45 {_INPUT} Missing Input: x\n"
_NORMALIZER = (
    f"[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /b/normalizer.cc:235 {_LOCALE} "
    "Failed to construct locale with name:xx"
)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (_ADD, "Add node 'add': axis == 1 || axis == largest was false. Attempting to broadcast by 3 by 4."),
        (_GATHER, "Gather node 'g': indices element out of data bounds, idx=9."),
        (_EXPAND, "Expand node: Tensor shape.Size() must be >= 0."),
        (_RELU, "Relu node: Missing Input: x."),
        (_NORMALIZER, "Failed to construct locale with name:xx."),
        (f"/b/core/common/safeint.h:17 {_OVERFLOW} Integer overflow\n", "Integer overflow."),
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from /srv/m.onnx failed:Not one.", "Not one."),
        ('External data path does not exist: "/srv/models/a/ext.bin"', 'External data path does not exist: "ext.bin".'),
        ("shape (2, 3) and ratio 3/4 at 0x7fb7aa98a410", "shape (2, 3) and ratio 3/4 at an address."),
    ],
)
def test_texts_keep_the_reason_and_lose_the_rest(raw: str, wanted: str) -> None:
    assert clean(raw) == wanted


def test_texts_are_bounded() -> None:
    for text in ("x" * 10**6, "(" * 10**6, "/x" * 10**6, "a.cc:1 " * 10**5, "a::b(" * 10**5):
        assert len(clean(text)) <= MAX_CHARS


def test_an_input_that_the_graph_refuses_is_the_callers() -> None:
    error = run_error(RuntimeError(_GATHER))
    assert isinstance(error, InputRejected)
    assert error.message == "The model refused this input: Gather node 'g': indices element out of data bounds, idx=9."


def test_classes_of_the_runtime_are_known() -> None:
    """They are what runs by name raise, as those of strings; none of them is a RuntimeError."""
    error = run_error(RuntimeException(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {_GATHER}"))
    assert isinstance(error, InputRejected)
    assert error.message == "The model refused this input: Gather node 'g': indices element out of data bounds, idx=9."


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError(f"{_NODE} Expand node. Name:'' Status Message: /b/bfc_arena.cc:360 Failed to allocate memory"),
        RuntimeError(f"{_NODE} Conv node. Name:'' Status Message: CUDA failure 2: out of memory ; GPU=0"),
        RuntimeError(f"{_NODE} Gemm node. Name:'' Status Message: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_memory_is_told_apart(error: BaseException) -> None:
    assert isinstance(run_error(error), OutOfMemory)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"{_NODE} Conv node. Name:'c' Status Message: CUDA failure 700: an illegal memory access"),
        RuntimeError("something else at /opt/secret/place"),
        ValueError(_GATHER),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
)
def test_the_rest_is_ours_and_says_nothing(error: BaseException) -> None:
    told = run_error(error)
    assert type(told) is RuntimeFailure
    assert told.message == "The runtime failed while running the model."
