"""The routing part of the file: mistakes in their places, what it compiles to, how it is bound, reload plans."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from monitor.compare import CompareSpec
from router.breaker import BreakerPolicy
from router.decision import RouteQuery
from router.experiment import ExperimentSpec, OutcomeSpec
from router.shadow import ShadowBudget
from router.table import RoutingTable
from router.types import Arm, Destination, ExperimentSplit, KeySpec, Match, RolloutSplit, Rule, ShadowRoute, ValueTest
from server.config.compile import RegistryVersion, compile_models, compile_versions
from server.config.load import parse_config
from server.config.model import Config
from server.config.plan import ReloadPlan, plan_reload
from server.config.problems import InvalidConfig
from server.config.routing import LATEST, Bound, Reference, RoutingSpec, bind, compile_all, compile_routing
from server.runtime.upstream_options import UpstreamOptions

HEAD = "apiVersion: tidegate/v1\n"
TWO = 'versions: {"7": {source: a.onnx}, "8": {source: b.onnx}}'
ROLLOUT = f'{TWO}, stable: "7", key: {{from: [header:u]}}'
RULE = f"{TWO}, rules: [{{name: a, match: {{header: {{x: y}}}}"
BOTH = f"{ROLLOUT}, experiment: {{id: e, arms: {{a: {{to: 7, share: 50%}}, b: {{to: 8, share: 50%}}}}}}"
PAGE = Path(__file__).parents[3] / "docs" / "routing.md"


def parse(text: str) -> Config:
    return parse_config(HEAD + text, folder=Path("/conf"), environ={"SALT": "s3cret", "FRAUD_SALT": "s"})


def model(section: str, registry: str = "") -> Config:
    return parse(f"{registry}models: {{m: {{{section}}}}}\n")


def spec_of(section: str, registry: str = "") -> RoutingSpec:
    return compile_routing(model(section, registry))["m"]


def said(text: str) -> dict[str, str]:
    with pytest.raises(InvalidConfig) as caught:
        parse(text)
    return {problem.key: problem.message for problem in caught.value.problems}


def to(version: str, of: str = "m") -> Destination[Reference]:
    return Destination(of, version, Reference(of, version))


# --- mistakes ---------------------------------------------------------------------------------------------------------

BAD = """\
models:
  m:
    versions:
      "7": {source: a.onnx}
      "8": {source: "registry:m"}
      "09": {source: c.onnx}
    version_policy: all
  n:
    source: n.onnx
    versions: {"1": {source: a.onnx}}
    aliases: [m, extra]
    stable: 2
    key: {from: [cookie:x], missing: perhaps}
    rules:
      - {name: split, match: {}, to: requested}
      - {name: a, match: {header: {x: {exact: y, prefix: z}}}, to: "n:"}
      - {name: a, match: {tenant: acme}, to: nowhere}
    experiment: {id: e, arms: {a: {to: 1, share: 60%}, stable: {to: 1, share: 30.005%}}, coverage: 101%}
    shadow: [{to: 1, sample: 5, budget: {rps: 0}}]
    resilience: {retry: {on: [unavailabel]}, breaker: {event: error}}
  o:
    versions: {"1": {source: a.onnx}, "2": {source: b.onnx}}
    aliases: [extra]
    rules:
      - {name: split, match: {}, to: requested}
      - {name: a, match: {tenant: acme}, to: nowhere}
      - {name: a, match: {header: {X-A: 1, x-a: 2}}, to: "p:1"}
    rollout: {id: r, candidate: "2", weight: 101%, secret: hunter2}
  q:
    versions: {"1": {source: a.onnx}, "2": {source: b.onnx}}
    rollout: {id: r, candidate: "2", weight: 50%}
    resilience: {breaker: {open_at: 0%}}
  s:
    model: t
    runtime: {instances: 2}
    shadow: [{to: "q:3", sample: 1%}, {to: "q@champion", sample: 1%}, {to: "q:1", sample: 1%}, {to: "q:1", sample: 1%}]
    experiment: {id: e2, arms: {a: {to: "q:1", share: 60%}, b: {to: "s:1", share: 0%}}}
  t: {model: q, key: {missing: reject}}
