"""Rules of every kind on both protocols: thousands of mixed requests go the same way, and enter no arm's counts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

from router.decision import RouteQuery
from server.cli.routes import explain
from server.config.load import load_config
from server.config.routing import compile_all
from tests.support import metrics
from tests.support.fast import Ask, Went, ask_grpc_all, ask_http, by_user, grpc_request, http_request
from tests.support.routed import Place
from tests.support.server import Server
from tests.support.wire import Wire

KEYED = "    key: {from: [header:x-user, parameter:user], missing: stable}\n    tenant_header: x-tenant\n"
RULES = """\
    rules:
      - {name: redirected, match: {version: "3", header: {x-tester: "yes"}}, to: "1"}
      - {name: testers, match: {header: {x-tester: "yes"}}, to: "3"}
      - {name: team, match: {header: {x-team: {prefix: blue-}}}, to: b}
      - {name: tier, match: {parameter: {tier: {in: [gold, 1, true]}}}, to: "3"}
      - {name: level, match: {parameter: {level: 7}, tenant: {present: true}}, to: stable}
      - {name: tenants, match: {tenant: {in: [acme, beta]}}, to: "2"}
      - {name: both, match: {header: {x-team: red}, parameter: {level: {present: true}}}, to: control}
"""
EXPERIMENT = """\
    experiment:
      id: e1
      coverage: 60%
      arms: {control: {to: "1", share: 50%}, b: {to: "2", share: 50%}}
"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def mixed(count: int, seed: int = 4) -> list[Ask]:
    """Requests with any of: a key in a header or a parameter, a tenant, a team, a tester's mark, a version."""
    chance = random.Random(seed)
    return [_mixed(chance, n) for n in range(count)]


def _mixed(chance: random.Random, number: int) -> Ask:
    metadata: dict[str, str] = {}
    parameters: dict[str, Any] = {}
    match chance.randrange(4):
        case 0 | 1:
            metadata["x-user"] = f"user-{number}"
        case 2:
            parameters["user"] = chance.choice([f"user-{number}", number, number + 0.5])
    if chance.random() < 0.2:
        metadata["x-tenant"] = chance.choice(["acme", "beta", "acme-2", "other", "ACME"])
    if chance.random() < 0.2:
        metadata["x-team"] = chance.choice(["blue-1", "blue", "red", "blue-"])
    if chance.random() < 0.1:
        metadata["x-tester"] = chance.choice(["yes", "no", "Yes"])
    if chance.random() < 0.2:
        parameters["tier"] = chance.choice(["gold", "silver", 1, True, False, "true", 1.0, 2])
    if chance.random() < 0.2:
        parameters["level"] = chance.choice([7, "7", 7.0, 8, True])
    return Ask(metadata, parameters, chance.choice(["1", "2", "3"]) if chance.random() < 0.15 else "")


def told(place: Place, asks: Iterable[Ask]) -> list[tuple[str, str, str]]:
    """(version, arm, reason) of each as the file says."""
    spec = compile_all(load_config(place.path))["m"]
    found = []
    for ask in asks:
        decision = explain(spec, RouteQuery("m", ask.version, ask.metadata, ask.parameters, "")).decision
        assert decision is not None
        found.append((decision.version, decision.arm, decision.reason))
    return found


def routed(server: Server) -> Counter[tuple[str, str, str]]:
    """The server's own count of decisions by version, arm and reason."""
    found: Counter[tuple[str, str, str]] = Counter()
    for labels, count in metrics.samples(server, "tidegate_route_total").items():
        given = dict(part.split("=", 1) for part in labels.strip("{}").split(","))
        found[given["version"].strip('"'), given["arm"].strip('"'), given["reason"].strip('"')] += int(count)
    return found


def arms(place: Place, server: Server, experiment: str = "e1") -> dict[str, tuple[int, int]]:
    """Arm -> (requests, units) of an experiment's report."""
    status, report, _ = place.admin(server, "GET", f"experiments/{experiment}")
    assert status == 200, report
    return {row["arm"]: (row["requests"], row["units"]) for row in report["arms"]}


