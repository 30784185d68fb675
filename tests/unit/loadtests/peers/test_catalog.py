"""loadtests.peers.catalog: peers by name, and the forms of those that are no V2 servers."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from loadtests.crew import PROTOCOLS
from loadtests.peers.catalog import BENTOML, KSERVE, LITSERVE, MOSEC, PEERS, Peer, chosen
from loadtests.peers.environments import pins, requirements
from server.errors import InvalidArgument

ROW = np.array([[0.5, -1.0, 2.0]], np.float32)
WANTED = np.array([[0.25, 4.0]], np.float32)


def test_each_peer_has_its_program_and_its_requirements() -> None:
    for peer in PEERS:
        assert importlib.util.find_spec(f"loadtests.peers.servers.{peer.name}_server")
        assert requirements(peer.name).exists()
        assert any(pin.partition("==")[0].endswith(peer.name) for pin in pins(peer.name))
        assert set(peer.protocols) <= set(PROTOCOLS)
        assert set(peer.forms) <= set(peer.protocols)


def test_every_requirement_has_bounds() -> None:
    for peer in PEERS:
        assert all("==" in pin or "<" in pin for pin in pins(peer.name))


def test_peers_by_name() -> None:
    assert chosen([]) == PEERS
    assert chosen(["kserve", "mosec"]) == (MOSEC, KSERVE)
    with pytest.raises(InvalidArgument, match="mosec"):
        chosen(["triton"])


@pytest.mark.parametrize(
    ("peer", "path", "answer"),
    [
        (MOSEC, "/json", {"y": WANTED.tolist()}),
        (LITSERVE, "/predict", {"y": WANTED.tolist()}),
        (BENTOML, "/infer", WANTED.tolist()),
    ],
)
def test_plain_json(peer: Peer, path: str, answer: object) -> None:
    request = peer.requests(ROW)["http-json"]
    assert request.path == path
    assert json.loads(request.body) == {"x": ROW.tolist()}
    check = peer.check("http-json", WANTED)
    assert check(json.dumps(answer).encode())
    assert not check(json.dumps({"y": [[0.25, 5.0]]}).encode())
    assert not check(json.dumps({"y": [[0.25, 4.0]] * 2}).encode())


def test_bare_rows() -> None:
    request = MOSEC.requests(ROW)["http-binary"]
    assert request.path == "/binary"
    assert np.frombuffer(request.body, "<f4").tolist() == ROW[0].tolist()
    check = MOSEC.check("http-binary", WANTED)
    assert check(WANTED.tobytes())
    assert not check(ROW[:, :2].tobytes())


def test_v2_servers_have_no_form_of_their_own() -> None:
    assert KSERVE.requests(ROW) == {}
    output = {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 4.0]}
    assert KSERVE.check("http-json", WANTED)(json.dumps({"outputs": [output]}).encode())