"""

# (line, column, key, start of the message)
EXPECTED = [
    (6, 21, 'models.m.versions."8".source', "wanted a path, registry:NAME/VERSION or registry:NAME@ALIAS, got"),
    (7, 7, 'models.m.versions."09"', "wanted a version (a positive integer), got text '09'"),
    (11, 5, "models.n.versions", "give either source or versions, not both"),
    (12, 15, "models.n.aliases[0]", "'m' is the name of a model"),
    (13, 13, "models.n.stable", "wanted one of the versions of 'n' (1), got 2"),
    (14, 18, "models.n.key.from[0]", "wanted header:NAME, parameter:NAME or request:id, got 'cookie:x'"),
    (14, 38, "models.n.key.missing", "wanted 'random', 'stable' or 'reject', got text 'perhaps'"),
    (17, 39, "models.n.rules[1].match.header.x", "wanted exactly one of exact, in, prefix and present, got exact, p"),
    (17, 68, "models.n.rules[1].to", "wanted requested, stable, an arm's name or a version, such as 8,"),
    (19, 79, "models.n.experiment.arms.stable.share", "wanted a percentage in steps of 0.01%, got text '30.005%'"),
    (19, 100, "models.n.experiment.coverage", "wanted a percentage from 0% to 100%, got text '101%'"),
    (20, 30, "models.n.shadow[0].sample", "wanted a percentage, such as 5% or 0.1%, got number 5"),
    (20, 47, "models.n.shadow[0].budget.rps", "wanted more than 0, got number 0"),
    (21, 31, "models.n.resilience.retry.on[0]", "wanted 'unavailable', "),
    (21, 56, "models.n.resilience.breaker.event", "unknown key; known here: half_open, min, open_at, open_for, wind"),
    (24, 15, "models.o.aliases[0]", "'extra' is an alias of 'n' already"),
    (26, 16, "models.o.rules[0].name", "wanted a name that is none of default, "),
    (26, 23, "models.o.rules[0].match", "wanted at least one of version, header, parameter, tenant; got none"),
    (27, 35, "models.o.rules[1].match.tenant", "the header that carries the tenant is not configured"),
    (28, 16, "models.o.rules[2].name", "'a' names an earlier rule too"),
    (28, 41, "models.o.rules[2].match.header.X-A", "header x-a is named 2 times"),
    (28, 49, "models.o.rules[2].match.header.x-a", "header x-a is named 2 times"),
    (29, 33, "models.o.rollout.candidate", "the candidate is stable itself (o:2)"),
    (29, 46, "models.o.rollout.weight", "wanted a percentage from 0% to 100%, got text '101%'"),
    (29, 60, "models.o.rollout.secret", "a secret is given as ${VARIABLE} or file:/path"),
    (32, 19, "models.q.rollout.id", "'r' is the id of the rollout of 'o' already"),
    (32, 33, "models.q.rollout.candidate", "the candidate is stable itself (q:2)"),
    (33, 37, "models.q.resilience.breaker.open_at", "wanted over 0% to 100%, got 0%"),
    (35, 12, "models.s.model", "'t' is another name of 'q'; name that"),
    (36, 5, "models.s.runtime", "runtime belongs to the model, 't', not to another name of its versions"),
    (37, 19, "models.s.shadow[0].to", "wanted one of the versions of 'q' (1, 2), got 3"),
    (37, 44, "models.s.shadow[1].to", "aliases need a model of the registry"),
    (37, 101, "models.s.shadow[3].to", "wanted a name that no other shadow has, got 'q:1'"),
    (38, 26, "models.s.experiment.arms", "wanted shares that sum to 100%, got 60%"),
    (38, 69, "models.s.experiment.arms.b.to", "'s' is another name of 't'; name that"),
    (38, 83, "models.s.experiment.arms.b.share", "wanted a share over 0%"),
    (39, 32, "models.t.key.missing", "reject wants a place to find the key in; 'from' names none"),
]


def test_every_mistake_at_once_and_in_its_place() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse(BAD)
    found = caught.value.problems
    assert [(p.line, p.column, p.key) for p in found] == [expected[:3] for expected in EXPECTED]
    for problem, (*_, start) in zip(found, EXPECTED, strict=True):
        assert problem.message.startswith(start), problem
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "reason"),
    [
        (f"{RULE}, to: requested}}]", "rules[0].to", "'requested' wants a match on version"),
        (f"{RULE}, to: candidate}}]", "rules[0].to", "wanted a version or one of stable; got 'candidate'"),
        (f"{TWO}, version_policy: all", "version_policy", "versions names the versions"),
        (f'{TWO}, stable: "@champion"', "stable", "aliases need a model of the registry"),
        (f"{BOTH}, rollout: {{id: r, candidate: 8, weight: 1%}}", "experiment", "either a rollout or an experiment"),
        (f"{TWO}, shadow: [{{to: 'other:1', sample: 1%}}]", "shadow[0].to", "model 'other' is not in models"),
        ("model: other", "model", "model 'other' is not in models"),
        ("versions: {}", "versions", "wanted a length of at least 1"),
        ("versions: {'1': {source: 'registry:m/1'}}", 'versions."1".source', "registry:m/1 needs registry.directory"),
        (f"{TWO}, experiment: {{id: e, arms: {{a: {{to: 7, share: 100%}}}}}}", "experiment.arms", "at least 2"),
        (f"{TWO}, experiment: {{id: e, arms: {{a: {{to: 7, share: 50%}}, stable: {{to: 8, share: 50%}}}}}}",
         "experiment.arms.stable", "wanted a name but stable and pinned"),
        (BOTH.replace("b: {", "requested: {"), "experiment.arms.requested", "an arm cannot be named requested"),
        (f"{TWO}, rules: [{{name: a, match: {{header: {{x: [a, b]}}}}, to: stable}}]", "rules[0].match.header.x",
         "a list of values is written {in: [...]}"),
        (f"{ROLLOUT}, rollout: {{id: r, candidate: 8, weight: 1%, secret: '${{NO}}'}}", "rollout.secret", "is not set"),
    ],
)  # fmt: skip
def test_mistakes_one_by_one(section: str, key: str, reason: str) -> None:
    found = said(f"models: {{m: {{{section}}}}}\n")
    assert set(found) == {f"models.m.{key}"}
    assert reason in found[f"models.m.{key}"]


def test_a_version_by_alias_needs_the_embedded_registry() -> None:
    section = "models: {m: {versions: {'1': {source: 'registry:m@champion'}}}}\n"
    assert set(said(f"registry: {{directory: d}}\n{section}")) == {'models.m.versions."1".source'}
    parse(f"registry: {{embedded: true}}\n{section}")


def test_one_id_for_two_rollouts_is_refused() -> None:
    one = f"{{{ROLLOUT}, rollout: {{id: r, candidate: 8, weight: 1%}}}}"
    assert said(f"models: {{m: {one}, n: {one}}}\n") == {
        "models.n.rollout.id": "'r' is the id of the rollout of 'm' already"
    }


# --- compiling --------------------------------------------------------------------------------------------------------


def page_config() -> Config:
    text = PAGE.read_text().partition("```yaml\n")[2].partition("```")[0]
    return parse_config(text, folder=Path("/conf"), environ={"FRAUD_SALT": "salt"})


def test_the_example_of_the_page_compiles_in_full() -> None:
    specs = compile_routing(page_config())
    assert list(specs) == ["fraud", "fraud-detection", "ranker", "search"]
    fraud = specs["fraud"]
    assert fraud.versions == ("7", "8", "9")
    assert fraud.stable == Reference("fraud", "7")
    routes = fraud.routes
    assert routes.model == "fraud"
    assert routes.tenant_header == "x-tenant"
    assert routes.key == KeySpec(("header:x-user-id", "parameter:user_id", "request:id"), "random")
    assert routes.rules == (
        Rule("partners", Match(tenant=ValueTest(frozenset({"acme", "beta"}))), "stable"),
        Rule("testers", Match({"x-canary": ValueTest(frozenset({"always"}))}), "candidate"),
        Rule("old-clients", Match(version=ValueTest(frozenset({"6"}))), to("7", "fraud")),
    )
    arm = Arm("candidate", to("8", "fraud"), 500, "control")
    assert routes.split == RolloutSplit("fraud-8", (arm,), b"salt")
    assert routes.shadows == (ShadowRoute("fraud:9", to("9", "fraud"), 500),)
    (shadow,) = fraud.shadows
    assert (shadow.id, shadow.to) == ("fraud:9", Reference("fraud", "9"))
    assert shadow.budget == ShadowBudget(50.0, 4, 256, 2**20, timeout_ns=2_000_000_000, yield_above_load=0.7)
    assert shadow.compare == CompareSpec(("score",), abs_tol=1e-3, argmax=True, ks=True, keep_worst=100)
    assert specs["fraud-detection"] == replace(fraud, name="fraud-detection")


def test_resilience_and_experiment_of_the_page() -> None:
    specs = compile_routing(page_config())
    resilience = specs["fraud"].resilience
    assert resilience.timeout_ns == 500_000_000
    assert resilience.breaker == BreakerPolicy(10_000_000_000, 20, 5_000, 5, 10_000_000_000)
    assert resilience.retry.retry_on == {"draining", "model_not_ready", "queue_full", "upstream_unavailable"}
    assert (resilience.retry.max_retries, resilience.retry.budget, resilience.retry.min_concurrency) == (1, 1_000, 3)
    assert resilience.retry.fallback_on >= {"runtime_failure", "version_timeout", "internal"}
    ranker = specs["ranker"]
    outcome = OutcomeSpec("click", "binary", 24 * 3600 * 10**9)
    assert ranker.experiment == ExperimentSpec("ranker-ab-3", (("control", 5_000), ("b", 5_000)), (outcome,))
    arms = (Arm("control", to("3", "ranker"), 5_000), Arm("b", to("4", "ranker"), 5_000))
    assert ranker.routes.split == ExperimentSplit("ranker-ab-3", arms, 2_000)
    assert (specs["search"].model, specs["search"].stable) == ("ranker", Reference("ranker", "3"))


def test_only_names_that_speak_of_routing_are_compiled() -> None:
    config = parse(f"models: {{a: {{source: a.onnx}}, b: {{{TWO}}}, c: {{source: c.onnx, aliases: [d]}}}}\n")
    assert list(compile_routing(config)) == ["c", "d"]
    assert list(compile_all(config)) == ["a", "b", "c", "d"]
    assert compile_all(config)["b"].resilience.retry.max_retries == 0


@pytest.mark.parametrize(
    ("section", "registry", "stable"),
    [
        ("source: a.onnx", "", LATEST),
        (TWO, "", "8"),
        ("versions: {'10': {source: a}, '9': {source: b}}", "", "10"),
        ("{}", "registry: {embedded: true}\n", "@champion"),
        ("source: 'registry:x'", "registry: {embedded: true}\n", "@champion"),
        ("source: 'registry:x'", "registry: {directory: d}\n", LATEST),
        ("source: a.onnx", "registry: {embedded: true}\n", LATEST),
        (f'{TWO}, stable: "7"', "", "7"),
    ],
)
def test_what_is_stable(section: str, registry: str, stable: str) -> None:
    config = parse(f"{registry}models: {{m: {section if section == '{}' else '{' + section + '}'}}}\n")
    assert compile_all(config)["m"].stable == Reference("m", stable)


def test_fallback_none_leaves_failures_to_the_caller() -> None:
    assert not spec_of(f"{TWO}, resilience: {{fallback: none}}").resilience.retry.fallback_on


def test_values_of_rules_are_compared_as_text() -> None:
    found = spec_of(
        f"{TWO}, rules: [{{name: a, match: {{version: any, parameter: {{n: 3, b: true, p: {{prefix: x}}, "
        "q: {present: true}, i: {in: [1, 2.5]}}}, to: '@latest'}]"
    )
    (rule,) = found.routes.rules
    assert rule.to == to(LATEST)
    assert rule.match.version == ValueTest(present=True)
    assert rule.match.parameter == {
        "n": ValueTest(frozenset({"3"})),
        "b": ValueTest(frozenset({"true"})),
        "p": ValueTest(prefixes=("x",)),
        "q": ValueTest(present=True),
        "i": ValueTest(frozenset({"1", "2.5"})),
    }


def test_shares_are_exact_to_hundredths_of_a_percent() -> None:
    split = spec_of(f"{ROLLOUT}, rollout: {{id: r, candidate: 8, weight: 0.29%, control: all}}").routes.split
    assert split == RolloutSplit("r", (Arm("candidate", to("8"), 29),))


def test_sources_of_versions() -> None:
    text = """\
