"""Reloads under full load: good and broken configurations by turns, while closed-loop clients ask over both protocols.

No request fails; every answer is by a version that the configuration of its generation leads its caller to, and its
numbers prove that this version ran (version n multiplies by its own scale).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import grpc
import pytest

from server._pb import inference_pb2 as pb
from tests.support.fast import Ask, Went, ask_http, grpc_request
from tests.support.metrics import samples
from tests.support.routed import SCALES, Place, canary
from tests.support.server import Server

USERS = 40
HTTP_CLIENTS = 2
GRPC_CLIENTS = 2
#: What one HTTP client sends before it looks whether it is done.
BURST = 8
TESTER = "tester"


@dataclass(frozen=True)
class Setup:
    """One good configuration: where stable, the rollout and the rule lead."""

    stable: str
    candidate: str
    weight: int
    ruled: str

    def text(self, place: Place, number: int) -> str:
        rule = f'    rules: [{{name: testers, match: {{header: {{x-tester: "1"}}}}, to: "{self.ruled}"}}]\n'
        rollout = canary(f"{self.weight}%", self.candidate).replace("r1", f"r{number}")
        return place.text("    reshuffle: true\n" + rule + rollout, stable=self.stable)

    def leads_to(self, user: str) -> set[str]:
        """The versions that may answer a user."""
        return {self.ruled} if user == TESTER else {self.stable, self.candidate}


def setups() -> Iterator[Setup]:
    """Weights, versions and rules that change from each to the next."""
    versions = sorted(SCALES)
    for number in count():
        stable, candidate, ruled = (versions[(number + shift * (1 + number // 3 % 2)) % 3] for shift in range(3))
        yield Setup(stable, candidate, 10 + 7 * number % 80, ruled)


def broken(place: Place, good: str) -> list[tuple[str, bool]]:
    """Configurations with a mistake each; whether it is one of the text, which has a line."""
    return [
        ("nonsense: [", True),
        (good.replace("reshuffle", "reshufle"), True),
        (good.replace("weight: ", "weight: -"), True),
        (good.replace('to: "', 'to: "9'), True),
        (good.replace(f"{place.root}/v2.onnx", f"{place.root}/broken.onnx"), False),
    ]


@dataclass
class Storm:
    """Clients that ask without a pause until told to stop."""

    server: Server
    seen: list[tuple[str, Went]] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)
    grew: threading.Condition = field(default_factory=threading.Condition)
    done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def raging(self) -> Iterator[Storm]:
        clients = [self._over_http] * HTTP_CLIENTS + [self._over_grpc] * GRPC_CLIENTS
        threads = [threading.Thread(target=self._run, args=(client, n)) for n, client in enumerate(clients)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.done.set()
            for thread in threads:
                thread.join(30)

    def more(self, answers: int) -> None:
        """Wait until so many more have come, or a client has failed."""
        with self.grew:
            wanted = len(self.seen) + answers
            assert self.grew.wait_for(lambda: len(self.seen) >= wanted or self.failures, 30)

    def _run(self, client: Callable[[Iterator[str]], None], number: int) -> None:
        users = (TESTER if n % 10 == 0 else f"u{number}-{n % USERS}" for n in count())
        try:
            client(users)
        except BaseException as error:
            with self.grew:
                self.failures.append(error)
                self.grew.notify_all()

    def _saw(self, users: list[str], went: list[Went]) -> None:
        with self.grew:
            self.seen += zip(users, went, strict=True)
            self.grew.notify_all()

    def _over_http(self, users: Iterator[str]) -> None:
        while not self.done.is_set():
            some = [next(users) for _ in range(BURST)]
            self._saw(some, ask_http(self.server, [asked(user) for user in some]))

    def _over_grpc(self, users: Iterator[str]) -> None:
        with grpc.insecure_channel(self.server.grpc) as channel:
            infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            while not self.done.is_set():
                user = next(users)
                ask = asked(user)
                raw, call = infer.with_call(grpc_request(ask), timeout=20, metadata=tuple(ask.metadata.items()))
                self._saw([user], [went_grpc(raw, dict(call.initial_metadata()))])


def asked(user: str) -> Ask:
    return Ask({"x-tester": "1"} if user == TESTER else {"x-user": user})


def went_grpc(raw: bytes, headers: dict[str, str]) -> Went:
    """Where a request went, its numbers checked."""
    answer = pb.ModelInferResponse.FromString(raw)
    version = answer.model_version
    assert headers["x-tidegate-version"] == version
    numbers = memoryview(answer.raw_output_contents[0]).cast("f").tolist()
    assert numbers == [SCALES[version] * x for x in (1, 2, 3, 4)]
    return Went(version, headers["x-tidegate-arm"], headers["x-tidegate-reason"], int(headers["x-tidegate-generation"]))


@pytest.mark.parametrize("reloads", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_reloads_under_load_lose_nothing(tmp_path: Path, reloads: int) -> None:
    place = Place(tmp_path)
    (place.root / "broken.onnx").write_bytes(b"no model")
    coming = setups()
    in_force = next(coming)
    place.path.write_text(in_force.text(place, 0))
    with place.serve() as server, Storm(server).raging() as storm:
        storm.more(20)
        leads: dict[int, Setup] = {1: in_force}
        for number in range(1, reloads + 1):
            setup = next(coming)
            text = setup.text(place, number)
            leads[place.apply(server, text)["generation"]] = setup
            mistakes = broken(place, text)
            bad, has_line = mistakes[number % len(mistakes)]
            status, answer, _ = place.admin(server, "POST", "config", bad.encode())
            assert status == 400, answer
            if has_line:
                assert all(problem["line"] > 0 for problem in answer["problems"]), answer
            storm.more(8)
        storm.more(20)
        storm.done.set()
        assert not storm.failures, storm.failures[0]
        assert samples(server, "tidegate_config_generation")['{kind="applied"}'] == 1 + reloads
        status, rows, _ = place.admin(server, "GET", f"audit?limit={6 * reloads + 50}")
        assert status == 200
    assert not storm.failures
    assert sorted(leads) == list(range(1, reloads + 2))
    for user, went in storm.seen:
        assert went.version in leads[went.generation].leads_to(user), (user, went)
    assert len({went.generation for _, went in storm.seen}) > reloads // 2
    rejected = [row for row in rows["events"] if row["action"] == "config.rejected"]
    assert len(rejected) == reloads
