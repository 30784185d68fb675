"""What the configuration compiles to for the server itself: plain frozen values, defaults included.

Durations are seconds (floats) where asyncio takes them, sizes are bytes, addresses are (host, port).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.config.capture_options import CaptureSettings
from server.delivery.options import DeliverySettings
from server.mlflow.options import MlflowOptions
from server.types import RequestLimits

Address = tuple[str, int]


@dataclass(slots=True, frozen=True)
class TraceSettings:
    """Spans and metrics sent over OTLP/HTTP. Off by default; ``endpoint`` is the receiver's base URL."""

    enabled: bool = False
    sampling: float = 1.0
    endpoint: str = ""
    service_name: str = "tidegate"
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(slots=True, frozen=True)
class ReloadSettings:
    """How changes of the configuration file are noticed, and what becomes of versions that are replaced.

    ``drain_s``: how long requests may hold one; ``keep_warm_s``: how long it then stays loaded, 0: not at all.
    ``history``: how many generations keep their text.
    """

    watch: bool = True
    debounce_s: float = 0.2
    drain_s: float = 30.0
    keep_warm_s: float = 900.0
    history: int = 20


@dataclass(slots=True, frozen=True)
class TelemetrySettings:
    """Logs and traces. ``decisions``: the share of routing decisions that are logged, in 1/10,000."""

    log_format: str = "json"  # json | text
    log_level: str = "info"  # debug | info | warning | error
    traces: TraceSettings = field(default_factory=TraceSettings)
    decisions: int = 0


@dataclass(slots=True, frozen=True)
class TlsSettings:
    """PEM files for the inference listeners; ``client_ca`` asks clients for a certificate."""

    certificate: Path
    private_key: Path
    client_ca: Path | None = None


@dataclass(slots=True, frozen=True)
class ServerSettings:
    """Everything ``serve`` needs besides the models. Port 0 means: pick a free one."""

    name: str = "tidegate"
    http: Address = ("127.0.0.1", 8000)
    grpc: Address = ("127.0.0.1", 8001)
    metrics: Address = ("127.0.0.1", 8002)
    admin: Address = ("127.0.0.1", 8003)
    transport: str = "native"  # native | reference
    #: Open the HTTP address only; the native transport answers gRPC on it too.
    single_port: bool = False
    workers: int = 1
    in_process: bool = False
    limits: RequestLimits = field(default_factory=RequestLimits)
    #: Inference requests in flight, over all models and protocols; more are refused.
    max_pending: int = 4096
    #: Bytes of answers that wait for their readers, over all connections; over it requests are refused.
    max_unsent_bytes: int = 256 * 1024 * 1024
    max_connections: int = 10_000
    #: HTTP/2 streams per connection; on the reference transport at most 100.
    max_concurrent_streams: int = 1000
    #: See ``server.gateway.polling``; 0: never.
    busy_poll_ns: int = 200_000
    #: See ``config.model.Connections``.
    idle_s: float = 75.0
    ping_after_s: float = 60.0
    ping_timeout_s: float = 20.0
    max_connection_age_s: float = 0.0
    #: Shed load with 429 / RESOURCE_EXHAUSTED instead of 503 / UNAVAILABLE.
    shed_as_429: bool = False
    strict_json: bool = False
    #: Parse and write JSON of over ``offload_bytes`` in a process of its own, else on threads.
    codec_process: bool = True
    offload_bytes: int = 64 * 1024
    drain_seconds: float = 30.0
    model_control: str = "none"  # none | poll | explicit
    load_models: tuple[str, ...] = ()
    poll_seconds: float = 15.0
    #: Serve the registry in ``state_dir``, by alias; done in any case when nothing else is named.
    embedded_registry: bool = False
    registry_poll_seconds: float = 1.0
    #: Serve the registered models of an MLflow server, by alias, in place of the registry in ``state_dir``.
    mlflow: MlflowOptions | None = None
    reload: ReloadSettings = field(default_factory=ReloadSettings)
    #: A directory in Triton/KServe layout or one model file; None when every model has its own source.
    model_repository: Path | None = None
    state_dir: Path = Path("tidegate-state")
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    tls: TlsSettings | None = None
    admin_token: str | None = field(default=None, repr=False)
    delivery: DeliverySettings = field(default_factory=DeliverySettings)
    #: None: nothing is captured.
    capture: CaptureSettings | None = None

    def listeners(self) -> dict[str, Address]:
        """The four addresses by their names."""
        return {"http": self.http, "grpc": self.grpc, "metrics": self.metrics, "admin": self.admin}
