"""What a runtime is to the rest of the server: load a version, run batches, close. No framework is imported here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from server.runtime.upstream_options import UpstreamOptions
from server.types import Buffer, ModelSpec, ParameterValue, Tensor


@dataclass(slots=True, frozen=True)
class Provider:
    """An execution provider by its short name (``cpu``, ``cuda``, ``tensorrt``) with options passed through as text."""

    name: str
    options: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, frozen=True)
class QueuePolicy:
    """Triton's ModelQueuePolicy: what becomes of a request that waits too long, how many may wait (0: no own bound)."""

    timeout_action: str = "REJECT"  # or "DELAY"
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


@dataclass(slots=True, frozen=True)
class BatchingOptions:
    """How requests of one version are gathered. The defaults are greedy: whatever waits when the engine comes free."""

    enabled: bool = True
    #: Rows gathered at most; 0 means: learn it at warm-up (never over max_batch_size).
    max_rows: int = 0
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_queue_policy: QueuePolicy = QueuePolicy()
    priority_queue_policy: Mapping[int, QueuePolicy] = field(default_factory=dict)
    #: Requests that may wait for one version in all; over it: QueueFull.
    max_queue_size: int = 1024
    #: input name -> ascending sizes of its variable (non-batch) axis; shorter rows are padded up to the next size.
    buckets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    #: input name -> value used for padding (default 0).
    pad_values: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class WarmupInput:
    """One input of a warm-up sample: zeros, random values, or raw data read from the model's ``warmup`` folder."""

    datatype: str
    dims: tuple[int, ...]
    source: str = "zero"  # "zero" | "random" | file name inside the model's warmup/ folder


@dataclass(slots=True, frozen=True)
class WarmupSample:
    name: str
    batch_size: int
    inputs: Mapping[str, WarmupInput]
    count: int = 1


@dataclass(slots=True, frozen=True)
class DeclaredTensor:
    """An input or output as config.pbtxt declares it: dims without the batch axis when max_batch_size > 0."""

    name: str
    datatype: str = ""  # "" = take the graph's
    dims: tuple[int, ...] = ()
    reshape: tuple[int, ...] | None = None
    label_filename: str = ""
    optional: bool = False


@dataclass(slots=True, frozen=True)
class ModelOptions:
    """Everything an operator may say of one version, from config.pbtxt or YAML, compiled to plain values.

    ``max_batch_size`` None means: nothing declared, find out from the graph whether and how it batches.
    """

    max_batch_size: int | None = None
    inputs: tuple[DeclaredTensor, ...] = ()
    outputs: tuple[DeclaredTensor, ...] = ()
    providers: tuple[Provider, ...] = (Provider("cpu"),)
    #: When a provider is missing: False = the load fails and says which; True = go on with those that work, and say so.
    allow_provider_fallback: bool = False
    device_ids: tuple[int, ...] = ()
    instances: int = 1
    graph_optimization: str = "all"  # disable | basic | extended | all
    intra_op_threads: int = 1
    inter_op_threads: int = 1
    parallel_execution: bool = False
    allow_spinning: bool = False
    session_config: tuple[tuple[str, str], ...] = ()
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    warmup: tuple[WarmupSample, ...] = ()
    #: Version policy: ("latest", n) | ("all",) | ("specific", "1", "3")
    version_policy: tuple[str, ...] = ("latest", "1")
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    filename: str = "model.onnx"


class ListedFile(Protocol):
    """What a manifest says of one file: bytes, and SHA-256 in lower-case hex."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...


@dataclass(slots=True, frozen=True)
class InspectionLimits:
    """Bounds on a version's files, looked at before anything is built from them. The defaults fit any real model.

    ``allowed_custom_ops``: SHA-256 (hex) of the shared libraries that may lie beside the model or be loaded with it.
    """

    #: protobuf messages, and with them ONNX files, cannot be larger.
    max_model_bytes: int = 2**31 - 1
    #: The model file and all its external data.
    max_total_bytes: int = 1 << 38
    #: Fields of the ONNX file that are looked at: what bounds the time a hostile file can take.
    max_fields: int = 10_000_000
    #: protobuf's own bound of 100 nested messages leaves room for no more.
    max_graph_depth: int = 32
    max_external_files: int = 10_000
    max_folder_files: int = 10_000
    allowed_custom_ops: frozenset[str] = frozenset()


@dataclass(slots=True, frozen=True)
class LoadRequest:
    """One version to load. ``path`` is the ONNX file; ``folder`` the model's folder (labels, warm-up data), if any.

    ``state_dir``: where what was learned (batch size per model digest) and engine caches are kept; None = nowhere.
    ``limits``, ``listed``: see ``inspection.inspect_files``. ``expected_digest``: the digest that was admitted; other
    bytes are refused ("": any). ``custom_ops``: libraries of custom operators to load, each allowed by ``limits``.
    ``upstream``: the server that has the version; there is no file then, and ``path`` means nothing.
    """

    name: str
    version: str
    path: Path
    options: ModelOptions
    folder: Path | None = None
    state_dir: Path | None = None
    limits: InspectionLimits = InspectionLimits()
    listed: Mapping[str, ListedFile] | None = None
    expected_digest: str = ""
    custom_ops: tuple[Path, ...] = ()
    upstream: UpstreamOptions | None = None


@dataclass(slots=True)
class Batch:
    """One run. ``parts[i]`` holds, for input ``i`` of the spec, each member's contents in order; the engine joins them.
    With ``keep`` it may leave the whole in their place, one part of the same contents, for whoever reads it afterwards.

    ``shapes[i]`` is the joined shape of input i (dim 0 = ``rows`` when the model batches). An optional input that
    is absent has ``parts[i] is None``; all members of a batch agree on which are absent. A part is a raw buffer, or for
    BYTES a flat list of bytes.
    """

    rows: int
    shapes: list[tuple[int, ...]]
    parts: list[list[Buffer | list[bytes]] | None]
    keep: bool = False


class Engine(Protocol):
    """A loaded, warm version that can run batches. ``run`` blocks and may be called from any thread.

    At most ``instances`` calls run at once, each with its own ``instance`` index in 0..instances-1.
    """

    spec: ModelSpec
    instances: int
    #: Median run time of one row, measured warm, in ns: the batcher runs short models on the loop.
    run_ns: int
    #: Resident bytes gained by loading (best effort).
    memory_bytes: int

    def run(self, instance: int, batch: Batch) -> list[Tensor]:
        """One tensor per output of the spec, covering the whole batch; buffers are owned by the caller.

        Raises InputRejected, OutOfMemory or RuntimeFailure; the engine stays usable after each.
        """
        ...

    def close(self) -> None:
        """Free sessions and arenas. Idempotent; no run may be in progress."""
        ...


class Runtime(Protocol):
    """Loads versions. Blocking: call it off the loop."""

    def load(self, request: LoadRequest) -> Engine:
        """A warm engine, or ModelLoadError with one sentence saying why."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Facts for ``doctor``: library version, providers compiled in, providers that really work."""
        ...
