"""router.compiled: the whole decision of one model: order, keys, shadows, fallback, explanation, mistakes."""

from __future__ import annotations

from collections import Counter

import pytest

from router.compiled import CompiledRoutes, check
from router.errors import BadRoutes, BadVersion, KeyMissing, UnknownVersion
from router.policy.base import SPACE
from router.policy.sticky import position, seed_of
from router.types import Arm, ExperimentSplit, KeySpec, Match, ModelRoutes, Rule, ShadowRoute
from tests.support.routes import PRESENT, ask, one_of, rollout, routes, to

FULL = routes(
    rules=(
        Rule("partners", Match(tenant=one_of("acme")), to("7")),
        Rule("testers", Match(header={"x-canary": one_of("always")}), "a2"),
    ),
    tenant_header="x-tenant",
    split=rollout(1_000, control=True),
    shadows=(ShadowRoute("s9", to("9"), 500),),
)


def test_without_a_split_stable_answers_and_counts() -> None:
    decision = CompiledRoutes("m", routes()).decide(ask("ann"), 0, 5)
    assert (decision.arm, decision.reason, decision.version, decision.generation) == ("stable", "default", "1", 5)
    assert (decision.counted, decision.propensity, decision.unit, decision.key_hash) == (True, 1.0, "request", 0)


def test_a_decision_that_nothing_changes_still_says_the_generation_it_was_asked_under() -> None:
    compiled = CompiledRoutes("m", routes())
    assert [compiled.decide(ask("ann"), 0, generation).generation for generation in (5, 5, 6, 5, 0)] == [5, 5, 6, 5, 0]


