"""TLS and mutual TLS on both inference listeners, with certificates made by openssl for the test."""

from __future__ import annotations

import http.client
import json
import ssl
from pathlib import Path

import grpc
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.pki import usual
from tests.support.server import Server, serving


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server certificate for 127.0.0.1 and a client certificate."""
    return usual(tmp_path_factory.mktemp("pki"))


def config(root: Path, pki: Path, extra: str) -> Path:
    models.affine(root / "m.onnx")
    path = root / "config.yaml"
    path.write_text(
        f"apiVersion: tidegate/v1\n"
        f"server:\n  tls: {{certificate: {pki}/server.pem, private_key: {pki}/server.key{extra}}}\n"
        f"models:\n  m: {{source: {root}/m.onnx}}\n"
    )
    return path


def ready_over_http(server: Server, context: ssl.SSLContext) -> bool:
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=20, context=context)
    try:
        connection.request("GET", "/v2/health/ready")
        return bool(json.loads(connection.getresponse().read())["ready"])
    finally:
        connection.close()


def ready_over_grpc(server: Server, credentials: grpc.ChannelCredentials) -> bool:
    with grpc.secure_channel(server.grpc, credentials) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ServerReady",
            request_serializer=pb.ServerReadyRequest.SerializeToString,
            response_deserializer=pb.ServerReadyResponse.FromString,
        )
        return bool(call(pb.ServerReadyRequest(), timeout=20).ready)


def test_tls_on_both_protocols(tmp_path: Path, pki: Path) -> None:
    with serving(str(config(tmp_path, pki, "")), "--state-dir", str(tmp_path / "state")) as server:
        trusting = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        assert ready_over_http(server, trusting)
        assert ready_over_grpc(server, grpc.ssl_channel_credentials((pki / "ca.pem").read_bytes()))
        with pytest.raises(ssl.SSLError):
            ready_over_http(server, ssl.create_default_context())


def test_mutual_tls_refuses_clients_without_a_certificate(tmp_path: Path, pki: Path) -> None:
    path = config(tmp_path, pki, f", client_ca: {pki}/ca.pem")
    ca = (pki / "ca.pem").read_bytes()
    with serving(str(path), "--state-dir", str(tmp_path / "state")) as server:
        known = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
            ready_over_http(server, known)
        with pytest.raises(grpc.RpcError):
            ready_over_grpc(server, grpc.ssl_channel_credentials(ca))
        known.load_cert_chain(pki / "client.pem", pki / "client.key")
        assert ready_over_http(server, known)
        key, certificate = (pki / "client.key").read_bytes(), (pki / "client.pem").read_bytes()
        assert ready_over_grpc(server, grpc.ssl_channel_credentials(ca, key, certificate))


def test_a_wrong_key_is_a_configuration_error(tmp_path: Path, pki: Path) -> None:
    path = config(tmp_path, pki, "")
    path.write_text(path.read_text().replace("server.key", "client.key"))
    server = Server(str(path), "--state-dir", str(tmp_path / "state"))
    try:
        assert server.wait() == 2
        assert any("TLS" in line for line in server.raw)
    finally:
        server.kill()