models:
  a: {source: a.onnx}
  b: {versions: {"1": {source: b.onnx}, "2": {source: "registry:b/5"}, "3": {source: "registry:c@challenger"}}}
  c: {}
  d: {source: "registry:x"}
  e: {model: a}
"""
    config = parse("registry: {embedded: true}\n" + text)
    assert list(compile_models(config)) == ["a"]
    found = compile_versions(config)
    assert {name: (model.entry, dict(model.versions)) for name, model in found.items()} == {
        "b": (
            "",
            {
                "1": Path("/conf/b.onnx"),
                "2": RegistryVersion("b", "5"),
                "3": RegistryVersion("c", "@challenger"),
            },
        ),
        "c": ("c", {}),
        "d": ("x", {}),
    }


def upstream(keys: str) -> str:
    return f"versions: {{'8': {{source: b.onnx}}, '9': {{upstream: {{{keys}}}}}}}"


def origin(keys: str) -> object:
    return compile_versions(model(upstream(keys)))["m"].versions["9"]


def test_a_version_may_be_another_servers() -> None:
    assert origin("url: 'http://host:8000'") == UpstreamOptions("http://host:8000")
    keys = (
        "url: 'https://[::1]/v2-of-it', model: name, version: 3, timeout: 1500ms, max_batch_rows: 32, "
        "ca_file: ca.pem, headers: {x-token: '${SALT}'}"
    )
    found = origin(keys)
    assert found == UpstreamOptions(
        "https://[::1]/v2-of-it",
        "name",
        "3",
        timeout_s=1.5,
        max_batch_rows=32,
        headers=(("x-token", "s3cret"),),
        ca_file="/conf/ca.pem",
    )
    assert "s3cret" not in repr(model(upstream(keys))) + repr(found)


def test_an_upstream_has_no_alias_of_the_registry() -> None:
    versions = upstream("url: 'http://h'")
    section = f"registry: {{embedded: true}}\nmodels: {{m: {{{versions}, stable: '@champion'}}}}\n"
    assert "aliases need a model of the registry" in said(section)["models.m.stable"]


UPSTREAM_MISTAKES = """\
models:
  m:
    versions:
      "1": {source: a.onnx, upstream: {url: "http://h"}}
      "2": {}
      "3": {upstream: {model: x}}
      "4": {upstream: {url: "http://h", timeout: 0s, ca_file: x.pem}}
      "5": {upstream: {url: "http://me:hunter2@h"}}
      "6": {upstream: {url: "http://h:65536"}}
      "7": {upstream: {url: "http://h", headers: {X-A: "${SALT}", x-a: "${SALT}", Host: "${SALT}", "a b": "${SALT}"}}}
      "8": {upstream: {url: "http://h", headers: {x: hunter2, y: "${LINES}"}}}
      "9": {upstream: {url: "http://h", version: true, max_batch_rows: -1}}
      "10": {source: {}, upstreams: 1}