def test_a_key_decides_whatever_the_draw_and_is_handed_on() -> None:
    compiled = CompiledRoutes("m", FULL)
    decisions = [compiled.decide(ask("ann"), draw, 1) for draw in (0, SPACE // 2, SPACE - 1)]
    assert {decision.key_hash for decision in decisions} == {position("ann", seed_of("r"))}
    assert len({decision.arm for decision in decisions}) == 1
    assert decisions[0].unit == "key"


def test_propensities_are_the_shares_of_the_arms() -> None:
    compiled = CompiledRoutes("m", FULL)
    found = {d.arm: d.propensity for d in (compiled.decide(ask(), n * (SPACE // 20), 1) for n in range(20))}
    assert found == {"a2": pytest.approx(0.1), "c2": pytest.approx(0.1), "stable": pytest.approx(0.8)}
    assert sum(found.values()) == pytest.approx(1)


def test_a_control_runs_the_stable_version() -> None:
    decision = CompiledRoutes("m", FULL).decide(ask(), SPACE * 15 // 100, 1)
    assert (decision.arm, decision.version, decision.fall_back()) == ("c2", "1", None)


def test_no_key_random() -> None:
    decision = CompiledRoutes("m", FULL).decide(ask(), 0, 1)
    assert (decision.arm, decision.reason, decision.unit, decision.key_hash) == ("a2", "split", "request", 0)
    assert decision.counted


def test_no_key_stable_is_not_counted() -> None:
    decision = CompiledRoutes("m", routes(key=KeySpec(("header:x-user",), "stable"), split=rollout(10_000))).decide(
        ask(), 0, 1
    )
    assert (decision.arm, decision.reason, decision.counted, decision.propensity) == ("stable", "keyless", False, 1.0)


@pytest.mark.parametrize("weight", [0, 100, 10_000])
def test_no_key_reject(weight: int) -> None:
    compiled = CompiledRoutes("m", routes(key=KeySpec(("header:x-user",), "reject"), split=rollout(weight)))
    with pytest.raises(KeyMissing, match="header:x-user"):
        compiled.decide(ask(), 0, 1)
    assert compiled.decide(ask("ann"), 0, 1).counted
    assert compiled.decide(ask(version="3"), 0, 1).version == "3"
    assert CompiledRoutes("m", routes(key=KeySpec(("header:x-user",), "reject"))).decide(ask(), 0, 1).version == "1"


def test_an_arm_with_everything_gets_everything() -> None:
    compiled = CompiledRoutes("m", routes(split=rollout(10_000)))
    assert {compiled.decide(ask(), draw, 1).arm for draw in (0, SPACE - 1)} == {"a2"}
    assert compiled.arms["stable"].propensity == 0


def test_a_failed_arm_falls_back_to_stable_of_the_same_table() -> None:
    decision = CompiledRoutes("m", FULL).decide(ask(), 0, 8)
    fallen = decision.fall_back()
    assert fallen is not None
    assert (fallen.version, fallen.target, fallen.arm, fallen.reason) == ("1", "m:1", "stable", "fallback")
    assert (fallen.generation, fallen.counted, fallen.shadows, fallen.fall_back()) == (8, False, (), None)


def test_an_arm_on_the_stable_version_has_no_fallback() -> None:
    split = ExperimentSplit("e", (Arm("control", to("1"), 5_000), Arm("b", to("2"), 5_000)), 10_000)
    compiled = CompiledRoutes("m", routes(split=split))
    assert compiled.decide(ask(), 0, 1).fall_back() is None
    assert compiled.decide(ask(), SPACE - 1, 1).fall_back() is not None


# --- shadows ---


def test_shadows_are_sampled_by_their_own_draws() -> None:
    shadows = (ShadowRoute("s8", to("8"), 5_000), ShadowRoute("s9", to("9"), 2_000))
    compiled = CompiledRoutes("m", routes(split=rollout(5_000), shadows=shadows))
    total = 20_000
    found: Counter[tuple[str, ...]] = Counter()
    for draw in range(0, SPACE, SPACE // total):
        decision = compiled.decide(ask(), draw, 1)
        found[decision.arm, *(shadow.id for shadow in decision.shadows)] += 1
    shares = {(): 0.4, ("s8",): 0.4, ("s9",): 0.1, ("s8", "s9"): 0.1}
    for arm in ("a2", "stable"):
        for names, share in shares.items():
            wanted = share * total / 2
            assert abs(found[arm, *names] - wanted) < 4 * wanted**0.5


def test_all_and_none_are_sampled() -> None:
    shadows = (ShadowRoute("all", to("8"), 10_000), ShadowRoute("none", to("9"), 0))
    compiled = CompiledRoutes("m", routes(shadows=shadows))
    for draw in (0, 1, SPACE - 1):
        assert [shadow.id for shadow in compiled.decide(ask(), draw, 1).shadows] == ["all"]


def test_no_copy_goes_to_the_version_that_answers_nor_for_named_and_ruled_requests() -> None:
    compiled = CompiledRoutes(
        "m",
        routes(
            rules=(Rule("r", Match(header={"x-a": PRESENT}), to("3")),),
            split=rollout(5_000),
            shadows=(ShadowRoute("s", to("2"), 10_000),),
        ),
    )
    assert compiled.decide(ask(), 0, 1).shadows == ()
    assert len(compiled.decide(ask(), SPACE - 1, 1).shadows) == 1
    assert compiled.decide(ask(headers={"x-a": ""}), SPACE - 1, 1).shadows == ()
    assert compiled.decide(ask(version="3"), SPACE - 1, 1).shadows == ()


# --- names ---


def test_several_names_over_one_model_and_one_name_over_several() -> None:
    alias = CompiledRoutes("best", routes(model="m"))
    assert (alias.decide(ask(), 0, 1).model, alias.decide(ask(), 0, 1).public_name) == ("m", "best")
    split = ExperimentSplit("e", (Arm("ours", to("1"), 5_000), Arm("other", to("4", "n"), 5_000)), 10_000)
    mixed = CompiledRoutes("best", routes(model="m", split=split))
    found = {(d.model, d.version, d.target) for d in (mixed.decide(ask(), draw, 1) for draw in (0, SPACE - 1))}
    assert found == {("m", "1", "m:1"), ("n", "4", "n:4")}
    with pytest.raises(UnknownVersion) as caught:
        mixed.decide(ask(version="12"), 0, 1)
    assert caught.value.model == "best"


def test_the_same_version_number_of_another_model_is_another_version() -> None:
    split = ExperimentSplit("e", (Arm("ours", to("2"), 5_000), Arm("other", to("1", "n"), 5_000)), 10_000)
    compiled = CompiledRoutes("m", routes(split=split, shadows=(ShadowRoute("s", to("1", "n"), 10_000),)))
    assert compiled.decide(ask(), SPACE - 1, 1).fall_back() is not None
    assert len(compiled.decide(ask(), 0, 1).shadows) == 1


def test_versions_that_rules_speak_of() -> None:
    compiled = CompiledRoutes("m", routes(rules=(Rule("old", Match(version=one_of("42")), to("3")),)))
    assert compiled.spoken_of("42")
    assert not compiled.spoken_of("43")
    with pytest.raises(BadVersion):
        compiled.decide(ask(version="x"), 0, 1)


# --- explanation ---


@pytest.mark.parametrize(
    ("query", "last", "steps"),
    [
        (ask(version="3"), "-> m version 3 as arm 'pinned'", 3),
        (ask("u", headers={"x-tenant": "acme"}), "-> m version 7 as arm 'pinned' (rule 'partners' matches", 3),
        (ask("u", headers={"x-tenant": "b", "x-canary": "always"}), "-> m version 2 as arm 'a2' (rule 'testers'", 4),
    ],
)
def test_an_explanation_ends_with_the_decision(query: object, last: str, steps: int) -> None:
    lines = list(CompiledRoutes("m", FULL).explain(query))
    assert lines[-1].startswith(last)
    assert len(lines) == steps


def test_an_explanation_tells_rules_key_and_interval() -> None:
    compiled = CompiledRoutes("m", FULL)
    lines = list(compiled.explain(ask("ann", headers={"x-tenant": "b"})))
    assert lines[1] == "rule 'partners': header x-tenant is 'b', which does not match"
    assert lines[2] == "rule 'testers': header x-canary is absent"
    assert lines[3] == "key 'ann' from header:x-user"
    place = position("ann", seed_of("r")) / SPACE
    assert lines[4].startswith(f"position {place:.6f} under 'r' lies in [")
    decision = compiled.decide(ask("ann"), 0, 1)
    assert lines[5].startswith(f"-> m version {decision.version} as arm '{decision.arm}' (split; ")
    assert lines[6] == "shadow: m version 9 gets 5% of these"


def test_an_explanation_leaves_chance_open_unless_told_the_draw() -> None:
    compiled = CompiledRoutes("m", FULL)
    assert list(compiled.explain(ask()))[3] == "no key: drawn at random among stable 80.00%, a2 10.00%, c2 10.00%"
    assert list(compiled.explain(ask(), 0))[-2].startswith("-> m version 2 as arm 'a2'")


def test_an_explanation_of_keyless_and_unsplit_requests() -> None:
    to_stable = CompiledRoutes("m", routes(key=KeySpec(("header:x-user",), "stable"), split=rollout(1)))
    assert "go to stable" in list(to_stable.explain(ask()))[-1]
    assert "nothing is split" in list(CompiledRoutes("m", routes()).explain(ask()))[-1]
    reject = CompiledRoutes("m", routes(key=KeySpec(("header:x-user",), "reject"), split=rollout(1)))
    with pytest.raises(KeyMissing):
        list(reject.explain(ask()))


# --- mistakes ---


def test_every_mistake_is_reported_at_once() -> None:
    bad: ModelRoutes[str] = ModelRoutes(
        {"1": "one"},
        "2",
        key=KeySpec(("cookie:x",)),
        rules=(Rule("r", Match(), "nobody"),),
        split=rollout(20_000),
        shadows=(ShadowRoute("s", to("9"), -1), ShadowRoute("s", to("9"), 1)),
    )
    places = [problem.where for problem in check(bad)]
    assert places == [
        ("stable",),
        ("key", "from", 0),
        ("rules", 0, "match"),
        ("rules", 0, "to"),
        ("rollout", "arms", 0, "weight"),
        ("shadow", 0, "sample"),
        ("shadow", 1, "id"),
    ]
    with pytest.raises(
        BadRoutes, match=r"routes of model 'm': stable: wanted one of the model's versions \(1\), got '2'"
    ):
        CompiledRoutes("m", bad)


def test_good_routes_have_no_mistakes() -> None:
    assert list(check(FULL)) == []
    assert list(check(routes())) == []
