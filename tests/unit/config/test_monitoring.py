"""The ``monitor`` sections: every mistake in its place, what they compile to, and what a reload says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from monitor.types import AlarmRules, Settings, rows_window, time_window
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
        "min_effect: {psi: 0.1, ks: 0.2}, persistence: 3 of 5, reference: hour_of_week, "
        "ring: {rows: 1000, bytes: 1MiB}, calibration: c.json, metrics: {top: 5}}"
    )
    rules = AlarmRules(ert_hours=168.0, min_psi=0.1, min_ks=0.2, k=3, m=5)
    windows = (rows_window(2000), rows_window(200_000, 10_000), time_window(300))
    assert found == MonitorSpec(
        True,
        Path("/conf/p.tgp"),
        {"7": Path("/abs/seven.tgp")},
        Settings(windows, rules, "hour_of_week", 1000, 1 << 20),
        Path("/conf/c.json"),
        5,
    )


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
