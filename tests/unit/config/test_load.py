"""A file's mistakes: all at once, each at its line and column, and nothing but InvalidConfig."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from server.config.load import MAX_BYTES, load_config, parse_config, unloadable
from server.config.model import Config
from server.config.problems import InvalidConfig, Problem
from server.errors import ConfigError, ModelLoadError

HEAD = "apiVersion: tidegate/v1\n"

BAD = """\
apiVersion: tidegate/v2
server:
  nmae: gateway
  name: no
  listeners:
    http: 8000
    grpc: 127.0.0.1:70000
    metrics: 127.0.0.1:9000
    admin: 0.0.0.0:9000
  auth: {admin_token: hunter2}
  limits:
    max_body: 64
    max_inputs: 0
    max_dims: "32"
  drain: 5 minutes
  model_control: pol
  load_models: [fraud, "a b"]
telemetry:
  traces:
    enabled: true
    sampling: 0.5
state:
models:
  fraud:
    batching:
      max_batch_size: 010
      max_rows: 4
      preferred_batch_sizes: [2, 8]
      buckets: {ids: [64, 32]}
      pad_values: {mask: 0}
      priority: {levels: 2}
    rollouts: {candidate: "2"}
  "a b":
    source: x.onnx
  ranker:
    source: ${HOME}/x.onnx
    version_policy: newest
    runtime:
      providers: [cpu, gpu]
      instances: two
      threads: [1, 2]
      allow_fallback: maybe
    source: again.onnx
    warmup:
      - inputs: {x: {dims: [1, 0]}}