"""


def test_mistakes_about_upstreams() -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(HEAD + UPSTREAM_MISTAKES, folder=Path("/conf"), environ={"SALT": "s3cret", "LINES": "a\nb"})
    found = [(p.line, p.column, p.key.removeprefix("models.m.versions."), p.message) for p in caught.value.problems]
    expected = [
        (5, 29, '"1".upstream', "give either source or upstream, not both"),
        (6, 7, '"2"', "the version has neither a source nor an upstream"),
        (7, 13, '"3".upstream.url', "required key is missing"),
        (8, 50, '"4".upstream.timeout', "wanted 1ms to 1h, got 0s"),
        (8, 63, '"4".upstream.ca_file', "ca_file needs an https address"),
        (
            9,
            29,
            '"5".upstream.url',
            "wanted http://HOST:PORT or https://HOST:PORT, perhaps with a path, without a user",
        ),
        (10, 29, '"6".upstream.url', "an upstream's address must be http://HOST:PORT or https://HOST:PORT, got 'http"),
        (11, 56, '"7".upstream.headers.X-A', "header x-a is named more than once"),
        (11, 72, '"7".upstream.headers.x-a', "header x-a is named more than once"),
        (11, 83, '"7".upstream.headers.Host', "header Host is set for every request and cannot be another"),
        (11, 100, '"7".upstream.headers."a b"', "wanted a header's name, got text 'a b'"),
        (12, 54, '"8".upstream.headers.x', "a secret is given as ${VARIABLE} or file:/path"),
        (12, 66, '"8".upstream.headers.y', "wanted a secret of printable ASCII characters"),
        (13, 50, '"9".upstream.version', "wanted text, got boolean true"),
        (13, 72, '"9".upstream.max_batch_rows', "wanted at least 0, got number -1"),
        (14, 22, '"10".source', "wanted text, got a mapping"),
        (14, 26, '"10".upstreams', "unknown key; did you mean upstream?"),
    ]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for (*_, message), (*_, start) in zip(found, expected, strict=True):
        assert message.startswith(start)
    assert "hunter2" not in str(caught.value)


def test_a_directory_is_the_registry_when_there_is_one() -> None:
    text = 'registry: {directory: /d}\nmodels: {b: {versions: {"2": {source: "registry:x/5"}}}, c: {}}\n'
    assert list(compile_models(parse(text))) == ["c"]
    assert compile_versions(parse(text))["b"].versions == {"2": Path("/d/x/5")}


# --- binding ----------------------------------------------------------------------------------------------------------

LOADED = {"7": "seven", "8": "eight"}


def bound(
    section: str, served: dict[str, str], aliases: dict[str, str] | None = None, registry: str = ""
) -> Bound[str]:
    def lookup(reference: Reference) -> tuple[str, str] | None:
        number = (aliases or {}).get(reference.version, reference.version)
        return (number, served[number]) if number in served else None

    return bind(spec_of(section, registry), served, lookup)


def test_bound_routes_decide() -> None:
    found = bound(f"{ROLLOUT}, rollout: {{id: r, candidate: 8, weight: 50%}}", LOADED)
    assert found.missing == ()
    assert found.routes is not None
    table = RoutingTable({"m": found.routes}, 3)
    decisions = [table.resolve(RouteQuery("m", "", {"u": str(i)}, {}, ""), 0) for i in range(2_000)]
    assert {(d.arm, d.version, d.target) for d in decisions} == {
        ("candidate", "8", "eight"),
        ("control", "7", "seven"),
    }
    assert 900 < sum(d.arm == "candidate" for d in decisions) < 1_100


def test_aliases_become_versions() -> None:
    section = "key: {from: [header:u]}, rollout: {id: r, candidate: '@challenger', weight: 1%}"
    aliases = {"@champion": "7", "@challenger": "8"}
    found = bound(section, LOADED, aliases, "registry: {embedded: true}\n")
    assert found.routes is not None
    assert found.routes.stable == "7"
    assert found.routes.split is not None
    assert found.routes.split.arms[0].to == Destination("m", "8", "eight")


EVERYTHING = (
    f"{ROLLOUT}, rollout: {{id: r, candidate: 8, weight: 5%}}, shadow: [{{to: 8, sample: 1%}}], rules: "
    "[{name: a, match: {header: {x: y}}, to: 8}, {name: b, match: {header: {x: z}}, to: candidate}, "
    "{name: c, match: {version: any}, to: requested}]"
)


def test_what_is_not_loaded_leads_to_stable() -> None:
    found = bound(EVERYTHING, {"7": "seven"})
    assert found.missing == (Reference("m", "8"),)
    assert found.routes is not None
    assert (found.routes.split, found.routes.shadows) == (None, ())
    assert [rule.to for rule in found.routes.rules] == ["stable", "stable", "requested"]
    table = RoutingTable({"m": found.routes}, 1)
    assert table.resolve(RouteQuery("m", "", {"x": "y"}, {}, ""), 0).target == "seven"


def test_without_stable_nothing_is_bound() -> None:
    found = bound(EVERYTHING, {"8": "eight"})
    assert found == Bound(None, (Reference("m", "7"),))


def test_an_experiment_with_a_missing_arm_stands_still() -> None:
    arms = "arms: {a: {to: 7, share: 50%}, b: {to: 8, share: 50%}}"
    found = bound(f"{ROLLOUT}, experiment: {{id: e, {arms}}}", {"7": "seven"})
    assert found.routes is not None
    assert found.routes.split is None


# --- plans ------------------------------------------------------------------------------------------------------------


def plan(old: str, new: str) -> ReloadPlan:
    return plan_reload(model(old), model(new))


def rollout(weight: str, more: str = "", candidate: int = 8, extra: str = "") -> str:
    return f"{ROLLOUT}, rollout: {{id: r, candidate: {candidate}, weight: {weight}{more}}}{extra}"


def test_the_same_file_plans_nothing() -> None:
    found = plan_reload(page_config(), page_config())
    assert found == ReloadPlan()
    assert found.empty
    assert found.allowed
    assert list(found.lines()) == ["nothing changes"]


def test_the_first_file_loads_everything() -> None:
    found = plan_reload(None, page_config())
    assert found.added == ("fraud", "ranker", "search")
    assert found.loads == ("fraud:7", "fraud:8", "fraud:9", "ranker:3", "ranker:4")


def test_growing_takes_exactly_the_difference_from_stable() -> None:
    found = plan(rollout("1%"), rollout("5%"))
    assert found.allowed
    assert [(change.model, change.parts) for change in found.changed] == [("m", ("routing",))]
    assert (found.loads, found.unloads) == ((), ())
    (move,) = found.movements["m"].moves
    assert (move.old.arm, move.new.arm, round(float(move.share), 12)) == ("stable", "candidate", 0.04)
    assert "  4.00% of keys: stable (m 7) -> candidate (m 8)" in list(found.lines())


def test_sources_and_options_are_told_apart() -> None:
    old = parse(f"models: {{m: {{{TWO}}}, gone: {{source: g.onnx}}, same: {{source: s.onnx}}}}\n")
    new = parse(
        "server: {name: x}\nmodels: {m: {versions: {'8': {source: c.onnx}, '9': {source: d.onnx}}}, "
        "same: {source: s.onnx, runtime: {instances: 2}}, fresh: {source: f.onnx}}\n"
    )
    found = plan_reload(old, new)
    assert (found.added, found.removed, found.at_start) == (("fresh",), ("gone",), ("server",))
    assert {change.model: change.parts for change in found.changed} == {
        "m": ("source", "routing"),
        "same": ("options",),
    }
    assert found.loads == ("same", "fresh", "m:8", "m:9")
    assert found.unloads == ("gone", "same", "m:7", "m:8")
    (move,) = found.movements["m"].moves
    assert (move.old.version, move.new.version, move.share) == ("8", "9", 1)


@pytest.mark.parametrize("change", ["url: 'http://b'", "url: 'http://a', headers: {x: '${SALT}'}"])
def test_another_upstream_is_another_version(change: str) -> None:
    old, new = (f"models: {{m: {{{upstream(keys)}}}}}\n" for keys in ("url: 'http://a'", change))
    found = plan_reload(parse(old), parse(new))
    assert {of.model: of.parts for of in found.changed} == {"m": ("source",)}
    assert (found.loads, found.unloads) == (("m:9",), ("m:9",))
    assert plan_reload(parse(new), parse(new)).empty


@pytest.mark.parametrize(
    ("new", "reason"),
    [
        (rollout("5%", candidate=9, extra=""), "the arms of 'r' cannot change"),
        (rollout("5%", more=", secret: '${SALT}'"), "keys would leave an arm that goes on"),
        (rollout("5%").replace("header:u", "header:other"), "keys would leave an arm that goes on"),
        (rollout("5%").replace("id: r", "id: r2"), "keys would leave an arm that goes on"),
    ],
)
def test_what_is_refused(new: str, reason: str) -> None:
    three = TWO.replace("}}", "}, '9': {source: c.onnx}}")
    found = plan(rollout("5%").replace(TWO, three), new.replace(TWO, three))
    assert not found.allowed
    assert [refusal.model for refusal in found.refusals] == ["m"]
    assert reason in found.refusals[0].reason


def test_a_reshuffle_that_is_meant_is_let_through() -> None:
    anew = rollout("5%").replace("id: r", "id: r2")
    assert not plan(rollout("5%"), anew).allowed
    found = plan(rollout("5%"), f"{anew}, reshuffle: true")
    assert found.allowed
    assert found.movements["m"].reshuffles


def test_permission_alone_is_no_change() -> None:
    assert plan(rollout("5%"), rollout("5%", extra=", reshuffle: true")).empty


def experiment(coverage: str, arms: str = "a: {to: 7, share: 50%}, b: {to: 8, share: 50%}") -> str:
    return f"{ROLLOUT}, experiment: {{id: e, arms: {{{arms}}}, coverage: {coverage}}}"


def test_coverage_may_only_grow() -> None:
    assert plan(experiment("20%"), experiment("40%")).allowed
    (refusal,) = plan(experiment("20%"), experiment("19.5%")).refusals
    assert str(refusal) == "m: the coverage of 'e' may only grow, but would go from 20% to 19.5%"


@pytest.mark.parametrize(
    "arms",
    [
        "a: {to: 7, share: 40%}, b: {to: 8, share: 60%}",
        "b: {to: 8, share: 50%}, a: {to: 7, share: 50%}",
        "a: {to: 8, share: 50%}, b: {to: 7, share: 50%}",
    ],
)
def test_arms_live_as_long_as_the_id(arms: str) -> None:
    found = plan(experiment("20%"), f"{experiment('20%', arms)}, reshuffle: true")
    assert ["cannot change while it lives" in refusal.reason for refusal in found.refusals] == [True]


def test_ending_and_promoting_are_allowed() -> None:
    assert plan(rollout("50%"), ROLLOUT).allowed
    promoted = plan(rollout("50%"), f'{TWO}, stable: "8", key: {{from: [header:u]}}')
    assert promoted.allowed
    assert {str(move.new) for move in promoted.movements["m"].moves} == {"stable (m 8)"}


def test_a_plan_is_plain_json() -> None:
    found = plan(rollout("5%"), rollout("5%").replace("id: r", "id: r2"))
    data = json.loads(json.dumps(found.as_dict()))
    assert data["allowed"] is False
    assert data["changed"] == {"m": ["routing"]}
    moves = data["movements"]["m"]["moves"]
    assert sum(move["share"] for move in moves) == pytest.approx(data["movements"]["m"]["share"])
    assert moves[0]["from"] == {"arm": "candidate", "model": "m", "version": "8"}
    assert any(move["reshuffle"] for move in moves)
