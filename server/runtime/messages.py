"""ONNX Runtime's error texts, made fit for a caller: one sentence, no source files, no host paths, no addresses."""

from __future__ import annotations

import re

from server.errors import InputRejected, OutOfMemory, RuntimeFailure, TidegateError

MAX_CHARS = 400
#: A text may quote the caller's data; no more of it than this is looked at.
_MAX_RAW_CHARS = 8000

_STATUS = re.compile(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_NOISE = re.compile(
    r"Error in execution: |Exception during initialization: |Load model from .*? failed:|"
    r"Please fix either the inputs/outputs or the model\.|Name:'' "
)
_FAILED_NODE = re.compile(
    r"Non-zero status code returned while running (\S+) node\. (?:Name:'([^']*)' )?Status Message: "
)
#: ``/build/tensor.cc:57 `` or ``tensor.cc:57 ``: the start of a source location.
_SOURCE = re.compile(r"(?<![\w./\\-])[\w./\\-]+\.(?:cc|cpp|cuh?|hp?p?):\d+ ")
#: What may stand between a parameter list and the message: ``const``, ``::<lambda()>``, ``[with T = ...]``.
_AFTER_PARAMETERS = re.compile(r"(?:::<lambda\([^>]*\)>|::operator\(\)\([^)]*\)| const| noexcept| \[with [^\]]*\])*\s+")
_FUNCTION_NAME = re.compile(r"[A-Za-z_]\w* ")
_QUOTED_PATH = re.compile(r"(?<![\w.])(?:/[^\s/\"':,]+)+/([^\s/\"':,]+)")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")

_NO_MEMORY = re.compile(
    r"bad_alloc|Failed to allocate memory|out of memory|STATUS_ALLOC_FAILED|CUDA_ERROR_OUT_OF_MEMORY",
    re.IGNORECASE,
)
_DEVICE = re.compile(r"CUDA|CUDNN|CUBLAS|TensorRT|NCCL|hipError|NOT_IMPLEMENTED", re.IGNORECASE)
_REFUSED = re.compile(
    r"while running \S+ node|Invalid rank for input|Got invalid dimensions for input|Integer overflow"
)


def clean(text: str) -> str:
    """One sentence that keeps the node and the reason, ends with a full stop and is at most MAX_CHARS long."""
    text = _STATUS.sub("", text[:_MAX_RAW_CHARS])
    text = _FAILED_NODE.sub(_node_prefix, text)
    text = _drop_source_locations(text)
    text = _NOISE.sub("", text)
    text = _QUOTED_PATH.sub(r"\1", text)
    text = _ADDRESS.sub("an address", text)
    text = " ".join(text.split())
    if len(text) > MAX_CHARS:
        text = text[: MAX_CHARS - 3].rstrip() + "..."
    return text if text.endswith(".") else f"{text}."


def run_error(error: BaseException) -> TidegateError:
    """The domain error for an exception raised by a run: the caller's input, the device's memory, or neither."""
    text = str(error)[:_MAX_RAW_CHARS]
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return OutOfMemory("The device has not enough memory for this batch.")
    if _is_runtimes(error) and _REFUSED.search(text) and not _DEVICE.search(text):
        return InputRejected(f"The model refused this input: {clean(text)}")
    return RuntimeFailure("The runtime failed while running the model.")


def _is_runtimes(error: BaseException) -> bool:
    """Bound runs raise RuntimeError; runs by name, as those of strings, raise classes of ONNX Runtime's own."""
    return isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")


def _node_prefix(match: re.Match[str]) -> str:
    operator, node = match.groups()
    return f"{operator} node '{node}': " if node else f"{operator} node: "


def _drop_source_locations(text: str) -> str:
    """Remove every ``file.cc:12 type function(parameters) `` and ``file.cc:12 Function ``."""
    kept: list[str] = []
    while match := _SOURCE.search(text):
        kept.append(text[: match.start()])
        text = text[_after_function(text, match.end()) :]
    kept.append(text)
    return "".join(kept)


def _after_function(text: str, start: int) -> int:
    """Where the message begins behind a function's name or signature that stands at ``start``."""
    bare = _FUNCTION_NAME.match(text, start)
    end = _end_of_parameters(text, start)
    if end is not None:
        trailing = _AFTER_PARAMETERS.match(text, end)
        if trailing is not None:
            return trailing.end()
    return bare.end() if bare is not None else start


def _end_of_parameters(text: str, start: int) -> int | None:
    """Past the balanced parameter list of a C++ signature, or None when a plain name stands there."""
    signature = text.replace("operator()", "operator__", 1)
    opening = signature.find("(", start)
    # A signature qualifies its name or gives a return type; a message that merely has brackets further on does not.
    if opening < 0 or "::" not in signature[start:opening]:
        return None
    depth = 0
    for position in range(opening, len(signature)):
        depth += {"(": 1, ")": -1}.get(signature[position], 0)
        if depth == 0:
            return position + 1
    return None