"""

# (line, column, key, start of the message)
EXPECTED = [
    (1, 13, "apiVersion", "wanted 'tidegate/v1', got text 'tidegate/v2'"),
    (3, 3, "server.nmae", "unknown key; did you mean name?"),
    (4, 9, "server.name", "plain no is a boolean in some YAML versions"),
    (6, 11, "server.listeners.http", "wanted HOST:PORT, such as 127.0.0.1:8000 or [::1]:0, got number 8000"),
    (7, 11, "server.listeners.grpc", "wanted HOST:PORT"),
    (9, 12, "server.listeners.admin", "0.0.0.0:9000 is taken by metrics (127.0.0.1:9000)"),
    (10, 23, "server.auth.admin_token", "a secret is given as ${VARIABLE} or file:/path"),
    (12, 15, "server.limits.max_body", "wanted a size with a unit, such as 512B, 64KiB or 64MiB, got number 64"),
    (13, 17, "server.limits.max_inputs", "wanted at least 1, got number 0"),
    (14, 15, "server.limits.max_dims", "wanted a whole number, got text '32'"),
    (15, 10, "server.drain", "wanted a duration with a unit, such as 200ms, 30s or 5m, got text '5 minutes'"),
    (16, 18, "server.model_control", "wanted 'none', 'poll' or 'explicit', got text 'pol'; did you mean poll?"),
    (17, 24, "server.load_models[1]", "wanted a model name (letters, digits,"),
    (20, 14, "telemetry.traces.enabled", "traces need an endpoint, such as http://127.0.0.1:4318/v1/traces"),
    (21, 15, "telemetry.traces.sampling", "wanted a percentage, such as 5% or 0.1%, got number 0.5"),
    (22, 7, "state", "wanted a value, got nothing"),
    (24, 3, "models.fraud", "the model has no source, and there is no registry.directory to find it in"),
    (26, 23, "models.fraud.batching.max_batch_size", "plain '010' is a number in some YAML versions"),
    (28, 34, "models.fraud.batching.preferred_batch_sizes[1]", "preferred batch size 8 is over max_rows 4"),
    (29, 27, "models.fraud.batching.buckets.ids[1]", "bucket sizes ascend, but 32 follows 64"),
    (30, 26, "models.fraud.batching.pad_values.mask", "input 'mask' has no buckets to pad to"),
    (31, 7, "models.fraud.batching.priority.default", "required key is missing"),
    (32, 5, "models.fraud.rollouts", "unknown key; did you mean rollout?"),
    (33, 3, 'models."a b"', "wanted a model name (letters, digits,"),
    (36, 13, "models.ranker.source", "${...} is only replaced in keys that hold secrets; this one does not"),
    (
        37,
        21,
        "models.ranker.version_policy",
        "wanted all, {latest: N} or {specific: [VERSION, ...]}, got text 'newest'",
    ),
    (39, 24, "models.ranker.runtime.providers[1]", "wanted 'cpu', 'cuda' or 'tensorrt', got text 'gpu'"),
    (40, 18, "models.ranker.runtime.instances", "wanted a whole number, got text 'two'"),
    (41, 16, "models.ranker.runtime.threads", "wanted a mapping, got a list"),
    (42, 23, "models.ranker.runtime.allow_fallback", "wanted true or false, got text 'maybe'"),
    (43, 5, "models.ranker.source", "duplicate key, first given in line 36"),
    (45, 18, "models.ranker.warmup[0].inputs.x.datatype", "required key is missing"),
    (45, 32, "models.ranker.warmup[0].inputs.x.dims[1]", "wanted at least 1, got number 0"),
]


def problems(text: str, **options: bool) -> list[Problem]:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(text, environ={}, **options)
    return caught.value.problems


def mistakes(text: str) -> list[Problem]:
    """The same for a text that may have none."""
    try:
        parse_config(text, environ={})
    except InvalidConfig as error:
        return error.problems
    return []


def said(text: str) -> dict[str, str]:
    """{key path: message} of what is wrong with ``text`` under a right head."""
    return {problem.key: problem.message for problem in problems(HEAD + text)}


def test_golden_requests_belong_to_the_model_behind_a_name() -> None:
    text = "models: {m: {source: m.onnx}, n: {model: m, golden: g.json}}\n"
    assert said(text) == {"models.n.golden": "golden belongs to the model, 'm', not to another name of its versions"}


def test_every_mistake_of_a_large_file_at_once_and_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    with pytest.raises(InvalidConfig) as caught:
        load_config(path, environ={})
    found = caught.value.problems
    assert [(p.line, p.column, p.key) for p in found] == [entry[:3] for entry in EXPECTED]
    for problem, entry in zip(found, EXPECTED, strict=True):
        assert problem.message.startswith(entry[3])
    assert {problem.path for problem in found} == {str(path)}
    assert caught.value.message.count("\n") == len(EXPECTED) - 1
    assert "hunter2" not in caught.value.message


def test_each_reported_place_holds_what_is_complained_about() -> None:
    """The column is counted by hand above; here the text at the place is looked at."""
    lines = BAD.splitlines()
    at = {p.key: lines[p.line - 1][p.column - 1 :] for p in problems(BAD)}
    assert at["server.limits.max_inputs"] == "0"
    assert at["models.ranker.runtime.providers[1]"] == "gpu]"
    assert at["models.fraud.batching.buckets.ids[1]"] == "32]}"
    assert at["server.nmae"] == "nmae: gateway"


@pytest.mark.parametrize(
    ("model", "version", "place", "key"),
    [
        ("m", "2", (4, 38), 'models.m.versions."2".source'),
        ("m", "3", (2, 11), "models.m"),
        ("n", "", (6, 16), "models.n.source"),
        ("n", "1", (6, 16), "models.n.source"),
        ("o", "1", (7, 12), "models.o"),
        ("elsewhere", "1", (0, 0), ""),
        ("", "", (0, 0), ""),
    ],
)
def test_a_failed_load_has_the_place_that_asked_for_it(
    model: str, version: str, place: tuple[int, int], key: str
) -> None:
    text = """apiVersion: tidegate/v1
models: { m: {
            versions: {"1": {source: a.onnx},
                       "2": {source: b.onnx}}},
          n: {
       source: c.onnx},
           o: {model: m}}
"""
    parse_config(text)
    refused = unloadable(ModelLoadError("It is down.", model=model, version=version), text, path="t.yaml")
    assert refused.problems == [Problem("t.yaml", *place, key, "It is down.")]
    assert (refused.message, refused.model, refused.version) == ("It is down.", model, version)


def test_the_smallest_file() -> None:
    config = parse_config(HEAD)
    assert isinstance(config, Config)
    assert config.models == {}


def test_a_right_file_of_every_section(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    text = (
        HEAD
        + """\
server:
  name: gate
  listeners: {http: "0.0.0.0:80", grpc: "[::1]:0", metrics: "localhost:0", admin: "127.0.0.1:0"}
  tls: {certificate: cert.pem, private_key: /etc/key.pem}
  auth: {admin_token: file:token}
  limits: {max_body: 1GiB, max_pending: 10}
  drain: 1.5s
  model_control: explicit
  load_models: [fraud, "*"]
