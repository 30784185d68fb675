"""What the file and flags become: plain settings and options, with the right precedence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from server.config.compile import (
    compile_defaults,
    compile_models,
    compile_settings,
    compile_versions,
    settings_from_flags,
)
from server.config.load import parse_config
from server.config.model import Config
from server.config.pbtxt import parse_pbtxt
from server.config.problems import InvalidConfig
from server.config.settings import ReloadSettings, ServerSettings, TlsSettings, TraceSettings
from server.errors import ConfigError
from server.runtime.base import ModelOptions, Provider, QueuePolicy, WarmupInput, WarmupSample
from server.types import RequestLimits

HEAD = "apiVersion: tidegate/v1\n"


def config(text: str, **environ: str) -> Config:
    return parse_config(HEAD + text, folder=Path("/conf"), environ=environ, repository_given=True)


def options(model: str, defaults: str = "{}") -> ModelOptions:
    return compile_models(config(f"defaults: {defaults}\nmodels: {{m: {{source: m.onnx, {model}}}}}\n"))["m"].options


def test_an_empty_file_changes_nothing() -> None:
    assert compile_settings(config("")) == ServerSettings() == compile_settings(None)
    assert compile_defaults(config("")) == ModelOptions() == compile_defaults(None)
    assert options("") == ModelOptions()


def test_every_server_key_arrives() -> None:
    text = """\
server:
  name: gate
  listeners: {http: "0.0.0.0:1", grpc: "[::1]:2", metrics: "localhost:3", admin: "127.0.0.1:4"}
  transport: reference
  single_port: true
  workers: 3
  in_process: true
  tls: {certificate: c.pem, private_key: k.pem, client_ca: /ca.pem}
  auth: {admin_token: "${T}"}
  limits: {max_body: 1MiB, max_headers: 2KiB, max_id: 3B, max_json_depth: 4, max_inputs: 5, max_outputs: 6, max_dims: 7,
           max_parameters: 8, max_chunks: 9, max_pending: 10, max_connections: 11, max_concurrent_streams: 12,
           overload_status: 429, max_unsent: 13KiB}
  connections: {idle: 5s, ping_after: 6s, ping_timeout: 7s, max_age: 1h}
  strict_json: true
  busy_poll: 100us
  codec: {process: false, offload_over: 1KiB}
  drain: 1500ms
  model_control: explicit
  load_models: [a]
telemetry:
  logs: {format: text, level: warning}
  traces: {enabled: true, sampling: 10%, endpoint: "https://o/v1/traces", service_name: s, headers: {h: "${T}"}}
  decisions: {sample: 0.5%}
