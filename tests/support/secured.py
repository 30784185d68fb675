"""A native listener over TLS, for what clients in clear are asked too."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from server.config.settings import TlsSettings
from server.transport.native.server import GrpcMethods, NativeServer, Served
from server.transport.tls import tls_context
from tests.support.echo import Running


@contextmanager
def secured(
    base: Running, certificates: Path, *, mutual: bool = True, version: ssl.TLSVersion | None = None
) -> Iterator[str]:
    """Its address. The models are those of ``base``, whose transport is native; see ``pki.usual`` for the folder.

    ``version``: the only one that is spoken.
    """
    files = TlsSettings(
        certificate=certificates / "server.pem",
        private_key=certificates / "server.key",
        client_ca=certificates / "ca.pem" if mutual else None,
    )
    context = tls_context(files)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    infer = cast("NativeServer", base.http_server).infer
    served = Served(base.port, base.catalog, infer, GrpcMethods(base.services))
    server = base.call(lambda: NativeServer(served, limits=base.port.limits, tls=context))
    try:
        yield "{}:{}".format(*base.run(server.start("127.0.0.1", 0)))
    finally:
        base.run(server.drain(0.5))
