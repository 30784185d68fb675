"""The drift page, read back by a parser: well-formed, escaped, complete, of bounded size, and of real reports too."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Alarm, Settings, rows_window
from server.pages import drift_page

VOID = {"meta", "input", "col"}
HOSTILE = "<script>alert('x')</script>"
T0 = 1_790_000_000_000_000_000


class Tree(HTMLParser):
    """Checks that tags nest, and keeps texts by the innermost tag and the attributes of every tag."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def count(self, tag: str, class_: str | None = None) -> int:
        return len([a for t, a in self.tags if t == tag and (class_ is None or a.get("class") == class_)])

    def of(self, tag: str) -> list[str]:
        return [text for found, text in self.texts if found == tag]

    @property
    def text(self) -> str:
        return "".join([data for tag, data in self.texts if tag not in ("style", "script")])


def score(column: str, **changes: object) -> dict[str, Any]:
    keys = ("ks_low", "ks_high", "ks_p", "psi", "psi_p", "missing", "missing_reference", "below", "above")
    return {"column": column, **dict.fromkeys(keys, 0.01), "new_category": 0.0, "severity": "none", **changes}


def window(names: list[str], arm: str = "stable", name: str = "1000rows", **changes: object) -> dict[str, Any]:
    return {
        "arm": arm,
        "window": name,
        "rows": 1000,
        "full": True,
        "start_ns": T0,
        "end_ns": T0 + 60_000_000_000,
        "scores": [score(column) for column in names],
        "verdicts": [{"column": column, "ratio": 0.5, "level": 1e-6, "over": False} for column in names],
        "in_alarm": [],
        **changes,
    }


def report(*windows: dict[str, Any], **changes: object) -> dict[str, Any]:
    return {"model": "fraud", "version": "7", "profile": "ab" * 32, "windows": list(windows), **changes}


