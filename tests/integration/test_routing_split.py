"""Splits by the numbers: shares, stickiness over growth, restarts, replicas and protocols, and what commands say."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from router.table import RoutingTable
from server.cli.routes import explain
from server.config.load import load_config
from server.config.routing import compile_all
from tests.support import routes
from tests.support.cli import cli
from tests.support.fast import Ask, ask_grpc_all, ask_http, by_user
from tests.support.routed import Place, canary
from tests.support.server import Server, serving

KEYS = [f"user-{n}" for n in range(100_000)]
WEIGHTS = [100, 1_000, 2_500, 5_000]
#: Chi-square of one degree of freedom that chance exceeds once in a thousand.
UNLIKELY = 10.83
#: ... and for what is drawn anew in each run, once in ten million.
HARDLY_EVER = 28.0
THREE_SIGMA = 9.0


def drawn(weight: int, keys: Iterable[str], name: str = "r1") -> dict[str, str]:
    """Key -> version by a table of this process; ``weight`` in hundredths of a percent."""
    table = RoutingTable({"m": routes.routes(split=routes.rollout(weight, name=name))}, 1)
    return {key: table.resolve(routes.ask(key), 0).version for key in keys}


def chi_square(hits: int, total: int, share: float) -> float:
    wanted = total * share
    return float((hits - wanted) ** 2 / wanted + (hits - wanted) ** 2 / (total - wanted))


def served(server: Server, keys: Iterable[str]) -> dict[str, str]:
    """Key -> version as a live server answers over HTTP."""
    keys = list(keys)
    return {key: went.version for key, went in zip(keys, ask_http(server, by_user(keys)), strict=True)}


def served_grpc(server: Server, keys: Iterable[str]) -> dict[str, str]:
    """The same over gRPC."""
    keys = list(keys)
    return {key: went.version for key, went in zip(keys, ask_grpc_all(server, by_user(keys)), strict=True)}


def arms_of(server: Server, keys: Iterable[str]) -> dict[str, str]:
    """Key -> arm as a live server answers over HTTP."""
    keys = list(keys)
    return {key: went.arm for key, went in zip(keys, ask_http(server, by_user(keys)), strict=True)}


def moved(before: Mapping[str, str], after: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """(from, to) -> how many keys went that way."""
    return Counter((before[key], after[key]) for key in before if before[key] != after[key])


def resalted(place: Place, weight: str) -> str:
    """The canary under the same id with a secret that draws other keys."""
    (place.root / "salt").write_text("another")
    return canary(weight).replace(f"weight: {weight}", f'weight: {weight}, secret: "file:{place.root}/salt"')


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_arm_gets_its_share_of_keys(weight: int) -> None:
    hits = Counter(drawn(weight, KEYS).values())["2"]
    assert chi_square(hits, len(KEYS), weight / 10_000) < UNLIKELY


@pytest.mark.parametrize("weight", WEIGHTS)
def test_requests_without_a_key_are_shared_alike(weight: int) -> None:
    table = RoutingTable({"m": routes.routes(split=routes.rollout(weight))}, 1)
    chance = random.Random(7)
    hits = sum(table.resolve(routes.ask(), chance.getrandbits(64)).version == "2" for _ in KEYS)
    assert chi_square(hits, len(KEYS), weight / 10_000) < UNLIKELY


@pytest.mark.parametrize("weight", WEIGHTS)
def test_two_rollouts_draw_independently(weight: int) -> None:
    first, second = drawn(weight, KEYS, "r1"), drawn(weight, KEYS, "r2")
    both = sum(first[key] == second[key] == "2" for key in KEYS)
    assert chi_square(both, Counter(first.values())["2"], weight / 10_000) < UNLIKELY


def test_growth_takes_from_stable_only() -> None:
    small, middle, large = (drawn(weight, KEYS) for weight in (500, 1_000, 2_500))
    for before, after, more in ((small, middle, 0.05), (middle, large, 0.15)):
        moved = [(before[key], after[key]) for key in KEYS if before[key] != after[key]]
        assert set(moved) == {("1", "2")}
        assert chi_square(len(moved), len(KEYS), more) < UNLIKELY


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(120)])])
def test_keys_live_at_growing_weights(place: Place, count: int) -> None:
    """Shares, who moves, and the table's own word, over HTTP; over gRPC for a part of the keys."""
    keys, some = KEYS[:count], KEYS[: count // 10]
    place.write(canary("1%"))
    with place.serve() as server:
        before = served(server, keys)
        last = 100
        for weight in (*WEIGHTS[1:], 0):
            hits = Counter(before.values())["2"]
            assert chi_square(hits, len(keys), last / 10_000) < UNLIKELY
            assert before == drawn(last, keys)
            assert served_grpc(server, some) == {key: before[key] for key in some}
            if not weight:
                break
            place.apply(server, place.text(canary(f"{weight / 100:g}%")))
            after = served(server, keys)
            movers = moved(before, after)
            assert set(movers) == {("1", "2")}, "nobody leaves the candidate"
            assert chi_square(movers["1", "2"], len(keys), (weight - last) / 10_000) < THREE_SIGMA
            before, last = after, weight


def test_ten_thousand_keys_live_over_grpc(place: Place) -> None:
    keys = KEYS[:10_000]
    place.write(canary("10%"))
    with place.serve() as server:
        found = served_grpc(server, keys)
    assert found == drawn(1_000, keys)
    assert chi_square(Counter(found.values())["2"], len(keys), 0.1) < UNLIKELY


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_hundred_thousand_keys_live_on_both_protocols(place: Place, weight: int) -> None:
    place.write(canary(f"{weight / 100:g}%"))
    with place.serve() as server:
        found = served(server, KEYS)
        assert chi_square(Counter(found.values())["2"], len(KEYS), weight / 10_000) < UNLIKELY
        assert served_grpc(server, KEYS) == found == drawn(weight, KEYS)


def test_requests_without_a_key_are_shared_live(place: Place) -> None:
    place.write(canary("25%"))
    with place.serve() as server:
        for went in (ask_http(server, [Ask()] * 4_500), ask_grpc_all(server, [Ask()] * 2_250)):
            assert chi_square(sum(one.version == "2" for one in went), len(went), 0.25) < HARDLY_EVER


def test_five_ten_twenty_five_live_and_a_shrinking_weight_gives_back(place: Place) -> None:
    keys = KEYS[20_000:23_000]
    place.write(canary("5%"))
    with place.serve() as server:
        first = before = served(server, keys)
        for weight, more in (("10%", 0.05), ("25%", 0.15)):
            place.apply(server, place.text(canary(weight)))
            after = served(server, keys)
            movers = moved(before, after)
            assert set(movers) == {("1", "2")}
            assert chi_square(movers["1", "2"], len(keys), more) < THREE_SIGMA
            before = after
        place.apply(server, place.text(canary("5%")))
        assert served(server, keys) == first, "shrinking gives back those that joined last"


def test_arms_of_a_growing_experiment_take_from_stable_only(place: Place) -> None:
    """Three arms, coverage growing by the admin API: no key moves between arms, or back."""
    keys = KEYS[:3_000]

    def experiment(coverage: int) -> str:
        arms = '{control: {to: "1", share: 20%}, b: {to: "2", share: 50%}, c: {to: "3", share: 30%}}'
        key = "    key: {from: [header:x-user]}\n"
        return f"{key}    experiment: {{id: e3, coverage: {coverage}%, arms: {arms}}}\n"

    place.write(experiment(10))
    with place.serve() as server:
        before, last = arms_of(server, keys), 10
        for coverage in (25, 60, 100):
            place.apply(server, place.text(experiment(coverage)))
            after = arms_of(server, keys)
            movers = moved(before, after)
            assert {source for source, _ in movers} == {"stable"}
            for arm, share in (("control", 0.2), ("b", 0.5), ("c", 0.3)):
                assert chi_square(movers["stable", arm], len(keys), share * (coverage - last) / 100) < THREE_SIGMA
            before, last = after, coverage
        assert set(before.values()) == {"control", "b", "c"}
        status = place.admin(server, "POST", "config", place.text(experiment(50)).encode())[0]
        assert status == 400, "coverage may only grow"
        assert arms_of(server, keys) == before


def test_the_candidate_grows_into_stables_ground_and_its_control_moves_ahead_of_it(place: Place) -> None:
    keys = KEYS[:3_000]
    place.write(canary("5%"))
    with place.serve() as server:
        before = arms_of(server, keys)
        for weight, share in (("10%", 0.1), ("25%", 0.25), ("50%", 0.5)):
            place.apply(server, place.text(canary(weight)))
            after = arms_of(server, keys)
            movers = moved(before, after)
            assert all(source != "candidate" for source, _ in movers)
            assert all(to != "stable" for _, to in movers)
            sizes = Counter(after.values())
            assert all(chi_square(sizes[arm], len(keys), share) < THREE_SIGMA for arm in ("candidate", "control"))
            before = after
        assert set(before.values()) == {"candidate", "control"}


def test_a_configuration_that_moves_keys_is_refused_with_their_number(place: Place) -> None:
    keys = KEYS[:500]
    place.write(canary("25%") + "    reshuffle: false\n")
    moving = resalted(place, "25%")
    with place.serve() as server:
        before = served(server, keys)
        status, answer, _ = place.admin(server, "POST", "config", place.text(moving).encode())
        assert status == 400
        assert "18.75% of keys: candidate (m 2) -> stable (m 1)" in answer["error"]
        assert "reshuffle: true" in answer["error"]
        assert served(server, keys) == before
        status, answer, _ = place.admin(server, "POST", "config", place.text(moving + "    reshuffle: true\n").encode())
        assert status == 200, answer
        after = served(server, keys)
        left = sum(before[key] == "2" and after[key] == "1" for key in keys)
        assert chi_square(left, len(keys), 0.1875) < UNLIKELY
        assert answer["plan"]["movements"]["m"]["share"] == 0.375


def test_a_restart_and_a_replica_draw_alike(place: Place) -> None:
    keys = KEYS[:2_000]
    place.write(canary("25%"))
    with place.serve() as server, serving(str(place.path), "--state-dir", str(place.root / "other")) as replica:
        first = served(server, keys)
        assert served(replica, keys) == first
        assert served_grpc(replica, keys) == first
    with place.serve() as again:
        assert served(again, keys) == first


def test_the_plan_is_printed_before_it_is_carried_out(place: Place) -> None:
    place.write(canary("10%"))
    file = place.root / "next.yaml"
    with place.serve() as server:
        for more, code in (
            (canary("25%"), 0),
            (resalted(place, "10%"), 2),
        ):
            file.write_text(place.text(more))
            done = cli("check-config", str(file), "--against", server.admin, check=False)
            assert done.returncode == code, done.stdout + done.stderr
            assert "-> candidate" in done.stdout
        file.write_text("nonsense: [")
        assert cli("check-config", str(file), "--against", server.admin, check=False).returncode == 2
        file.write_text(place.text(canary("25%")))
    done = cli("check-config", str(file), "--against", server.admin, check=False)
    assert done.returncode not in (0, 2), "a server that is gone is no plan"
    assert "cannot be read" in done.stderr


def test_explain_route_agrees_with_the_live_server(place: Place) -> None:
    keys = KEYS[:200]
    place.write(
        '    rules:\n      - {name: vip, match: {header: {x-user: {prefix: user-1}}}, to: "3"}\n' + canary("25%")
    )
    spec = compile_all(load_config(place.path))["m"]
    told: Mapping[str, str] = {
        key: decision.version for key in keys if (decision := explain(spec, routes.ask(key)).decision) is not None
    }
    assert set(told.values()) == {"1", "2", "3"}
    with place.serve() as server:
        assert served(server, keys) == told
    for key in keys[:2]:
        done = cli("explain-route", str(place.path), "--model", "m", "--header", f"x-user={key}", "--json")
        assert json.loads(done.stdout)["decision"]["version"] == told[key]
