"""Generate ``server/_pb`` from ``proto``, or check that what is committed is fresh.

``python scripts/proto.py`` writes; ``--check`` compares and exits 1 when a file is stale, missing or left over.
The compiler is pinned and lives in its own environment, ``.venv-proto``: code made by protoc 30 (protobuf 6.30) runs on
6.30 to 7.x, code made by a newer one would not run beside clients that need protobuf below 7.

Two things are changed in what protoc writes: modules are named ``server._pb...``, and messages register in our own
pool (see ``server/_pb/_pool.py``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
PROTO: Final = ROOT / "proto"
TARGET: Final = ROOT / "server" / "_pb"
ENVIRONMENT: Final = ROOT / ".venv-proto"
PINS: Final = ("grpcio-tools==1.72.2", "grpcio==1.72.2", "protobuf==6.30.2", "setuptools==80.9.0")
#: The folder that descriptors carry in their file names: ``tidegate/inference.proto``.
PREFIX: Final = "tidegate"

_REPLACEMENTS: Final = (
    (f"from {PREFIX} import ", "from server._pb import "),
    (f"(DESCRIPTOR, '{PREFIX}.", "(DESCRIPTOR, 'server._pb."),
    ("from google.protobuf import descriptor_pool as _descriptor_pool", "from server._pb._pool import POOL as _POOL"),
    ("_descriptor_pool.Default()", "_POOL"),
)


def compiler() -> Path:
    """The interpreter of the pinned environment, made on first use or when the pins have changed."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = ENVIRONMENT / "pins.txt"
    wanted = "\n".join(PINS)
    if not stamp.is_file() or stamp.read_text() != wanted:
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
        stamp.write_text(wanted)
    return python


def compile_into(folder: Path) -> None:
    """Run protoc; the results land in ``folder/tidegate``."""
    names = sorted(f"{PREFIX}/{path.name}" for path in PROTO.glob("*.proto"))
    options = [f"--proto_path={PREFIX}={PROTO}", f"--python_out={folder}", f"--pyi_out={folder}"]
    subprocess.run([compiler(), "-m", "grpc_tools.protoc", *options, *names], check=True)


def adapt(text: str) -> str:
    """The text that is committed, from the text that protoc wrote."""
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text


def generate() -> dict[str, str]:
    """File name -> committed text, for every generated file."""
    with tempfile.TemporaryDirectory() as folder:
        compile_into(Path(folder))
        files = sorted((Path(folder) / PREFIX).iterdir())
        return {path.name: adapt(path.read_text()) for path in files}


def stale(wanted: dict[str, str]) -> list[str]:
    """Names of files that differ from what is committed, are missing there, or have no source any more."""
    present = {path.name: path.read_text() for path in TARGET.glob("*_pb2.py*")}
    return sorted(name for name in wanted.keys() | present.keys() if wanted.get(name) != present.get(name))


def write(wanted: dict[str, str]) -> None:
    """Make the committed files equal to ``wanted``."""
    for name in stale(wanted):
        path = TARGET / name
        if name in wanted:
            path.write_text(wanted[name])
        else:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate server/_pb from proto.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when stale")
    check: bool = parser.parse_args().check
    wanted = generate()
    changed = stale(wanted)
    if not check:
        write(wanted)
    for name in changed:
        sys.stdout.write(f"{'stale' if check else 'wrote'}: server/_pb/{name}\n")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