state: {dir: state}
defaults: {reload: {watch: false, debounce: 1s, drain: 2s, keep_warm: 3m, history: 4}}
registry: {directory: models, embedded: true, poll_interval: 5s}
alerts: {max_pending: 5}
capture: {sample: 1%}
"""
    settings = compile_settings(config(text, T="secret"))
    assert settings.listeners() == {
        "http": ("0.0.0.0", 1), "grpc": ("::1", 2), "metrics": ("localhost", 3), "admin": ("127.0.0.1", 4),
    }  # fmt: skip
    assert settings.limits == RequestLimits(2**20, 4, 5, 6, 7, 8, 3, 9, 2048)
    assert settings.tls == TlsSettings(Path("/conf/c.pem"), Path("/conf/k.pem"), Path("/ca.pem"))
    assert settings.telemetry.traces == TraceSettings(True, 0.1, "https://o/v1/traces", "s", {"h": "secret"})
    default = ServerSettings()
    changed = {f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != getattr(default, f.name)}
    # Another server's registry excludes a folder and our own: test_mlflow.py has it.
    assert changed == {f.name for f in dataclasses.fields(settings)} - {"poll_seconds", "mlflow"}
    assert settings.reload == ReloadSettings(False, 1.0, 2.0, 180.0, 4)
    assert settings.telemetry.decisions == 50
    assert settings.name == "gate"
    assert (settings.idle_s, settings.ping_after_s, settings.ping_timeout_s) == (5, 6, 7)
    assert settings.max_connection_age_s == 3600
    assert (settings.codec_process, settings.offload_bytes) == (False, 1024)
    assert settings.max_unsent_bytes == 13 * 1024
    assert (settings.max_pending, settings.max_connections, settings.max_concurrent_streams) == (10, 11, 12)
    assert (settings.workers, settings.in_process, settings.transport) == (3, True, "reference")
    assert (settings.drain_seconds, settings.state_dir) == (1.5, Path("/conf/state"))
    assert (settings.model_control, settings.load_models) == ("explicit", ("a",))
    assert settings.model_repository == Path("/conf/models")
    assert "secret" not in repr(settings)
    assert settings.admin_token == "secret"


def test_poll_interval_arrives() -> None:
    assert compile_settings(config("server: {model_control: poll, poll_interval: 2s}")).poll_seconds == 2.0


def test_every_runtime_key_arrives() -> None:
    found = options(
        "runtime: {providers: [{name: tensorrt, options: {trt_fp16_enable: true, x: 5, y: z}}, cuda],"
        " allow_fallback: true, device_ids: [0, 1], instances: 4, graph_optimization: basic,"
        " session_config: {session.x: 1}, threads: {intra_op: 2, inter_op: 3, parallel: true, spinning: true}}"
    )
    assert found == ModelOptions(
        providers=(Provider("tensorrt", (("trt_fp16_enable", "1"), ("x", "5"), ("y", "z"))), Provider("cuda")),
        allow_provider_fallback=True,
        device_ids=(0, 1),
        instances=4,
        graph_optimization="basic",
        intra_op_threads=2,
        inter_op_threads=3,
        parallel_execution=True,
        allow_spinning=True,
        session_config=(("session.x", "1"),),
    )


def test_every_batching_key_arrives() -> None:
    found = options(
        "batching: {enabled: false, max_batch_size: 64, max_rows: 32, preferred_batch_sizes: [16, 8, 16],"
        " max_queue_delay: 2ms, preserve_ordering: true, max_queue_size: 7, buckets: {ids: [8, 16]},"
        " pad_values: {ids: -1}, queue_policy: {timeout: 1s, timeout_action: delay, allow_timeout_override: true,"
        " max_size: 3}, priority: {levels: 2, default: 1, queue_policies: {2: {timeout: 5us}}}}"
    )
    assert found.max_batch_size == 64
    batching = found.batching
    assert (batching.enabled, batching.max_rows, batching.preferred_batch_sizes) == (False, 32, (8, 16))
    assert (batching.max_queue_delay_us, batching.preserve_ordering, batching.max_queue_size) == (2000, True, 7)
    assert (batching.buckets, batching.pad_values) == ({"ids": (8, 16)}, {"ids": -1.0})
    assert batching.default_queue_policy == QueuePolicy("DELAY", 1_000_000, True, 3)
    assert (batching.priority_levels, batching.default_priority_level) == (2, 1)
    assert batching.priority_queue_policy == {2: QueuePolicy(default_timeout_us=5)}


def test_warmup_arrives() -> None:
    found = options(
        "warmup: [{name: w, batch_size: 2, count: 3, inputs: {x: {datatype: FP32, dims: [4], source: random},"
        " y: {datatype: BYTES, dims: [1], file: data}}}, {inputs: {x: {datatype: INT8, dims: []}}}]"
    )
    inputs = {"x": WarmupInput("FP32", (4,), "random"), "y": WarmupInput("BYTES", (1,), "data")}
    assert found.warmup[0] == WarmupSample("w", 2, inputs, 3)
    assert found.warmup[1] == WarmupSample("warmup", 0, {"x": WarmupInput("INT8", ())})


def test_golden_requests_arrive_from_the_folder_of_the_file() -> None:
    found = parse_config(
        "apiVersion: tidegate/v1\nregistry: {embedded: true}\nmodels: {a: {source: a.onnx, golden: g/a.json}, b: "
        "{versions: {1: {source: b.onnx}}, golden: [b.json, /c.json]}, c: {golden: c.json}, d: {source: d.onnx}}\n",
        folder=Path("/etc/tidegate"),
    )
    on_disk, by_version = compile_models(found), compile_versions(found)
    assert on_disk["a"].golden == (Path("/etc/tidegate/g/a.json"),)
    assert on_disk["d"].golden == ()
    assert by_version["b"].golden == (Path("/etc/tidegate/b.json"), Path("/c.json"))
    assert by_version["c"].golden == (Path("/etc/tidegate/c.json"),)


@pytest.mark.parametrize(
    ("policy", "compiled"),
    [("all", ("all",)), ("{latest: 3}", ("latest", "3")), ("{specific: [1, '20']}", ("specific", "1", "20"))],
)
def test_version_policies(policy: str, compiled: tuple[str, ...]) -> None:
    assert options(f"version_policy: {policy}").version_policy == compiled


def test_sources() -> None:
    text = "models: {a: {source: x/a.onnx}, b: {source: /abs/b}, c: {source: 'registry:entry'}, d: {}}\n"
    found = compile_models(config("registry: {directory: models, embedded: true, poll_interval: 5s}\n" + text))
    assert {name: model.source for name, model in found.items()} == {
        "a": Path("/conf/x/a.onnx"),
        "b": Path("/abs/b"),
        "c": Path("/conf/models/entry"),
        "d": Path("/conf/models/d"),
    }
    assert compile_models(config(text), repository=Path("/flag"))["d"].source == Path("/flag/d")
    with pytest.raises(ConfigError, match="model 'c' has no source"):
        compile_models(config(text))


def test_model_over_pbtxt_over_defaults() -> None:
    text = """\