telemetry:
  logs: {format: text, level: debug}
  traces: {enabled: true, sampling: 5%, endpoint: "http://collector:4318/v1/traces", headers: {x-key: "${KEY}"}}
state: {dir: var}
registry: {directory: models}
defaults:
  batching: &batching {max_queue_delay: 2ms}
models:
  fraud:
    source: fraud.onnx
    batching: {<<: *batching, max_batch_size: 8}
    version_policy: all
"""
    )
    path = tmp_path / "tidegate.yaml"
    path.write_text(text)
    config = load_config(path, environ={"KEY": "value"})
    assert config.server.listeners.grpc == ("::1", 0)
    assert config.server.tls is not None
    assert config.server.tls.certificate == tmp_path / "cert.pem"
    assert config.server.tls.private_key == Path("/etc/key.pem")
    assert config.server.auth is not None
    assert config.server.auth.admin_token == "s3cret"
    assert config.server.limits.max_body == 2**30
    assert config.server.drain == 1_500_000_000
    assert config.telemetry.traces.headers == {"x-key": "value"}
    assert config.telemetry.traces.sampling == 0.05
    assert config.state.dir == tmp_path / "var"
    assert config.models["fraud"].batching.max_queue_delay == 2_000_000
    assert config.models["fraud"].batching.max_batch_size == 8
    assert config.models["fraud"].source is not None
    assert config.models["fraud"].source.path == tmp_path / "fraud.onnx"


def test_secrets_are_in_no_text_form_of_the_configuration() -> None:
    text = HEAD + 'server: {auth: {admin_token: "${T}"}}\ntelemetry: {traces: {headers: {k: "${T}"}}}\n'
    config = parse_config(text, environ={"T": "hunter2"})
    assert config.server.auth is not None
    assert config.server.auth.admin_token == "hunter2"
    assert "hunter2" not in repr(config)


@pytest.mark.parametrize(
    ("secret", "environ", "reason"),
    [
        ("${T}", {}, "environment variable T is not set"),
        ("${T}", {"T": ""}, "environment variable T is empty"),
        ("file:missing", {}, "cannot be read: No such file or directory"),
        ("file:.", {}, "cannot be read: Is a directory"),
        ("file:empty", {}, "is empty"),
        ("file:binary", {}, "is not UTF-8 text"),
        ("file:long", {}, "is too long"),
        ("hunter2", {}, "never as the value itself"),
        ("x${T}", {"T": "hunter2"}, "never as the value itself"),
        ("${T", {}, "never as the value itself"),
        ("${}", {}, "never as the value itself"),
        ("5", {}, "never as the value itself"),
    ],
)
def test_secrets_that_cannot_be_had(tmp_path: Path, secret: str, environ: dict[str, str], reason: str) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "long").write_text("x" * 100_000)
    text = f"{HEAD}server:\n  auth:\n    admin_token: {secret}\n"
    with pytest.raises(InvalidConfig) as caught:
        parse_config(text, folder=tmp_path, environ=environ)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column, problem.key) == (4, 18, "server.auth.admin_token")
    assert reason in problem.message
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize("text", ["server: {auth: hunter2}", "telemetry: {traces: {headers: hunter2}}"])
def test_a_secret_in_the_wrong_place_is_not_shown(text: str) -> None:
    (problem,) = problems(HEAD + text)
    assert "wanted a mapping, got a value that is not shown" in problem.message


@pytest.mark.parametrize("section", ["capture"])
def test_sections_that_are_not_built_are_unknown(section: str) -> None:
    found = said(f"models: {{m: {{source: m.onnx, {section}: {{}}}}}}\n")
    assert found[f"models.m.{section}"].startswith("unknown key")


def test_hints_come_from_the_section_at_hand() -> None:
    text = (
        "models: {runtime: {sorce: x, source: y.onnx, batching: {bukets: {}}, runtime: {thread: {}}}}\ntelemetri: {}\n"
    )
    assert said(text) == {
        "models.runtime.sorce": "unknown key; did you mean source?",
        "models.runtime.batching.bukets": "unknown key; did you mean buckets?",
        "models.runtime.runtime.thread": "unknown key; did you mean threads?",
        "telemetri": "unknown key; did you mean telemetry?",
    }
    text = "models: {m: {source: m.onnx, warmup: [{inputs: {x: {datatype: FP32, dims: [1], dimz: 1}}}]}}\n"
    assert said(text) == {"models.m.warmup[0].inputs.x.dimz": "unknown key; did you mean dims?"}
    priority = "{levels: 1, default: 1, queue_policies: {1: {timout: 1s}}}"
    text = f"models: {{m: {{source: m.onnx, batching: {{priority: {priority}}}}}}}\n"
    assert said(text) == {'models.m.batching.priority.queue_policies."1".timout': "unknown key; did you mean timeout?"}


@pytest.mark.parametrize(
    ("listeners", "key"),
    [
        ("{http: '127.0.0.1:8001'}", "http"),
        ("{grpc: '127.0.0.1:8000'}", "grpc"),
        ("{http: '127.0.0.1:1', grpc: '127.0.0.1:1'}", "grpc"),
        ("{http: '0.0.0.0:1', grpc: '127.0.0.1:1'}", "grpc"),
        ("{http: '127.0.0.1:1', grpc: '[::]:1'}", "grpc"),
    ],
)
def test_listeners_that_fight_for_a_port(listeners: str, key: str) -> None:
    (found,) = problems(f"{HEAD}server: {{listeners: {listeners}}}\n")
    assert found.key == f"server.listeners.{key}"
    assert "is taken by" in found.message


@pytest.mark.parametrize(
    "listeners",
    [
        "{http: '127.0.0.1:0', grpc: '127.0.0.1:0'}",
        "{http: '127.0.0.1:1', grpc: '127.0.0.2:1'}",
        "{http: '[::1]:8001'}",
    ],
)
def test_listeners_that_do_not(listeners: str) -> None:
    parse_config(f"{HEAD}server: {{listeners: {listeners}}}\n")


@pytest.mark.parametrize(
    ("model", "key", "reason"),
    [
        ("source: 'registry:x'", "source", "needs registry.directory"),
        ("source: 'registry:../x'", "source", "wanted a model name"),
        ("source: ''", "source", "wanted a path"),
        ("batching: {max_batch_size: 4, max_rows: 8}", "batching.max_rows", "over max_batch_size 4"),
        ("batching: {max_batch_size: 0, max_queue_delay: 1ms}", "batching.max_queue_delay", "max_batch_size is 0"),
        ("batching: {max_queue_delay: 61s}", "batching.max_queue_delay", "wanted 0s to 60s, got 61s"),
        ("batching: {max_queue_size: 0}", "batching.max_queue_size", "wanted at least 1"),
        ("batching: {buckets: {x: []}}", "batching.buckets.x", "wanted a length of at least 1"),
        ("batching: {priority: {levels: 2, default: 3}}", "batching.priority.default", "over levels 2"),
        (
            "batching: {priority: {levels: 2, default: 1, queue_policies: {3: {}}}}",
            'batching.priority.queue_policies."3"',
            "wanted a level from 1 to 2, got 3",
        ),
        (
            "batching: {queue_policy: {timeout_action: delay}}",
            "batching.queue_policy.timeout_action",
            "needs a timeout",
        ),
        ("version_policy: {}", "version_policy", "wanted all, "),
        ("version_policy: {all: true}", "version_policy", "wanted all, "),
        ("version_policy: {latest: 1, specific: [1]}", "version_policy", "wanted one of latest and specific"),
        ("version_policy: {latest: 0}", "version_policy.latest", "wanted at least 1"),
        ("version_policy: {specific: [1, x]}", "version_policy.specific[1]", "wanted a version (a positive integer)"),
        ("version_policy: {specific: [1, '1']}", "version_policy.specific[1]", "version 1 is named twice"),
        ("version_policy: {specific: [true]}", "version_policy.specific[0]", "got boolean true"),
        ("runtime: {providers: []}", "runtime.providers", "wanted a length of at least 1"),
        ("runtime: {providers: [cpu, cpu]}", "runtime.providers[1]", "named twice"),
        ("runtime: {providers: [5]}", "runtime.providers[0]", "wanted a provider's name"),
        ("runtime: {providers: [{options: {}}]}", "runtime.providers[0].name", "required key is missing"),
        ("runtime: {device_ids: [0]}", "runtime.device_ids", "need cuda or tensorrt"),
        ("runtime: {allow_fallback: true}", "runtime.allow_fallback", "second provider"),
        ("runtime: {instances: true}", "runtime.instances", "wanted a whole number, got boolean true"),
        ("runtime: {instances: 1.0}", "runtime.instances", "wanted a whole number, got number 1.0"),
        ("runtime: {session_config: {a: [1]}}", "runtime.session_config.a", "wanted text, got a list"),
        ("warmup: [{inputs: {}}]", "warmup[0].inputs", "wanted a length of at least 1"),
        ("golden: 5", "golden", "wanted a path or a list of paths, got number 5"),
        ("golden: [a.json, '']", "golden[1]", "wanted a path"),
        ("warmup: [{inputs: {x: {datatype: float, dims: [1]}}}]", "warmup[0].inputs.x.datatype", "wanted one of BF16"),
        (
            "warmup: [{inputs: {x: {datatype: FP32, dims: [1], file: ../x}}}]",
            "warmup[0].inputs.x.file",
            "wanted text that matches",
        ),
        (
            "warmup: [{inputs: {x: {datatype: FP32, dims: [1], file: x, source: zero}}}]",
            "warmup[0].inputs.x.file",
            "either source or file",
        ),
        (
            "warmup: [{inputs: {x: {datatype: BYTES, dims: [1], source: random}}}]",
            "warmup[0].inputs.x.source",
            "BYTES cannot be random",
        ),
        (
            "{batching: {max_batch_size: 2}, warmup: [{batch_size: 3, inputs: {x: {datatype: FP32, dims: [1]}}}]}",
            "warmup[0].batch_size",
            "over max_batch_size 2",
        ),
        ("batching: {pad_values: {x: .nan}, buckets: {x: [1]}}", "batching.pad_values.x", "not a finite number"),
        ("batching: {enabled: null}", "batching.enabled", "wanted a value, got nothing"),
    ],
)
def test_mistakes_of_models(model: str, key: str, reason: str) -> None:
    body = model.removeprefix("{").removesuffix("}") if model.startswith("{") else model
    source = "" if model.startswith("source:") else "source: m.onnx, "
    (problem,) = problems(f"{HEAD}models: {{m: {{{source}{body}}}}}\n")
    assert problem.key == f"models.m.{key}"
    assert reason in problem.message
    assert problem.line == 2


@pytest.mark.parametrize(
    ("server", "key", "reason"),
    [
        ("load_models: [m]", "load_models", "needs model_control: explicit, which is none"),
        ("poll_interval: 5s", "poll_interval", "needs model_control: poll, which is none"),
        ("{model_control: explicit, load_models: [m, x]}", "load_models[1]", "'x' is not in models"),
        ("workers: 0", "workers", "wanted at least 1"),
        ("drain: 2h", "drain", "wanted 0s to 1h, got 2h"),
        ("name: ''", "name", "wanted a length of at least 1"),
        ("name: 5", "name", "wanted text, got number 5; put it in quotes"),
        ("tls: {certificate: a.pem}", "tls.private_key", "required key is missing"),
        ("limits: {max_headers: 1GiB}", "limits.max_headers", "wanted 1KiB to 1MiB, got 1GiB"),
    ],
)
def test_mistakes_of_the_server(server: str, key: str, reason: str) -> None:
    body = server if server.startswith("{") else f"{{{server}}}"
    found = problems(f"{HEAD}server: {body}\nmodels: {{m: {{source: m.onnx}}}}\n")
    assert [problem.key for problem in found] == [f"server.{key}"]
    assert reason in found[0].message


@pytest.mark.parametrize("endpoint", ["collector:4318", "http://", "ftp://x/", "http:// x"])
def test_trace_endpoints_are_urls(endpoint: str) -> None:
    found = said(f"telemetry: {{traces: {{endpoint: '{endpoint}'}}}}\n")
    assert "wanted text that matches" in found["telemetry.traces.endpoint"]


def test_rules_are_silent_about_what_a_mistake_took_away() -> None:
    assert set(said("registry: {directory: 5}\nmodels: {m: {}}\n")) == {"registry.directory"}
    assert set(said("models: {m: {source: 5}}\n")) == {"models.m.source"}
    assert set(said("server: {model_control: x, load_models: [m]}\nregistry: {directory: d}\n")) == {
        "server.model_control"
    }


@pytest.mark.parametrize("head", ["", "apiVersion:\n", "apiVersion: 1\n", "apiVersion: yes\n"])
def test_a_wrong_head_hides_no_other_mistake(head: str) -> None:
    found = problems(head + "nope: 1\nmodels: {m: {}}\n")
    assert {problem.key for problem in found} == {"apiVersion", "nope", "models.m"}


def test_a_repository_may_come_from_a_flag() -> None:
    text = HEAD + "models: {m: {}, n: {source: 'registry:x'}}\n"
    assert len(problems(text)) == 2
    parse_config(text, repository_given=True)


def test_mistakes_behind_a_duplicate_section_are_still_found() -> None:
    found = problems(HEAD + "server: {nmae: x}\nserver: {}\n")
    assert [(p.line, p.key) for p in found] == [(2, "server.nmae"), (3, "server")]


def test_mistakes_in_an_alias_are_shown_where_they_stand() -> None:
    text = HEAD + "defaults: {batching: &b {max_rows: -1}}\nmodels: {m: {source: x, batching: *b}}\n"
    found = problems(text)
    assert {(p.line, p.key) for p in found} == {(2, "defaults.batching.max_rows"), (2, "models.m.batching.max_rows")}


@pytest.mark.parametrize("text", ["5", "text", "[1]", "true", "- a\n- b\n"])
def test_a_file_that_is_no_mapping(text: str) -> None:
    (problem,) = problems(text)
    assert problem.message.startswith("wanted a mapping with apiVersion and sections, got")


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b"", (1, 1), "the file is empty"),
        (b"\xef\xbb\xbf", (1, 1), "the file is empty"),
        (b"a: 1\nb: \xff\n", (2, 4), "wanted UTF-8 text"),
        ("apiVersion: x".encode("utf-16"), (1, 1), "wanted UTF-8 text"),
        (b"a: [1, 2", (2, 1), "YAML syntax"),
        (b"a" * (MAX_BYTES + 1), (0, 0), "is over 4194304 bytes"),
        (b"a: \0", (1, 4), "U+0000 is not allowed"),
    ],
)
def test_files_that_are_no_yaml(tmp_path: Path, content: bytes, place: tuple[int, int], reason: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig) as caught:
        load_config(path)
    (problem,) = caught.value.problems
    assert reason in problem.message
    assert (problem.line, problem.column) in {place, (1, len(content) + 1)}


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + HEAD.encode())
    load_config(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_the_environment_is_the_processs_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TIDEGATE_TEST_TOKEN", "t")
    config = parse_config(HEAD + "server: {auth: {admin_token: '${TIDEGATE_TEST_TOKEN}'}}\n")
    assert config.server.auth is not None
    assert config.server.auth.admin_token == "t"


def test_a_hostile_file_is_refused_in_bounded_time() -> None:
    started = time.process_time()
    lines = [HEAD + "models:"] + [f"  m{n}: &m{n} {{x: [{', '.join(['*m0'] * 9)}]}}" for n in range(9)]
    problems("\n".join(lines))
    problems(HEAD + "models: " + "{a: " * 100_000)
    problems(HEAD + "models:\n" + "".join(f"  m{n}: {{sorce: x}}\n" for n in range(2_000)))
    assert time.process_time() - started < 20


_KEYS = st.sampled_from(
    [
        "server",
        "telemetry",
        "state",
        "registry",
        "defaults",
        "models",
        "m",
        "batching",
        "runtime",
        "warmup",
        "source",
        "listeners",
        "http",
        "limits",
        "traces",
        "providers",
        "name",
        "buckets",
        "priority",
        "levels",
        "apiVersion",
        "version_policy",
        "specific",
        "queue_policies",
        "1",
        "auth",
        "admin_token",
    ]
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["cpu", "1s", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_no_file_raises_anything_else(data: dict[str, object]) -> None:
    text = yaml.safe_dump({"apiVersion": "tidegate/v1"} | data, allow_unicode=True)
    end = len(text.splitlines()) + 1
    for problem in mistakes(text):
        assert 1 <= problem.line <= end
        assert problem.column >= 1
        assert problem.message