def triple(went: Went) -> tuple[str, str, str]:
    return went.version, went.arm, went.reason


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(120)])])
def test_mixed_requests_go_the_same_way_on_both_protocols_and_are_in_no_count(place: Place, count: int) -> None:
    place.write(KEYED + RULES + EXPERIMENT)
    asks = mixed(count)
    wanted = told(place, asks)
    reasons = Counter(reason for *_, reason in wanted)
    rules = {"redirected", "testers", "team", "tier", "level", "tenants", "both"}
    assert set(reasons) >= rules | {"split", "version"}, reasons
    with place.serve() as server:
        by_http = [triple(went) for went in ask_http(server, asks)]
        assert [found for found in zip(asks, by_http, wanted, strict=True) if found[1] != found[2]] == []
        assert routed(server) == Counter(wanted)
        counted = Counter(arm for _, arm, reason in wanted if reason == "split" and arm in ("control", "b"))
        http_only = arms(place, server)
        assert {arm: requests for arm, (requests, _) in http_only.items()} == dict(counted)
        by_grpc = [triple(went) for went in ask_grpc_all(server, asks)]
        assert by_grpc == by_http
        assert routed(server) == Counter(wanted + wanted)
        both = arms(place, server)
        assert {arm: requests for arm, (requests, _) in both.items()} == {arm: 2 * n for arm, n in counted.items()}
        assert {arm: units for arm, (_, units) in both.items()} == {arm: units for arm, (_, units) in http_only.items()}


def test_an_experiment_counts_what_comes_by_another_public_name(place: Place) -> None:
    """``aliases`` are the same routing: the same keys on the same arms, in the same books."""
    place.write("    aliases: [m-too]\n" + KEYED + EXPERIMENT)
    asks = by_user(f"user-{n}" for n in range(300))
    with place.serve() as server:
        first = ask_http(server, asks)
        assert ask_http(server, asks, "m-too") == first
        counted = Counter(went.arm for went in first if went.arm in ("control", "b"))
        assert arms(place, server) == {arm: (2 * n, n) for arm, n in counted.items()}


ODD_KEYS = ["a b", "  padded", "tail  ", "x" * 4000, "0", "a,b", '"quoted"', "%20", "~!@#$^&*()", "a\tb"]


def test_odd_keys_are_the_same_key_on_both_protocols(place: Place) -> None:
    """Surrounding blanks are no part of a field's value in either protocol; everything else is."""
    place.write(KEYED + EXPERIMENT)
    asks = [Ask({"x-user": key + suffix}) for key in ODD_KEYS for suffix in ("", "1", "22", " 3")]
    with place.serve() as server:
        by_http = ask_http(server, asks)
        stripped = [Ask({"x-user": ask.metadata["x-user"].strip(" \t")}) for ask in asks]
        assert ask_http(server, stripped) == by_http
        plain = [(ask, went) for ask, went in zip(stripped, by_http, strict=True) if "\t" not in ask.metadata["x-user"]]
        assert ask_grpc_all(server, [ask for ask, _ in plain]) == [went for _, went in plain]


def test_a_key_given_twice_is_one_key_on_both_protocols(place: Place) -> None:
    """The same two fields, in the same order, are the same key; it may not depend on the protocol which one counts."""
    place.write(KEYED + EXPERIMENT)
    pairs = [(f"user-{n}", f"user-{n + 1000}") for n in range(100)]
    body = http_request(Ask()).partition(b"\r\n\r\n")[2]
    message = grpc_request(Ask())
    with place.serve() as server, grpc.insecure_channel(server.grpc) as channel, Wire(server.http) as wire:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for pair in pairs:
            lines = "".join(f"X-User: {key}\r\n" for key in pair)
            head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: t\r\n{lines}Content-Length: {len(body)}\r\n\r\n"
            wire.send(head.encode() + body)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200, answer.body
            _, done = infer.with_call(message, timeout=20, metadata=[("x-user", key) for key in pair])
            metadata = dict(done.initial_metadata())
            wanted = (answer.headers["x-tidegate-arm"], answer.headers["x-tidegate-version"])
            assert (metadata["x-tidegate-arm"], metadata["x-tidegate-version"]) == wanted, pair