defaults: {runtime: {instances: 2, threads: {intra_op: 3, inter_op: 4}}, batching: {max_queue_delay: 1ms, max_rows: 9}}
models: {m: {source: m, runtime: {threads: {intra_op: 8}}, batching: {max_queue_delay: 5ms}}}
"""
    model = compile_models(config(text))["m"]
    pbtxt = "max_batch_size: 16 instance_group { count: 6 } dynamic_batching { max_queue_delay_microseconds: 7 }"
    found = model.overlay.over(parse_pbtxt(pbtxt, model="m", base=model.defaults))
    assert found.intra_op_threads == 8
    assert found.batching.max_queue_delay_us == 5000
    assert (found.instances, found.max_batch_size) == (6, 16)
    assert (found.inter_op_threads, found.batching.max_rows) == (4, 9)


def test_a_model_says_nothing_of_what_it_leaves_open() -> None:
    model = compile_models(config("defaults: {version_policy: all}\nmodels: {m: {source: m, batching: {}}}\n"))["m"]
    assert model.overlay.options == {}
    assert model.overlay.batching == {}
    assert model.options.version_policy == ("all",)


def test_flags_stand_over_the_file() -> None:
    file = config(
        "server: {name: file, drain: 5s, listeners: {http: '127.0.0.1:1'}}\ntelemetry: {logs: {level: error}}\n"
    )
    settings = settings_from_flags(
        file, http="[::1]:0", server_name="flag", log_format="text", load_model=("a", "*"), model_control="explicit",
        model_repository=Path("m"), state_dir=Path("s"), workers=2, in_process=True, transport="native",
    )  # fmt: skip
    assert settings.http == ("::1", 0)
    assert (settings.name, settings.drain_seconds) == ("flag", 5.0)
    assert (settings.telemetry.log_format, settings.telemetry.log_level) == ("text", "error")
    assert (settings.load_models, settings.model_control) == (("a", "*"), "explicit")
    assert (settings.model_repository, settings.state_dir) == (Path("m"), Path("s"))
    assert (settings.workers, settings.in_process, settings.transport) == (2, True, "native")
    assert settings_from_flags(file) == compile_settings(file)
    assert settings_from_flags(None) == ServerSettings()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http": "8000"}, "--http: wanted HOST:PORT"),
        ({"grpc": "127.0.0.1:99999"}, "--grpc: wanted HOST:PORT"),
        ({"metrics": "::1:80"}, "--metrics: wanted HOST:PORT"),
        ({"admin": "127.0.0.1:8000"}, "--admin: 127.0.0.1:8000 is taken by http (127.0.0.1:8000)"),
        ({"workers": 0}, "--workers: wanted 1 to 1024, got 0"),
        ({"drain_seconds": -1.0}, "--drain-seconds: wanted 0 to 3600, got -1"),
        ({"drain_seconds": float("nan")}, "--drain-seconds: wanted 0 to 3600, got nan"),
        ({"transport": "quic"}, "--transport: wanted native or reference, got text 'quic'"),
        ({"model_control": "x"}, "--model-control: wanted none, poll or explicit, got text 'x'"),
        ({"log_level": "loud"}, "--log-level: wanted debug, info, warning or error, got text 'loud'"),
        ({"log_format": "xml"}, "--log-format: wanted json or text, got text 'xml'"),
        ({"server_name": ""}, "--server-name: wanted 1 to 255 characters, got 0"),
        ({"load_model": ("a",)}, "--load-model: needs --model-control explicit, which is none"),
        (
            {"load_model": ("../a",), "model_control": "explicit"},
            "--load-model: wanted a model's name, got text '../a'",
        ),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        settings_from_flags(None, **flags)
    assert caught.value.message.startswith(message)
    assert len(caught.value.problems) == 1


def test_all_wrong_flags_are_told_at_once() -> None:
    with pytest.raises(InvalidConfig) as caught:
        settings_from_flags(None, http="x", grpc="y", workers=-5, transport="z")
    assert [p.path for p in caught.value.problems] == ["--grpc", "--http", "--transport", "--workers"]