def series(points: int, value: float | None = 0.1) -> dict[str, Any]:
    """What ``Monitor.history`` gives of one column, and the times."""
    values = [value] * points
    return {
        "time_ns": [T0 + i * 1_000_000_000 for i in range(points)],
        **{"psi": values, "ks": values, "psi_threshold": [0.05] * points, "ks_threshold": [0.05] * points},
        "in_alarm": [i > points // 2 for i in range(points)],
    }


def history(windows: list[dict[str, Any]], found: dict[str, Any]) -> dict[str, Any]:
    """The same looks for every column of every window."""
    parts = [
        {
            **{key: w[key] for key in ("arm", "window")},
            "time_ns": found["time_ns"],
            "columns": dict.fromkeys(of(w), found),
        }
        for w in windows
    ]
    return {"min_psi": 0.02, "min_ks": 0.05, "windows": parts}


def distributions(windows: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The same shares for every column of every window."""
    return [
        {**{key: w[key] for key in ("arm", "window")}, "columns": [{"column": name, **found} for name in of(w)]}
        for w in windows
    ]


def of(window_: dict[str, Any]) -> list[str]:
    return [found["column"] for found in window_["scores"]]


def shares(bins: int) -> dict[str, Any]:
    labels = [f"({i}, {i + 1}]" for i in range(bins)]
    return {"bins": labels, "reference": [1 / bins] * bins, "window": [(2 * i + 1) / bins**2 for i in range(bins)]}


def cut(value: str, column: str, in_alarm: tuple[str, ...] = ()) -> dict[str, Any]:
    part = {"arm": "stable", "segment": value, "window": "1000rows", "rows": 400, "ratio": 3.25, "in_alarm": in_alarm}
    return {"segment_column": "country", "segments": [{**part, "verdicts": [{"column": column}]}]}


def test_a_report_alone_is_a_page() -> None:
    tree = Tree(drift_page({"report": report(window(["age", "amount"]))}))
    assert tree.of("h1") == ["Drift of "]
    assert "fraud:7" in tree.of("bdi")
    assert tree.of("strong") == ["No alarm."]
    assert ("span", {"title": "ab" * 32}) in tree.tags
    assert tree.count("svg") == 0


def test_names_are_texts_wherever_they_stand() -> None:
    checks = [{"column": HOSTILE, "check": HOSTILE, "in_alarm": True}]
    hostile = window([HOSTILE], arm=HOSTILE, name=HOSTILE, in_alarm=[HOSTILE], sampled=True, quality=checks)
    document = {
        "report": report(
            hostile, model=HOSTILE, version='"><b>', profile=HOSTILE, warnings=[HOSTILE], **cut(HOSTILE, HOSTILE)
        ),
        "history": history([hostile], series(5)),
        "distributions": distributions([hostile], {"bins": [HOSTILE], "reference": [0.5], "window": [0.5]}),
        "performance": {HOSTILE: {HOSTILE: 1, "name": HOSTILE}},
        "alarms": [{"state": HOSTILE, "arm": HOSTILE, "column": HOSTILE, "window": HOSTILE, "episode": HOSTILE}],
    }
    page = drift_page(document)
    tree = Tree(page)
    assert tree.count("script") == 1
    assert tree.count("b") == 0
    assert page.count("<script>alert") == 0
    assert tree.text.count(HOSTILE) > 10
    assert not [a for _, a in tree.tags if any(key.startswith("on") or key == "style" for key in a)]


def test_what_text_cannot_hold_is_replaced() -> None:
    page = drift_page({"report": report(window(["a\x00b\ud800c\x1b"]))})
    assert "a\ufffdb\ufffdc\ufffd" in Tree(page).text
    page.encode()


def test_the_policy_names_exactly_the_style_and_the_script() -> None:
    page = drift_page({"report": report(window(["age"]), window(["age"], name="10rows"))})
    (policy,) = [a["content"] for t, a in Tree(page).tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    for tag in ("style", "script"):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"https?://|url\(|@import", page)


def test_alarms_are_said_first_and_choose_the_view() -> None:
    calm, loud = window(["age", "amount"]), window(["amount", "age"], arm="canary", in_alarm=["amount"])
    tree = Tree(drift_page({"report": report(calm, loud)}))
    assert tree.of("strong") == ["1 alarm. "]
    assert [a["id"] for t, a in tree.tags if t == "input" and "checked" in a] == ["pick1"]
    assert tree.of("span").count("ALARM") == 1
    assert tree.count("tr", "alarm") == 1


def test_every_view_can_be_chosen_without_scripts() -> None:
    windows = [window(["age"], arm=arm, name=f"{n}rows") for arm in ("stable", "canary", "shadow") for n in (10, 20)]
    page = drift_page({"report": report(*windows)})
    tree = Tree(page)
    picks = [a["id"] for t, a in tree.tags if t == "input"]
    assert [a["for"] for t, a in tree.tags if t == "label"] == picks
    assert len(picks) == 6
    assert all(f"#{pick}:checked~.view{i}{{display:block}}" in page for i, pick in enumerate(picks))
    assert [tree.count("div", f"view view{i}") for i in range(6)] == [1] * 6


def test_warnings_are_shown() -> None:
    sampled = window(["age"], sampled=True, full=False)
    tree = Tree(drift_page({"report": report(sampled, warnings=["counts vary 3.1 times as much"], calibrated=False)}))
    warnings = tree.of("li")
    assert warnings[1] == "counts vary 3.1 times as much"
    assert "NOT calibrated" in warnings[0]
    assert warnings[2].startswith("sampled")
    assert warnings[3].startswith("not full")
    assert Tree(drift_page({"report": report(window(["age"]))})).count("ul") == 0


def test_plots_tell_their_values() -> None:
    w = window(["age"])
    document = {
        "report": report(w),
        "history": history([w], series(4)),
        "distributions": distributions([w], shares(2)),
    }
    tree = Tree(drift_page(document))
    titles = tree.of("title")
    assert "(0, 1]: reference 50\u00a0%, now 25\u00a0%" in titles
    assert "effect floor 0.020" in titles
    assert "09-21 14:13:20: PSI 0.100, threshold 0.050" in titles
    assert "in alarm from 2026-09-21 14:13:23 to 2026-09-21 14:13:23" in titles
    assert [a["aria-label"] for t, a in tree.tags if t == "svg"] == [
        "Shares of rows by bin, reference and now",
        "PSI over time",
        "KS over time",
    ]


def test_a_peak_survives_thinning() -> None:
    w = window(["age"])
    peak = series(5000)
    peak["psi"] = [0.9 if i == 1234 else 0.1 for i in range(5000)]
    tree = Tree(drift_page({"report": report(w), "history": history([w], peak)}))
    assert [title for title in tree.of("title") if "PSI 0.900" in title] != []
    assert tree.count("path", "hover") < 100


def test_many_bins_are_folded_without_losing_a_share() -> None:
    w = window(["code"])
    tree = Tree(drift_page({"report": report(w), "distributions": distributions([w], shares(1000))}))
    told = [title for title in tree.of("title") if "reference" in title]
    assert len(told) == 24
    assert told[-1].startswith("977 other bins: reference 97.7\u00a0%")


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_statistics_that_are_undefined_are_dashes(nothing: float | None) -> None:
    w = window([])
    undefined = dict.fromkeys(("ks_low", "ks_high", "ks_p", "psi", "psi_p", "missing", "below"), nothing)
    w["scores"] = [score("empty", **undefined)]
    document = {
        "report": report(w),
        "history": history([w], series(5, nothing)),
        "distributions": distributions([w], {"bins": ["a"], "reference": [nothing], "window": [nothing]}),
    }
    tree = Tree(drift_page(document))
    assert tree.of("td").count("—") >= 5
    assert "nan" not in tree.text.lower()
    assert tree.count("path", "line") == 0
    assert tree.count("rect", "now") == 0


def test_without_rows_or_windows_it_says_so() -> None:
    empty = window(["age"], rows=0, start_ns=0, end_ns=0)
    assert Tree(drift_page({"report": report(empty)})).of("strong") == ["No rows were counted yet."]
    assert "No arm has been seen yet." in Tree(drift_page({"report": report()})).text
    assert "None." in Tree(drift_page({"report": {}})).text


def test_long_names_are_cut_and_kept_whole_on_hover() -> None:
    long = "f" * 900
    tree = Tree(drift_page({"report": report(window([long]))}))
    assert ("bdi", {"title": long}) in tree.tags
    assert long not in tree.text


def test_two_hundred_features_stay_under_two_megabytes() -> None:
    names = [f"feature number {i} of a wide table" for i in range(200)]
    windows = [window(names, arm=arm, name=f"{n}rows") for arm in ("stable", "canary", "shadow") for n in (10, 20)]
    document = {
        "report": report(*windows),
        "history": history(windows, series(500, 0.123456789)),
        "distributions": distributions(windows, shares(12)),
    }
    page = drift_page(document)
    tree = Tree(page)
    assert len(page.encode()) < 2_000_000
    assert tree.text.count(names[-1]) == 6
    assert 60 <= tree.count("div", "feature") <= 80


def test_quiet_features_of_many_are_behind_a_line_and_alarms_never_are() -> None:
    names = [f"f{place}" for place in range(200)]
    quiet, loud = window(names), window(names, name="other")
    loud["in_alarm"] = ["f60"]
    tree = Tree(drift_page({"report": report(quiet, loud)}))
    assert tree.of("summary") == [
        "160 more features, none of them over",
        "139 more features, none of them over",
    ]
    assert all(tree.text.count(place) >= 2 for place in names)
    assert Tree(drift_page({"report": report(window(names[:50]))})).count("details") == 0


def test_checks_that_say_little_are_behind_a_line() -> None:
    checks = [{"column": f"f{n}", "check": "below", "count": 1, "rows": 1000, "over": n == 7} for n in range(30)]
    checks.append({"column": "f40", "check": "rule max", "count": 0, "rows": 1000, "over": False})
    page = drift_page({"report": report(window(["a"], quality=checks))})
    assert Tree(page).of("summary") == ["29 more checks, none of them over"]
    assert page.index("f7<") < page.index("rule max") < page.index("<summary") < page.index("f29<")
    assert Tree(drift_page({"report": report(window(["a"], quality=checks[:8]))})).count("details") == 0


def test_no_address_of_anywhere_is_in_the_page() -> None:
    page = drift_page({"report": report(window(["a"]))})
    tree = Tree(page)
    asked = {"src", "href", "action", "formaction", "poster", "data", "srcset", "background", "ping"}
    assert not [attributes for _, attributes in tree.tags if asked & set(attributes)]
    assert "url(" not in page
    assert "@import" not in page
    assert not re.search(r"https?://|//[a-z]", page)


def test_quality_checks_alarm_like_drift() -> None:
    check = {"column": "age", "check": "missing", "count": 120, "rows": 1000, "share": 0.12, "allowed": 0.01, "p": 1e-9}
    calm = {**check, "column": "zip", "in_alarm": False, "over": False}
    w = window(["age"], quality=[calm, {**check, "in_alarm": True, "over": True}])
    tree = Tree(drift_page({"report": report(w)}))
    assert tree.of("strong") == ["1 alarm. "]
    assert "age (missing)" in tree.of("bdi")
    cells = tree.text[tree.text.index("Quality checks") :]
    assert cells.index("age") < cells.index("zip")
    assert "12\u00a0%" in tree.of("td")


def test_segments_are_rows_and_their_alarms_are_said() -> None:
    tree = Tree(drift_page({"report": report(window(["age"]), **cut("DE", "amount", ("amount",)))}))
    assert "Segments by country" in tree.of("h2")
    assert "3.250" in tree.of("td")
    assert tree.of("strong") == ["1 alarm. "]
    assert "stable, country DE" in tree.of("bdi")
    assert "Segments by" not in Tree(drift_page({"report": report(window(["age"]))})).text


def test_results_of_any_shape_become_tables() -> None:
    document = {
        "report": report(window(["age"])),
        "performance": {"stable": {"1000rows": {"rows": 1000, "auc": 0.8812, "ok": True, "at_ns": T0}}},
        "estimate": [{"arm": "stable", "auc": 0.87}, {"arm": "canary", "auc": None}],
    }
    tree = Tree(drift_page(document))
    assert "stable / 1000rows" in tree.text
    assert "0.881" in tree.of("td")
    assert "2026-09-21 14:13:20" in tree.of("td")
    assert "Performance, ESTIMATED without labels" in tree.of("h2")


def real_document() -> dict[str, Any]:
    """A monitor that saw a shift, a half missing column, an entirely missing one and a new category."""
    rng = np.random.default_rng(7)
    names = ["steady", "shifted", "gone", HOSTILE]
    table = rng.normal(size=(5000, 4)).astype("f4")
    table[:, 2] = np.nan
    profile = ReferenceProfile.from_arrays({"x": table}, names={"x": names})
    alarms: list[Alarm] = []
    watch = Monitor(
        "fraud", "7", profile, Settings(windows=(rows_window(1000),)), on_alarm=lambda _, alarm: alarms.append(alarm)
    )
    for i in range(12):
        rows = rng.normal(size=(500, 4)).astype("f4")
        rows[:, 1] += 1
        rows[:, 2] = np.nan
        watch.ingest(watch.keys, [Item(T0 + i * 1_000_000_000, "stable", 500, 0, [[rows.tobytes()]])])
    return {
        "report": watch.report().to_dict(),
        "history": watch.history(),
        "distributions": [watch.distributions()],
        "alarms": [asdict(alarm) for alarm in alarms],
    }


def test_a_real_report_reads_the_same_through_json() -> None:
    document = real_document()
    page = drift_page(document)
    tree = Tree(page)
    assert tree.of("strong") == ["1 alarm. "]
    rows = tree.text[tree.text.index("The strongest evidence first.") :]
    assert rows.index("shifted") < rows.index("steady")
    assert "raised" in tree.of("td")
    # Three plots of each feature; the one without values has no KS.
    assert tree.count("svg") == 4 * 3 - 1
    assert tree.count("rect", "span") >= 2
    assert drift_page(json.loads(json.dumps(document))) == page


def test_arms_are_held_against_stable() -> None:
    names = [f"f{place}" for place in range(30)]
    compared = window(names, arm="canary", against="stable", rows=1000)
    compared["scores"] = [{**score, "reference_rows": 700} for score in compared["scores"]]
    document = {"report": report(window(names), window(names, arm="canary")), "comparisons": [compared]}
    tree = Tree(drift_page(document))
    assert "Arms against each other" in tree.of("h2")
    assert "canary against stable · 1000rows: 1\u202f000 rows against 700. The 20 features" in tree.text
    assert tree.text.count("f19") == 3
    assert tree.text.count("f20") == 2
    assert "Arms against" not in drift_page({**document, "comparisons": []})
