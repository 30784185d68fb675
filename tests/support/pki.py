"""Certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def openssl(*args: str) -> None:
    subprocess.run(["openssl", *args], check=True, capture_output=True, timeout=60)


def authority(root: Path, name: str = "ca") -> None:
    """``NAME.pem`` and ``NAME.key``: who signs."""
    files = ("-keyout", f"{root}/{name}.key", "-out", f"{root}/{name}.pem")
    # Clients of Python 3.13 and newer ask for an authority's key usage, and who signed a certificate.
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl("req", "-x509", *_KEY, *files, "-subj", f"/CN=test {name}", "-days", "2", *usage)


def certificate(root: Path, name: str, by: str = "ca", *, expired: bool = False) -> None:
    """``NAME.pem`` and ``NAME.key`` for 127.0.0.1 and localhost, signed ``by`` an authority of the same folder."""
    (root / "names.cnf").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\nauthorityKeyIdentifier=keyid\n")
    openssl("req", *_KEY, "-keyout", f"{root}/{name}.key", "-out", f"{root}/{name}.csr", "-subj", f"/CN={name}")
    signer = ("-CA", f"{root}/{by}.pem", "-CAkey", f"{root}/{by}.key", "-CAcreateserial")
    life = ("-days", "-1" if expired else "2")
    named = ("-in", f"{root}/{name}.csr", "-out", f"{root}/{name}.pem", "-extfile", f"{root}/names.cnf")
    openssl("x509", "-req", *named, *signer, *life)


def usual(root: Path) -> Path:
    """A CA, a server's certificate and a client's; the folder."""
    authority(root)
    certificate(root, "server")
    certificate(root, "client")
    return root
