"""Splits by the numbers: shares, stickiness over growth, restarts, replicas and protocols, and what commands say."""

from __future__ import annotations

import http.client
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from router.table import RoutingTable
from server.cli.routes import explain
from server.config.load import load_config
from server.config.routing import compile_all
from tests.integration.test_registry_serving import cli
from tests.integration.test_routing_serving import Place, X, ask_grpc, canary
from tests.support import routes
from tests.support.server import Server, serving

BODY = json.dumps({"inputs": X}).encode()
KEYS = [f"user-{n}" for n in range(100_000)]
WEIGHTS = [100, 1_000, 2_500, 5_000]
#: Chi-square of one degree of freedom that chance exceeds once in a thousand.
UNLIKELY = 10.83


def drawn(weight: int, keys: Iterable[str], name: str = "r1") -> dict[str, str]:
    """Key -> version by a table of this process; ``weight`` in hundredths of a percent."""
    table = RoutingTable({"m": routes.routes(split=routes.rollout(weight, name=name))}, 1)
    return {key: table.resolve(routes.ask(key), 0).version for key in keys}


def chi_square(hits: int, total: int, share: float) -> float:
    wanted = total * share
    return float((hits - wanted) ** 2 / wanted + (hits - wanted) ** 2 / (total - wanted))


def served(server: Server, keys: Iterable[str]) -> dict[str, str]:
    """Key -> version as a live server answers over HTTP, on one connection."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    found = {}
    for key in keys:
        connection.request("POST", "/v2/models/m/infer", BODY, {"x-user": key})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
        found[key] = str(response.getheader("x-tidegate-version"))
    connection.close()
    return found


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


def test_both_protocols_agree_with_the_table(place: Place) -> None:
    keys = KEYS[:5_000]
    place.write(canary("25%"))
    with place.serve() as server, grpc.insecure_channel(server.grpc) as channel, ThreadPoolExecutor(8) as pool:
        wanted = drawn(2_500, keys)
        assert served(server, keys) == wanted
        assert dict(zip(keys, pool.map(lambda key: ask_grpc(channel, key), keys), strict=True)) == wanted
    assert chi_square(Counter(wanted.values())["2"], len(keys), 0.25) < UNLIKELY


def test_nobody_leaves_a_growing_canary_and_a_reshuffle_is_meant(place: Place) -> None:
    keys = KEYS[:1_500]
    place.write(canary("5%"))
    with place.serve() as server:
        before = served(server, keys)
        for weight in ("10%", "25%"):
            status, answer, _ = place.admin(server, "POST", "config", place.text(canary(weight)).encode())
            assert status == 200, answer
            after = served(server, keys)
            assert {(before[key], after[key]) for key in keys if before[key] != after[key]} == {("1", "2")}
            before = after
        status, answer, _ = place.admin(server, "POST", "config", place.text(canary("5%", candidate="2")).encode())
        assert status == 200, "shrinking gives back those that joined last"
        after = served(server, keys)
        assert after == drawn(500, keys)


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
    keys = KEYS[:800]
    place.write(canary("25%"))
    with place.serve() as server, serving(str(place.path), "--state-dir", str(place.root / "other")) as replica:
        first = served(server, keys)
        assert served(replica, keys) == first
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
