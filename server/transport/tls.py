"""What the inference listeners show and ask for over TLS, from PEM files."""

from __future__ import annotations

import ssl

import grpc

from server.config.settings import TlsSettings
from server.errors import ConfigError


def tls_context(tls: TlsSettings) -> ssl.SSLContext:
    """A server context for the HTTP listener; clients must show a certificate when a CA for them is named.

    Raises ConfigError for files that cannot be used.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # OpenSSL before 3.0 lets clients ask for handshakes without end
    try:
        context.load_cert_chain(tls.certificate, tls.private_key)
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS files cannot be used: {error}") from None
    return context


def grpc_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    """The same for the gRPC listener. Raises ConfigError for files that cannot be read."""
    try:
        pair = (tls.private_key.read_bytes(), tls.certificate.read_bytes())
        client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"TLS files cannot be used: {error}") from None
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)
