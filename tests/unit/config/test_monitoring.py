"""The ``monitor`` sections: every mistake in its place, what they compile to, and what a reload says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.outcomes import LabelRules, LabelSettings
from monitor.types import AlarmRules, ColumnRule, Segment, Settings, rows_window, time_window
from server.config.load import parse_config
from server.config.model import Config
from server.config.monitor_kinds import parse_expected_run, parse_persistence, parse_window
from server.config.monitoring import MonitorSpec, compile_monitoring
from server.config.plan import plan_reload
from server.config.problems import InvalidConfig

HEAD = "apiVersion: tidegate/v1\n"
SOURCE = 'versions: {"7": {source: a.onnx}, "8": {source: b.onnx}}'


def parse(text: str) -> Config:
    return parse_config(HEAD + text, folder=Path("/conf"), environ={})


def model(monitor: str, defaults: str = "{}", more: str = "") -> Config:
    return parse(f"defaults: {{monitor: {defaults}}}\nmodels: {{m: {{{SOURCE}, monitor: {monitor}{more}}}}}\n")


def spec_of(monitor: str, defaults: str = "{}") -> MonitorSpec:
    return compile_monitoring(model(monitor, defaults)).of("m")


def said(text: str) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        parse(text)
    return {problem.key: problem.message for problem in caught.value.problems}


def test_nothing_said_watches_what_brings_a_profile() -> None:
    assert compile_monitoring(None).of("any") == MonitorSpec()
    assert spec_of("{}") == MonitorSpec()
    assert MonitorSpec().settings == Settings()


def test_a_whole_section() -> None:
    found = spec_of(
        '{profile: p.tgp, profiles: {"7": /abs/seven.tgp}, windows: [2000, 200000, 5m], expected_run: 7d, '
        "min_effect: {psi: 0.1, ks: 0.2, rate: 5%}, persistence: 3 of 5, reference: hour_of_week, "
        "ring: {rows: 1000, bytes: 1MiB}, calibration: c.json, metrics: {top: 5}, history: 64, "
        "segment: {column: country, values: [DE, FR, 3]}, sample: {rows: 100, bytes: 2MiB}, "
        "schema: [{column: age, min: 0, max: 120, missing: 5%}, {column: c, range: profile, action: reject}]}"
    )
    rules = AlarmRules(ert_hours=168.0, min_psi=0.1, min_ks=0.2, min_rate=0.05, k=3, m=5)
    windows = (rows_window(2000), rows_window(200_000, 10_000), time_window(300))
    assert found == MonitorSpec(
        True,
        Path("/conf/p.tgp"),
        {"7": Path("/abs/seven.tgp")},
        Settings(
            windows, rules, "hour_of_week", 1000, 1 << 20,
            segment=Segment("country", ("DE", "FR", 3.0)),
            schema=(
                ColumnRule("age", min=0.0, max=120.0, missing=0.05),
                ColumnRule("c", range="profile", action="reject"),
            ),
            keep_rows=100, keep_bytes=2 << 20, history_looks=64,
        ),
        Path("/conf/c.json"),
        5,
    )  # fmt: skip


def test_labels() -> None:
    assert spec_of("{}").labels is None
    found = spec_of("{labels: {task: binary, output: p}}")
    assert found.labels == LabelSettings("binary", "p")
    found = spec_of(
        "{labels: {task: multiclass, output: p, index: 1, name: truth, form: logit, classes: [a, b, c], slice: 'x[1]', "
        "windows: [500, 1h], expected_run: 7d, persistence: 1 of 1, reference: {accuracy: 0.9}, reference_rows: 50, "
        "margins: {log_loss: 0.2}, learn_rows: 0, capacity: 10, max_age: 1d, late: 1m, hold: 2s}}"
    )
    alarm = AlarmRules(ert_rows=AlarmRules().ert_rows, ert_hours=168.0, k=1, m=1)
    second = 1_000_000_000
    assert found.labels == LabelSettings(
        "multiclass",
        "p",
        index=1,
        name="truth",
        form="logit",
        classes=("a", "b", "c"),
        windows=(rows_window(500), time_window(3600)),
        rules=LabelRules(alarm, {"accuracy": 0.9}, 50, 0, {"log_loss": 0.2}),
        capacity_rows=10,
        max_age_ns=24 * 3600 * second,
        late_ns=60 * second,
        hold_ns=2 * second,
    )
    assert found.label_slice == "x[1]"


def test_mistakes_within_the_parts() -> None:
    inside = "models.m.monitor"
    text = (
        f"models:\n  m:\n    {SOURCE}\n    monitor:\n"
        "      segment: {column: c, values: [a, a]}\n"
        "      min_effect: {rate: 0%}\n"
        "      schema: [{column: a}, {column: b, min: 2, max: 1}, {column: c, max: x, categories: [true]}]\n"
        "      sample: {rows: -1, byte: 1}\n"
        "      history: 0\n"
        "      labels: {task: binary, output: p, windows: [500, 500], classes: [only], learn_rows: -1,\n"
        "        reference: {calibration: 1, mae: 2, what: 3}, margins: {auc: 0.1, rmse: 1}, late: 0s}\n"
    )
    found = said(text)
    assert set(found) == {
        f"{inside}.segment.values",
        f"{inside}.min_effect.rate",
        f"{inside}.schema[2].max",
        f"{inside}.schema[2].categories[0]",
        f"{inside}.sample.rows",
        f"{inside}.sample.byte",
        f"{inside}.history",
        f"{inside}.labels.learn_rows",
        f"{inside}.labels.late",
        f"{inside}.labels.windows[1]",
        f"{inside}.labels.classes",
        f"{inside}.labels.reference.calibration",
        f"{inside}.labels.reference.mae",
        f"{inside}.labels.reference.what",
        f"{inside}.labels.margins.rmse",
    }
    assert "'mae' is no signal of binary" in found[f"{inside}.labels.reference.mae"]
    with pytest.raises(InvalidConfig) as caught:
        parse(f"models: {{m: {{{SOURCE}, monitor: {{schema: [{{column: a}}, {{column: b, min: 2, max: 1}}]}}}}}}\n")
    rules = {problem.key: problem for problem in caught.value.problems}
    assert set(rules) == {f"{inside}.schema[0]", f"{inside}.schema[1].min"}
    assert "demands nothing" in rules[f"{inside}.schema[0]"].message
    assert all(problem.line == 2 and problem.column > 60 for problem in rules.values())


def test_an_unknown_key_of_a_rule_is_told_what_is_known() -> None:
    found = said(f"models: {{m: {{{SOURCE}, monitor: {{schema: [{{column: a, maxi: 2}}]}}}}}}\n")
    assert "did you mean max?" in found["models.m.monitor.schema[0].maxi"]


def test_a_change_of_labels_or_rules_counts_anew() -> None:
    plain = model("{}")
    for changed in ("{labels: {task: binary, output: p}}", "{schema: [{column: a, min: 0}]}", "{sample: {rows: 5}}"):
        assert plan_reload(plain, model(changed)).recounts == ("m",)


def test_a_model_goes_over_the_defaults_key_by_key() -> None:
    defaults = "{windows: [500], min_effect: {psi: 0.1, ks: 0.3}, profile: registry}"
    found = spec_of("{min_effect: {ks: 0.2}, persistence: 1 of 1}", defaults)
    assert found.profile == "registry"
    assert found.settings.windows == (rows_window(500),)
    rules = found.settings.rules
    assert (rules.min_psi, rules.min_ks, rules.k, rules.m) == (0.1, 0.2, 1, 1)
    compiled = compile_monitoring(model("{enabled: false}", defaults))
    assert not compiled.of("m").enabled
    assert compiled.of("another").enabled
    assert compiled.of("another").profile == "registry"


def test_every_mistake_at_once_in_its_place() -> None:
    text = (
        'defaults: {monitor: {profiles: {"1": p.tgp}}}\n'
        'models:\n  m:\n    versions: {"7": {source: a.onnx}}\n'
        "    monitor:\n"
        '      profiles: {"9": p.tgp}\n'
        "      windows: [1000, 1000, 1001, 5, 7m, 1s, true]\n"
        "      expected_run: 7\n"
        "      min_effect: {psi: -1, ks: 2, p: 1}\n"
        "      persistence: 3 of 2\n"
        "      reference: yesterday\n"
        "      ring: {rows: 0, bytes: 1B}\n"
        "      metrics: {top: 0}\n"
        "      profile: 7\n"
        "      sample: 1%\n"
        "  other: {model: m, monitor: {enabled: false}}\n"
    )
    found = said(text)
    inside = "models.m.monitor"
    assert set(found) == {
        "defaults.monitor.profiles",
        f'{inside}.profiles."9"',
        *(f"{inside}.windows[{n}]" for n in (2, 3, 5, 6)),
        f"{inside}.expected_run",
        f"{inside}.min_effect.psi",
        f"{inside}.min_effect.ks",
        f"{inside}.min_effect.p",
        f"{inside}.persistence",
        f"{inside}.reference",
        f"{inside}.ring.rows",
        f"{inside}.ring.bytes",
        f"{inside}.metrics.top",
        f"{inside}.profile",
        f"{inside}.sample",
        "models.other.monitor",
    }
    assert "a multiple of 500" in found[f"{inside}.windows[2]"]
    assert "is none of the model's versions" in found[f'{inside}.profiles."9"']
    with pytest.raises(InvalidConfig) as caught:
        parse(text)
    (window,) = (problem for problem in caught.value.problems if problem.key == f"{inside}.windows[2]")
    assert (window.line, window.column) == (8, 29)


def test_a_window_named_twice() -> None:
    found = said(f"models: {{m: {{{SOURCE}, monitor: {{windows: [5m, 1000, 300s]}}}}}}\n")
    assert found == {"models.m.monitor.windows[2]": "window 5m is named twice"}


@pytest.mark.parametrize(
    ("value", "length", "pane"),
    [(20, 20, 10), (1000, 1000, 500), (1500, 1500, 500), (10_000, 10_000, 500), (20_000, 20_000, 1000)],
)
def test_windows_of_rows_are_whole_panes(value: int, length: int, pane: int) -> None:
    window = parse_window(value)
    assert (window.unit, window.length, window.pane) == ("rows", length, pane)
    assert Settings(windows=(window,)).windows == (window,)


@pytest.mark.parametrize("value", [0, -2, 19, 21, 1250, 10_500, 20_000_000, "1000", "5", 1.5, None, "9s", "32d", []])
def test_windows_that_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"wanted rows .* or a duration"):
        parse_window(value)


@pytest.mark.parametrize(
    ("value", "rows", "hours"),
    [("7d", 10_000_000, 168.0), ("90m", 10_000_000, 1.5), ("10M", 10_000_000, 0), (250_000, 250_000, 0)],
)
def test_expected_runs(value: object, rows: int, hours: float) -> None:
    run = parse_expected_run(value)
    assert (run.rows, run.hours) == (rows, hours)


@pytest.mark.parametrize("value", ["999", 0, "30s", "10m rows", "2T", True, "4000d", None])
def test_expected_runs_that_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"wanted a duration .* or rows"):
        parse_expected_run(value)


@pytest.mark.parametrize("value", ["0 of 3", "4 of 3", "1 of 65", "2/3", 2, "two of three"])
def test_persistence_that_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="wanted K of M"):
        parse_persistence(value)


def test_a_reload_says_that_counts_start_anew() -> None:
    old, same, new = model("{}"), model("{windows: [1000, 10000]}"), model("{windows: [2000]}")
    assert plan_reload(old, same).empty
    plan = plan_reload(old, new)
    assert [(change.model, change.parts) for change in plan.changed] == [("m", ("monitor",))]
    assert plan.recounts == ("m",)
    assert plan.as_dict()["recounts"] == ["m"]
    assert "count drift of m anew: its watched versions are loaded again" in list(plan.lines())
    everywhere = plan_reload(old, model("{}", "{persistence: 1 of 1}"))
    assert everywhere.recounts == ("m",)
