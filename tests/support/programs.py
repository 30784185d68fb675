"""Test programs in other languages, built on first use from their sources under ``tests/clients``.

Each function gives the command to run, or skips the test and says what is not installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.support.environments import CLIENTS
from tests.support.server import ROOT

#: Debian's golang-google-grpc-dev, a GOPATH; its libgrpc-java with what it needs, a folder of jars.
_GOPATH: Final = Path("/usr/share/gocode")
_JARS: Final = Path("/usr/share/java")
_GRPC_JAVA_PACKAGES: Final = (
    "libgrpc-java libnetty-java libnetty-tcnative-java libnetty-tcnative-jni libperfmark-java libguava-java"
)
_GRPC_JAVA: Final = (
    "grpc-api", "grpc-context", "grpc-core", "grpc-netty", "grpc-stub",
    "guava", "jsr305", "netty-all", "netty-buffer", "netty-codec", "netty-codec-http", "netty-codec-http2",
    "netty-common", "netty-handler", "netty-resolver", "netty-tcnative", "netty-transport", "opencensus-api",
    "perfmark-api",
)  # fmt: skip
#: OpenSSL for Netty, which Debian builds without the JDK's ALPN.
_TCNATIVE: Final = "*/jni/libnetty-tcnative.so"


def needs(*commands: str) -> None:
    for command in commands:
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed")


def run(*command: str, timeout: float = 240, cwd: Path | None = None, **environment: str) -> None:
    """Run to the end; an error with what it said if that is not 0."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def grpc_go(folder: Path) -> list[str]:
    """Built into ``folder``. The first build of a machine takes about a minute, later ones find it cached."""
    needs("go")
    if not (_GOPATH / "src/google.golang.org/grpc/clientconn.go").is_file():
        pytest.skip("grpc-go (golang-google-grpc-dev) is not installed")
    settings = {"GO111MODULE": "off", "GOPATH": str(_GOPATH), "GOFLAGS": "", "CGO_ENABLED": "0"}
    run("go", "build", "-o", str(folder / "checks"), ".", cwd=CLIENTS / "grpc_go", **settings)
    return [str(folder / "checks")]


def grpc_java(folder: Path) -> list[str]:
    """Compiled into ``folder``, where a copy of Netty's OpenSSL has the name that Netty asks for."""
    needs("java", "javac")
    jars = [_JARS / f"{name}.jar" for name in _GRPC_JAVA]
    native = next(Path("/usr/lib").glob(_TCNATIVE), Path(_TCNATIVE))
    absent = [file.name for file in (*jars, native) if not file.is_file()]
    if absent:
        pytest.skip(f"grpc-java ({_GRPC_JAVA_PACKAGES}) is not installed: no {', '.join(absent)}")
    shutil.copy(native, folder / "libnetty_tcnative.so")
    path = ":".join([str(folder), *map(str, jars)])
    run("javac", "-d", str(folder), "-cp", path, str(CLIENTS / "grpc_java" / "Checks.java"))
    return ["java", "-XX:TieredStopAtLevel=1", f"-Djava.library.path={folder}", "-cp", path, "Checks"]


def grpc_js(_: Path) -> list[str]:
    """Its package is installed into ``.venv-grpc-js`` from the lock file beside the program."""
    needs("node", "npm")
    source, installed = CLIENTS / "grpc_js", ROOT / ".venv-grpc-js"
    stamp, lock = installed / ".installed", (source / "package-lock.json").read_text()
    if not (stamp.is_file() and stamp.read_text() == lock):
        installed.mkdir(exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(source / name, installed / name)
        run("npm", "ci", "--ignore-scripts", cwd=installed)
        stamp.write_text(lock)
    return ["node", str(source / "checks.js"), str(installed / "node_modules/@grpc/grpc-js")]
